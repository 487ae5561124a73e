//! One sequence's sampler, in plain code: see the recipe in the module's documentation, whose numbers the
//! comments here refer to.

use std::collections::{HashMap, HashSet};

use super::philox::philox4x32_10;
use super::{SamplingParams, score};
use crate::engine::step::{SampledToken, SequenceFault};
use crate::grammar::{Mask, allows};

/// Temperatures below this are greedy (as in vLLM).
pub const GREEDY_BELOW: f32 = 1e-5;

/// The largest value that [`gumbel`] takes (at v = 2^-33), rounded up.
const LARGEST_GUMBEL: f32 = 22.9;

/// What a sampler knows about one running sequence.
#[derive(Clone, Debug)]
pub struct SlotState {
    params: SamplingParams,
    /// Ids of the prompt, where a repetition penalty needs them.
    prompt_ids: HashSet<u32>,
    /// How often each id was generated, where a penalty needs it.
    generated: HashMap<u32, u32>,
    /// Ids generated so far.
    generated_len: u32,
}

impl SlotState {
    /// A sequence begins, or is resumed with the token IDs that it generated elsewhere.
    pub fn new(params: &SamplingParams, prompt_ids: &[u32], generated_ids: &[u32]) -> Self {
        let mut state =
            Self { params: params.clone(), prompt_ids: HashSet::new(), generated: HashMap::new(), generated_len: 0 };
        if params.repetition_penalty != 1.0 {
            state.prompt_ids.extend(prompt_ids);
        }
        for id in generated_ids {
            state.remember(*id);
        }
        state
    }

    /// Samples the id at `position` of the sequence and remembers it as generated. `logits` [V] is scratch
    /// afterwards.
    pub fn sample(&mut self, logits: &mut [f32], position: u32) -> Result<SampledToken, SequenceFault> {
        self.sample_within(None, logits, position)
    }

