//! Work that waits for a thread, in turn by tenant.
//!
//! The tenant whose work took the least time goes next, its short work before its long work. Time is virtual, as in
//! start-time fair queueing: a tenant that comes back begins at the present and has saved nothing. Work is charged by an
//! estimate when it starts, so that one tenant does not take all threads, and by its real time when it ends.

use std::collections::{HashMap, VecDeque};

use crate::fairness::share;

/// Seconds that a byte of a body is taken to cost until the work has run.
const ESTIMATED_SECONDS_PER_BYTE: f64 = 1e-7;
/// Tenants without waiting work whose time is remembered; beyond it they begin at the present.
const MAX_IDLE_TENANTS: usize = 4096;

/// Which of a tenant's work goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    Short,
    Long,
}

/// What a thread takes from the queue.
#[derive(Debug)]
pub(super) struct Started<W> {
    pub(super) work: W,
    /// For [`FairQueue::ended`], as is the estimate.
    pub(super) tenant: u64,
    pub(super) estimate: f64,
}

struct Waiting<W> {
    work: W,
    estimate: f64,
}

struct Tenant<W> {
    /// By [`Lane`].
    lanes: [VecDeque<Waiting<W>>; 2],
    /// Virtual time up to which its work is done.
    done_at: f64,
}

impl<W> Tenant<W> {
    fn waiting(&self) -> usize {
        self.lanes.iter().map(VecDeque::len).sum()
    }
}

/// The queue. It holds at most `capacity` entries.
pub(super) struct FairQueue<W> {
    tenants: HashMap<u64, Tenant<W>>,
    /// Virtual time: the start of the work that was taken last.
    now: f64,
    capacity: usize,
}

impl<W> FairQueue<W> {
    pub(super) fn new(capacity: usize) -> Self {
        Self { tenants: HashMap::new(), now: 0.0, capacity }
    }

    /// Entries that wait.
    pub(super) fn len(&self) -> usize {
        self.tenants.values().map(Tenant::waiting).sum()
    }

    /// Entries of one tenant that wait.
    #[cfg(test)]
    pub(super) fn waiting_of(&self, tenant: u64) -> usize {
        self.tenants.get(&tenant).map_or(0, Tenant::waiting)
    }

    /// Adds work. If the queue is full, another tenant's newest work may have to leave it: that is returned. The work
    /// itself comes back if its tenant has its share already.
    pub(super) fn push(&mut self, tenant: u64, lane: Lane, bytes: usize, work: W) -> Result<Option<W>, W> {
        let mut displaced = None;
        if self.len() >= self.capacity {
            let Some(largest) = self.over_share(tenant) else { return Err(work) };
            let [short, long] = &mut largest.lanes;
            displaced = long.pop_back().or_else(|| short.pop_back()).map(|waiting| waiting.work);
        }
        let now = self.now;
        let entry = self.tenants.entry(tenant).or_insert_with(|| Tenant { lanes: Default::default(), done_at: now });
        entry.done_at = entry.done_at.max(now);
        let estimate = bytes as f64 * ESTIMATED_SECONDS_PER_BYTE;
        entry.lanes[lane as usize].push_back(Waiting { work, estimate });
        Ok(displaced)
    }

    /// The tenant that has to make room for another entry of `tenant`, if one has to.
    fn over_share(&mut self, tenant: u64) -> Option<&mut Tenant<W>> {
        let held = self.tenants.get(&tenant).map_or(0, Tenant::waiting);
        let others = self.tenants.iter().filter(|(id, other)| **id != tenant && other.waiting() > 0).count();
        let share = share(self.capacity, others + 1);
        if held >= share {
            return None;
        }
        self.tenants.values_mut().max_by_key(|other| other.waiting()).filter(|largest| largest.waiting() > share)
    }

    /// The work that goes next; `only_short`: among short work.
    pub(super) fn pop(&mut self, only_short: bool) -> Option<Started<W>> {
        let lanes = if only_short { 1 } else { 2 };
        let next_lane = |tenant: &Tenant<W>| tenant.lanes[..lanes].iter().position(|lane| !lane.is_empty());
        let waiting = self.tenants.iter().filter_map(|(id, tenant)| Some((*id, tenant.done_at, next_lane(tenant)?)));
        let (id, _, lane) =
            waiting.min_by(|(_, one, lane), (_, other, other_lane)| one.total_cmp(other).then(lane.cmp(other_lane)))?;
        let tenant = self.tenants.get_mut(&id)?;
        let Waiting { work, estimate } = tenant.lanes[lane].pop_front()?;
        self.now = self.now.max(tenant.done_at);
        tenant.done_at = self.now + estimate;
        Some(Started { work, tenant: id, estimate })
    }

