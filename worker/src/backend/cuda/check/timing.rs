//! Every kernel at the shapes of the 24B model, by graph replay, beside its floor: the bytes it must move over
//! the memory's bandwidth, or its operations over the tensor cores' rate, the larger one, by the datasheet of the card that it runs on.

use serde_json::json;

use super::super::attention::{prefill_kernel, transposes_values, transposing_shape};
use super::super::decode_kernel::DecodeKernel;
use super::super::driver::{Address, Arguments, Buffer, Event};
use super::super::matmul::{Formats, GemmShape, Matmul, Operands};
use super::super::sampler::Sampler;
use super::super::split_kv::{ITEM_WORDS, PART_WORDS, Share, share_out};
use super::super::survey;
use super::super::tiles::{self, Prompt, ROUND_TOKENS};
use super::Outcome;
use super::kernels::Bench;
use super::reference::{f32_bytes, u32_bytes};
use crate::backend::KvDtype;
use crate::backend::{Limits, Result, SampleRequest};
use crate::engine::step::Admission;
use crate::sample::SamplingParams;
use crate::telemetry::roofline::{Rates, rates};

const HIDDEN: usize = 5120;
const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const D: usize = 128;
const INTERMEDIATE: usize = 32_768;
const VOCABULARY: usize = 131_072;
/// More than the L2 cache holds, so that repeats don't read from it.
const PAST_CACHE: usize = 256 << 20;

/// What a kernel computes with.
#[derive(Clone, Copy)]
enum Arithmetic {
    Fp8,
    Bf16,
    /// So little that only its bytes count.
    Little,
}

/// Where the timings go, with the datasheet's rates of the card that they are of.
struct Report<'a> {
    outcome: &'a mut dyn FnMut(Outcome),
    rates: Option<Rates>,
}

