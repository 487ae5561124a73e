//! The groups that died under one request. All its sequences count together: each of them alone would be given as
//! many groups again, and what kills them is most likely what the sequences share.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::fleet::view::Link;

/// Each start of a group once, however many of the request's sequences it ran.
#[derive(Default)]
pub struct Deaths {
    groups: Mutex<Vec<Arc<Link>>>,
}

impl Deaths {
    /// A group died while it ran one of the sequences.
    pub fn add(&self, group: &Arc<Link>) {
        let mut groups = self.groups.lock();
        if !groups.iter().any(|known| Arc::ptr_eq(known, group)) {
            groups.push(Arc::clone(group));
        }
    }

    /// How many died.
    pub fn count(&self) -> u32 {
        self.groups.lock().len() as u32
    }

    /// Their names, the first one first.
    pub fn names(&self) -> String {
        let groups = self.groups.lock();
        groups.iter().map(|link| link.group.as_str()).collect::<Vec<_>>().join(",")
    }
}
