//! The prefix cache: full blocks found again by the hash of everything up to their end, and used if they hold the same.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use bora_common::blocks::BlockHash;

use super::content::BlockContent;
use super::events::{Changes, Delta};
use super::host::HostTier;
use super::pool::BlockPool;
use crate::engine::step::{BlockCopy, BlockId, HostBlock};

/// A running sequence's blocks: those it has, in the order of its positions, and how many more it may
/// take. Has to be given back with [`KvCache::release`].
#[derive(Debug, Default)]
pub struct Lease {
    /// Block `p / 64` holds position `p`.
    pub blocks: Vec<BlockId>,
    /// Blocks that it may still take.
    pub reserved: usize,
    /// Blocks of the lease whose content is in host memory, in their order, and has to be copied before anything reads it.
    pub fetches: VecDeque<Fetch>,
}

/// A block that comes back from host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetch {
    /// Where it is.
    pub from: HostBlock,
    /// Where it goes.
    pub to: BlockId,
}

/// How much of a chain can be found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Leading blocks that are on the device.
    pub on_device: usize,
    /// Leading blocks that are on the device or in host memory.
    pub total: usize,
    /// Of those, the ones that are in host memory alone.
    pub in_host: usize,
    /// The block behind them has the name of a cached one that holds something else.
    pub mismatch: bool,
}

/// Where a block is.
enum Location {
    Device(BlockId),
    Host,
    /// Another block has its name.
    Taken,
    Nowhere,
}

/// How many blocks are what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// All.
    pub total: usize,
    /// Referenced by a running sequence.
    pub used: usize,
    /// Unreferenced, but found again by their hash.
    pub cached: usize,
    /// Promised to running sequences and not yet taken.
    pub reserved: usize,
    /// All of host memory.
    pub host_total: usize,
    /// Of host memory, those that hold a block.
    pub host_cached: usize,
}

/// The KV cache of a group, as its leader sees it: which block holds what. The same on every rank.
///
/// Reservations are promises: `reserved <= available` holds always, so a sequence that was admitted never
/// waits for a block and none is ever taken away from it.
#[derive(Debug)]
pub struct KvCache {
    pool: BlockPool,
    by_hash: HashMap<BlockHash, BlockId>,
    contents: Vec<Option<Arc<BlockContent>>>,
    reserved: usize,
    changes: Changes,
    /// Blocks that can be found and that watchers hear of when a sequence gives them back.
    unreported: HashSet<BlockHash>,
    host: HostTier,
    /// Copies that have to be done before the next step writes anything.
    copies: Vec<BlockCopy>,
    /// Places in host memory that the step made last reads from.
    being_fetched: Vec<HostBlock>,
}

impl KvCache {
    /// An empty cache of `blocks` blocks, and of `host_blocks` in host memory.
    pub fn new(blocks: u32, host_blocks: u32) -> Self {
        Self {
            pool: BlockPool::new(blocks),
            by_hash: HashMap::new(),
            contents: vec![None; blocks as usize],
            reserved: 0,
            changes: Changes::default(),
            unreported: HashSet::new(),
            host: HostTier::new(host_blocks),
            copies: Vec::new(),
            being_fetched: Vec::new(),
        }
    }

    /// How many of the first blocks of a chain are there.
    pub fn find(&self, blocks: &[Arc<BlockContent>]) -> Found {
        let mut found = Found::default();
        for block in blocks {
            match self.locate(block) {
                Location::Device(_) => found.on_device += usize::from(found.on_device == found.total),
                Location::Host => found.in_host += 1,
                Location::Taken => return Found { mismatch: true, ..found },
                Location::Nowhere => return found,
            }
            found.total += 1;
        }
        found
    }

    /// Whether a block can be found.
    pub fn contains(&self, block: &BlockContent) -> bool {
        matches!(self.locate(block), Location::Device(_) | Location::Host)
    }

    /// Where a block is. The cached one of its name is compared: a name is no proof.
    fn locate(&self, block: &BlockContent) -> Location {
        if let Some(held) = self.by_hash.get(&block.hash()) {
            let same = self.contents[*held as usize].as_deref() == Some(block);
            return if same { Location::Device(*held) } else { Location::Taken };
        }
        match self.host.holds(block) {
            Some(true) => Location::Host,
            Some(false) => Location::Taken,
            None => Location::Nowhere,
        }
    }

