//! A group in virtual time: a prefix cache of blocks with the least recently used evicted first, prefills
//! one after the other, decodes side by side, each as long as the cost model says.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use bora_common::{blocks::BlockHash, cost::CostModel};
use bora_proto::v1::Load;

use super::Request;

/// What the group would report its watchers.
#[derive(Clone, Debug, Default)]
pub(super) struct Update {
    pub(super) stored: Vec<u8>,
    pub(super) evicted: Vec<u8>,
}

/// A request on a group.
struct Running {
    number: usize,
    hashes: Arc<[BlockHash]>,
    context: u64,
    /// Of the prompt, what the group did not hold when it last looked.
    to_compute: u64,
    output: u64,
}

/// The prompt that is computed now.
struct Prefill {
    request: Running,
    began: f64,
    seconds: f64,
}

impl Prefill {
    /// Tokens that are left to compute.
    fn left(&self, now: f64) -> u64 {
        let done = ((now - self.began) / self.seconds.max(1e-9)).clamp(0.0, 1.0);
        (self.request.to_compute as f64 * (1.0 - done)) as u64
    }
}

/// A group.
pub(super) struct SimulatedGroup {
    cost: CostModel,
    max_sequences: usize,
    capacity: usize,
    /// Stamp of each block's last use, and those that nobody uses now by it.
    stamps: HashMap<BlockHash, u64>,
    by_stamp: BTreeMap<u64, BlockHash>,
    pinned: HashMap<BlockHash, u32>,
    clock: u64,
    waiting: VecDeque<Running>,
    prefilling: Option<Prefill>,
    decoding: Vec<Running>,
    pub(super) reported: Update,
    /// Seconds spent on prefills.
    pub(super) busy_seconds: f64,
    /// Requests.
    pub(super) taken: usize,
    pub(super) held_tokens: u64,
    pub(super) prompt_tokens: u64,
}

/// What comes next for a request on a group.
#[derive(Clone, Copy, Debug)]
pub(super) enum Next {
    /// Its first token.
    FirstToken { request: usize, at: f64 },
    /// Its last one.
    End { request: usize, at: f64 },
}

impl SimulatedGroup {
    pub(super) fn new(cost: CostModel, max_sequences: u32, blocks: u32) -> Self {
        Self {
            cost,
            max_sequences: max_sequences as usize,
            capacity: blocks as usize,
            stamps: HashMap::new(),
            by_stamp: BTreeMap::new(),
            pinned: HashMap::new(),
            clock: 0,
            waiting: VecDeque::new(),
            prefilling: None,
            decoding: Vec::new(),
            reported: Update::default(),
            busy_seconds: 0.0,
            taken: 0,
            held_tokens: 0,
            prompt_tokens: 0,
        }
    }

    /// How many of a chain's first blocks it holds.
    pub(super) fn held(&self, hashes: &[BlockHash]) -> usize {
        hashes.iter().take_while(|hash| self.stamps.contains_key(hash)).count()
    }

    pub(super) fn sequences(&self) -> usize {
        self.waiting.len() + usize::from(self.prefilling.is_some()) + self.decoding.len()
    }

    /// Whether a prompt is computed, so that there is news without anything coming or going.
    pub(super) fn is_computing(&self) -> bool {
        self.prefilling.is_some()
    }

    pub(super) fn load(&self, now: f64) -> Load {
        let waiting: u64 = self.waiting.iter().map(|request| request.to_compute).sum();
        let queued = waiting + self.prefilling.as_ref().map_or(0, |prefill| prefill.left(now));
        Load {
            running: (usize::from(self.prefilling.is_some()) + self.decoding.len()) as u32,
            waiting: if self.decoding.len() >= self.max_sequences { self.waiting.len() as u32 } else { 0 },
            queued_prefill_tokens: queued,
            blocks_total: self.capacity as u32,
            prefill_seconds: self.busy_seconds,
            ..Load::default()
        }
    }

