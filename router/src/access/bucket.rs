//! A token bucket for limits per minute.

use std::{
    sync::{Mutex, PoisonError},
    time::Instant,
};

use super::limits::LiveRouters;

/// A bucket with this router's share of a limit per minute, refilled at a constant rate.
#[derive(Debug)]
pub(super) struct Bucket {
    /// The limit of all routers together, per minute.
    limit: f64,
    routers: LiveRouters,
    state: Mutex<(f64, Instant)>,
}

impl Bucket {
    pub(super) fn new(limit: f64, routers: LiveRouters) -> Self {
        let full = (limit / f64::from(routers.count())).max(1.0);
        Self { limit, routers, state: Mutex::new((full, Instant::now())) }
    }

    /// This router's share; at least one, so that a small limit does not block all requests.
    pub(super) fn share(&self) -> f64 {
        (self.limit / f64::from(self.routers.count())).max(1.0)
    }

    /// Takes an amount, or returns the seconds until it is available.
    pub(super) fn take(&self, amount: f64) -> Result<(), u32> {
        let mut state = self.filled();
        self.covers(state.0, amount)?;
        state.0 -= amount;
        Ok(())
    }

    /// Checks for an amount, or returns the seconds until it is available.
    pub(super) fn has(&self, amount: f64) -> Result<(), u32> {
        self.covers(self.level(), amount)
    }

    fn covers(&self, level: f64, amount: f64) -> Result<(), u32> {
        let needed = amount.min(self.share());
        if level + 1e-9 < needed {
            let seconds = (needed - level) * 60.0 / self.rate();
            return Err(seconds.ceil().clamp(1.0, 3_600.0) as u32);
        }
        Ok(())
    }

    pub(super) fn exhausted(&self, what: &str) -> String {
        format!("The limit of {} {what} per minute is reached.", self.limit)
    }

    /// The level may be negative: later refills pay the debt.
    pub(super) fn give_back(&self, amount: f64) {
        let mut state = self.filled();
        state.0 = (state.0 + amount).min(self.share());
    }

    pub(super) fn level(&self) -> f64 {
        self.filled().0
    }

    /// The refill per minute: this router's share, however small.
    fn rate(&self) -> f64 {
        self.limit / f64::from(self.routers.count())
    }

    fn filled(&self) -> std::sync::MutexGuard<'_, (f64, Instant)> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        state.0 = (state.0 + (now - state.1).as_secs_f64() * self.rate() / 60.0).min(self.share());
        state.1 = now;
        state
    }
}
