//! Threads that parse and encode requests, so that nobody's stream waits for a body of a megabyte.
//!
//! They are permanent: the tokenizer keeps a cache in every thread that it runs on, which takes a tenth of a
//! second and 30 MB to fill. Each thread fills its own before the router serves. Tenants take turns, and a tenant's
//! short bodies go before its long ones ([`queue`](super::queue)); if there are several threads, short bodies have
//! one to themselves. Each segment of work has a budget of CPU time and ends early when its caller is gone.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bora_common::{cpu_budget::CpuBudget, tokenizer::Tokenizer};
use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;

use super::queue::{FairQueue, Lane, Started};
use crate::{models::ModelSpec, options::RouterOptions};

/// A work that can't be taken on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// The queue is full, and the tenant has its share of it.
    #[error("too many requests wait to be encoded")]
    Full,
    /// It had to leave the queue for a tenant that waits with less.
    #[error("the request made room for another tenant's")]
    Displaced,
    /// The work panicked, or there are no threads.
    #[error("encoding did not finish")]
    Broken,
}

/// What becomes of work that waits.
enum Turn {
    Run,
    Displaced,
}

struct Work {
    /// Its caller is gone.
    cancelled: Arc<AtomicBool>,
    take: Box<dyn FnOnce(Turn) + Send>,
}

struct State {
    queue: FairQueue<Work>,
    idle: usize,
    closed: bool,
}

struct Shared {
    state: Mutex<State>,
    work_came: Condvar,
}

/// The threads and what waits for them.
pub struct EncodePool {
    shared: Arc<Shared>,
    short_body_bytes: usize,
    cpu_limit: Duration,
}

/// Reports the work that its caller is gone.
struct CancelOnDrop(Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl EncodePool {
    /// Starts the threads; each warms the models' tokenizers for itself before its first work.
    pub fn new(options: &RouterOptions, models: &HashMap<String, ModelSpec>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        // two at least: one tenant's long body is not to hold up everybody's short ones
        let threads = if options.encode_threads == 0 { cores.div_ceil(2).max(2) } else { options.encode_threads };
        let tokenizers: Vec<Arc<Tokenizer>> = models.values().filter_map(|spec| spec.tokenizer.clone()).collect();
        let state = State { queue: FairQueue::new(options.encode_queue), idle: 0, closed: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), work_came: Condvar::new() });
        for number in 0..threads {
            let for_thread = Arc::clone(&shared);
            let tokenizers = tokenizers.clone();
            let only_short = number == 0 && threads > 1;
            let started = std::thread::Builder::new().name(format!("encode-{number}")).spawn(move || {
                for tokenizer in &tokenizers {
                    tokenizer.encode("warm");
                }
                drop(tokenizers);
                for_thread.work(only_short);
            });
            if let Err(error) = started {
                tracing::error!(%error, number, "an encode thread could not be started");
            }
        }
        Self { shared, short_body_bytes: options.short_body_bytes, cpu_limit: options.max_prepare_cpu() }
    }

    /// Runs `work` of a tenant, which takes a body of that many bytes, on one of the threads. Work whose caller no longer
    /// waits leaves the queue, or finds its CPU budget at an end.
    pub async fn run<T: Send + 'static>(
        &self,
        tenant: u64,
        bytes: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, PoolError> {
        let (sender, result) = oneshot::channel();
        let cancelled = Arc::new(AtomicBool::new(false));
        let _cancel = CancelOnDrop(Arc::clone(&cancelled));
        let budget = CpuBudget::new(self.cpu_limit, Arc::clone(&cancelled));
        let take = Box::new(move |turn| {
            if sender.is_closed() {
                return;
            }
            let outcome = match turn {
                Turn::Run => Ok(budget.run(work)),
                Turn::Displaced => Err(PoolError::Displaced),
            };
            // the caller may leave while it runs
            let _ = sender.send(outcome);
        });
        let lane = if bytes <= self.short_body_bytes { Lane::Short } else { Lane::Long };
        let displaced = self.shared.push(tenant, lane, bytes, Work { cancelled, take })?;
        if let Some(displaced) = displaced {
            (displaced.take)(Turn::Displaced);
        }
        result.await.unwrap_or(Err(PoolError::Broken))
    }
}

impl Drop for EncodePool {
    fn drop(&mut self) {
        self.shared.state.lock().closed = true;
        self.shared.work_came.notify_all();
    }
}

impl Shared {
    /// Returns the work that has to leave the queue.
    fn push(&self, tenant: u64, lane: Lane, bytes: usize, work: Work) -> Result<Option<Work>, PoolError> {
        let mut state = self.state.lock();
        let outcome = match state.queue.push(tenant, lane, bytes, work) {
            Ok(displaced) => Ok(displaced),
            Err(work) => {
                // callers that are gone hold no place
                state.queue.remove(|waiting| waiting.cancelled.load(Ordering::Relaxed));
                state.queue.push(tenant, lane, bytes, work).map_err(|_| PoolError::Full)
            }
        };
        if state.idle > 0 {
            // all of them: the one that takes only short work may not be the one that wakes
            self.work_came.notify_all();
        }
        outcome
    }

