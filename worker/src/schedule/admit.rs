//! Admission: interactive before batch, each class in its order, as soon as there are a slot and all blocks that the
//! sequence can need.

use std::sync::Arc;
use std::time::Instant;

use bora_common::blocks::BlockHash;

use super::Scheduler;
use crate::cache::{BlockContent, Found};
use crate::engine::error::EngineError;
use crate::engine::request::Class;
use crate::engine::sequence::Sequence;
use crate::engine::step::Slot;
use crate::speculate::Speculator;

/// Outcome of admitting a waiting sequence.
enum Verdict {
    /// The sequence runs.
    Admitted,
    /// Another sequence is about to compute a block that this one needs; it is not computed twice.
    Wait(BlockHash),
    /// The sequence does not fit now, and no later one may overtake it.
    NoRoom,
}

impl Scheduler {
    /// Adds a sequence to the queue of its class. The caller enforces the bound of the queue.
    pub(crate) fn enqueue(&mut self, mut sequence: Sequence) {
        let cacheable = sequence.cacheable();
        let mut held = 0;
        if self.config.options.prefix_cache {
            held = cacheable
                .iter()
                .take_while(|block| self.cache.contains(block) || self.computing.contains_key(&block.hash()))
                .count();
        }
        sequence.queued_tokens = sequence.initial_len - held * bora_common::blocks::BLOCK_TOKENS;
        self.waiting[sequence.class as usize].push_back(sequence);
    }

    /// Admits all waiting sequences that may run.
    pub(super) fn admit_waiting(&mut self, now: Instant) {
        for class in [Class::Interactive, Class::Batch] {
            let mut index = 0;
            while index < self.waiting[class as usize].len() {
                let still_computed = self.waiting[class as usize][index]
                    .waits_for
                    .is_some_and(|hash| self.computing.contains_key(&hash));
                if still_computed {
                    index += 1;
                    continue;
                }
                if self.free_slots.is_empty() {
                    return;
                }
                match self.try_admit(class, index, now) {
                    Verdict::Admitted => {}
                    Verdict::Wait(hash) => {
                        self.raise_class(&hash, class);
                        self.waiting[class as usize][index].waits_for = Some(hash);
                        index += 1;
                    }
                    Verdict::NoRoom => return,
                }
            }
        }
    }

    fn try_admit(&mut self, class: Class, index: usize, now: Instant) -> Verdict {
        let sequence = &self.waiting[class as usize][index];
        let mut cacheable: &[Arc<BlockContent>] = &[];
        let mut found = Found::default();
        if self.config.options.prefix_cache {
            cacheable = sequence.cacheable();
            found = self.cache.find(cacheable);
            // includes blocks that another sequence fetches from host memory
            for next in [found.on_device, found.total].iter().filter_map(|index| cacheable.get(*index)) {
                if self.computing.contains_key(&next.hash()) {
                    return Verdict::Wait(next.hash());
                }
            }
            if !self.worth_fetching(found) {
                cacheable = &cacheable[..found.on_device];
            }
        }
        let Some(lease) = self.cache.admit(cacheable, sequence.blocks_needed()) else {
            return Verdict::NoRoom;
        };
        let (Some(slot), Some(mut sequence)) = (self.free_slots.pop(), self.waiting[class as usize].remove(index))
        else {
            self.cache.release(lease);
            return Verdict::NoRoom;
        };
        if found.mismatch {
            self.mismatches += 1;
            let (request_id, block) = (&sequence.request.request_id, found.total);
            tracing::error!(request_id, block, "a cached block has the same name and another content");
        }
        sequence.start(lease, now);
        sequence.speculator = self.config.options.speculative.as_ref().and_then(Speculator::new);
        for block in &sequence.blocks[sequence.published..] {
            self.computing.entry(block.hash()).or_insert(slot);
        }
        self.slots[slot as usize] = Some(sequence);
        self.order.push(slot);
        Verdict::Admitted
    }

    /// A sequence of `class` waits for a block: the sequence that computes the block is raised to that class.
    fn raise_class(&mut self, hash: &BlockHash, class: Class) {
        let owner = self.computing.get(hash).and_then(|slot| self.slots[*slot as usize].as_mut());
        if let Some(sequence) = owner {
            sequence.class = sequence.class.min(class);
        }
    }

    /// Ends every sequence whose caller is gone.
    pub(super) fn drop_abandoned(&mut self) {
        for queue in &mut self.waiting {
            queue.retain(|sequence| !sequence.events.is_closed());
        }
        let abandoned: Vec<Slot> = self
            .order
            .iter()
            .copied()
            .filter(|slot| self.slots[*slot as usize].as_ref().is_some_and(|sequence| sequence.events.is_closed()))
            .collect();
        for slot in abandoned {
            if let Some(sequence) = self.remove(slot) {
                tracing::debug!(request_id = sequence.request.request_id, "aborted, the caller disconnected");
            }
        }
    }

    /// Ends every waiting sequence.
    pub(crate) fn fail_waiting(&mut self, error: &EngineError) {
        for sequence in self.waiting.iter_mut().flat_map(std::mem::take) {
            sequence.events.end(Err(error.clone()));
        }
    }

    /// Ends every waiting or running sequence.
    pub(crate) fn fail_all(&mut self, error: &EngineError) {
        self.fail_waiting(error);
        for slot in self.order.clone() {
            if let Some(sequence) = self.remove(slot) {
                sequence.events.end(Err(error.clone()));
            }
        }
    }

    /// Removes a running sequence and releases its slot and its blocks.
    pub(super) fn remove(&mut self, slot: Slot) -> Option<Sequence> {
        let mut sequence = self.slots[slot as usize].take()?;
        self.order.retain(|running| *running != slot);
        self.cache.release(std::mem::take(&mut sequence.lease));
        for hash in sequence.blocks[sequence.published..].iter().map(|block| block.hash()) {
            if self.computing.get(&hash) == Some(&slot) {
                self.computing.remove(&hash);
            }
        }
        if sequence.admitted_on_ranks {
            self.releases.push(slot);
        }
        self.free_slots.push(slot);
        Some(sequence)
    }
}
