//! FP8 GEMMs for up to 128 rows on our own warpgroup kernels (`skinny_gemm.cu`): weights are streamed once, near the
//! bandwidth of device memory. Gate and up with SwiGLU behind them always, where they are large enough; other GEMMs where they
//! were measured to be faster than cuBLASLt's.

use std::collections::HashSet;

use cudarc::driver::sys;

use super::driver::{Address, Arguments, Buffer, Device, Event, Shape};
use super::kernels::Kernels;
use super::linear::{FEW_ROWS, InputFormat, Linear, Tensor, TensorFormat};
use super::matmul::{Formats, GemmShape, Matmul, Operands};
use crate::backend::{BackendError, Result};

/// Most rows of x.
pub(super) const MAX_ROWS: usize = 128;
/// Rows of W in a tile, bytes of K in a box, and room for the ring of stages (the kernels' own numbers).
const TILE_ROWS: usize = 128;
const BOX: usize = 128;
const RING_BYTES: usize = 222 << 10;
const MAX_STAGES: usize = 12;
/// Rows of x that there are kernels for, and boxes of each operand in a stage of theirs.
const GATED: [(usize, usize); 7] = [(8, 1), (16, 1), (32, 2), (48, 2), (64, 2), (96, 1), (128, 1)];
const PLAIN: [(usize, usize); 5] = [(32, 2), (48, 2), (64, 2), (96, 1), (128, 1)];
/// Smaller weights stay in the L2 cache while they are timed, and have too few tiles anyway.
const MIN_BYTES: usize = 64 << 20;
/// Share of the multiprocessors that must have a tile, on average, for gate and up; few rows are multiplied by no better kernel.
const BUSY: f64 = 0.9;
const FEW_ROWS_BUSY: f64 = 0.8;
/// Timings of a GEMM; the median counts.
const TIMINGS: usize = 5;

/// A tensor map as the driver writes it.
#[repr(C, align(64))]
struct TensorMap([u64; 16]);

/// What the kernels keep between their blocks, and where they are the faster ones.
pub(super) struct Wide {
    /// Partial sums of tiles that two blocks share: [multiprocessors][128][128].
    partial: Buffer,
    /// Blocks that have left theirs: zero between GEMMs.
    finished: Buffer,
    /// (outputs, inputs, rows that the kernel is for).
    faster: HashSet<(usize, usize, usize)>,
    multiprocessors: usize,
    usable: bool,
}

impl Wide {
    pub(super) fn new(device: &Device) -> Result<Self> {
        let multiprocessors = device.multiprocessors as usize;
        let wide = Self {
            partial: Buffer::new(multiprocessors * TILE_ROWS * MAX_ROWS * 4, "the partial sums of GEMMs")?,
            finished: Buffer::new(64 << 10, "the counters of GEMMs")?,
            faster: HashSet::new(),
            multiprocessors,
            usable: device.hopper,
        };
        device.fill(&wide.finished, 0)?;
        Ok(wide)
    }

    /// Whether gate and up of `rows` rows are computed here: where all multiprocessors have whole tiles until the end, or almost.
    pub(super) fn gates(&self, gate_up: &Linear, next: &Linear, rows: usize) -> bool {
        let fp8 = |linear: &Linear| matches!(linear.input_format, InputFormat::E4m3(_));
        let tiles = gate_up.outputs / TILE_ROWS;
        let busy = tiles as f64 / tiles.next_multiple_of(self.multiprocessors).max(1) as f64;
        self.usable
            && fp8(gate_up)
            && fp8(next)
            && (1..=MAX_ROWS).contains(&rows)
            && gate_up.outputs.is_multiple_of(TILE_ROWS)
            && gate_up.inputs.is_multiple_of(2 * BOX)
            && busy >= if rows <= FEW_ROWS { FEW_ROWS_BUSY } else { BUSY }
    }

    /// Whether another GEMM of `rows` rows is.
    pub(super) fn multiplies(&self, linear: &Linear, rows: usize) -> bool {
        kernel_for(&PLAIN, rows)
            .is_some_and(|(columns, _)| self.faster.contains(&(linear.outputs, linear.inputs, columns)))
    }

