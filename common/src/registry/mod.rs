//! Which groups live, and where: etcd, a fixed list or this process's own memory, behind one trait.
//!
//! The registry is never on the road of a request. When it is away, watchers keep what they saw last and
//! announcements are made again once it is back.

mod etcd;
mod fixed;
mod memory;
mod record;

use async_trait::async_trait;
use tokio::sync::{mpsc, watch};

pub use etcd::{EtcdCredentials, EtcdOptions, EtcdRegistry};
pub use fixed::FixedRegistry;
pub use memory::MemoryRegistry;
pub use record::{Device, GroupRecord, GroupState, RankRecord, RendezvousRecord, RouterRecord, Speed};

/// What a watcher is given.
#[derive(Clone, Debug, PartialEq)]
pub enum GroupChange {
    /// A group is new or its record changed.
    Put(Box<GroupRecord>),
    /// A group is no longer announced. It may still respond: whoever has a live connection to it decides.
    Gone {
        /// Its model.
        model: String,
        /// Its name.
        group: String,
    },
    /// Another group wants the name of one that lives, and was refused.
    Duplicate(Duplicate),
    /// It does not want it any longer.
    DuplicateGone(Duplicate),
}

/// A group that was refused because its name is taken.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Duplicate {
    /// The name.
    pub group: String,
    /// Where the refused group is.
    pub endpoint: String,
}

/// A name in the registry that a live owner has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the name is taken: `{name}` belongs to a live group at {holder} (epoch {epoch}); give each group of a cluster a name of its own (worker.group)"
)]
pub struct NameTaken {
    /// Key or name that is taken.
    pub name: String,
    /// Where its owner is.
    pub holder: String,
    /// Which start of the owner.
    pub epoch: u64,
}

/// How an announcement stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// The store was not reached yet, or is lost.
    #[default]
    Pending,
    /// It can be seen.
    Announced,
    /// Another owner had the name from the beginning: it is not asked for again.
    Refused(NameTaken),
    /// Another owner took the name while the store was lost: it is asked for until it is free.
    Displaced(NameTaken),
}

/// The registry can't do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The store can't be reached or refuses.
    #[error("registry at {endpoints}: {reason}")]
    Unavailable {
        /// Where it should be.
        endpoints: String,
        /// In its words.
        reason: String,
    },
    /// Another group has the name.
    #[error(transparent)]
    NameTaken(#[from] NameTaken),
    /// This kind of registry can't do it.
    #[error("a {kind} registry can't {what}")]
    Unsupported {
        /// `static` or `memory`.
        kind: &'static str,
        /// What was asked.
        what: &'static str,
    },
}

/// Which groups live.
#[async_trait]
pub trait Registry: Send + Sync {
    /// Announces a group and keeps it announced, also over an absence of the store and if somebody deletes its key,
    /// until the [`Announcement`] is withdrawn or dropped. If a live group has the name, [`Announcement::refused`] says so.
    async fn announce(&self, record: GroupRecord) -> Result<Announcement, RegistryError>;

    /// All groups announced now, as [`GroupChange::Put`], then every change. The stream never ends while it
    /// is read; it is silent while the store is away, and reports the difference once it is back.
    fn watch(&self) -> mpsc::Receiver<GroupChange>;

    /// Counts a router among those that live until the presence ends, and reports how many there are. Only etcd
    /// knows of other routers: elsewhere this one is the only one.
    fn join(&self, router: RouterRecord) -> RouterPresence {
        tracing::debug!(router = router.router, "this registry does not count routers");
        RouterPresence::alone()
    }

    /// Says where the ranks of a group meet, until the announcement is withdrawn or dropped.
    async fn offer_rendezvous(&self, record: RendezvousRecord) -> Result<RendezvousOffer, RegistryError>;

    /// The newest offer for a group.
    async fn find_rendezvous(&self, group: &str) -> Result<Option<RendezvousRecord>, RegistryError>;
}

