//! Which group holds which block, exactly: fed by the groups' own events, never estimated.
//!
//! A plane serves 64 groups: a [`BlockTable`] from a block's hash to a bit for each group that holds it.
//! Beside the facts stand the *expected* blocks: those of requests that were just placed and are not stored
//! yet, so that a burst of siblings finds its way to the group that computes their common prefix. They are
//! given back by the request that brought them ([`super::load_tracker::Booking`]). As a block's hash stands for all
//! before it, every eighth block of a chain ([`milestones`]) is enough.

use std::{collections::HashMap, sync::Arc};

use bora_common::blocks::BlockHash;
use parking_lot::{Mutex, RwLock};

use super::{
    Slot,
    table::{BlockTable, key_of},
};

const GROUPS_PER_PLANE: u32 = 64;
/// Blocks from one milestone to the next: 512 tokens.
const STRIDE: usize = 8;

/// The blocks of a chain that are expected of a group which holds the first `held`.
pub fn milestones(hashes: &[BlockHash], held: usize) -> Vec<BlockHash> {
    hashes
        .iter()
        .enumerate()
        .skip(held)
        .filter(|(place, _)| place % STRIDE == STRIDE - 1)
        .map(|(_, hash)| *hash)
        .collect()
}

#[derive(Default)]
struct Plane {
    held: BlockTable,
    expected: BlockTable,
    /// By how many requests more than one each group's block is expected, by its key in the table. Few are: siblings.
    more: Mutex<HashMap<(u64, u32), u32>>,
}

#[derive(Default)]
struct Slots {
    next: u32,
    free: Vec<u32>,
}

/// The index of all groups.
#[derive(Default)]
pub struct Index {
    planes: RwLock<Vec<Arc<Plane>>>,
    slots: Mutex<Slots>,
}

impl Index {
    /// An empty index.
    pub fn new() -> Self {
        Self::default()
    }

    /// A bit for a new group.
    pub fn assign(&self) -> Slot {
        let mut slots = self.slots.lock();
        if let Some(slot) = slots.free.pop() {
            return Slot(slot);
        }
        let slot = slots.next;
        slots.next += 1;
        let mut planes = self.planes.write();
        while planes.len() <= (slot / GROUPS_PER_PLANE) as usize {
            planes.push(Arc::default());
        }
        Slot(slot)
    }

    /// Gives the bit of a group that is gone to a later one.
    pub fn release(&self, slot: Slot) {
        self.clear(slot);
        if let Some((plane, bit)) = self.plane(slot) {
            let mut more = plane.more.lock();
            more.retain(|(_, expecting), _| *expecting != bit);
            more.shrink_to_fit();
            plane.expected.clear(bit);
        }
        self.slots.lock().free.push(slot.0);
    }

    /// Forgets everything that the group was known to hold (its events start anew).
    pub fn clear(&self, slot: Slot) {
        if let Some((plane, bit)) = self.plane(slot) {
            plane.held.clear(bit);
        }
    }

    /// The group stored and evicted blocks. Returns how many it holds now.
    pub fn apply(&self, slot: Slot, stored: &[u8], evicted: &[u8]) -> usize {
        let Some((plane, bit)) = self.plane(slot) else { return 0 };
        plane.held.unset(BlockHash::parse_many(evicted), bit);
        plane.held.set(BlockHash::parse_many(stored), bit);
        plane.held.bits_of(bit)
    }

    /// A request is on its way that makes the group store these blocks.
    pub fn expect(&self, slot: Slot, hashes: &[BlockHash]) {
        let Some((plane, bit)) = self.plane(slot) else {
            return;
        };
        let mut more = plane.more.lock();
        plane.expected.set_or(hashes.iter().copied(), bit, |key| *more.entry((key, bit)).or_default() += 1);
    }

    /// That request's blocks are stored, or never will be.
    pub fn forget(&self, slot: Slot, hashes: &[BlockHash]) {
        let Some((plane, bit)) = self.plane(slot) else {
            return;
        };
        let mut more = plane.more.lock();
        let last = |hash: &&BlockHash| {
            let of_group = (key_of(**hash), bit);
            let Some(count) = more.get_mut(&of_group) else { return true };
            *count -= 1;
            if *count == 0 {
                more.remove(&of_group);
            }
            false
        };
        plane.expected.unset(hashes.iter().filter(last).copied(), bit);
        if more.capacity() > 1024 && more.capacity() > 8 * more.len() {
            more.shrink_to_fit();
        }
    }

