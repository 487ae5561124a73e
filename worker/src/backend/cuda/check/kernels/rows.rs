//! Kernels that work on rows: embedding, what is prepared for a step, norm, rotation, gate.

use bora_common::model::{QueryScale, RopeConfig, Yarn};

use super::super::super::attention::cache_place;
use super::super::super::driver::{Arguments, Buffer};
use super::super::reference::{bf16_bytes, f32_bytes, from_bf16, from_f32, u32_bytes};
use super::{BF16_DISTANCE, Bench, compare_activation, distance};
use crate::backend::{KvDtype, Result};

pub(super) fn embed(bench: &mut Bench) -> Result<(f64, f64)> {
    let (hidden, rows, count, first) = (576, 9, 50, 100);
    let table = bench.random.bf16s(count * hidden, 1.0);
    let ids: Vec<u32> = vec![100, 149, 99, 150, u32::MAX, 120, 0, 131_071, 101];
    let slots: Vec<u32> = vec![0, 0, 0, 0, 3, 0, 0, 0, 0];
    let sampled: Vec<u32> = vec![1, 2, 3, 117];
    let (table_buffer, id_buffer, slot_buffer, sampled_buffer) = (
        bench.upload(&bf16_bytes(&table))?,
        bench.upload(&u32_bytes(&ids))?,
        bench.upload(&u32_bytes(&slots))?,
        bench.upload(&u32_bytes(&sampled))?,
    );
    let out = bench.poisoned(rows * hidden * 4)?;
    let arguments = Arguments::default()
        .address(out.address)
        .address(table_buffer.address)
        .address(id_buffer.address)
        .address(slot_buffer.address)
        .address(sampled_buffer.address)
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

pub(super) fn prepare_rows(bench: &mut Bench) -> Result<(f64, f64)> {
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

/// A GEMM as kernels take it: bf16, or f32 in several partial sums. Returns its value too.
fn gemm(bench: &mut Bench, rows: usize, columns: usize, splits: usize) -> Result<(Buffer, Vec<f32>)> {
    let count = rows * columns;
    if splits == 0 {
        let elements = bench.random.bf16s(count, 1.0);
        return Ok((bench.upload(&bf16_bytes(&elements))?, elements));
    }
    let parts = bench.random.normals(count * splits, 1.0);
    let sum = (0..count).map(|index| (0..splits).map(|split| parts[split * count + index]).sum()).collect();
    Ok((bench.upload(&f32_bytes(&parts))?, sum))
}

pub(super) fn norm(bench: &mut Bench) -> Result<(f64, f64)> {
    let mut worst = 0f64;
    for (rows, hidden) in [(1, 64), (7, 576), (3, 5120), (33, 1028), (2, 12_288)] {
        // no partial; bf16; f32 in 1 and in 5 sums
        for (kind, splits) in [("", 0), ("add_bf16_", 0), ("add_f32_", 1), ("add_f32_", 5)] {
            for (suffix, y_scale, listed) in [("bf16", 1.0, false), ("bf16", 1.0, true), ("e4m3", 0.0213, false)] {
                let residual = bench.random.normals(rows * hidden, 2.0);
                let gain = bench.random.bf16s(hidden, 1.0);
                let (partial_buffer, partial) = gemm(bench, rows, hidden, splits)?;
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
                let all_reduce: Vec<f64> = residual
                    .iter()
                    .zip(&partial)
                    .map(|(residual, partial)| {
                        f64::from(*residual)
                            + if kind.is_empty() { 0.0 } else { f64::from(partial_scale) * f64::from(*partial) }
                    })
                    .collect();
                if !listed {
                    let found = from_f32(&bench.read(&residual_buffer, rows * hidden * 4)?);
                    worst = worst.max(distance(&found, &all_reduce) * 1e3);
                }
                let mut expected = Vec::with_capacity(outputs * hidden);
                // `list` is read only where it is used
                #[allow(clippy::needless_range_loop)]
                for output in 0..outputs {
                    let row = if listed { list[output] as usize } else { output };
                    let elements = &all_reduce[row * hidden..][..hidden];
                    let mean = elements.iter().map(|number| number * number).sum::<f64>() / hidden as f64;
                    expected.extend(
                        elements
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

pub(super) fn rope(bench: &mut Bench) -> Result<(f64, f64)> {
    let mut worst = 0f64;
    for (rows, heads, kv_heads, d) in [(1, 32, 8, 128), (5, 8, 4, 32), (7, 9, 3, 64), (3, 12, 1, 128)] {
        for (input, splits) in [("bf16", 0), ("f32", 1), ("f32", 4)] {
            for kv in [KvDtype::Bf16, KvDtype::Fp8] {
                let columns = (heads + 2 * kv_heads) * d;
                let (qkv_buffer, qkv) = gemm(bench, rows, columns, splits)?;
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
                    let elements: Vec<f64> = qkv[row * columns + head * d..][..d]
                        .iter()
                        .map(|x| f64::from(*x) * f64::from(scales[part]))
                        .collect();
                    if part == 2 {
                        return elements;
                    }
                    let factor = if part == 0 { f64::from(query_scale[row]) } else { 1.0 };
                    let mut rotated = vec![0.0; d];
                    for i in 0..d / 2 {
                        let (cos, sin) = (f64::from(angles[row * d + 2 * i]), f64::from(angles[row * d + 2 * i + 1]));
                        rotated[i] = (elements[i] * cos - elements[i + d / 2] * sin) * factor;
                        rotated[i + d / 2] = (elements[i + d / 2] * cos + elements[i] * sin) * factor;
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

pub(super) fn gate(bench: &mut Bench) -> Result<(f64, f64)> {
    let mut worst = 0f64;
    for (rows, width) in [(1, 192), (5, 1536), (3, 32_768), (17, 1028)] {
        for (input, splits) in [("bf16", 0), ("f32", 1), ("f32", 3)] {
            for (suffix, y_scale) in [("bf16", 1.0), ("e4m3", 0.031)] {
                let (buffer, elements) = gemm(bench, rows, 2 * width, splits)?;
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
                for row in elements.chunks_exact(2 * width) {
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
