//! The CPU backend against the logits of the reference, for any chunks and batches.

mod support;

use bora_worker::backend::cpu::CpuOptions;
use bora_worker::backend::{Fp8Mode, KvDtype};
use support::{Chunk, Goldens, KV_BLOCKS, Rank, argmax, blocks, difference, fixture, logsumexp, single};

const CHECKPOINTS: [&str; 4] = ["tiny_text", "tiny_text_fp8", "tiny_vlm", "tiny_vlm_fp8"];
const CASES: [&str; 4] = ["short", "code", "long", "card_small_talk"];

/// Maximum difference of two correct float32 implementations.
const FLOAT32: f32 = 2e-3;
/// Maximum difference of the same implementation with other chunks or batches.
const SAME: f32 = 1e-4;

fn all_blocks() -> Vec<u32> {
    (0..KV_BLOCKS as u32).rev().collect()
}

/// The rows that a golden stores completely.
fn kept(goldens: &Goldens, case: &str, kind: &str, rows: &[Vec<f32>]) -> (Vec<Vec<f32>>, Vec<Vec<f32>>) {
    let positions = goldens.ids(&format!("{case}.{kind}positions"));
    let ours: Vec<Vec<f32>> = positions.iter().map(|position| rows[*position as usize].clone()).collect();
    let flat = goldens.floats(&format!("{case}.{kind}logits"));
    let theirs = flat.chunks_exact(ours[0].len()).map(<[f32]>::to_vec).collect();
    (ours, theirs)
}

#[test]
fn matches_the_logits_of_the_reference() {
    for checkpoint in CHECKPOINTS {
        let goldens = Goldens::of(checkpoint);
        let mut rank = single(&fixture(checkpoint), CpuOptions::default());
        let (mut positions_seen, mut flipped) = (0, 0);
        for case in CASES {
            let ids = goldens.ids(&format!("{case}.input_ids"));
            let rows = rank.run_in_chunks(&ids, &all_blocks(), ids.len());
            let (ours, theirs) = kept(&goldens, case, "", &rows);
            let off = difference(&ours, &theirs);
            assert!(off < FLOAT32, "{checkpoint} {case}: logits are off by {off}");
            let sums = goldens.floats(&format!("{case}.logsumexp"));
            for (position, (row, expected)) in rows.iter().zip(sums).enumerate() {
                let sum = logsumexp(row);
                assert!((sum - expected).abs() < FLOAT32, "{checkpoint} {case} {position}: {sum}, not {expected}");
            }
            let argmaxes = goldens.ids(&format!("{case}.argmax"));
            for (row, expected) in rows.iter().zip(argmaxes) {
                positions_seen += 1;
                if argmax(row) != expected {
                    // another argmax is allowed only if the two candidates are nearly equal
                    let gap = row[argmax(row) as usize] - row[expected as usize];
                    assert!(gap < FLOAT32, "{checkpoint} {case}: another argmax, by {gap}");
                    flipped += 1;
                }
            }
            println!("{checkpoint} {case}: {} tokens, largest difference {off:.2e}", ids.len());
        }
        assert!(flipped <= 2, "{checkpoint}: {flipped} of {positions_seen} argmaxes differ");
    }
}

#[test]
fn matches_the_greedy_tokens_of_the_reference() {
    for checkpoint in CHECKPOINTS {
        let goldens = Goldens::of(checkpoint);
        let text = std::fs::read_to_string(fixture(checkpoint).join("goldens.json")).unwrap();
        let notes: serde_json::Value = serde_json::from_str(&text).unwrap();
        let mut rank = single(&fixture(checkpoint), CpuOptions::default());
        let mut compared = 0;
        for case in CASES {
            let margin = notes["cases"][case]["greedy_min_margin"].as_f64().unwrap();
            if margin < f64::from(FLOAT32) {
                continue;
            }
            compared += 1;
            let expected = goldens.ids(&format!("{case}.greedy_ids"));
            let prompt = goldens.ids(&format!("{case}.input_ids"));
            let ids = rank.greedy(&prompt, &all_blocks(), expected.len());
            assert_eq!(ids, expected, "{checkpoint} {case}");
        }
        assert!(compared >= 3, "{checkpoint}: {compared}");
    }
}

