//! Every kernel against a plain reference in f64, on fresh random inputs over ragged shapes. Outputs are
//! poisoned with NaN before each launch, and so is what a kernel must not read.

use bora_common::model::{QueryScale, RopeConfig, Yarn};
use serde_json::json;

use super::super::KvDtype;
use super::super::attention::{cache_place, decode_shared_bytes, prefill_kernel};
use super::super::driver::{Arguments, Buffer, Device, Shape};
use super::super::kernels::Kernels;
use super::super::linear::{InputFormat, Linear, Tensor, TensorFormat, load_slice};
use super::super::matmul::{Formats, Matmul, Operands, ProductShape};
use super::super::sampler::Sampler;
use super::Outcome;
use super::reference::{Random, bf16_bytes, distance, f32_bytes, from_bf16, from_f32, round, u32_bytes};
use crate::backend::{BackendError, Limits, Result, SampleRequest};
use crate::engine::step::{Admission, SequenceFault};
use crate::grammar::Mask;
use crate::sample::{SamplingParams, SlotState, score};
use crate::weights::{Dtype, Fp8Scales, LinearShard, RandomFill, RowOrder, Slice, Source, e4m3};

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
        self.device.upload(buffer.address, bytes, "a test")?;
        Ok(buffer)
    }

    pub(super) fn poisoned(&self, bytes: usize) -> Result<Buffer> {
        let buffer = Buffer::new(bytes, "a test")?;
        self.device.fill(&buffer, 0xff)?;
        Ok(buffer)
    }

    pub(super) fn read(&self, buffer: &Buffer, bytes: usize) -> Result<Vec<u8>> {
        let mut found = vec![0; bytes];
        self.device.download(&mut found, buffer.address, "a test")?;
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
    let checks: [(&str, Check); 11] = [
        ("embed", embed),
        ("prepare rows", prepare_rows),
        ("norm", norm),
        ("rope", rope),
        ("gate", gate),
        ("linear, few rows", linear),
        ("matrix products", products),
        ("random weights", random_weights),
        ("decode attention", decode_attention),
        ("prefill attention", prefill_attention),
        ("sample", sample),
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

fn embed(bench: &mut Bench) -> Result<(f64, f64)> {
    let (hidden, rows, count, first) = (576, 9, 50, 100);
    let table = bench.random.bf16s(count * hidden, 1.0);
    let ids: Vec<u32> = vec![100, 149, 99, 150, u32::MAX, 120, 0, 131_071, 101];
    let slots: Vec<u32> = vec![0, 0, 0, 0, 3, 0, 0, 0, 0];
    let drawn: Vec<u32> = vec![1, 2, 3, 117];
    let (table_buffer, id_buffer, slot_buffer, drawn_buffer) = (
        bench.upload(&bf16_bytes(&table))?,
        bench.upload(&u32_bytes(&ids))?,
        bench.upload(&u32_bytes(&slots))?,
        bench.upload(&u32_bytes(&drawn))?,
    );
    let out = bench.poisoned(rows * hidden * 4)?;
    let arguments = Arguments::default()
        .address(out.address)
        .address(table_buffer.address)
        .address(id_buffer.address)
        .address(slot_buffer.address)
        .address(drawn_buffer.address)
        .u32(first)
        .u32(count as u32)
        .u32(hidden as u32);
    bench.launch("embed", [rows as u32, 1, 1], 256, 0, arguments)?;
    let found = from_f32(&bench.read(&out, rows * hidden * 4)?);
    let mut expected = Vec::new();
    for id in ids {
        let id = if id == u32::MAX { 117 } else { id };
        let row = (id as usize).checked_sub(first as usize).filter(|row| *row < count);
        expected.extend((0..hidden).map(|i| row.map_or(0.0, |row| f64::from(table[row * hidden + i]))));
    }
    Ok((distance(&found, &expected), 0.0))
}

fn prepare_rows(bench: &mut Bench) -> Result<(f64, f64)> {
    let yarn = Yarn {
        factor: 48.0,
        original_max_position_embeddings: 8192,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale: 1.0,
        mscale_all_dim: 0.0,
        attention_factor: None,
    };
    let query_scale = Some(QueryScale { beta: 0.1, original_max_position_embeddings: 8192 });
    let table = RopeConfig { theta: 1e8, yarn: Some(yarn), query_scale }.table(128);
    let positions: Vec<u32> = vec![0, 1, 63, 64, 8191, 8192, 65_535, 131_071, 262_143, 17];
    let sequences: Vec<u32> = vec![0, 0, 0, 1, 1, 1, 1, 1, 1, 0];
    let blocks: Vec<u32> = (0..4097).map(|index| (index * 7919) % 10_007).collect();
    let starts: Vec<u32> = vec![0, 1];
    let rows = positions.len();
    let (position_buffer, sequence_buffer, block_buffer, start_buffer) = (
        bench.upload(&u32_bytes(&positions))?,
        bench.upload(&u32_bytes(&sequences))?,
        bench.upload(&u32_bytes(&blocks))?,
        bench.upload(&u32_bytes(&starts))?,
    );
    let frequencies = bench.upload(&f32_bytes(&table.frequencies))?;
    let (angles, scales, places) =
        (bench.poisoned(rows * 128 * 4)?, bench.poisoned(rows * 4)?, bench.poisoned(rows * 4)?);
    let arguments = Arguments::default()
        .address(angles.address)
        .address(scales.address)
        .address(places.address)
        .address(position_buffer.address)
        .address(sequence_buffer.address)
        .address(block_buffer.address)
        .address(start_buffer.address)
        .address(frequencies.address)
        .u32(64)
        .f32(table.attention_factor)
        .f32(0.1)
        .u32(8192);
    bench.launch("prepare_rows", [rows as u32, 1, 1], 64, 0, arguments)?;
    let mut worst = 0f64;
    let found = from_f32(&bench.read(&angles, rows * 128 * 4)?);
    let expected: Vec<f32> =
        positions.iter().flat_map(|position| table.cos_sin(*position)).flat_map(|(cos, sin)| [cos, sin]).collect();
    for (found, expected) in found.iter().zip(&expected) {
        worst = worst.max(f64::from((found - expected).abs()));
    }
    let found_scales = from_f32(&bench.read(&scales, rows * 4)?);
    for (found, position) in found_scales.iter().zip(&positions) {
        worst = worst.max(f64::from((found - table.query_scale_at(*position)).abs()));
    }
    let found_places = bench.read(&places, rows * 4)?;
    for (index, four) in found_places.as_chunks::<4>().0.iter().enumerate() {
        let block = blocks[(starts[sequences[index] as usize] + positions[index] / 64) as usize];
        if u32::from_le_bytes(*four) != block * 64 + positions[index] % 64 {
            worst = f64::INFINITY;
        }
    }
    if found.iter().any(|number| !number.is_finite()) {
        worst = f64::INFINITY;
    }
    Ok((worst, 3e-7))
}

/// A product as kernels take it: bf16, or f32 in several partial sums. Returns its value too.
fn product(bench: &mut Bench, rows: usize, columns: usize, splits: usize) -> Result<(Buffer, Vec<f32>)> {
    let count = rows * columns;
    if splits == 0 {
        let numbers = bench.random.bf16s(count, 1.0);
        return Ok((bench.upload(&bf16_bytes(&numbers))?, numbers));
    }
    let parts = bench.random.normals(count * splits, 1.0);
    let sum = (0..count).map(|index| (0..splits).map(|split| parts[split * count + index]).sum()).collect();
    Ok((bench.upload(&f32_bytes(&parts))?, sum))
}

fn norm(bench: &mut Bench) -> Result<(f64, f64)> {
    let mut worst = 0f64;
    for (rows, hidden) in [(1, 64), (7, 576), (3, 5120), (33, 1028), (2, 12_288)] {
        // no partial; bf16; f32 in 1 and in 5 sums
        for (kind, splits) in [("", 0), ("add_bf16_", 0), ("add_f32_", 1), ("add_f32_", 5)] {
            for (suffix, y_scale, listed) in [("bf16", 1.0, false), ("bf16", 1.0, true), ("e4m3", 0.0213, false)] {
                let residual = bench.random.normals(rows * hidden, 2.0);
                let gain = bench.random.bf16s(hidden, 1.0);
                let (partial_buffer, partial) = product(bench, rows, hidden, splits)?;
                let partial_scale = 0.37f32;
                let list: Vec<u32> = (0..rows as u32).rev().filter(|row| !listed || row % 3 != 1).collect();
                let outputs = if listed { list.len() } else { rows };
                let (residual_buffer, gain_buffer, list_buffer) = (
                    bench.upload(&f32_bytes(&residual))?,
                    bench.upload(&bf16_bytes(&gain))?,
                    bench.upload(&u32_bytes(&list))?,
                );
                let size = if suffix == "bf16" { 2 } else { 1 };
                let out = bench.poisoned(outputs * hidden * size)?;
                let arguments = Arguments::default()
                    .address(residual_buffer.address)
                    .address(if kind.is_empty() { 0 } else { partial_buffer.address })
                    .u32(splits.max(1) as u32)
                    .u64((rows * hidden) as u64)
                    .f32(partial_scale)
                    .address(gain_buffer.address)
                    .address(out.address)
                    .f32(y_scale)
                    .address(if listed { list_buffer.address } else { 0 })
                    .u32(hidden as u32)
                    .f32(1e-5);
                let block = (hidden / 4).next_multiple_of(32).clamp(32, 1024) as u32;
                bench.launch(
                    &format!("{kind}norm_to_{suffix}"),
                    [outputs as u32, 1, 1],
                    block,
                    hidden as u32 * 4,
                    arguments,
                )?;
                let sums: Vec<f64> = residual
                    .iter()
                    .zip(&partial)
                    .map(|(residual, partial)| {
                        f64::from(*residual)
                            + if kind.is_empty() { 0.0 } else { f64::from(partial_scale) * f64::from(*partial) }
                    })
                    .collect();
                if !listed {
                    let found = from_f32(&bench.read(&residual_buffer, rows * hidden * 4)?);
                    worst = worst.max(distance(&found, &sums) * 1e3);
                }
                let mut expected = Vec::with_capacity(outputs * hidden);
                // `list` is read only where it is used
                #[allow(clippy::needless_range_loop)]
                for output in 0..outputs {
                    let row = if listed { list[output] as usize } else { output };
                    let numbers = &sums[row * hidden..][..hidden];
                    let mean = numbers.iter().map(|number| number * number).sum::<f64>() / hidden as f64;
                    expected.extend(
                        numbers
                            .iter()
                            .zip(&gain)
                            .map(|(number, gain)| number / (mean + 1e-5).sqrt() * f64::from(*gain)),
                    );
                }
                let bytes = bench.read(&out, outputs * hidden * size)?;
                worst = worst.max(compare_activation(&bytes, &expected, suffix, y_scale));
            }
        }
    }
    Ok((worst, 1.0))
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

fn rope(bench: &mut Bench) -> Result<(f64, f64)> {
    let mut worst = 0f64;
    for (rows, heads, kv_heads, d) in [(1, 32, 8, 128), (5, 8, 4, 32), (7, 9, 3, 64), (3, 12, 1, 128)] {
        for (input, splits) in [("bf16", 0), ("f32", 1), ("f32", 4)] {
            for kv in [KvDtype::Bf16, KvDtype::E4m3] {
                let columns = (heads + 2 * kv_heads) * d;
                let (qkv_buffer, qkv) = product(bench, rows, columns, splits)?;
                let scales = [0.5f32, 1.25, 2.0];
                let angles = bench.random.normals(rows * d, 1.0);
                let query_scale = bench.random.normals(rows, 1.0);
                let blocks = 3;
                let mut places: Vec<u32> = Vec::new();
                while places.len() < rows {
                    let place = bench.random.below(blocks * 64) as u32;
                    if !places.contains(&place) {
                        places.push(place);
                    }
                }
                let (angle_buffer, scale_buffer, place_buffer) = (
                    bench.upload(&f32_bytes(&angles))?,
                    bench.upload(&f32_bytes(&query_scale))?,
                    bench.upload(&u32_bytes(&places))?,
                );
                let plane = blocks * kv_heads * 64 * d;
                let (q, keys, values) = (
                    bench.poisoned(rows * heads * d * 2)?,
                    bench.poisoned(plane * kv.size())?,
                    bench.poisoned(plane * kv.size())?,
                );
                let arguments = Arguments::default()
                    .address(qkv_buffer.address)
                    .u32(splits.max(1) as u32)
                    .u64((rows * columns) as u64)
                    .f32(scales[0])
                    .f32(scales[1])
                    .f32(scales[2])
                    .address(q.address)
                    .address(keys.address)
                    .address(values.address)
                    .address(angle_buffer.address)
                    .address(scale_buffer.address)
                    .address(place_buffer.address)
                    .u32(heads as u32)
                    .u32(kv_heads as u32)
                    .u32(d as u32);
                let name = format!("rope_{input}_kv_{}", kv.name());
                bench.launch(&name, [rows as u32, rows as u32, 1], 64, 0, arguments)?;
                let head_at = |row: usize, head: usize| -> Vec<f64> {
                    let part = if head < heads {
                        0
                    } else if head < heads + kv_heads {
                        1
                    } else {
                        2
                    };
                    let numbers: Vec<f64> = qkv[row * columns + head * d..][..d]
                        .iter()
                        .map(|x| f64::from(*x) * f64::from(scales[part]))
                        .collect();
                    if part == 2 {
                        return numbers;
                    }
                    let factor = if part == 0 { f64::from(query_scale[row]) } else { 1.0 };
                    let mut rotated = vec![0.0; d];
                    for i in 0..d / 2 {
                        let (cos, sin) = (f64::from(angles[row * d + 2 * i]), f64::from(angles[row * d + 2 * i + 1]));
                        rotated[i] = (numbers[i] * cos - numbers[i + d / 2] * sin) * factor;
                        rotated[i + d / 2] = (numbers[i + d / 2] * cos + numbers[i] * sin) * factor;
                    }
                    rotated
                };
                let expected_q: Vec<f64> = (0..rows)
                    .flat_map(|row| (0..heads).flat_map(move |head| [(row, head)]))
                    .flat_map(|(row, head)| head_at(row, head))
                    .collect();
                worst = worst
                    .max(distance(&from_bf16(&bench.read(&q, rows * heads * d * 2)?), &expected_q) / BF16_DISTANCE);
                for (part, buffer) in [keys, values].iter().enumerate() {
                    let bytes = bench.read(buffer, plane * kv.size())?;
                    let mut written = 0;
                    for (row, place) in places.iter().enumerate() {
                        for kv_head in 0..kv_heads {
                            let tile = (*place as usize / 64 * kv_heads + kv_head) * 64 * d;
                            let stored: Vec<u8> = (0..d)
                                .map(|dimension| tile + cache_place(d, kv, *place as usize % 64, dimension))
                                .flat_map(|at| bytes[at * kv.size()..][..kv.size()].to_vec())
                                .collect();
                            let expected = head_at(row, heads + part * kv_heads + kv_head);
                            written += stored.len();
                            worst = worst.max(compare_activation(&stored, &expected, kv.name(), 1.0));
                        }
                    }
                    // everything else is as it was
                    if bytes.iter().filter(|byte| **byte == 0xff).count() + written < bytes.len() {
                        worst = f64::INFINITY;
                    }
                }
            }
        }
    }
    Ok((worst, 1.0))
}

fn gate(bench: &mut Bench) -> Result<(f64, f64)> {
    let mut worst = 0f64;
    for (rows, width) in [(1, 192), (5, 1536), (3, 32_768), (17, 1028)] {
        for (input, splits) in [("bf16", 0), ("f32", 1), ("f32", 3)] {
            for (suffix, y_scale) in [("bf16", 1.0), ("e4m3", 0.031)] {
                let (buffer, numbers) = product(bench, rows, 2 * width, splits)?;
                let size = if suffix == "bf16" { 2 } else { 1 };
                let out = bench.poisoned(rows * width * size)?;
                let (gate_scale, up_scale) = (1.7f32, 0.3f32);
                let arguments = Arguments::default()
                    .address(buffer.address)
                    .u32(splits.max(1) as u32)
                    .u64((rows * 2 * width) as u64)
                    .f32(gate_scale)
                    .f32(up_scale)
                    .address(out.address)
                    .f32(y_scale)
                    .u32(width as u32);
                let grid = [(width / 4).div_ceil(256) as u32, rows as u32, 1];
                bench.launch(&format!("gate_{input}_to_{suffix}"), grid, 256, 0, arguments)?;
                let mut expected = Vec::with_capacity(rows * width);
                for row in numbers.chunks_exact(2 * width) {
                    for i in 0..width {
                        let (g, u) = (
                            f64::from(row[i]) * f64::from(gate_scale),
                            f64::from(row[width + i]) * f64::from(up_scale),
                        );
                        expected.push(g / (1.0 + (-g).exp()) * u);
                    }
                }
                worst =
                    worst.max(compare_activation(&bench.read(&out, rows * width * size)?, &expected, suffix, y_scale));
            }
        }
    }
    Ok((worst, 1.0))
}

/// Inputs of a product: values that the format holds exactly, and their bytes.
fn operand(bench: &mut Bench, count: usize, fp8: bool) -> (Vec<f32>, Vec<u8>) {
    if !fp8 {
        let numbers = bench.random.bf16s(count, 1.0);
        let bytes = bf16_bytes(&numbers);
        return (numbers, bytes);
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

fn linear(bench: &mut Bench) -> Result<(f64, f64)> {
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
                let out = bench.poisoned(Linear::product_bytes(n, m))?;
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
                let sums: Vec<f32> = (0..m * n)
                    .map(|index| (0..splits as usize).map(|split| parts[split * m * n + index]).sum())
                    .collect();
                worst = worst.max(distance(&sums, &expected));
            }
        }
    }
    // f32 sums of exact products; the tensor cores keep at least 13 bits behind the leading one of a sum
    Ok((worst, 1e-3))
}

fn products(bench: &mut Bench) -> Result<(f64, f64)> {
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
                ProductShape { m, n, k, formats },
                Operands { x: x_buffer.address, w: w_buffer.address, y: out.address },
            )?;
            let bytes = bench.read(&out, m * n * size)?;
            let found = if size == 4 { from_f32(&bytes) } else { from_bf16(&bytes) };
            worst = worst.max(distance(&found, &multiply(&x, &w, m, n, k)));
        }
    }
    Ok((worst, 5e-3))
}