pub(super) fn run(only: &str, outcome: &mut dyn FnMut(Outcome)) {
    let opened = survey(0..1, 1).map_err(|error| error.to_string());
    let opened = opened.and_then(|names| Ok((names, Bench::open().map_err(|error| error.to_string())?)));
    let (names, mut bench) = match opened {
        Ok(opened) => opened,
        Err(error) => return outcome(Outcome::failure("open the GPU", error)),
    };
    let rates = names.first().and_then(|name| rates(name));
    let mut report = Report { outcome, rates };
    type Timing = fn(&mut Bench, &mut Report<'_>) -> Result<()>;
    let timings: [(&str, Timing); 6] = [
        ("ceiling", ceiling),
        ("linear", linears),
        ("gemm", gemms),
        ("rowwise", rowwise),
        ("attention", attention),
        ("sample", sample),
    ];
    for (name, timing) in timings {
        if name.contains(only)
            && let Err(error) = timing(&mut bench, &mut report)
        {
            (report.outcome)(Outcome::failure(name, error));
        }
    }
}

/// Microseconds a call: `calls` of them in a graph, replayed; the median of seven replays.
fn microseconds(bench: &mut Bench, calls: usize, mut body: impl FnMut(&mut Bench, usize) -> Result<()>) -> Result<f64> {
    body(bench, 0)?;
    bench.device.synchronize()?;
    bench.device.begin_capture()?;
    let outcome = (0..calls).try_for_each(|call| body(bench, call));
    let graph = bench.device.end_capture();
    outcome?;
    let graph = graph?;
    let (start, end) = (Event::new(true)?, Event::new(true)?);
    let mut times = Vec::new();
    for replay in 0..9 {
        start.record(&bench.device)?;
        bench.device.replay(&graph)?;
        end.record(&bench.device)?;
        end.wait()?;
        if replay >= 2 {
            times.push(end.since(&start)?);
        }
    }
    times.sort_by(f32::total_cmp);
    Ok(f64::from(times[times.len() / 2]) * 1e3 / calls as f64)
}

fn report_load(report: &mut Report<'_>, name: String, microseconds: f64, bytes: f64, operations: f64, by: Arithmetic) {
    let floor = report.rates.map(|rates| {
        let arithmetic = match by {
            Arithmetic::Fp8 => operations / rates.fp8,
            Arithmetic::Bf16 => operations / rates.bf16,
            Arithmetic::Little => 0.0,
        };
        (bytes / rates.bytes).max(arithmetic) * 1e6
    });
    let details = json!({
        "us": (microseconds * 100.0).round() / 100.0,
        "floor_us": floor.map(|floor| (floor * 100.0).round() / 100.0),
        "share": floor.map(|floor| (floor / microseconds * 1000.0).round() / 1000.0),
        "gb_s": (bytes / microseconds / 1e3).round(),
        "tflop_s": (operations / microseconds / 1e6).round(),
    });
    (report.outcome)(Outcome::timing(name, details));
}

fn random_bytes(bench: &mut Bench, bytes: usize, fp8: bool, deviation: f32) -> Result<Buffer> {
    let buffer = Buffer::new(bytes, "a timing")?;
    let (name, size) = if fp8 { ("random_e4m3", 1) } else { ("random_bf16", 2) };
    let columns = 4096;
    // whole rows; a tail of less than one row stays as it is
    for first in (0..bytes / size / columns).step_by(32_768) {
        let rows = (bytes / size / columns - first).min(32_768);
        let arguments = Arguments::default()
            .address(buffer.address)
            .u32(columns as u32)
            .u64(77)
            .u64(columns as u64)
            .u64(0)
            .u64(0)
            .f32(deviation)
            .u32(first as u32);
        bench.launch(name, [4, rows as u32, 1], 256, 0, arguments)?;
    }
    Ok(buffer)
}

fn ceiling(bench: &mut Bench, report: &mut Report<'_>) -> Result<()> {
    let bytes = 2usize << 30;
    let buffer = random_bytes(bench, bytes, true, 80.0)?;
    let out = bench.poisoned(256)?;
    for blocks in [1, 2, 4] {
        let grid = [bench.device.multiprocessors * blocks, 1, 1];
        let us = microseconds(bench, 2, |bench, _| {
            let arguments = Arguments::default().address(buffer.address).u64(bytes as u64 / 16).address(out.address);
            bench.launch("read_ceiling", grid, 512, 0, arguments)
        })?;
        report_load(report, format!("read 2 GiB, {blocks} blocks of 512"), us, bytes as f64, 0.0, Arithmetic::Little);
    }
    Ok(())
}

fn linears(bench: &mut Bench, report: &mut Report<'_>) -> Result<()> {
    let shapes = [
        ("qkv", (HEADS + 2 * KV_HEADS) * D, HIDDEN, true),
        ("o", HIDDEN, HEADS * D, true),
        ("gate_up", 2 * INTERMEDIATE, HIDDEN, true),
        ("down", HIDDEN, INTERMEDIATE, true),
        ("head", VOCABULARY, HIDDEN, false),
    ];
    for (what, n, k, fp8) in shapes {
        let row_bytes = k * if fp8 { 1 } else { 2 };
        let copies = PAST_CACHE.div_ceil(n * row_bytes).min(8);
        let weights = random_bytes(bench, n * row_bytes * copies, fp8, if fp8 { 80.0 } else { 0.02 })?;
        let x = random_bytes(bench, 64 * row_bytes, fp8, if fp8 { 60.0 } else { 1.0 })?;
        let y = Buffer::new(256 * n * 4, "a timing")?;
        let at = |call: usize| weights.address + (call % copies * n * row_bytes) as u64;
        for m in [1usize, 8, 16] {
            let (columns, stages) = match m {
                0..=8 => (8, 5),
                9..=16 => (16, 4),
                _ => (32, 3),
            };
            for splits in [1usize, 2, 4, 8] {
                if splits > row_bytes / 1024 || (n > 8192 && splits > 1) || (splits == 8 && k < 8192) {
                    continue;
                }
                let name = format!("linear_{}_{columns}", if fp8 { "e4m3" } else { "bf16" });
                let grid = [bench.device.multiprocessors.min((n / 32 * splits) as u32), 1, 1];
                let shared = 8 * stages * (32 + columns) * 128 + 8 * columns * 33 * 4;
                let us = microseconds(bench, copies.max(4), |bench, call| {
                    let arguments = Arguments::default()
                        .address(at(call))
                        .address(x.address)
                        .address(y.address)
                        .u32(m as u32)
                        .u32(n as u32)
                        .u32(row_bytes as u32)
                        .u32(splits as u32);
                    let shape = super::super::driver::Shape { grid, block: 256, shared };
                    bench.kernels.launch(&bench.device, &name, shape, arguments, true)
                })?;
                report_load(
                    report,
                    format!("linear {what} m {m} splits {splits}"),
                    us,
                    (n * row_bytes) as f64,
                    0.0,
                    Arithmetic::Little,
                );
            }
        }
        let formats = if fp8 { Formats::E4m3ToBf16 } else { Formats::Bf16ToF32 };
        for m in [16usize, 32, 64] {
            bench.matmul.run(
                &bench.device,
                GemmShape { m, n, k, formats },
                Operands { x: x.address, w: at(0), y: y.address },
            )?;
            let us = microseconds(bench, copies.max(4), |bench, call| {
                bench.matmul.run(
                    &bench.device,
                    GemmShape { m, n, k, formats },
                    Operands { x: x.address, w: at(call), y: y.address },
                )
            })?;
            let operations = 2.0 * m as f64 * n as f64 * k as f64;
            report_load(
                report,
                format!("cublaslt {what} m {m}"),
                us,
                (n * row_bytes) as f64,
                operations,
                if fp8 { Arithmetic::Fp8 } else { Arithmetic::Bf16 },
            );
        }
    }
    Ok(())
}

fn gemms(bench: &mut Bench, report: &mut Report<'_>) -> Result<()> {
    for (what, n, k) in [
        ("qkv", 6144, HIDDEN),
        ("o", HIDDEN, 4096),
        ("gate_up", 2 * INTERMEDIATE, HIDDEN),
        ("down", HIDDEN, INTERMEDIATE),
    ] {
        let weights = random_bytes(bench, n * k, true, 80.0)?;
        for m in [128usize, 256, 1024, 8192] {
            let x = random_bytes(bench, m * k, true, 60.0)?;
            let y = Buffer::new(Matmul::padded_rows(m) * n * 2, "a timing")?;
            let run = |bench: &mut Bench, _: usize| {
                bench.matmul.run(
                    &bench.device,
                    GemmShape { m, n, k, formats: Formats::E4m3ToBf16 },
                    Operands { x: x.address, w: weights.address, y: y.address },
                )
            };
            run(bench, 0)?;
            let us = microseconds(bench, 3, run)?;
            let bytes = (n * k + m * k + 2 * m * n) as f64;
            report_load(
                report,
                format!("cublaslt {what} m {m}"),
                us,
                bytes,
                2.0 * m as f64 * n as f64 * k as f64,
                Arithmetic::Fp8,
            );
        }
    }
    Ok(())
}

fn rowwise(bench: &mut Bench, report: &mut Report<'_>) -> Result<()> {
    for rows in [1usize, 8, 64, 8192] {
        let few = rows <= 32;
        let (splits, size) = if few { (4, 4) } else { (1, 2) };
        let wide = random_bytes(bench, rows * 2 * INTERMEDIATE * size, false, 1.0)?;
        let partial = random_bytes(bench, rows * 6144 * size * splits, false, 1.0)?;
        let residual = random_bytes(bench, rows * HIDDEN * 4, false, 0.1)?;
        let gain = random_bytes(bench, 8192 * 2, false, 1.0)?;
        let out = bench.poisoned(rows * INTERMEDIATE)?;
        let input = if few { "f32" } else { "bf16" };
        let us = microseconds(bench, 20, |bench, _| {
            let arguments = Arguments::default()
                .address(residual.address)
                .address(partial.address)
                .u32(splits as u32)
                .u64((rows * HIDDEN) as u64)
                .f32(1e-3)
                .address(gain.address)
                .address(out.address)
                .f32(0.02)
                .address(0)
                .u32(HIDDEN as u32)
                .f32(1e-5);
            bench.launch(&format!("add_{input}_norm_to_e4m3"), [rows as u32, 1, 1], 1024, HIDDEN as u32 * 4, arguments)
        })?;
        report_load(
            report,
            format!("norm rows {rows}"),
            us,
            (rows * HIDDEN * (splits * size + 9)) as f64,
            0.0,
            Arithmetic::Little,
        );
        let us = microseconds(bench, 20, |bench, _| {
            let arguments = Arguments::default()
                .address(wide.address)
                .u32(1)
                .u64(0)
                .f32(1e-3)
                .f32(1e-3)
                .address(out.address)
                .f32(0.05)
                .u32(INTERMEDIATE as u32);
            bench.launch(&format!("gate_{input}_to_e4m3"), [32, rows as u32, 1], 256, 0, arguments)
        })?;
        report_load(
            report,
            format!("gate rows {rows}"),
            us,
            (rows * INTERMEDIATE * (2 * size + 1)) as f64,
            0.0,
            Arithmetic::Little,
        );
        let (q, cache) =
            (bench.poisoned(rows * HEADS * D * 2)?, bench.poisoned(rows.div_ceil(64) * KV_HEADS * 64 * D * 4)?);
        let angles = random_bytes(bench, rows * D * 4, false, 1.0)?;
        let scales = bench.upload(&f32_bytes(&vec![1.0; rows]))?;
        let places = bench.upload(&u32_bytes(&(0..rows as u32).collect::<Vec<_>>()))?;
        let plane = (rows.div_ceil(64) * KV_HEADS * 64 * D * 2) as Address;
        let us = microseconds(bench, 20, |bench, _| {
            let arguments = Arguments::default()
                .address(partial.address)
                .u32(splits as u32)
                .u64((rows * 6144) as u64)
                .f32(1e-3)
                .f32(1e-3)
                .f32(1e-3)
                .address(q.address)
                .address(cache.address)
                .address(cache.address + plane)
                .address(angles.address)
                .address(scales.address)
                .address(places.address)
                .u32(HEADS as u32)
                .u32(KV_HEADS as u32)
                .u32(D as u32);
            bench.launch(&format!("rope_{input}_kv_bf16"), [rows as u32, if few { 6 } else { 1 }, 1], 256, 0, arguments)
        })?;
        report_load(
            report,
            format!("rope rows {rows}"),
            us,
            (rows * 6144 * (splits * size + 2)) as f64,
            0.0,
            Arithmetic::Little,
        );
    }
    Ok(())
}

fn attention(bench: &mut Bench, report: &mut Report<'_>) -> Result<()> {
    for kv in [KvDtype::Bf16, KvDtype::Fp8] {
        // sequences, rows of each (more than one: draft tokens that are verified), context
        for (sequences, each, context) in [
            (1usize, 1usize, 1024usize),
            (8, 1, 1024),
            (1, 1, 32_768),
            (1, 1, 131_072),
            (1, 1, 262_144),
            (32, 1, 1024),
            (128, 1, 1024),
            (16, 1, 13_312),
            (4, 1, 32_768),
            (1, 4, 32_768),
            (1, 16, 32_768),
            (8, 4, 1024),
        ] {
            let rows = sequences * each;
            let blocks = context / 64;
            let plane = sequences * blocks * KV_HEADS * 64 * D * kv.size();
            // several layers' worth, past the cache
            let layers = PAST_CACHE.div_ceil(2 * plane).clamp(1, 40);
            let cache = random_bytes(bench, 2 * plane * layers, kv == KvDtype::Fp8, 1.0)?;
            let q = random_bytes(bench, (rows * HEADS * D * 2).max(8192), false, 1.0)?;
            // four rows of a sequence share a tile with their heads
            let items: Vec<Share> = (0..sequences)
                .flat_map(|sequence| (0..each).step_by(4).map(move |row| (sequence * each + row, (each - row).min(4))))
                .map(|(first, rows)| Share { first_row: first as u32, rows: rows as u32, blocks: blocks as u32 })
                .collect();
            let kernel = DecodeKernel::of(D, kv, each.min(4) * HEADS / KV_HEADS);
            let parts = kernel.parts(bench.device.multiprocessors, KV_HEADS);
            let mut item_words = vec![0; items.len() * ITEM_WORDS];
            let mut part_words = vec![0; (parts + 1) * PART_WORDS];
            share_out(&items, parts, &mut item_words, &mut part_words);
            let items = bench.upload(&u32_bytes(&item_words))?;
            let shares = bench.upload(&u32_bytes(&part_words))?;
            let positions: Vec<u32> = (0..rows).map(|row| (context - each + row % each) as u32).collect();
            let positions = bench.upload(&u32_bytes(&positions))?;
            let owners = bench.upload(&u32_bytes(&(0..rows).map(|row| (row / each) as u32).collect::<Vec<_>>()))?;
            let tables = bench.upload(&u32_bytes(&(0..(sequences * blocks) as u32).rev().collect::<Vec<_>>()))?;
            let starts = bench.upload(&u32_bytes(&(0..sequences).map(|s| (s * blocks) as u32).collect::<Vec<_>>()))?;
            let partial = bench.poisoned(parts * 2 * KV_HEADS * 16 * D * 4)?;
            let all_reduce = bench.poisoned(parts * 2 * KV_HEADS * 16 * 4)?;
            let finished = bench.upload(&vec![0; rows * KV_HEADS * 4])?;
            let out = bench.poisoned(rows * HEADS * D)?;
            let us = microseconds(bench, layers.max(4), |bench, call| {
                let keys = cache.address + (call % layers * 2 * plane) as u64;
                let arguments = Arguments::default()
                    .address(q.address)
                    .address(keys)
                    .address(keys + plane as u64)
                    .address(items.address)
                    .address(shares.address)
                    .address(positions.address)
                    .address(owners.address)
                    .address(tables.address)
                    .address(starts.address)
                    .address(partial.address)
                    .address(all_reduce.address)
                    .address(finished.address)
                    .address(out.address)
                    .f32(0.02)
                    .u32(HEADS as u32)
                    .u32(KV_HEADS as u32)
                    .f32(std::f32::consts::LOG2_E / (D as f32).sqrt());
                let grid = [parts as u32, KV_HEADS as u32, 1];
                bench.launch(&kernel.name("e4m3"), grid, 128, kernel.shared_bytes(), arguments)
            })?;
            report_load(
                report,
                format!("decode attention {} {sequences} x {each} rows context {context}", kv.name()),
                us,
                2.0 * plane as f64,
                0.0,
                Arithmetic::Little,
            );
        }
        for (start, count) in [(0usize, 8192usize), (24_576, 8192), (122_880, 8192), (8192, 1024)] {
            let blocks = (start + count) / 64;
            let plane = blocks * KV_HEADS * 64 * D * kv.size();
            let cache = random_bytes(bench, 2 * plane, kv == KvDtype::Fp8, 1.0)?;
            let q = random_bytes(bench, count * HEADS * D * 2, false, 1.0)?;
            let positions = bench.upload(&u32_bytes(&(start as u32..(start + count) as u32).collect::<Vec<_>>()))?;
            let tables = bench.upload(&u32_bytes(&(0..blocks as u32).rev().collect::<Vec<_>>()))?;
            let starts = bench.upload(&u32_bytes(&[0]))?;
            let transposes = transposes_values(D, kv, bench.device.hopper);
            let rounds = (start + count).div_ceil(ROUND_TOKENS);
            let prompt = Prompt { sequence: 0, first_row: 0, rows: count, table: 0, context: start + count };
            let cut = tiles::cut(&[prompt], HEADS / KV_HEADS, transposes.then_some(rounds));
            let tile_buffer = bench.upload(&u32_bytes(cut.tiles.as_flattened()))?;
            let prompts = bench.upload(&u32_bytes(cut.prompts.as_flattened()))?;
            let transposed = bench.poisoned(if transposes { rounds * KV_HEADS * ROUND_TOKENS * D } else { 1 })?;
            let out = bench.poisoned(count * HEADS * D)?;
            let (name, block, shared) = prefill_kernel(D, kv, "e4m3", bench.device.hopper);
            let us = microseconds(bench, 2, |bench, _| {
                let mut values = cache.address + plane as u64;
                if transposes {
                    let arguments = Arguments::default()
                        .address(values)
                        .address(prompts.address)
                        .u32(1)
                        .address(tables.address)
                        .address(transposed.address);
                    let launch = transposing_shape(rounds, KV_HEADS as u32);
                    bench.launch("transpose_values", launch.grid, launch.block, launch.shared, arguments)?;
                    values = transposed.address;
                }
                let arguments = Arguments::default()
                    .address(q.address)
                    .address(cache.address)
                    .address(values)
                    .address(tile_buffer.address)
                    .address(positions.address)
                    .address(tables.address)
                    .address(starts.address)
                    .address(out.address)
                    .f32(0.02)
                    .u32(HEADS as u32)
                    .u32(KV_HEADS as u32)
                    .f32(std::f32::consts::LOG2_E / (D as f32).sqrt());
                bench.launch(&name, [KV_HEADS as u32, cut.tiles.len() as u32, 1], block, shared, arguments)
            })?;
            let pairs = count as f64 * start as f64 + count as f64 * (count as f64 + 1.0) / 2.0;
            report_load(
                report,
                format!("{name} {count} behind {start}"),
                us,
                2.0 * plane as f64,
                4.0 * HEADS as f64 * D as f64 * pairs,
                if transposes { Arithmetic::Fp8 } else { Arithmetic::Bf16 },
            );
        }
    }
    Ok(())
}

fn sample(bench: &mut Bench, report: &mut Report<'_>) -> Result<()> {
    let slots = 64;
    let limits = Limits { step_tokens: 64, sequences: slots, model_len: 128, logit_rows: slots };
    let mut sampler = Sampler::new(&bench.device, &limits, VOCABULARY)?;
    let logits = Buffer::new(slots * VOCABULARY * 4, "a timing")?;
    let elements = bench.random.normals(VOCABULARY, 3.0);
    for row in 0..slots {
        // SAFETY: the buffer has `slots` rows of the vocabulary.
        unsafe {
            bench.device.upload(logits.address + (row * VOCABULARY * 4) as u64, &f32_bytes(&elements), "a timing")?;
        }
    }
    let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let plain = SamplingParams { temperature: 0.15, ..SamplingParams::default() };
    let filtered = SamplingParams { temperature: 0.7, top_p: 0.9, top_k: 50, ..SamplingParams::default() };
    for (what, params) in [("greedy", greedy), ("temperature", plain), ("top-k and top-p", filtered)] {
        for slot in 0..slots as u32 {
            let admission =
                Admission { slot, sampling: params.clone(), prompt_ids: Vec::new(), generated_ids: Vec::new() };
            sampler.admit(&bench.device, &mut bench.kernels, &admission)?;
        }
        for rows in [1usize, 64] {
            let requests: Vec<SampleRequest> = (0..rows as u32)
                .map(|row| SampleRequest::Next { row, slot: row, position: 9, drafts: Vec::new(), masks: Vec::new() })
                .collect();
            let mut times = Vec::new();
            for _ in 0..7 {
                sampler.step_begins(&bench.device)?;
                sampler.sample(&bench.device, &mut bench.kernels, logits.address, &requests)?;
                times.push(sampler.collect()?.seconds * 1e6);
            }
            times.sort_by(f64::total_cmp);
            report_load(
                report,
                format!("sample {what} rows {rows}"),
                times[3],
                (rows * VOCABULARY * 4) as f64,
                0.0,
                Arithmetic::Little,
            );
        }
    }
    Ok(())
}
