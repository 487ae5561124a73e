//! The registry in etcd.
//!
//! Keys: `/bora/v1/{cluster}/groups/{model}/{group}` (JSON [`GroupRecord`]),
//! `/bora/v1/{cluster}/routers/{router}` (JSON [`RouterRecord`]) and
//! `/bora/v1/{cluster}/rendezvous/{group}/{epoch, 20 digits}` (JSON [`RendezvousRecord`]), each under a lease
//! of its owner. A `/` or `%` in a name is percent-encoded.
//!
//! etcd away is no outage: an announcement is kept by a task that grants a new lease and puts the record
//! again once etcd responds ([`keeper`]); a watch reads everything anew and reports only what differs.
//!
//! `.../groups/{model}/{group}/duplicate/{endpoint}` stands for two minutes after a group was refused because its name is
//! taken.

mod keeper;
mod routers;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{
    Certificate, Client, ConnectOptions, EventType, GetOptions, Identity, KeyValue, SortOrder, SortTarget, TlsOptions,
    WatchOptions,
};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

use self::keeper::{Keeper, Kept};
use super::{
    Announcement, Duplicate, GroupChange, GroupRecord, Registry, RegistryError, RendezvousOffer, RendezvousRecord,
    RouterPresence, RouterRecord, Standing, WATCH_BUFFER, difference,
};
use crate::config::RegistryTls;

/// How etcd is reached.
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    /// `host:port` or `http://host:port` of each member.
    pub endpoints: Vec<String>,
    /// Name of this cluster: several may share one etcd.
    pub cluster: String,
    /// User and password, if etcd asks for them.
    pub credentials: Option<EtcdCredentials>,
    /// How TLS is spoken; `None` = plain text.
    pub tls: Option<RegistryTls>,
    /// Time to live of leases: so long after its death a group may still be listed.
    pub lease_ttl: Duration,
}

/// Who we are to etcd. The password is read anew for each connection, so that a changed one is taken.
#[derive(Clone, Debug)]
pub struct EtcdCredentials {
    /// The user.
    pub username: String,
    /// File that holds the password.
    pub password_file: PathBuf,
}

/// One response of etcd; a dead member is noticed by this.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);
/// etcd closes connections that ping more often than every 5 s (its --grpc-keepalive-min-time).
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(2);

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
        if let Some(EtcdCredentials { username, password_file }) = &self.options.credentials {
            let password = tokio::fs::read_to_string(password_file)
                .await
                .map_err(|error| format!("registry.password_file: {}: {error}", password_file.display()))?;
            options = options.with_user(username, password.trim_end());
        }
        if let Some(tls) = &self.options.tls {
            options = options.with_tls(read_tls(tls).await?);
        }
        within(Client::connect(&self.options.endpoints, Some(options))).await
    }

    /// Keeps a value under a key until the other end of `alive` is dropped.
    async fn keep_while(&self, kept: Kept, value: Vec<u8>, mut alive: mpsc::Receiver<()>) {
        let (value, values) = watch::channel(Some(value));
        let end = async {
            let _ = alive.recv().await;
            value.send_replace(None);
        };
        let (standing, _) = watch::channel(Standing::default());
        tokio::join!(Keeper::new(self, kept, values, standing).run(), end);
    }

    fn unavailable(&self, reason: String) -> RegistryError {
        RegistryError::Unavailable { endpoints: self.options.endpoints.join(","), reason }
    }

    /// Reads all groups and follows their changes until something fails or the watcher is gone (`Ok`).
    async fn watch_once(
        &self,
        seen: &mut Seen,
        sender: &mpsc::Sender<GroupChange>,
        backoff: &mut Backoff,
    ) -> StoreResult<()> {
        let mut client = self.connect().await?;
        let prefix = self.groups_prefix();
        let all = within(client.get(prefix.clone(), Some(GetOptions::new().with_prefix()))).await?;
        let revision = all.header().map_or(0, |header| header.revision());
        let mut now = Seen::default();
        for kv in all.kvs() {
            self.put(&mut now, kv);
        }
        for change in now.since(seen) {
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
                let change = match event.event_type() {
                    EventType::Put => self.put(seen, kv),
                    EventType::Delete => seen.remove(&String::from_utf8_lossy(kv.key())),
                };
                let Some(change) = change else { continue };
                if sender.send(change).await.is_err() {
                    return Ok(());
                }
            }
        }
    }

    /// Notes what stands under a key; `None` if it cannot be read or is another group's.
    fn put(&self, seen: &mut Seen, kv: &KeyValue) -> Option<GroupChange> {
        let key = String::from_utf8_lossy(kv.key()).into_owned();
        let record: GroupRecord = serde_json::from_slice(kv.value())
            .inspect_err(|error| tracing::warn!(key, %error, "a group record in etcd can't be read and is ignored"))
            .ok()?;
        let own_key = self.group_key(&record);
        if key == own_key {
            seen.groups.insert(key, record.clone());
            return Some(GroupChange::Put(Box::new(record)));
        }
        if key == duplicate_key(&own_key, &record.endpoint) {
            let duplicate = Duplicate { group: record.group, endpoint: record.endpoint };
            seen.duplicates.insert(key, duplicate.clone());
            return Some(GroupChange::Duplicate(duplicate));
        }
        tracing::warn!(key, "a group record in etcd stands under the key of another group and is ignored");
        None
    }
}

