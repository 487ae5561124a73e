//! Which group holds which block, exactly: fed by the groups' own events, never guessed.
//!
//! A plane serves 64 groups: one map from a block's hash to a bit for each group that holds it. Beside the
//! facts stand the *expected* blocks: those of requests that were just placed and are not stored yet, so
//! that a burst of siblings finds its way to the group that computes their common prefix.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
};

use bora_common::blocks::BlockHash;
use parking_lot::RwLock;

use super::Slot;

const GROUPS_PER_PLANE: u32 = 64;

/// Block hashes are uniform already: their low half is as good as any hash of them.
#[derive(Default)]
struct Truncate(u64);

impl Hasher for Truncate {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u128(&mut self, value: u128) {
        self.0 = value as u64;
    }
}

type BlockMap<V> = HashMap<u128, V, BuildHasherDefault<Truncate>>;

#[derive(Default)]
struct Plane {
    held: BlockMap<u64>,
    expected: BlockMap<Vec<Expectation>>,
}

struct Expectation {
    bit: u32,
    requests: u32,
}

impl Plane {
    fn holders(&self, hash: u128) -> u64 {
        let mut mask = self.held.get(&hash).copied().unwrap_or(0);
        if !self.expected.is_empty()
            && let Some(expectations) = self.expected.get(&hash)
        {
            for expectation in expectations {
                mask |= 1 << expectation.bit;
            }
        }
        mask
    }
}

#[derive(Default)]
struct Slots {
    next: u32,
    free: Vec<u32>,
}

/// The index of all groups.
#[derive(Default)]
pub struct Index {
    planes: RwLock<Vec<RwLock<Plane>>>,
    slots: RwLock<Slots>,
}

impl Index {
    /// An empty index.
    pub fn new() -> Self {
        Self::default()
    }

    /// A bit for a new group.
    pub fn assign(&self) -> Slot {
        let mut slots = self.slots.write();
        if let Some(slot) = slots.free.pop() {
            return Slot(slot);
        }
        let slot = slots.next;
        slots.next += 1;
        let mut planes = self.planes.write();
        while planes.len() <= (slot / GROUPS_PER_PLANE) as usize {
            planes.push(RwLock::default());
        }
        Slot(slot)
    }

    /// Gives the bit of a group that is gone to a later one.
    pub fn release(&self, slot: Slot) {
        self.clear(slot);
        self.with_plane(slot, |plane, bit| {
            plane.expected.retain(|_, expectations| {
                expectations.retain(|expectation| expectation.bit != bit);
                !expectations.is_empty()
            });
        });
        self.slots.write().free.push(slot.0);
    }

    /// Forgets everything that the group was known to hold (its events start anew).
    pub fn clear(&self, slot: Slot) {
        self.with_plane(slot, |plane, bit| {
            let others = !(1u64 << bit);
            plane.held.retain(|_, mask| {
                *mask &= others;
                *mask != 0
            });
            if plane.held.capacity() > 4 * plane.held.len() {
                plane.held.shrink_to_fit();
            }
        });
    }

    /// The group stored and evicted blocks.
    pub fn apply(&self, slot: Slot, stored: &[u8], evicted: &[u8]) {
        self.with_plane(slot, |plane, bit| {
            for hash in BlockHash::parse_many(evicted) {
                if let Some(mask) = plane.held.get_mut(&hash.0) {
                    *mask &= !(1 << bit);
                    if *mask == 0 {
                        plane.held.remove(&hash.0);
                    }
                }
            }
            for hash in BlockHash::parse_many(stored) {
                *plane.held.entry(hash.0).or_insert(0) |= 1 << bit;
            }
        });
    }

    /// A request with these blocks was placed on the group: counts as held until [`forget`](Self::forget).
    pub fn expect(&self, slot: Slot, hashes: &[BlockHash]) {
        if hashes.is_empty() {
            return;
        }
        self.with_plane(slot, |plane, bit| {
            for hash in hashes {
                let expectations = plane.expected.entry(hash.0).or_default();
                match expectations.iter_mut().find(|expectation| expectation.bit == bit) {
                    Some(expectation) => expectation.requests += 1,
                    None => expectations.push(Expectation { bit, requests: 1 }),
                }
            }
        });
    }

