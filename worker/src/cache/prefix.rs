//! The prefix cache: full blocks found again by the hash of everything up to their end.

use std::collections::HashMap;

use bora_common::blocks::BlockHash;

use super::events::{Changes, Delta};
use super::pool::BlockPool;
use crate::engine::step::BlockId;

/// A running sequence's blocks: those it has, in the order of its positions, and how many more it may
/// take. Has to be given back with [`KvCache::release`].
#[derive(Debug, Default)]
pub struct Lease {
    /// Block `p / 64` holds position `p`.
    pub blocks: Vec<BlockId>,
    /// Blocks that it may still take.
    pub reserved: usize,
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
}

/// The KV cache of a group, as its leader sees it: which block holds what. The same on every rank.
///
/// Reservations are promises: `reserved <= available` holds always, so a sequence that was admitted never
/// waits for a block and none is ever taken away from it.
#[derive(Debug)]
pub struct KvCache {
    pool: BlockPool,
    by_hash: HashMap<BlockHash, BlockId>,
    hash_of: Vec<Option<BlockHash>>,
    reserved: usize,
    changes: Changes,
}

impl KvCache {
    /// An empty cache of `blocks` blocks.
    pub fn new(blocks: u32) -> Self {
        Self {
            pool: BlockPool::new(blocks),
            by_hash: HashMap::new(),
            hash_of: vec![None; blocks as usize],
            reserved: 0,
            changes: Changes::default(),
        }
    }

    /// How many of the first blocks of a chain are there.
    pub fn find(&self, hashes: &[BlockHash]) -> usize {
        hashes.iter().take_while(|hash| self.by_hash.contains_key(hash)).count()
    }

    /// Whether a block can be found.
    pub fn contains(&self, hash: &BlockHash) -> bool {
        self.by_hash.contains_key(hash)
    }

    /// Reserves `total` blocks, of which the first are those of `hashes` that are there (in one piece from
    /// the start). `None` where they do not fit now.
    pub fn admit(&mut self, hashes: &[BlockHash], total: usize) -> Option<Lease> {
        let found = self.find(hashes).min(total);
        let blocks: Vec<BlockId> = hashes[..found].iter().filter_map(|hash| self.by_hash.get(hash).copied()).collect();
        let newly_pinned = blocks.iter().filter(|block| self.pool.references(**block) == 0).count();
        let to_reserve = total - found;
        if self.pool.available() - self.reserved < newly_pinned + to_reserve {
            return None;
        }
        for block in &blocks {
            self.pool.refer(*block);
        }
        self.reserved += to_reserve;
        Some(Lease { blocks, reserved: to_reserve })
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
        self.unname(block);
        Some(block)
    }

    /// A referenced block is full: from now on it can be found. Where another block already has that
    /// name, this one stays unnamed.
    pub fn publish(&mut self, block: BlockId, hash: BlockHash) {
        if self.by_hash.contains_key(&hash) || self.hash_of[block as usize].is_some() {
            return;
        }
        self.by_hash.insert(hash, block);
        self.hash_of[block as usize] = Some(hash);
        self.changes.stored(hash);
    }

    /// The content of a block is not to be trusted: it can't be found any more.
    pub fn forget(&mut self, block: BlockId) {
        self.unname(block);
        self.pool.discard(block);
    }

    fn unname(&mut self, block: BlockId) {
        if let Some(hash) = self.hash_of[block as usize].take() {
            self.by_hash.remove(&hash);
            self.changes.evicted(hash);
        }
    }

    /// The sequence ended: gives back its blocks and what it did not take. The end of a prefix is given up
    /// before its start.
    pub fn release(&mut self, lease: Lease) {
        self.reserved -= lease.reserved;
        for block in lease.blocks.iter().rev() {
            let keep = self.hash_of[*block as usize].is_some();
            self.pool.release(*block, keep);
        }
    }

    /// Forgets every block that no sequence refers to; returns how many that were.
    pub fn flush(&mut self) -> usize {
        let idle: Vec<BlockId> = self.pool.idle_blocks().collect();
        for block in &idle {
            self.forget(*block);
        }
        idle.len()
    }

    /// How many blocks are what.
    pub fn usage(&self) -> Usage {
        Usage {
            total: self.pool.total(),
            used: self.pool.total() - self.pool.available(),
            cached: self.pool.idle(),
            reserved: self.reserved,
        }
    }

    /// The hashes of all blocks that can be found.
    pub fn snapshot(&self) -> Vec<BlockHash> {
        // in the order of the pool: blocks of one chain were mostly taken one after the other
        self.hash_of.iter().flatten().copied().collect()
    }

    /// What changed since the last call.
    pub fn drain_changes(&mut self) -> Delta {
        self.changes.drain()
    }

    /// Checks every invariant; for tests.
    #[cfg(test)]
    pub(crate) fn check(&self) {
        self.pool.check();
        assert!(self.reserved <= self.pool.available(), "a promise can't be kept");
        assert_eq!(self.by_hash.len(), self.hash_of.iter().flatten().count());
        for (hash, block) in &self.by_hash {
            assert_eq!(self.hash_of[*block as usize], Some(*hash));
        }
        for block in self.pool.idle_blocks() {
            assert!(self.hash_of[block as usize].is_some(), "an idle block without a name is lost");
        }
    }
}

#[cfg(test)]
#[path = "prefix_tests.rs"]
mod tests;
