//! Host memory as a second home of cached blocks: what the device gives up for lack of room is copied there before, and comes
//! back when it is asked for. Here are only numbers, as for the device; the copies are part of the steps.
//!
//! A block's content never changes while it has its name, so a block that came back keeps its copy here until the room is needed,
//! and giving it up again before costs nothing.

use std::collections::HashMap;
use std::sync::Arc;

use bora_common::blocks::BlockHash;

use super::content::BlockContent;
use super::pool::BlockPool;
use crate::engine::step::HostBlock;

/// Which block of host memory holds what. A block is pinned while a copy from it is wanted or on its way; otherwise the one that
/// was used longest ago is given up first.
#[derive(Debug)]
pub(super) struct HostTier {
    pool: BlockPool,
    by_hash: HashMap<BlockHash, HostBlock>,
    contents: Vec<Option<Arc<BlockContent>>>,
}

/// A place for a block's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) place: HostBlock,
    /// What was given up for it.
    pub(super) given_up: Option<BlockHash>,
}

impl HostTier {
    /// `blocks` empty blocks; none is no host memory at all.
    pub(super) fn new(blocks: u32) -> Self {
        Self { pool: BlockPool::new(blocks), by_hash: HashMap::new(), contents: vec![None; blocks as usize] }
    }

    pub(super) fn contains(&self, hash: &BlockHash) -> bool {
        self.by_hash.contains_key(hash)
    }

    /// Whether this very block is here; `None` if there is no block of its name.
    pub(super) fn holds(&self, content: &BlockContent) -> Option<bool> {
        let place = self.by_hash.get(&content.hash())?;
        Some(self.contents[*place as usize].as_deref() == Some(content))
    }

    /// The hashes of all blocks here.
    pub(super) fn hashes(&self) -> impl Iterator<Item = BlockHash> + '_ {
        self.by_hash.keys().copied()
    }

    /// All blocks, and those that hold something.
    pub(super) fn usage(&self) -> (usize, usize) {
        (self.pool.total(), self.by_hash.len())
    }

    /// A place for the content of a block whose name is not here; `None` if all places are pinned.
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

    /// Keeps the block with this name until it is unpinned.
    pub(super) fn pin(&mut self, hash: &BlockHash) -> Option<HostBlock> {
        let place = *self.by_hash.get(hash)?;
        self.pool.refer(place);
        Some(place)
    }

    /// Its content was copied to the device: here it is the first to go.
    pub(super) fn fetched(&mut self, place: HostBlock) {
        self.pool.release_as_oldest(place);
    }

    /// The device gave up the block with this name: here it is now the last to go. False where it is not here.
    pub(super) fn touch(&mut self, hash: &BlockHash) -> bool {
        let Some(place) = self.pin(hash) else { return false };
        self.unpin(place);
        true
    }

    /// Its content is no longer wanted.
    pub(super) fn unpin(&mut self, place: HostBlock) {
        self.pool.release(place, true);
    }

    /// Forgets whatever is not pinned.
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

    /// Checks every invariant; for tests.
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
