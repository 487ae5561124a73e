//! Sampling and scoring, against the CPU's sampler.

use super::super::super::sampler::Sampler;
use super::super::reference::f32_bytes;
use super::Bench;
use crate::backend::{Limits, Result, SampleRequest};
use crate::engine::step::{Admission, SampledToken, SequenceFault};
use crate::grammar::Mask;
use crate::sample::{SamplingParams, SlotState, score};

/// Rows of a sequence that is sampled along draft tokens.
const LINKS: usize = 5;

/// Samples of the device against those of the CPU's sampler: wrong ones, and wrong logprobs.
pub(super) fn sample(bench: &mut Bench) -> Result<(f64, f64)> {
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
        let limits = Limits { step_tokens: 16, sequences: slots, model_len: 128, logit_rows: slots + 3 + LINKS };
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
            // some slots sample within a mask in some steps, as if they had a grammar
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
            for (slot, (found_slot, found)) in results.sampled.iter().enumerate() {
                let row = match (step, slot) {
                    (3, 0) => slots + 1,
                    (3, 9) => slots + 2,
                    _ => row_of(slot),
                };
                let mut own = logits[row * vocabulary..][..vocabulary].to_vec();
                let expected = states[slot].sample_within(mask_of(slot).as_ref(), &mut own, 50 + step);
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
    wrong += chains(bench, &variants)?;
    Ok((wrong, 0.0))
}

/// Samples along draft tokens: all right, wrong at once, wrong in the middle; what is sampled next must know what counted.
fn chains(bench: &mut Bench, variants: &[SamplingParams]) -> Result<f64> {
    let (vocabulary, slots) = (9191usize, variants.len());
    let rows = slots * LINKS;
    let limits = Limits { step_tokens: rows, sequences: slots, model_len: 128, logit_rows: rows };
    let mut sampler = Sampler::new(&bench.device, &limits, vocabulary)?;
    let mut states = Vec::new();
    for (slot, params) in variants.iter().enumerate() {
        states.push(SlotState::new(params, &[1, 2, 3], &[]));
        let sampling = params.clone();
        let admission = Admission { slot: slot as u32, sampling, prompt_ids: vec![1, 2, 3], generated_ids: Vec::new() };
        sampler.admit(&bench.device, &mut bench.kernels, &admission)?;
    }
    let mask: Mask =
        (0..vocabulary.div_ceil(32)).map(|word| 0xf0f0_1234 ^ (word as u32).wrapping_mul(0x9e37)).collect();
    let mut wrong = 0f64;
    let mut position = vec![10u32; slots];
    for step in 0..4usize {
        let mut logits = bench.random.normals(rows * vocabulary, 3.0);
        if step == 3 {
            // the second link of the first slot: its first one counts alone
            logits[vocabulary] = f32::NAN;
        }
        let buffer = bench.upload(&f32_bytes(&logits))?;
        let mut requests = Vec::new();
        let mut expected: Vec<Vec<SampledToken>> = Vec::new();
        for (slot, state) in states.iter_mut().enumerate() {
            let masks = if (slot + step) % 3 == 1 { vec![mask.clone(); LINKS] } else { Vec::new() };
            let (first, mut drafts, mut sampled) = (slot * LINKS, Vec::new(), Vec::new());
            let right = (slot + step) % LINKS;
            let mut counts = true;
            for link in 0..LINKS {
                let mut own = logits[(first + link) * vocabulary..][..vocabulary].to_vec();
                let at = position[slot] + link as u32;
                let one = if counts { state.sample_within(masks.get(link), &mut own, at).ok() } else { None };
                let draft = one.as_ref().map_or(0, |one| one.token_id + u32::from(link >= right));
                counts = one.is_some() && link < right;
                sampled.extend(one);
                if link + 1 < LINKS {
                    drafts.push(draft % vocabulary as u32);
                }
            }
            let (row, slot) = (first as u32, slot as u32);
            requests.push(SampleRequest::Next { row, slot, position: position[slot as usize], drafts, masks });
            position[slot as usize] += sampled.len() as u32;
            expected.push(sampled);
        }
        sampler.step_begins(&bench.device)?;
        sampler.sample(&bench.device, &mut bench.kernels, buffer.address, &requests)?;
        let results = sampler.collect()?;
        for ((_, found), expected) in results.sampled.iter().zip(&expected) {
            let ids = |sampled: &[SampledToken]| sampled.iter().map(|sampled| sampled.token_id).collect::<Vec<u32>>();
            wrong += if found.as_ref().is_ok_and(|found| ids(found) == ids(expected)) { 0.0 } else { 1.0 };
        }
    }
    Ok(wrong)
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
