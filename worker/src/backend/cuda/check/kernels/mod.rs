//! Every kernel against a plain reference in f64, on fresh random inputs over ragged shapes. Outputs are
//! poisoned with NaN before each launch, and so is what a kernel must not read.

mod attention;
mod gemms;
mod rows;
mod sample;

use serde_json::json;

use super::super::driver::{Arguments, Buffer, Device, Shape};
use super::super::kernels::Kernels;
use super::super::matmul::Matmul;
use super::Outcome;
use super::reference::{Random, distance, from_bf16};
use crate::backend::Result;
use crate::weights::e4m3;

/// bf16 results of sums in f32 end within half a unit of their last place.
const BF16_DISTANCE: f64 = 3e-3;
/// e4m3 has three bits of mantissa; a value on the edge may fall to either side.
const E4M3_DISTANCE: f64 = 3e-2;

type Check = fn(&mut Bench) -> Result<(f64, f64)>;

/// A device with everything loaded.
pub(super) struct Bench {
    pub(super) kernels: Kernels,
    pub(super) matmul: Matmul,
    pub(super) device: Device,
    pub(super) random: Random,
}

impl Bench {
    pub(super) fn open() -> Result<Self> {
        let device = Device::open(0)?;
        Ok(Self { kernels: Kernels::load()?, matmul: Matmul::new()?, device, random: Random::new(17) })
    }

    pub(super) fn upload(&self, bytes: &[u8]) -> Result<Buffer> {
        let buffer = Buffer::new(bytes.len(), "a test")?;
        // SAFETY: the buffer was made as long as `bytes`.
        unsafe { self.device.upload(buffer.address, bytes, "a test") }?;
        Ok(buffer)
    }

    pub(super) fn poisoned(&self, bytes: usize) -> Result<Buffer> {
        let buffer = Buffer::new(bytes, "a test")?;
        self.device.fill(&buffer, 0xff)?;
        Ok(buffer)
    }

    pub(super) fn read(&self, buffer: &Buffer, bytes: usize) -> Result<Vec<u8>> {
        let mut found = vec![0; bytes];
        assert!(bytes <= buffer.bytes);
        // SAFETY: asserted.
        unsafe { self.device.download(&mut found, buffer.address, "a test") }?;
        Ok(found)
    }

    pub(super) fn launch(
        &mut self,
        name: &str,
        grid: [u32; 3],
        block: u32,
        shared: u32,
        arguments: Arguments,
    ) -> Result<()> {
        self.kernels.launch(&self.device, name, Shape { grid, block, shared }, arguments, false)
    }
}

pub(super) fn run(only: &str, report: &mut dyn FnMut(Outcome)) {
    let checks: [(&str, Check); 13] = [
        ("embed", rows::embed),
        ("prepare rows", rows::prepare_rows),
        ("norm", rows::norm),
        ("rope", rows::rope),
        ("gate", rows::gate),
        ("linear, few rows", gemms::linear),
        ("skinny GEMM", gemms::wide),
        ("matrix GEMM", gemms::gemms),
        ("random weights", gemms::random_weights),
        ("decode attention", attention::decode_attention),
        ("prefill attention", attention::prefill_attention),
        ("long attention", attention::long_attention),
        ("sample", sample::sample),
    ];
    let mut bench = match Bench::open() {
        Ok(bench) => bench,
        Err(error) => return report(Outcome::failure("open the GPU", error)),
    };
    for (name, check) in checks {
        if !name.contains(only) {
            continue;
        }
        let started = std::time::Instant::now();
        report(match check(&mut bench) {
            Ok((found, allowed)) => {
                let details =
                    json!({ "distance": found, "allowed": allowed, "seconds": started.elapsed().as_secs_f64() });
                Outcome::check(name, found <= allowed, details)
            }
            Err(error) => Outcome::failure(name, error),
        });
    }
}

fn from_e4m3(bytes: &[u8]) -> Vec<f32> {
    bytes.iter().map(|code| e4m3::decode(*code)).collect()
}

/// Share of the distance allowed for the format.
fn compare_activation(bytes: &[u8], expected: &[f64], suffix: &str, scale: f32) -> f64 {
    if suffix == "bf16" {
        return distance(&from_bf16(bytes), expected) / BF16_DISTANCE;
    }
    let rounded: Vec<f64> =
        expected.iter().map(|number| f64::from(e4m3::round((*number / f64::from(scale)) as f32))).collect();
    distance(&from_e4m3(bytes), &rounded) / E4M3_DISTANCE
}
