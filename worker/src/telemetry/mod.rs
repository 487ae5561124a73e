//! Metrics of a worker process at `/metrics`, and the spans of its ranks.
//!
//! Every process has a port for metrics (`worker.admin`), including followers. Counters are updated where the events
//! happen ([`engine`], [`ranks`]); gauges are read when the metrics are scraped.

pub(crate) mod engine;
mod port;
pub(crate) mod ranks;
pub mod roofline;
pub(crate) mod spans;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bora_common::registry::{Device, GroupRecord, Standing};
use bora_common::telemetry::{MetricsSource, process};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode_registry;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use crate::backend::cuda;
use crate::engine::EngineObserver;
use crate::grammar::Grammars;
use crate::parallel::GroupProgress;
pub(crate) use port::serve;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct RankLabels {
    pub(crate) rank: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MemoryLabels {
    rank: u32,
    state: &'static str,
}

type FloatGauge = Gauge<f64, AtomicU64>;

/// The metrics of one worker process. Cheap to share; empty until the group is known.
#[derive(Default)]
pub struct WorkerMetrics {
    state: Mutex<Option<State>>,
    /// Whether the whole group runs, as far as this process can see.
    group_runs: AtomicBool,
    hides_vllm_names: AtomicBool,
}

struct State {
    registry: Registry,
    /// GPUs of the local ranks, in their order; empty on other devices.
    gpus: Vec<(u32, usize)>,
    gpu_memory: Family<MemoryLabels, Gauge>,
    announcement: Option<Announced>,
    leader: Option<Leader>,
    /// The leader's metrics under vLLM's names; `None` in processes without the leader.
    vllm: Option<Registry>,
    model: String,
}

/// Gauges of the group's registration.
struct Announced {
    standing: watch::Receiver<Standing>,
    announced: Gauge,
    name_taken: Gauge,
}

/// Gauges of the group's load, on its leader.
struct Leader {
    observer: EngineObserver,
    progress: Option<Arc<GroupProgress>>,
    prefill_tokens_per_second: f64,
    running: Gauge,
    waiting: Gauge,
    queued_tokens: Gauge,
    queued_seconds: FloatGauge,
    kv_blocks: Family<StateLabels, Gauge>,
    rank_steps: Family<RankLabels, Gauge>,
    kv_cache_usage: FloatGauge,
}

impl WorkerMetrics {
    /// Metrics of a process whose group is not known yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Whether the whole group runs: every rank has joined and loaded.
    pub(crate) fn group_runs(&self) -> &AtomicBool {
        &self.group_runs
    }

    /// Enables or disables the export of the leader's metrics under vLLM's names; enabled by default.
    pub fn set_vllm_names(&self, enabled: bool) {
        self.hides_vllm_names.store(!enabled, Ordering::Relaxed);
    }

    /// The metrics without the end marker, for a process that exports other metrics too.
    pub fn source(self: &Arc<Self>) -> MetricsSource {
        let metrics = Arc::clone(self);
        Arc::new(move || metrics.own_text())
    }

    /// All metrics in OpenMetrics' text format.
    pub fn text(&self) -> String {
        let mut text = self.own_text();
        process::write(&mut text, env!("CARGO_PKG_VERSION"));
        process::end(&mut text);
        text
    }

    fn own_text(&self) -> String {
        let mut text = String::new();
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(state) = &*state {
            state.update_gauges();
            // writing to a String can't fail
            let _ = encode_registry(&mut text, &state.registry);
            if let Some(vllm) = state.vllm.as_ref().filter(|_| !self.hides_vllm_names.load(Ordering::Relaxed)) {
                let _ = encode_registry(&mut text, vllm);
            }
        }
        text
    }

    /// Sets the group. All series have its name and the model's name as labels.
    pub(crate) fn of_group(&self, model: &str, group: &str, device: Device, local_ranks: &[u32]) {
        let labels = [("model".into(), model.to_owned().into()), ("group".into(), group.to_owned().into())];
        let mut registry = Registry::with_prefix_and_labels("bora_worker", labels.into_iter());
        ranks::RankMetrics::global().register(&mut registry);
        let gpu_memory = Family::<MemoryLabels, Gauge>::default();
        registry.register(
            "gpu_memory_bytes",
            "Memory of each rank's GPU, used (by any process) and free",
            gpu_memory.clone(),
        );
        let gpus = if device == Device::Cuda { local_ranks.iter().copied().zip(0..).collect() } else { Vec::new() };
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = Some(State {
            registry,
            gpus,
            gpu_memory,
            announcement: None,
            leader: None,
            vllm: None,
            model: model.to_owned(),
        });
    }

    /// Adds the gauges of the group's registration.
    pub(crate) fn of_announcement(&self, standing: watch::Receiver<Standing>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(state) = &mut *state else { return };
        let announcement = Announced { standing, announced: Gauge::default(), name_taken: Gauge::default() };
        let registry = &mut state.registry;
        registry.register("announced", "1 if the registry lists the group", announcement.announced.clone());
        registry.register(
            "name_taken",
            "1 if the registry lists another live group under this group's name",
            announcement.name_taken.clone(),
        );
        state.announcement = Some(announcement);
    }

    /// Adds the metrics of grammars, which exist in every process.
    pub(crate) fn of_grammars(&self, grammars: &Grammars) {
        if let Some(state) = &mut *self.state.lock().unwrap_or_else(PoisonError::into_inner) {
            grammars.register(&mut state.registry);
        }
    }

    /// Adds the metrics of the engine, on the leader.
    pub(crate) fn of_leader(
        &self,
        observer: EngineObserver,
        record: &GroupRecord,
        progress: Option<Arc<GroupProgress>>,
    ) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(state) = &mut *state else { return };
        observer.metrics.register(&mut state.registry);
        let leader = Leader {
            observer,
            progress,
            prefill_tokens_per_second: record.speed.prefill_tokens_per_second.max(1.0),
            running: Gauge::default(),
            waiting: Gauge::default(),
            queued_tokens: Gauge::default(),
            queued_seconds: FloatGauge::default(),
            kv_blocks: Family::default(),
            rank_steps: Family::default(),
            kv_cache_usage: FloatGauge::default(),
        };
        let registry = &mut state.registry;
        registry.register("running_sequences", "Sequences that run", leader.running.clone());
        registry.register("waiting_sequences", "Sequences in the queue", leader.waiting.clone());
        registry.register("queued_prefill_tokens", "Prompt tokens not computed yet", leader.queued_tokens.clone());
        registry.register(
            "queued_prefill_seconds",
            "The same in seconds of the prefill rate that was measured at the start",
            leader.queued_seconds.clone(),
        );
        registry.register(
            "kv_blocks",
            "Blocks of KV cache: used by running sequences, cached (free, but found again) and free",
            leader.kv_blocks.clone(),
        );
        registry.register(
            "group_rank_steps",
            "Steps that each rank of the group has completed, those of other processes as of their last heartbeat",
            leader.rank_steps.clone(),
        );
        // Dashboards and gateways made for vLLM read these: https://docs.vllm.ai, "Production Metrics".
        let mut vllm = Registry::with_labels([("model_name".into(), state.model.clone().into())].into_iter());
        vllm.register("vllm:num_requests_running", "Sequences that run", leader.running.clone());
        vllm.register("vllm:num_requests_waiting", "Sequences in the group's queue", leader.waiting.clone());
        vllm.register(
            "vllm:kv_cache_usage_perc",
            "Share of the KV cache's blocks that running sequences use (1 is all)",
            leader.kv_cache_usage.clone(),
        );
        leader.observer.metrics.register_vllm_names(&mut vllm);
        state.vllm = Some(vllm);
        state.leader = Some(leader);
    }
}

