//! Threads that parse and encode requests, so that nobody's stream waits for a body of a megabyte.
//!
//! They are permanent: the tokenizer keeps a cache in every thread that it runs on, which takes a tenth of a
//! second and 30 MB to fill. Each thread fills its own before the router serves. Short bodies go before long
//! ones and, where there are several threads, have one to themselves.

use std::{
    collections::{HashMap, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use bora_common::tokenizer::Tokenizer;
use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;

use crate::{models::ModelSpec, options::RouterOptions};

/// A work that can't be taken on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// Too many wait already.
    #[error("too many requests wait to be encoded")]
    Full,
    /// The work panicked, or there are no threads.
    #[error("encoding did not finish")]
    Broken,
}

type Work = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Queues {
    short: VecDeque<Work>,
    long: VecDeque<Work>,
    idle: usize,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    queues: Mutex<Queues>,
    work_came: Condvar,
}

/// The threads and what waits for them.
pub struct EncodePool {
    shared: Arc<Shared>,
    max_waiting: usize,
    short_body_bytes: usize,
}

impl EncodePool {
    /// Starts the threads; each warms the models' tokenizers for itself before its first work.
    pub fn new(options: &RouterOptions, models: &HashMap<String, ModelSpec>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if options.encode_threads == 0 { cores.div_ceil(2) } else { options.encode_threads };
        let tokenizers: Vec<Arc<Tokenizer>> = models.values().filter_map(|spec| spec.tokenizer.clone()).collect();
        let shared = Arc::new(Shared::default());
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
        Self { shared, max_waiting: options.encode_queue, short_body_bytes: options.short_body_bytes }
    }

    /// Runs `work`, which takes a body of that many bytes, on one of the threads. A caller that no longer waits
    /// takes its work out of the queue.
    pub async fn run<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, PoolError> {
        let (sender, result) = oneshot::channel();
        let work = Box::new(move || {
            if !sender.is_closed() {
                // the caller may leave while it runs
                let _ = sender.send(work());
            }
        });
        {
            let mut queues = self.shared.queues.lock();
            if queues.short.len() + queues.long.len() >= self.max_waiting {
                return Err(PoolError::Full);
            }
            let queue = if bytes <= self.short_body_bytes { &mut queues.short } else { &mut queues.long };
            queue.push_back(work);
            if queues.idle > 0 {
                // all of them: the one that takes only short work may not be the one that wakes
                self.shared.work_came.notify_all();
            }
        }
        result.await.map_err(|_| PoolError::Broken)
    }
}

impl Drop for EncodePool {
    fn drop(&mut self) {
        self.shared.queues.lock().closed = true;
        self.shared.work_came.notify_all();
    }
}

impl Shared {
    fn work(&self, only_short: bool) {
        let mut queues = self.queues.lock();
        loop {
            let next = queues.short.pop_front().or_else(|| if only_short { None } else { queues.long.pop_front() });
            let Some(work) = next else {
                if queues.closed {
                    return;
                }
                queues.idle += 1;
                self.work_came.wait(&mut queues);
                queues.idle -= 1;
                continue;
            };
            drop(queues);
            if catch_unwind(AssertUnwindSafe(work)).is_err() {
                tracing::error!("encoding a request panicked");
            }
            queues = self.queues.lock();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

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
        let first = pool.run(1, || std::thread::current().id()).await.expect("an id");
        let second = pool.run(100, || std::thread::current().id()).await.expect("an id");
        assert_ne!(first, here);
        assert_eq!(first, second);
    }

    #[tokio::test]
    async fn short_work_passes_long_work() {
        let pool = pool(2, 8);
        let (release, blocked) = mpsc::channel::<()>();
        let long = tokio::spawn({
            let pool = Arc::clone(&pool);
            async move { pool.run(11, move || blocked.recv().is_ok()).await }
        });
        let queued = tokio::spawn({
            let pool = Arc::clone(&pool);
            async move { pool.run(11, || ()).await }
        });
        until(|| pool.shared.queues.lock().long.len() == 1).await;
        assert_eq!(pool.run(10, || 7).await, Ok(7), "while long work waits");
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
            async move { pool.run(1, work).await }
        });
        begun.await.expect("it runs");
        let queued = tokio::spawn({
            let pool = Arc::clone(&pool);
            async move { pool.run(1, || -> () { panic!("on purpose") }).await }
        });
        until(|| pool.shared.queues.lock().short.len() == 1).await;
        assert_eq!(pool.run(1, || ()).await, Err(PoolError::Full));
        release.send(()).expect("the first work waits");
        assert_eq!(running.await.expect("joined"), Ok(true));
        assert_eq!(queued.await.expect("joined"), Err(PoolError::Broken));
        assert_eq!(pool.run(1, || 3).await, Ok(3), "the thread lives on");
    }
}
