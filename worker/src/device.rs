//! What a worker's ranks compute on: which device it is, and what the options mean for it.

use std::ops::Range;

use bora_common::model::{ModelConfig, Quantization};
use bora_common::registry::Device;

use crate::backend::KvBudget;
use crate::backend::cpu::{self, CpuOptions};
use crate::backend::cuda::{self, CudaOptions};
use crate::options::{CpuFp8, DeviceChoice, KvDtype, WorkerOptions};
use crate::parallel::DeviceOptions;
use crate::process::WorkerError;
use crate::telemetry::floor::Floors;

/// KV cache of a CPU rank where nothing is said.
const CPU_KV_BYTES: u64 = 1 << 30;
/// Prompt tokens of each calibration chunk on a CPU: enough to see a rate, little enough for a slow one.
const CPU_CALIBRATION_TOKENS: usize = 128;
/// The same on a GPU, where fewer tokens cost the same as these: the weights are read once for all.
const GPU_CALIBRATION_TOKENS: usize = 2_048;

/// The device that the options ask for, found usable.
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
                tracing::info!(%reason, "computing on the CPU");
                Ok(Device::Cpu)
            }
        },
    }
}

/// The GPUs of this process: one for each local rank, from the first that the driver shows.
fn gpus_of(options: &WorkerOptions) -> Range<usize> {
    0..options.local_ranks().len()
}

/// What the backends are told.
pub(crate) fn options_of(device: Device, options: &WorkerOptions) -> Result<DeviceOptions, WorkerError> {
    let dtype = options.kv_cache.dtype;
    let refuse = |reason: &str| Err(WorkerError::Options(format!("worker.kv_cache.dtype: {reason}")));
    if device == Device::Cuda {
        let kv = match dtype {
            KvDtype::Auto | KvDtype::Bf16 => cuda::KvDtype::Bf16,
            KvDtype::Fp8 => cuda::KvDtype::E4m3,
            KvDtype::F32 => return refuse("f32 is for the CPU, a GPU takes bf16 or fp8"),
        };
        return Ok(DeviceOptions::Cuda(CudaOptions { kv, ..CudaOptions::default() }));
    }
    let kv = match dtype {
        KvDtype::Bf16 => cpu::KvDtype::Bf16,
        KvDtype::Auto | KvDtype::F32 => cpu::KvDtype::F32,
        KvDtype::Fp8 => return refuse("fp8 is for GPUs, a CPU takes f32 or bf16"),
    };
    let fp8 = match options.cpu_fp8 {
        CpuFp8::Dequantized => cpu::Fp8Mode::Dequantized,
        CpuFp8::W8a8 => cpu::Fp8Mode::W8A8,
    };
    Ok(DeviceOptions::Cpu(CpuOptions { fp8, kv }))
}

/// How much KV cache each rank makes.
pub(crate) fn kv_budget(device: Device, options: &WorkerOptions) -> KvBudget {
    let cache = &options.kv_cache;
    match (cache.blocks, cache.memory) {
        (Some(blocks), _) => KvBudget::Blocks(blocks as usize),
        (None, Some(memory)) => KvBudget::Bytes(memory.0),
        (None, None) if device == Device::Cuda => KvBudget::DeviceShare(cache.device_share),
        (None, None) => KvBudget::Bytes(CPU_KV_BYTES),
    }
}

/// What the machine allows, where its datasheet and the checkpoint's number format are known.
pub(crate) fn floors(device: Device, options: &WorkerOptions, model: &ModelConfig) -> Option<Floors> {
    if device != Device::Cuda || model.quantization != Quantization::Fp8Static {
        return None;
    }
    let gpu = cuda::survey(0..1, 1).ok()?.into_iter().next()?;
    let kv_bytes = if options.kv_cache.dtype == KvDtype::Fp8 { 1.0 } else { 2.0 };
    Floors::of(model, options.tensor_parallel_size as usize, &gpu, kv_bytes)
}

/// Tokens of the prompts that the group's speed is measured with.
pub(crate) fn calibration_tokens(device: Device) -> usize {
    if device == Device::Cuda { GPU_CALIBRATION_TOKENS } else { CPU_CALIBRATION_TOKENS }
}
