//! How often sequences may be placed again: every new one earns its tenant and the fleet one retry, up to a
//! bound. A group that dies with hundreds of streams is paid for from what was saved; a fleet that fails all
//! over does not get every request several times. The bounds are those of all routers together: each has its
//! share of them, as many as live.

use std::collections::HashMap;

use parking_lot::Mutex;

use crate::access::limits::LiveRouters;

/// Tenants that are remembered; those with a full account are the first to go.
const MAX_TENANTS: usize = 4096;

/// The accounts.
pub struct RetryBudget {
    state: Mutex<State>,
    of_tenant: u32,
    of_fleet: u32,
    routers: LiveRouters,
}

/// What was taken and not earned since: so it holds whatever the share becomes.
#[derive(Default)]
struct State {
    fleet: u32,
    /// Those that have taken something.
    tenants: HashMap<u64, u32>,
}

impl RetryBudget {
    /// Full accounts of that many retries, divided among the routers.
    pub fn new(of_tenant: u32, of_fleet: u32, routers: LiveRouters) -> Self {
        Self { state: Mutex::default(), of_tenant, of_fleet, routers }
    }

    /// This router's part of a bound; at least one, unless there are to be no retries at all.
    fn share(&self, bound: u32) -> u32 {
        (bound / self.routers.count()).max(bound.min(1))
    }

    /// A new sequence.
    pub fn earn(&self, tenant: u64) {
        let (of_tenant, of_fleet) = (self.share(self.of_tenant), self.share(self.of_fleet));
        // an account is never emptier than empty, though the share has become smaller
        let after = |taken: u32, share: u32| taken.min(share).saturating_sub(1);
        let mut state = self.state.lock();
        state.fleet = after(state.fleet, of_fleet);
        if let Some(taken) = state.tenants.get_mut(&tenant) {
            *taken = after(*taken, of_tenant);
            if *taken == 0 {
                state.tenants.remove(&tenant); // full: as if never seen
            }
        }
    }

    /// Takes a retry; false if none is left.
    pub fn take(&self, tenant: u64) -> bool {
        let mut state = self.state.lock();
        let taken = state.tenants.get(&tenant).copied();
        if state.fleet >= self.share(self.of_fleet) || taken.unwrap_or(0) >= self.share(self.of_tenant) {
            return false;
        }
        if taken.is_none() && state.tenants.len() >= MAX_TENANTS {
            return false;
        }
        state.tenants.insert(tenant, taken.unwrap_or(0) + 1);
        state.fleet += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_has_its_share_and_the_fleet_a_bound() {
        let budget = RetryBudget::new(3, 5, LiveRouters::default());
        assert_eq!((0..4).filter(|_| budget.take(1)).count(), 3);
        assert_eq!((0..4).filter(|_| budget.take(2)).count(), 2, "the fleet's five are gone");
        assert!(!budget.take(3));
        budget.earn(2);
        assert!(budget.take(2));
        assert!(!budget.take(2));
        (0..100).for_each(|_| budget.earn(1));
        assert_eq!((0..10).filter(|_| budget.take(1)).count(), 3, "accounts have a bound");
        assert_eq!((0..10).filter(|_| budget.take(2)).count(), 1, "one earned, and two of the fleet were left");
    }

    /// How many retries a tenant gets now, if it takes all that it can.
    fn left(budget: &RetryBudget, tenant: u64) -> usize {
        (0..100).filter(|_| budget.take(tenant)).count()
    }

    #[test]
    fn each_router_has_its_share_and_it_follows_their_number() {
        let routers = LiveRouters::default();
        routers.set(3);
        let budget = RetryBudget::new(6, 15, routers.clone());
        assert_eq!((left(&budget, 1), left(&budget, 2), left(&budget, 3)), (2, 2, 1), "two each, five in all");
        routers.set(1);
        assert_eq!((left(&budget, 1), left(&budget, 3)), (4, 5), "the others are gone: six each");
        assert_eq!(left(&budget, 2), 1, "fifteen in all");
        routers.set(5);
        assert_eq!(left(&budget, 1), 0);
        budget.earn(1);
        assert_eq!(left(&budget, 1), 1, "an empty account of a smaller share is empty, and no more than that");
        routers.set(100);
        (0..20).for_each(|_| budget.earn(1));
        assert_eq!(left(&budget, 1), 1, "at least one");
    }

    #[test]
    fn no_retries_are_none_however_many_routers_live() {
        let routers = LiveRouters::default();
        routers.set(4);
        assert_eq!(left(&RetryBudget::new(0, 100, routers.clone()), 1), 0);
        assert_eq!(left(&RetryBudget::new(100, 0, routers), 1), 0);
    }
}
