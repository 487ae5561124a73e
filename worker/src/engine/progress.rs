//! Progress of the engine's steps. Health is derived from progress, not from an open port.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A group is not ready if no step completes for this long (beyond the predicted time of the steps in flight) while
/// work is queued.
pub const STALLED_AFTER: Duration = Duration::from_secs(5);
/// A group counts as failed if no step completes for this long, measured in the same way.
pub const LOST_AFTER: Duration = Duration::from_secs(30);

/// Written by the loop, read by any thread.
#[derive(Debug)]
pub(crate) struct Progress {
    base: Instant,
    busy: AtomicBool,
    /// Time of the last progress, in milliseconds after `base`.
    last: AtomicU64,
    /// Predicted time of the steps in flight, milliseconds.
    predicted: AtomicU64,
    /// Step that runs.
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

    /// Records that a step was submitted or completed.
    pub(crate) fn record(&self, step: u64, in_flight: usize, predicted_seconds: f64) {
        self.predicted.store((predicted_seconds * 1e3) as u64, Ordering::Relaxed);
        self.step.store(step, Ordering::Relaxed);
        self.last.store(self.now(), Ordering::Relaxed);
        self.busy.store(in_flight > 0, Ordering::Release);
    }

    /// The oldest incomplete step, and its time beyond the prediction.
    pub(crate) fn overdue(&self) -> Option<(u64, Duration)> {
        if !self.busy.load(Ordering::Acquire) {
            return None;
        }
        let due = self.last.load(Ordering::Relaxed) + self.predicted.load(Ordering::Relaxed);
        let late = Duration::from_millis(self.now().saturating_sub(due));
        Some((self.step.load(Ordering::Relaxed), late))
    }
}
