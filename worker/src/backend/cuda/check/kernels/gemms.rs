//! GEMMs, and the weights that are sampled at random.

use super::super::super::linear::{InputFormat, Linear, Tensor, TensorFormat, load_slice};
use super::super::super::matmul::{Formats, GemmShape, Matmul, Operands};
use super::super::super::skinny_gemm::Wide;
use super::super::reference::{bf16_bytes, from_bf16, from_f32};
use super::{Bench, compare_activation, distance, from_e4m3};
use crate::backend::{BackendError, Result};
use crate::weights::{Dtype, Fp8Scales, LinearShard, RandomFill, RowOrder, Slice, Source, e4m3};

/// Inputs of a GEMM: values that the format holds exactly, and their bytes.
fn operand(bench: &mut Bench, count: usize, fp8: bool) -> (Vec<f32>, Vec<u8>) {
    if !fp8 {
        let elements = bench.random.bf16s(count, 1.0);
        let bytes = bf16_bytes(&elements);
        return (elements, bytes);
    }
    let bytes: Vec<u8> = bench.random.normals(count, 60.0).into_iter().map(e4m3::encode).collect();
    (from_e4m3(&bytes), bytes)
}

fn multiply(x: &[f32], w: &[f32], m: usize, n: usize, k: usize) -> Vec<f64> {
    let mut y = vec![0.0; m * n];
    for row in 0..m {
        for column in 0..n {
            y[row * n + column] =
                x[row * k..][..k].iter().zip(&w[column * k..][..k]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        }
    }
    y
}

pub(super) fn linear(bench: &mut Bench) -> Result<(f64, f64)> {
    let mut worst = 0f64;
    for fp8 in [true, false] {
        for (m, n, k) in [
            (1, 96, 512),
            (3, 32, 128),
            (8, 160, 5120),
            (9, 64, 1152),
            (16, 4096, 256),
            (15, 96, 640),
            (12, 64, 4096),
            (1, 6144, 1280),
            (5, 8192, 128),
        ] {
            let (x, x_bytes) = operand(bench, m * k, fp8);
            let (w, w_bytes) = operand(bench, n * k, fp8);
            let expected = multiply(&x, &w, m, n, k);
            let slice = Slice {
                name: "w",
                dtype: if fp8 { Dtype::F8E4M3 } else { Dtype::Bf16 },
                rows: n,
                columns: k,
                source: Source::Stored { bytes: &w_bytes, row_stride: w_bytes.len() / n, order: RowOrder::Plain },
            };
            let scales = fp8.then_some(Fp8Scales { weight: 0.5, input: 2.0 });
            let layer = Linear::load(&bench.device, &mut bench.kernels, &[LinearShard { weight: slice, scales }])?;
            let input = bench.upload(&x_bytes)?;
            let format =
                if matches!(layer.input_format, InputFormat::Bf16) { TensorFormat::Bf16 } else { TensorFormat::E4m3 };
            let x_tensor = Tensor { address: input.address, rows: m, columns: k, format, part_scales: Vec::new() };
            for logits in [false, true] {
                let out = bench.poisoned(Linear::output_bytes(n, m))?;
                let y = layer.apply(
                    (&bench.device, &mut bench.kernels, &mut bench.matmul),
                    &x_tensor,
                    out.address,
                    logits,
                    true,
                )?;
                let TensorFormat::F32Splits(splits) = y.format else {
                    return Err(BackendError::Device(format!("{m} x {n} x {k} did not take the kernel for few rows")));
                };
                let parts = from_f32(&bench.read(&out, splits as usize * m * n * 4)?);
                let all_reduce: Vec<f32> = (0..m * n)
                    .map(|index| (0..splits as usize).map(|split| parts[split * m * n + index]).sum())
                    .collect();
                worst = worst.max(distance(&all_reduce, &expected));
            }
        }
    }
    // f32 sums of exact GEMMs; the tensor cores keep at least 13 bits behind the leading one of a sum
    Ok((worst, 1e-3))
}

/// An FP8 linear of parts that share an input, and its weights.
fn load_fp8(bench: &mut Bench, parts: &[Fp8Scales], rows: usize, k: usize) -> Result<(Linear, Vec<f32>)> {
    let (elements, bytes) = operand(bench, parts.len() * rows * k, true);
    let shards: Vec<LinearShard<'_>> = parts
        .iter()
        .zip(bytes.chunks_exact(rows * k))
        .map(|(scales, bytes)| LinearShard {
            weight: Slice {
                name: "w",
                dtype: Dtype::F8E4M3,
                rows,
                columns: k,
                source: Source::Stored { bytes, row_stride: k, order: RowOrder::Plain },
            },
            scales: Some(*scales),
        })
        .collect();
    Ok((Linear::load(&bench.device, &mut bench.kernels, &shards)?, elements))
}

pub(super) fn wide(bench: &mut Bench) -> Result<(f64, f64)> {
    let wide = Wide::new(&bench.device)?;
    let mut worst = 0f64;
    for (m, n, k) in [
        (17, 128, 256),
        (32, 384, 5120),
        (40, 256, 768),
        (64, 512, 512),
        (70, 128, 1152),
        (100, 256, 384),
        (128, 384, 640),
    ] {
        let (layer, w) = load_fp8(bench, &[Fp8Scales { weight: 0.5, input: 2.0 }], n, k)?;
        let (x, x_bytes) = operand(bench, m * k, true);
        let input = bench.upload(&x_bytes)?;
        let tensor =
            Tensor { address: input.address, rows: m, columns: k, format: TensorFormat::E4m3, part_scales: Vec::new() };
        let expected = multiply(&x, &w, m, n, k);
        let out = bench.poisoned(m * n * 2)?;
        // twice: the counters are left as they were
        for _ in 0..2 {
            wide.multiply((&bench.device, &mut bench.kernels), &tensor, &layer, out.address, true)?;
            worst = worst.max(distance(&from_bf16(&bench.read(&out, m * n * 2)?), &expected) / 5e-3);
        }
    }
    let next = load_fp8(bench, &[Fp8Scales { weight: 1.0, input: 0.037 }], 16, 64)?.0;
    for (m, width, k) in [
        (1, 64, 128),
        (8, 128, 384),
        (9, 192, 256),
        (20, 64, 1280),
        (37, 128, 512),
        (64, 320, 256),
        (90, 64, 640),
        (128, 128, 128),
    ] {
        let scales = [Fp8Scales { weight: 1e-5, input: 2.0 }, Fp8Scales { weight: 3e-5, input: 2.0 }];
        let (layer, w) = load_fp8(bench, &scales, width, k)?;
        let (x, x_bytes) = operand(bench, m * k, true);
        let input = bench.upload(&x_bytes)?;
        let tensor =
            Tensor { address: input.address, rows: m, columns: k, format: TensorFormat::E4m3, part_scales: Vec::new() };
        let out = bench.poisoned(m * width)?;
        wide.gate((&bench.device, &mut bench.kernels), &tensor, (&layer, &next), out.address, true)?;
        let gemms = multiply(&x, &w, m, 2 * width, k);
        let expected: Vec<f64> = gemms
            .chunks_exact(2 * width)
            .flat_map(|row| {
                let (gate, up) = row.split_at(width);
                gate.iter().zip(up).map(|(gate, up)| {
                    let gate = gate * f64::from(layer.part_scales[0]);
                    gate / (1.0 + (-gate).exp()) * up * f64::from(layer.part_scales[1])
                })
            })
            .collect();
        worst = worst.max(compare_activation(&bench.read(&out, m * width)?, &expected, "e4m3", 0.037));
    }
    Ok((worst, 1.0))
}

pub(super) fn gemms(bench: &mut Bench) -> Result<(f64, f64)> {
    let mut worst = 0f64;
    for (formats, fp8) in [(Formats::E4m3ToBf16, true), (Formats::Bf16ToBf16, false), (Formats::Bf16ToF32, false)] {
        for (m, n, k) in [(1, 64, 64), (37, 192, 64), (64, 96, 192), (70, 256, 512), (600, 128, 256)] {
            let padded = Matmul::padded_rows(m);
            let (x, mut x_bytes) = operand(bench, m * k, fp8);
            // the rows that fill up hold NaN: they may not reach others
            x_bytes.resize(x_bytes.len() / m * padded, 0xff);
            let (w, w_bytes) = operand(bench, n * k, fp8);
            let (x_buffer, w_buffer) = (bench.upload(&x_bytes)?, bench.upload(&w_bytes)?);
            let size = if formats == Formats::Bf16ToF32 { 4 } else { 2 };
            let out = bench.poisoned(padded * n * size)?;
            bench.matmul.run(
                &bench.device,
                GemmShape { m, n, k, formats },
                Operands { x: x_buffer.address, w: w_buffer.address, y: out.address },
            )?;
            let bytes = bench.read(&out, m * n * size)?;
            let found = if size == 4 { from_f32(&bytes) } else { from_bf16(&bytes) };
            worst = worst.max(distance(&found, &multiply(&x, &w, m, n, k)));
        }
    }
    Ok((worst, 5e-3))
}

pub(super) fn random_weights(bench: &mut Bench) -> Result<(f64, f64)> {
    let mut wrong = 0;
    for dtype in [Dtype::F8E4M3, Dtype::Bf16] {
        let fill = RandomFill {
            key: 0x1234_5678_9abc_def0,
            tensor_columns: 5120,
            first_row: 70_000,
            first_column: 1280,
            deviation: 80.0,
        };
        let slice = Slice { name: "w", dtype, rows: 33, columns: 1030, source: Source::Random(fill) };
        let out = bench.poisoned(slice.byte_len())?;
        load_slice(&bench.device, &mut bench.kernels, out.address, &slice)?;
        let bytes = bench.read(&out, slice.byte_len())?;
        let mut row = vec![0; slice.columns * dtype.size()];
        for index in 0..slice.rows {
            slice.copy_row(index, &mut row);
            wrong += bytes[index * row.len()..].iter().zip(&row).filter(|(a, b)| a != b).count();
        }
    }
    Ok((wrong as f64, 0.0))
}
