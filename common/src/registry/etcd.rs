//! The registry in etcd.
//!
//! Keys: `/bora/v1/{cluster}/groups/{model}/{group}` (JSON [`GroupRecord`]),
//! `/bora/v1/{cluster}/routers/{router}` (JSON [`RouterRecord`]) and
//! `/bora/v1/{cluster}/rendezvous/{group}/{epoch, 20 digits}` (JSON [`RendezvousRecord`]), each under a lease
//! of its owner. A `/` or `%` in a name is percent-encoded.
//!
//! etcd away is no outage: an announcement is kept by a task that grants a new lease and puts the record
//! again once etcd answers; a watch reads everything anew and tells only what differs.

mod routers;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{
    Certificate, Client, ConnectOptions, EventType, GetOptions, Identity, PutOptions, SortOrder, SortTarget,
    TlsOptions, WatchOptions,
};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

use super::{
    Announcement, GroupChange, GroupRecord, Registry, RegistryError, RendezvousOffer, RendezvousRecord, RouterPresence,
    RouterRecord, WATCH_BUFFER, difference,
};
use crate::config::RegistryTls;

/// How etcd is reached.
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    /// `host:port` or `http://host:port` of each member.
    pub endpoints: Vec<String>,
    /// Name of this cluster: several may share one etcd.
    pub cluster: String,
    /// User and password, where etcd asks for them.
    pub credentials: Option<(String, String)>,
    /// How TLS is spoken; `None` = plain text.
    pub tls: Option<RegistryTls>,
    /// Time to live of leases: so long after its death a group may still be listed.
    pub lease_ttl: Duration,
}

/// One answer of etcd; a dead member is noticed by this.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);
/// etcd closes connections that ping more often than every 5 s (its --grpc-keepalive-min-time).
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LONGEST_BACKOFF: Duration = Duration::from_secs(2);

/// Groups announced in etcd.
#[derive(Clone, Debug)]
pub struct EtcdRegistry {
    options: EtcdOptions,
}

type StoreResult<T> = Result<T, String>;

impl EtcdRegistry {
    /// Connects lazily: etcd may come later than we do.
    pub fn new(options: EtcdOptions) -> Self {
        Self { options }
    }

    fn groups_prefix(&self) -> String {
        format!("/bora/v1/{}/groups/", encode_segment(&self.options.cluster))
    }

    fn group_key(&self, record: &GroupRecord) -> String {
        format!("{}{}/{}", self.groups_prefix(), encode_segment(&record.model), encode_segment(&record.group))
    }

    fn rendezvous_prefix(&self, group: &str) -> String {
        format!("/bora/v1/{}/rendezvous/{}/", encode_segment(&self.options.cluster), encode_segment(group))
    }

