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

/// One worker process and its group. All processes of a group have the same section except for `ranks`, `listen` and
/// `advertise`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkerOptions {
    /// Name of the group, unique in the cluster. Default: the host name and the listening port.
    pub group: Option<String>,
    /// Which of the configured models the group runs. Default: the only one.
    pub model: Option<String>,
    /// Device that the ranks run on.
    pub device: DeviceChoice,
    /// Number of ranks (GPUs) of one copy of the model.
    pub tensor_parallel_size: u32,
    /// Ranks of this process; each has its own thread and device. Default: all ranks.
    pub ranks: Option<Vec<u32>>,
    /// Address on which the leader serves `Inference` and `Admin`.
    pub listen: HostPort,
    /// Address on which the leader accepts the processes that hold the other ranks.
    pub peers: HostPort,
    /// Address on which every process serves `/metrics` and `/health`. Default: not served.
    pub admin: Option<HostPort>,
    /// Address on which the leader serves only `grpc.health.v1`, without TLS, for probes that do not support TLS.
    /// Default: no such address.
    pub health: Option<HostPort>,
    /// Address at which routers reach `listen`. Default: the listening address.
    pub advertise: Option<HostPort>,
    /// Name or address at which the other processes of the group reach this one. Default: the listening host.
    pub host: Option<String>,
    /// `host:port` of the leader's `peers`, if no registry provides it.
    pub leader: Option<HostPort>,
    /// Revision of the deployment, for example the hash of the pod template. All processes of a group have the same
    /// revision: in a rolling update a follower never joins a leader of another revision.
    pub revision: String,
    /// Uses NCCL for every all-reduce, even if the GPUs have peer access.
    pub disable_custom_all_reduce: bool,
    /// How long the ranks wait for each other at the start.
    #[serde(deserialize_with = "seconds")]
    pub rendezvous_seconds: Duration,
    /// Heartbeat timeout: a process of the group that is silent for this long counts as dead.
    #[serde(deserialize_with = "seconds")]
    pub heartbeat_seconds: Duration,
    /// Collective timeout: a rank that keeps the others waiting within a step for this long counts as dead.
    #[serde(deserialize_with = "seconds")]
    pub collective_seconds: Duration,
    /// How long a draining worker lets its running sequences continue.
    #[serde(deserialize_with = "seconds")]
    pub drain_seconds: Duration,
    /// Maximum tokens of prompt plus output. Default: the model's own limit, at most 262,144.
    pub max_model_len: Option<u32>,
    /// Source of the weights.
    pub load_format: LoadFormat,
    /// How the CPU backend multiplies FP8 weights.
    pub cpu_fp8: Fp8Mode,
    /// KV cache.
    pub kv_cache: KvCacheOptions,
    /// Scheduler.
    pub schedule: EngineOptions,
    /// Timing model and scripts of a fake group.
    pub fake: FakeOptions,
    /// Mutual TLS (`grpc.tls` of the file). `None` means plain text.
    #[serde(skip)]
    pub tls: Option<GrpcTls>,
    /// Serves callers in the same process instead of `listen` (`bora serve`).
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

/// Requested device of a worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// CUDA if there is a GPU, else the CPU.
    #[default]
    Auto,
    /// The CPU backend.
    Cpu,
    /// NVIDIA GPUs.
    Cuda,
    /// No model: scripted tokens and a timing model.
    Fake,
}

/// KV cache of a group.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KvCacheOptions {
    /// Blocks of 64 tokens. Default: as many as `memory` holds.
    pub blocks: Option<u32>,
    /// Memory on each rank. Default: 1 GiB on a CPU, and what `device_share` leaves on a GPU.
    pub memory: Option<ByteSize>,
    /// Share of a GPU's memory that the rank uses, weights included.
    pub device_share: f32,
    /// Element type.
    pub dtype: KvDtype,
    /// Host memory of each rank to which evicted blocks are offloaded. Default: none.
    pub host_memory: Option<ByteSize>,
}

impl Default for KvCacheOptions {
    fn default() -> Self {
        Self { blocks: None, memory: None, device_share: 0.9, dtype: KvDtype::default(), host_memory: None }
    }
}

impl WorkerOptions {
    /// The ranks of this process, in ascending order.
    pub fn local_ranks(&self) -> Vec<u32> {
        let mut ranks = self.ranks.clone().unwrap_or_else(|| (0..self.tensor_parallel_size).collect());
        ranks.sort_unstable();
        ranks
    }

    /// Refuses values that do not fit together. The error names the key and the allowed range.
    pub fn check(&self) -> Result<(), ConfigError> {
        let conflict = |text: String| Err(ConfigError::Conflict(text));
        if self.tensor_parallel_size == 0 {
            return conflict("worker.tensor_parallel_size: expected at least 1".into());
        }
        let ranks = self.local_ranks();
        if ranks.is_empty() || ranks.windows(2).any(|pair| pair[0] == pair[1]) {
            return conflict("worker.ranks: expected at least one rank and no duplicates".into());
        }
        if let Some(rank) = ranks.iter().find(|rank| **rank >= self.tensor_parallel_size) {
            return conflict(format!(
                "worker.ranks: rank {rank} is not below worker.tensor_parallel_size = {}",
                self.tensor_parallel_size
            ));
        }
        if ranks.windows(2).any(|pair| pair[1] != pair[0] + 1) {
            return conflict(format!("worker.ranks: expected consecutive ranks, found {ranks:?}"));
        }
        let schedule = &self.schedule;
        if schedule.max_num_seqs == 0 || schedule.max_num_batched_tokens == 0 || schedule.max_waiting == 0 {
            return conflict("worker.schedule: every limit must be at least 1".into());
        }
        if schedule.max_num_batched_tokens < schedule.max_num_seqs {
            return conflict(format!(
                "worker.schedule.max_num_batched_tokens = {} is below max_num_seqs = {}: a step must hold one token of each running sequence",
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
            return conflict("worker.ranks: a fake group has one process, which holds all ranks".into());
        }
        Ok(())
    }
}
