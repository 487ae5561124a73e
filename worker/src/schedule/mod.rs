//! The scheduler: decides what runs next. It is plain data: it receives sequences and outcomes, and makes steps. It
//! owns the bookkeeping of the KV cache. It has no threads, no clock (callers pass the time) and no access to the
//! device.
//!
//! - `admit`: which sequences leave the queue. All blocks that a sequence can need are reserved, so no running sequence
//!   is ever preempted.
//! - `budget`: how many tokens of which prompt fit into a step.
//! - `draft`: draft tokens, which the same step verifies.
//! - `host`: blocks that are offloaded to host memory and fetched from it.
//! - `batch`: makes the step; `outcome`: applies its output.
//!
//! With a pipeline of two, step n + 1 is made before the tokens of step n are known: a decode refers to the token on
//! the device. If a sequence ended with step n, step n + 1 computes one overrun token of it, which is dropped. The
//! sequence's blocks and slot can be reused immediately, because steps run in order. Draft tokens need the tokens
//! before them, so a step with draft tokens is made only after the outcome of the previous step, and the step after it
//! waits for its outcome.

mod admit;
mod batch;
mod budget;
mod draft;
mod host;
mod outcome;

use std::collections::{HashMap, VecDeque};

use bora_common::blocks::BlockHash;
use bora_proto::v1;

use crate::cache::{Delta, KvCache};
use crate::engine::EngineConfig;
use crate::engine::sequence::Sequence;
use crate::engine::step::Slot;
pub(crate) use budget::MAX_SCORED_POSITIONS;
use budget::{Prediction, StepBudget};

/// A step that was submitted and not collected.
struct InFlightStep {
    id: u64,
    works: Vec<FlightWork>,
    prediction: Prediction,
}

/// Work of a step in flight, as its outcome needs it.
struct FlightWork {
    slot: Slot,
    key: u64,
    sampled: bool,
    scored: bool,
    /// Whether the work computed the last known token.
    completes_prompt: bool,
    /// Number of draft tokens.
    drafts: usize,
}

/// The scheduler of a group.
pub(crate) struct Scheduler {
    config: EngineConfig,
    budget: StepBudget,
    cache: KvCache,
    /// Queues of interactive and batch sequences.
    waiting: [VecDeque<Sequence>; 2],
    /// Running sequences by slot.
    slots: Vec<Option<Sequence>>,
    /// Slots of running sequences in the order of their admission.
    order: Vec<Slot>,
    free_slots: Vec<Slot>,
    /// Slots that ended since the last step.
    releases: Vec<Slot>,
    /// Blocks that running sequences will publish.
    computing: HashMap<BlockHash, Slot>,
    flights: VecDeque<InFlightStep>,
    last_step: u64,
    completed: u64,
    /// Predicted seconds of all prefill so far.
    prefill_seconds: f64,
    /// Cached blocks with the name of a sequence's block and another content, since the last
    /// [`Self::drain_mismatches`].
    mismatches: u64,
    /// Draft tokens verified, and those accepted.
    drafted: u64,
    accepted: u64,
}

impl Scheduler {
    /// An empty scheduler. The configuration must have been checked.
    pub(crate) fn new(config: EngineConfig) -> Self {
        Self {
            budget: StepBudget::new(&config.speed, &config.options, config.least_chunk),
            cache: KvCache::new(config.kv_blocks, config.host.blocks),
            waiting: Default::default(),
            slots: (0..config.options.max_num_seqs).map(|_| None).collect(),
            order: Vec::new(),
            free_slots: (0..config.options.max_num_seqs).rev().collect(),
            releases: Vec::new(),
            computing: HashMap::new(),
            flights: VecDeque::new(),
            last_step: config.steps_run,
            completed: 0,
            prefill_seconds: 0.0,
            mismatches: 0,
            drafted: 0,
            accepted: 0,
            config,
        }
    }

    /// Number of steps submitted and not collected.
    pub(crate) fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// Predicted seconds of the steps in flight.
    pub(crate) fn predicted_seconds(&self) -> f64 {
        self.flights.iter().map(|flight| flight.prediction.seconds).sum()
    }

    /// Predicted seconds of the oldest step in flight.
    pub(crate) fn oldest_predicted_seconds(&self) -> f64 {
        self.flights.front().map_or(0.0, |flight| flight.prediction.seconds)
    }

    /// Number of the step that the ranks run.
    pub(crate) fn oldest_step(&self) -> u64 {
        self.flights.front().map_or(self.last_step, |flight| flight.id)
    }

    /// Load of the group.
    pub(crate) fn load(&self) -> v1::Load {
        let usage = self.cache.usage();
        let waiting = self.waiting.iter().flatten();
        let running = self.order.iter().filter_map(|slot| self.slots[*slot as usize].as_ref());
        let queued_prefill_tokens = waiting.map(|sequence| sequence.queued_tokens).sum::<usize>()
            + running.map(|sequence| sequence.initial_len.saturating_sub(sequence.computed)).sum::<usize>();
        v1::Load {
            running: self.order.len() as u32,
            waiting: self.waiting.iter().map(VecDeque::len).sum::<usize>() as u32,
            queued_prefill_tokens: queued_prefill_tokens as u64,
            blocks_total: usage.total as u32,
            blocks_used: usage.used as u32,
            blocks_cached: usage.cached as u32,
            host_blocks_total: usage.host_total as u32,
            host_blocks_cached: usage.host_cached as u32,
            steps: self.completed,
            prefill_seconds: self.prefill_seconds,
            draft_tokens: self.drafted,
            accepted_draft_tokens: self.accepted,
        }
    }

    /// Hashes of all cached blocks that have been reported.
    pub(crate) fn snapshot(&self) -> Vec<BlockHash> {
        self.cache.snapshot()
    }

    /// Blocks stored and evicted since the last call.
    pub(crate) fn drain_changes(&mut self) -> Delta {
        self.cache.drain_changes()
    }

    /// Cached blocks whose content differed from the block that has their name, since the last call.
    pub(crate) fn drain_mismatches(&mut self) -> u64 {
        std::mem::take(&mut self.mismatches)
    }

    /// Drops every cached block that no running sequence uses.
    pub(crate) fn flush_cache(&mut self) -> usize {
        self.cache.flush()
    }

    /// Publishes the full blocks of a sequence whose tokens are known and whose KV is computed.
    fn publish_full_blocks(&mut self, slot: Slot) {
        let Some(sequence) = self.slots[slot as usize].as_mut() else { return };
        let full = (sequence.computed / bora_common::blocks::BLOCK_TOKENS).min(sequence.blocks.len());
        while sequence.published < full {
            let content = &sequence.blocks[sequence.published];
            let hash = content.hash();
            if self.config.options.prefix_cache {
                let block = sequence.lease.blocks[sequence.published];
                match (sequence.published + 1) * bora_common::blocks::BLOCK_TOKENS <= sequence.request.prompt_len {
                    true => self.cache.publish(block, content),
                    false => self.cache.publish_generated(block, content),
                }
            }
            if self.computing.get(&hash) == Some(&slot) {
                self.computing.remove(&hash);
            }
            sequence.published += 1;
        }
    }
}

#[cfg(test)]
mod harness;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
