//! The retry budget: limits how often sequences are placed again.
//!
//! Every new sequence earns its tenant and the fleet one retry, up to a bound. The saved retries cover the crash of a
//! group with hundreds of streams. The bound prevents a failing fleet from receiving every request several times. The
//! bounds apply to all routers together: each live router has an equal share.

use std::collections::HashMap;

use parking_lot::Mutex;

use crate::access::limits::LiveRouters;

/// Maximum number of tenants with taken retries. If it is reached, other tenants get no retry.
const MAX_TENANTS: usize = 4096;

/// The retry accounts of the fleet and of the tenants.
pub struct RetryBudget {
    state: Mutex<State>,
    of_tenant: u32,
    of_fleet: u32,
    routers: LiveRouters,
}

/// Retries that were taken and not earned again. The count stays valid if the share changes.
#[derive(Default)]
struct State {
    fleet: u32,
    /// Tenants that have taken a retry.
    tenants: HashMap<u64, u32>,
}

impl RetryBudget {
    /// Creates full accounts of these bounds, divided among the routers.
    pub fn new(of_tenant: u32, of_fleet: u32, routers: LiveRouters) -> Self {
        Self { state: Mutex::default(), of_tenant, of_fleet, routers }
    }

    /// This router's share of a bound: at least one, unless the bound is 0.
    fn share(&self, bound: u32) -> u32 {
        (bound / self.routers.count()).max(bound.min(1))
    }

    /// Credits one retry for a new sequence.
    pub fn earn(&self, tenant: u64) {
        let (of_tenant, of_fleet) = (self.share(self.of_tenant), self.share(self.of_fleet));
        // the share may have shrunk below what was taken
        let after = |taken: u32, share: u32| taken.min(share).saturating_sub(1);
        let mut state = self.state.lock();
        state.fleet = after(state.fleet, of_fleet);
        if let Some(taken) = state.tenants.get_mut(&tenant) {
            *taken = after(*taken, of_tenant);
            if *taken == 0 {
                state.tenants.remove(&tenant); // a full account is the default
            }
        }
    }

    /// Takes a retry. Returns false if none is left.
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

    /// Takes all retries that a tenant can get now and returns their number.
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
