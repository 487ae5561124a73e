//! Attention over the paged cache.

use super::super::super::attention::{cache_place, prefill_kernel, transposes_values, transposing_shape};
use super::super::super::decode_kernel::DecodeKernel;
use super::super::super::driver::{Arguments, Buffer};
use super::super::super::split_kv::{ITEM_WORDS, PART_WORDS, Share, share_out};
use super::super::super::tiles::{self, PROMPT_WORDS, Prompt, ROUND_TOKENS, TILE_WORDS};
use super::super::reference::{bf16_bytes, distance, from_bf16, round, u32_bytes};
use super::{Bench, compare_activation};
use crate::backend::{KvDtype, Result};
use crate::weights::e4m3;

/// What weights of attention rounded to e4m3 may change: each by a sixteenth at most, 2.6 % in the mean of squares, and so their
/// mean over values that have no common part.
const E4M3_WEIGHTS_DISTANCE: f64 = 4e-2;

/// Query heads, heads of keys and values, numbers of each, and what the cache holds.
#[derive(Clone, Copy)]
struct Heads {
    heads: usize,
    kv_heads: usize,
    d: usize,
    kv: KvDtype,
}

impl Heads {
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn score_scale(&self) -> f32 {
        std::f32::consts::LOG2_E / (self.d as f32).sqrt()
    }
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
    /// Standard normal numbers, the values `common` larger.
    fn new(bench: &mut Bench, contexts: &[usize], shape: Heads, common: f32) -> Result<Self> {
        let Heads { kv_heads, d, kv, .. } = shape;
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
                        let elements = (bench.random.normal(), bench.random.normal() + common);
                        (keys[i], values[i]) = if kv == KvDtype::Fp8 {
                            (e4m3::round(elements.0), e4m3::round(elements.1))
                        } else {
                            (round(elements.0), round(elements.1))
                        };
                    }
                }
            }
        }
        let bytes = |elements: &[f32]| {
            let mut placed = vec![0f32; elements.len()];
            for (tile, target) in elements.chunks_exact(64 * d).zip(placed.chunks_exact_mut(64 * d)) {
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
        let row = |elements: &[f32], token: usize| -> usize {
            debug_assert!(!elements.is_empty());
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

/// Queries over a cache, and the form of the output.
struct Case<'a> {
    cache: &'a TestCache,
    shape: Heads,
    q: &'a [f32],
    positions: &'a [u32],
    suffix: &'static str,
    scale: f32,
}

impl Case<'_> {
    fn size(&self) -> usize {
        if self.suffix == "bf16" { 2 } else { 1 }
    }

    /// Of (row, sequence), every head.
    fn wanted(&self, q: &[f32], rows: &[(usize, usize)]) -> Vec<f64> {
        let Heads { heads, kv_heads, d, .. } = self.shape;
        let mut expected = Vec::with_capacity(rows.len() * heads * d);
        for (row, sequence) in rows {
            for head in 0..heads {
                let query = &q[(row * heads + head) * d..][..d];
                let position = self.positions[*row] as usize;
                expected.extend(self.cache.attend(query, *sequence, head / self.shape.group(), kv_heads, position));
            }
        }
        expected
    }

    /// Output of some rows.
    fn of_rows(&self, bytes: &[u8], rows: &[(usize, usize)]) -> Vec<u8> {
        let row_bytes = self.shape.heads * self.shape.d * self.size();
        rows.iter().flat_map(|(row, _)| bytes[row * row_bytes..][..row_bytes].iter().copied()).collect()
    }

    /// Output of all rows, and whether all counters are zero again.
    fn decode(&self, bench: &mut Bench, items: &[Share], sequences: &[u32], parts: usize) -> Result<(Vec<u8>, bool)> {
        let Heads { heads, kv_heads, d, kv } = self.shape;
        let mut item_words = vec![0; items.len() * ITEM_WORDS];
        let mut part_words = vec![0; (parts + 1) * PART_WORDS];
        share_out(items, parts, &mut item_words, &mut part_words);
        let uploads = [
            bench.upload(&bf16_bytes(self.q))?,
            bench.upload(&u32_bytes(&item_words))?,
            bench.upload(&u32_bytes(&part_words))?,
            bench.upload(&u32_bytes(self.positions))?,
            bench.upload(&u32_bytes(sequences))?,
            bench.upload(&u32_bytes(&self.cache.tables))?,
            bench.upload(&u32_bytes(&self.cache.starts))?,
        ];
        let partials = parts * 2 * kv_heads * 16;
        let (partial, all_reduce) = (bench.poisoned(partials * d * 4)?, bench.poisoned(partials * 4)?);
        let counters = items.len() * kv_heads * 4;
        let finished = bench.upload(&vec![0; counters])?;
        let bytes = self.positions.len() * heads * d * self.size();
        let out = bench.poisoned(bytes)?;
        let mut arguments = Arguments::default()
            .address(uploads[0].address)
            .address(self.cache.key_buffer.address)
            .address(self.cache.value_buffer.address);
        for upload in &uploads[1..] {
            arguments = arguments.address(upload.address);
        }
        let arguments = arguments
            .address(partial.address)
            .address(all_reduce.address)
            .address(finished.address)
            .address(out.address)
            .f32(self.scale)
            .u32(heads as u32)
            .u32(kv_heads as u32)
            .f32(self.shape.score_scale());
        let tile_rows = items.iter().map(|item| item.rows as usize * self.shape.group()).max().unwrap_or(0);
        let kernel = DecodeKernel::of(d, kv, tile_rows);
        let grid = [parts as u32, kv_heads as u32, 1];
        bench.launch(&kernel.name(self.suffix), grid, 128, kernel.shared_bytes(), arguments)?;
        let clean = bench.read(&finished, counters)?.iter().all(|byte| *byte == 0);
        Ok((bench.read(&out, bytes)?, clean))
    }

    /// Output of all rows. `room`: rounds of values that are transposed at once where the kernel wants that.
    fn prefill(&self, bench: &mut Bench, prompts: &[Prompt], room: usize, hopper: bool) -> Result<Vec<u8>> {
        let Heads { heads, kv_heads, d, kv } = self.shape;
        let transposes = transposes_values(d, kv, hopper);
        let cut = tiles::cut(prompts, self.shape.group(), transposes.then_some(room));
        let uploads = [
            bench.upload(&u32_bytes(self.positions))?,
            bench.upload(&u32_bytes(&self.cache.tables))?,
            bench.upload(&u32_bytes(&self.cache.starts))?,
        ];
        let queries = bench.upload(&bf16_bytes(self.q))?;
        let tiles = bench.upload(&u32_bytes(cut.tiles.as_flattened()))?;
        let listed = bench.upload(&u32_bytes(cut.prompts.as_flattened()))?;
        let transposed = bench.poisoned(if transposes { room * kv_heads * ROUND_TOKENS * d } else { 1 })?;
        let (name, block, shared) = prefill_kernel(d, kv, self.suffix, hopper);
        let bytes = self.positions.len() * heads * d * self.size();
        let out = bench.poisoned(bytes)?;
        for pass in &cut.passes {
            let mut values = self.cache.value_buffer.address;
            if transposes {
                let arguments = Arguments::default()
                    .address(values)
                    .address(listed.address + (pass.first_prompt * PROMPT_WORDS * 4) as u64)
                    .u32(pass.prompts as u32)
                    .address(uploads[1].address)
                    .address(transposed.address);
                let launch = transposing_shape(pass.rounds, kv_heads as u32);
                bench.launch("transpose_values", launch.grid, launch.block, launch.shared, arguments)?;
                values = transposed.address;
            }
            let arguments = Arguments::default()
                .address(queries.address)
                .address(self.cache.key_buffer.address)
                .address(values)
                .address(tiles.address + (pass.first_tile * TILE_WORDS * 4) as u64)
                .address(uploads[0].address)
                .address(uploads[1].address)
                .address(uploads[2].address)
                .address(out.address)
                .f32(self.scale)
                .u32(heads as u32)
                .u32(kv_heads as u32)
                .f32(self.shape.score_scale());
            bench.launch(&name, [kv_heads as u32, pass.tiles as u32, 1], block, shared, arguments)?;
        }
        bench.read(&out, bytes)
    }

    /// Share of the distance allowed between these rows of a prompt's output and the reference.
    fn judge_prefill(&self, found: &[u8], rows: &[(usize, usize)], hopper: bool) -> f64 {
        let found = self.of_rows(found, rows);
        if !transposes_values(self.shape.d, self.shape.kv, hopper) {
            // weights are rounded to bf16 before they meet V
            return compare_activation(&found, &self.wanted(self.q, rows), self.suffix, self.scale) / 2.0;
        }
        let wanted = self.wanted(&rounded_to_e4m3(self.q, self.shape.d), rows);
        if self.suffix == "bf16" {
            distance(&from_bf16(&found), &wanted) / E4M3_WEIGHTS_DISTANCE
        } else {
            compare_activation(&found, &wanted, self.suffix, self.scale) / 2.0
        }
    }
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

/// The kernels for prompts that this device has for heads of `d` numbers: whether for Hopper.
fn prefill_kernels(bench: &Bench, d: usize) -> &'static [bool] {
    if d == 128 && bench.device.hopper { &[false, true] } else { &[false] }
}

pub(super) fn decode_attention(bench: &mut Bench) -> Result<(f64, f64)> {
    let mut worst = 0f64;
    for (heads, kv_heads, d) in [(8, 2, 128), (12, 1, 128), (8, 4, 32), (9, 3, 64), (16, 1, 32), (3, 3, 128)] {
        for kv in [KvDtype::Bf16, KvDtype::Fp8] {
            let shape = Heads { heads, kv_heads, d, kv };
            // items of at most 8 tile rows have a kernel of their own over e4m3
            let smaller = (d == 128 && kv == KvDtype::Fp8 && shape.group() <= 8).then_some(8);
            for (parts, tile_rows) in
                [1, 3, 66].into_iter().flat_map(|parts| [Some(16), smaller].map(|rows| (parts, rows)))
            {
                let Some(tile_rows) = tile_rows else { continue };
                let contexts = [1, 63, 64, 65, 200, 1500, 130, 66, 9, 1000];
                // rows of each sequence: draft tokens that are verified, within a block and across blocks
                let counts = [1, 1, 1, 1, 1, 1, 5, 4, 9, 2];
                let cache = TestCache::new(bench, &contexts, shape, 0.0)?;
                let step = tile_rows / shape.group();
                let (mut positions, mut sequences, mut items) = (vec![], vec![], vec![]);
                let mut rows = Vec::new();
                for (index, (context, count)) in contexts.iter().zip(counts).enumerate() {
                    if index == 2 {
                        // a row that some other kernel owns stands between, and an item of nothing
                        positions.push(0);
                        sequences.push(0);
                        items.push(Share { first_row: 0, rows: 0, blocks: 0 });
                    }
                    for offset in (0..count).step_by(step) {
                        let shared = step.min(count - offset);
                        let last = context - count + offset + shared - 1;
                        items.push(Share {
                            first_row: positions.len() as u32,
                            rows: shared as u32,
                            blocks: (last / 64 + 1) as u32,
                        });
                        for row in offset..offset + shared {
                            rows.push((positions.len(), index));
                            positions.push((context - count + row) as u32);
                            sequences.push(index as u32);
                        }
                    }
                }
                let q = bench.random.bf16s(positions.len() * heads * d, 1.5);
                for (suffix, scale) in [("bf16", 1.0), ("e4m3", 0.01)] {
                    let case = Case { cache: &cache, shape, q: &q, positions: &positions, suffix, scale };
                    let (bytes, clean) = case.decode(bench, &items, &sequences, parts)?;
                    if !clean {
                        worst = f64::INFINITY;
                    }
                    let found = case.of_rows(&bytes, &rows);
                    // weights are rounded to bf16 before they meet V
                    worst = worst.max(compare_activation(&found, &case.wanted(&q, &rows), suffix, scale) / 2.0);
                }
            }
        }
    }
    Ok((worst, 1.0))
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
        let shape = Heads { heads, kv_heads, d, kv };
        // (start, rows): from the beginning, behind a prefix, across blocks, a single token
        let chunks = [(0, 70), (130, 45), (63, 2), (500, 1), (0, 1), (1, 129)];
        let contexts: Vec<usize> = chunks.iter().map(|(start, rows)| start + rows).collect();
        let cache = TestCache::new(bench, &contexts, shape, 0.0)?;
        let (mut positions, mut prompts, mut rows) = (Vec::new(), Vec::new(), Vec::new());
        for (sequence, (start, count)) in chunks.iter().enumerate() {
            let table = cache.starts[sequence] as usize;
            let context = start + count;
            prompts.push(Prompt { sequence, first_row: positions.len(), rows: *count, table, context });
            for row in 0..*count {
                rows.push((positions.len(), sequence));
                positions.push((start + row) as u32);
            }
        }
        let q = bench.random.bf16s(rows.len() * heads * d, 1.5);
        let scale = if suffix == "bf16" { 1.0 } else { 0.01 };
        let case = Case { cache: &cache, shape, q: &q, positions: &positions, suffix, scale };
        for hopper in prefill_kernels(bench, d) {
            // the longest has 4 rounds, all of them 11
            let found = case.prefill(bench, &prompts, 5, *hopper)?;
            worst = worst.max(case.judge_prefill(&found, &rows, *hopper));
        }
    }
    Ok((worst, 1.0))
}

