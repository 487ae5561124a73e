//! Keeps one key of ours in etcd: creates it under a lease, restores it when somebody deletes or replaces it, and never
//! takes a name that a live owner holds.
//!
//! A key is created only if it is absent (a transaction). A key that exists is ours if it names our own address: then a
//! process before this one left it behind, and it is replaced at once. A key of another owner is waited out: without
//! its owner it ends with its lease. If it is still there after that time its owner lives, and the name is taken.

use std::time::Duration;

use etcd_client::{Client, Compare, CompareOp, EventType, KeyValue, PutOptions, Txn, TxnOp, WatchOptions, WatchStream};
use serde_json::Value;
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use super::{Backoff, EtcdRegistry, StoreResult, within};
use crate::registry::{NameTaken, Standing};

/// How often a key of another owner is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// How long after the end of its lease a key may still be seen.
const EXPIRY_MARGIN: Duration = Duration::from_secs(2);
/// How often a name that another owner took meanwhile is asked for.
const RECLAIM_INTERVAL: Duration = Duration::from_secs(3);
/// How long a mark of a refused announcement stays: longer than a supervisor usually waits before it starts a process again.
const MARK_TTL: Duration = Duration::from_secs(120);

/// A key to keep.
pub(super) struct Kept {
    pub(super) key: String,
    /// Field of the value (a JSON object) that says where its owner is.
    pub(super) address_field: &'static str,
    /// Whether another owner at the first attempt is final. Otherwise it is waited for.
    pub(super) refuses_taken: bool,
}

/// Why a key is not kept any longer.
enum Lost {
    /// etcd or the lease.
    Store(String),
    /// The key was deleted or replaced.
    Key(&'static str),
    /// A live owner has it.
    Taken(NameTaken),
}

impl From<String> for Lost {
    fn from(reason: String) -> Self {
        Self::Store(reason)
    }
}

/// What a value says of its owner.
#[derive(Debug, Default, PartialEq, Eq)]
struct Owner {
    address: String,
    epoch: u64,
}

impl Owner {
    fn of(value: &[u8], address_field: &str) -> Option<Self> {
        let value: Value = serde_json::from_slice(value).ok()?;
        let address = value.get(address_field)?.as_str()?.to_owned();
        Some(Self { address, epoch: value.get("epoch").and_then(Value::as_u64).unwrap_or(0) })
    }

    /// Whether a key of `other` may be replaced: it was left by a process before this one.
    fn replaces(&self, other: &Self) -> bool {
        self.address == other.address && self.epoch >= other.epoch
    }
}

/// Keeps a key until its value is withdrawn.
pub(super) struct Keeper<'a> {
    registry: &'a EtcdRegistry,
    kept: Kept,
    value: watch::Receiver<Option<Vec<u8>>>,
    standing: watch::Sender<Standing>,
    backoff: Backoff,
}

impl<'a> Keeper<'a> {
    /// For a key whose value is `value`; it is withdrawn if that is `None` or its sender is gone.
    pub(super) fn new(
        registry: &'a EtcdRegistry,
        kept: Kept,
        value: watch::Receiver<Option<Vec<u8>>>,
        standing: watch::Sender<Standing>,
    ) -> Self {
        Self { registry, kept, value, standing, backoff: Backoff::new() }
    }

    /// Ends when the value is withdrawn, or at once if the name is taken and that is final.
    pub(super) async fn run(mut self) {
        let mut was_announced = false;
        loop {
            let Err(lost) = self.keep_once(&mut was_announced).await else { return };
            let key = &self.kept.key;
            match lost {
                Lost::Store(reason) => {
                    self.standing.send_replace(Standing::Pending);
                    tracing::warn!(key, reason, "etcd lost, announcing again when it is back");
                }
                Lost::Key(what) => {
                    self.standing.send_replace(Standing::Pending);
                    tracing::warn!(key, what, "somebody else changed our key in etcd, restoring it");
                }
                Lost::Taken(taken) if self.kept.refuses_taken && !was_announced => {
                    self.mark_refusal().await;
                    self.standing.send_replace(Standing::Refused(taken));
                    return;
                }
                Lost::Taken(taken) => {
                    tracing::error!(
                        key,
                        holder = taken.holder,
                        "another owner has our key in etcd, waiting for it to end"
                    );
                    self.standing.send_replace(Standing::Displaced(taken));
                    tokio::select! {
                        () = sleep(RECLAIM_INTERVAL) => {}
                        () = withdrawn(self.value.clone()) => return,
                    }
                    continue;
                }
            }
            tokio::select! {
                () = self.backoff.wait() => {}
                // withdrawn meanwhile: the lease ends by itself
                () = withdrawn(self.value.clone()) => return,
            }
        }
    }

