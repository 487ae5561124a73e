//! The `worker` section of the configuration.

use std::time::Duration;

use bora_common::config::{ByteSize, ConfigError, HostPort, seconds};
use bora_common::peer::local::LocalListener;
use bora_common::tls::GrpcTls;
use clap::ValueEnum;
use serde::Deserialize;

use crate::backend::fake::FakeOptions;
use crate::backend::{Fp8Mode, KvDtype};
use crate::engine::EngineOptions;
use crate::speculate::SpeculativeOptions;
use crate::weights::LoadFormat;

/// One worker process and the group it belongs to. Every process of a group is given the same section but
/// for `ranks`, `listen` and `advertise`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkerOptions {
    /// The group's name, unique in the cluster; the host name and the listening port where it is absent.
    pub group: Option<String>,
    /// Which of the configured models it runs; the only one where it is absent.
    pub model: Option<String>,
    /// What it runs on.
    pub device: DeviceChoice,
    /// Ranks (GPUs) that one copy of the model is split over.
    pub tensor_parallel_size: u32,
    /// The ranks that this process holds, each on a thread and a device of its own; all where it is absent.
    pub ranks: Option<Vec<u32>>,
    /// Where the leader's `Inference` and `Admin` services listen.
    pub listen: HostPort,
    /// Where the leader waits for the processes that hold the other ranks.
    pub peers: HostPort,
    /// Where `/metrics` and `/health` are served, by every process of the group; nowhere where it is absent.
    pub admin: Option<HostPort>,
    /// Where the leader serves `grpc.health.v1` alone and without TLS, for probes that speak none; nowhere else where
    /// it is absent.
    pub health: Option<HostPort>,
    /// How routers reach `listen`; the listening address where it is absent.
    pub advertise: Option<HostPort>,
    /// Name or address under which the group's other processes reach this one; the listening host where it is absent.
    pub host: Option<String>,
    /// `host:port` of the leader's `peers`, where no registry says it.
    pub leader: Option<HostPort>,
    /// Which state of its deployment this process is of, for example the hash of a pod's template. A group is of one: in a
    /// rolling update its followers join no leader of the next or the last one.
    pub revision: String,
    /// All-reduce go through NCCL alone, also where the GPUs reach each other's memory.
    pub disable_custom_all_reduce: bool,
    /// How long the ranks wait for each other at the start.
    #[serde(deserialize_with = "seconds")]
    pub rendezvous_seconds: Duration,
    /// A process of the group that is silent for so long is dead.
    #[serde(deserialize_with = "seconds")]
    pub heartbeat_seconds: Duration,
    /// A rank that keeps the others waiting for so long within a step is dead.
    #[serde(deserialize_with = "seconds")]
    pub collective_seconds: Duration,
    /// How long a draining worker lets its sequences run.
    #[serde(deserialize_with = "seconds")]
    pub drain_seconds: Duration,
    /// Longest prompt plus output in tokens; the model's own limit, at most 262,144, where it is absent.
    pub max_model_len: Option<u32>,
    /// Where weights come from.
    pub load_format: LoadFormat,
    /// How FP8 weights are multiplied on the CPU.
    pub cpu_fp8: Fp8Mode,
    /// The KV cache.
    pub kv_cache: KvCacheOptions,
    /// The scheduler.
    pub schedule: EngineOptions,
    /// The timing model and the scripts of a fake group.
    pub fake: FakeOptions,
    /// Mutual TLS (`grpc.tls` of the file); plain text where it is absent.
    #[serde(skip)]
    pub tls: Option<GrpcTls>,
    /// Serves callers of the same process in place of `listen` (`bora serve`).
    #[serde(skip)]
    pub in_process: Option<LocalListener>,
}

impl Default for WorkerOptions {
    fn default() -> Self {
        Self {
            group: None,
            model: None,
            device: DeviceChoice::Auto,
            tensor_parallel_size: 1,
            ranks: None,
            listen: HostPort { host: "127.0.0.1".into(), port: 0 },
            peers: HostPort { host: "127.0.0.1".into(), port: 0 },
            admin: None,
            health: None,
            advertise: None,
            host: None,
            leader: None,
            revision: String::new(),
            disable_custom_all_reduce: false,
            rendezvous_seconds: Duration::from_secs(300),
            heartbeat_seconds: Duration::from_secs(5),
            collective_seconds: Duration::from_secs(30),
            drain_seconds: Duration::from_secs(120),
            max_model_len: None,
            load_format: LoadFormat::Auto,
            cpu_fp8: Fp8Mode::Dequantized,
            kv_cache: KvCacheOptions::default(),
            schedule: EngineOptions::default(),
            fake: FakeOptions::default(),
            tls: None,
            in_process: None,
        }
    }
}