    /// The same among the token IDs of a mask.
    pub fn sample_within(
        &mut self,
        mask: Option<&Mask>,
        logits: &mut [f32],
        position: u32,
    ) -> Result<SampledToken, SequenceFault> {
        check(logits, position)?;
        let raw = self.params.logprobs.map(|top| (top, logits.to_vec()));
        self.adjust(logits);
        if let Some(mask) = mask {
            for (id, logit) in (0..).zip(logits.iter_mut()) {
                if !allows(mask, id) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        let token_id =
            if self.params.temperature < GREEDY_BELOW { largest(logits) } else { self.sample_random(logits, position) };
        // bias and masks can leave nothing to sample from
        let token_id = token_id.ok_or(SequenceFault::NotANumber { position })?;
        self.remember(token_id);
        let logprobs = raw.map(|(top, raw)| score(&raw, token_id, top));
        Ok(SampledToken { token_id, logprobs })
    }

    fn remember(&mut self, token_id: u32) {
        self.generated_len += 1;
        if self.params.has_penalties() {
            *self.generated.entry(token_id).or_default() += 1;
        }
    }

    /// Steps 3 to 5: bias, mask and penalties, in place.
    fn adjust(&self, logits: &mut [f32]) {
        let params = &self.params;
        for (id, bias) in &params.logit_bias {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit += bias;
            }
        }
        if self.generated_len < params.min_tokens {
            for id in &params.end_ids {
                if let Some(logit) = logits.get_mut(*id as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        if params.repetition_penalty != 1.0 {
            let only_generated = self.generated.keys().filter(|id| !self.prompt_ids.contains(id));
            for id in self.prompt_ids.iter().chain(only_generated) {
                if let Some(logit) = logits.get_mut(*id as usize) {
                    *logit = if *logit > 0.0 {
                        *logit / params.repetition_penalty
                    } else {
                        *logit * params.repetition_penalty
                    };
                }
            }
        }
        if params.frequency_penalty != 0.0 || params.presence_penalty != 0.0 {
            for (id, count) in &self.generated {
                if let Some(logit) = logits.get_mut(*id as usize) {
                    *logit -= params.frequency_penalty * *count as f32;
                    *logit -= params.presence_penalty;
                }
            }
        }
    }

    /// Steps 7 to 9. `None` where no id can be sampled.
    fn sample_random(&self, logits: &[f32], position: u32) -> Option<u32> {
        let mut candidates: Vec<(u32, f32)> = (0u32..)
            .zip(logits)
            .map(|(id, logit)| (id, logit / self.params.temperature))
            .filter(|(_, scaled)| *scaled > f32::NEG_INFINITY)
            .collect();
        keep_min_p(&mut candidates, self.params.min_p);
        keep_top_k(&mut candidates, self.params.top_k as usize);
        keep_top_p(&mut candidates, self.params.top_p);
        race(&candidates, self.params.seed, position)
    }
}

impl SamplingParams {
    /// Whether the token IDs generated so far change the logits.
    pub fn has_penalties(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0 || self.repetition_penalty != 1.0
    }
}

/// Step 1.
fn check(logits: &[f32], position: u32) -> Result<(), SequenceFault> {
    let mut any_finite = false;
    for logit in logits {
        if logit.is_nan() || *logit == f32::INFINITY {
            return Err(SequenceFault::NotANumber { position });
        }
        any_finite |= logit.is_finite();
    }
    if any_finite { Ok(()) } else { Err(SequenceFault::NotANumber { position }) }
}

/// The id of the largest finite logit, of equal ones the lowest.
fn largest(logits: &[f32]) -> Option<u32> {
    let mut best: Option<(u32, f32)> = None;
    for (id, logit) in (0u32..).zip(logits) {
        if *logit > best.map_or(f32::NEG_INFINITY, |(_, value)| value) {
            best = Some((id, *logit));
        }
    }
    best.map(|(id, _)| id)
}

fn largest_scaled(candidates: &[(u32, f32)]) -> f32 {
    candidates.iter().map(|(_, scaled)| *scaled).fold(f32::NEG_INFINITY, f32::max)
}

fn keep_min_p(candidates: &mut Vec<(u32, f32)>, min_p: f32) {
    if min_p <= 0.0 {
        return;
    }
    let threshold = largest_scaled(candidates) + min_p.ln();
    candidates.retain(|(_, scaled)| *scaled >= threshold);
}

fn keep_top_k(candidates: &mut Vec<(u32, f32)>, top_k: usize) {
    if top_k == 0 || top_k >= candidates.len() {
        return;
    }
    let mut values: Vec<f32> = candidates.iter().map(|(_, scaled)| *scaled).collect();
    let (_, threshold, _) = values.select_nth_unstable_by(top_k - 1, |a, b| b.total_cmp(a));
    let threshold = *threshold;
    candidates.retain(|(_, scaled)| *scaled >= threshold);
}

fn keep_top_p(candidates: &mut Vec<(u32, f32)>, top_p: f32) {
    if top_p >= 1.0 || candidates.len() < 2 {
        return;
    }
    let largest = largest_scaled(candidates);
    let weight = |scaled: f32| f64::from((scaled - largest).exp());
    let total: f64 = candidates.iter().map(|(_, scaled)| weight(*scaled)).sum();
    let wanted = f64::from(top_p) * total;
    // token IDs this unlikely can't be among those kept even if all n of them were; spares most of the sorting
    let hopeless = (total - wanted) / candidates.len() as f64 * 0.5;
    let mut values: Vec<f32> =
        candidates.iter().map(|(_, scaled)| *scaled).filter(|scaled| weight(*scaled) >= hopeless).collect();
    values.sort_unstable_by(|a, b| b.total_cmp(a));
    let mut threshold = largest;
    let mut above = 0.0;
    for same in values.chunk_by(|a, b| a == b) {
        if above >= wanted {
            break;
        }
        threshold = same[0];
        above += weight(threshold) * same.len() as f64;
    }
    candidates.retain(|(_, scaled)| *scaled >= threshold);
}

/// Step 9: the winner of the Gumbel-max race; `candidates` have ascending token IDs.
fn race(candidates: &[(u32, f32)], seed: u64, position: u32) -> Option<u32> {
    let mut best: Option<(u32, f32)> = None;
    let mut words = (u32::MAX, [0; 4]);
    for (id, scaled) in candidates {
        // can't win whatever its random number: spares sampling one for the long tail
        if best.is_some_and(|(_, score)| scaled + LARGEST_GUMBEL < score) {
            continue;
        }
        if words.0 != id / 4 {
            words = (id / 4, philox4x32_10([id / 4, position, 0, 0], [seed as u32, (seed >> 32) as u32]));
        }
        let score = scaled + gumbel(words.1[(id % 4) as usize]);
        if best.is_none_or(|(_, best_score)| score > best_score) {
            best = Some((*id, score));
        }
    }
    best.map(|(id, _)| id)
}

/// A standard Gumbel variable from a uniform word.
#[inline]
pub fn gumbel(word: u32) -> f32 {
    const TWO_TO_MINUS_32: f32 = 1.0 / 4_294_967_296.0;
    const LARGEST_BELOW_ONE: f32 = 1.0 - f32::EPSILON / 2.0;
    let uniform = (word as f32 * TWO_TO_MINUS_32 + TWO_TO_MINUS_32 / 2.0).min(LARGEST_BELOW_ONE);
    -(-(-uniform).ln_1p()).ln()
}

#[cfg(test)]
#[path = "sampler_tests.rs"]
mod tests;
