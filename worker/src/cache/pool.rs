//! The pool of blocks: their reference counts, the free blocks, and the eviction order of unreferenced blocks with
//! content that may be reused.
//!
//! A block is in exactly one of three states: *used* (reference count above 0), *idle* (unreferenced, with content
//! worth keeping; least recently used first) or *free*.

use crate::engine::step::BlockId;

/// End of the linked list of idle blocks.
const NONE: BlockId = BlockId::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Free,
    Idle,
    Used(u32),
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    place: Place,
    older: BlockId,
    newer: BlockId,
}

/// A fixed number of blocks.
#[derive(Debug)]
pub(super) struct BlockPool {
    entries: Vec<Entry>,
    free: Vec<BlockId>,
    oldest: BlockId,
    newest: BlockId,
    idle: usize,
}

impl BlockPool {
    /// A pool of `blocks` free blocks.
    pub(super) fn new(blocks: u32) -> Self {
        Self {
            entries: vec![Entry { place: Place::Free, older: NONE, newer: NONE }; blocks as usize],
            // taken from the end, so low numbers come first
            free: (0..blocks).rev().collect(),
            oldest: NONE,
            newest: NONE,
            idle: 0,
        }
    }

    /// Number of all blocks.
    pub(super) fn total(&self) -> usize {
        self.entries.len()
    }

    /// Number of unreferenced blocks, free or idle.
    pub(super) fn available(&self) -> usize {
        self.free.len() + self.idle
    }

    /// Number of free blocks.
    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    /// Number of idle blocks.
    pub(super) fn idle(&self) -> usize {
        self.idle
    }

    /// Reference count of a block.
    pub(super) fn references(&self, block: BlockId) -> u32 {
        match self.entries[block as usize].place {
            Place::Used(count) => count,
            Place::Free | Place::Idle => 0,
        }
    }

    /// Takes a free block with one reference.
    pub(super) fn take_free(&mut self) -> Option<BlockId> {
        let block = self.free.pop()?;
        self.entries[block as usize].place = Place::Used(1);
        Some(block)
    }

    /// Takes the least recently used idle block with one reference; its content is lost.
    pub(super) fn take_oldest(&mut self) -> Option<BlockId> {
        if self.oldest == NONE {
            return None;
        }
        let block = self.oldest;
        self.unlink(block);
        self.entries[block as usize].place = Place::Used(1);
        Some(block)
    }

    /// Adds a reference to a used or idle block.
    pub(super) fn refer(&mut self, block: BlockId) {
        match self.entries[block as usize].place {
            Place::Used(count) => self.entries[block as usize].place = Place::Used(count + 1),
            Place::Idle => {
                self.unlink(block);
                self.entries[block as usize].place = Place::Used(1);
            }
            Place::Free => debug_assert!(false, "a free block has no content to refer to"),
        }
    }

    /// Removes a reference. The last one makes the block idle if `keep`, else free.
    pub(super) fn release(&mut self, block: BlockId, keep: bool) {
        match self.entries[block as usize].place {
            Place::Used(1) if keep => self.append(block),
            Place::Used(1) => {
                self.entries[block as usize].place = Place::Free;
                self.free.push(block);
            }
            Place::Used(count) => self.entries[block as usize].place = Place::Used(count - 1),
            Place::Free | Place::Idle => debug_assert!(false, "a block was released twice"),
        }
    }

    /// Removes the last reference; the block becomes idle and is evicted next.
    pub(super) fn release_as_oldest(&mut self, block: BlockId) {
        if self.entries[block as usize].place != Place::Used(1) {
            return self.release(block, true);
        }
        self.entries[block as usize] = Entry { place: Place::Idle, older: NONE, newer: self.oldest };
        match self.oldest {
            NONE => self.newest = block,
            oldest => self.entries[oldest as usize].older = block,
        }
        self.oldest = block;
        self.idle += 1;
    }

    /// Frees an idle block, because its content is no longer needed.
    pub(super) fn discard(&mut self, block: BlockId) {
        if self.entries[block as usize].place == Place::Idle {
            self.unlink(block);
            self.entries[block as usize].place = Place::Free;
            self.free.push(block);
        }
    }

    /// Idle blocks, least recently used first.
    pub(super) fn idle_blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        let first = (self.oldest != NONE).then_some(self.oldest);
        std::iter::successors(first, |block| {
            let newer = self.entries[*block as usize].newer;
            (newer != NONE).then_some(newer)
        })
    }

    fn append(&mut self, block: BlockId) {
        self.entries[block as usize] = Entry { place: Place::Idle, older: self.newest, newer: NONE };
        match self.newest {
            NONE => self.oldest = block,
            newest => self.entries[newest as usize].newer = block,
        }
        self.newest = block;
        self.idle += 1;
    }

    fn unlink(&mut self, block: BlockId) {
        let Entry { older, newer, .. } = self.entries[block as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.entries[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.entries[newer as usize].older = older,
        }
        self.idle -= 1;
    }

    /// Checks that every block is in exactly one state; for tests.
    #[cfg(test)]
    pub(super) fn check(&self) {
        let idle: Vec<BlockId> = self.idle_blocks().collect();
        let used = self.entries.iter().filter(|e| matches!(e.place, Place::Used(_))).count();
        assert_eq!(idle.len(), self.idle);
        assert!(idle.iter().all(|b| self.entries[*b as usize].place == Place::Idle));
        assert!(self.free.iter().all(|b| self.entries[*b as usize].place == Place::Free));
        let mut distinct: Vec<BlockId> = self.free.iter().chain(&idle).copied().collect();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), self.available(), "no block twice");
        assert_eq!(used + self.free.len() + idle.len(), self.total());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evicts_the_oldest_idle_block_and_keeps_referenced_ones() {
        let mut pool = BlockPool::new(3);
        let blocks: Vec<_> = (0..3).map(|_| pool.take_free().unwrap()).collect();
        assert_eq!(blocks, [0, 1, 2]);
        assert_eq!(pool.take_free(), None);
        assert_eq!(pool.take_oldest(), None, "all are used");
        for block in &blocks {
            pool.release(*block, true);
        }
        pool.refer(0);
        pool.release(0, true);
        assert_eq!(pool.idle_blocks().collect::<Vec<_>>(), [1, 2, 0]);
        assert_eq!(pool.take_oldest(), Some(1));
        pool.discard(2);
        assert_eq!(pool.take_free(), Some(2));
        pool.check();
    }
}
