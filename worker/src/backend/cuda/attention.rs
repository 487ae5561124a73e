//! Attention over the paged cache: which kernel takes which rows.

use bora_common::blocks::BLOCK_TOKENS;

use super::CudaBackend;
use super::decode_kernel::DecodeKernel;
use super::driver::{Arguments, Shape};
use super::linear::{InputFormat, Tensor, TensorFormat};
use super::step::TILE_ROWS;
use super::tiles::{PROMPT_WORDS, ROUND_TOKENS, TILE_WORDS};
use crate::backend::KvDtype;
use crate::backend::Result;

impl CudaBackend {
    /// Submits causal attention of q over the cache of `layer`: tiles of prompts and single rows.
    pub(super) fn submit_attention(&mut self, q: &Tensor, layer: usize, input_format: InputFormat) -> Result<Tensor> {
        let head_dim = self.setup.config.head_dim;
        let (heads, kv_heads) = (self.setup.plan.heads.len() as u32, self.setup.plan.kv_heads.len() as u32);
        let (keys, values) = self.planes(layer)?;
        let step = self.inputs.addresses();
        let shape = self.inputs.shape;
        let buffers = self.buffers()?;
        let (target, partial, log_sum_exp) =
            (buffers.input.address, buffers.partial_attention.address, buffers.log_sum_exp.address);
        let finished = buffers.finished.address;
        let (suffix, scale, format) = match input_format {
            InputFormat::Bf16 => ("bf16", 1.0, TensorFormat::Bf16),
            InputFormat::E4m3(scale) => ("e4m3", scale, TensorFormat::E4m3),
        };
        let kv = self.options.kv;
        let score_scale = std::f32::consts::LOG2_E / (head_dim as f32).sqrt();
        let transposed = buffers.transposed_values.address;
        for pass in self.inputs.passes.clone() {
            let mut read_values = values;
            if pass.rounds > 0 {
                let arguments = Arguments::default()
                    .address(values)
                    .address(step.prompts + (4 * PROMPT_WORDS * pass.first_prompt) as u64)
                    .u32(pass.prompts as u32)
                    .address(step.tables)
                    .address(transposed);
                self.launch("transpose_values", transposing_shape(pass.rounds, kv_heads), arguments)?;
                read_values = transposed;
            }
            let arguments = Arguments::default()
                .address(q.address)
                .address(keys)
                .address(read_values)
                .address(step.tiles + (4 * TILE_WORDS * pass.first_tile) as u64)
                .address(step.positions)
                .address(step.tables)
                .address(step.table_start)
                .address(target)
                .f32(scale)
                .u32(heads)
                .u32(kv_heads)
                .f32(score_scale);
            let (name, block, shared) = prefill_kernel(head_dim, kv, suffix, self.device.hopper);
            let launch = Shape { grid: [kv_heads, pass.tiles as u32, 1], block, shared };
            self.launch(&name, launch, arguments)?;
        }
        if shape.decode_items > 0 {
            let arguments = Arguments::default()
                .address(q.address)
                .address(keys)
                .address(values)
                .address(step.decode_items)
                .address(step.decode_parts)
                .address(step.positions)
                .address(step.row_sequence)
                .address(step.tables)
                .address(step.table_start)
                .address(partial)
                .address(log_sum_exp)
                .address(finished)
                .address(target)
                .f32(scale)
                .u32(heads)
                .u32(kv_heads)
                .f32(score_scale);
            let kernel = DecodeKernel::of(head_dim, kv, shape.tile_rows);
            let parts = kernel.parts(self.device.multiprocessors, kv_heads as usize) as u32;
            let launch = Shape { grid: [parts, kv_heads, 1], block: 128, shared: kernel.shared_bytes() };
            self.launch(&kernel.name(suffix), launch, arguments)?;
        }
        Ok(Tensor { address: target, rows: q.rows, columns: q.columns, format, part_scales: Vec::new() })
    }
}

/// Whether the kernel for chunks of a prompt reads values as `transpose_values` leaves them.
pub(super) fn transposes_values(head_dim: usize, kv: KvDtype, hopper: bool) -> bool {
    head_dim == 128 && hopper && kv == KvDtype::Fp8
}

/// The launch of `transpose_values`.
pub(super) fn transposing_shape(rounds: usize, kv_heads: u32) -> Shape {
    Shape { grid: [rounds as u32, kv_heads, 1], block: 256, shared: 0 }
}

/// The kernel for chunks of a prompt, its threads and its shared memory (as its file says).
pub(super) fn prefill_kernel(head_dim: usize, kv: KvDtype, suffix: &str, hopper: bool) -> (String, u32, u32) {
    if head_dim == 128 && hopper {
        let row = head_dim * kv.size();
        let stages = if kv == KvDtype::Fp8 { 4 } else { 2 };
        let bytes = 1024 + TILE_ROWS * row + 2 * stages * ROUND_TOKENS * row;
        return (format!("hopper_attention_{}_to_{suffix}", kv.name()), 384, bytes as u32);
    }
    let padded = head_dim * 2 + 16;
    let bytes = if kv == KvDtype::Fp8 {
        4 * BLOCK_TOKENS * head_dim + 2 * BLOCK_TOKENS * padded
    } else {
        4 * BLOCK_TOKENS * padded
    };
    (format!("prefill_attention_{head_dim}_{}_to_{suffix}", kv.name()), 256, bytes as u32)
}

/// `cache_place` of device.cuh: where a token's number lies in a KV head's tile of a block, in numbers.
pub(super) fn cache_place(head_dim: usize, kv: KvDtype, token: usize, dimension: usize) -> usize {
    if !(head_dim * kv.size()).is_multiple_of(128) {
        return token * head_dim + dimension;
    }
    let (row, segment) = (128 / kv.size(), 16 / kv.size());
    let (half, number) = (dimension / row, dimension % row / segment);
    half * BLOCK_TOKENS * row + token * row + (number ^ (token % 8)) * segment + dimension % segment
}
