//! Driver, GPUs, libraries, peer access, and the speed of memory beside the datasheet's.

use bora_worker::DeviceChoice;
use bora_worker::backend::cuda::inspect::{self, GpuReport};
use bora_worker::telemetry::roofline;

use super::Check;
use crate::config::Config;

/// A copy reaches about 90 % of the datasheet's rate on a healthy GPU; below this something is wrong with it.
const MIN_SHARE: f64 = 0.75;

pub(super) fn check(config: Option<&Config>, measure: bool) -> Vec<Check> {
    let wanted = config.map(|config| config.worker.device);
    let must_have = wanted == Some(DeviceChoice::Cuda);
    let driver = match inspect::driver() {
        Ok((version, from)) => Check::good("driver", format!("CUDA {version} ({from})")),
        Err(reason) if must_have => {
            let fix = "install NVIDIA's driver, 580 or later, and give the container its GPUs; or worker.device: cpu";
            return vec![Check::failure("driver", format!("no NVIDIA driver: {reason}"), fix)];
        }
        Err(reason) => {
            return vec![Check::skipped("driver", format!("no GPU here ({reason}): workers compute on the CPU"))];
        }
    };
    let mut checks = vec![driver];
    let gpus = match inspect::gpus(measure) {
        Ok(gpus) => gpus,
        Err(reason) => {
            checks.push(Check::failure("GPUs", reason, "look at `nvidia-smi` and the kernel's log"));
            return checks;
        }
    };
    let ranks = config.map_or(1, |config| config.worker.local_ranks().len());
    checks.push(count(&gpus, ranks, must_have));
    checks.extend(gpus.iter().map(one));
    checks.push(library(
        "cuBLASLt",
        inspect::cublaslt(),
        "install CUDA 13's libraries or the wheel nvidia-cublas",
        true,
    ));
    // one rank has nobody to talk to
    let tensor_parallel = config.map_or(1, |config| config.worker.tensor_parallel_size);
    checks.push(library(
        "NCCL",
        inspect::nccl(),
        "install libnccl.so.2 (the wheel nvidia-nccl-cu13 has it)",
        tensor_parallel > 1,
    ));
    if gpus.len() > 1 {
        checks.push(peers(&gpus, ranks));
    }
    checks
}

fn count(gpus: &[GpuReport], ranks: usize, must_have: bool) -> Check {
    let usable = gpus.iter().filter(|gpu| gpu.unusable.is_none()).count();
    let found = format!("{usable} of {} can be used", gpus.len());
    if usable < ranks && must_have {
        let fix = "fewer ranks here (worker.ranks), or a node with more GPUs";
        return Check::failure("GPUs", format!("{found}, {ranks} are needed"), fix);
    }
    Check::good("GPUs", found)
}

fn one(gpu: &GpuReport) -> Check {
    const NAME: &str = "GPU";
    let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
    let mut found = format!("{}: {}", gpu.ordinal, gpu.name);
    if let Some(reason) = &gpu.unusable {
        return Check::warning(
            NAME,
            format!("{found}: {reason}"),
            "it is left alone; CUDA_VISIBLE_DEVICES names the others",
        );
    }
    if let Some((free, total)) = gpu.memory {
        found += &format!(", {:.1} of {:.1} GiB free", gib(free), gib(total));
        if free * 10 < total * 9 {
            return Check::warning(NAME, found, "another process uses it: `nvidia-smi` says which");
        }
    }
    let Some(measured) = gpu.bandwidth else { return Check::good(NAME, found) };
    found += &format!(", a copy runs at {:.2} TB/s", measured / 1e12);
    let Some(datasheet) = roofline::memory_rate(&gpu.name) else { return Check::good(NAME, found) };
    let share = measured / datasheet;
    found += &format!(" ({:.0} % of the datasheet's {:.2})", share * 100.0, datasheet / 1e12);
    if share < MIN_SHARE {
        let fix = "throttled, shared or broken: `nvidia-smi -q -d PERFORMANCE,ECC` says more; do not serve with it";
        return Check::warning(NAME, found, fix);
    }
    Check::good(NAME, found)
}

fn library(name: &'static str, found: Result<String, String>, fix: &str, needed: bool) -> Check {
    match found {
        Ok(from) => Check::good(name, from),
        Err(reason) if needed => Check::failure(name, reason, fix),
        Err(reason) => Check::skipped(name, format!("not found and not needed for one rank ({reason})")),
    }
}

fn peers(gpus: &[GpuReport], ranks: usize) -> Check {
    const NAME: &str = "peer access";
    let apart: Vec<String> = gpus
        .iter()
        .flat_map(|gpu| gpus.iter().map(move |other| (gpu, other)))
        .filter(|(gpu, other)| gpu.ordinal != other.ordinal && !gpu.reaches.contains(&other.ordinal))
        .map(|(gpu, other)| format!("{} to {}", gpu.ordinal, other.ordinal))
        .collect();
    if apart.is_empty() {
        return Check::good(NAME, "every GPU reaches the memory of every other");
    }
    let found = format!("not reached: {}", apart.join(", "));
    if ranks < 2 {
        return Check::skipped(NAME, found);
    }
    let fix =
        "NVLink or one PCIe switch, the IOMMU off for them; ranks that can't reach each other go through host memory";
    Check::warning(NAME, found, fix)
}
