//! Changes of the set of cached blocks, as watchers receive them.

use std::collections::HashMap;

use bora_common::blocks::BlockHash;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Stored,
    Evicted,
}

/// Net changes since the last [`drain`](Changes::drain). A hash that was stored and evicted in between (or the reverse)
/// is omitted, so the two lists of a delta are disjoint. The lists keep the order of the changes, which is the order of
/// the chains: an index of many groups finds neighbours faster. There is at most one entry for each block of the pool,
/// which bounds the size by the work of one step.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// Change of each hash, with its order.
    net: HashMap<BlockHash, (Change, u64)>,
    next: u64,
}

/// Changes of the set of cached blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// Blocks that can now be found.
    pub stored: Vec<BlockHash>,
    /// Blocks that can no longer be found.
    pub evicted: Vec<BlockHash>,
}

impl Delta {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.stored.is_empty() && self.evicted.is_empty()
    }
}

impl Changes {
    /// Records that a block can be found.
    pub(super) fn stored(&mut self, hash: BlockHash) {
        self.note(hash, Change::Stored);
    }

    /// Records that a block was evicted.
    pub(super) fn evicted(&mut self, hash: BlockHash) {
        self.note(hash, Change::Evicted);
    }

    fn note(&mut self, hash: BlockHash, change: Change) {
        if self.net.remove(&hash).is_none_or(|(before, _)| before == change) {
            self.net.insert(hash, (change, self.next));
            self.next += 1;
        }
    }

    /// Takes the net changes.
    pub(super) fn drain(&mut self) -> Delta {
        let mut changes: Vec<(u64, BlockHash, Change)> =
            self.net.drain().map(|(hash, (change, number))| (number, hash, change)).collect();
        changes.sort_unstable_by_key(|(number, ..)| *number);
        let mut delta = Delta::default();
        for (_, hash, change) in changes {
            match change {
                Change::Stored => delta.stored.push(hash),
                Change::Evicted => delta.evicted.push(hash),
            }
        }
        delta
    }
}

/// Concatenates hashes in the encoding of `bora.v1`.
pub fn to_bytes(hashes: &[BlockHash]) -> bytes::Bytes {
    hashes.iter().flat_map(|hash| hash.to_bytes()).collect::<Vec<u8>>().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn omits_blocks_that_were_stored_and_evicted() {
        let [a, b, c] = [1, 2, 3].map(BlockHash);
        let mut changes = Changes::default();
        changes.stored(a);
        changes.stored(b);
        changes.evicted(b);
        changes.evicted(c);
        changes.stored(c);
        assert_eq!(changes.drain(), Delta { stored: vec![a], evicted: vec![] });
        assert!(changes.drain().is_empty());
        changes.evicted(a);
        changes.stored(a);
        changes.evicted(a);
        assert_eq!(changes.drain(), Delta { stored: vec![], evicted: vec![a] });
    }
}
