//! A fixed list of groups, for clusters without etcd: each endpoint is asked what it is.

use std::time::Duration;

use async_trait::async_trait;
use bora_proto::v1::{DescribeRequest, inference_client::InferenceClient};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tonic::transport::Endpoint;

use crate::tls::Connector;

use super::{
    Announcement, GroupChange, GroupRecord, Registry, RegistryError, RendezvousOffer, RendezvousRecord, WATCH_BUFFER,
};

const ASK_EVERY: Duration = Duration::from_secs(2);
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// So many unanswered questions in a row make a group gone.
const MISSES: u32 = 3;

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
        let (announcement, mut records, done) = Announcement::new(record);
        tokio::spawn(async move {
            let _ = records.wait_for(Option::is_none).await;
            done.send_replace(true);
        });
        Ok(announcement)
    }

    fn watch(&self) -> mpsc::Receiver<GroupChange> {
        let (sender, receiver) = mpsc::channel(WATCH_BUFFER);
        for endpoint in &self.endpoints {
            tokio::spawn(follow(endpoint.clone(), self.tls.clone(), sender.clone()));
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

/// Asks one endpoint again and again, and tells what changed.
async fn follow(endpoint: String, tls: Option<Connector>, sender: mpsc::Sender<GroupChange>) {
    let mut known: Option<GroupRecord> = None;
    let mut misses = 0;
    loop {
        match timeout(ANSWER_WITHIN, describe(&endpoint, tls.as_ref())).await {
            Ok(Ok(record)) => {
                misses = 0;
                if known.as_ref() != Some(&record) {
                    known = Some(record.clone());
                    if sender.send(GroupChange::Put(Box::new(record))).await.is_err() {
                        return;
                    }
                }
            }
            failed => {
                misses += 1;
                let reason = failed.map_or("no answer".into(), |answer| answer.err().unwrap_or_default());
                tracing::debug!(endpoint, reason, misses, "a group of the static list does not answer");
                if misses == MISSES
                    && let Some(record) = known.take()
                {
                    let change = GroupChange::Gone { model: record.model, group: record.group };
                    if sender.send(change).await.is_err() {
                        return;
                    }
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
    let mut client = InferenceClient::new(channel);
    let answer = client.describe(DescribeRequest {}).await.map_err(|status| status.to_string())?;
    let mut record: GroupRecord =
        serde_json::from_str(&answer.into_inner().record_json).map_err(|error| error.to_string())?;
    // the list knows better than the group how it is reached from here
    record.endpoint = endpoint.to_owned();
    Ok(record)
}