    /// One lease's life. `Ok` once withdrawn.
    async fn keep_once(&mut self, was_announced: &mut bool) -> Result<(), Lost> {
        let mut client = self.registry.connect().await?;
        let replaced = tokio::select! {
            replaced = self.wait_for_name(&mut client) => replaced?,
            () = withdrawn(self.value.clone()) => return Ok(()),
        };
        let ttl = self.registry.options.lease_ttl.as_secs().max(2) as i64;
        let lease = within(client.lease_grant(ttl, None)).await?.id();
        let revision = self.create(&mut client, lease, replaced).await?;
        *was_announced = true;
        self.backoff.reset();
        self.standing.send_replace(Standing::Announced);
        tracing::debug!(key = self.kept.key, lease, "announced in etcd");
        let watching = WatchOptions::new().with_start_revision(revision + 1);
        let mut events = within(client.watch(self.kept.key.as_str(), Some(watching))).await?;
        let (mut keeper, mut responses) = within(client.lease_keep_alive(lease)).await?;
        let mut beat = tokio::time::interval(self.registry.options.lease_ttl / 3);
        loop {
            tokio::select! {
                changed = self.value.changed() => {
                    let current = if changed.is_ok() { self.value.borrow_and_update().clone() } else { None };
                    let Some(bytes) = current else {
                        // best effort: without etcd the lease ends by itself
                        let _ = within(client.lease_revoke(lease)).await;
                        return Ok(());
                    };
                    self.update(&mut client, lease, bytes).await?;
                }
                _ = beat.tick() => {
                    within(keeper.keep_alive()).await?;
                    match within(responses.message()).await? {
                        Some(response) if response.ttl() > 0 => {}
                        _ => return Err(Lost::Store("the lease has expired".into())),
                    }
                }
                change = changed_by_others(&mut events, lease) => {
                    let change = change?;
                    // nothing is left under it: what restores the key has a lease of its own
                    let _ = within(client.lease_revoke(lease)).await;
                    return Err(Lost::Key(change));
                }
            }
        }
    }

    fn own(&self) -> Owner {
        let value = self.value.borrow();
        value.as_deref().and_then(|value| Owner::of(value, self.kept.address_field)).unwrap_or_default()
    }

    /// Waits until the key is absent or may be replaced (then its revision is returned).
    async fn wait_for_name(&self, client: &mut Client) -> Result<Option<i64>, Lost> {
        // the holder, and when its key must have ended without it
        let mut foreign: Option<(i64, u64, Instant)> = None;
        loop {
            let found = within(client.get(self.kept.key.as_str(), None)).await?;
            let Some(kv) = found.kvs().first() else { return Ok(None) };
            // A new leader of etcd, or a restart, gives every lease its whole time again.
            let term = found.header().map_or(0, |header| header.raft_term());
            let holder = match Owner::of(kv.value(), self.kept.address_field) {
                // what cannot be read belongs to nobody
                None => return Ok(Some(kv.mod_revision())),
                Some(holder) if self.own().replaces(&holder) => return Ok(Some(kv.mod_revision())),
                Some(holder) => holder,
            };
            match foreign {
                Some((created, seen_term, until)) if created == kv.create_revision() && seen_term == term => {
                    if Instant::now() >= until {
                        let name = self.kept.key.clone();
                        return Err(Lost::Taken(NameTaken { name, holder: holder.address, epoch: holder.epoch }));
                    }
                }
                _ => {
                    tracing::info!(
                        key = self.kept.key,
                        holder = holder.address,
                        "another owner has our key in etcd, waiting for its lease to end"
                    );
                    let until = Instant::now() + self.life_without_owner(client, kv).await?;
                    foreign = Some((kv.create_revision(), term, until));
                }
            }
            sleep(POLL_INTERVAL).await;
        }
    }

