//! Attention over the paged cache.

use super::super::super::attention::{
    cache_place, decode_shared_bytes, prefill_kernel, transposes_values, transposing_shape,
};
use super::super::super::driver::{Arguments, Buffer};
use super::super::super::shares::{ITEM_WORDS, PART_WORDS, Share, share_out};
use super::super::super::tiles::{self, PROMPT_WORDS, Prompt, ROUND_TOKENS, TILE_WORDS};
use super::super::reference::{bf16_bytes, distance, from_bf16, round, u32_bytes};
use super::{Bench, compare_activation};
use crate::backend::{KvDtype, Result};
use crate::weights::e4m3;

/// What weights of attention rounded to e4m3 may change: each by a sixteenth at most, 2.6 % in the mean of squares, and so their
/// mean over values that have no common part.
const E4M3_WEIGHTS_DISTANCE: f64 = 4e-2;

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
                        (keys[i], values[i]) = if kv == KvDtype::Fp8 {
                            (e4m3::round(numbers.0), e4m3::round(numbers.1))
                        } else {
                            (round(numbers.0), round(numbers.1))
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
            if kv == KvDtype::Fp8 {
                placed.iter().map(|number| e4m3::encode(*number)).collect()
            } else {
                bf16_bytes(&placed)
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

pub(super) fn decode_attention(bench: &mut Bench) -> Result<(f64, f64)> {
    let mut worst = 0f64;
    for (heads, kv_heads, d) in [(8, 2, 128), (12, 1, 128), (8, 4, 32), (9, 3, 64), (16, 1, 32), (3, 3, 128)] {
        for kv in [KvDtype::Bf16, KvDtype::Fp8] {
            for parts in [1, 3, 66] {
                let contexts = [1, 63, 64, 65, 200, 1500, 130, 66, 9, 1000];
                // rows of each sequence: guesses that are verified, within a block and across blocks
                let counts = [1, 1, 1, 1, 1, 1, 5, 4, 9, 2];
                let cache = TestCache::new(bench, &contexts, kv_heads, d, kv)?;
                let step = 16 / (heads / kv_heads);
                let (mut positions, mut sequences, mut items) = (vec![], vec![], vec![]);
                let mut attention_rows = Vec::new();
                for (index, (context, count)) in contexts.iter().zip(counts).enumerate() {
                    if index == 2 {
                        // a row that some other kernel owns stands between, and an item of nothing
                        positions.push(0);
                        sequences.push(0);
                        items.push(Share { first_row: 0, rows: 0, blocks: 0 });
                    }
                    for offset in (0..count).step_by(step) {
                        let rows = step.min(count - offset);
                        let last = context - count + offset + rows - 1;
                        items.push(Share {
                            first_row: positions.len() as u32,
                            rows: rows as u32,
                            blocks: (last / 64 + 1) as u32,
                        });
                        for row in offset..offset + rows {
                            attention_rows.push((positions.len(), index));
                            positions.push((context - count + row) as u32);
                            sequences.push(index as u32);
                        }
                    }
                }
                let rows = positions.len();
                let mut item_words = vec![0; items.len() * ITEM_WORDS];
                let mut part_words = vec![0; (parts + 1) * PART_WORDS];
                share_out(&items, parts, &mut item_words, &mut part_words);
                let q = bench.random.bf16s(rows * heads * d, 1.5);
                let buffers = [
                    bench.upload(&bf16_bytes(&q))?,
                    bench.upload(&u32_bytes(&item_words))?,
                    bench.upload(&u32_bytes(&part_words))?,
                    bench.upload(&u32_bytes(&positions))?,
                    bench.upload(&u32_bytes(&sequences))?,
                    bench.upload(&u32_bytes(&cache.tables))?,
                    bench.upload(&u32_bytes(&cache.starts))?,
                ];
                let listed = items.len();
                let partials = parts * 2 * kv_heads * 16;
                let (partial, sums) = (bench.poisoned(partials * d * 4)?, bench.poisoned(partials * 4)?);
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
                        .address(buffers[6].address)
                        .address(partial.address)
                        .address(sums.address)
                        .address(finished.address)
                        .address(out.address)
                        .f32(scale)
                        .u32(heads as u32)
                        .u32(kv_heads as u32)
                        .f32(std::f32::consts::LOG2_E / (d as f32).sqrt());
                    let grid = [parts as u32, kv_heads as u32, 1];
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
                    for (row, sequence) in &attention_rows {
                        let mut expected = Vec::with_capacity(heads * d);
                        for head in 0..heads {
                            let query = &q[(row * heads + head) * d..][..d];
                            let (kv_head, position) = (head / (heads / kv_heads), positions[*row] as usize);
                            expected.extend(cache.attend(query, *sequence, kv_head, kv_heads, position));
                        }
                        let found = &bytes[row * heads * d * size..][..heads * d * size];
                        // weights are rounded to bf16 before they meet V
                        worst = worst.max(compare_activation(found, &expected, suffix, scale) / 2.0);
                    }
                }
            }
        }
    }
    Ok((worst, 1.0))
}

/// Queries as `hopper_attention` rounds them where the cache is e4m3: each by a scale of its own.
fn rounded_to_e4m3(q: &[f32], d: usize) -> Vec<f32> {
    let of_row = |row: &[f32]| {
        let largest = row.iter().fold(0f32, |largest, number| largest.max(number.abs()));
        let scale = if largest > 0.0 { largest / e4m3::MAX } else { 1.0 };
        row.iter().map(|number| e4m3::round(number * (1.0 / scale)) * scale).collect::<Vec<f32>>()
    };
    q.chunks_exact(d).flat_map(of_row).collect()
}

pub(super) fn prefill_attention(bench: &mut Bench) -> Result<(f64, f64)> {
    let mut worst = 0f64;
    let cases = [
        (8, 2, 128, KvDtype::Bf16, "bf16"),
        (12, 1, 128, KvDtype::Bf16, "e4m3"),
        (12, 1, 128, KvDtype::Fp8, "bf16"),
        (8, 2, 128, KvDtype::Fp8, "e4m3"),
        (8, 4, 32, KvDtype::Bf16, "bf16"),
        (8, 4, 32, KvDtype::Bf16, "e4m3"),
        (16, 1, 32, KvDtype::Fp8, "bf16"),
        (8, 4, 32, KvDtype::Fp8, "e4m3"),
        (9, 3, 64, KvDtype::Bf16, "bf16"),
        (9, 3, 64, KvDtype::Fp8, "e4m3"),
    ];
    for (heads, kv_heads, d, kv, suffix) in cases {
        let group = heads / kv_heads;
        // (start, rows): from the beginning, behind a prefix, across blocks, a single token
        let chunks = [(0, 70), (130, 45), (63, 2), (500, 1), (0, 1), (1, 129)];
        let contexts: Vec<usize> = chunks.iter().map(|(start, rows)| start + rows).collect();
        let cache = TestCache::new(bench, &contexts, kv_heads, d, kv)?;
        let rows: usize = chunks.iter().map(|(_, rows)| rows).sum();
        let (mut positions, mut prompts, mut owner) = (Vec::new(), Vec::new(), Vec::new());
        for (sequence, (start, count)) in chunks.iter().enumerate() {
            let table = cache.starts[sequence] as usize;
            let context = start + count;
            prompts.push(Prompt { sequence, first_row: positions.len(), rows: *count, table, context });
            for row in 0..*count {
                positions.push((start + row) as u32);
                owner.push(sequence);
            }
        }
        let q = bench.random.bf16s(rows * heads * d, 1.5);
        let buffers = [
            bench.upload(&bf16_bytes(&q))?,
            bench.upload(&u32_bytes(&positions))?,
            bench.upload(&u32_bytes(&cache.tables))?,
            bench.upload(&u32_bytes(&cache.starts))?,
        ];
        let (size, scale) = if suffix == "bf16" { (2, 1.0) } else { (1, 0.01) };
        let wanted = |q: &[f32]| {
            let mut expected = Vec::with_capacity(rows * heads * d);
            for row in 0..rows {
                for head in 0..heads {
                    let query = &q[(row * heads + head) * d..][..d];
                    expected.extend(cache.attend(query, owner[row], head / group, kv_heads, positions[row] as usize));
                }
            }
            expected
        };
        let kernels = if d == 128 && bench.device.hopper { vec![false, true] } else { vec![false] };
        for hopper in kernels {
            let transposes = transposes_values(d, kv, hopper);
            // the longest has 4 rounds, all of them 11
            let cut = tiles::cut(&prompts, group, transposes.then_some(5));
            let tiles = bench.upload(&u32_bytes(cut.tiles.as_flattened()))?;
            let listed = bench.upload(&u32_bytes(cut.prompts.as_flattened()))?;
            let transposed = bench.poisoned(if transposes { 5 * kv_heads * ROUND_TOKENS * d } else { 1 })?;
            let (name, block, shared) = prefill_kernel(d, kv, suffix, hopper);
            let out = bench.poisoned(rows * heads * d * size)?;
            for pass in &cut.passes {
                let mut values = cache.value_buffer.address;
                if transposes {
                    let arguments = Arguments::default()
                        .address(values)
                        .address(listed.address + (pass.first_prompt * PROMPT_WORDS * 4) as u64)
                        .u32(pass.prompts as u32)
                        .address(buffers[2].address)
                        .address(transposed.address);
                    let launch = transposing_shape(pass.rounds, kv_heads as u32);
                    bench.launch("transpose_values", launch.grid, launch.block, launch.shared, arguments)?;
                    values = transposed.address;
                }
                let arguments = Arguments::default()
                    .address(buffers[0].address)
                    .address(cache.key_buffer.address)
                    .address(values)
                    .address(tiles.address + (pass.first_tile * TILE_WORDS * 4) as u64)
                    .address(buffers[1].address)
                    .address(buffers[2].address)
                    .address(buffers[3].address)
                    .address(out.address)
                    .f32(scale)
                    .u32(heads as u32)
                    .u32(kv_heads as u32)
                    .f32(std::f32::consts::LOG2_E / (d as f32).sqrt());
                bench.launch(&name, [kv_heads as u32, pass.tiles as u32, 1], block, shared, arguments)?;
            }
            let found = bench.read(&out, rows * heads * d * size)?;
            worst = worst.max(match (transposes, suffix) {
                (true, "bf16") => {
                    distance(&from_bf16(&found), &wanted(&rounded_to_e4m3(&q, d))) / E4M3_WEIGHTS_DISTANCE
                }
                (true, _) => compare_activation(&found, &wanted(&rounded_to_e4m3(&q, d)), suffix, scale) / 2.0,
                (false, _) => compare_activation(&found, &wanted(&q), suffix, scale) / 2.0,
            });
        }
    }
    Ok((worst, 1.0))
}
