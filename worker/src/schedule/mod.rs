//! What runs next. The scheduler is plain data: it is notified of sequences and outcomes, and makes steps. It
//! owns the KV cache's bookkeeping; it knows neither threads nor clocks (whoever calls says what time it
//! is) nor the device.
//!
//! - `admit`: who leaves the queue. Blocks are reserved to the sequence's end, so nothing that runs is ever
//!   evicted.
//! - `budget`: how many tokens of which prompt fit into a step.
//! - `draft`: which token IDs are drafted, and verified in the step that would sample them.
//! - `host`: blocks that go to host memory and come back.
//! - `batch`: makes the step; `outcome`: takes in what came of it.
//!
//! With a pipeline of two, step n + 1 is made before the token IDs of step n are known: a decode refers to the id
//! on the device. A sequence that turns out to have ended with step n has then one overrun token in
//! step n + 1, which is dropped; its blocks and its slot can be reused at once, since steps run in order.
//! Draft tokens need the token IDs before them: the step after one with draft tokens waits for its outcome, and so does one before it.

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

/// What has to be known of a step's work when its outcome arrives.
struct FlightWork {
    slot: Slot,
    key: u64,
    sampled: bool,
    scored: bool,
    /// It computed the last known token.
    completes_prompt: bool,
    /// Ids that it drafted.
    drafts: usize,
}

/// Decides what runs.
pub(crate) struct Scheduler {
    config: EngineConfig,
    budget: StepBudget,
    cache: KvCache,
    /// Interactive, batch.
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
    /// Predicted time of all prompt computing so far.
    prefill_seconds: f64,
    /// Cached blocks that had the name of a sequence's block and held something else, since they were last asked for.
    mismatches: u64,
    /// Draft tokens made, and those that came true.
    drafted: u64,
    accepted: u64,
}

impl Scheduler {
    /// An empty one. The configuration has been checked.
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

    /// Steps submitted and not collected.
    pub(crate) fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// Predicted seconds of the steps in flight.
    pub(crate) fn predicted_seconds(&self) -> f64 {
        self.flights.iter().map(|flight| flight.prediction.seconds).sum()
    }

    /// Predicted seconds of the oldest of them.
    pub(crate) fn oldest_predicted_seconds(&self) -> f64 {
        self.flights.front().map_or(0.0, |flight| flight.prediction.seconds)
    }

    /// The step that the ranks are at.
    pub(crate) fn oldest_step(&self) -> u64 {
        self.flights.front().map_or(self.last_step, |flight| flight.id)
    }

    /// How busy the group is.
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

    /// The hashes of all blocks that can be found and are given.
    pub(crate) fn snapshot(&self) -> Vec<BlockHash> {
        self.cache.snapshot()
    }

    /// Blocks stored and evicted since the last call.
    pub(crate) fn drain_changes(&mut self) -> Delta {
        self.cache.drain_changes()
    }

    /// Cached blocks that held something else than their names promised, since the last call.
    pub(crate) fn drain_mismatches(&mut self) -> u64 {
        std::mem::take(&mut self.mismatches)
    }

    /// Forgets every cached block that no running sequence uses.
    pub(crate) fn flush_cache(&mut self) -> usize {
        self.cache.flush()
    }

    /// Publishes the blocks of a sequence whose token IDs are known and whose KV is computed.
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
