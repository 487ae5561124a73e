//! The device of a worker's ranks: chooses it and derives its options.

use std::ops::Range;

use bora_common::model::{ModelConfig, Quantization};
use bora_common::registry::Device;

use crate::backend::cpu::CpuOptions;
use crate::backend::cuda::{self, AllReduceKind, CudaOptions};
use crate::backend::{KvBudget, KvDtype};
use crate::options::{DeviceChoice, WorkerOptions};
use crate::parallel::DeviceOptions;
use crate::process::WorkerError;
use crate::telemetry::roofline::Rooflines;

/// Default KV cache of a CPU rank, bytes.
const CPU_KV_BYTES: u64 = 1 << 30;
/// Prompt tokens of each calibration chunk on a CPU: enough for a stable rate, few enough for a slow CPU.
const CPU_CALIBRATION_TOKENS: usize = 128;
/// Prompt tokens of each calibration chunk on a GPU. Fewer tokens take as long, because the weights are read once for
/// all of them.
const GPU_CALIBRATION_TOKENS: usize = 2_048;

/// Chooses the requested device and checks that it is usable.
pub(crate) fn choose(options: &WorkerOptions) -> Result<Device, WorkerError> {
    let gpus = gpus_of(options);
    match options.device {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Fake => Ok(Device::Fake),
        DeviceChoice::Cuda => {
            let names = cuda::survey(gpus, options.tensor_parallel_size as usize)
                .map_err(|reason| WorkerError::Device(format!("cuda: {reason}")))?;
            tracing::info!(gpus = ?names, "found GPUs");
            Ok(Device::Cuda)
        }
        DeviceChoice::Auto => match cuda::survey(gpus, options.tensor_parallel_size as usize) {
            Ok(names) => {
                tracing::info!(gpus = ?names, "found GPUs");
                Ok(Device::Cuda)
            }
            Err(reason) => {
                tracing::info!(%reason, "found no usable GPU, using the CPU");
                Ok(Device::Cpu)
            }
        },
    }
}

/// The GPUs of this process: one per local rank, counted from the first visible GPU.
fn gpus_of(options: &WorkerOptions) -> Range<usize> {
    0..options.local_ranks().len()
}

/// Options of the backends.
pub(crate) fn options_of(device: Device, options: &WorkerOptions) -> Result<DeviceOptions, WorkerError> {
    let kv = options.kv_cache.dtype;
    if device == Device::Cuda {
        if kv == KvDtype::F32 {
            let reason = "worker.kv_cache.dtype: f32 is only allowed on a CPU; a GPU supports bf16 and fp8";
            return Err(WorkerError::Options(reason.to_owned()));
        }
        let all_reduce = if options.disable_custom_all_reduce { AllReduceKind::Nccl } else { AllReduceKind::default() };
        return Ok(DeviceOptions::Cuda(CudaOptions { kv, all_reduce, ..CudaOptions::default() }));
    }
    Ok(DeviceOptions::Cpu(CpuOptions { fp8: options.cpu_fp8, kv, ..CpuOptions::default() }))
}

/// Size of each rank's KV cache.
pub(crate) fn kv_budget(device: Device, options: &WorkerOptions) -> KvBudget {
    let cache = &options.kv_cache;
    match (cache.blocks, cache.memory) {
        (Some(blocks), _) => KvBudget::Blocks(blocks as usize),
        (None, Some(memory)) => KvBudget::Bytes(memory.0),
        (None, None) if device == Device::Cuda => KvBudget::DeviceShare(cache.device_share),
        (None, None) => KvBudget::Bytes(CPU_KV_BYTES),
    }
}

/// Rooflines of the device, if its datasheet and the checkpoint's number format are known.
pub(crate) fn rooflines(device: Device, options: &WorkerOptions, model: &ModelConfig) -> Option<Rooflines> {
    if device != Device::Cuda || model.quantization != Quantization::Fp8Static {
        return None;
    }
    let gpu = cuda::survey(0..1, 1).ok()?.into_iter().next()?;
    let kv_bytes = if options.kv_cache.dtype == KvDtype::Fp8 { 1.0 } else { 2.0 };
    Rooflines::of(model, options.tensor_parallel_size as usize, &gpu, kv_bytes)
}

/// Prompt tokens of each calibration chunk.
pub(crate) fn calibration_tokens(device: Device) -> usize {
    if device == Device::Cuda { GPU_CALIBRATION_TOKENS } else { CPU_CALIBRATION_TOKENS }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uses_nccl_alone_on_request() {
        let all_reduce = |disable_custom_all_reduce| {
            let options = WorkerOptions { disable_custom_all_reduce, ..WorkerOptions::default() };
            match options_of(Device::Cuda, &options) {
                Ok(DeviceOptions::Cuda(cuda)) => cuda.all_reduce,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!((all_reduce(false), all_reduce(true)), (AllReduceKind::Measured, AllReduceKind::Nccl));
    }
}