fn random_weights(bench: &mut Bench) -> Result<(f64, f64)> {
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

/// A cache with shuffled blocks; whatever no sequence has stored is NaN.
struct TestCache {
    keys: Vec<f32>,
    values: Vec<f32>,
    key_buffer: Buffer,
    value_buffer: Buffer,
    tables: Vec<u32>,
    starts: Vec<u32>,
}

impl TestCache {
    fn new(bench: &mut Bench, contexts: &[usize], kv_heads: usize, d: usize, kv: KvDtype) -> Result<Self> {
        let needed: usize = contexts.iter().map(|context| context.div_ceil(64)).sum();
        let mut order: Vec<u32> = (0..needed as u32 + 2).collect();
        for index in (1..order.len()).rev() {
            order.swap(index, bench.random.below(index + 1));
        }
        let count = order.len() * kv_heads * 64 * d;
        let (mut keys, mut values) = (vec![f32::NAN; count], vec![f32::NAN; count]);
        let (mut tables, mut starts) = (Vec::new(), Vec::new());
        for context in contexts {
            starts.push(tables.len() as u32);
            for token in 0..*context {
                if token % 64 == 0 {
                    tables.push(order[tables.len()]);
                }
                let block = tables[tables.len() - 1] as usize;
                for head in 0..kv_heads {
                    let at = ((block * kv_heads + head) * 64 + token % 64) * d;
                    for i in at..at + d {
                        let numbers = (bench.random.normal(), bench.random.normal());
                        (keys[i], values[i]) = match kv {
                            KvDtype::Bf16 => (round(numbers.0), round(numbers.1)),
                            KvDtype::E4m3 => (e4m3::round(numbers.0), e4m3::round(numbers.1)),
                        };
                    }
                }
            }
        }
        let bytes = |numbers: &[f32]| {
            let mut placed = vec![0f32; numbers.len()];
            for (tile, target) in numbers.chunks_exact(64 * d).zip(placed.chunks_exact_mut(64 * d)) {
                for (index, number) in tile.iter().enumerate() {
                    target[cache_place(d, kv, index / d, index % d)] = *number;
                }
            }
            match kv {
                KvDtype::Bf16 => bf16_bytes(&placed),
                KvDtype::E4m3 => placed.iter().map(|number| e4m3::encode(*number)).collect(),
            }
        };
        let (key_buffer, value_buffer) = (bench.upload(&bytes(&keys))?, bench.upload(&bytes(&values))?);
        Ok(Self { keys, values, key_buffer, value_buffer, tables, starts })
    }

    /// Attention of one query over positions 0..=position.
    fn attend(&self, q: &[f32], sequence: usize, kv_head: usize, kv_heads: usize, position: usize) -> Vec<f64> {
        let d = q.len();
        let row = |numbers: &[f32], token: usize| -> usize {
            debug_assert!(!numbers.is_empty());
            let block = self.tables[self.starts[sequence] as usize + token / 64] as usize;
            ((block * kv_heads + kv_head) * 64 + token % 64) * d
        };
        let scores: Vec<f64> = (0..=position)
            .map(|token| {
                let key = &self.keys[row(&self.keys, token)..][..d];
                q.iter().zip(key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() / (d as f64).sqrt()
            })
            .collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
        let mut out = vec![0.0; d];
        for (token, score) in scores.iter().enumerate() {
            let weight = (score - largest).exp() / total;
            for (out, value) in out.iter_mut().zip(&self.values[row(&self.values, token)..][..d]) {
                *out += weight * f64::from(*value);
            }
        }
        out
    }
}

fn decode_attention(bench: &mut Bench) -> Result<(f64, f64)> {
    let mut worst = 0f64;
    for (heads, kv_heads, d) in [(8, 2, 128), (12, 1, 128), (8, 4, 32), (9, 3, 64), (16, 1, 32), (3, 3, 128)] {
        for kv in [KvDtype::Bf16, KvDtype::E4m3] {
            for splits in [1, 3, 66] {
                let contexts = [1, 63, 64, 65, 200, 1500];
                let cache = TestCache::new(bench, &contexts, kv_heads, d, kv)?;
                // a row that some other kernel owns stands between
                let rows = contexts.len() + 1;
                let attention_rows: Vec<u32> = vec![0, 1, 3, 4, 5, 6];
                let mut positions = vec![0u32; rows];
                let mut sequences = vec![0u32; rows];
                for (index, row) in attention_rows.iter().enumerate() {
                    positions[*row as usize] = contexts[index] as u32 - 1;
                    sequences[*row as usize] = index as u32;
                }
                let q = bench.random.bf16s(rows * heads * d, 1.5);
                let buffers = [
                    bench.upload(&bf16_bytes(&q))?,
                    bench.upload(&u32_bytes(&attention_rows))?,
                    bench.upload(&u32_bytes(&positions))?,
                    bench.upload(&u32_bytes(&sequences))?,
                    bench.upload(&u32_bytes(&cache.tables))?,
                    bench.upload(&u32_bytes(&cache.starts))?,
                ];
                let listed = attention_rows.len();
                let (partial, sums) =
                    (bench.poisoned(listed * heads * splits * d * 4)?, bench.poisoned(listed * heads * splits * 4)?);
                let finished = bench.upload(&vec![0; listed * kv_heads * 4])?;
                for (suffix, scale) in [("bf16", 1.0), ("e4m3", 0.01)] {
                    let size = if suffix == "bf16" { 2 } else { 1 };
                    let out = bench.poisoned(rows * heads * d * size)?;
                    let arguments = Arguments::default()
                        .address(buffers[0].address)
                        .address(cache.key_buffer.address)
                        .address(cache.value_buffer.address)
                        .address(buffers[1].address)
                        .address(buffers[2].address)
                        .address(buffers[3].address)
                        .address(buffers[4].address)
                        .address(buffers[5].address)
                        .address(partial.address)
                        .address(sums.address)
                        .address(finished.address)
                        .address(out.address)
                        .f32(scale)
                        .u32(heads as u32)
                        .u32(kv_heads as u32)
                        .f32(std::f32::consts::LOG2_E / (d as f32).sqrt());
                    let grid = [splits as u32, kv_heads as u32, listed as u32];
                    bench.launch(
                        &format!("decode_attention_{d}_{}_to_{suffix}", kv.name()),
                        grid,
                        128,
                        decode_shared_bytes(d, kv),
                        arguments,
                    )?;
                    if bench.read(&finished, listed * kv_heads * 4)?.iter().any(|byte| *byte != 0) {
                        worst = f64::INFINITY;
                    }
                    let bytes = bench.read(&out, rows * heads * d * size)?;
                    for (index, row) in attention_rows.iter().enumerate() {
                        let mut expected = Vec::with_capacity(heads * d);
                        for head in 0..heads {
                            let query = &q[(*row as usize * heads + head) * d..][..d];
                            expected.extend(cache.attend(
                                query,
                                index,
                                head / (heads / kv_heads),
                                kv_heads,
                                contexts[index] - 1,
                            ));
                        }
                        let found = &bytes[*row as usize * heads * d * size..][..heads * d * size];
                        // weights are rounded to bf16 before they meet V
                        worst = worst.max(compare_activation(found, &expected, suffix, scale) / 2.0);
                    }
                }
            }
        }
    }
    Ok((worst, 1.0))
}

fn prefill_attention(bench: &mut Bench) -> Result<(f64, f64)> {
    let mut worst = 0f64;
    let cases = [
        (8, 2, 128, KvDtype::Bf16, "bf16"),
        (8, 2, 128, KvDtype::Bf16, "e4m3"),
        (12, 1, 128, KvDtype::E4m3, "bf16"),
        (8, 2, 128, KvDtype::E4m3, "e4m3"),
        (8, 4, 32, KvDtype::Bf16, "bf16"),
        (8, 4, 32, KvDtype::Bf16, "e4m3"),
        (16, 1, 32, KvDtype::E4m3, "bf16"),
        (8, 4, 32, KvDtype::E4m3, "e4m3"),
        (9, 3, 64, KvDtype::Bf16, "bf16"),
        (9, 3, 64, KvDtype::E4m3, "e4m3"),
    ];
    for (heads, kv_heads, d, kv, suffix) in cases {
        let group = heads / kv_heads;
        // (start, rows): from the beginning, behind a prefix, across blocks, a single token
        let chunks = [(0, 70), (130, 45), (63, 2), (500, 1), (0, 1), (1, 129)];
        let contexts: Vec<usize> = chunks.iter().map(|(start, rows)| start + rows).collect();
        let cache = TestCache::new(bench, &contexts, kv_heads, d, kv)?;
        let rows: usize = chunks.iter().map(|(_, rows)| rows).sum();
        let (mut positions, mut tiles, mut owner) = (Vec::new(), Vec::new(), Vec::new());
        for (sequence, (start, count)) in chunks.iter().enumerate() {
            let step = 128 / group;
            for offset in (0..*count).step_by(step) {
                tiles.push([sequence as u32, (positions.len() + offset) as u32, step.min(count - offset) as u32]);
            }
            for row in 0..*count {
                positions.push((start + row) as u32);
                owner.push(sequence);
            }
        }
        tiles.reverse();
        let tile_words: Vec<u32> = tiles.iter().flatten().copied().collect();
        let q = bench.random.bf16s(rows * heads * d, 1.5);
        let buffers = [
            bench.upload(&bf16_bytes(&q))?,
            bench.upload(&u32_bytes(&tile_words))?,
            bench.upload(&u32_bytes(&positions))?,
            bench.upload(&u32_bytes(&cache.tables))?,
            bench.upload(&u32_bytes(&cache.starts))?,
        ];
        let (size, scale) = if suffix == "bf16" { (2, 1.0) } else { (1, 0.01) };
        let mut expected = Vec::with_capacity(rows * heads * d);
        for row in 0..rows {
            for head in 0..heads {
                let query = &q[(row * heads + head) * d..][..d];
                expected.extend(cache.attend(query, owner[row], head / group, kv_heads, positions[row] as usize));
            }
        }
        let mut launches = vec![prefill_kernel(d, kv, suffix, false)];
        if d == 128 && bench.device.hopper {
            launches.push(prefill_kernel(d, kv, suffix, true));
        }
        for (name, block, shared) in launches {
            let out = bench.poisoned(rows * heads * d * size)?;
            let arguments = Arguments::default()
                .address(buffers[0].address)
                .address(cache.key_buffer.address)
                .address(cache.value_buffer.address)
                .address(buffers[1].address)
                .address(buffers[2].address)
                .address(buffers[3].address)
                .address(buffers[4].address)
                .address(out.address)
                .f32(scale)
                .u32(heads as u32)
                .u32(kv_heads as u32)
                .f32(std::f32::consts::LOG2_E / (d as f32).sqrt());
            bench.launch(&name, [kv_heads as u32, tiles.len() as u32, 1], block, shared, arguments)?;
            worst = worst
                .max(compare_activation(&bench.read(&out, rows * heads * d * size)?, &expected, suffix, scale) / 2.0);
        }
    }
    Ok((worst, 1.0))
}

/// Draws of the device against those of the CPU's sampler: wrong ones, and wrong logprobs.
fn sample(bench: &mut Bench) -> Result<(f64, f64)> {
    let plain = SamplingParams { seed: 0xfeed_beef_1234, ..SamplingParams::default() };
    let variants = [
        SamplingParams { temperature: 0.0, ..plain.clone() },
        plain.clone(),
        SamplingParams { temperature: 0.15, ..plain.clone() },
        SamplingParams { top_k: 40, ..plain.clone() },
        SamplingParams { top_p: 0.9, temperature: 0.7, ..plain.clone() },
        SamplingParams { min_p: 0.05, logprobs: Some(5), ..plain.clone() },
        SamplingParams { top_k: 100, top_p: 0.5, min_p: 0.01, temperature: 1.3, logprobs: Some(0), ..plain.clone() },
        SamplingParams {
            temperature: 0.0,
            repetition_penalty: 1.3,
            presence_penalty: 0.4,
            frequency_penalty: 0.7,
            ..plain.clone()
        },
        SamplingParams { repetition_penalty: 0.8, frequency_penalty: 1.5, top_p: 0.95, ..plain.clone() },
        SamplingParams { temperature: 0.0, logit_bias: vec![(7, 100.0), (8, -100.0), (7, 1.0)], ..plain.clone() },
        SamplingParams {
            temperature: 0.0,
            logit_bias: vec![(9, 100.0)],
            end_ids: vec![9, 2],
            min_tokens: 2,
            logprobs: Some(20),
            ..plain
        },
    ];
    let mut wrong = 0f64;
    for vocabulary in [9191usize, 131_072] {
        let slots = variants.len();
        let limits = Limits { step_tokens: 16, sequences: slots, model_len: 128, logit_rows: slots + 3 };
        let mut sampler = Sampler::new(&bench.device, &limits, vocabulary)?;
        let prompt: Vec<u32> = (0..40).map(|index| index * 11 % 500).collect();
        let generated: Vec<u32> = vec![3, 3, 5, 1000, 3];
        let mut states = Vec::new();
        for (slot, params) in variants.iter().enumerate() {
            let generated_ids = if slot % 2 == 0 { Vec::new() } else { generated.clone() };
            states.push(SlotState::new(params, &prompt, &generated_ids));
            let admission =
                Admission { slot: slot as u32, sampling: params.clone(), prompt_ids: prompt.clone(), generated_ids };
            sampler.admit(&bench.device, &mut bench.kernels, &admission)?;
        }
        for step in 0..4u32 {
            // rows: one of each slot in reverse order, one to score, one with a NaN, one of equal numbers
            let rows = slots + 3;
            let mut logits = bench.random.normals(rows * vocabulary, 3.0);
            logits[(slots + 1) * vocabulary + vocabulary - 1] = f32::NAN;
            logits[(slots + 2) * vocabulary..].fill(1.5);
            logits[5] = f32::NEG_INFINITY;
            let buffer = bench.upload(&f32_bytes(&logits))?;
            let row_of = |slot: usize| slots - 1 - slot;
            // some slots draw within a mask in some steps, as if they had a grammar
            let mask: Mask = (0..vocabulary.div_ceil(32))
                .map(|word| 0x5a5a_1234 ^ (word as u32).wrapping_mul(0x9e37_79b9))
                .collect();
            let mask_of = |slot: usize| (slot % 3 == 1 && step % 2 == 1).then(|| mask.clone());
            let next = |row: usize, slot: usize| SampleRequest::Next {
                row: row as u32,
                slot: slot as u32,
                position: 50 + step,
                drafts: Vec::new(),
                masks: mask_of(slot).into_iter().collect(),
            };
            let mut requests: Vec<SampleRequest> = (0..slots).map(|slot| next(row_of(slot), slot)).collect();
            // the first two slots see the rows with a NaN and with equal numbers once
            if step == 3 {
                requests[0] = next(slots + 1, 0);
                requests[9] = next(slots + 2, 9);
            }
            let target = 77 + step;
            requests.push(SampleRequest::Score { row: slots as u32, slot: 0, target, top: 4 });
            sampler.step_begins(&bench.device)?;
            sampler.sample(&bench.device, &mut bench.kernels, buffer.address, &requests)?;
            let results = sampler.collect()?;
            for (slot, (found_slot, found)) in results.drawn.iter().enumerate() {
                let row = match (step, slot) {
                    (3, 0) => slots + 1,
                    (3, 9) => slots + 2,
                    _ => row_of(slot),
                };
                let mut own = logits[row * vocabulary..][..vocabulary].to_vec();
                let expected = states[slot].draw_within(mask_of(slot).as_ref(), &mut own, 50 + step);
                let fault = Err(SequenceFault::NotANumber { position: 53 });
                wrong += match (found, &expected) {
                    _ if *found_slot as usize != slot => 1.0,
                    (Ok(found), Ok(expected)) if found.len() == 1 && found[0].token_id == expected.token_id => {
                        match (&found[0].logprobs, &expected.logprobs) {
                            (None, None) => 0.0,
                            (Some(found), Some(expected)) => same_logprobs(found, expected),
                            _ => 1.0,
                        }
                    }
                    (Err(found), _) if step == 3 && slot == 0 && Err(found.clone()) == fault && expected == fault => {
                        0.0
                    }
                    _ => 1.0,
                };
            }
            let expected = score(&logits[slots * vocabulary..][..vocabulary], target, 4);
            wrong += results.scored.first().map_or(1.0, |found| same_logprobs(found, &expected));
        }
    }
    Ok((wrong, 0.0))
}

fn same_logprobs(
    found: &crate::engine::step::PositionLogprobs,
    expected: &crate::engine::step::PositionLogprobs,
) -> f64 {
    let same = |a: &crate::engine::step::TokenLogprob, b: &crate::engine::step::TokenLogprob| {
        a.token_id == b.token_id && a.rank == b.rank && (a.logprob - b.logprob).abs() < 1e-4
    };
    let equal = same(&found.chosen, &expected.chosen)
        && found.top.len() == expected.top.len()
        && found.top.iter().zip(&expected.top).all(|(a, b)| same(a, b));
    if equal { 0.0 } else { 1.0 }
}