    /// Reserves `total` blocks, of which the first are those of `blocks` that are there (in one chunk from
    /// the start). `None` where they do not fit now.
    pub fn admit(&mut self, blocks: &[Arc<BlockContent>], total: usize) -> Option<Lease> {
        let held: Vec<Option<BlockId>> = blocks
            .iter()
            .take(total)
            .map_while(|block| match self.locate(block) {
                Location::Device(held) => Some(Some(held)),
                Location::Host => Some(None),
                Location::Taken | Location::Nowhere => None,
            })
            .collect();
        let found = &blocks[..held.len()];
        let newly_pinned = held.iter().flatten().filter(|block| self.pool.references(**block) == 0).count();
        let to_reserve = total - held.iter().flatten().count();
        if self.pool.available() - self.reserved < newly_pinned + to_reserve {
            return None;
        }
        for block in held.iter().flatten() {
            self.pool.refer(*block);
        }
        self.reserved += to_reserve;
        let mut lease = Lease { reserved: to_reserve, ..Lease::default() };
        // all are pinned before the first block is taken, which may move another one there
        let absent = found.iter().zip(&held).filter(|(_, held)| held.is_none());
        let mut places: VecDeque<HostBlock> = absent.filter_map(|(block, _)| self.host.pin(&block.hash())).collect();
        for held in held {
            match held {
                Some(block) => lease.blocks.push(block),
                None => {
                    let next = lease.blocks.len() + 1;
                    self.grow(&mut lease, next);
                    if let (Some(from), Some(to)) = (places.pop_front(), lease.blocks.last().copied()) {
                        lease.fetches.push_back(Fetch { from, to });
                    }
                }
            }
        }
        Some(lease)
    }

    /// Takes up to `most` of the copies that a lease waits for; the step that is being made does them beside its work. Those
    /// of the step before are done by then.
    pub fn fetch(&mut self, lease: &mut Lease, most: usize) -> Vec<BlockCopy> {
        let count = lease.fetches.len().min(most);
        let fetches = lease.fetches.drain(..count).map(|Fetch { from, to }| {
            self.being_fetched.push(from);
            BlockCopy::FromHost { host: from, block: to }
        });
        fetches.collect()
    }

    /// A step is being made: what the one before it fetched may be given up again.
    pub fn begin_step(&mut self) {
        for place in std::mem::take(&mut self.being_fetched) {
            self.host.fetched(place);
        }
    }

    /// Copies to host memory, at most `most`, of what will be given up first if the next step takes `wanted` blocks. Nobody
    /// writes there during the step that is being made.
    pub fn spill(&mut self, wanted: usize, most: usize) -> Vec<BlockCopy> {
        let doomed = wanted.saturating_sub(self.pool.free());
        let oldest: Vec<BlockId> = self.pool.idle_blocks().take(doomed).collect();
        let mut copies = Vec::new();
        for block in oldest {
            if copies.len() >= most {
                break;
            }
            copies.extend(self.keep_copy(block));
        }
        copies
    }

    /// What the next step has to copy before anything else.
    pub fn take_copies(&mut self) -> Vec<BlockCopy> {
        std::mem::take(&mut self.copies)
    }

    /// The copy to host memory that a named block still needs, if there is room for it.
    fn keep_copy(&mut self, block: BlockId) -> Option<BlockCopy> {
        let content = self.contents[block as usize].as_ref().filter(|content| !self.host.contains(&content.hash()))?;
        let stored = self.host.store(Arc::clone(content))?;
        if let Some(given_up) = stored.given_up.filter(|hash| !self.by_hash.contains_key(hash)) {
            self.changes.evicted(given_up);
        }
        Some(BlockCopy::ToHost { block, host: stored.place })
    }

    /// Appends blocks to the lease, from its reservation, until it has `blocks` of them. Gives up the
    /// longest unused cached blocks where no free ones are left. A lease that asks for more than it
    /// reserved gets no more than that.
    pub fn grow(&mut self, lease: &mut Lease, blocks: usize) {
        while lease.blocks.len() < blocks && lease.reserved > 0 {
            let Some(block) = self.take() else {
                debug_assert!(false, "a reservation was not kept");
                return;
            };
            lease.blocks.push(block);
            lease.reserved -= 1;
            self.reserved -= 1;
        }
    }

    fn take(&mut self) -> Option<BlockId> {
        if let Some(block) = self.pool.take_free() {
            return Some(block);
        }
        let block = self.pool.take_oldest()?;
        let is_there = self.contents[block as usize].as_ref().is_some_and(|content| self.host.touch(&content.hash()));
        if !is_there {
            let copy = self.keep_copy(block);
            self.copies.extend(copy);
        }
        self.unname(block);
        Some(block)
    }

    /// A referenced block is full: from now on it can be found. Where another block already has that
    /// name, this one stays unnamed.
    pub fn publish(&mut self, block: BlockId, content: &Arc<BlockContent>) {
        if self.name(block, content) {
            self.changes.stored(content.hash());
        }
    }

