//! How often sequences may be placed again: every new one earns its tenant and the fleet one retry, up to a
//! bound. A group that dies with hundreds of streams is paid for from what was saved; a fleet that fails all
//! over does not get every request several times.

use std::collections::HashMap;

use parking_lot::Mutex;

/// Tenants that are remembered; those with a full account are the first to go.
const MAX_TENANTS: usize = 4096;

/// The accounts.
pub struct RetryBudget {
    state: Mutex<State>,
    of_tenant: u32,
    of_fleet: u32,
}

struct State {
    fleet: u32,
    tenants: HashMap<u64, u32>,
}

impl RetryBudget {
    /// Full accounts of that many retries.
    pub fn new(of_tenant: u32, of_fleet: u32) -> Self {
        Self { state: Mutex::new(State { fleet: of_fleet, tenants: HashMap::new() }), of_tenant, of_fleet }
    }

    /// A new sequence.
    pub fn earn(&self, tenant: u64) {
        let mut state = self.state.lock();
        state.fleet = (state.fleet + 1).min(self.of_fleet);
        if let Some(saved) = state.tenants.get_mut(&tenant) {
            *saved += 1;
            if *saved >= self.of_tenant {
                state.tenants.remove(&tenant); // full: as if never seen
            }
        }
    }

    /// Takes a retry; false if none is left.
    pub fn take(&self, tenant: u64) -> bool {
        let mut state = self.state.lock();
        if state.fleet == 0 {
            return false;
        }
        if state.tenants.len() >= MAX_TENANTS && !state.tenants.contains_key(&tenant) {
            return false;
        }
        let saved = state.tenants.entry(tenant).or_insert(self.of_tenant);
        if *saved == 0 {
            return false;
        }
        *saved -= 1;
        state.fleet -= 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_has_its_share_and_the_fleet_a_bound() {
        let budget = RetryBudget::new(3, 5);
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
}
