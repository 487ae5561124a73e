//! Makes a step: all decoding sequences, then chunks of prompts.

use std::time::Instant;

use bora_common::blocks::BLOCK_TOKENS;

use super::budget::Candidate;
use super::draft::Drafts;
use super::{FlightWork, InFlightStep, Scheduler};
use crate::engine::sequence::Sequence;
use crate::engine::step::{PromptLogprobs, Slot, Step, Tokens, Work};

impl Scheduler {
    /// The next step, which the caller must submit. `None` if there is nothing to compute, or if waiting for the
    /// outcome of the steps in flight is faster.
    pub(crate) fn plan(&mut self, now: Instant) -> Option<Step> {
        self.drop_abandoned();
        self.admit_waiting(now);
        let mut decoding: Vec<Slot> = Vec::with_capacity(self.order.len());
        let mut context_sum = 0;
        let mut candidates: Vec<Candidate> = Vec::new();
        let mut fetching = false;
        for slot in self.order.iter().copied() {
            let Some(sequence) = &self.slots[slot as usize] else { continue };
            if sequence.fetches() {
                fetching = true;
            } else if sequence.decodes() {
                decoding.push(slot);
                context_sum += sequence.computed + 1;
            } else if sequence.prefills() {
                candidates.push(Candidate {
                    slot,
                    class: sequence.class,
                    context: sequence.computed,
                    remaining: sequence.initial_len - sequence.computed,
                    scored: sequence.request.prompt_logprobs.is_some(),
                });
            }
        }
        if decoding.is_empty() && candidates.is_empty() && !fetching {
            return None;
        }
        let mut drafts = match self.drafts(&decoding, context_sum, candidates.iter().any(|candidate| candidate.scored))
        {
            Drafts::Wait => return None,
            Drafts::Of(drafts) => drafts.into_iter(),
        };
        let draft_tokens = drafts.as_slice().iter().map(Vec::len).sum::<usize>();
        let mean_context = context_sum / decoding.len().max(1);
        let (chunks, prediction) =
            self.budget.share(decoding.len() + draft_tokens, context_sum + draft_tokens * mean_context, candidates);
        self.last_step += 1;
        let mut step = Step { id: self.last_step, release: std::mem::take(&mut self.releases), ..Default::default() };
        let mut works = Vec::with_capacity(decoding.len() + chunks.len());
        for (slot, tokens) in decoding
            .into_iter()
            .map(|slot| (slot, None))
            .chain(chunks.into_iter().map(|(slot, tokens)| (slot, Some(tokens))))
        {
            let Some(sequence) = self.slots[slot as usize].as_mut() else { continue };
            if !sequence.admitted_on_ranks {
                sequence.admitted_on_ranks = true;
                step.admit.push(sequence.admission(slot));
                step.traces.extend(sequence.trace.map(|trace| (slot, trace)));
            }
            let drafted = if tokens.is_none() { drafts.next().unwrap_or_default() } else { Vec::new() };
            let draft_tokens = drafted.len();
            let end = sequence.computed + tokens.unwrap_or(1) + draft_tokens;
            self.cache.grow(&mut sequence.lease, end.div_ceil(BLOCK_TOKENS));
            let work = match tokens {
                None => decode(sequence, slot, drafted),
                Some(tokens) => chunk(sequence, slot, tokens),
            };
            if let Some(speculator) = &mut sequence.speculator {
                speculator.catch_up(&sequence.ids);
            }
            works.push(FlightWork {
                slot,
                key: sequence.key,
                sampled: work.sample,
                scored: work.prompt_logprobs.is_some(),
                completes_prompt: tokens.is_some() && end == sequence.initial_len,
                drafts: draft_tokens,
            });
            step.work.push(work);
            // steps run in order, so sequences of later steps may read these blocks
            self.publish_full_blocks(slot);
        }
        self.copy_blocks(&mut step, prediction.seconds);
        self.prefill_seconds += prediction.prefill;
        self.flights.push_back(InFlightStep { id: step.id, works, prediction });
        Some(step)
    }
}

/// Computes the last sampled token and draft tokens after it, and samples the next. Draft tokens do not count as
/// computed.
fn decode(sequence: &mut Sequence, slot: Slot, drafted: Vec<u32>) -> Work {
    let start = sequence.computed as u32;
    let drafts = drafted.len() as u32;
    let tokens = match sequence.ids.last() {
        Some(last) if drafts > 0 => Tokens::Ids([&[*last], drafted.as_slice()].concat()),
        _ => Tokens::Sampled,
    };
    sequence.computed += 1;
    sequence.samples_in_flight += 1;
    sequence.steps += 1;
    Work { slot, start, tokens, new_blocks: unsent_blocks(sequence), sample: true, drafts, prompt_logprobs: None }
}

/// Computes the next tokens of a prompt; the last chunk samples the first token.
fn chunk(sequence: &mut Sequence, slot: Slot, tokens: usize) -> Work {
    let start = sequence.computed;
    let end = start + tokens;
    sequence.computed = end;
    sequence.steps += 1;
    let sample = end == sequence.initial_len && sequence.initial_len < sequence.limit_len;
    sequence.samples_in_flight += usize::from(sample);
    let prompt_logprobs = sequence.request.prompt_logprobs.map(|top| PromptLogprobs {
        top,
        targets: sequence.ids[start + 1..(end + 1).min(sequence.initial_len)].to_vec(),
    });
    Work {
        slot,
        start: start as u32,
        tokens: Tokens::Ids(sequence.ids[start..end].to_vec()),
        new_blocks: unsent_blocks(sequence),
        sample,
        drafts: 0,
        prompt_logprobs,
    }
}

fn unsent_blocks(sequence: &mut Sequence) -> Vec<u32> {
    let blocks = sequence.lease.blocks[sequence.sent_blocks..].to_vec();
    sequence.sent_blocks = sequence.lease.blocks.len();
    blocks
}
