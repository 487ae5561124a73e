//! How much one step may do: chunks of prompts are cut by time, so that streams that are being decoded
//! keep their pace, and by tokens, which bounds memory.

use std::time::Duration;

use bora_common::blocks::BLOCK_TOKENS;
use bora_common::cost::CostModel;
use bora_common::registry::Speed;

use crate::engine::EngineOptions;
use crate::engine::request::Class;
use crate::engine::step::Slot;

/// A prompt always gets this many tokens a step at least, however slow the step already is: it has to end.
const MIN_CHUNK: usize = BLOCK_TOKENS;
/// Chunks of at least this many tokens end at a multiple of a quarter of it, and so do twice as long ones with twice as much,
/// and so on: then GEMMs fill their tiles, and attention's blocks (one for 32 tokens and a KV head) fill the
/// multiprocessors of a GPU to 97 % and more. Little is lost by it.
const MANY_TOKENS: usize = 1_024;
/// What a step that decodes may take where nothing else is configured, at least.
const STEP_SECONDS: f64 = 0.05;
/// A large model needs more: room for [`MANY_TOKENS`] of prompts beside a decode step, or its chunks are too small for its matrix
/// products and it decodes too few sequences a step. So many decode steps at most: streams have to continue.
const MAX_DECODE_STEPS: f64 = 10.0;
/// Prompt positions of one step whose logprobs are read: each costs a row of logits over the vocabulary.
pub(crate) const MAX_SCORED_POSITIONS: usize = 256;
/// Weight of the newest step in the running corrections.
const LEARNING_RATE: f64 = 0.1;
/// What is believed of one step's deviation from the prediction.
const PLAUSIBLE: std::ops::RangeInclusive<f64> = 0.05..=20.0;
/// Steps predicted shorter than this say nothing about the rates.
const TOO_SHORT: f64 = 1e-5;

/// A running sequence whose prompt is not computed yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    pub(crate) slot: Slot,
    pub(crate) class: Class,
    /// Tokens computed before.
    pub(crate) context: usize,
    /// Tokens yet to compute.
    pub(crate) remaining: usize,
    /// Whether logprobs of its prompt are wanted.
    pub(crate) scored: bool,
}

/// What a step is predicted to cost.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Prediction {
    /// By the cost model alone.
    decode: f64,
    /// By the cost model alone.
    pub(crate) prefill: f64,
    /// With what was learned.
    pub(crate) seconds: f64,
}

/// Cuts prompts into chunks, and learns from the steps how wrong the cost model is.
pub(crate) struct StepBudget {
    cost: CostModel,
    step_seconds: f64,
    idle_step_seconds: f64,
    max_tokens: usize,
    /// Of the prompts in a step, together.
    least_chunk: usize,
    decode_correction: f64,
    prefill_correction: f64,
}

/// What is left of a step.
#[derive(Clone, Copy)]
struct Rest {
    seconds: f64,
    tokens: usize,
    scored: usize,
}

impl StepBudget {
    pub(crate) fn new(speed: &Speed, options: &EngineOptions, least_chunk: usize) -> Self {
        Self {
            cost: CostModel::new(speed),
            step_seconds: options
                .step_seconds
                .map_or_else(|| step_seconds(speed), |configured| configured.as_secs_f64()),
            idle_step_seconds: options.idle_step_seconds.as_secs_f64(),
            max_tokens: options.max_num_batched_tokens as usize,
            // more would begin another round of attention's blocks
            least_chunk: (least_chunk / BLOCK_TOKENS * BLOCK_TOKENS).max(MIN_CHUNK),
            decode_correction: 1.0,
            prefill_correction: 1.0,
        }
    }

    /// Shares a step that decodes `decoding` sequences (contexts summing to `context_sum`) among prompts,
    /// given in the order of their admission. Returns the tokens of each, in any order.
    ///
    /// The oldest of the most urgent class has half of the step for itself, so that it ends; the other half
    /// goes to the shortest ones, so that a short prompt does not wait behind a very long one. What nobody
    /// takes goes to the oldest again.
    pub(crate) fn share(
        &self,
        decoding: usize,
        context_sum: usize,
        mut candidates: Vec<Candidate>,
    ) -> (Vec<(Slot, usize)>, Prediction) {
        let decode = self.cost.decode_seconds(decoding as u64, context_sum as u64);
        let target = if decoding > 0 { self.step_seconds } else { self.idle_step_seconds };
        let mut rest = Rest {
            seconds: (target - decode * self.decode_correction).max(0.0),
            tokens: self.max_tokens.saturating_sub(decoding),
            scored: MAX_SCORED_POSITIONS,
        };
        // stable: within a class the order of admission
        candidates.sort_by_key(|candidate| candidate.class);
        let mut grants: Vec<(Candidate, usize)> = Vec::with_capacity(candidates.len());
        if let Some((oldest, others)) = candidates.split_first_mut() {
            let half = Rest { seconds: rest.seconds / 2.0, tokens: rest.tokens / 2, ..rest };
            let own = if others.is_empty() { rest } else { half };
            let least = self.least_chunk.min(oldest.remaining).min(rest.tokens);
            let least = if oldest.scored { least.min(rest.scored) } else { least };
            let granted = self.chunk(oldest, own).max(least);
            self.spend(&mut rest, oldest, granted);
            others.sort_by_key(|candidate| (candidate.class, candidate.remaining));
            for candidate in others {
                let tokens = self.chunk(candidate, rest);
                if tokens > 0 {
                    self.spend(&mut rest, candidate, tokens);
                    grants.push((*candidate, tokens));
                }
            }
            let own = self.refunded(rest, oldest, granted);
            grants.push((*oldest, self.chunk(oldest, own).max(granted)));
        }
        let prefill = grants
            .iter()
            .map(|(candidate, tokens)| self.cost.prefill_seconds(candidate.context as u64, *tokens as u64))
            .sum();
        let seconds = decode * self.decode_correction + prefill * self.prefill_correction;
        let grants = grants.into_iter().map(|(candidate, tokens)| (candidate.slot, tokens)).collect();
        (grants, Prediction { decode, prefill, seconds })
    }

