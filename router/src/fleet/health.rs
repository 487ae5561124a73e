//! A group's breaker: connections that reset or time out open it, a refusal (full, loading, draining) is
//! neutral, and so is what a request itself causes. When it has been open for its time, one request is
//! let through to try; if that one reported nothing either way, the next one is.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

const FIRST_PAUSE: Duration = Duration::from_millis(500);
const MAX_PAUSE: Duration = Duration::from_secs(30);
/// After a message that breaks the contract.
const VIOLATION_PAUSE: Duration = Duration::from_secs(30);
/// A probe that never reports (its client left) stops blocking others after this time.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Default)]
struct State {
    open_until: Option<Instant>,
    pause: Duration,
    probing_since: Option<Instant>,
    /// A success does not close it before its time.
    is_held: bool,
}

/// Whether requests may go to a group.
#[derive(Default)]
pub struct Breaker {
    state: Mutex<State>,
}

impl Breaker {
    /// Whether a request may go there now.
    pub fn allows(&self) -> bool {
        self.allows_at(Instant::now())
    }

    fn allows_at(&self, now: Instant) -> bool {
        let state = self.state.lock();
        match (state.open_until, state.probing_since) {
            (None, _) => true,
            (Some(until), _) if now < until => false,
            (Some(_), None) => true,
            (Some(_), Some(since)) => now.duration_since(since) > PROBE_TIMEOUT,
        }
    }

    /// A request goes there. If the breaker was open, it is the probe.
    pub fn chosen(&self) {
        let mut state = self.state.lock();
        if state.open_until.is_some() {
            state.probing_since = Some(Instant::now());
        }
    }

    /// The group served.
    pub fn succeeded(&self) {
        self.succeeded_at(Instant::now());
    }

    fn succeeded_at(&self, now: Instant) {
        let mut state = self.state.lock();
        if state.open_until.is_some_and(|until| !state.is_held || now >= until) {
            *state = State::default();
        }
    }

    /// The group broke the contract. What else it says does not close the breaker before its time.
    pub fn violated(&self) {
        self.violated_at(Instant::now());
    }

    fn violated_at(&self, now: Instant) {
        let open_until = Some(now + VIOLATION_PAUSE);
        *self.state.lock() = State { open_until, pause: VIOLATION_PAUSE, probing_since: None, is_held: true };
    }

    /// It served, but not so that a probe learned whether it serves: it refused, or the request was at fault.
    pub fn undecided(&self) {
        self.state.lock().probing_since = None;
    }

    /// The connection failed, was reset or timed out.
    pub fn failed(&self) {
        self.failed_at(Instant::now());
    }

    fn failed_at(&self, now: Instant) {
        let mut state = self.state.lock();
        let still_open = state.open_until.is_some_and(|until| now < until);
        if still_open {
            return; // the other streams of the same death
        }
        state.pause = if state.pause.is_zero() { FIRST_PAUSE } else { (state.pause * 2).min(MAX_PAUSE) };
        state.open_until = Some(now + state.pause);
        state.probing_since = None;
        state.is_held = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_lets_one_probe_through_and_closes_when_it_succeeds() {
        let breaker = Breaker::default();
        let start = Instant::now();
        assert!(breaker.allows_at(start));
        breaker.failed_at(start);
        breaker.failed_at(start + Duration::from_millis(1));
        assert!(!breaker.allows_at(start + Duration::from_millis(400)));
        let later = start + Duration::from_millis(600);
        assert!(breaker.allows_at(later), "the pause is over, and many failures of one death count once");
        breaker.chosen();
        assert!(!breaker.allows_at(Instant::now().max(later)), "one probe at a time");
        breaker.succeeded();
        assert!(breaker.allows_at(later));
    }

    #[test]
    fn pauses_grow_to_a_bound() {
        let breaker = Breaker::default();
        let mut now = Instant::now();
        for _ in 0..10 {
            breaker.failed_at(now);
            now += MAX_PAUSE;
        }
        assert_eq!(breaker.state.lock().pause, MAX_PAUSE);
    }

    #[test]
    fn a_probe_that_told_nothing_is_given_back_and_the_breaker_stays_half_open() {
        let breaker = Breaker::default();
        let start = Instant::now();
        breaker.failed_at(start);
        breaker.chosen();
        let later = start + FIRST_PAUSE;
        assert!(!breaker.allows_at(later));
        breaker.undecided();
        assert!(breaker.allows_at(later));
        breaker.failed_at(later);
        assert!(!breaker.allows_at(later + FIRST_PAUSE), "the pause has grown: nothing closed it meanwhile");
    }

    #[test]
    fn a_violation_stays_open_whatever_the_group_says_meanwhile() {
        let breaker = Breaker::default();
        let start = Instant::now();
        breaker.violated_at(start);
        breaker.succeeded_at(start + Duration::from_secs(1));
        assert!(!breaker.allows_at(start + VIOLATION_PAUSE - Duration::from_millis(1)));
        assert!(breaker.allows_at(start + VIOLATION_PAUSE));
        breaker.succeeded_at(start + VIOLATION_PAUSE);
        assert!(breaker.allows_at(start));
    }

    #[test]
    fn a_refusal_is_neutral() {
        let breaker = Breaker::default();
        breaker.undecided();
        assert!(breaker.allows());
        breaker.failed();
        breaker.undecided();
        assert!(!breaker.allows(), "a refusal does not close it either");
    }
}
