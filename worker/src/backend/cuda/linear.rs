//! Linears on the device: loading them, and the choice between our own kernels (few rows, at the bandwidth
//! of device memory) and cuBLASLt (the rest).

use half::bf16;

use super::driver::{Address, Arguments, Buffer, Device, Shape};
use super::kernels::Kernels;
use super::matmul::{Formats, GemmShape, Matmul, Operands};
use crate::backend::{BackendError, Result};
use crate::weights::{Dtype, LinearShard, Slice, Source};

/// What a linear reads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum InputFormat {
    Bf16,
    /// Divided by this scale.
    E4m3(f32),
}

/// One or several linears over the same input, stacked along the output.
pub struct Linear {
    weight: Option<Buffer>,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    pub(super) input_format: InputFormat,
    /// Of each part: what its GEMM is to be multiplied by.
    pub(super) part_scales: Vec<f32>,
}

/// Numbers on the device, [rows, columns], in one of the step's buffers.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub(super) address: Address,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) format: TensorFormat,
    /// Of each part of the linear that made it: what is still to be multiplied by.
    pub(super) part_scales: Vec<f32>,
}

/// Format of a [`Tensor`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TensorFormat {
    Bf16,
    E4m3,
    F32,
    /// f32, to be added up over so many partial sums, each [rows, columns].
    F32Splits(u32),
}

impl Tensor {
    /// (splits, elements from one split to the next), as kernels take them.
    pub(super) fn splits(&self) -> (u32, u64) {
        match self.format {
            TensorFormat::F32Splits(splits) => (splits, (self.rows * self.columns) as u64),
            _ => (1, 0),
        }
    }

    /// As kernels name it.
    pub(super) fn output_name(&self) -> &'static str {
        match self.format {
            TensorFormat::F32 | TensorFormat::F32Splits(_) => "f32",
            TensorFormat::Bf16 | TensorFormat::E4m3 => "bf16",
        }
    }
}

/// Rows up to which our own kernels are used: beyond, cuBLASLt is faster.
pub(super) const FEW_ROWS: usize = 16;
const UNIT_ROWS: usize = 32;
/// Weights that a block streams between two sums over its warps: enough to hide them, and few enough that the
/// last blocks end together.
const UNIT_BYTES: usize = 256 << 10;
/// Bytes of K that the eight warps of a block take at a time.
const TURN_BYTES: usize = 8 * 128;
/// Most partial sums: their consumer reads them all.
const MAX_SPLITS: usize = 8;

