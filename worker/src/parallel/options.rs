//! Options of a process of a group.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use bora_common::tls::GrpcTls;

use crate::backend::cpu::CpuOptions;
use crate::backend::cuda::CudaOptions;
use crate::backend::{KvBudget, Limits};
use crate::grammar::PendingGrammars;
use crate::weights::LoadFormat;

/// Options of every process of a group.
#[derive(Clone, Debug)]
pub struct MemberOptions {
    /// Name of the cluster.
    pub cluster: String,
    /// Name of the served model.
    pub model: String,
    /// Name of the group, equal in all its processes.
    pub group: String,
    /// Folder of the checkpoint. Each process reads its own copy; fingerprints are compared.
    pub model_dir: PathBuf,
    /// Source of the weights.
    pub load_format: LoadFormat,
    /// Seed of dummy weights: equal seeds make equal weights.
    pub seed: u64,
    /// Device of this process's ranks.
    pub device: DeviceOptions,
    /// Number of ranks of the whole group (tensor-parallel size).
    pub ranks: usize,
    /// Ranks of this process; the leader's begin at 0.
    pub local_ranks: Range<usize>,
    /// KV cache of each rank; the group uses the size of the smallest.
    pub kv: KvBudget,
    /// Host memory of each rank for offloaded blocks, bytes; 0 = none.
    pub host_bytes: u64,
    /// Name or address at which the other processes reach this one; errors name it.
    pub host: String,
    /// Timeouts for other processes and ranks.
    pub timeouts: Timeouts,
    /// Revision of the deployment; equal in all processes of a group.
    pub revision: String,
    /// Compiler of grammars; ranks wait for it after their weights are loaded.
    pub grammars: PendingGrammars,
    /// Mutual TLS between the group's processes. `None` means plain text. Tensors are never encrypted.
    pub tls: Option<GrpcTls>,
}

/// Options of the leader.
pub struct LeaderOptions {
    /// Options of every process.
    pub member: MemberOptions,
    /// Epoch of this start; must be larger than that of the previous start (milliseconds since 1970 suffice).
    pub epoch: u64,
    /// Limits of the scheduler's steps; followers receive them.
    pub limits: Limits,
    /// Listener on which followers join; required if not all ranks are local.
    pub peers: Option<tokio::net::TcpListener>,
}

/// Options of a follower.
#[derive(Clone, Debug)]
pub struct FollowerOptions {
    /// Options of every process.
    pub member: MemberOptions,
    /// `host:port` of the leader's Peers service.
    pub leader: String,
    /// Expected epoch from the registry; `None` accepts the leader's.
    pub epoch: Option<u64>,
    /// How long this address is tried. Shorter than `timeouts.join` if the address may be stale and can be looked up
    /// again.
    pub connect_within: Duration,
}

/// Device options of the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceOptions {
    /// The CPU backend.
    Cpu(CpuOptions),
    /// NVIDIA GPUs: the first local rank uses the named GPU, each further rank the next one.
    Cuda(CudaOptions),
}

/// Timeouts of a process for the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Time within which all processes must have joined and connected.
    pub join: Duration,
    /// A process that sends no heartbeat (one per second) for this long is lost.
    pub heartbeat: Duration,
    /// A rank that does not make a collective call for this long is lost. It must exceed the maximum time between two
    /// calls of one rank while another already waits.
    pub collective: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { join: Duration::from_secs(300), heartbeat: Duration::from_secs(5), collective: Duration::from_secs(30) }
    }
}

impl MemberOptions {
    /// Settings that must be equal in all processes for their results to match.
    pub(super) fn settings(&self) -> String {
        let device = match self.device {
            // the GPU's index does not matter
            DeviceOptions::Cuda(options) => DeviceOptions::Cuda(CudaOptions { device: 0, ..options }),
            cpu @ DeviceOptions::Cpu(_) => cpu,
        };
        format!("{device:?}, weights {:?} {}, {} bytes of host memory", self.load_format, self.seed, self.host_bytes)
    }

    /// Address of a port of this process for other processes.
    pub(super) fn address(&self, port: u16) -> String {
        if self.host.contains(':') { format!("[{}]:{port}", self.host) } else { format!("{}:{port}", self.host) }
    }

    /// Opens a port for the collective, on the host's own address if it can be bound.
    pub(super) fn listen_for_ranks(&self) -> std::io::Result<(std::net::TcpListener, String)> {
        let listener = std::net::TcpListener::bind((self.host.as_str(), 0))
            .or_else(|_| std::net::TcpListener::bind(("0.0.0.0", 0)))?;
        let address = self.address(listener.local_addr()?.port());
        Ok((listener, address))
    }

    pub(super) fn all_local(&self) -> bool {
        self.local_ranks == (0..self.ranks)
    }
}
