//! The CPU time that one chunk of work may take, and whether anybody still waits for it.
//!
//! Reading, checking and encoding a request is work for one thread from its beginning to its end, in loops over lists
//! that the client wrote. Each such loop calls [`check`] between two entries. [`CpuBudget::run`] sets the budget for the
//! thread, so the loops need no parameter for it, and code that runs without a budget is not limited.
//!
//! CPU time is measured and not wall time: a busy machine refuses nothing that a quiet one accepts. Reading the
//! thread's CPU clock is a system call. CPU time cannot pass faster than wall time, so the CPU clock is read only when
//! enough wall time has passed for the budget to be used up.

use std::{
    cell::RefCell,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::time::{ClockId, clock_gettime};

/// What a request's CPU time is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Reading the body.
    Parse,
    /// Checking messages and tools.
    Validate,
    /// Checking JSON schemas.
    Schema,
    /// Repairing a conversation.
    Repair,
    /// Turning texts into token IDs.
    Encode,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Parse => "parse",
            Self::Validate => "validate",
            Self::Schema => "schema",
            Self::Repair => "repair",
            Self::Encode => "encode",
        })
    }
}

/// The work must end now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stopped {
    /// The budget is used up.
    #[error("the stage `{stage}` used up the budget of {} s of CPU time", limit.as_secs_f64())]
    Exceeded {
        /// Where.
        stage: Stage,
        /// The budget.
        limit: Duration,
    },
    /// Nobody waits for the result any more.
    #[error("the stage `{0}` was cancelled")]
    Cancelled(Stage),
}

/// The CPU time of the calling thread so far.
pub fn thread_cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// The CPU time for one chunk of work.
#[derive(Clone, Debug)]
pub struct CpuBudget {
    limit: Duration,
    cancelled: Arc<AtomicBool>,
}

struct Running {
    budget: CpuBudget,
    /// The thread's CPU time at the start.
    start: Duration,
    /// The budget cannot be used up before.
    next_look: Instant,
}

thread_local! {
    static RUNNING: RefCell<Option<Running>> = const { RefCell::new(None) };
}

/// Restores the budget that held before, also if the work panics.
struct Restore(Option<Running>);

impl Drop for Restore {
    fn drop(&mut self) {
        RUNNING.set(self.0.take());
    }
}

impl CpuBudget {
    /// A budget of that much CPU time. Setting `cancelled` ends the work early.
    pub fn new(limit: Duration, cancelled: Arc<AtomicBool>) -> Self {
        Self { limit, cancelled }
    }

    /// Runs `work` on this thread within the budget.
    pub fn run<T>(self, work: impl FnOnce() -> T) -> T {
        let next_look = Instant::now() + self.limit;
        let running = Running { budget: self, start: thread_cpu_time(), next_look };
        let _restore = Restore(RUNNING.replace(Some(running)));
        work()
    }
}

/// Says whether the work on this thread may continue. Call it between the entries of every list that a client wrote.
pub fn check(stage: Stage) -> Result<(), Stopped> {
    RUNNING.with_borrow_mut(|running| match running {
        Some(running) => running.check(stage),
        None => Ok(()),
    })
}

impl Running {
    fn check(&mut self, stage: Stage) -> Result<(), Stopped> {
        if self.budget.cancelled.load(Ordering::Relaxed) {
            return Err(Stopped::Cancelled(stage));
        }
        let now = Instant::now();
        if now < self.next_look {
            return Ok(());
        }
        let used = thread_cpu_time().saturating_sub(self.start);
        match self.budget.limit.checked_sub(used) {
            Some(left) if !left.is_zero() => {
                self.next_look = now + left;
                Ok(())
            }
            _ => Err(Stopped::Exceeded { stage, limit: self.budget.limit }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(limit: Duration) -> (CpuBudget, Arc<AtomicBool>) {
        let cancelled = Arc::new(AtomicBool::new(false));
        (CpuBudget::new(limit, Arc::clone(&cancelled)), cancelled)
    }

    /// Uses CPU time until it is refused, at most a minute.
    fn burn() -> Option<Stopped> {
        let begun = thread_cpu_time();
        while thread_cpu_time() - begun < Duration::from_secs(60) {
            if let Err(stopped) = check(Stage::Encode) {
                return Some(stopped);
            }
        }
        None
    }

    #[test]
    fn stops_when_the_cpu_time_is_used_up_and_names_the_stage() {
        let limit = Duration::from_millis(20);
        let begun = thread_cpu_time();
        let stopped = budget(limit).0.run(burn);
        let used = thread_cpu_time() - begun;
        assert_eq!(stopped, Some(Stopped::Exceeded { stage: Stage::Encode, limit }));
        assert!(used >= limit && used < Duration::from_secs(2), "{used:?}");
        assert_eq!(check(Stage::Encode), Ok(()), "no budget holds behind the work");
    }

    #[test]
    fn sleeping_uses_nothing() {
        let outcome = budget(Duration::from_millis(20)).0.run(|| {
            let (_sender, nothing) = std::sync::mpsc::channel::<()>();
            assert!(nothing.recv_timeout(Duration::from_millis(60)).is_err());
            check(Stage::Parse)
        });
        assert_eq!(outcome, Ok(()));
    }

    #[test]
    fn stops_when_nobody_waits() {
        let (budget, cancelled) = budget(Duration::from_secs(60));
        let outcome = budget.run(|| {
            assert_eq!(check(Stage::Repair), Ok(()));
            cancelled.store(true, Ordering::Relaxed);
            check(Stage::Repair)
        });
        assert_eq!(outcome, Err(Stopped::Cancelled(Stage::Repair)));
    }

    #[test]
    fn a_panic_leaves_no_budget_behind() {
        let budget = budget(Duration::ZERO).0;
        assert!(std::panic::catch_unwind(move || budget.run(|| panic!("on purpose"))).is_err());
        assert_eq!(check(Stage::Parse), Ok(()));
    }
}
