//! A registry for one process: `bora serve`, and tests.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use tokio::sync::{mpsc, watch};

use super::{
    Announcement, GroupChange, GroupRecord, NameTaken, Registry, RegistryError, RendezvousOffer, RendezvousRecord,
    Standing, WATCH_BUFFER, difference,
};

/// Groups of this process. Clones share their groups.
#[derive(Clone, Debug, Default)]
pub struct MemoryRegistry {
    groups: Arc<watch::Sender<BTreeMap<String, GroupRecord>>>,
    rendezvous: Arc<Mutex<BTreeMap<String, RendezvousRecord>>>,
}

impl MemoryRegistry {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    fn rendezvous(&self) -> MutexGuard<'_, BTreeMap<String, RendezvousRecord>> {
        self.rendezvous.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Registry for MemoryRegistry {
    async fn announce(&self, record: GroupRecord) -> Result<Announcement, RegistryError> {
        let key = format!("{}/{}", record.model, record.group);
        let mut taken = None;
        self.groups.send_modify(|groups| match groups.get(&key) {
            Some(holder) if holder.endpoint != record.endpoint => {
                let (holder, epoch) = (holder.endpoint.clone(), holder.epoch);
                taken = Some(NameTaken { name: key.clone(), holder, epoch });
            }
            _ => {
                groups.insert(key.clone(), record.clone());
            }
        });
        if let Some(taken) = taken {
            return Err(taken.into());
        }
        let (announcement, (mut records, done, standing)) = Announcement::new(record);
        standing.send_replace(Standing::Announced);
        let groups = self.groups.clone();
        tokio::spawn(async move {
            while records.changed().await.is_ok() {
                let Some(record) = records.borrow_and_update().clone() else {
                    break;
                };
                groups.send_modify(|groups| {
                    groups.insert(key.clone(), record);
                });
            }
            groups.send_modify(|groups| {
                groups.remove(&key);
            });
            done.send_replace(true);
        });
        Ok(announcement)
    }

    fn watch(&self) -> mpsc::Receiver<GroupChange> {
        let (sender, receiver) = mpsc::channel(WATCH_BUFFER);
        let mut groups = self.groups.subscribe();
        tokio::spawn(async move {
            let mut seen = BTreeMap::new();
            loop {
                let now = groups.borrow_and_update().clone();
                for change in difference(&seen, now.iter()) {
                    if sender.send(change).await.is_err() {
                        return;
                    }
                }
                seen = now;
                tokio::select! {
                    changed = groups.changed() => if changed.is_err() { return },
                    () = sender.closed() => return,
                }
            }
        });
        receiver
    }

    async fn offer_rendezvous(&self, record: RendezvousRecord) -> Result<RendezvousOffer, RegistryError> {
        let (alive, mut gone) = mpsc::channel(1);
        self.rendezvous().insert(record.group.clone(), record.clone());
        let registry = self.clone();
        tokio::spawn(async move {
            let _ = gone.recv().await;
            let mut offers = registry.rendezvous();
            if offers.get(&record.group) == Some(&record) {
                offers.remove(&record.group);
            }
        });
        Ok(RendezvousOffer { _alive: alive })
    }

    async fn find_rendezvous(&self, group: &str) -> Result<Option<RendezvousRecord>, RegistryError> {
        Ok(self.rendezvous().get(group).cloned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::{GroupState, record::example};

    #[tokio::test]
    async fn watchers_see_what_is_and_what_changes() {
        let registry = MemoryRegistry::new();
        let first = registry.announce(example("one")).await.unwrap();
        let mut changes = registry.watch();
        assert_eq!(changes.recv().await, Some(GroupChange::Put(Box::new(example("one")))));
        first.update(|record| record.state = GroupState::Draining);
        match changes.recv().await {
            Some(GroupChange::Put(record)) => assert_eq!(record.state, GroupState::Draining),
            other => panic!("{other:?}"),
        }
        first.withdraw().await;
        assert_eq!(changes.recv().await, Some(GroupChange::Gone { model: example("one").model, group: "one".into() }));
    }

    #[tokio::test]
    async fn a_dropped_announcement_is_withdrawn() {
        let registry = MemoryRegistry::new();
        let mut changes = registry.watch();
        drop(registry.announce(example("one")).await.unwrap());
        // both may have happened before the watcher looked; in the end the group is gone
        let mut last = None;
        while let Ok(Some(change)) = tokio::time::timeout(std::time::Duration::from_millis(200), changes.recv()).await {
            last = Some(change);
        }
        assert!(!matches!(last, Some(GroupChange::Put(_))), "{last:?}");
    }
}
