//! Host memory as a second tier of the cache: blocks are copied there before they are evicted from the device, and
//! fetched when a sequence needs them. This module only keeps block numbers; the copies are part of the steps.
//!
//! The content of a block never changes while the block has its name. A fetched block therefore keeps its copy here
//! until the room is needed, and evicting it from the device again costs nothing.

use std::collections::HashMap;
use std::sync::Arc;

use bora_common::blocks::BlockHash;

use super::content::BlockContent;
use super::pool::BlockPool;
use crate::engine::step::HostBlock;

/// Which host block holds which content. A block is pinned while a copy from it is required or in flight; otherwise the
/// least recently used one is evicted first.
#[derive(Debug)]
pub(super) struct HostTier {
    pool: BlockPool,
    by_hash: HashMap<BlockHash, HostBlock>,
    contents: Vec<Option<Arc<BlockContent>>>,
}

/// A host block for a block's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) place: HostBlock,
    /// The block that was evicted for it.
    pub(super) given_up: Option<BlockHash>,
}

impl HostTier {
    /// A tier of `blocks` empty blocks; 0 means no host memory.
    pub(super) fn new(blocks: u32) -> Self {
        Self { pool: BlockPool::new(blocks), by_hash: HashMap::new(), contents: vec![None; blocks as usize] }
    }

    pub(super) fn contains(&self, hash: &BlockHash) -> bool {
        self.by_hash.contains_key(hash)
    }

    /// Whether this block is here with equal content; `None` if there is no block of its name.
    pub(super) fn holds(&self, content: &BlockContent) -> Option<bool> {
        let place = self.by_hash.get(&content.hash())?;
        Some(self.contents[*place as usize].as_deref() == Some(content))
    }

    /// The hashes of all blocks in the tier.
    pub(super) fn hashes(&self) -> impl Iterator<Item = BlockHash> + '_ {
        self.by_hash.keys().copied()
    }

    /// Number of blocks, and of blocks in use.
    pub(super) fn usage(&self) -> (usize, usize) {
        (self.pool.total(), self.by_hash.len())
    }

    /// Reserves a host block for a block whose name is not in the tier; `None` if all host blocks are pinned.
    pub(super) fn store(&mut self, content: Arc<BlockContent>) -> Option<Stored> {
        let hash = content.hash();
        let place = match self.pool.take_free() {
            Some(place) => place,
            None => self.pool.take_oldest()?,
        };
        let given_up = self.contents[place as usize].replace(content).map(|content| content.hash());
        if let Some(given_up) = given_up {
            self.by_hash.remove(&given_up);
        }
        self.by_hash.insert(hash, place);
        self.pool.release(place, true);
        Some(Stored { place, given_up })
    }

    /// Pins the block with this name until it is unpinned.
    pub(super) fn pin(&mut self, hash: &BlockHash) -> Option<HostBlock> {
        let place = *self.by_hash.get(hash)?;
        self.pool.refer(place);
        Some(place)
    }

    /// Records that a block was copied to the device; its copy here is evicted first.
    pub(super) fn fetched(&mut self, place: HostBlock) {
        self.pool.release_as_oldest(place);
    }

    /// Records that the device evicted the block with this name; its copy here is evicted last. False if there is no
    /// copy.
    pub(super) fn touch(&mut self, hash: &BlockHash) -> bool {
        let Some(place) = self.pin(hash) else { return false };
        self.unpin(place);
        true
    }

    /// Unpins a block.
    pub(super) fn unpin(&mut self, place: HostBlock) {
        self.pool.release(place, true);
    }

    /// Drops all blocks that are not pinned.
    pub(super) fn flush(&mut self) -> Vec<BlockHash> {
        let idle: Vec<HostBlock> = self.pool.idle_blocks().collect();
        let mut forgotten = Vec::with_capacity(idle.len());
        for place in idle {
            if let Some(content) = self.contents[place as usize].take() {
                self.by_hash.remove(&content.hash());
                forgotten.push(content.hash());
            }
            self.pool.discard(place);
        }
        forgotten
    }

    /// Checks all invariants; for tests.
    #[cfg(test)]
    pub(super) fn check(&self) {
        self.pool.check();
        assert_eq!(self.by_hash.len(), self.contents.iter().flatten().count());
        for (hash, place) in &self.by_hash {
            assert_eq!(self.contents[*place as usize].as_ref().map(|content| content.hash()), Some(*hash));
        }
    }

    /// Blocks that are pinned; for tests.
    #[cfg(test)]
    pub(super) fn pinned(&self) -> usize {
        self.pool.total() - self.pool.available()
    }
}
