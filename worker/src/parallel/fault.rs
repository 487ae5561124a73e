//! The first failure of a group, and the progress of each rank.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bora_common::registry::RankRecord;
use tokio::sync::watch;
use tracing::error;

use super::collective::Abort;
use crate::engine::step::RunError;

/// How long to wait for the cause of a failure that may be a consequence of another one.
pub(super) const ECHO_WAIT: Duration = Duration::from_millis(500);

/// Stores the first failure of a group and aborts waiting collectives.
pub(super) struct Fault {
    first: watch::Sender<Option<RunError>>,
    aborters: Mutex<Vec<Arc<dyn Abort>>>,
    records: OnceLock<Vec<RankRecord>>,
}

impl Fault {
    pub(super) fn new() -> Arc<Self> {
        let (first, _) = watch::channel(None);
        Arc::new(Self { first, aborters: Mutex::new(Vec::new()), records: OnceLock::new() })
    }

    /// Registers a collective to abort on a failure; aborts it immediately if the group has already failed.
    pub(super) fn watch_over(&self, aborter: Arc<dyn Abort>) {
        self.aborters.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&aborter));
        if let Some(first) = self.first() {
            aborter.abort(&first.to_string());
        }
    }

    /// Sets the records of the ranks, which provide the hosts of lost ranks.
    pub(super) fn set_records(&self, records: Vec<RankRecord>) {
        let _ = self.records.set(records);
    }

    /// Records a failure unless there is an earlier one; returns the first.
    pub(super) fn fail(&self, failure: RunError) -> RunError {
        let failure = self.with_host(failure);
        let is_first = self.first.send_if_modified(|first| {
            let empty = first.is_none();
            if empty {
                *first = Some(failure.clone());
            }
            empty
        });
        if is_first {
            error!(error = %failure, "group failed");
        }
        let first = self.first().unwrap_or(failure);
        self.abort(&first.to_string());
        first
    }

    /// Aborts the collectives of all waiting ranks.
    pub(super) fn abort(&self, reason: &str) {
        for aborter in self.aborters.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            aborter.abort(reason);
        }
    }

    pub(super) fn first(&self) -> Option<RunError> {
        self.first.borrow().clone()
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Option<RunError>> {
        self.first.subscribe()
    }

    /// Waits for the first failure.
    pub(super) async fn failure(&self) -> RunError {
        let mut first = self.subscribe();
        loop {
            if let Some(failure) = first.borrow_and_update().clone() {
                return failure;
            }
            if first.changed().await.is_err() {
                // the sender is a field of `self`, so it can't be dropped
                std::future::pending::<()>().await;
            }
        }
    }

    /// Returns the cause of a rank's failure. If the failure may be a consequence of another one (a closed connection),
    /// it waits briefly for the cause.
    #[allow(clippy::disallowed_methods)] // called by ranks' own threads only
    pub(super) fn settle(&self, failure: RunError) -> RunError {
        let may_be_an_echo = matches!(failure, RunError::RankLost { .. });
        let since = Instant::now();
        while may_be_an_echo && self.first().is_none() && since.elapsed() < ECHO_WAIT {
            std::thread::sleep(Duration::from_millis(20));
        }
        self.fail(failure)
    }

    fn with_host(&self, failure: RunError) -> RunError {
        let RunError::RankLost { rank, host, reason } = failure else { return failure };
        let known = self.records.get().and_then(|records| records.iter().find(|record| record.rank == rank));
        RunError::RankLost { rank, host: known.map_or(host, |record| record.host.clone()), reason }
    }
}

/// Progress of each rank of a group. Cheap to read at any time.
#[derive(Debug)]
pub struct GroupProgress {
    steps: Vec<AtomicU64>,
    layers_loaded: Vec<AtomicU64>,
    layers: u64,
}

impl GroupProgress {
    pub(super) fn new(ranks: usize, layers: usize) -> Arc<Self> {
        let counters = || (0..ranks).map(|_| AtomicU64::new(0)).collect();
        Arc::new(Self { steps: counters(), layers_loaded: counters(), layers: layers as u64 })
    }

    /// Completed steps of each rank; for other processes, as of the last heartbeat.
    pub fn steps(&self) -> Vec<u64> {
        self.steps.iter().map(|steps| steps.load(Ordering::Relaxed)).collect()
    }

    /// Layers that a rank of this process has loaded, and the number of layers.
    pub fn layers_loaded(&self, rank: usize) -> (u64, u64) {
        (self.layers_loaded.get(rank).map_or(0, |layers| layers.load(Ordering::Relaxed)), self.layers)
    }

    pub(super) fn set_steps(&self, rank: usize, steps: u64) {
        if let Some(counter) = self.steps.get(rank) {
            counter.store(steps, Ordering::Relaxed);
        }
    }

    pub(super) fn set_layers(&self, rank: usize, layers: usize) {
        if let Some(counter) = self.layers_loaded.get(rank) {
            counter.store(layers as u64, Ordering::Relaxed);
        }
    }
}
