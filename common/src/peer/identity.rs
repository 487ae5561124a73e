//! The identity of a group's server, and what a caller expects of it.
//!
//! An address is no identity: a pod's IP is reused, and another model's group may listen where a group was. So a caller
//! sends with every call what it expects, and the server refuses the call if it is another one. The refusal names the
//! part that differs and never the server's own value.

use std::sync::OnceLock;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bora_proto::v1::Identity;
use prost::Message as _;
use tonic::metadata::{AsciiMetadataValue, BinaryMetadataValue, MetadataMap};
use tonic::service::Interceptor;
use tonic::{Code, Status};

use crate::registry::GroupRecord;
use crate::version::{self, CONTRACT, Skew};

/// gRPC metadata with the caller's [`Identity`].
pub const METADATA: &str = "bora-expected-bin";
/// gRPC metadata of a refusal: the part that differs.
pub const MISMATCH: &str = "bora-mismatch";
/// Longest value of [`METADATA`] that is decoded.
const MAX_METADATA_BYTES: usize = 8 << 10;

/// gRPC sends binary metadata with or without padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// What a caller expects, encoded once. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Expected(BinaryMetadataValue);

impl Expected {
    /// Of the group that a record announces, in this start of it.
    pub fn of_record(cluster: &str, record: &GroupRecord) -> Self {
        Self::new(&Identity {
            contract: CONTRACT,
            cluster: cluster.to_owned(),
            model: record.model.clone(),
            group: record.group.clone(),
            epoch: record.epoch,
            weight_fingerprint: record.weight_fingerprint.clone(),
        })
    }

    /// Of any identity.
    pub fn new(identity: &Identity) -> Self {
        Self(BinaryMetadataValue::from_bytes(&identity.encode_to_vec()))
    }

    /// Adds it to a call's metadata.
    pub fn attach(&self, metadata: &mut MetadataMap) {
        metadata.insert_bin(METADATA, self.0.clone());
    }

    /// The same call, with the identity.
    pub fn on<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        self.attach(request.metadata_mut());
        request
    }
}

impl Interceptor for Expected {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, Status> {
        self.attach(request.metadata_mut());
        Ok(request)
    }
}

/// Reads what a caller expects from the value of [`METADATA`].
pub fn decode(value: &[u8]) -> Option<Identity> {
    if value.len() > MAX_METADATA_BYTES {
        return None;
    }
    Identity::decode(&BASE64.decode(value).ok()?[..]).ok()
}

/// What must be named in a call; the rest may be left open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Named {
    /// The epoch.
    pub epoch: bool,
    /// The fingerprint of the weights.
    pub weights: bool,
}

/// Who a server is.
#[derive(Debug)]
pub struct ServerIdentity {
    /// Name of the cluster.
    pub cluster: String,
    /// The name that the model is served under.
    pub model: String,
    /// Name of the group.
    pub group: String,
    /// This start of the group.
    pub epoch: u64,
    /// Fingerprint of the weights; empty until they are loaded.
    weights: OnceLock<String>,
}

impl ServerIdentity {
    /// Of a group whose weights are not loaded yet.
    pub fn new(cluster: impl Into<String>, model: impl Into<String>, group: impl Into<String>, epoch: u64) -> Self {
        Self { cluster: cluster.into(), model: model.into(), group: group.into(), epoch, weights: OnceLock::new() }
    }

    /// Of a group that is announced.
    pub fn of_record(cluster: impl Into<String>, record: &GroupRecord) -> Self {
        let identity = Self::new(cluster, record.model.clone(), record.group.clone(), record.epoch);
        identity.set_weights(&record.weight_fingerprint);
        identity
    }

    /// The weights are loaded. Only the first call counts.
    pub fn set_weights(&self, fingerprint: &str) {
        let _ = self.weights.set(fingerprint.to_owned());
    }

    /// Whether this server is what the caller expects. A value of 0 or nothing is open unless it must be named.
    pub fn check(&self, expected: &Identity, named: Named) -> Result<(), Mismatch> {
        version::check_contract(expected.contract).map_err(Mismatch::Contract)?;
        let own_weights = self.weights.get();
        let same_epoch = expected.epoch == self.epoch || (expected.epoch == 0 && !named.epoch);
        let same_weights = match (expected.weight_fingerprint.as_str(), own_weights) {
            // nothing is served yet: the call ends with "loading"
            (_, None) => true,
            ("", Some(_)) => !named.weights,
            (theirs, Some(own)) => theirs == own,
        };
        let parts = [
            (expected.cluster == self.cluster, Part::Cluster),
            (expected.model == self.model, Part::Model),
            (expected.group == self.group, Part::Group),
            (same_epoch, Part::Epoch),
            (same_weights, Part::Weights),
        ];
        match parts.into_iter().find(|(same, _)| !same) {
            None => Ok(()),
            Some((_, part)) => Err(Mismatch::Part(part)),
        }
    }
}

