//! Whether the engine gets on: health is progress, not an open port.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Without a completed step for this long (on top of what the steps in flight are predicted to take) while
/// work is queued, a group is not ready.
pub const STALLED_AFTER: Duration = Duration::from_secs(5);
/// The same until the group is given up.
pub const LOST_AFTER: Duration = Duration::from_secs(30);

/// ChatInput by the loop, read by anybody.
#[derive(Debug)]
pub(crate) struct Progress {
    base: Instant,
    busy: AtomicBool,
    /// Milliseconds after `base`.
    last: AtomicU64,
    /// Milliseconds that the steps in flight are predicted to take.
    predicted: AtomicU64,
    /// The step that runs.
    step: AtomicU64,
}

impl Progress {
    pub(crate) fn new() -> Self {
        Self {
            base: Instant::now(),
            busy: AtomicBool::new(false),
            last: AtomicU64::new(0),
            predicted: AtomicU64::new(0),
            step: AtomicU64::new(0),
        }
    }

    fn now(&self) -> u64 {
        self.base.elapsed().as_millis() as u64
    }

    /// A step was handed in, or came to its end.
    pub(crate) fn moved(&self, step: u64, in_flight: usize, predicted_seconds: f64) {
        self.predicted.store((predicted_seconds * 1e3) as u64, Ordering::Relaxed);
        self.step.store(step, Ordering::Relaxed);
        self.last.store(self.now(), Ordering::Relaxed);
        self.busy.store(in_flight > 0, Ordering::Release);
    }

    /// The oldest step that is not complete, and how much longer than predicted it has been running.
    pub(crate) fn overdue(&self) -> Option<(u64, Duration)> {
        if !self.busy.load(Ordering::Acquire) {
            return None;
        }
        let due = self.last.load(Ordering::Relaxed) + self.predicted.load(Ordering::Relaxed);
        let late = Duration::from_millis(self.now().saturating_sub(due));
        Some((self.step.load(Ordering::Relaxed), late))
    }
}
