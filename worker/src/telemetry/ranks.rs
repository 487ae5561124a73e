//! Metrics of the ranks of this process: steps, and the time spent in collectives.

use std::sync::{Arc, LazyLock};
use std::time::Instant;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::RankLabels;
use crate::parallel::{Abort, Collective, CollectiveError};

const BUCKETS: [f64; 13] = [1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 5e-2, 0.25, 1.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CollectiveLabels {
    rank: u32,
    operation: &'static str,
}

/// Metrics of all ranks of this process.
pub(crate) struct RankMetrics {
    collective_seconds: Family<CollectiveLabels, Histogram>,
    steps: Family<RankLabels, Gauge>,
}

impl RankMetrics {
    /// The metrics of the process, whose ranks live as long as the process.
    pub(crate) fn global() -> &'static Self {
        static METRICS: LazyLock<RankMetrics> = LazyLock::new(|| RankMetrics {
            collective_seconds: Family::new_with_constructor(|| Histogram::new(BUCKETS)),
            steps: Family::default(),
        });
        &METRICS
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "collective_seconds",
            "Time of a rank in a collective through host memory or TCP, waiting included",
            self.collective_seconds.clone(),
        );
        registry.register(
            "rank_steps",
            "The last step that each rank of this process has completed: it grows while the rank makes progress",
            self.steps.clone(),
        );
    }

    /// Records a completed step.
    pub(crate) fn step(&self, rank: usize, step: u64) {
        self.steps.get_or_create(&RankLabels { rank: rank as u32 }).set(step as i64);
    }
}

/// A collective whose calls are timed.
pub(crate) struct Timed {
    inner: Box<dyn Collective>,
    all_reduce: Histogram,
    all_gather: Histogram,
}

impl Timed {
    /// Wraps a collective; a group of one rank is not timed, because it exchanges nothing.
    pub(crate) fn wrap(inner: Box<dyn Collective>) -> Box<dyn Collective> {
        if inner.ranks() == 1 {
            return inner;
        }
        let rank = inner.rank() as u32;
        let family = &RankMetrics::global().collective_seconds;
        let of = |operation| family.get_or_create(&CollectiveLabels { rank, operation }).clone();
        Box::new(Self { all_reduce: of("all_reduce"), all_gather: of("all_gather"), inner })
    }
}

impl Collective for Timed {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn ranks(&self) -> usize {
        self.inner.ranks()
    }

    fn all_reduce(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        let begun = Instant::now();
        let outcome = self.inner.all_reduce(values);
        self.all_reduce.observe(begun.elapsed().as_secs_f64());
        outcome
    }

    fn all_gather(&mut self, own: &[f32], all: &mut [f32]) -> Result<(), CollectiveError> {
        let begun = Instant::now();
        let outcome = self.inner.all_gather(own, all);
        self.all_gather.observe(begun.elapsed().as_secs_f64());
        outcome
    }

    fn exchange(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.inner.exchange(own)
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.inner.barrier()
    }

    fn aborter(&self) -> Arc<dyn Abort> {
        self.inner.aborter()
    }
}
