//! What a process is given about its group.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use bora_common::tls::GrpcTls;

use crate::backend::cpu::CpuOptions;
use crate::backend::cuda::CudaOptions;
use crate::backend::{KvBudget, Limits};
use crate::grammar::PendingGrammars;
use crate::weights::LoadFormat;

/// What every process of a group is given; leader and followers alike.
#[derive(Clone, Debug)]
pub struct MemberOptions {
    /// Name of the cluster.
    pub cluster: String,
    /// The name that the model is served under.
    pub model: String,
    /// Name of the group, equal in all its processes.
    pub group: String,
    /// The checkpoint's folder. Each process reads its own copy; fingerprints are compared.
    pub model_dir: PathBuf,
    /// Where the weights come from.
    pub load_format: LoadFormat,
    /// Of dummy weights: equal seeds make equal weights.
    pub seed: u64,
    /// What the ranks of this process compute on.
    pub device: DeviceOptions,
    /// Ranks of the whole group (tensor-parallel size).
    pub ranks: usize,
    /// The ranks that this process holds; the leader's begin at 0.
    pub local_ranks: Range<usize>,
    /// KV cache of each rank; the group takes the least that a rank can hold.
    pub kv: KvBudget,
    /// Host memory of each rank that cached blocks may go to, bytes; 0 = none.
    pub host_bytes: u64,
    /// Name or address under which the other processes reach this one, and by which errors name it.
    pub host: String,
    /// How long to wait for others.
    pub timeouts: Timeouts,
    /// Which state of its deployment this process is of; equal in all processes of a group.
    pub revision: String,
    /// What compiles grammars; ranks wait for it once their weights are loaded.
    pub grammars: PendingGrammars,
    /// Mutual TLS between the group's processes; plain text where it is absent. Tensors are never encrypted.
    pub tls: Option<GrpcTls>,
}

/// What the leader is given besides.
pub struct LeaderOptions {
    /// As every process.
    pub member: MemberOptions,
    /// Of this start of the group: larger than that of the start before (milliseconds since 1970 will do).
    pub epoch: u64,
    /// The largest step that the scheduler will make; followers are given.
    pub limits: Limits,
    /// Where followers join; needed where not all ranks are local.
    pub peers: Option<tokio::net::TcpListener>,
}

/// What a follower is given besides.
#[derive(Clone, Debug)]
pub struct FollowerOptions {
    /// As every process.
    pub member: MemberOptions,
    /// `host:port` of the leader's Peers service.
    pub leader: String,
    /// The epoch that was read in the registry; `None` takes the leader's.
    pub epoch: Option<u64>,
    /// How long this address is tried. Shorter than `timeouts.join` where the address may be an old one and
    /// can be looked up again.
    pub connect_within: Duration,
}

/// What ranks compute on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceOptions {
    /// The reference backend.
    Cpu(CpuOptions),
    /// NVIDIA GPUs: the first local rank takes the GPU that is named, each next rank the next one.
    Cuda(CudaOptions),
}

/// How long a member waits for the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// All processes have joined and connected within this.
    pub join: Duration,
    /// A process that sends no heartbeat (one each second) for this long is gone.
    pub heartbeat: Duration,
    /// A rank that does not come to a collective call for this long is gone. Longer than the longest time
    /// that one rank may need between two calls while another already waits.
    pub collective: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { join: Duration::from_secs(300), heartbeat: Duration::from_secs(5), collective: Duration::from_secs(30) }
    }
}

impl MemberOptions {
    /// Everything that must be equal in all processes for their numbers to fit together.
    pub(super) fn settings(&self) -> String {
        let device = match self.device {
            // which of a machine's GPUs it is makes no difference
            DeviceOptions::Cuda(options) => DeviceOptions::Cuda(CudaOptions { device: 0, ..options }),
            cpu @ DeviceOptions::Cpu(_) => cpu,
        };
        format!("{device:?}, weights {:?} {}, {} bytes of host memory", self.load_format, self.seed, self.host_bytes)
    }

    /// Where others reach a port of this process.
    pub(super) fn address(&self, port: u16) -> String {
        if self.host.contains(':') { format!("[{}]:{port}", self.host) } else { format!("{}:{port}", self.host) }
    }

    /// A port for the collective, on the host's own address where that can be bound.
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