    /// Whether there is a kernel for a GEMM.
    fn fits(&self, outputs: usize, inputs: usize, boxes: usize) -> bool {
        self.usable
            && outputs.is_multiple_of(TILE_ROWS)
            && inputs.is_multiple_of(boxes * BOX)
            && outputs / 64 * 4 <= self.finished.bytes
    }

    /// Submits `silu(x gate^T) * (x up^T)`, in the form that `next` reads, to `target` [rows, width]. Only where [`Wide::gates`].
    pub(super) fn gate(
        &self,
        tools: (&Device, &mut Kernels),
        x: &Tensor,
        (gate_up, next): (&Linear, &Linear),
        target: Address,
        overlap: bool,
    ) -> Result<Tensor> {
        let (device, kernels) = tools;
        let (Some((columns, boxes)), Some(weight), InputFormat::E4m3(y_scale), [gate_scale, up_scale]) =
            (kernel_for(&GATED, x.rows), gate_up.weight_address(), next.input_format, gate_up.part_scales.as_slice())
        else {
            return Err(BackendError::Device("gate and up are two FP8 parts of one linear".to_owned()));
        };
        let (width, row_bytes) = (gate_up.outputs / 2, gate_up.inputs);
        // groups of eight rows of gate and of up take turns
        let w = tensor_map(
            weight,
            &[row_bytes, 8, 2, width / 8],
            &[row_bytes, width * row_bytes, 8 * row_bytes],
            &[BOX, 8, 2, TILE_ROWS / 16],
        )?;
        let arguments = Arguments::default()
            .block(&w.0)
            .block(&rows_map(x.address, x.rows, row_bytes, columns)?.0)
            .address(target)
            .u32(x.rows as u32)
            .u32(width as u32)
            .u32(row_bytes as u32)
            .f32(*gate_scale)
            .f32(*up_scale)
            .f32(y_scale);
        let grid = (width / (TILE_ROWS / 2)).min(self.multiprocessors);
        kernels.launch(device, &format!("linear_gated_{columns}"), shape(grid, columns, boxes), arguments, overlap)?;
        Ok(Tensor {
            address: target,
            rows: x.rows,
            columns: width,
            format: TensorFormat::E4m3,
            part_scales: Vec::new(),
        })
    }

    /// Submits `x W^T` to `target`, bf16. Only where [`Wide::multiplies`].
    pub(super) fn multiply(
        &self,
        tools: (&Device, &mut Kernels),
        x: &Tensor,
        linear: &Linear,
        target: Address,
        overlap: bool,
    ) -> Result<Tensor> {
        let weight = linear
            .weight_address()
            .ok_or_else(|| BackendError::Device("a product with weights that this rank has not".to_owned()))?;
        self.submit(tools, (x.address, x.rows), (weight, linear.outputs, linear.inputs), target, overlap)?;
        Ok(Tensor {
            address: target,
            rows: x.rows,
            columns: linear.outputs,
            format: TensorFormat::Bf16,
            part_scales: linear.part_scales.clone(),
        })
    }

    pub(super) fn submit(
        &self,
        (device, kernels): (&Device, &mut Kernels),
        (x, rows): (Address, usize),
        (weight, outputs, inputs): (Address, usize, usize),
        target: Address,
        overlap: bool,
    ) -> Result<()> {
        let Some((columns, boxes)) = kernel_for(&PLAIN, rows).filter(|(_, boxes)| self.fits(outputs, inputs, *boxes))
        else {
            return Err(BackendError::Device(format!("no kernel multiplies {rows} x {inputs} by {outputs} rows")));
        };
        let w = tensor_map(weight, &[inputs, outputs], &[inputs], &[BOX, TILE_ROWS])?;
        let arguments = Arguments::default()
            .block(&w.0)
            .block(&rows_map(x, rows, inputs, columns)?.0)
            .address(target)
            .address(self.partial.address)
            .address(self.finished.address)
            .u32(rows as u32)
            .u32(outputs as u32)
            .u32(inputs as u32);
        let steps = outputs / TILE_ROWS * (inputs / (boxes * BOX));
        let grid = steps.min(self.multiprocessors);
        kernels.launch(device, &format!("skinny_gemm_{columns}"), shape(grid, columns, boxes), arguments, overlap)
    }

