//! Applies the output of a step: tokens for the callers, full blocks, ended sequences.

use std::time::{Duration, Instant};

use bora_proto::v1;

use super::{FlightWork, Scheduler};
use crate::engine::error::EngineError;
use crate::engine::sequence::to_proto;
use crate::engine::step::{PromptOutput, RunError, Sampled, SequenceFault, Slot, StepOutput};

impl Scheduler {
    /// Applies the output of the oldest step in flight. An output that does not match the step is an error, because the
    /// state of the group then differs from the scheduler's.
    pub(crate) fn apply(&mut self, output: StepOutput, now: Instant) -> Result<(), RunError> {
        let invalid = |reason: String| Err(RunError::Invalid { step: output.id, reason });
        let Some(flight) = self.flights.pop_front() else {
            return invalid("an output of no step".into());
        };
        if flight.id != output.id {
            return invalid(format!("expected the output of step {}, found this step's", flight.id));
        }
        self.completed += 1;
        if let Ok(taken) = Duration::try_from_secs_f64(output.seconds) {
            self.budget.learn(&flight.prediction, taken);
        }
        let mut all_sampled = output.sampled.into_iter();
        let mut all_scored = output.prompt_logprobs.into_iter();
        for work in &flight.works {
            let scored = if work.scored { all_scored.next() } else { None };
            let sampled = if work.sampled { all_sampled.next() } else { None };
            let counted = |sampled: &Sampled| {
                sampled
                    .result
                    .as_ref()
                    .is_ok_and(|sampled_tokens| !(1..=1 + work.drafts).contains(&sampled_tokens.len()))
            };
            if sampled.as_ref().is_some_and(counted) {
                return Err(RunError::Invalid {
                    step: output.id,
                    reason: format!("slot {} sampled an impossible number of tokens", work.slot),
                });
            }
            let complete = scored.as_ref().is_some_and(|scored| scored.slot == work.slot) == work.scored
                && sampled.as_ref().is_some_and(|sampled| sampled.slot == work.slot) == work.sampled;
            if !complete {
                return Err(RunError::Invalid {
                    step: output.id,
                    reason: format!("the output for slot {} is missing", work.slot),
                });
            }
            self.apply_work(work, scored, sampled, now);
        }
        Ok(())
    }

    fn apply_work(&mut self, work: &FlightWork, scored: Option<PromptOutput>, sampled: Option<Sampled>, now: Instant) {
        // the sequence ended in the meantime; this is its overrun token
        let Some(sequence) = self.slots[work.slot as usize].as_mut().filter(|sequence| sequence.key == work.key) else {
            return;
        };
        if let Some(scored) = scored {
            if let Some(index) = scored.positions.iter().position(|at| at.chosen.logprob.is_nan()) {
                let position = scored.start + index as u32;
                return self.fail(work.slot, &SequenceFault::NotANumber { position });
            }
            sequence.events.prompt_logprobs(v1::PromptLogprobs {
                start: scored.start,
                positions: scored.positions.iter().map(to_proto).collect(),
            });
        }
        let reason = match sampled.map(|sampled| sampled.result) {
            Some(Err(fault)) => return self.fail(work.slot, &fault),
            Some(Ok(sampled_tokens)) => {
                let accepted = sampled_tokens.len() - 1;
                sequence.samples_in_flight -= 1;
                sequence.computed += accepted;
                if let Some(speculator) = &mut sequence.speculator {
                    speculator.learn(work.drafts, accepted);
                }
                self.drafted += work.drafts as u64;
                self.accepted += accepted as u64;
                // tokens after the end are dropped
                sampled_tokens.iter().find_map(|sampled_tokens| {
                    sequence.push(sampled_tokens.token_id, sampled_tokens.logprobs.as_ref(), now)
                })
            }
            // nothing to generate: the sequence ends with its prompt
            None if work.completes_prompt => sequence.finish_reason(),
            None => None,
        };
        self.publish_full_blocks(work.slot);
        if let Some(reason) = reason
            && let Some(sequence) = self.remove(work.slot)
        {
            let finished = sequence.finished(reason, now);
            sequence.events.end(Ok(finished));
        }
    }

    /// Ends a failed sequence and removes the blocks that it computed from the cache.
    fn fail(&mut self, slot: Slot, fault: &SequenceFault) {
        let Some(sequence) = &self.slots[slot as usize] else { return };
        let found = sequence.cached_tokens / bora_common::blocks::BLOCK_TOKENS;
        for block in &sequence.lease.blocks[found..sequence.published] {
            self.cache.forget(*block);
        }
        if let Some(sequence) = self.remove(slot) {
            // a failed grammar is an error of the request; logits that are not numbers are an internal error
            sequence.events.end(Err(match fault {
                SequenceFault::Grammar { position, reason } => {
                    tracing::info!(request_id = sequence.request.request_id, position, "grammar failed");
                    EngineError::invalid("grammar", reason)
                }
                SequenceFault::NotANumber { .. } => {
                    tracing::error!(request_id = sequence.request.request_id, %fault, "sequence failed");
                    EngineError::Internal { reason: fault.to_string() }
                }
            }));
        }
    }
}