    /// Work ended that took so many seconds.
    pub(super) fn ended(&mut self, tenant: u64, estimate: f64, seconds: f64) {
        if let Some(tenant) = self.tenants.get_mut(&tenant) {
            tenant.done_at += seconds - estimate;
        }
        let now = self.now;
        self.tenants.retain(|_, tenant| tenant.done_at > now || tenant.waiting() > 0);
        if self.tenants.len() > MAX_IDLE_TENANTS + self.capacity {
            self.tenants.retain(|_, tenant| tenant.waiting() > 0);
        }
    }

    /// Takes out work for which that holds.
    pub(super) fn remove(&mut self, mut is_over: impl FnMut(&W) -> bool) {
        for lane in self.tenants.values_mut().flat_map(|tenant| &mut tenant.lanes) {
            lane.retain(|waiting| !is_over(&waiting.work));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(queue: &mut FairQueue<&'static str>, seconds: f64) -> Vec<&'static str> {
        std::iter::from_fn(|| {
            let Started { work, tenant, estimate } = queue.pop(false)?;
            queue.ended(tenant, estimate, seconds);
            Some(work)
        })
        .collect()
    }

    #[test]
    fn tenants_take_turns_and_short_work_goes_first() {
        let mut queue = FairQueue::new(100);
        for work in ["a1", "a2", "a3", "a4"] {
            assert_eq!(queue.push(1, Lane::Long, 10, work), Ok(None));
        }
        assert_eq!(queue.push(1, Lane::Short, 1, "a0"), Ok(None));
        assert_eq!(queue.push(2, Lane::Long, 10, "b1"), Ok(None));
        assert_eq!(queue.push(2, Lane::Long, 10, "b2"), Ok(None));
        let order = order(&mut queue, 1.0);
        assert_eq!(order[..2], ["a0", "b1"]);
        assert!(order[..4].contains(&"b2") && order[..4].contains(&"a1"), "{order:?}");
        assert!(queue.tenants.len() <= 2);
    }

    #[test]
    fn a_tenant_pays_for_the_time_that_its_work_took() {
        let mut queue = FairQueue::new(100);
        for work in ["a1", "a2", "b1", "b2", "b3", "b4"] {
            let tenant = u64::from(work.starts_with('b'));
            assert_eq!(queue.push(tenant, Lane::Long, 1000, work), Ok(None));
        }
        let mut order = Vec::new();
        while let Some(Started { work, tenant, estimate }) = queue.pop(false) {
            queue.ended(tenant, estimate, if tenant == 0 { 2.5 } else { 1.0 });
            order.push(work);
        }
        let place = |work| order.iter().position(|other| *other == work);
        assert!(place("a2") > place("b3"), "{order:?}");
        assert!(place("a2") < place("b4"), "{order:?}");
    }

    #[test]
    fn a_full_queue_is_shared() {
        let mut queue = FairQueue::new(4);
        for work in ["a1", "a2", "a3", "a4"] {
            assert_eq!(queue.push(1, Lane::Short, 1, work), Ok(None));
        }
        assert_eq!(queue.push(1, Lane::Short, 1, "a5"), Err("a5"), "it holds all of it");
        assert_eq!(queue.push(2, Lane::Short, 1, "b1"), Ok(Some("a4")), "the newest of who holds most");
        assert_eq!(queue.push(2, Lane::Short, 1, "b2"), Ok(Some("a3")));
        assert_eq!(queue.push(2, Lane::Short, 1, "b3"), Err("b3"), "it has its share");
        assert_eq!(queue.push(1, Lane::Short, 1, "a6"), Err("a6"));
        assert_eq!(queue.len(), 4);
    }

    #[test]
    fn only_short_work_is_taken_by_who_takes_no_other() {
        let mut queue = FairQueue::new(4);
        assert_eq!(queue.push(1, Lane::Long, 1, "long"), Ok(None));
        assert!(queue.pop(true).is_none());
        assert_eq!(queue.push(2, Lane::Short, 1, "short"), Ok(None));
        assert_eq!(queue.pop(true).map(|started| started.work), Some("short"));
        queue.remove(|work| *work == "long");
        assert_eq!(queue.len(), 0);
    }
}
