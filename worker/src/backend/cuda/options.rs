//! How the CUDA backend computes.

use crate::backend::KvDtype;

/// How the CUDA backend computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaOptions {
    /// Which GPU of the machine.
    pub device: usize,
    /// What the KV cache holds.
    pub kv: KvDtype,
    /// Record steps as graphs.
    pub graphs: bool,
    /// Let a kernel start while the one before it ends (programmatic dependent launch).
    pub overlap: bool,
    /// How partial GEMMs of few rows are summed over the ranks.
    pub all_reduce: AllReduceKind,
}

/// How partial GEMMs of few rows are summed over the ranks of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AllReduceKind {
    /// The way that is found faster at the start.
    #[default]
    Measured,
    /// By NCCL.
    Nccl,
    /// Through the memory of the other GPUs, where they can be reached.
    Peers,
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self { device: 0, kv: KvDtype::Bf16, graphs: true, overlap: true, all_reduce: AllReduceKind::Measured }
    }
}
