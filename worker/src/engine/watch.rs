//! Watchers of a group: a snapshot of the blocks first, then numbered deltas, load and state.
//!
//! Each watcher has a bounded channel. A watcher that does not read is disconnected: its stream ends, and it must watch
//! again for a new snapshot.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bora_proto::v1::{self, group_event::Event};
use tokio::sync::mpsc;

use crate::cache::to_bytes;
use crate::schedule::Scheduler;
use crate::telemetry::engine::EngineMetrics;

/// Maximum unread events of a watcher.
const CAPACITY: usize = 4_096;
/// Hashes in one part of a snapshot (256 KiB).
const SNAPSHOT_PART: usize = 16_384;
/// Minimum interval between load reports.
const LOAD_INTERVAL: Duration = Duration::from_millis(50);
/// Maximum interval between load reports, which also serve as heartbeats.
pub(crate) const HEARTBEAT: Duration = Duration::from_secs(1);

struct Watcher {
    name: String,
    events: mpsc::Sender<v1::GroupEvent>,
    sequence: u64,
}

impl Watcher {
    /// Sends an event; false if the watcher is gone or was disconnected.
    fn report(&mut self, epoch: u64, event: Event) -> bool {
        self.sequence += 1;
        let event = v1::GroupEvent { epoch, sequence: self.sequence, event: Some(event) };
        match self.events.try_send(event) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Closed(_)) => false,
            Err(mpsc::error::TrySendError::Full(_)) => {
                tracing::warn!(watcher = self.name, "disconnected a watcher that does not read its events");
                false
            }
        }
    }
}

/// All watchers of the group.
pub(crate) struct Subscribers {
    epoch: u64,
    state: v1::State,
    watchers: Vec<Watcher>,
    reported: v1::Load,
    reported_at: Instant,
    metrics: Arc<EngineMetrics>,
}

impl Subscribers {
    pub(crate) fn new(epoch: u64, metrics: Arc<EngineMetrics>) -> Self {
        Self {
            metrics,
            epoch,
            state: v1::State::Ready,
            watchers: Vec::new(),
            reported: v1::Load::default(),
            reported_at: Instant::now(),
        }
    }

    /// Adds a watcher and sends it a snapshot.
    pub(crate) fn add(&mut self, name: String, scheduler: &mut Scheduler) -> mpsc::Receiver<v1::GroupEvent> {
        // the snapshot includes these changes, so the other watchers must receive them first
        self.report_changes(scheduler);
        let hashes = scheduler.snapshot();
        let parts: Vec<_> = hashes.chunks(SNAPSHOT_PART).collect();
        let (sender, receiver) = mpsc::channel(CAPACITY + parts.len());
        let mut watcher = Watcher { name, events: sender, sequence: 0 };
        for (index, part) in parts.iter().enumerate() {
            let snapshot = v1::Snapshot { block_hashes: to_bytes(part), last: index + 1 == parts.len() };
            watcher.report(self.epoch, Event::Snapshot(snapshot));
        }
        if parts.is_empty() {
            let empty = v1::Snapshot { last: true, ..Default::default() };
            watcher.report(self.epoch, Event::Snapshot(empty));
        }
        watcher.report(self.epoch, Event::State(self.state.into()));
        watcher.report(self.epoch, Event::Load(scheduler.load()));
        self.watchers.push(watcher);
        receiver
    }

    /// Reports changes since the last call; returns the current load.
    pub(crate) fn report_changes(&mut self, scheduler: &mut Scheduler) -> v1::Load {
        let delta = scheduler.drain_changes();
        self.metrics.blocks(delta.stored.len(), delta.evicted.len(), scheduler.drain_mismatches());
        if !delta.is_empty() && !self.watchers.is_empty() {
            self.send_to_all(&Event::Blocks(v1::BlocksChanged {
                stored: to_bytes(&delta.stored),
                evicted: to_bytes(&delta.evicted),
            }));
        }
        let load = scheduler.load();
        let since = self.reported_at.elapsed();
        if (load != self.reported && since >= LOAD_INTERVAL) || since >= HEARTBEAT {
            self.reported = load;
            self.reported_at = Instant::now();
            self.send_to_all(&Event::Load(load));
        }
        load
    }

    /// Time until a changed load may be reported.
    pub(crate) fn next_load_in(&self, load: &v1::Load) -> Duration {
        let interval = if *load == self.reported { HEARTBEAT } else { LOAD_INTERVAL };
        interval.saturating_sub(self.reported_at.elapsed()).max(Duration::from_millis(1))
    }

    /// Sets and reports the state of the group.
    pub(crate) fn set_state(&mut self, state: v1::State) {
        if self.state != state {
            self.state = state;
            self.send_to_all(&Event::State(state.into()));
        }
    }

    fn send_to_all(&mut self, event: &Event) {
        let epoch = self.epoch;
        self.watchers.retain_mut(|watcher| watcher.report(epoch, event.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{EngineConfig, EngineOptions};

    #[test]
    fn disconnects_only_the_watcher_that_does_not_read() {
        let fake = crate::backend::fake::FakeOptions::default();
        let mut scheduler = Scheduler::new(EngineConfig {
            options: EngineOptions::default(),
            epoch: 1,
            kv_blocks: 16,
            host: Default::default(),
            max_model_len: 1_024,
            vocabulary_size: 10,
            eos_ids: Vec::new(),
            images: false,
            speed: fake.speed(),
            least_chunk: 1,
            steps_run: 0,
            grammars: None,
            keys: bora_common::secret::ClusterKeys::derive(&[1; 32]),
        });
        let mut watchers = Subscribers::new(1, Arc::default());
        let mut lazy = watchers.add("lazy".into(), &mut scheduler);
        let mut eager = watchers.add("eager".into(), &mut scheduler);
        let mut received = 0;
        for turn in 0..2 * CAPACITY {
            let state = if turn % 2 == 0 { v1::State::Draining } else { v1::State::Ready };
            watchers.set_state(state);
            while let Ok(event) = eager.try_recv() {
                received += 1;
                assert_eq!(event.sequence, received, "no gap");
            }
        }
        assert_eq!(received as usize, 2 * CAPACITY + 3);
        assert_eq!(watchers.watchers.len(), 1);
        let mut left = 0;
        while let Ok(event) = lazy.try_recv() {
            left += 1;
            assert_eq!(event.sequence, left);
        }
        assert_eq!(left as usize, CAPACITY);
        assert!(lazy.is_closed(), "then its stream ends");
    }
}