    /// Times a GEMM's kernels beside cuBLASLt's, up to `most_rows`, and remembers where they are the faster ones.
    pub(super) fn compare(
        &mut self,
        (device, kernels, matmul): (&Device, &mut Kernels, &mut Matmul),
        (outputs, inputs): (usize, usize),
        operands: Operands,
        most_rows: usize,
    ) -> Result<()> {
        if outputs * inputs < MIN_BYTES {
            return Ok(());
        }
        for (rows, boxes) in PLAIN {
            if !self.fits(outputs, inputs, boxes) || rows > Matmul::padded_rows(most_rows) {
                continue;
            }
            let Operands { x, w, y } = operands;
            let gemm = GemmShape { m: rows, n: outputs, k: inputs, formats: Formats::E4m3ToBf16 };
            let library = median_milliseconds(device, || matmul.run(device, gemm, operands))?;
            let own = median_milliseconds(device, || {
                self.submit((device, kernels), (x, rows), (w, outputs, inputs), y, false)
            })?;
            tracing::debug!(outputs, inputs, rows, own, library, "compared a GEMM");
            if own < library {
                self.faster.insert((outputs, inputs, rows));
            }
        }
        Ok(())
    }
}

/// The smallest kernel of a list that takes so many rows.
fn kernel_for(kernels: &[(usize, usize)], rows: usize) -> Option<(usize, usize)> {
    // fewer rows than half of the smallest: other kernels
    let least = kernels.first().map_or(0, |(columns, _)| if *columns > 8 { columns / 2 } else { 0 });
    kernels.iter().copied().find(|(columns, _)| rows > least && rows <= *columns)
}

fn shape(grid: usize, columns: usize, boxes: usize) -> Shape {
    let stage = boxes * (TILE_ROWS + columns) * BOX;
    let stages = (RING_BYTES / stage).min(MAX_STAGES);
    Shape { grid: [grid as u32, 1, 1], block: 288, shared: (1024 + stages * stage) as u32 }
}

/// x [rows][row bytes] in boxes of `columns` rows; those that do not exist are zero.
fn rows_map(address: Address, rows: usize, row_bytes: usize, columns: usize) -> Result<TensorMap> {
    tensor_map(address, &[row_bytes, rows], &[row_bytes], &[BOX, columns])
}

/// Sizes, distances in bytes (of all dimensions but the innermost) and boxes, innermost first.
fn tensor_map(address: Address, sizes: &[usize], strides: &[usize], boxes: &[usize]) -> Result<TensorMap> {
    let sizes: Vec<u64> = sizes.iter().map(|size| *size as u64).collect();
    let strides: Vec<u64> = strides.iter().map(|stride| *stride as u64).collect();
    let boxes: Vec<u32> = boxes.iter().map(|size| *size as u32).collect();
    let steps = vec![1u32; boxes.len()];
    let mut map = TensorMap([0; 16]);
    // SAFETY: the map has the size and alignment of the driver's; the arrays are as long as the dimensions.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            (&raw mut map).cast(),
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
            sizes.len() as u32,
            address as *mut std::ffi::c_void,
            sizes.as_ptr(),
            strides.as_ptr(),
            boxes.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .map_err(super::driver::during("describing a matrix to the copy engine"))?;
    Ok(map)
}

fn median_milliseconds(device: &Device, mut submit: impl FnMut() -> Result<()>) -> Result<f32> {
    let (start, end) = (Event::new(true)?, Event::new(true)?);
    // the first one pays for loading the kernel
    submit()?;
    let mut times = Vec::with_capacity(TIMINGS);
    for _ in 0..TIMINGS {
        start.record(device)?;
        submit()?;
        end.record(device)?;
        end.wait()?;
        times.push(end.since(&start)?);
    }
    times.sort_by(f32::total_cmp);
    Ok(times[TIMINGS / 2])
}