    /// Seconds of prompts that it was given so far.
    pub(super) fn work(&self) -> f64 {
        let waits =
            |request: &Running| self.cost.prefill_seconds(request.context - request.to_compute, request.to_compute);
        self.busy_seconds + self.waiting.iter().map(waits).sum::<f64>()
    }

    /// A request arrives.
    pub(super) fn take(&mut self, number: usize, request: &Request, now: f64) -> Option<Next> {
        self.taken += 1;
        let held = self.held(&request.hashes) as u64 * 64;
        self.waiting.push_back(Running {
            number,
            hashes: request.hashes.clone(),
            context: request.tokens,
            to_compute: request.tokens.saturating_sub(held).max(1),
            output: request.output,
        });
        self.start(now)
    }

    /// The prefill that runs is done.
    pub(super) fn first_token(&mut self, now: f64) -> [Option<Next>; 2] {
        let Some(Prefill { request: done, .. }) = self.prefilling.take() else {
            return [None, None];
        };
        self.store(&done.hashes);
        let contexts = self.decoding.iter().map(|other| other.context).sum::<u64>() + done.context;
        let step = self.cost.decode_seconds(self.decoding.len() as u64 + 1, contexts);
        let end = Next::End { request: done.number, at: now + step * done.output as f64 };
        self.decoding.push(done);
        [Some(end), self.start(now)]
    }

    /// A sequence ends; its blocks may be evicted from now on.
    pub(super) fn end(&mut self, number: usize, now: f64) -> Option<Next> {
        if let Some(place) = self.decoding.iter().position(|request| request.number == number) {
            let done = self.decoding.swap_remove(place);
            self.unpin(&done.hashes);
        }
        self.start(now)
    }

    /// It died: the requests that it had.
    pub(super) fn die(&mut self) -> Vec<usize> {
        let all = self
            .waiting
            .drain(..)
            .chain(self.prefilling.take().map(|prefill| prefill.request))
            .chain(self.decoding.drain(..));
        all.map(|request| request.number).collect()
    }

    fn start(&mut self, now: f64) -> Option<Next> {
        if self.prefilling.is_some() || self.decoding.len() >= self.max_sequences {
            return None;
        }
        let mut next = self.waiting.pop_front()?;
        let held = (self.held(&next.hashes) as u64 * 64).min(next.context - 1);
        for hash in next.hashes.iter() {
            let pins = self.pinned.entry(*hash).or_default();
            *pins += 1;
            if *pins == 1
                && let Some(stamp) = self.stamps.get(hash)
            {
                self.by_stamp.remove(stamp);
            }
        }
        let seconds = self.cost.prefill_seconds(held, next.context - held);
        self.busy_seconds += seconds;
        self.held_tokens += held;
        self.prompt_tokens += next.context;
        let first = Next::FirstToken { request: next.number, at: now + seconds };
        next.to_compute = next.context - held;
        self.prefilling = Some(Prefill { request: next, began: now, seconds });
        Some(first)
    }

    fn store(&mut self, hashes: &[BlockHash]) {
        for hash in hashes {
            if self.stamps.insert(*hash, 0).is_none() {
                self.reported.stored.extend(hash.to_bytes());
            }
        }
        while self.stamps.len() > self.capacity {
            let Some((_, oldest)) = self.by_stamp.pop_first() else {
                return; // everything is in use
            };
            self.stamps.remove(&oldest);
            self.reported.evicted.extend(oldest.to_bytes());
        }
    }

    /// Blocks of the end are older than those of the beginning, so that chains are eaten from behind.
    fn unpin(&mut self, hashes: &[BlockHash]) {
        for hash in hashes.iter().rev() {
            let Some(pins) = self.pinned.get_mut(hash) else {
                continue;
            };
            *pins -= 1;
            if *pins > 0 {
                continue;
            }
            self.pinned.remove(hash);
            if let Some(stamp) = self.stamps.get_mut(hash) {
                self.clock += 1;
                *stamp = self.clock;
                self.by_stamp.insert(self.clock, *hash);
            }
        }
    }
}
