//! Whether this machine can run the CUDA backend, found out without taking anything on a GPU; and if not, why not.

use std::ops::Range;

use cudarc::driver::{result, sys};

use super::kernels;
use super::libraries;
use super::nccl;
use crate::backend::BackendError;

/// Shared memory that a block of the largest kernel takes, bytes.
const SHARED_BYTES: i32 = 232_448;

/// Why there is no CUDA backend on this machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaUnavailable {
    /// Built without nvcc.
    #[error(
        "this build has no GPU kernels: it was built where no nvcc was found (scripts/cuda-toolchain installs one)"
    )]
    NoKernels,
    /// No libcuda.
    #[error("no NVIDIA driver on this machine: {reason}")]
    NoDriver {
        /// In the loader's words.
        reason: String,
    },
    /// The driver is there but does not work.
    #[error("the NVIDIA driver reports no usable GPU: {reason}")]
    Refused {
        /// In the driver's words.
        reason: String,
    },
    /// The driver is older than the kernels.
    #[error("the NVIDIA driver supports CUDA {found}, 13.0 is needed (driver 580 or later)")]
    OldDriver {
        /// The newest CUDA that it supports.
        found: String,
    },
    /// Fewer GPUs than asked for.
    #[error("there is no GPU {ordinal}, this machine has {count}")]
    NoSuchDevice {
        /// The one asked for, from 0.
        ordinal: usize,
        /// GPUs that there are.
        count: usize,
    },
    /// A GPU before Hopper.
    #[error("{name} has compute capability {capability}, 9.0 or later is needed (H100, H200 and what followed)")]
    OldDevice {
        /// The GPU.
        name: String,
        /// What it has.
        capability: String,
    },
    /// No cuBLASLt.
    #[error("libcublasLt.so.13 was not found (it comes with CUDA 13 and with NVIDIA's nvidia-cublas wheel): {reason}")]
    NoCublasLt {
        /// In the loader's words.
        reason: String,
    },
    /// No NCCL, and several GPUs to connect.
    #[error(
        "libnccl.so.2 was not found, which several GPUs need (it comes with NVIDIA's nvidia-nccl-cu13 wheel): {reason}"
    )]
    NoNccl {
        /// In the loader's words.
        reason: String,
    },
}

impl From<CudaUnavailable> for BackendError {
    fn from(error: CudaUnavailable) -> Self {
        BackendError::Device(error.to_string())
    }
}

/// A GPU that the backend can use.
#[derive(Clone, Debug)]
pub(super) struct Gpu {
    pub(super) device: sys::CUdevice,
    pub(super) name: String,
    pub(super) multiprocessors: u32,
    /// Compute capability 9.0: has warpgroup matrix instructions.
    pub(super) hopper: bool,
}

/// The names of the GPUs with these numbers, all of which can run the backend in a group of `ranks`.
pub fn survey(ordinals: Range<usize>, ranks: usize) -> Result<Vec<String>, CudaUnavailable> {
    if !kernels::built() {
        return Err(CudaUnavailable::NoKernels);
    }
    let names = ordinals.map(|ordinal| find(ordinal).map(|gpu| gpu.name)).collect::<Result<_, _>>()?;
    load_cublaslt()?;
    if ranks > 1 {
        nccl::load()?;
    }
    Ok(names)
}

/// Loads the library for large GEMMs.
pub(super) fn load_cublaslt() -> Result<(), CudaUnavailable> {
    let found = libraries::load("libcublasLt.so.13", "cu13/lib");
    found.map(|_| ()).map_err(|reason| CudaUnavailable::NoCublasLt { reason })
}

/// GPU number `ordinal`, checked.
pub(super) fn find(ordinal: usize) -> Result<Gpu, CudaUnavailable> {
    libraries::load("libcuda.so.1", "none").map_err(|reason| CudaUnavailable::NoDriver { reason })?;
    let refused = |error: result::DriverError| CudaUnavailable::Refused {
        reason: error.error_string().map_or_else(|_| format!("{error:?}"), |text| text.to_string_lossy().into_owned()),
    };
    result::init().map_err(refused)?;
    let mut version = 0;
    // SAFETY: the pointer is to a live integer.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().map_err(refused)?;
    if version < 13_000 {
        return Err(CudaUnavailable::OldDriver { found: format!("{}.{}", version / 1000, version % 1000 / 10) });
    }
    let count = result::device::get_count().map_err(refused)? as usize;
    if ordinal >= count {
        return Err(CudaUnavailable::NoSuchDevice { ordinal, count });
    }
    let device = result::device::get(ordinal as i32).map_err(refused)?;
    let name = result::device::get_name(device).map_err(refused)?;
    // SAFETY: `device` came from the driver.
    let attribute = |which| unsafe { result::device::get_attribute(device, which) }.map_err(refused);
    use sys::CUdevice_attribute as Attribute;
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
    if major < 9 || shared < SHARED_BYTES {
        return Err(CudaUnavailable::OldDevice { name, capability: format!("{major}.{minor}") });
    }
    let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
    Ok(Gpu { device, name, multiprocessors, hopper: (major, minor) == (9, 0) })
}

/// Free and total bytes of GPU number `ordinal`, where a rank of this process has it open: asking takes no context of
/// its own, and a machine without the driver says nothing.
pub(crate) fn memory(ordinal: usize) -> Option<(usize, usize)> {
    let gpu = find(ordinal).ok()?;
    // SAFETY: `device` came from the driver; what is retained is released below.
    let context = unsafe { result::primary_ctx::retain(gpu.device) }.ok()?;
    // SAFETY: the context is retained.
    let bound = unsafe { result::ctx::set_current(context) };
    let response = bound.and_then(|()| result::mem_get_info());
    // SAFETY: retained above; this thread uses no context any more.
    let _ = unsafe { result::ctx::set_current(std::ptr::null_mut()) };
    // SAFETY: retained above.
    let _ = unsafe { result::primary_ctx::release(gpu.device) };
    response.ok()
}