    /// The same of a block that generated token IDs filled. Watchers hear of it when a sequence gives it back: who asks for it is
    /// the next turn, and routers look up what is notified at once several times faster than what is given block by block.
    pub fn publish_generated(&mut self, block: BlockId, content: &Arc<BlockContent>) {
        if self.name(block, content) {
            self.unreported.insert(content.hash());
        }
    }

    /// Whether the block has got the name, and it is news.
    fn name(&mut self, block: BlockId, content: &Arc<BlockContent>) -> bool {
        let hash = content.hash();
        if self.by_hash.contains_key(&hash) || self.contents[block as usize].is_some() {
            return false;
        }
        self.by_hash.insert(hash, block);
        self.contents[block as usize] = Some(Arc::clone(content));
        !self.host.contains(&hash)
    }

    /// The content of a block is not to be trusted: it can't be found any more.
    pub fn forget(&mut self, block: BlockId) {
        self.unname(block);
        self.pool.discard(block);
    }

    fn unname(&mut self, block: BlockId) {
        if let Some(content) = self.contents[block as usize].take() {
            let hash = content.hash();
            self.by_hash.remove(&hash);
            if !self.unreported.remove(&hash) && !self.host.contains(&hash) {
                self.changes.evicted(hash);
            }
        }
    }

    /// The sequence ended: gives back its blocks and what it did not take. The end of a prefix is given up
    /// before its start.
    pub fn release(&mut self, lease: Lease) {
        self.reserved -= lease.reserved;
        for content in lease.blocks.iter().filter_map(|block| self.contents[*block as usize].as_ref()) {
            if self.unreported.remove(&content.hash()) {
                self.changes.stored(content.hash());
            }
        }
        for fetch in &lease.fetches {
            self.host.unpin(fetch.from);
        }
        for block in lease.blocks.iter().rev() {
            let keep = self.contents[*block as usize].is_some();
            self.pool.release(*block, keep);
        }
    }

    /// Pinned blocks of host memory; for tests.
    #[cfg(test)]
    pub(crate) fn host_pinned(&self) -> usize {
        self.host.pinned()
    }

    /// Forgets every block that no sequence refers to, here and in host memory; returns how many that were.
    pub fn flush(&mut self) -> usize {
        let idle: Vec<BlockId> = self.pool.idle_blocks().collect();
        for block in &idle {
            self.forget(*block);
        }
        let spilled = self.host.flush();
        for hash in &spilled {
            if !self.by_hash.contains_key(hash) {
                self.changes.evicted(*hash);
            }
        }
        idle.len() + spilled.len()
    }

    /// How many blocks are what.
    pub fn usage(&self) -> Usage {
        Usage {
            total: self.pool.total(),
            used: self.pool.total() - self.pool.available(),
            cached: self.pool.idle(),
            reserved: self.reserved,
            host_total: self.host.usage().0,
            host_cached: self.host.usage().1,
        }
    }

    /// The hashes of all blocks that can be found, but for those that watchers will hear of.
    pub fn snapshot(&self) -> Vec<BlockHash> {
        // in the order of the pool: blocks of one chain were mostly taken one after the other
        let named = self.contents.iter().flatten().map(|content| content.hash());
        let on_device = named.filter(|hash| !self.unreported.contains(hash));
        on_device.chain(self.host.hashes().filter(|hash| !self.by_hash.contains_key(hash))).collect()
    }

    /// What changed since the last call.
    pub fn drain_changes(&mut self) -> Delta {
        self.changes.drain()
    }

    /// Replaces what a findable block is known to hold, as a forger of names would; for tests.
    #[cfg(test)]
    pub(crate) fn forge(&mut self, content: Arc<BlockContent>) {
        let block = self.by_hash[&content.hash()];
        self.contents[block as usize] = Some(content);
    }

    /// Checks every invariant; for tests.
    #[cfg(test)]
    pub(crate) fn check(&self) {
        self.pool.check();
        self.host.check();
        assert!(self.reserved <= self.pool.available(), "a promise can't be kept");
        assert_eq!(self.by_hash.len(), self.contents.iter().flatten().count());
        for (hash, block) in &self.by_hash {
            assert_eq!(self.contents[*block as usize].as_ref().map(|content| content.hash()), Some(*hash));
        }
        for block in self.pool.idle_blocks() {
            let content = self.contents[block as usize].as_ref().expect("an idle block without a name is lost");
            assert!(!self.unreported.contains(&content.hash()), "nobody would ever hear of it");
        }
        assert!(self.unreported.iter().all(|hash| self.by_hash.contains_key(hash) && !self.host.contains(hash)));
    }
}

#[cfg(test)]
#[path = "prefix_tests.rs"]
mod tests;
