//! Tokens of an OIDC provider: `Authorization: Bearer` with a JWT that the provider signed.
//!
//! A token is verified with the provider's public keys ([`keys`]): its signature, by an algorithm of the allow-list
//! (none of which is symmetric, so that a public key is never used as a secret), issuer, audience, `exp` and `nbf`. One
//! of its claims names a tenant of the key file; the tenant's limits are the same as for its API keys. A valid token is
//! cached until it expires, so that its signature is verified once.

pub mod keys;
mod verify;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use self::{
    keys::{KeySource, KeyStore},
    verify::{Refusal, Token, now},
};
use super::keys::Digest;
use crate::api::error::ApiError;

/// Maximum bytes of a token; tokens of common providers have a few hundred to a few thousand.
const MAX_TOKEN_BYTES: usize = 16 << 10;
/// Maximum number of cached tokens.
const MAX_REMEMBERED: usize = 16_384;
/// Maximum characters of a subject in the audit log.
const MAX_SUBJECT: usize = 128;

/// The `router.access.jwt` section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JwtOptions {
    /// The required `iss`. Without `jwks_url` and `jwks_file`, the issuer's discovery document names the URL of the
    /// keys.
    pub issuer: String,
    /// The accepted audiences; `aud` must hold one of them.
    pub audience: Vec<String>,
    /// URL of the provider's keys.
    #[serde(default)]
    pub jwks_url: Option<String>,
    /// File of keys, read again if it changes; an alternative to the URL.
    #[serde(default)]
    pub jwks_file: Option<PathBuf>,
    /// PEM file of the authorities for the URL's certificate; absent: those of the system.
    #[serde(default)]
    pub jwks_ca_file: Option<PathBuf>,
    /// Interval of fetches in seconds. A token with an unknown key triggers one more fetch, at most every ten seconds.
    #[serde(default = "default_refresh")]
    pub refresh_seconds: f64,
    /// Signature algorithms that are accepted.
    #[serde(default = "default_algorithms")]
    pub algorithms: Vec<JwtAlgorithm>,
    /// Maximum difference in seconds between the provider's clock and the router's.
    #[serde(default = "default_skew")]
    pub clock_skew_seconds: u64,
    /// The claim that names the tenant: a string, or a list whose first known name is used. A name that begins with `/`
    /// is a JSON pointer, for example `/realm_access/roles`.
    #[serde(default = "default_claim")]
    pub tenant_claim: String,
    /// The tenant of tokens whose claim is absent or names no known tenant; without a default such tokens are refused.
    #[serde(default)]
    pub default_tenant: Option<String>,
}

fn default_refresh() -> f64 {
    300.0
}

fn default_algorithms() -> Vec<JwtAlgorithm> {
    vec![JwtAlgorithm::RS256, JwtAlgorithm::ES256, JwtAlgorithm::EdDSA]
}

fn default_skew() -> u64 {
    60
}

fn default_claim() -> String {
    "tenant".into()
}

/// The algorithms that can be allowed; none is symmetric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the names are RFC 7518's and RFC 8037's
pub enum JwtAlgorithm {
    RS256,
    RS384,
    RS512,
    PS256,
    PS384,
    PS512,
    ES256,
    ES384,
    EdDSA,
}

impl JwtAlgorithm {
    fn of(name: &str) -> Option<Self> {
        use JwtAlgorithm::*;
        let all = [RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA];
        all.into_iter().find(|algorithm| format!("{algorithm:?}") == name)
    }
}

/// Why the section cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("router.access.jwt.{field}: {reason}")]
pub struct JwtError {
    /// The key.
    pub field: &'static str,
    /// What is wrong with the key's value.
    pub reason: String,
}

/// The contents of a valid token.
#[derive(Clone, Debug, PartialEq)]
pub struct Identity {
    /// `sub`, for the audit log.
    pub subject: Arc<str>,
    /// The names in the tenant claim; the first known name is used.
    pub tenants: Arc<[String]>,
    /// Expiry in seconds since 1970, clock skew included.
    until: u64,
}

/// Verifies tokens.
pub struct Tokens {
    options: JwtOptions,
    keys: KeyStore,
    remembered: Mutex<Remembered>,
}

#[derive(Default)]
struct Remembered {
    /// The version of the keys that verified the cached tokens.
    generation: u64,
    identities: HashMap<Digest, Identity>,
}

