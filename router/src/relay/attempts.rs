//! The groups that a sequence was tried on in vain. Those that failed it are avoided until it has no time left to wait
//! for others. One that was full has not failed: it is as good as any as soon as it reports room.

use std::sync::Arc;

use super::stream::Failure;
use crate::{
    fleet::view::{Group, Link, View},
    place::{Slot, admission::Class},
};

/// What became of the groups of one sequence.
#[derive(Default)]
pub(super) struct Tried {
    failed: Vec<Arc<Link>>,
    full: Vec<Full>,
}

/// A group that refused for want of room.
struct Full {
    link: Arc<Link>,
    /// How many reports of it had come: it was full whatever they say.
    reports: u64,
    /// The most sequences that it reported, in the last of these and since.
    sequences: u32,
}

impl Full {
    fn new(link: Arc<Link>) -> Self {
        Self { reports: link.load_tracker.reports(), sequences: reported_sequences(&link), link }
    }

    /// Whether it has reported room since: a place for one that starts at once, or fewer that run and wait than it had.
    /// What is on its way there counts as if it were there, so that no more ask than have room.
    fn is_over(&mut self, group: &Group) -> bool {
        self.sequences = self.sequences.max(reported_sequences(&self.link));
        let has_fewer = self.link.load_tracker.busy().sequences < self.sequences;
        self.link.load_tracker.reports() > self.reports && (has_fewer || group.has_room(Class::Interactive))
    }
}

/// Those that run and wait there as the group reports it.
fn reported_sequences(link: &Link) -> u32 {
    let update = link.load_tracker.reported();
    update.running.saturating_add(update.waiting)
}

impl Tried {
    /// A group did not continue with it.
    pub(super) fn add(&mut self, link: Arc<Link>, failure: &Failure) {
        self.full.retain(|full| full.link.slot != link.slot);
        match failure {
            Failure::Full(_) => self.full.push(Full::new(link)),
            _ => self.failed.push(link),
        }
    }

    /// A group took it: what was full before is not worth knowing when it looks for one again.
    pub(super) fn accepted(&mut self) {
        self.full.clear();
    }

    /// All of them.
    pub(super) fn slots(&self) -> Vec<Slot> {
        self.failed.iter().chain(self.full.iter().map(|full| &full.link)).map(|link| link.slot).collect()
    }

    /// Those that are left when the ones are forgotten that have reported room.
    pub(super) fn slots_without_room(&mut self, view: &View) -> Vec<Slot> {
        self.full.retain_mut(|full| {
            // one that is gone is not asked anyway
            let group = view.groups().find(|group| group.link.slot == full.link.slot);
            !group.is_some_and(|group| full.is_over(group))
        });
        self.slots()
    }
}