    async fn connect(&self) -> StoreResult<Client> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(REQUEST_TIMEOUT)
            .with_keep_alive(KEEP_ALIVE_INTERVAL, REQUEST_TIMEOUT)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        if let Some((user, password)) = &self.options.credentials {
            options = options.with_user(user, password);
        }
        if let Some(tls) = &self.options.tls {
            options = options.with_tls(read_tls(tls).await?);
        }
        within(Client::connect(&self.options.endpoints, Some(options))).await
    }

    fn unavailable(&self, reason: String) -> RegistryError {
        RegistryError::Unavailable { endpoints: self.options.endpoints.join(","), reason }
    }

    /// Keeps `value` under `key` until the channel says `None` or its sender is gone.
    async fn keep(&self, key: &str, mut value: watch::Receiver<Option<Vec<u8>>>) {
        let mut backoff = Backoff::new();
        loop {
            match self.keep_once(key, &mut value, &mut backoff).await {
                Ok(()) => return,
                Err(reason) => {
                    tracing::warn!(key, reason, "etcd lost, announcing again when it is back");
                    tokio::select! {
                        () = backoff.wait() => {}
                        // withdrawn meanwhile: the lease ends by itself
                        () = withdrawn(&mut value) => return,
                    }
                }
            }
        }
    }

    /// One lease's life. `Ok` once withdrawn; `Err` when the lease or etcd is lost.
    async fn keep_once(
        &self,
        key: &str,
        value: &mut watch::Receiver<Option<Vec<u8>>>,
        backoff: &mut Backoff,
    ) -> StoreResult<()> {
        let mut client = self.connect().await?;
        let ttl = self.options.lease_ttl.as_secs().max(2) as i64;
        let lease = within(client.lease_grant(ttl, None)).await?.id();
        let (mut keeper, mut answers) = within(client.lease_keep_alive(lease)).await?;
        let mut beat = tokio::time::interval(self.options.lease_ttl / 3);
        value.mark_changed();
        loop {
            tokio::select! {
                changed = value.changed() => {
                    let current = if changed.is_ok() { value.borrow_and_update().clone() } else { None };
                    let Some(bytes) = current else {
                        // best effort: without etcd the lease ends by itself
                        let _ = within(client.delete(key, None)).await;
                        let _ = within(client.lease_revoke(lease)).await;
                        return Ok(());
                    };
                    let options = PutOptions::new().with_lease(lease);
                    within(client.put(key, bytes, Some(options))).await?;
                    tracing::debug!(key, lease, "announced in etcd");
                    backoff.reset();
                }
                _ = beat.tick() => {
                    within(keeper.keep_alive()).await?;
                    match within(answers.message()).await? {
                        Some(answer) if answer.ttl() > 0 => {}
                        _ => return Err("the lease has expired".into()),
                    }
                }
            }
        }
    }

    /// Reads all groups and follows their changes until something fails or the watcher is gone (`Ok`).
    async fn watch_once(
        &self,
        seen: &mut BTreeMap<String, GroupRecord>,
        sender: &mpsc::Sender<GroupChange>,
        backoff: &mut Backoff,
    ) -> StoreResult<()> {
        let mut client = self.connect().await?;
        let prefix = self.groups_prefix();
        let all = within(client.get(prefix.clone(), Some(GetOptions::new().with_prefix()))).await?;
        let revision = all.header().map_or(0, |header| header.revision());
        let now: BTreeMap<String, GroupRecord> = all
            .kvs()
            .iter()
            .filter_map(|kv| Some((String::from_utf8_lossy(kv.key()).into_owned(), parse(kv.key(), kv.value())?)))
            .collect();
        for change in difference(seen, now.iter()) {
            if sender.send(change).await.is_err() {
                return Ok(());
            }
        }
        *seen = now;
        backoff.reset();
        let options = WatchOptions::new().with_prefix().with_start_revision(revision + 1);
        let mut events = within(client.watch(prefix, Some(options))).await?;
        loop {
            let response = tokio::select! {
                response = events.message() => response.map_err(|error| error.to_string())?,
                () = sender.closed() => return Ok(()),
            };
            let Some(response) = response else {
                return Err("the watch ended".into());
            };
            if response.canceled() {
                return Err(format!("the watch was cancelled: {}", response.cancel_reason()));
            }
            for event in response.events() {
                let Some(kv) = event.kv() else { continue };
                let key = String::from_utf8_lossy(kv.key()).into_owned();
                let change = match event.event_type() {
                    EventType::Put => {
                        let Some(record) = parse(kv.key(), kv.value()) else {
                            continue;
                        };
                        seen.insert(key, record.clone());
                        GroupChange::Put(Box::new(record))
                    }
                    EventType::Delete => {
                        let Some(record) = seen.remove(&key) else {
                            continue;
                        };
                        GroupChange::Gone { model: record.model, group: record.group }
                    }
                };
                if sender.send(change).await.is_err() {
                    return Ok(());
                }
            }
        }
    }
}

#[async_trait]
impl Registry for EtcdRegistry {
    async fn announce(&self, record: GroupRecord) -> Result<Announcement, RegistryError> {
        let key = self.group_key(&record);
        let (announcement, mut records, done) = Announcement::new(record);
        let registry = self.clone();
        tokio::spawn(async move {
            let (bytes, values) = watch::channel(encode(records.borrow_and_update().as_ref()));
            let forward = async {
                while records.changed().await.is_ok() {
                    let record = records.borrow_and_update().clone();
                    bytes.send_replace(encode(record.as_ref()));
                    if record.is_none() {
                        break;
                    }
                }
                bytes.send_replace(None);
            };
            tokio::join!(registry.keep(&key, values), forward);
            done.send_replace(true);
        });
        Ok(announcement)
    }

