//! From a block's hash to 64 bits, one for each group of a plane: read without locks by every placement,
//! written by the groups' events.
//!
//! Entries stand in chunks, in the order in which they came: groups report blocks in the order of their chain,
//! so the entry of a prompt's next block most often stands behind that of the block before it, and a walk reads
//! memory from front to back instead of missing the processor's cache with every block. A map of 64 shards (open
//! addressing; half of a slot is part of the key, the other half the entry's place) finds what stands elsewhere: a
//! conversation that was notified of in runs stands in as many places.
//!
//! There is one writer at a time ([`writer`]), for a batch of blocks, so that a group that reports all its blocks does
//! not keep the others waiting. Readers ([`walk`]) never wait: they hold the arrays that they look into, which change
//! in place or are replaced by larger ones. The key is half of the hash: that two blocks of a fleet share it has a
//! chance of one in a hundred thousand with 19 million blocks, and costs one placement that expects too much.

mod walk;
mod writer;

use std::sync::{
    Arc,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

use bora_common::blocks::BlockHash;
use parking_lot::{Mutex, RwLock};

use self::writer::Writer;

const SHARDS: usize = 64;
/// Slots of the smallest shard.
const SMALLEST: usize = 16;
/// Entries of a chunk: 64 KiB.
const CHUNK: usize = 4096;

/// A slot of the map without an entry, which once had one.
const REMOVED: u64 = u64::MAX;

/// Written in this order: key 0, bits, key. Read in this order: key, bits, key. So bits are those of the key, unless
/// the entry was given to another block and back between the two looks: that costs one placement at most.
#[derive(Default)]
struct Entry {
    bits: AtomicU64,
    /// 0: free.
    key: AtomicU64,
}

impl Entry {
    /// The bits, if this is the key's entry.
    fn bits_of(&self, key: u64) -> Option<u64> {
        if self.key.load(Ordering::Acquire) != key {
            return None;
        }
        let bits = self.bits.load(Ordering::Acquire);
        (self.key.load(Ordering::Relaxed) == key).then_some(bits)
    }

    fn is_free(&self) -> bool {
        self.key.load(Ordering::Relaxed) == 0
    }
}

type Chunk = [Entry];
type Chunks = Vec<Arc<Chunk>>;
type Slots = Box<[AtomicU64]>;
type Shards = [Arc<Slots>; SHARDS];

fn no_shards() -> Arc<Shards> {
    Arc::new(std::array::from_fn(|_| Arc::default()))
}

/// Half of a block's hash: what the table knows it by.
pub(super) fn key_of(hash: BlockHash) -> u64 {
    (hash.0 as u64).max(1)
}

fn shard_of(key: u64) -> usize {
    key as usize % SHARDS
}

/// The slot where a key's search begins: the share of the length that the key's upper half is.
fn first_slot(key: u64, length: usize) -> usize {
    (((key >> 32) * length as u64) >> 32) as usize
}

/// The bits of a key that its slot has: those that say where its search begins, so that a shard can grow without a look
/// at the entries.
fn tag_of(key: u64) -> u64 {
    key >> 32 << 32
}

fn slot_of(key: u64, place: usize) -> u64 {
    tag_of(key) | (place as u64 + 1)
}

/// The place in a slot, if the slot can be the key's.
fn place_in(slot: u64, key: u64) -> Option<usize> {
    let low = slot & u64::from(u32::MAX);
    (slot != REMOVED && low != 0 && slot - low == tag_of(key)).then(|| low as usize - 1)
}

fn entry(chunks: &Chunks, place: usize) -> Option<&Entry> {
    chunks.get(place / CHUNK)?.get(place % CHUNK)
}

/// The slots from a key's first one on, to the first that was never used.
fn search(slots: &Slots, key: u64) -> impl Iterator<Item = (usize, u64)> + '_ {
    let first = first_slot(key, slots.len());
    let numbers = (first..slots.len()).chain(0..first);
    numbers.map(|number| (number, slots[number].load(Ordering::Acquire))).take_while(|(_, slot)| *slot != 0)
}

/// Where a search found its key.
struct Found<'a> {
    /// Number of the slot.
    slot: usize,
    place: usize,
    entry: &'a Entry,
}

/// Where a key is, or the first slot of its search that it could be written to, if the search ended at one.
fn locate<'a>(slots: &Slots, chunks: &'a Chunks, key: u64) -> Result<Found<'a>, Option<usize>> {
    let mut free = None;
    let mut number = first_slot(key, slots.len());
    for _ in 0..slots.len() {
        let Some(slot) = slots.get(number).map(|slot| slot.load(Ordering::Acquire)) else { break };
        if slot == 0 {
            return Err(free.or(Some(number)));
        }
        if slot == REMOVED {
            free = free.or(Some(number));
        } else if let Some(place) = place_in(slot, key)
            && let Some(entry) = entry(chunks, place)
            && entry.key.load(Ordering::Acquire) == key
        {
            return Ok(Found { slot: number, place, entry });
        }
        number = if number + 1 == slots.len() { 0 } else { number + 1 };
    }
    Err(free)
}

/// The key's entry and its place.
fn find<'a>(slots: &Slots, chunks: &'a Chunks, key: u64) -> Option<(usize, &'a Entry)> {
    locate(slots, chunks, key).ok().map(|found| (found.place, found.entry))
}

/// What the first slot of a key's search has; 0 where there are no slots.
fn first_slot_of(slots: &Slots, key: u64) -> u64 {
    slots.get(first_slot(key, slots.len())).map_or(0, |slot| slot.load(Ordering::Acquire))
}

/// What readers hold while they look.
struct Arrays {
    shards: RwLock<Arc<Shards>>,
    chunks: RwLock<Arc<Chunks>>,
}

impl Default for Arrays {
    fn default() -> Self {
        Self { shards: RwLock::new(no_shards()), chunks: RwLock::default() }
    }
}

impl Arrays {
    /// The map and the entries as they are now, the entries of all that the map reports now among them.
    fn now(&self) -> (Arc<Shards>, Arc<Chunks>) {
        let shards = Arc::clone(&self.shards.read());
        (shards, Arc::clone(&self.chunks.read()))
    }
}

/// The table.
#[derive(Default)]
pub(super) struct BlockTable {
    arrays: RwLock<Arc<Arrays>>,
    writer: Mutex<Writer>,
    /// Held while a group's bits are taken away: entries keep their places meanwhile.
    clearing: Mutex<()>,
    live: AtomicUsize,
}

impl BlockTable {
    /// Blocks with any bit.
    pub(super) fn len(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }

    /// Bytes of the arrays.
    pub(super) fn bytes(&self) -> usize {
        let (shards, chunks) = Arc::clone(&self.arrays.read()).now();
        let slots: usize = shards.iter().map(|slots| slots.len()).sum();
        let entries: usize = chunks.iter().map(|chunk| chunk.len()).sum();
        slots * size_of::<u64>() + entries * size_of::<Entry>() + chunks.len() * size_of::<Arc<Chunk>>()
    }

    /// The bits of one block.
    pub(super) fn bits(&self, hash: BlockHash) -> u64 {
        let key = key_of(hash);
        let (shards, chunks) = Arc::clone(&self.arrays.read()).now();
        find(&shards[shard_of(key)], &chunks, key).and_then(|(_, entry)| entry.bits_of(key)).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests;