/// A part of an identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The cluster's name.
    Cluster,
    /// The model's name.
    Model,
    /// The group's name.
    Group,
    /// The start of the group.
    Epoch,
    /// The fingerprint of the weights.
    Weights,
}

impl Part {
    fn in_words(self) -> &'static str {
        match self {
            Part::Cluster => "is of another cluster",
            Part::Model => "serves another model",
            Part::Group => "is another group",
            Part::Epoch => "is another start of the group (epoch)",
            Part::Weights => "has other weights (fingerprint)",
        }
    }

    /// Its name in metadata and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Part::Cluster => "cluster",
            Part::Model => "model",
            Part::Group => "group",
            Part::Epoch => "epoch",
            Part::Weights => "weights",
        }
    }
}

/// Why a server is not the one that the caller expects.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// The caller speaks another contract, or names none.
    #[error("{0}")]
    Contract(Skew),
    /// The value can't be read.
    #[error("{METADATA} can't be read")]
    Malformed,
    /// This server is another one.
    #[error("identity mismatch: this server {}", .0.in_words())]
    Part(Part),
}

impl Mismatch {
    /// Its name in metadata and metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Mismatch::Contract(_) => "contract",
            Mismatch::Malformed => "malformed",
            Mismatch::Part(part) => part.name(),
        }
    }
}

impl From<Mismatch> for Status {
    fn from(mismatch: Mismatch) -> Self {
        let mut status = Status::failed_precondition(mismatch.to_string());
        status.metadata_mut().insert(MISMATCH, AsciiMetadataValue::from_static(mismatch.name()));
        status
    }
}

/// The part that differs, if a call was refused because the server is another one.
pub fn mismatch_of(status: &Status) -> Option<&'static str> {
    if status.code() != Code::FailedPrecondition {
        return None;
    }
    let reported = status.metadata().get(MISMATCH)?.to_str().ok()?;
    ["contract", "malformed", "cluster", "model", "group", "epoch", "weights"]
        .into_iter()
        .find(|name| *name == reported)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Named = Named { epoch: true, weights: true };
    const OPEN: Named = Named { epoch: false, weights: false };

    fn server() -> ServerIdentity {
        let server = ServerIdentity::new("c", "m", "g", 7);
        server.set_weights("f");
        server
    }

    fn expected() -> Identity {
        Identity {
            contract: CONTRACT,
            cluster: "c".into(),
            model: "m".into(),
            group: "g".into(),
            epoch: 7,
            weight_fingerprint: "f".into(),
        }
    }

    #[test]
    fn names_the_part_that_differs_and_not_the_expected_value() {
        assert_eq!(server().check(&expected(), ALL), Ok(()));
        let cases = [
            ("cluster", Identity { cluster: "stranger".into(), ..expected() }),
            ("model", Identity { model: "stranger".into(), ..expected() }),
            ("group", Identity { group: "stranger".into(), ..expected() }),
            ("epoch", Identity { epoch: 8, ..expected() }),
            ("epoch", Identity { epoch: 0, ..expected() }),
            ("weights", Identity { weight_fingerprint: "stranger".into(), ..expected() }),
            ("weights", Identity { weight_fingerprint: String::new(), ..expected() }),
            ("contract", Identity { contract: 1, ..expected() }),
            ("contract", Identity { contract: 0, ..expected() }),
        ];
        for (part, expected) in cases {
            let refused = Status::from(server().check(&expected, ALL).unwrap_err());
            assert_eq!(refused.code(), Code::FailedPrecondition);
            assert_eq!(mismatch_of(&refused), Some(part));
            assert!(!refused.message().contains('7') && !refused.message().contains("stranger"), "{refused}");
        }
    }

    #[test]
    fn what_need_not_be_named_may_be_open_and_must_agree_if_it_is_named() {
        let open = Identity { epoch: 0, weight_fingerprint: String::new(), ..expected() };
        assert_eq!(server().check(&open, OPEN), Ok(()));
        assert!(server().check(&Identity { epoch: 6, ..open.clone() }, OPEN).is_err());
        let loading = ServerIdentity::new("c", "m", "g", 7);
        assert_eq!(loading.check(&expected(), ALL), Ok(()));
        assert!(loading.check(&Identity { model: "n".into(), ..expected() }, ALL).is_err());
    }

    #[test]
    fn an_identity_survives_the_wire_and_nothing_else_is_taken_for_one() {
        let mut metadata = MetadataMap::new();
        Expected::new(&expected()).attach(&mut metadata);
        let headers = metadata.into_headers();
        assert_eq!(decode(headers[METADATA].as_bytes()), Some(expected()));
        for wrong in ["!", "AAAA", &"A".repeat(MAX_METADATA_BYTES + 4)] {
            assert_eq!(decode(wrong.as_bytes()), None, "{wrong}");
        }
    }
}
