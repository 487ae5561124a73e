//! The groups on which a sequence was tried without success.
//!
//! A group that failed is avoided until the sequence has no time left to wait for another group. A full group has not
//! failed: it is eligible again as soon as it reports room.

use std::sync::Arc;

use super::stream::Failure;
use crate::{
    fleet::view::{Group, Link, View},
    place::{Slot, admission::Class},
};

/// The failed and full groups of one sequence.
#[derive(Default)]
pub(super) struct Tried {
    failed: Vec<Arc<Link>>,
    full: Vec<Full>,
}

/// A group that refused the sequence because it was full.
struct Full {
    link: Arc<Link>,
    /// Number of load reports received before the refusal. They do not count as a report of room.
    reports: u64,
    /// Maximum number of sequences in the last of these reports and in later ones.
    sequences: u32,
}

impl Full {
    fn new(link: Arc<Link>) -> Self {
        Self { reports: link.load_tracker.reports(), sequences: reported_sequences(&link), link }
    }

    /// Whether the group has reported room since the refusal: it can start a sequence without a wait, or it has fewer
    /// running and waiting sequences than before. Assigned work counts too, so that no more sequences are sent than
    /// have room.
    fn is_over(&mut self, group: &Group) -> bool {
        self.sequences = self.sequences.max(reported_sequences(&self.link));
        let has_fewer = self.link.load_tracker.busy().sequences < self.sequences;
        self.link.load_tracker.reports() > self.reports && (has_fewer || group.has_room(Class::Interactive))
    }
}

/// Number of running and waiting sequences in the last report of the group.
fn reported_sequences(link: &Link) -> u32 {
    let report = link.load_tracker.reported();
    report.running.saturating_add(report.waiting)
}

impl Tried {
    /// Records that a group failed the sequence.
    pub(super) fn add(&mut self, link: Arc<Link>, failure: &Failure) {
        self.full.retain(|full| full.link.slot != link.slot);
        match failure {
            Failure::Full(_) => self.full.push(Full::new(link)),
            _ => self.failed.push(link),
        }
    }

    /// A group accepted the sequence. The groups that were full are eligible again if it needs another group.
    pub(super) fn accepted(&mut self) {
        self.full.clear();
    }

    /// All groups that are avoided.
    pub(super) fn slots(&self) -> Vec<Slot> {
        self.failed.iter().chain(self.full.iter().map(|full| &full.link)).map(|link| link.slot).collect()
    }

    /// Removes the full groups that have reported room and returns the remaining groups.
    pub(super) fn slots_without_room(&mut self, view: &View) -> Vec<Slot> {
        self.full.retain_mut(|full| {
            // a group that left the fleet is not a candidate
            let group = view.groups().find(|group| group.link.slot == full.link.slot);
            !group.is_some_and(|group| full.is_over(group))
        });
        self.slots()
    }
}
