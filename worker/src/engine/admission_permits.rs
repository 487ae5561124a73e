//! Counts waiting and running sequences when a request is accepted, so that a full queue refuses it immediately and not
//! after the current step.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::sync::Notify;

use super::error::EngineError;
use super::request::Class;

/// Counters of one engine.
#[derive(Debug, Default)]
pub(crate) struct AdmissionPermits {
    interactive: AtomicU32,
    batch: AtomicU32,
    active: AtomicU32,
    empty: Notify,
}

/// Permit of one sequence: counted in the queue, then among the running sequences. Dropping it ends both.
#[derive(Debug)]
pub(crate) struct AdmissionPermit {
    permits: Arc<AdmissionPermits>,
    class: Class,
    waiting: bool,
}

impl AdmissionPermits {
    /// A permit at the end of a queue that holds at most `limit` sequences.
    pub(crate) fn queue(self: &Arc<Self>, class: Class, limit: u32) -> Result<AdmissionPermit, EngineError> {
        self.queue_of(class)
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |waiting| (waiting < limit).then_some(waiting + 1))
            .map_err(|waiting| EngineError::Exhausted { waiting })?;
        self.active.fetch_add(1, Ordering::AcqRel);
        Ok(AdmissionPermit { permits: self.clone(), class, waiting: true })
    }

    /// Number of waiting and running sequences.
    pub(crate) fn active(&self) -> u32 {
        self.active.load(Ordering::Acquire)
    }

    /// Completes when no sequence waits or runs.
    pub(crate) async fn until_empty(&self) {
        loop {
            let empty = self.empty.notified();
            if self.active() == 0 {
                return;
            }
            empty.await;
        }
    }

    fn queue_of(&self, class: Class) -> &AtomicU32 {
        match class {
            Class::Interactive => &self.interactive,
            Class::Batch => &self.batch,
        }
    }
}

impl AdmissionPermit {
    /// Counts the sequence as running instead of waiting.
    pub(crate) fn leave_queue(&mut self) {
        if std::mem::take(&mut self.waiting) {
            self.permits.queue_of(self.class).fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Drop for AdmissionPermit {
    fn drop(&mut self) {
        self.leave_queue();
        if self.permits.active.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.permits.empty.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn refuses_at_the_limit_and_reports_an_empty_engine() {
        let permits = Arc::new(AdmissionPermits::default());
        let mut first = permits.queue(Class::Interactive, 1).unwrap();
        let refused = permits.queue(Class::Interactive, 1);
        assert_eq!(refused.unwrap_err(), EngineError::Exhausted { waiting: 1 });
        let batch = permits.queue(Class::Batch, 1).unwrap();
        first.leave_queue();
        let second = permits.queue(Class::Interactive, 1).unwrap();
        assert_eq!(permits.active(), 3);
        let waiter = tokio::spawn({
            let permits = permits.clone();
            async move { permits.until_empty().await }
        });
        tokio::task::yield_now().await;
        drop((first, batch, second));
        waiter.await.unwrap();
    }
}
