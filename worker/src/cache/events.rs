//! What changed in the set of blocks that can be found by their hash, as watchers hear of it.

use std::collections::HashMap;

use bora_common::blocks::BlockHash;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Stored,
    Evicted,
}

/// Changes since the last [`drain`](Changes::drain). A hash that came and went (or went and came back)
/// in between is not mentioned, so the two lists of a delta have no hash in common. They stand in the order
/// in which they happened, which is that of their chains: an index of many groups finds neighbours faster.
/// At most one entry for each block of the pool and each change: bounded by what one step can do.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// Each with its number.
    net: HashMap<BlockHash, (Change, u64)>,
    next: u64,
}

/// A delta of the set of blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// Can be found from now on.
    pub stored: Vec<BlockHash>,
    /// Can't be found any more.
    pub evicted: Vec<BlockHash>,
}

impl Delta {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.stored.is_empty() && self.evicted.is_empty()
    }
}

impl Changes {
    /// A block can be found.
    pub(super) fn stored(&mut self, hash: BlockHash) {
        self.note(hash, Change::Stored);
    }

    /// A block was given up.
    pub(super) fn evicted(&mut self, hash: BlockHash) {
        self.note(hash, Change::Evicted);
    }

    fn note(&mut self, hash: BlockHash, change: Change) {
        if self.net.remove(&hash).is_none_or(|(before, _)| before == change) {
            self.net.insert(hash, (change, self.next));
            self.next += 1;
        }
    }

    /// The net changes; starts over.
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

/// Hashes one after the other, as `bora.v1` carries them.
pub fn to_bytes(hashes: &[BlockHash]) -> bytes::Bytes {
    hashes.iter().flat_map(|hash| hash.to_bytes()).collect::<Vec<u8>>().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_and_went_is_not_mentioned() {
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
