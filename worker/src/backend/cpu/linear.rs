//! Linears on the CPU: float32 weights, or FP8 codes as float32 with both static scales applied outside.

use std::ops::Range;

use candle_core::{Device, Tensor};

use super::Activations;
use crate::backend::{BackendError, Fp8Mode, Result};
use crate::weights::{Dtype, Fp8Scales, LinearShard, e4m3};

/// One or several linears over the same input, stacked along the output.
pub struct Linear {
    /// [outputs, inputs]; absent where this rank has no outputs.
    weight: Option<Tensor>,
    outputs: usize,
    parts: Vec<Part>,
}

/// Rows of the stack that are multiplied at once.
struct Part {
    rows: Range<usize>,
    /// Present where the input is rounded to FP8 first.
    scales: Option<Fp8Scales>,
}

impl Linear {
    pub(super) fn load(shards: &[LinearShard<'_>], mode: Fp8Mode) -> Result<Self> {
        let inputs = shards.first().map_or(0, |shard| shard.weight.columns);
        let mut elements = Vec::new();
        let mut parts: Vec<Part> = Vec::new();
        let mut outputs = 0;
        for shard in shards {
            let rows = outputs..outputs + shard.weight.rows;
            outputs = rows.end;
            let factor = match (shard.weight.dtype, shard.scales) {
                (Dtype::F8E4M3, None) => {
                    let (tensor, reason) = (shard.weight.name.to_owned(), "FP8 without scales".to_owned());
                    return Err(BackendError::Unsupported { tensor, reason });
                }
                (Dtype::F8E4M3, Some(scales)) if mode == Fp8Mode::Dequantized => scales.weight,
                _ => 1.0,
            };
            elements.extend(shard.weight.to_f32(factor));
            let scales = shard.scales.filter(|_| mode == Fp8Mode::W8a8 && shard.weight.dtype == Dtype::F8E4M3);
            match parts.last_mut() {
                // neighbours in plain float32 are one GEMM
                Some(last) if last.scales.is_none() && scales.is_none() => last.rows.end = rows.end,
                _ => parts.push(Part { rows, scales }),
            }
        }
        let weight = match outputs {
            0 => None,
            _ => Some(Tensor::from_vec(elements, (outputs, inputs), &Device::Cpu).map_err(device)?),
        };
        Ok(Self { weight, outputs, parts })
    }

    /// Whether its input is rounded to FP8.
    pub(super) fn rounds_its_input(&self) -> bool {
        self.parts.iter().any(|part| part.scales.is_some())
    }

    /// [T, inputs] to [T, outputs].
    pub(super) fn apply(&self, input: &Activations) -> Result<Activations> {
        let rows = input.rows();
        let Some(weight) = self.weight.as_ref().filter(|_| rows > 0) else {
            return Ok(Activations { elements: Vec::new(), columns: self.outputs });
        };
        let mut elements = vec![0.0; rows * self.outputs];
        for part in &self.parts {
            let (output, factor) = match part.scales {
                None => (multiply(input.elements.clone(), rows, weight, part)?, 1.0),
                Some(scales) => {
                    let rounded = input.elements.iter().map(|x| e4m3::round(x / scales.input)).collect();
                    (multiply(rounded, rows, weight, part)?, scales.input * scales.weight)
                }
            };
            if part.scales.is_none() && part.rows.len() == self.outputs {
                return Ok(Activations { elements: output, columns: self.outputs });
            }
            let width = part.rows.len();
            for (from, to) in output.chunks_exact(width).zip(elements.chunks_exact_mut(self.outputs)) {
                for (to, from) in to[part.rows.clone()].iter_mut().zip(from) {
                    *to = from * factor;
                }
            }
        }
        Ok(Activations { elements, columns: self.outputs })
    }
}

fn multiply(input: Vec<f32>, rows: usize, weight: &Tensor, part: &Part) -> Result<Vec<f32>> {
    let output = || -> candle_core::Result<Vec<f32>> {
        let inputs = weight.dim(1)?;
        let input = Tensor::from_vec(input, (rows, inputs), &Device::Cpu)?;
        let weight = weight.narrow(0, part.rows.start, part.rows.len())?;
        input.matmul(&weight.t()?)?.flatten_all()?.to_vec1()
    };
    output().map_err(device)
}

pub(super) fn device(error: candle_core::Error) -> BackendError {
    BackendError::Device(error.to_string())
}
