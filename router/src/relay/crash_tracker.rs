//! The groups that crashed under one request.
//!
//! The crashes of all sequences of a request count together. The cause is most likely what the sequences share, and a
//! limit per sequence would let each of them crash that many groups.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::fleet::view::Link;

/// The crashed groups. Each epoch of a group counts once, even if it ran several of the request's sequences.
#[derive(Default)]
pub struct Deaths {
    groups: Mutex<Vec<Arc<Link>>>,
}

impl Deaths {
    /// Records that a group crashed while it ran one of the sequences.
    pub fn add(&self, group: &Arc<Link>) {
        let mut groups = self.groups.lock();
        if !groups.iter().any(|known| Arc::ptr_eq(known, group)) {
            groups.push(Arc::clone(group));
        }
    }

    /// Number of crashed groups.
    pub fn count(&self) -> u32 {
        self.groups.lock().len() as u32
    }

    /// Names of the crashed groups, in the order of the crashes.
    pub fn names(&self) -> String {
        let groups = self.groups.lock();
        groups.iter().map(|link| link.group.as_str()).collect::<Vec<_>>().join(",")
    }
}