/// The end of a prompt as long as the model's window, and an id behind it. Values have a part in common: what a long sum loses
/// shows there.
pub(super) fn long_attention(bench: &mut Bench) -> Result<(f64, f64)> {
    const ROWS: usize = 96;
    // an emulated GPU would take minutes
    let context = if bench.device.name.contains("emulated") { 4_000 } else { 262_144 };
    let mut worst = 0f64;
    for kv in [KvDtype::Bf16, KvDtype::Fp8] {
        let shape = Heads { heads: 4, kv_heads: 1, d: 128, kv };
        let cache = TestCache::new(bench, &[context], shape, 0.5)?;
        let positions: Vec<u32> = (context - ROWS..context).map(|position| position as u32).collect();
        let q = bench.random.bf16s(ROWS * shape.heads * shape.d, 1.5);
        let case = Case { cache: &cache, shape, q: &q, positions: &positions, suffix: "bf16", scale: 1.0 };
        let prompt = Prompt { sequence: 0, first_row: 0, rows: ROWS, table: 0, context };
        for hopper in prefill_kernels(bench, shape.d) {
            let found = case.prefill(bench, &[prompt], context.div_ceil(ROUND_TOKENS), *hopper)?;
            worst = worst.max(case.judge_prefill(&found, &[(0, 0), (50, 0), (ROWS - 1, 0)], *hopper));
        }
        let last = Share { first_row: ROWS as u32 - 1, rows: 1, blocks: context.div_ceil(64) as u32 };
        let kernel = DecodeKernel::of(shape.d, kv, shape.group());
        let parts = kernel.parts(bench.device.multiprocessors, shape.kv_heads);
        let (found, clean) = case.decode(bench, &[last], &[0; ROWS], parts)?;
        if !clean {
            worst = f64::INFINITY;
        }
        let rows = [(ROWS - 1, 0)];
        let wanted = case.wanted(&q, &rows);
        worst = worst.max(compare_activation(&case.of_rows(&found, &rows), &wanted, "bf16", 1.0) / 2.0);
    }
    Ok((worst, 1.0))
}
