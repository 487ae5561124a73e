//! Budget of a step. Chunks of prompts are bounded by time, so that running streams keep their pace, and by tokens, so
//! that memory is bounded.

use std::time::Duration;

use bora_common::blocks::BLOCK_TOKENS;
use bora_common::cost::CostModel;
use bora_common::registry::Speed;

use crate::engine::EngineOptions;
use crate::engine::request::Class;
use crate::engine::step::Slot;

/// Minimum prompt tokens of a step, however long the step takes, so that every prompt completes.
const MIN_CHUNK: usize = BLOCK_TOKENS;
/// Chunks of at least this many tokens end at a multiple of a quarter of it; chunks of twice this many tokens end at a
/// multiple of half of it, and so on. GEMMs then fill their tiles, and the thread blocks of attention (one per 32 tokens
/// and KV head) fill at least 97 % of a GPU's multiprocessors. The rounding loses little.
const MANY_TOKENS: usize = 1_024;
/// Minimum of the default target time of a step that decodes, seconds.
const STEP_SECONDS: f64 = 0.05;
/// Maximum time of a step in decode steps, which bounds the ITL of running streams. A large model needs more than
/// [`STEP_SECONDS`]: without room for [`MANY_TOKENS`] prompt tokens beside a decode step its chunks are too small for
/// its GEMMs, and it decodes too few sequences per step.
const MAX_DECODE_STEPS: f64 = 10.0;
/// Maximum prompt positions of a step with logprobs: each costs a row of logits over the vocabulary.
pub(crate) const MAX_SCORED_POSITIONS: usize = 256;
/// Weight of the newest step in the moving corrections.
const LEARNING_RATE: f64 = 0.1;
/// Plausible ratio of measured to predicted time; a ratio outside is clamped.
const PLAUSIBLE: std::ops::RangeInclusive<f64> = 0.05..=20.0;
/// Steps that are predicted to be shorter than this are not used for learning, seconds.
const TOO_SHORT: f64 = 1e-5;

/// A running sequence whose prompt is not completely computed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    pub(crate) slot: Slot,
    pub(crate) class: Class,
    /// Tokens computed so far.
    pub(crate) context: usize,
    /// Tokens still to compute.
    pub(crate) remaining: usize,
    /// Whether logprobs of the prompt are requested.
    pub(crate) scored: bool,
}

/// Predicted time of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Prediction {
    /// Seconds of decode by the cost model alone.
    decode: f64,
    /// Seconds of prefill by the cost model alone.
    pub(crate) prefill: f64,
    /// Seconds of the step with the learned corrections.
    pub(crate) seconds: f64,
}

/// Cuts prompts into chunks, and corrects the cost model by the measured steps.
pub(crate) struct StepBudget {
    cost: CostModel,
    step_seconds: f64,
    idle_step_seconds: f64,
    max_tokens: usize,
    /// Minimum tokens of all prompts in a step together.
    least_chunk: usize,
    decode_correction: f64,
    prefill_correction: f64,
}

/// Remaining budget of a step.
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
            // one more block would start another wave of attention's thread blocks
            least_chunk: (least_chunk / BLOCK_TOKENS * BLOCK_TOKENS).max(MIN_CHUNK),
            decode_correction: 1.0,
            prefill_correction: 1.0,
        }
    }

    /// Divides a step that decodes `decoding` sequences (`context_sum` is the sum of their contexts) among prompts,
    /// which are given in the order of their admission. Returns the tokens of each prompt, in any order.
    ///
    /// The oldest prompt of the most urgent class may use half of the step, so that it completes. The other half goes
    /// to the shortest prompts, so that a short prompt does not wait behind a very long one. The oldest prompt gets
    /// what remains.
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
        // stable: within a class the order of admission remains
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

    /// Tokens of a prompt that fit into the remaining budget. A chunk that does not complete the prompt ends at a block
    /// boundary, so that the block can be shared.
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

    /// Seconds to compute `tokens` tokens after `context` tokens.
    pub(crate) fn prefill_seconds(&self, context: usize, tokens: usize) -> f64 {
        self.cost.prefill_seconds(context as u64, tokens as u64) * self.prefill_correction
    }

    /// Cost of a further row in a step that decodes, as a share of the step.
    pub(crate) fn row_share(&self, decoding: usize, context_sum: usize) -> f64 {
        let rows = decoding.max(1);
        let step = self.cost.decode_seconds(rows as u64, context_sum as u64);
        let more = self.cost.decode_seconds(rows as u64 + 1, (context_sum + context_sum / rows) as u64);
        if step > 0.0 { (more - step) / step } else { 0.0 }
    }

    /// Corrects later predictions by a step that took `taken`.
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

/// Default time of a step that decodes on a device of this speed, seconds.
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