impl State {
    /// Updates the gauges.
    fn update_gauges(&self) {
        for (rank, gpu) in &self.gpus {
            let Some((free, total)) = cuda::memory(*gpu) else { continue };
            for (state, bytes) in [("used", total.saturating_sub(free)), ("free", free)] {
                self.gpu_memory.get_or_create(&MemoryLabels { rank: *rank, state }).set(bytes as i64);
            }
        }
        if let Some(announcement) = &self.announcement {
            let standing = announcement.standing.borrow();
            let is_taken = matches!(*standing, Standing::Refused(_) | Standing::Displaced(_));
            announcement.announced.set(i64::from(*standing == Standing::Announced));
            announcement.name_taken.set(i64::from(is_taken));
        }
        let Some(leader) = &self.leader else { return };
        let load = leader.observer.load();
        leader.running.set(i64::from(load.running));
        leader.waiting.set(i64::from(load.waiting));
        leader.queued_tokens.set(load.queued_prefill_tokens as i64);
        leader.queued_seconds.set(load.queued_prefill_tokens as f64 / leader.prefill_tokens_per_second);
        leader.kv_cache_usage.set(f64::from(load.blocks_used) / f64::from(load.blocks_total.max(1)));
        let free = load.blocks_total.saturating_sub(load.blocks_used).saturating_sub(load.blocks_cached);
        for (state, blocks) in [("used", load.blocks_used), ("cached", load.blocks_cached), ("free", free)] {
            leader.kv_blocks.get_or_create(&StateLabels { state }).set(i64::from(blocks));
        }
        for (rank, steps) in leader.progress.iter().flat_map(|progress| progress.steps()).enumerate() {
            leader.rank_steps.get_or_create(&RankLabels { rank: rank as u32 }).set(steps as i64);
        }
    }
}