    fn watch(&self) -> mpsc::Receiver<GroupChange> {
        let (sender, receiver) = mpsc::channel(WATCH_BUFFER);
        let registry = self.clone();
        tokio::spawn(async move {
            let mut seen = BTreeMap::new();
            let mut backoff = Backoff::new();
            loop {
                match registry.watch_once(&mut seen, &sender, &mut backoff).await {
                    Ok(()) => return,
                    Err(reason) => {
                        tracing::warn!(reason, groups = seen.len(), "etcd lost, keeping the groups last seen");
                    }
                }
                tokio::select! {
                    () = backoff.wait() => {}
                    () = sender.closed() => return,
                }
            }
        });
        receiver
    }

    fn join(&self, router: RouterRecord) -> RouterPresence {
        self.join_routers(&router)
    }

    async fn offer_rendezvous(&self, record: RendezvousRecord) -> Result<RendezvousOffer, RegistryError> {
        let key = format!("{}{:020}", self.rendezvous_prefix(&record.group), record.epoch);
        let bytes = serde_json::to_vec(&record).map_err(|error| self.unavailable(error.to_string()))?;
        let (alive, mut gone) = mpsc::channel::<()>(1);
        let registry = self.clone();
        tokio::spawn(async move {
            let (value, values) = watch::channel(Some(bytes));
            let end = async {
                let _ = gone.recv().await;
                value.send_replace(None);
            };
            tokio::join!(registry.keep(&key, values), end);
        });
        Ok(RendezvousOffer { _alive: alive })
    }

    async fn find_rendezvous(&self, group: &str) -> Result<Option<RendezvousRecord>, RegistryError> {
        let find = async {
            let mut client = self.connect().await?;
            let newest = GetOptions::new().with_prefix().with_sort(SortTarget::Key, SortOrder::Descend).with_limit(1);
            within(client.get(self.rendezvous_prefix(group), Some(newest))).await
        };
        let found = find.await.map_err(|reason: String| self.unavailable(reason))?;
        Ok(found.kvs().first().and_then(|kv| serde_json::from_slice(kv.value()).ok()))
    }
}

fn encode(record: Option<&GroupRecord>) -> Option<Vec<u8>> {
    // a GroupRecord has no map with keys that JSON could refuse
    record.and_then(|record| serde_json::to_vec(record).ok())
}

fn parse(key: &[u8], value: &[u8]) -> Option<GroupRecord> {
    serde_json::from_slice(value)
        .inspect_err(|error| {
            let key = String::from_utf8_lossy(key);
            tracing::warn!(%key, %error, "a group record in etcd can't be read and is ignored");
        })
        .ok()
}

async fn read_tls(tls: &RegistryTls) -> StoreResult<TlsOptions> {
    let mut options = TlsOptions::new().ca_certificate(Certificate::from_pem(read_pem(&tls.ca_file).await?));
    if let (Some(certificate), Some(key)) = (&tls.certificate_file, &tls.key_file) {
        options = options.identity(Identity::from_pem(read_pem(certificate).await?, read_pem(key).await?));
    }
    Ok(options)
}

async fn read_pem(path: &Path) -> StoreResult<Vec<u8>> {
    tokio::fs::read(path).await.map_err(|error| format!("registry.tls: {}: {error}", path.display()))
}

fn encode_segment(name: &str) -> String {
    name.replace('%', "%25").replace('/', "%2F")
}

async fn withdrawn(value: &mut watch::Receiver<Option<Vec<u8>>>) {
    let _ = value.wait_for(Option::is_none).await;
}

async fn within<T>(answer: impl Future<Output = Result<T, etcd_client::Error>>) -> StoreResult<T> {
    match timeout(REQUEST_TIMEOUT, answer).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {REQUEST_TIMEOUT:?}")),
    }
}

/// Doubles from 100 ms to 2 s, with jitter so that a fleet does not come back in one instant.
struct Backoff {
    next: Duration,
}

impl Backoff {
    fn new() -> Self {
        Self { next: FIRST_BACKOFF }
    }

    fn reset(&mut self) {
        self.next = FIRST_BACKOFF;
    }

    async fn wait(&mut self) {
        let jitter = rand::random_range(0.5..1.5);
        sleep(self.next.mul_f64(jitter)).await;
        self.next = (self.next * 2).min(LONGEST_BACKOFF);
    }
}