    /// How long a key can outlive its owner.
    async fn life_without_owner(&self, client: &mut Client, kv: &KeyValue) -> StoreResult<Duration> {
        if kv.lease() == 0 {
            return Ok(Duration::ZERO); // it has no end
        }
        let granted = within(client.lease_time_to_live(kv.lease(), None)).await?.granted_ttl();
        Ok(Duration::from_secs(u64::try_from(granted).unwrap_or(0)) + EXPIRY_MARGIN)
    }

    /// Creates the key, or replaces the one of that revision; returns the revision at which it stands.
    async fn create(&mut self, client: &mut Client, lease: i64, replaced: Option<i64>) -> Result<i64, Lost> {
        let Some(bytes) = self.value.borrow_and_update().clone() else {
            return Err(Lost::Store("withdrawn".into())); // the caller looks again
        };
        let key = self.kept.key.as_str();
        let unchanged = match replaced {
            None => Compare::create_revision(key, CompareOp::Equal, 0),
            Some(revision) => Compare::mod_revision(key, CompareOp::Equal, revision),
        };
        let put = TxnOp::put(key, bytes, Some(PutOptions::new().with_lease(lease)));
        let outcome = within(client.txn(Txn::new().when([unchanged]).and_then([put]))).await?;
        if !outcome.succeeded() {
            let _ = within(client.lease_revoke(lease)).await;
            return Err(Lost::Key("created by another owner in the same moment"));
        }
        outcome.header().map(|header| header.revision()).ok_or_else(|| Lost::Store("an answer without a header".into()))
    }

    /// Publishes another value, if the key is still ours.
    async fn update(&self, client: &mut Client, lease: i64, bytes: Vec<u8>) -> Result<(), Lost> {
        let key = self.kept.key.as_str();
        let ours = Compare::lease(key, CompareOp::Equal, lease);
        let put = TxnOp::put(key, bytes, Some(PutOptions::new().with_lease(lease)));
        let outcome = within(client.txn(Txn::new().when([ours]).and_then([put]))).await?;
        if outcome.succeeded() { Ok(()) } else { Err(Lost::Key("not ours any longer")) }
    }

    /// Leaves a mark beside the key for a while, by which routers see that two owners want it.
    async fn mark_refusal(&self) {
        let Some(bytes) = self.value.borrow().clone() else { return };
        let mark = async {
            let mut client = self.registry.connect().await?;
            let lease = within(client.lease_grant(MARK_TTL.as_secs() as i64, None)).await?.id();
            let key = super::duplicate_key(&self.kept.key, &self.own().address);
            within(client.put(key, bytes, Some(PutOptions::new().with_lease(lease)))).await
        };
        if let Err(reason) = mark.await {
            tracing::warn!(key = self.kept.key, reason, "the refusal could not be recorded in etcd");
        }
    }
}

/// Waits until the key is deleted or replaced under another lease than ours; says which.
async fn changed_by_others(events: &mut WatchStream, lease: i64) -> StoreResult<&'static str> {
    loop {
        let response = events.message().await.map_err(|error| error.to_string())?;
        let Some(response) = response else { return Err("the watch of our key ended".into()) };
        if response.canceled() {
            return Err(format!("the watch of our key was cancelled: {}", response.cancel_reason()));
        }
        for event in response.events() {
            match event.event_type() {
                EventType::Delete => return Ok("deleted"),
                EventType::Put if event.kv().is_none_or(|kv| kv.lease() != lease) => return Ok("replaced"),
                EventType::Put => {}
            }
        }
    }
}

async fn withdrawn(mut value: watch::Receiver<Option<Vec<u8>>>) {
    let _ = value.wait_for(Option::is_none).await;
}