impl Tokens {
    /// Creates the verifier. It reads a file of keys; [`Tokens::keep_fresh`] fetches keys from a URL.
    pub fn open(options: JwtOptions) -> Result<Self, JwtError> {
        let wrong = |field, reason: &str| Err(JwtError { field, reason: reason.into() });
        if options.issuer.is_empty() {
            return wrong("issuer", "expected the provider's issuer");
        }
        if options.audience.is_empty() || options.audience.iter().any(String::is_empty) {
            return wrong("audience", "expected at least one: without it, tokens for other services would be accepted");
        }
        if options.algorithms.is_empty() {
            return wrong("algorithms", "expected at least one");
        }
        if !(1.0..=1e7).contains(&options.refresh_seconds) {
            return wrong("refresh_seconds", "expected at least 1");
        }
        if options.clock_skew_seconds > 3600 {
            return wrong("clock_skew_seconds", "expected at most 3600");
        }
        if options.tenant_claim.is_empty() {
            return wrong("tenant_claim", "expected the name of a claim");
        }
        let source = KeySource::of(&options)?;
        let keys = KeyStore::open(source, options.refresh_seconds)?;
        Ok(Self { options, keys, remembered: Mutex::default() })
    }

    /// The options of the section.
    pub fn options(&self) -> &JwtOptions {
        &self.options
    }

    /// Fetches keys at regular intervals; never returns.
    pub async fn keep_fresh(&self) {
        self.keys.keep_fresh().await;
    }

    /// Whether a bearer credential has the form of a token.
    pub fn looks_like(bearer: &str) -> bool {
        bearer.starts_with("eyJ") && bearer.bytes().filter(|byte| *byte == b'.').count() == 2
    }

    /// Verifies a token; returns its claims or the refusal.
    pub async fn check(&self, token: &str) -> Result<Identity, ApiError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(refused("it is too long"));
        }
        let digest = Digest::of(token.as_bytes());
        if let Some(known) = self.recall(&digest) {
            return Ok(known);
        }
        let identity = match self.verify(token) {
            // the key may be new
            Err(Refusal::UnknownKey | Refusal::NoKeys) if self.keys.refreshed().await => self.verify(token),
            other => other,
        };
        match identity {
            Ok((generation, identity)) => {
                self.remember(generation, digest, &identity);
                Ok(identity)
            }
            Err(Refusal::NoKeys) => Err(ApiError::unavailable("The keys for tokens are not loaded yet.", 5)),
            Err(Refusal::UnknownKey) => Err(refused("its key is not one of the provider's")),
            Err(Refusal::Bad(reason)) => Err(refused(reason)),
        }
    }

    fn recall(&self, digest: &Digest) -> Option<Identity> {
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        let generation = self.keys.generation();
        if remembered.generation != generation {
            // tokens of a withdrawn key are verified again
            *remembered = Remembered { generation, identities: HashMap::new() };
            return None;
        }
        remembered.identities.get(digest).filter(|identity| now() < identity.until).cloned()
    }

    fn remember(&self, generation: u64, digest: Digest, identity: &Identity) {
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        if remembered.generation != generation {
            return;
        }
        if remembered.identities.len() >= MAX_REMEMBERED {
            let now = now();
            remembered.identities.retain(|_, identity| now < identity.until);
            if remembered.identities.len() >= MAX_REMEMBERED {
                remembered.identities.clear();
            }
        }
        remembered.identities.insert(digest, identity.clone());
    }

    fn verify(&self, token: &str) -> Result<(u64, Identity), Refusal> {
        let token = Token::read(token, &self.options.algorithms)?;
        let keys = self.keys.current().ok_or(Refusal::NoKeys)?;
        let mut outcome = Err(Refusal::UnknownKey);
        for key in keys.matching(token.key_id.as_deref(), token.algorithm) {
            match token.claims(key, &self.options) {
                Ok(claims) => return Ok((keys.generation, self.identity(&claims))),
                Err(refusal) => outcome = Err(refusal),
            }
        }
        outcome
    }

    fn identity(&self, claims: &Map<String, Value>) -> Identity {
        let subject = claims.get("sub").and_then(Value::as_str).unwrap_or("");
        let subject: String = subject.chars().filter(|c| !c.is_control()).take(MAX_SUBJECT).collect();
        let tenants: Vec<String> = match claim(claims, &self.options.tenant_claim) {
            Some(Value::String(name)) => vec![name.clone()],
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
            _ => Vec::new(),
        };
        let expires = claims.get("exp").and_then(Value::as_f64).unwrap_or(0.0);
        Identity {
            subject: subject.into(),
            tenants: tenants.into(),
            until: (expires as u64).saturating_add(self.options.clock_skew_seconds),
        }
    }
}

/// A claim by its name or, with a leading `/`, by a JSON pointer.
fn claim<'a>(claims: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    let Some(place) = name.strip_prefix('/') else { return claims.get(name) };
    let mut names = place.split('/');
    let first = claims.get(names.next()?)?;
    names.try_fold(first, |value, name| value.get(name))
}

fn refused(reason: &str) -> ApiError {
    ApiError::unauthorized(&format!("The token is not accepted: {reason}."), "invalid_token")
}
