//! Whose a group's name is. A name is unique within the cluster: of several groups that want one, the first that the
//! router knows keeps it while it is known, and the others are counted until they get it or go.

use std::collections::{BTreeMap, BTreeSet};

use bora_common::registry::{Duplicate, GroupRecord};
use parking_lot::Mutex;

use super::models::View;

/// Groups without a name that are remembered.
const MAX_CONTENDERS: usize = 4096;

/// Groups that want a name which another one has.
#[derive(Default)]
pub(super) struct Names {
    duplicates: Mutex<BTreeSet<Duplicate>>,
    /// Those whose name a group of another model has, by model and group.
    contenders: Mutex<BTreeMap<(String, String), GroupRecord>>,
}

impl Names {
    /// A group was refused because its name is taken.
    pub(super) fn add(&self, duplicate: Duplicate) {
        let mut duplicates = self.duplicates.lock();
        if duplicates.len() < MAX_CONTENDERS {
            duplicates.insert(duplicate);
        }
    }

    /// It does not want the name any longer.
    pub(super) fn remove(&self, duplicate: &Duplicate) {
        self.duplicates.lock().remove(duplicate);
    }

    /// Groups that are refused because their name is taken.
    pub(super) fn duplicates(&self) -> usize {
        self.duplicates.lock().len()
    }

    /// Whether a group of another model has the name. Then this one waits for it to go.
    pub(super) fn is_taken(&self, view: &View, record: &GroupRecord) -> bool {
        let holder = view.groups.get(&record.group).filter(|known| known.record.model != record.model);
        let Some(holder) = holder else {
            self.forget(&record.model, &record.group);
            return false;
        };
        let mut contenders = self.contenders.lock();
        let key = (record.model.clone(), record.group.clone());
        if contenders.len() < MAX_CONTENDERS && contenders.insert(key, record.clone()).is_none() {
            let (group, model, holder) = (&record.group, &record.model, &holder.record.model);
            tracing::error!(group, model, holder, "group refused: a group of another model has its name");
            self.add(duplicate_of(record));
        }
        true
    }

    /// A group has its name, or is gone.
    pub(super) fn forget(&self, model: &str, group: &str) {
        if let Some(contender) = self.contenders.lock().remove(&(model.to_owned(), group.to_owned())) {
            self.remove(&duplicate_of(&contender));
        }
    }

    /// The records of groups that may get their names now.
    pub(super) fn contenders(&self) -> Vec<GroupRecord> {
        self.contenders.lock().values().cloned().collect()
    }
}

fn duplicate_of(record: &GroupRecord) -> Duplicate {
    Duplicate { group: record.group.clone(), endpoint: record.endpoint.clone() }
}