    /// For each group the number of a chain's first blocks that it holds without a gap. Waits for nobody.
    pub fn held(&self, hashes: &[BlockHash], slots: &[Slot]) -> Vec<u32> {
        let mut lengths = vec![0; slots.len()];
        for (number, plane) in self.planes.read().iter().enumerate() {
            let first = number as u32 * GROUPS_PER_PLANE;
            let of_plane = |slot: Slot| slot.0.checked_sub(first).filter(|bit| *bit < GROUPS_PER_PLANE);
            let mut alive = slots.iter().filter_map(|slot| of_plane(*slot)).fold(0u64, |mask, bit| mask | 1 << bit);
            if alive == 0 {
                continue;
            }
            let mut by_bit = [hashes.len() as u32; GROUPS_PER_PLANE as usize];
            plane.held.walk(hashes, |place, bits| {
                let mut fallen = alive & !bits;
                while fallen != 0 {
                    by_bit[fallen.trailing_zeros() as usize] = place as u32;
                    fallen &= fallen - 1;
                }
                alive &= bits;
                alive != 0
            });
            for (slot, length) in slots.iter().zip(&mut lengths) {
                if let Some(bit) = of_plane(*slot) {
                    *length = by_bit[bit as usize];
                }
            }
        }
        lengths
    }

    /// How far the chain continues in a group behind `held` blocks, with what it is expected to store.
    pub fn with_expected(&self, hashes: &[BlockHash], slot: Slot, held: u32) -> u32 {
        let Some((plane, bit)) = self.plane(slot) else {
            return held;
        };
        let coming = |hash: BlockHash| plane.expected.bits(hash) & (1 << bit) != 0;
        let first = held as usize / STRIDE * STRIDE + STRIDE - 1;
        let places = (first..hashes.len()).step_by(STRIDE);
        places.take_while(|place| coming(hashes[*place])).last().map_or(held, |place| place as u32 + 1)
    }

    /// Blocks known to be held by at least one group of each plane.
    pub fn len(&self) -> usize {
        self.planes.read().iter().map(|plane| plane.held.len()).sum()
    }

    /// Whether no group holds anything.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Blocks that groups are expected to store.
    pub fn expected(&self) -> usize {
        self.planes.read().iter().map(|plane| plane.expected.bits_set()).sum()
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        let of_plane = |plane: &Arc<Plane>| {
            // a key of 16 bytes with its count, padded, and a byte of the map's own
            plane.held.bytes() + plane.expected.bytes() + plane.more.lock().capacity() * 25
        };
        self.planes.read().iter().map(of_plane).sum()
    }

    fn plane(&self, slot: Slot) -> Option<(Arc<Plane>, u32)> {
        let planes = self.planes.read();
        Some((Arc::clone(planes.get((slot.0 / GROUPS_PER_PLANE) as usize)?), slot.0 % GROUPS_PER_PLANE))
    }
}

#[cfg(test)]
mod tests {
    use bora_common::{blocks::hash_blocks, secret::ClusterKeys};

    use super::*;

    fn chain(first: u32, blocks: usize) -> Vec<BlockHash> {
        let ids: Vec<u32> = (0..blocks as u32 * 64).map(|id| id + first).collect();
        hash_blocks(&ClusterKeys::derive(&[1; 32]), b"", &[], &ids)
    }

    /// What groups hold and are expected to hold.
    fn matched(index: &Index, hashes: &[BlockHash], slots: &[Slot]) -> Vec<u32> {
        let held = index.held(hashes, slots);
        slots.iter().zip(held).map(|(slot, held)| index.with_expected(hashes, *slot, held)).collect()
    }

    fn bytes(hashes: &[BlockHash]) -> Vec<u8> {
        hashes.iter().flat_map(|hash| hash.to_bytes()).collect()
    }

