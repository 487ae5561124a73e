//! The prefix cache: full blocks are found by the hash of all tokens up to their end, and used if their content is
//! equal.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use bora_common::blocks::BlockHash;

use super::content::BlockContent;
use super::events::{Changes, Delta};
use super::host::HostTier;
use super::pool::BlockPool;
use crate::engine::step::{BlockCopy, BlockId, HostBlock};

/// Blocks of a running sequence in the order of its positions, and the number of blocks that it may still take. The
/// lease must be returned with [`KvCache::release`].
#[derive(Debug, Default)]
pub struct Lease {
    /// Block `p / 64` holds position `p`.
    pub blocks: Vec<BlockId>,
    /// Blocks that the lease may still take.
    pub reserved: usize,
    /// Blocks whose content is in host memory, in order. Their content must be copied before it is read.
    pub fetches: VecDeque<Fetch>,
}

/// A block that is fetched from host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetch {
    /// Source.
    pub from: HostBlock,
    /// Target.
    pub to: BlockId,
}

/// Cached part of a chain of blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Leading blocks on the device.
    pub on_device: usize,
    /// Leading blocks on the device or in host memory.
    pub total: usize,
    /// Leading blocks in host memory alone.
    pub in_host: usize,
    /// Whether the next block has the name of a cached block with another content.
    pub mismatch: bool,
}

/// Location of a block.
enum Location {
    Device(BlockId),
    Host,
    /// Another block has the same name.
    Taken,
    Nowhere,
}

/// Number of blocks by state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// All blocks.
    pub total: usize,
    /// Referenced by a running sequence.
    pub used: usize,
    /// Unreferenced, but cached.
    pub cached: usize,
    /// Reserved by running sequences and not yet taken.
    pub reserved: usize,
    /// All blocks of host memory.
    pub host_total: usize,
    /// Blocks of host memory in use.
    pub host_cached: usize,
}

/// The KV cache of a group, as its leader keeps it: which block holds what. It is the same on every rank.
///
/// `reserved <= available` always holds. An admitted sequence therefore never waits for a block and never loses one.
#[derive(Debug)]
pub struct KvCache {
    pool: BlockPool,
    by_hash: HashMap<BlockHash, BlockId>,
    contents: Vec<Option<Arc<BlockContent>>>,
    reserved: usize,
    changes: Changes,
    /// Blocks that can be found and that are reported when a sequence releases them.
    unreported: HashSet<BlockHash>,
    host: HostTier,
    /// Copies that must complete before the next step writes to the cache.
    copies: Vec<BlockCopy>,
    /// Host blocks that the last step reads from.
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

    /// Finds how many of the first blocks of a chain are cached.
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

    /// Finds a block. The content of the cached block with the same name is compared, because a name is no proof.
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

    /// Reserves `total` blocks. The first of them are the leading cached blocks of `blocks`. `None` if they do not fit
    /// now.
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
        // all are pinned before the first block is taken, because taking one may evict another to host memory
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

    /// Takes up to `most` of the copies that a lease waits for; the current step runs them beside its work. The copies
    /// of the previous step are complete by then.
    pub fn fetch(&mut self, lease: &mut Lease, most: usize) -> Vec<BlockCopy> {
        let count = lease.fetches.len().min(most);
        let fetches = lease.fetches.drain(..count).map(|Fetch { from, to }| {
            self.being_fetched.push(from);
            BlockCopy::FromHost { host: from, block: to }
        });
        fetches.collect()
    }

    /// Begins a step: host blocks that the previous step fetched may be evicted again.
    pub fn begin_step(&mut self) {
        for place in std::mem::take(&mut self.being_fetched) {
            self.host.fetched(place);
        }
    }

    /// Copies to host memory, at most `most`, of the blocks that are evicted first if the next step takes `wanted`
    /// blocks. The current step does not write to them.
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

    /// Takes the copies that the next step must complete before its work.
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

    /// Appends blocks to the lease, from its reservation, until it has `blocks` of them. Evicts the least recently used
    /// cached blocks if no free ones are left. A lease gets no more blocks than it reserved.
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

    /// Publishes a full referenced block, so that it can be found. If another block already has the name, this block
    /// stays unnamed.
    pub fn publish(&mut self, block: BlockId, content: &Arc<BlockContent>) {
        if self.name(block, content) {
            self.changes.stored(content.hash());
        }
    }

    /// Publishes a block that generated tokens filled. The block is reported when a sequence releases it: only the next
    /// turn needs it, and routers look up blocks that were reported together several times faster than blocks that were
    /// reported one by one.
    pub fn publish_generated(&mut self, block: BlockId, content: &Arc<BlockContent>) {
        if self.name(block, content) {
            self.unreported.insert(content.hash());
        }
    }

    /// Names the block; returns whether watchers must be informed.
    fn name(&mut self, block: BlockId, content: &Arc<BlockContent>) -> bool {
        let hash = content.hash();
        if self.by_hash.contains_key(&hash) || self.contents[block as usize].is_some() {
            return false;
        }
        self.by_hash.insert(hash, block);
        self.contents[block as usize] = Some(Arc::clone(content));
        !self.host.contains(&hash)
    }

    /// Removes a block whose content is invalid from the cache.
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

    /// Releases the blocks and the reservation of an ended sequence. The end of a prefix is evicted before its start.
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

    /// Drops every block that no sequence refers to, on the device and in host memory; returns their number.
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

    /// Number of blocks by state.
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

    /// The hashes of all blocks that can be found, except those that are not reported yet.
    pub fn snapshot(&self) -> Vec<BlockHash> {
        // in the order of the pool: blocks of one chain were mostly taken one after the other
        let named = self.contents.iter().flatten().map(|content| content.hash());
        let on_device = named.filter(|hash| !self.unreported.contains(hash));
        on_device.chain(self.host.hashes().filter(|hash| !self.by_hash.contains_key(hash))).collect()
    }

    /// Changes since the last call.
    pub fn drain_changes(&mut self) -> Delta {
        self.changes.drain()
    }

    /// Replaces the content of a cached block, as a forger of names would; for tests.
    #[cfg(test)]
    pub(crate) fn forge(&mut self, content: Arc<BlockContent>) {
        let block = self.by_hash[&content.hash()];
        self.contents[block as usize] = Some(content);
    }

    /// Checks all invariants; for tests.
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
            assert!(!self.unreported.contains(&content.hash()), "an idle block is never reported");
        }
        assert!(self.unreported.iter().all(|hash| self.by_hash.contains_key(hash) && !self.host.contains(hash)));
    }
}

#[cfg(test)]
#[path = "prefix_tests.rs"]
mod tests;
