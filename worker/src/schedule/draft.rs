//! Draft tokens of a step: see [`speculate`](crate::speculate).

use super::Scheduler;
use super::budget::MAX_SCORED_POSITIONS;
use crate::engine::step::Slot;
use crate::speculate::worthwhile;

/// Decision about the draft tokens of the next step.
pub(super) enum Drafts {
    /// The step is not made yet, because waiting for the tokens in flight is faster.
    Wait,
    /// Draft tokens of each decoding sequence, in their order; empty if speculation does not pay.
    Of(Vec<Vec<u32>>),
}

impl Scheduler {
    /// Draft tokens for the next step of the decoding sequences, whose contexts sum to `context_sum`.
    pub(super) fn drafts(&mut self, decoding: &[Slot], context_sum: usize, scored: bool) -> Drafts {
        if self.config.options.speculative.is_none() || decoding.is_empty() {
            return Drafts::Of(Vec::new());
        }
        if self.flights.iter().flat_map(|flight| &flight.works).any(|work| work.drafts > 0) {
            // the position of the next tokens is unknown
            return Drafts::Wait;
        }
        let price = self.budget.row_share(decoding.len(), context_sum) * decoding.len() as f64;
        let mut room = self.rows_left(decoding.len(), scored);
        let mut gain = 0.0;
        let mut in_flight = false;
        let mut draft_tokens = Vec::with_capacity(decoding.len());
        for slot in decoding {
            let mut ids = Vec::new();
            if let Some(sequence) = self.slots[*slot as usize].as_mut()
                && let Some(speculator) = &mut sequence.speculator
            {
                // the last token is sampled, never drafted
                let left = sequence.limit_len - sequence.ids.len() - sequence.samples_in_flight - 1;
                let proposal = speculator.propose(&sequence.ids, sequence.samples_in_flight, left.min(room), price);
                in_flight |= sequence.samples_in_flight > 0;
                gain += proposal.gain;
                room -= proposal.ids.len();
                ids = proposal.ids;
            }
            draft_tokens.push(ids);
        }
        if !worthwhile(gain, decoding.len()) {
            for slot in decoding {
                if let Some(speculator) = self.slots[*slot as usize].as_mut().and_then(|s| s.speculator.as_mut()) {
                    speculator.pass();
                }
            }
            return Drafts::Of(Vec::new());
        }
        if in_flight { Drafts::Wait } else { Drafts::Of(draft_tokens) }
    }

    /// Rows available for draft tokens: logit rows beside one per sequence and those of scored prompts, and token rows
    /// such that prompts keep half of the step.
    fn rows_left(&self, decoding: usize, scored: bool) -> usize {
        let options = &self.config.options;
        let taken = self.order.len() + if scored { MAX_SCORED_POSITIONS } else { 0 };
        let tokens = (options.max_num_batched_tokens as usize).saturating_sub(decoding) / 2;
        options.max_logit_rows().saturating_sub(taken).min(tokens)
    }
}
