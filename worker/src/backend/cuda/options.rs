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
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self { device: 0, kv: KvDtype::Bf16, graphs: true, overlap: true }
    }
}