impl Linear {
    pub(super) fn load(device: &Device, kernels: &mut Kernels, parts: &[LinearShard<'_>]) -> Result<Self> {
        let inputs = parts.first().map_or(0, |part| part.weight.columns);
        let outputs = parts.iter().map(|part| part.weight.rows).sum();
        let fp8 = parts.first().is_some_and(|part| part.weight.dtype == Dtype::F8E4M3);
        let mut part_scales = Vec::with_capacity(parts.len());
        let mut input_format = InputFormat::Bf16;
        for part in parts {
            let refuse = |reason: &str| BackendError::Unsupported {
                tensor: part.weight.name.to_owned(),
                reason: reason.to_owned(),
            };
            if (part.weight.dtype == Dtype::F8E4M3) != fp8 {
                return Err(refuse("linears that share an input are all FP8 or none"));
            }
            match (fp8, part.scales) {
                (false, _) => part_scales.push(1.0),
                (true, None) => return Err(refuse("FP8 without scales")),
                (true, Some(scales)) => {
                    let format = InputFormat::E4m3(scales.input);
                    if !part_scales.is_empty() && format != input_format {
                        return Err(refuse("linears that share an input must share its scale"));
                    }
                    input_format = format;
                    part_scales.push(scales.weight * scales.input);
                }
            }
            if !inputs.is_multiple_of(16) || !part.weight.rows.is_multiple_of(if fp8 { 16 } else { 8 }) {
                return Err(refuse("inputs and outputs must be multiples of 16"));
            }
        }
        if outputs == 0 {
            return Ok(Self { weight: None, outputs, inputs, input_format, part_scales });
        }
        let size = if fp8 { 1 } else { 2 };
        let weight = Buffer::new(outputs * inputs * size, parts[0].weight.name)?;
        let mut at = weight.address;
        for part in parts {
            load_slice(device, kernels, at, &part.weight)?;
            at += (part.weight.rows * inputs * size) as u64;
        }
        Ok(Self { weight: Some(weight), outputs, inputs, input_format, part_scales })
    }

    /// Submits `x W^T` into `target`: bf16, or f32 partial sums where the rows are few, or plain f32 where
    /// `logits`. `target` has room for the padded rows of cuBLASLt and for `MAX_SPLITS` of few rows.
    pub(super) fn apply(
        &self,
        tools: (&Device, &mut Kernels, &mut Matmul),
        x: &Tensor,
        target: Address,
        logits: bool,
        overlap: bool,
    ) -> Result<Tensor> {
        let (device, kernels, matmul) = tools;
        let part_scales = self.part_scales.clone();
        let result = |format| Tensor { address: target, rows: x.rows, columns: self.outputs, format, part_scales };
        let Some(weight) = &self.weight else {
            return Ok(result(TensorFormat::F32));
        };
        let fp8 = matches!(self.input_format, InputFormat::E4m3(_));
        let row_bytes = self.inputs * if fp8 { 1 } else { 2 };
        if x.rows <= FEW_ROWS && self.outputs.is_multiple_of(UNIT_ROWS) && row_bytes.is_multiple_of(128) {
            let splits = if logits { 1 } else { self.splits(device, row_bytes) };
            let (columns, stages) = if x.rows <= 8 { (8, 5) } else { (16, 4) };
            let name = format!("linear_{}_{columns}", if fp8 { "e4m3" } else { "bf16" });
            let units = self.outputs / UNIT_ROWS * splits;
            let shape = Shape {
                grid: [(device.multiprocessors as usize).min(units) as u32, 1, 1],
                block: 256,
                shared: 8 * stages * (32 + columns) * 128 + 8 * columns * 33 * 4,
            };
            let arguments = Arguments::default()
                .address(weight.address)
                .address(x.address)
                .address(target)
                .u32(x.rows as u32)
                .u32(self.outputs as u32)
                .u32(row_bytes as u32)
                .u32(splits as u32);
            kernels.launch(device, &name, shape, arguments, overlap)?;
            return Ok(result(TensorFormat::F32Splits(splits as u32)));
        }
        let formats = self.formats(logits);
        let format = if formats == Formats::Bf16ToF32 { TensorFormat::F32 } else { TensorFormat::Bf16 };
        matmul.run(
            device,
            GemmShape { m: x.rows, n: self.outputs, k: self.inputs, formats },
            Operands { x: x.address, w: weight.address, y: target },
        )?;
        Ok(result(format))
    }

    /// How cuBLASLt multiplies it.
    pub(super) fn formats(&self, logits: bool) -> Formats {
        match (self.input_format, logits) {
            (InputFormat::E4m3(_), _) => Formats::E4m3ToBf16,
            (InputFormat::Bf16, false) => Formats::Bf16ToBf16,
            (InputFormat::Bf16, true) => Formats::Bf16ToF32,
        }
    }

    /// Where its weights lie; `None` where this rank has none.
    pub(super) fn weight_address(&self) -> Option<Address> {
        self.weight.as_ref().map(|weight| weight.address)
    }

    /// Parts that K is cut into, so that every multiprocessor gets work to the end.
    fn splits(&self, device: &Device, row_bytes: usize) -> usize {
        let tiles = self.outputs / UNIT_ROWS;
        let by_size = (UNIT_ROWS * row_bytes).div_ceil(UNIT_BYTES);
        let to_fill = (device.multiprocessors as usize).div_ceil(tiles);
        by_size.max(to_fill).clamp(1, MAX_SPLITS).min(row_bytes.div_ceil(TURN_BYTES))
    }

    /// Bytes of the largest GEMM of up to `rows` rows.
    pub(super) fn output_bytes(outputs: usize, rows: usize) -> usize {
        let few = rows.min(FEW_ROWS) * outputs * 4 * MAX_SPLITS;
        few.max(Matmul::padded_rows(rows) * outputs * 2)
    }
}

/// Rows copied to the device at a time where they have to be converted.
const CONVERTED_BYTES: usize = 8 << 20;

/// Writes a slice to the device: e4m3 as it is, everything else as bf16.
pub(super) fn load_slice(device: &Device, kernels: &mut Kernels, target: Address, slice: &Slice<'_>) -> Result<()> {
    let fp8 = slice.dtype == Dtype::F8E4M3;
    let keep = fp8 || slice.dtype == Dtype::Bf16;
    if let (true, Source::Random(fill)) = (keep, &slice.source)
        && slice.columns.is_multiple_of(2)
    {
        // blocks in y are at most 65,535
        for first in (0..slice.rows).step_by(32_768) {
            let arguments = Arguments::default()
                .address(target)
                .u32(slice.columns as u32)
                .u64(fill.key)
                .u64(fill.tensor_columns as u64)
                .u64(fill.first_row as u64)
                .u64(fill.first_column as u64)
                .f32(fill.deviation)
                .u32(first as u32);
            let rows = (slice.rows - first).min(32_768);
            let shape =
                Shape { grid: [slice.columns.div_ceil(512).min(8) as u32, rows as u32, 1], block: 256, shared: 0 };
            kernels.launch(device, if fp8 { "random_e4m3" } else { "random_bf16" }, shape, arguments, false)?;
        }
        return Ok(());
    }
    if let (true, Some(bytes)) = (keep, slice.contiguous()) {
        // SAFETY: `target` is where the whole slice has its room.
        return unsafe { device.upload(target, bytes, slice.name) };
    }
    let row_bytes = slice.columns * if fp8 { 1 } else { 2 };
    let rows_at_once = (CONVERTED_BYTES / row_bytes.max(1)).max(1);
    let mut row = vec![0u8; slice.columns * slice.dtype.size()];
    for first in (0..slice.rows).step_by(rows_at_once) {
        let rows = rows_at_once.min(slice.rows - first);
        let mut bytes = Vec::with_capacity(rows * row_bytes);
        for index in first..first + rows {
            slice.copy_row(index, &mut row);
            match slice.dtype {
                Dtype::F8E4M3 | Dtype::Bf16 => bytes.extend_from_slice(&row),
                Dtype::F16 => {
                    for two in row.as_chunks::<2>().0 {
                        bytes.extend(bf16::from_f32(half::f16::from_le_bytes(*two).to_f32()).to_le_bytes());
                    }
                }
                Dtype::F32 => {
                    for four in row.as_chunks::<4>().0 {
                        bytes.extend(bf16::from_f32(f32::from_le_bytes(*four)).to_le_bytes());
                    }
                }
            }
        }
        // SAFETY: these rows are part of the slice, which has its room at `target`.
        unsafe { device.upload(target + (first * row_bytes) as u64, &bytes, slice.name) }?;
    }
    Ok(())
}