    /// Tokens of a prompt that fit into what is left; ends at a block's end where it does not end the
    /// prompt, so that the block can be shared at once.
    fn chunk(&self, candidate: &Candidate, rest: Rest) -> usize {
        let in_time = self.cost.prefill_tokens_within(rest.seconds / self.prefill_correction, candidate.context as u64);
        let mut tokens = usize::try_from(in_time).unwrap_or(usize::MAX).min(rest.tokens);
        if candidate.scored {
            tokens = tokens.min(rest.scored);
        }
        if tokens >= candidate.remaining {
            return candidate.remaining;
        }
        let unit = match tokens / MANY_TOKENS {
            0 => BLOCK_TOKENS,
            times => (MANY_TOKENS / 4) << times.ilog2(),
        };
        let end = (candidate.context + tokens) / unit * unit;
        if end > candidate.context { end - candidate.context } else { tokens }
    }

    fn spend(&self, rest: &mut Rest, candidate: &Candidate, tokens: usize) {
        let seconds = self.cost.prefill_seconds(candidate.context as u64, tokens as u64);
        rest.seconds -= seconds * self.prefill_correction;
        rest.tokens = rest.tokens.saturating_sub(tokens);
        if candidate.scored {
            rest.scored = rest.scored.saturating_sub(tokens);
        }
    }

    fn refunded(&self, rest: Rest, candidate: &Candidate, tokens: usize) -> Rest {
        let seconds = self.cost.prefill_seconds(candidate.context as u64, tokens as u64);
        Rest {
            seconds: rest.seconds + seconds * self.prefill_correction,
            tokens: rest.tokens + tokens,
            scored: rest.scored + if candidate.scored { tokens } else { 0 },
        }
    }

    /// Seconds to compute `tokens` tokens behind `context` tokens.
    pub(crate) fn prefill_seconds(&self, context: usize, tokens: usize) -> f64 {
        self.cost.prefill_seconds(context as u64, tokens as u64) * self.prefill_correction
    }

    /// What a further row costs a step that decodes, as a share of the step.
    pub(crate) fn row_share(&self, decoding: usize, context_sum: usize) -> f64 {
        let rows = decoding.max(1);
        let step = self.cost.decode_seconds(rows as u64, context_sum as u64);
        let more = self.cost.decode_seconds(rows as u64 + 1, (context_sum + context_sum / rows) as u64);
        if step > 0.0 { (more - step) / step } else { 0.0 }
    }

    /// A step took `taken`: the next predictions are better.
    pub(crate) fn learn(&mut self, predicted: &Prediction, taken: Duration) {
        let taken = taken.as_secs_f64();
        if predicted.prefill == 0.0 {
            adapt(&mut self.decode_correction, taken, predicted.decode);
        } else {
            let prefill_taken = taken - predicted.decode * self.decode_correction;
            adapt(&mut self.prefill_correction, prefill_taken, predicted.prefill);
        }
    }
}

/// What a step that decodes may take on a device of this speed.
fn step_seconds(speed: &Speed) -> f64 {
    let decode = speed.decode_step_seconds;
    let roomy = decode + MANY_TOKENS as f64 / speed.prefill_tokens_per_second.max(1.0);
    STEP_SECONDS.max(roomy.min(MAX_DECODE_STEPS * decode))
}

fn adapt(correction: &mut f64, taken: f64, predicted: f64) {
    if predicted < TOO_SHORT {
        return;
    }
    let observed = (taken / predicted).clamp(*PLAUSIBLE.start(), *PLAUSIBLE.end());
    *correction += LEARNING_RATE * (observed - *correction);
}

#[cfg(test)]
#[path = "budget_tests.rs"]
mod tests;