/// Rounding to FP8 makes the comparison chaotic. If the last bit of an activation decides on which side of a rounding
/// boundary it falls, two correct implementations differ by a whole e4m3 step, and every later position reads a
/// slightly different cache. Until the first such step ours and the reference agree to 3e-6 (that is most of each case
/// but the longest). After it they differ by hundredths and in single rows by up to 0.55, as two reference
/// implementations do among themselves. This changes the argmax only if two candidates are nearly equal.
#[test]
fn stays_close_to_the_reference_with_static_fp8() {
    let options = CpuOptions { fp8: Fp8Mode::W8a8, ..CpuOptions::default() };
    for checkpoint in ["tiny_text_fp8", "tiny_vlm_fp8"] {
        let goldens = Goldens::of(checkpoint);
        let mut rank = single(&fixture(checkpoint), options);
        let mut differences = Vec::new();
        for case in CASES {
            let ids = goldens.ids(&format!("{case}.input_ids"));
            let rows = rank.run_in_chunks(&ids, &all_blocks(), ids.len());
            let (ours, theirs) = kept(&goldens, case, "w8a8_", &rows);
            for (ours, theirs) in ours.iter().zip(&theirs) {
                assert_eq!(argmax(ours), argmax(theirs), "{checkpoint} {case}: the argmax of a stored position");
                differences.extend(ours.iter().zip(theirs).map(|(ours, theirs)| (ours - theirs).abs()));
            }
            let mut agreed = 0;
            for (row, expected) in rows.iter().zip(goldens.ids(&format!("{case}.w8a8_argmax"))) {
                let gap = row[argmax(row) as usize] - row[expected as usize];
                assert!(gap < 0.6, "{checkpoint} {case}: another argmax, by {gap}");
                agreed += usize::from(gap == 0.0);
            }
            let share = agreed as f64 / ids.len() as f64;
            println!("{checkpoint} {case}: argmaxes agree at {:.2} %", share * 100.0);
            assert!(share >= if case == "card_small_talk" { 0.95 } else { 0.99 }, "{checkpoint} {case}: {share}");
            let sums = goldens.floats(&format!("{case}.w8a8_logsumexp"));
            let first_step = rows.iter().zip(&sums).position(|(row, sum)| (logsumexp(row) - sum).abs() > 1e-4);
            assert!(first_step.is_none_or(|position| position > 80), "{checkpoint} {case}: {first_step:?}");
        }
        differences.sort_by(f32::total_cmp);
        let median = differences[differences.len() / 2];
        println!("{checkpoint}: median difference {median:.2e}");
        assert!(median < 0.1, "{checkpoint}: {median}");
    }
}

#[test]
fn computes_the_same_logits_with_any_chunk_size() {
    for checkpoint in ["tiny_text", "tiny_vlm"] {
        let goldens = Goldens::of(checkpoint);
        let ids = goldens.ids("long.input_ids");
        let mut rank = single(&fixture(checkpoint), CpuOptions::default());
        let whole = rank.run_in_chunks(&ids, &blocks(0, ids.len()), ids.len());
        for chunk in [1, 7, 64, 100] {
            let rows = rank.run_in_chunks(&ids, &blocks(20, ids.len()), chunk);
            let off = difference(&rows, &whole);
            assert!(off < SAME, "{checkpoint}: chunks of {chunk} are off by {off}");
        }
    }
}

#[test]
fn computes_the_same_logits_in_any_batch() {
    let goldens = Goldens::of("tiny_vlm");
    let mut rank = single(&fixture("tiny_vlm"), CpuOptions::default());
    let prompts: Vec<Vec<u32>> = CASES.iter().map(|case| goldens.ids(&format!("{case}.input_ids"))).collect();
    let mut first_block = 0;
    let tables: Vec<Vec<u32>> = prompts
        .iter()
        .map(|ids| {
            let table = blocks(first_block, ids.len());
            first_block += table.len() as u32;
            table
        })
        .collect();
    let plain: Vec<Vec<Vec<f32>>> =
        prompts.iter().zip(&tables).map(|(ids, table)| rank.run_in_chunks(ids, table, ids.len())).collect();
    // each sequence advances by its own chunk, so that every step mixes decodes with chunks of prompts
    let chunks = [1, 5, 37, 200];
    let mut rows: Vec<Vec<Vec<f32>>> = vec![Vec::new(); prompts.len()];
    loop {
        let parts: Vec<Chunk<'_>> = (0..prompts.len())
            .filter(|index| rows[*index].len() < prompts[*index].len())
            .map(|index| {
                let start = rows[index].len();
                let end = prompts[index].len().min(start + chunks[index]);
                Chunk { slot: index as u32, start, ids: &prompts[index][start..end], blocks: tables[index].clone() }
            })
            .collect();
        if parts.is_empty() {
            break;
        }
        for (part, logits) in parts.iter().zip(rank.run(&parts)) {
            rows[part.slot as usize].extend(logits);
        }
    }
    for (case, (rows, plain)) in CASES.iter().zip(rows.iter().zip(&plain)) {
        let off = difference(rows, plain);
        assert!(off < SAME, "{case} is off by {off}");
    }
}

#[test]
fn computes_the_same_logits_with_shared_prefix_blocks() {
    let goldens = Goldens::of("tiny_vlm");
    let mut rank = single(&fixture("tiny_vlm"), CpuOptions::default());
    let first = goldens.ids("long.input_ids");
    // another suffix after a common prefix of 128 tokens
    let mut second = first.clone();
    for id in &mut second[128..] {
        *id = (*id + 1) % 9192;
    }
    let plain = rank.run_in_chunks(&second, &blocks(40, second.len()), second.len());
    let table = blocks(0, first.len());
    rank.run_in_chunks(&first, &table, first.len());
    let mut shared = table[..2].to_vec();
    shared.extend(blocks(20, second.len() - 128));
    let part = Chunk { slot: 1, start: 128, ids: &second[128..], blocks: shared };
    let rows = rank.run(&[part]).remove(0);
    let off = difference(&rows, &plain[128..]);
    assert!(off < SAME, "off by {off}");
}

#[test]
fn stays_close_with_a_bf16_cache() {
    let goldens = Goldens::of("tiny_text");
    let ids = goldens.ids("long.input_ids");
    let run = |options| -> Vec<Vec<f32>> {
        let mut rank: Rank = single(&fixture("tiny_text"), options);
        rank.run_in_chunks(&ids, &all_blocks(), 100)
    };
    let exact = run(CpuOptions::default());
    let rounded = run(CpuOptions { kv: KvDtype::Bf16, ..CpuOptions::default() });
    let off = difference(&rounded, &exact);
    // the whole forward in bfloat16 is off by 0.8
    assert!(off > 0.0 && off < 0.8, "{off}");
}