    /// The request ended: what it stored is known as fact by now.
    pub fn forget(&self, slot: Slot, hashes: &[BlockHash]) {
        if hashes.is_empty() {
            return;
        }
        self.with_plane(slot, |plane, bit| {
            for hash in hashes {
                let Some(expectations) = plane.expected.get_mut(&hash.0) else {
                    continue;
                };
                if let Some(expectation) = expectations.iter_mut().find(|expectation| expectation.bit == bit) {
                    expectation.requests = expectation.requests.saturating_sub(1);
                }
                expectations.retain(|expectation| expectation.requests > 0);
                if expectations.is_empty() {
                    plane.expected.remove(&hash.0);
                }
            }
        });
    }

    /// How many leading blocks of the chain each candidate holds; one entry a candidate.
    pub fn matched(&self, hashes: &[BlockHash], candidates: &[Slot]) -> Vec<u32> {
        let mut matched = vec![0; candidates.len()];
        let planes = self.planes.read();
        for (number, plane) in planes.iter().enumerate() {
            let number = number as u32;
            let mut wanted = 0u64;
            for slot in candidates.iter().filter(|slot| slot.0 / GROUPS_PER_PLANE == number) {
                wanted |= 1 << (slot.0 % GROUPS_PER_PLANE);
            }
            if wanted == 0 {
                continue;
            }
            let mut lengths = [0u32; GROUPS_PER_PLANE as usize];
            walk(&plane.read(), hashes, wanted, &mut lengths);
            for (slot, length) in candidates.iter().zip(&mut matched) {
                if slot.0 / GROUPS_PER_PLANE == number {
                    *length = lengths[(slot.0 % GROUPS_PER_PLANE) as usize];
                }
            }
        }
        matched
    }

    /// Blocks known to be held by at least one group of each plane, for the metrics.
    pub fn len(&self) -> usize {
        self.planes.read().iter().map(|plane| plane.read().held.len()).sum()
    }

    /// Whether no group holds anything.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn with_plane(&self, slot: Slot, change: impl FnOnce(&mut Plane, u32)) {
        let planes = self.planes.read();
        if let Some(plane) = planes.get((slot.0 / GROUPS_PER_PLANE) as usize) {
            change(&mut plane.write(), slot.0 % GROUPS_PER_PLANE);
        }
    }
}

/// Follows the chain until nobody holds the next block; notes for each bit where it fell out.
fn walk(plane: &Plane, hashes: &[BlockHash], wanted: u64, lengths: &mut [u32; GROUPS_PER_PLANE as usize]) {
    let mut alive = wanted;
    for (position, hash) in hashes.iter().enumerate() {
        let still = alive & plane.holders(hash.0);
        note(alive & !still, position as u32, lengths);
        alive = still;
        if alive == 0 {
            return;
        }
    }
    note(alive, hashes.len() as u32, lengths);
}

fn note(mut mask: u64, length: u32, lengths: &mut [u32; GROUPS_PER_PLANE as usize]) {
    while mask != 0 {
        lengths[mask.trailing_zeros() as usize] = length;
        mask &= mask - 1;
    }
}

#[cfg(test)]
mod tests {
    use bora_common::blocks::hash_blocks;

    use super::*;

    fn chain(first: u32, blocks: usize) -> Vec<BlockHash> {
        let ids: Vec<u32> = (0..blocks as u32 * 64).map(|id| id + first).collect();
        hash_blocks(b"", &[], &ids)
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
        assert_eq!(index.matched(&hashes, &candidates), [10, 4, 2, 0]);
        assert_eq!(index.matched(&chain(7, 3), &candidates), [0, 0, 0, 0]);
        assert_eq!(index.matched(&[], &candidates), [0, 0, 0, 0]);
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
        assert_eq!(index.matched(&hashes, &[joined, stayed]), [0, 2]);
        index.release(stayed);
        assert!(index.is_empty());
    }

    #[test]
    fn expected_blocks_count_until_the_last_request_that_brings_them_ends() {
        let index = Index::new();
        let (a, b) = (index.assign(), index.assign());
        let hashes = chain(0, 3);
        index.expect(a, &hashes);
        index.expect(a, &hashes);
        index.expect(b, &hashes[..1]);
        assert_eq!(index.matched(&hashes, &[a, b]), [3, 1]);
        index.forget(a, &hashes);
        assert_eq!(index.matched(&hashes, &[a, b]), [3, 1]);
        index.forget(a, &hashes);
        index.forget(b, &hashes[..1]);
        assert_eq!(index.matched(&hashes, &[a, b]), [0, 0]);
        assert!(index.planes.read().iter().all(|plane| plane.read().expected.is_empty()));
    }
}
