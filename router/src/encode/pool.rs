//! Keeps long work off the reactor: a body of a megabyte takes milliseconds to parse, encode and hash, and
//! nobody else's stream may wait for that.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::sync::Semaphore;

use crate::options::RouterOptions;

/// A work that can't be taken on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// Too many wait already.
    #[error("too many long requests wait to be encoded")]
    Full,
    /// The work panicked, or the process ends.
    #[error("encoding did not finish")]
    Broken,
}

/// Bounds how much long work runs and waits.
pub struct EncodePool {
    permits: Arc<Semaphore>,
    waiting: AtomicUsize,
    max_waiting: usize,
    inline_bytes: usize,
}

struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl EncodePool {
    /// As the options say.
    pub fn new(options: &RouterOptions) -> Self {
        let threads = match options.encode_threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        Self {
            permits: Arc::new(Semaphore::new(threads)),
            waiting: AtomicUsize::new(0),
            max_waiting: options.encode_queue,
            inline_bytes: options.inline_encode_bytes,
        }
    }

    /// Runs `work` here if `bytes` is small, else on a thread of its own.
    pub async fn run<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, PoolError> {
        if bytes <= self.inline_bytes {
            return Ok(work());
        }
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= self.max_waiting {
            drop(Waiting(&self.waiting));
            return Err(PoolError::Full);
        }
        let waiting = Waiting(&self.waiting);
        let permit = Arc::clone(&self.permits).acquire_owned().await.map_err(|_| PoolError::Broken)?;
        drop(waiting);
        // the permit goes with the work: a client that leaves does not make room before the thread is free
        let running = tokio::task::spawn_blocking(move || {
            let result = work();
            drop(permit);
            result
        });
        running.await.map_err(|_| PoolError::Broken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn short_work_stays_and_long_work_goes_elsewhere() {
        let pool = EncodePool::new(&RouterOptions { inline_encode_bytes: 10, ..RouterOptions::default() });
        let here = std::thread::current().id();
        assert_eq!(pool.run(10, move || std::thread::current().id() == here).await, Ok(true));
        assert_eq!(pool.run(11, move || std::thread::current().id() == here).await, Ok(false));
    }

    #[tokio::test]
    async fn what_waits_is_bounded() {
        let options =
            RouterOptions { encode_threads: 1, encode_queue: 1, inline_encode_bytes: 0, ..RouterOptions::default() };
        let pool = Arc::new(EncodePool::new(&options));
        let (release, blocked) = std::sync::mpsc::channel::<()>();
        let running = tokio::spawn({
            let pool = Arc::clone(&pool);
            async move { pool.run(1, move || blocked.recv().is_ok()).await }
        });
        while pool.permits.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let queued = tokio::spawn({
            let pool = Arc::clone(&pool);
            async move { pool.run(1, || ()).await }
        });
        while pool.waiting.load(Ordering::Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(pool.run(1, || ()).await, Err(PoolError::Full));
        release.send(()).expect("the first work waits");
        assert_eq!(running.await.expect("joined"), Ok(true));
        assert_eq!(queued.await.expect("joined"), Ok(()));
    }
}