/// A group that stays announced as long as this lives.
#[derive(Debug)]
pub struct Announcement {
    record: watch::Sender<Option<GroupRecord>>,
    withdrawn: watch::Receiver<bool>,
    standing: watch::Receiver<Standing>,
}

/// What a registry's task follows and reports: the record, the end of the withdrawal, how the announcement stands.
type AnnouncementTask = (watch::Receiver<Option<GroupRecord>>, watch::Sender<bool>, watch::Sender<Standing>);

impl Announcement {
    /// The two ends of an announcement: the caller's handle, and what a registry's task follows. The task
    /// publishes every `Some`, removes the key on `None` or if the sender is gone, and then sets `withdrawn`.
    fn new(record: GroupRecord) -> (Self, AnnouncementTask) {
        let (record, records) = watch::channel(Some(record));
        let (done, withdrawn) = watch::channel(false);
        let (stands, standing) = watch::channel(Standing::default());
        (Self { record, withdrawn, standing }, (records, done, stands))
    }

    /// How it stands.
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.clone()
    }

    /// Completes if the name belongs to another live group, which it did from the beginning.
    pub async fn refused(&self) -> NameTaken {
        let mut standing = self.standing.clone();
        loop {
            if let Standing::Refused(taken) = &*standing.borrow_and_update() {
                return taken.clone();
            }
            if standing.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Publishes a changed record (another state, other measured rates).
    pub fn update(&self, change: impl FnOnce(&mut GroupRecord)) {
        self.record.send_modify(|record| {
            if let Some(record) = record {
                change(record);
            }
        });
    }

    /// The record as last published.
    pub fn record(&self) -> Option<GroupRecord> {
        self.record.borrow().clone()
    }

    /// Removes the group and waits until that is done (or the store can't be reached: its lease ends by itself).
    pub async fn withdraw(mut self) {
        self.record.send_replace(None);
        // an error means that the registry's task is gone, and the lease with it
        let _ = self.withdrawn.wait_for(|done| *done).await;
    }
}

/// A router that counts as long as this lives.
#[derive(Debug)]
pub struct RouterPresence {
    live: watch::Receiver<u32>,
    /// Dropped: the router leaves.
    alive: Option<mpsc::Sender<()>>,
    /// Says when its key is removed.
    left: watch::Receiver<bool>,
}

impl RouterPresence {
    fn alone() -> Self {
        // receivers keep the last value of a sender that is gone
        Self { live: watch::channel(1).1, alive: None, left: watch::channel(true).1 }
    }

    /// How many routers live, this one included.
    pub fn live(&self) -> watch::Receiver<u32> {
        self.live.clone()
    }

    /// Leaves, and waits until the others can know (or etcd can't be reached: the lease ends by itself).
    pub async fn leave(mut self) {
        self.alive = None;
        // an error means that the registry's task is gone
        let _ = self.left.wait_for(|left| *left).await;
    }
}

/// An offer that stands as long as this lives.
#[derive(Debug)]
pub struct RendezvousOffer {
    _alive: mpsc::Sender<()>,
}

/// Changes a watcher may lag behind before the registry waits for it.
const WATCH_BUFFER: usize = 1024;

/// The difference between two views of the store, as changes.
fn difference<'a>(
    before: &std::collections::BTreeMap<String, GroupRecord>,
    after: impl Iterator<Item = (&'a String, &'a GroupRecord)> + Clone,
) -> Vec<GroupChange> {
    let mut changes: Vec<GroupChange> = after
        .clone()
        .filter(|(key, record)| before.get(*key) != Some(record))
        .map(|(_, record)| GroupChange::Put(Box::new(record.clone())))
        .collect();
    let now: std::collections::BTreeSet<&String> = after.map(|(key, _)| key).collect();
    for (key, record) in before {
        if !now.contains(key) {
            changes.push(GroupChange::Gone { model: record.model.clone(), group: record.group.clone() });
        }
    }
    changes
}