/// What stands in etcd, by key.
#[derive(Default)]
struct Seen {
    groups: BTreeMap<String, GroupRecord>,
    duplicates: BTreeMap<String, Duplicate>,
}

impl Seen {
    fn remove(&mut self, key: &str) -> Option<GroupChange> {
        if let Some(duplicate) = self.duplicates.remove(key) {
            return Some(GroupChange::DuplicateGone(duplicate));
        }
        let record = self.groups.remove(key)?;
        Some(GroupChange::Gone { model: record.model, group: record.group })
    }

    /// The difference to what was seen before.
    fn since(&self, before: &Self) -> Vec<GroupChange> {
        let mut changes = difference(&before.groups, self.groups.iter());
        let new = self.duplicates.iter().filter(|(key, _)| !before.duplicates.contains_key(*key));
        changes.extend(new.map(|(_, duplicate)| GroupChange::Duplicate(duplicate.clone())));
        let gone = before.duplicates.iter().filter(|(key, _)| !self.duplicates.contains_key(*key));
        changes.extend(gone.map(|(_, duplicate)| GroupChange::DuplicateGone(duplicate.clone())));
        changes
    }
}

#[async_trait]
impl Registry for EtcdRegistry {
    async fn announce(&self, record: GroupRecord) -> Result<Announcement, RegistryError> {
        let kept = Kept { key: self.group_key(&record), address_field: "endpoint", refuses_taken: true };
        let (announcement, (mut records, done, standing)) = Announcement::new(record);
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
            tokio::select! {
                // ends first if the name is taken
                () = Keeper::new(&registry, kept, values, standing).run() => {}
                () = async {
                    forward.await;
                    std::future::pending().await
                } => {}
            }
            done.send_replace(true);
        });
        Ok(announcement)
    }

    fn watch(&self) -> mpsc::Receiver<GroupChange> {
        let (sender, receiver) = mpsc::channel(WATCH_BUFFER);
        let registry = self.clone();
        tokio::spawn(async move {
            let mut seen = Seen::default();
            let mut backoff = Backoff::new();
            loop {
                match registry.watch_once(&mut seen, &sender, &mut backoff).await {
                    Ok(()) => return,
                    Err(reason) => {
                        tracing::warn!(reason, groups = seen.groups.len(), "etcd lost, keeping the groups last seen");
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
        let (alive, gone) = mpsc::channel::<()>(1);
        let registry = self.clone();
        tokio::spawn(async move {
            registry.keep_while(Kept { key, address_field: "leader", refuses_taken: false }, bytes, gone).await
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

/// Where the refusal of a group at `endpoint` is noted, whose name is taken.
fn duplicate_key(key: &str, endpoint: &str) -> String {
    format!("{key}/duplicate/{}", encode_segment(endpoint))
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

async fn within<T>(request: impl Future<Output = Result<T, etcd_client::Error>>) -> StoreResult<T> {
    match timeout(REQUEST_TIMEOUT, request).await {
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
        self.next = (self.next * 2).min(MAX_BACKOFF);
    }
}