    fn work(&self, only_short: bool) {
        let mut state = self.state.lock();
        loop {
            let Some(started) = state.queue.pop(only_short) else {
                if state.closed {
                    return;
                }
                state.idle += 1;
                self.work_came.wait(&mut state);
                state.idle -= 1;
                continue;
            };
            drop(state);
            let Started { work, tenant, estimate } = started;
            let begun = Instant::now();
            if catch_unwind(AssertUnwindSafe(|| (work.take)(Turn::Run))).is_err() {
                tracing::error!("encoding a request panicked");
            }
            let seconds = begun.elapsed().as_secs_f64();
            state = self.state.lock();
            state.queue.ended(tenant, estimate, seconds);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use bora_common::cpu_budget::{self, Stage, Stopped};

    use super::*;

    fn pool(threads: usize, queue: usize) -> Arc<EncodePool> {
        let options = RouterOptions {
            encode_threads: threads,
            encode_queue: queue,
            short_body_bytes: 10,
            ..RouterOptions::default()
        };
        Arc::new(EncodePool::new(&options, &HashMap::new()))
    }

    async fn until(condition: impl Fn() -> bool) {
        while !condition() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn work_runs_on_a_thread_that_stays() {
        let pool = pool(1, 8);
        let here = std::thread::current().id();
        let first = pool.run(1, 1, || std::thread::current().id()).await.expect("an id");
        let second = pool.run(1, 100, || std::thread::current().id()).await.expect("an id");
        assert_ne!(first, here);
        assert_eq!(first, second);
    }

    #[tokio::test]
    async fn short_work_passes_long_work() {
        let pool = pool(2, 8);
        let (release, blocked) = mpsc::channel::<()>();
        let long = tokio::spawn({
            let pool = Arc::clone(&pool);
            async move { pool.run(1, 11, move || blocked.recv().is_ok()).await }
        });
        let queued = tokio::spawn({
            let pool = Arc::clone(&pool);
            async move { pool.run(1, 11, || ()).await }
        });
        until(|| pool.shared.state.lock().queue.len() == 1).await;
        assert_eq!(pool.run(1, 10, || 7).await, Ok(7), "while long work waits");
        release.send(()).expect("the long work waits");
        assert_eq!(long.await.expect("joined"), Ok(true));
        assert_eq!(queued.await.expect("joined"), Ok(()));
    }

    #[tokio::test]
    async fn what_waits_is_bounded_and_a_panic_is_one_callers_alone() {
        let pool = pool(1, 1);
        let (release, blocked) = mpsc::channel::<()>();
        let (began, begun) = oneshot::channel();
        let running = tokio::spawn({
            let pool = Arc::clone(&pool);
            let work = move || {
                began.send(()).expect("the test waits");
                blocked.recv().is_ok()
            };
            async move { pool.run(1, 1, work).await }
        });
        begun.await.expect("it runs");
        let queued = tokio::spawn({
            let pool = Arc::clone(&pool);
            async move { pool.run(1, 1, || -> () { panic!("on purpose") }).await }
        });
        until(|| pool.shared.state.lock().queue.len() == 1).await;
        assert_eq!(pool.run(1, 1, || ()).await, Err(PoolError::Full));
        release.send(()).expect("the first work waits");
        assert_eq!(running.await.expect("joined"), Ok(true));
        assert_eq!(queued.await.expect("joined"), Err(PoolError::Broken));
        assert_eq!(pool.run(1, 1, || 3).await, Ok(3), "the thread lives on");
    }

    #[tokio::test]
    async fn work_ends_when_its_caller_is_gone() {
        let pool = pool(1, 8);
        let (began, begun) = oneshot::channel();
        let (ended, end) = oneshot::channel();
        let running = tokio::spawn({
            let pool = Arc::clone(&pool);
            let work = move || {
                began.send(()).expect("the test waits");
                let stopped = loop {
                    if let Err(stopped) = cpu_budget::check(Stage::Encode) {
                        break stopped;
                    }
                    std::thread::yield_now();
                };
                ended.send(stopped).expect("the test waits");
            };
            async move { pool.run(1, 1, work).await }
        });
        begun.await.expect("it runs");
        running.abort();
        assert_eq!(end.await, Ok(Stopped::Cancelled(Stage::Encode)));
    }

    #[tokio::test]
    async fn work_has_a_budget_of_cpu_time() {
        let options = RouterOptions { encode_threads: 1, max_prepare_cpu_seconds: 0.02, ..RouterOptions::default() };
        let pool = EncodePool::new(&options, &HashMap::new());
        let work = || loop {
            if let Err(stopped) = cpu_budget::check(Stage::Validate) {
                return stopped;
            }
        };
        let limit = Duration::from_millis(20);
        assert_eq!(pool.run(1, 1, work).await, Ok(Stopped::Exceeded { stage: Stage::Validate, limit }));
    }

    /// One thread and one tenant with a queue full of work: another tenant's work waits for one segment of it at most.
    #[tokio::test]
    async fn tenants_share_threads_and_queue() {
        let pool = pool(1, 8);
        let (release, blocked) = mpsc::channel::<()>();
        let (began, begun) = oneshot::channel();
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = Vec::new();
        tasks.push(tokio::spawn({
            let pool = Arc::clone(&pool);
            let work = move || {
                began.send(()).expect("the test waits");
                let _ = blocked.recv();
            };
            async move { pool.run(1, 100, work).await }
        }));
        begun.await.expect("it runs");
        for (tenant, length) in [(1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (1, 6), (1, 7), (1, 8), (2, 8)] {
            let (of_task, order) = (Arc::clone(&pool), Arc::clone(&order));
            tasks.push(tokio::spawn(async move { of_task.run(tenant, 1, move || order.lock().push(tenant)).await }));
            // the ninth makes the eighth leave
            until(|| pool.shared.state.lock().queue.len() == length).await;
            if tenant == 2 {
                until(|| pool.shared.state.lock().queue.waiting_of(2) == 1).await;
            }
        }
        release.send(()).expect("the first work waits");
        let mut displaced = 0;
        for task in tasks {
            displaced += usize::from(task.await.expect("joined") == Err(PoolError::Displaced));
        }
        assert_eq!(displaced, 1);
        assert_eq!(order.lock().first(), Some(&2), "{order:?}");
    }
}
