//! Heads of the real models' size, which no golden model has: random weights, prompts whole, in chunks, and two in a step, against
//! the CPU backend.

use std::path::Path;

use bora_common::blocks::BLOCK_TOKENS;
use bora_common::model::ModelConfig;
use serde_json::{Value, json};

use super::super::CudaOptions;
use super::Outcome;
use super::models::{BLOCKS, Failure, LIMITS, open_model};
use super::reference::{Random, distance};
use crate::backend::cpu::{CpuBackend, CpuOptions};
use crate::backend::{Backend, Batch, BatchSequence, Fp8Mode, KvDtype, RankSetup, Result};
use crate::model::{KvShape, Ministral3};
use crate::parallel::SingleRank;
use crate::weights::{ShardPlan, Weights};

/// ||found - expected|| / ||expected|| of logits: bf16 between kernels; if the cache is e4m3, queries and the weights of attention too.
const BF16_DISTANCE: f64 = 0.01;
const E4M3_DISTANCE: f64 = 0.02;

/// (query heads, heads of keys and values): as in the 24B, and as in the 123B, where a tile ends within a row.
const SHAPES: [(usize, usize); 2] = [(8, 2), (12, 1)];

/// Tokens of the first prompt, and of the second one, most of which a step before computes: together more than
/// are transposed in one pass where the cache is e4m3.
const FIRST: usize = 700;
const SECOND: (usize, usize) = (1_300, 300);

/// Some rows of a sequence.
struct Part<'a> {
    ids: &'a [u32],
    start: usize,
    first_block: u32,
}

pub(super) fn run(fixtures: &Path, options: CudaOptions, only: &str, report: &mut dyn FnMut(Outcome)) {
    for (heads, kv_heads) in SHAPES {
        let overlap = if options.overlap { "" } else { " no overlap" };
        let name = format!("heads of 128, {heads} over {kv_heads} kv {}{overlap}", options.kv.name());
        if name.contains(only) {
            let outcome = check(fixtures, (heads, kv_heads), options);
            report(outcome.map_or_else(
                |error| Outcome::failure(&name, error),
                |(passed, details)| Outcome::check(&name, passed, details),
            ));
        }
    }
}

fn check(fixtures: &Path, (heads, kv_heads): (usize, usize), options: CudaOptions) -> Result<(bool, Value), Failure> {
    let text = std::fs::read_to_string(fixtures.join("tiny_text/config.json"))?;
    let mut config: Value = serde_json::from_str(&text)?;
    for (key, value) in
        [("head_dim", 128), ("num_attention_heads", heads), ("num_key_value_heads", kv_heads), ("hidden_size", 256)]
    {
        config[key] = json!(value);
    }
    let config = ModelConfig::from_huggingface(&config.to_string())?;
    let weights = Weights::dummy(&config, 7);
    let plan = ShardPlan::new(&config, 0, 1)?;

    let mut random = Random::new(23);
    let mut ids = |count: usize| -> Vec<u32> { (0..count).map(|_| random.below(config.vocab_size) as u32).collect() };
    let (first, second) = (ids(FIRST), ids(SECOND.0 + SECOND.1));
    let whole = |first_block| Part { ids: &first, start: 0, first_block };
    let (before, rest) = second.split_at(SECOND.0);
    let before = Part { ids: before, start: 0, first_block: 60 };
    let rest = Part { ids: rest, start: SECOND.0, first_block: 60 };

    let cpu = CpuOptions { fp8: Fp8Mode::Dequantized, kv: options.kv, as_on_gpu: true };
    let collective = Box::new(SingleRank::default());
    let setup = RankSetup { config: config.clone(), plan: plan.clone(), limits: LIMITS, collective };
    let mut backend = CpuBackend::new(setup, cpu);
    let model = Ministral3::load(&mut backend, &weights, &plan, |_| {})?;
    backend.allocate_kv(&KvShape::new(&config, &plan), BLOCKS)?;
    let mut expected = |parts: &[Part<'_>]| -> Result<Vec<f64>, Failure> {
        let logits = backend.execute(&batch(parts), |backend| model.forward(backend))?;
        Ok(logits.elements.into_iter().map(f64::from).collect())
    };
    let wanted_first = expected(&[whole(1)])?;
    expected(&[Part { ..before }])?;
    let wanted_rest = expected(&[Part { ..rest }])?;

    let mut rank = open_model(config.clone(), &weights, options, Box::new(SingleRank::default()))?;
    let mut found = |parts: &[Part<'_>]| -> Result<Vec<f32>, Failure> {
        let model = &rank.model;
        let logits = rank.backend.execute(&batch(parts), |backend| model.forward(backend))?;
        let elements = rank.backend.read_logits(&logits)?;
        rank.backend.sample(logits, &[])?;
        rank.backend.collect()?;
        Ok(elements)
    };
    let in_one = found(&[whole(1)])?;
    let mut chunked = Vec::new();
    for (index, ids) in first.chunks(333).enumerate() {
        chunked.extend(found(&[Part { ids, start: index * 333, first_block: 20 }])?);
    }
    found(&[before])?;
    // what it looks like when a prompt reads other tokens' keys: far beyond what is allowed, or this check sees nothing
    let astray = found(&[Part { first_block: rest.first_block + 1, ..rest }])?;
    let together = found(&[whole(40), rest])?;
    let (beside, rest) = together.split_at(FIRST * config.vocab_size);
    let astray = distance(&astray, &wanted_rest);

    let distances = [
        distance(&in_one, &wanted_first),
        distance(&chunked, &wanted_first),
        distance(beside, &wanted_first),
        distance(rest, &wanted_rest),
    ];
    let allowed = if options.kv == KvDtype::Fp8 { E4M3_DISTANCE } else { BF16_DISTANCE };
    let passed = distances.iter().all(|distance| *distance <= allowed) && astray > 2.0 * allowed;
    let [in_one, chunked, beside, rest] = distances;
    let two = [beside, rest];
    Ok((
        passed,
        json!({ "whole": in_one, "chunked": chunked, "two_in_a_step": two, "allowed": allowed, "other_keys": astray }),
    ))
}

/// All rows' logits are wanted.
fn batch(parts: &[Part<'_>]) -> Batch {
    let mut batch = Batch { token_ids: vec![], positions: vec![], sequences: vec![], logit_rows: vec![] };
    for (slot, part) in parts.iter().enumerate() {
        let first_row = batch.token_ids.len() as u32;
        let (rows, context) = (part.ids.len() as u32, (part.start + part.ids.len()) as u32);
        batch.token_ids.extend(part.ids.iter().copied().map(Some));
        batch.positions.extend(part.start as u32..context);
        batch.logit_rows.extend(first_row..first_row + rows);
        let blocks = (0..context.div_ceil(BLOCK_TOKENS as u32)).map(|block| part.first_block + block).collect();
        batch.sequences.push(BatchSequence { slot: slot as u32, first_row, rows, context, blocks });
    }
    batch
}