    #[test]
    fn lookups_walk_the_chain_until_the_first_miss_of_each_group() {
        let index = Index::new();
        let slots: Vec<Slot> = (0..70).map(|_| index.assign()).collect();
        let hashes = chain(0, 10);
        index.apply(slots[0], &bytes(&hashes[..4]), &[]);
        index.apply(slots[69], &bytes(&hashes), &[]);
        // a hole: what stands behind it can't be used
        index.apply(slots[1], &bytes(&hashes), &[]);
        index.apply(slots[1], &[], &bytes(&hashes[2..3]));
        let candidates = [slots[69], slots[0], slots[1], slots[2]];
        assert_eq!(matched(&index, &hashes, &candidates), [10, 4, 2, 0]);
        assert_eq!(matched(&index, &chain(7, 3), &candidates), [0, 0, 0, 0]);
        assert_eq!(matched(&index, &[], &candidates), [0, 0, 0, 0]);
    }

    #[test]
    fn a_group_that_leaves_takes_its_blocks_with_it_and_its_bit_comes_back_clean() {
        let index = Index::new();
        let (left, stayed) = (index.assign(), index.assign());
        let hashes = chain(0, 5);
        index.apply(left, &bytes(&hashes), &[]);
        index.apply(stayed, &bytes(&hashes[..2]), &[]);
        index.expect(left, &hashes);
        index.release(left);
        assert_eq!(index.len(), 2);
        let joined = index.assign();
        assert_eq!(joined, left, "the bit is reused");
        assert_eq!(matched(&index, &hashes, &[joined, stayed]), [0, 2]);
        index.release(stayed);
        assert!(index.is_empty());
    }

    #[test]
    fn expected_blocks_count_until_the_last_request_that_brings_them_ends() {
        let index = Index::new();
        let (a, b) = (index.assign(), index.assign());
        let hashes = chain(0, 27);
        let (all, some) = (milestones(&hashes, 0), milestones(&hashes[..10], 0));
        assert_eq!((all.len(), some.len()), (3, 1));
        index.expect(a, &all);
        index.expect(a, &all);
        index.expect(b, &some);
        assert_eq!(matched(&index, &hashes, &[a, b]), [24, 8]);
        index.forget(a, &all);
        assert_eq!(matched(&index, &hashes, &[a, b]), [24, 8]);
        index.forget(a, &all);
        index.forget(b, &some);
        assert_eq!(matched(&index, &hashes, &[a, b]), [0, 0]);
        assert_eq!(index.expected(), 0);
    }

    /// A sibling finds the part that is stored and the part that is still to come.
    #[test]
    fn what_is_expected_goes_on_behind_what_is_held() {
        let index = Index::new();
        let slot = index.assign();
        let hashes = chain(0, 40);
        index.apply(slot, &bytes(&hashes[..11]), &[]);
        index.expect(slot, &milestones(&hashes[..33], 11));
        assert_eq!(matched(&index, &hashes, &[slot]), [32]);
        assert_eq!(matched(&index, &hashes[..20], &[slot]), [16]);
        assert_eq!(matched(&index, &hashes[..12], &[slot]), [11]);
    }

    /// Groups come, fill up, are asked for, die in the middle of requests and come again: nothing is left.
    #[test]
    fn groups_that_come_and_go_leave_nothing() {
        let index = Index::new();
        let stays = index.assign();
        let kept = chain(9, 50);
        index.apply(stays, &bytes(&kept), &[]);
        let before = index.bytes();
        for round in 0..100 {
            let slots: Vec<Slot> = (0..80).map(|_| index.assign()).collect();
            for (number, slot) in slots.iter().enumerate() {
                let hashes = chain(round * 7919 + number as u32 * 31, 40);
                index.apply(*slot, &bytes(&hashes), &[]);
                let coming = chain(round + 5, 60);
                index.expect(*slot, &coming);
                if number % 2 == 0 {
                    index.forget(*slot, &coming);
                }
            }
            slots.iter().for_each(|slot| index.release(*slot));
        }
        assert_eq!(index.len(), 50);
        assert_eq!(index.expected(), 0);
        assert_eq!(index.held(&kept, &[stays]), [50]);
        assert!(index.bytes() < before + 300_000, "{} {before}", index.bytes());
        assert_eq!(index.slots.lock().next, 81, "bits are used again");
    }
}
