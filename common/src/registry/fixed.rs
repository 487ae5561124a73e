//! A fixed list of groups, for clusters without etcd: each endpoint is asked what it is.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bora_proto::v1::{DescribeRequest, inference_client::InferenceClient};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tonic::transport::Endpoint;

use crate::tls::Connector;

use super::{
    Announcement, Duplicate, GroupChange, GroupRecord, Registry, RegistryError, RendezvousOffer, RendezvousRecord,
    Standing, WATCH_BUFFER,
};

const ASK_EVERY: Duration = Duration::from_secs(2);
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// So many unanswered questions in a row make a group gone.
const MISSES: u32 = 3;
/// A record is small, also one of a thousand ranks.
const MAX_RECORD_BYTES: usize = 256 << 10;

/// Groups at known endpoints.
#[derive(Clone, Debug)]
pub struct FixedRegistry {
    endpoints: Vec<String>,
    tls: Option<Connector>,
}

impl FixedRegistry {
    /// `endpoints` as `host:port` of the leaders' gRPC services.
    pub fn new(endpoints: Vec<String>, tls: Option<Connector>) -> Self {
        Self { endpoints, tls }
    }
}

#[async_trait]
impl Registry for FixedRegistry {
    async fn announce(&self, record: GroupRecord) -> Result<Announcement, RegistryError> {
        // whoever lists this group's endpoint asks it; there is nothing to announce
        let (announcement, (mut records, done, standing)) = Announcement::new(record);
        standing.send_replace(Standing::Announced);
        tokio::spawn(async move {
            let _ = records.wait_for(Option::is_none).await;
            done.send_replace(true);
        });
        Ok(announcement)
    }

    fn watch(&self) -> mpsc::Receiver<GroupChange> {
        let (sender, receiver) = mpsc::channel(WATCH_BUFFER);
        let names = Arc::new(Names::default());
        for endpoint in &self.endpoints {
            tokio::spawn(follow(endpoint.clone(), self.tls.clone(), Arc::clone(&names), sender.clone()));
        }
        receiver
    }

    async fn offer_rendezvous(&self, _: RendezvousRecord) -> Result<RendezvousOffer, RegistryError> {
        Err(RegistryError::Unsupported { kind: "static", what: "hold a rendezvous: set worker.leader" })
    }

    async fn find_rendezvous(&self, _: &str) -> Result<Option<RendezvousRecord>, RegistryError> {
        Err(RegistryError::Unsupported { kind: "static", what: "hold a rendezvous: set worker.leader" })
    }
}

/// Which endpoint has which name: of two groups of one name the first that responds keeps it, for as long as it does.
#[derive(Debug, Default)]
struct Names {
    holders: Mutex<BTreeMap<String, String>>,
}

impl Names {
    /// Whether the endpoint has the name now.
    fn claim(&self, group: &str, endpoint: &str) -> bool {
        let mut holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
        holders.entry(group.to_owned()).or_insert_with(|| endpoint.to_owned()) == endpoint
    }

    fn release(&self, group: &str, endpoint: &str) {
        let mut holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
        if holders.get(group).is_some_and(|holder| holder == endpoint) {
            holders.remove(group);
        }
    }
}

/// What an endpoint is known to be.
#[derive(Debug, PartialEq)]
enum Known {
    Nothing,
    Group(Box<GroupRecord>),
    /// Its name is another endpoint's.
    Duplicate(Duplicate),
}

impl Known {
    fn of(record: GroupRecord, names: &Names) -> Self {
        if names.claim(&record.group, &record.endpoint) {
            return Self::Group(Box::new(record));
        }
        Self::Duplicate(Duplicate { group: record.group, endpoint: record.endpoint })
    }

    /// What became of `before`, as changes; `names` are given back.
    fn since(&self, before: Self, names: &Names) -> Vec<GroupChange> {
        let gone = match (&before, self) {
            (Self::Nothing, _) => None,
            (Self::Group(before), Self::Group(now)) if before.group == now.group => None,
            (Self::Group(before), _) => {
                names.release(&before.group, &before.endpoint);
                Some(GroupChange::Gone { model: before.model.clone(), group: before.group.clone() })
            }
            (Self::Duplicate(before), _) => Some(GroupChange::DuplicateGone(before.clone())),
        };
        let now = match self {
            Self::Nothing => None,
            Self::Group(record) => Some(GroupChange::Put(record.clone())),
            Self::Duplicate(duplicate) => {
                let (group, endpoint) = (&duplicate.group, &duplicate.endpoint);
                tracing::error!(
                    group,
                    endpoint,
                    "another group of the static list has this group's name, ignoring this one"
                );
                Some(GroupChange::Duplicate(duplicate.clone()))
            }
        };
        gone.into_iter().chain(now).collect()
    }
}

/// Asks one endpoint again and again, and reports what changed.
async fn follow(endpoint: String, tls: Option<Connector>, names: Arc<Names>, sender: mpsc::Sender<GroupChange>) {
    let mut known = Known::Nothing;
    let mut misses = 0;
    loop {
        let now = match timeout(ANSWER_WITHIN, describe(&endpoint, tls.as_ref())).await {
            Ok(Ok(record)) => {
                misses = 0;
                Some(Known::of(record, &names))
            }
            failed => {
                misses += 1;
                let reason = failed.map_or("no answer".into(), |response| response.err().unwrap_or_default());
                tracing::debug!(endpoint, reason, misses, "a group of the static list does not answer");
                (misses == MISSES).then_some(Known::Nothing)
            }
        };
        if let Some(now) = now.filter(|now| *now != known) {
            let before = std::mem::replace(&mut known, now);
            for change in known.since(before, &names) {
                if sender.send(change).await.is_err() {
                    return;
                }
            }
        }
        tokio::select! {
            () = sleep(ASK_EVERY) => {}
            () = sender.closed() => return,
        }
    }
}

async fn describe(endpoint: &str, tls: Option<&Connector>) -> Result<GroupRecord, String> {
    let address = Endpoint::from_shared(format!("http://{endpoint}")).map_err(|error| error.to_string())?;
    let channel = crate::tls::connect(&address, tls).await.map_err(|error| error.to_string())?;
    let mut client = InferenceClient::new(channel).max_decoding_message_size(MAX_RECORD_BYTES);
    let response = client.describe(DescribeRequest {}).await.map_err(|status| status.to_string())?;
    let mut record: GroupRecord =
        serde_json::from_str(&response.into_inner().record_json).map_err(|error| error.to_string())?;
    // the list knows better than the group how it is reached from here
    record.endpoint = endpoint.to_owned();
    Ok(record)
}
