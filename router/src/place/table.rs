//! From a block's hash to 64 bits, one for each group of a plane: read without locks by every placement,
//! written by the groups' events.
//!
//! Open addressing over pairs of atomics in 64 shards. A reader holds a shard's array while it looks; a
//! writer changes it in place and, when it is full, swaps in a new one: readers never wait, and the memory
//! for moving is that of one shard. A key stays in its place when its last bit goes and is left out at the
//! next move. The key is half of the hash: that two blocks of a fleet share it has a chance of one in a
//! hundred thousand with 19 million blocks, and costs one placement that expects too much.

use std::sync::{
    Arc,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

use bora_common::blocks::BlockHash;
use parking_lot::{Mutex, RwLock};

const SHARDS: usize = 64;
/// Hashes whose places are fetched from memory together.
const TOGETHER: usize = 16;
const SMALLEST: usize = 16;

#[derive(Default)]
struct Entry {
    /// 0: free.
    key: AtomicU64,
    bits: AtomicU64,
}

type Entries = Box<[Entry]>;

fn key_of(hash: BlockHash) -> u64 {
    (hash.0 as u64).max(1)
}

fn shard_of(key: u64) -> usize {
    key as usize % SHARDS
}

/// The place where a key's search begins: the key's share of the length.
fn first_place(key: u64, length: usize) -> usize {
    ((u128::from(key) * length as u128) >> 64) as usize
}

/// The entry of a key, or the free one where it belongs. There is always a free one.
fn find(entries: &[Entry], key: u64) -> Option<&Entry> {
    let first = first_place(key, entries.len());
    let (before, from_first) = entries.split_at(first);
    from_first.iter().chain(before).find(|entry| {
        let there = entry.key.load(Ordering::Acquire);
        there == key || there == 0
    })
}

#[derive(Default)]
struct Shard {
    entries: RwLock<Arc<Entries>>,
    /// Places taken, those without bits included. Held by whoever writes.
    taken: Mutex<usize>,
    /// Keys with bits.
    live: AtomicUsize,
}

impl Shard {
    fn set(&self, taken: &mut usize, key: u64, bit: u64) {
        let mut entries = Arc::clone(&self.entries.read());
        if (*taken + 1) * 10 > entries.len() * 7 {
            entries = self.move_out(taken);
        }
        let Some(entry) = find(&entries, key) else {
            return; // never: there is room
        };
        if entry.key.load(Ordering::Relaxed) == 0 {
            // bits first: who sees the key sees them
            entry.bits.store(bit, Ordering::Relaxed);
            entry.key.store(key, Ordering::Release);
            *taken += 1;
            self.live.fetch_add(1, Ordering::Relaxed);
        } else if entry.bits.fetch_or(bit, Ordering::Relaxed) == 0 {
            self.live.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn unset(&self, key: u64, bit: u64) {
        let entries = Arc::clone(&self.entries.read());
        if let Some(entry) = find(&entries, key)
            && entry.key.load(Ordering::Relaxed) == key
            && entry.bits.fetch_and(!bit, Ordering::Relaxed) == bit
        {
            self.live.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Copies what has bits to a new array with room.
    fn move_out(&self, taken: &mut usize) -> Arc<Entries> {
        let old = Arc::clone(&self.entries.read());
        let live = self.live.load(Ordering::Relaxed);
        let length = (live * 2).max(SMALLEST);
        let new: Entries = std::iter::repeat_with(Entry::default).take(length).collect();
        for entry in old.iter() {
            let bits = entry.bits.load(Ordering::Relaxed);
            let key = entry.key.load(Ordering::Relaxed);
            if bits != 0
                && let Some(place) = find(&new, key)
            {
                place.bits.store(bits, Ordering::Relaxed);
                place.key.store(key, Ordering::Relaxed);
            }
        }
        *taken = live;
        let new = Arc::new(new);
        *self.entries.write() = Arc::clone(&new);
        new
    }
}

/// The table.
pub(super) struct BlockTable {
    shards: Box<[Shard]>,
}

impl Default for BlockTable {
    fn default() -> Self {
        Self { shards: std::iter::repeat_with(Shard::default).take(SHARDS).collect() }
    }
}

impl BlockTable {
    /// Sets a group's bit for these blocks.
    pub(super) fn set(&self, hashes: impl Iterator<Item = BlockHash>, bit: u32) {
        for hash in hashes {
            let key = key_of(hash);
            let shard = &self.shards[shard_of(key)];
            shard.set(&mut shard.taken.lock(), key, 1 << bit);
        }
    }

    /// Takes it away.
    pub(super) fn unset(&self, hashes: impl Iterator<Item = BlockHash>, bit: u32) {
        for hash in hashes {
            let key = key_of(hash);
            let shard = &self.shards[shard_of(key)];
            let _writing = shard.taken.lock();
            shard.unset(key, 1 << bit);
        }
    }

    /// Takes away all of a group's bits; a shard that lost most of its keys gives its memory back.
    pub(super) fn clear(&self, bit: u32) {
        for shard in &self.shards {
            let mut taken = shard.taken.lock();
            let entries = Arc::clone(&shard.entries.read());
            for entry in entries.iter() {
                if entry.bits.fetch_and(!(1 << bit), Ordering::Relaxed) == 1 << bit {
                    shard.live.fetch_sub(1, Ordering::Relaxed);
                }
            }
            if entries.len() > 4 * shard.live.load(Ordering::Relaxed).max(SMALLEST) {
                shard.move_out(&mut taken);
            }
        }
    }

    /// Blocks with any bit.
    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.live.load(Ordering::Relaxed)).sum()
    }

    /// Bytes of the arrays.
    pub(super) fn bytes(&self) -> usize {
        self.shards.iter().map(|shard| shard.entries.read().len() * size_of::<Entry>()).sum()
    }

    /// The bits of one block.
    pub(super) fn bits(&self, hash: BlockHash) -> u64 {
        let key = key_of(hash);
        let entries = self.shards[shard_of(key)].entries.read();
        match find(&entries, key) {
            Some(entry) if entry.key.load(Ordering::Acquire) == key => entry.bits.load(Ordering::Relaxed),
            _ => 0,
        }
    }

    /// Gives the bits of each block in turn to `see`, until it returns false.
    pub(super) fn walk(&self, hashes: &[BlockHash], mut see: impl FnMut(usize, u64) -> bool) {
        let mut arrays: [Option<Arc<Entries>>; SHARDS] = [const { None }; SHARDS];
        for (number, some) in hashes.chunks(TOGETHER).enumerate() {
            // First the places of all, so that memory is asked for all of them at once ...
            let mut keys = [0; TOGETHER];
            let mut at_first = [(0, 0); TOGETHER];
            for ((hash, key), at_first) in some.iter().zip(&mut keys).zip(&mut at_first) {
                *key = key_of(*hash);
                let shard = shard_of(*key);
                let entries = arrays[shard].get_or_insert_with(|| Arc::clone(&self.shards[shard].entries.read()));
                if let Some(entry) = entries.get(first_place(*key, entries.len())) {
                    *at_first = (entry.key.load(Ordering::Acquire), entry.bits.load(Ordering::Relaxed));
                }
            }
            // ... then what they hold.
            for (place, (key, (there, bits))) in keys.iter().zip(at_first).take(some.len()).enumerate() {
                let bits = if there == *key {
                    bits
                } else if there == 0 {
                    0
                } else {
                    let entries = arrays[shard_of(*key)].as_deref();
                    match entries.and_then(|entries| find(entries, *key)) {
                        Some(entry) if entry.key.load(Ordering::Acquire) == *key => entry.bits.load(Ordering::Relaxed),
                        _ => 0,
                    }
                };
                if !see(number * TOGETHER + place, bits) {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn hash(number: u64) -> BlockHash {
        BlockHash(u128::from(number.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }

    /// The same as a plain map, whatever comes and goes.
    #[test]
    fn it_is_a_map() {
        let table = BlockTable::default();
        let mut map: HashMap<u64, u64> = HashMap::new();
        let mut state = 1u64;
        for step in 0..200_000u64 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (number, bit) = ((state >> 40) % 3000, (state >> 20) as u32 % 64);
            let bits = map.entry(number).or_default();
            if (state >> 33).is_multiple_of(2) {
                *bits |= 1 << bit;
                table.set(std::iter::once(hash(number)), bit);
            } else {
                *bits &= !(1 << bit);
                table.unset(std::iter::once(hash(number)), bit);
            }
            if step % 20_000 == 0 {
                let bit = (step / 20_000) as u32;
                map.values_mut().for_each(|bits| *bits &= !(1 << bit));
                table.clear(bit);
            }
        }
        let numbers: Vec<BlockHash> = (0..3001).map(hash).collect();
        let mut seen = 0;
        table.walk(&numbers, |place, bits| {
            assert_eq!(bits, map.get(&(place as u64)).copied().unwrap_or(0), "{place}");
            assert_eq!(bits, table.bits(numbers[place]));
            seen += 1;
            true
        });
        assert_eq!(seen, numbers.len());
        assert_eq!(table.len(), map.values().filter(|bits| **bits != 0).count());
    }

    #[test]
    fn blocks_that_come_and_go_leave_nothing() {
        let table = BlockTable::default();
        for round in 0..200u64 {
            let some = || (0..1000).map(move |number| hash(round * 1000 + number));
            table.set(some(), 3);
            table.unset(some(), 3);
        }
        assert_eq!(table.len(), 0);
        assert!(table.bytes() < 200_000, "{}", table.bytes());
    }

    #[test]
    fn readers_see_every_block_that_was_there_before_they_looked() {
        let table = Arc::new(BlockTable::default());
        table.set((0..500).map(hash), 1);
        let writer = {
            let table = Arc::clone(&table);
            std::thread::spawn(move || {
                for round in 1..100u64 {
                    table.set((round * 1000..round * 1000 + 500).map(hash), 2);
                    table.unset((round * 1000..round * 1000 + 400).map(hash), 2);
                }
            })
        };
        let numbers: Vec<BlockHash> = (0..500).map(hash).collect();
        while !writer.is_finished() {
            table.walk(&numbers, |place, bits| {
                assert_eq!(bits, 2, "{place}");
                true
            });
        }
        writer.join().expect("the writer");
    }
}