/// What a worker is asked to run on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// CUDA where there is a GPU, else the CPU.
    #[default]
    Auto,
    /// The reference backend.
    Cpu,
    /// NVIDIA GPUs.
    Cuda,
    /// No model at all: scripted token IDs and a timing model.
    Fake,
}

/// The KV cache of a group.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KvCacheOptions {
    /// Blocks of 64 tokens; by `memory` where it is absent.
    pub blocks: Option<u32>,
    /// Memory on each rank; if it is absent, 1 GiB on a CPU and what `device_share` leaves on a GPU.
    pub memory: Option<ByteSize>,
    /// Share of a GPU's memory that the rank uses, weights included.
    pub device_share: f32,
    /// Type of its numbers.
    pub dtype: KvDtype,
    /// Memory of the host for each rank that cached blocks go to before they are given up; none where it is absent.
    pub host_memory: Option<ByteSize>,
}

impl Default for KvCacheOptions {
    fn default() -> Self {
        Self { blocks: None, memory: None, device_share: 0.9, dtype: KvDtype::default(), host_memory: None }
    }
}

impl WorkerOptions {
    /// The ranks of this process, ascending.
    pub fn local_ranks(&self) -> Vec<u32> {
        let mut ranks = self.ranks.clone().unwrap_or_else(|| (0..self.tensor_parallel_size).collect());
        ranks.sort_unstable();
        ranks
    }

    /// Values that don't go together.
    pub fn check(&self) -> Result<(), ConfigError> {
        let conflict = |text: String| Err(ConfigError::Conflict(text));
        if self.tensor_parallel_size == 0 {
            return conflict("worker.tensor_parallel_size: expected at least 1".into());
        }
        let ranks = self.local_ranks();
        if ranks.is_empty() || ranks.windows(2).any(|pair| pair[0] == pair[1]) {
            return conflict("worker.ranks: expected at least one rank, each once".into());
        }
        if let Some(rank) = ranks.iter().find(|rank| **rank >= self.tensor_parallel_size) {
            return conflict(format!(
                "worker.ranks: rank {rank} is not below worker.tensor_parallel_size = {}",
                self.tensor_parallel_size
            ));
        }
        if ranks.windows(2).any(|pair| pair[1] != pair[0] + 1) {
            return conflict(format!("worker.ranks: expected neighbours, found {ranks:?}"));
        }
        let schedule = &self.schedule;
        if schedule.max_num_seqs == 0 || schedule.max_num_batched_tokens == 0 || schedule.max_waiting == 0 {
            return conflict("worker.schedule: every limit is at least 1".into());
        }
        if schedule.max_num_batched_tokens < schedule.max_num_seqs {
            return conflict(format!(
                "worker.schedule.max_num_batched_tokens = {} is below max_num_seqs = {}: a step could not carry one token of each",
                schedule.max_num_batched_tokens, schedule.max_num_seqs
            ));
        }
        if let Some(Err((field, reason))) = schedule.speculative.as_ref().map(SpeculativeOptions::check) {
            return conflict(format!("worker.schedule.speculative.{field}: {reason}"));
        }
        let share = self.kv_cache.device_share;
        if !(share > 0.0 && share <= 1.0) {
            return conflict(format!("worker.kv_cache.device_share: expected above 0 and at most 1, found {share}"));
        }
        if self.kv_cache.blocks == Some(0) {
            return conflict("worker.kv_cache.blocks: expected at least 1".into());
        }
        if self.max_model_len == Some(0) {
            return conflict("worker.max_model_len: expected at least 1".into());
        }
        if self.device == DeviceChoice::Fake && self.tensor_parallel_size > 1 && self.ranks.is_some() {
            return conflict("worker.ranks: a fake group is one process".into());
        }
        Ok(())
    }
}
