//! From a block's hash to 64 bits, one for each group of a plane: read without locks by every placement,
//! written by the groups' events.
//!
//! Entries stand in chunks, in the order in which they came: groups tell of blocks in the order of their chain,
//! so the entry of a prompt's next block most often stands behind that of the block before it, and a walk reads
//! memory from front to back instead of missing the processor's cache with every block. A map of 64 shards (open
//! addressing; half of a slot is part of the key, the other half the entry's place) finds what stands elsewhere: a
//! conversation that was told of in pieces stands in as many places, so a walk that left a piece looks for blocks
//! further ahead as well, sixteen at once ([`Ahead`]), instead of waiting for memory behind every piece.
//!
//! There is one writer at a time, for a batch of blocks, so that a group that tells of all its blocks does not keep
//! the others waiting. Readers never wait: they hold the arrays that they look into, which change in place or are
//! replaced by larger ones. The key is half of the hash: that two blocks of a fleet share it has a chance of one in a
//! hundred thousand with 19 million blocks, and costs one placement that expects too much.

use std::sync::{
    Arc,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

use bora_common::blocks::BlockHash;
use parking_lot::{Mutex, MutexGuard, RwLock};

const SHARDS: usize = 64;
/// Hashes that are looked for together.
const TOGETHER: usize = 16;
/// Behind a run of so many blocks only the next one is looked for: another long run most likely begins with it.
const LONG_RUN: usize = 128;
/// Longest way from one block that is looked for ahead to the next.
const LONGEST_STRIDE: usize = 32;
/// Entries of a line of the processor's cache.
const LINE: usize = 64 / size_of::<Entry>();
const SMALLEST: usize = 16;
/// Entries of a chunk: 64 KiB.
const CHUNK: usize = 4096;
/// A chunk is filled again when so many of its entries are free: enough for long runs.
const WORTH_FILLING: usize = CHUNK / 4;
/// Blocks that are written before others may write.
const BATCH: usize = 1024;

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
}

type Chunk = [Entry];
type Chunks = Vec<Arc<Chunk>>;
type Slots = Box<[AtomicU64]>;

fn key_of(hash: BlockHash) -> u64 {
    (hash.0 as u64).max(1)
}

fn shard_of(key: u64) -> usize {
    key as usize % SHARDS
}

/// The slot where a key's search begins: the key's share of the length.
fn first_slot(key: u64, length: usize) -> usize {
    ((u128::from(key) * length as u128) >> 64) as usize
}

/// The bits of a key that say neither its shard nor its first slot.
fn tag_of(key: u64) -> u64 {
    (key >> 6) << 32
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

/// The key's entry and its place.
fn find<'a>(slots: &Slots, chunks: &'a Chunks, key: u64) -> Option<(usize, &'a Entry)> {
    let places = search(slots, key).filter_map(|(_, slot)| place_in(slot, key));
    places
        .filter_map(|place| Some((place, entry(chunks, place)?)))
        .find(|(_, entry)| entry.key.load(Ordering::Acquire) == key)
}

/// What readers hold while they look.
struct Arrays {
    shards: [RwLock<Arc<Slots>>; SHARDS],
    chunks: RwLock<Arc<Chunks>>,
}

impl Default for Arrays {
    fn default() -> Self {
        Self { shards: std::array::from_fn(|_| RwLock::default()), chunks: RwLock::default() }
    }
}

#[derive(Clone, Copy, Default)]
struct ShardUse {
    /// Slots that are or were used.
    taken: usize,
    live: usize,
}

/// What only the writer knows.
struct Writer {
    /// The same arrays that readers see: nobody else replaces them, so the writer counts no owners to look into them.
    slots: [Arc<Slots>; SHARDS],
    chunks: Arc<Chunks>,
    shards: [ShardUse; SHARDS],
    /// Blocks of each group.
    of_group: [usize; 64],
    /// Entries in use of each chunk.
    used: Vec<usize>,
    /// Where the next entry is looked for.
    chunk: usize,
    place: usize,
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

impl Default for Writer {
    fn default() -> Self {
        Self {
            slots: std::array::from_fn(|_| Arc::default()),
            chunks: Arc::default(),
            shards: [ShardUse::default(); SHARDS],
            of_group: [0; 64],
            used: Vec::new(),
            chunk: 0,
            place: 0,
        }
    }
}

impl Writer {
    /// Sets a group's bit of a key; true if it is the key's first one.
    fn set(&mut self, arrays: &Arrays, key: u64, group: u32) -> bool {
        let bit = 1 << group;
        if let Some((_, entry)) = find(&self.slots[shard_of(key)], &self.chunks, key) {
            let before = entry.bits.fetch_or(bit, Ordering::Relaxed);
            self.of_group[group as usize] += usize::from(before & bit == 0);
            return false;
        }
        self.put(arrays, key, bit);
        self.of_group[group as usize] += 1;
        true
    }

    /// A key that is not there yet.
    fn put(&mut self, arrays: &Arrays, key: u64, bits: u64) {
        let place = self.free_place(arrays);
        if let Some(entry) = entry(&self.chunks, place) {
            entry.bits.store(bits, Ordering::Release);
            entry.key.store(key, Ordering::Release);
            self.used[place / CHUNK] += 1;
        }
        self.put_in_map(arrays, key, place);
    }

    /// Takes a group's bit of a key away; true if it was the last one.
    fn unset(&mut self, arrays: &Arrays, key: u64, group: u32) -> bool {
        let Some((place, entry)) = find(&self.slots[shard_of(key)], &self.chunks, key) else { return false };
        let bit = 1 << group;
        let before = entry.bits.fetch_and(!bit, Ordering::Relaxed);
        self.of_group[group as usize] -= usize::from(before & bit != 0);
        let last = before == bit;
        if last {
            entry.key.store(0, Ordering::Release);
            self.remove(arrays, key, place);
        }
        last
    }

    /// Takes a key out whose entry is free again.
    fn remove(&mut self, arrays: &Arrays, key: u64, place: usize) {
        let shard = shard_of(key);
        let slots = &self.slots[shard];
        let slot = search(slots, key).find(|(_, slot)| *slot == slot_of(key, place));
        if let Some((number, _)) = slot {
            slots[number].store(REMOVED, Ordering::Release);
        }
        self.shards[shard].live -= 1;
        let chunk = place / CHUNK;
        self.used[chunk] -= 1;
        if self.used[chunk] == 0 && chunk != self.chunk {
            let mut chunks = self.chunks.to_vec();
            chunks[chunk] = Arc::default();
            self.replace_chunks(arrays, chunks);
        }
    }

    fn replace_chunks(&mut self, arrays: &Arrays, chunks: Chunks) {
        self.chunks = Arc::new(chunks);
        *arrays.chunks.write() = Arc::clone(&self.chunks);
    }

    /// The next free entry: behind the last one, as long as its chunk has any.
    fn free_place(&mut self, arrays: &Arrays) -> usize {
        let rest = self.chunks.get(self.chunk).and_then(|chunk| chunk.get(self.place..)).unwrap_or_default();
        if let Some(ahead) = rest.iter().position(|entry| entry.key.load(Ordering::Relaxed) == 0) {
            let place = self.place + ahead;
            self.place = place + 1;
            return self.chunk * CHUNK + place;
        }
        // one with much room, or a new one where one was given back, or behind all others
        let lengths = self.used.iter().zip(self.chunks.iter()).map(|(used, chunk)| (*used, chunk.len()));
        let roomy = lengths.clone().position(|(used, length)| length > 0 && length - used >= WORTH_FILLING);
        if let Some(chunk) = roomy {
            (self.chunk, self.place) = (chunk, 0);
            return self.free_place(arrays);
        }
        self.chunk = lengths.clone().position(|(_, length)| length == 0).unwrap_or(self.used.len());
        let mut more = self.chunks.to_vec();
        if self.chunk == more.len() {
            more.push(Arc::default());
            self.used.push(0);
        }
        more[self.chunk] = std::iter::repeat_with(Entry::default).take(CHUNK).collect();
        self.replace_chunks(arrays, more);
        self.place = 1;
        self.chunk * CHUNK
    }

    fn put_in_map(&mut self, arrays: &Arrays, key: u64, place: usize) {
        let shard = shard_of(key);
        if (self.shards[shard].taken + 1) * 10 > self.slots[shard].len() * 7 {
            self.grow(arrays, shard);
        }
        let slots = &self.slots[shard];
        let first = first_slot(key, slots.len());
        let free = slots[first..].iter().chain(&slots[..first]).find(|slot| {
            let slot = slot.load(Ordering::Relaxed);
            slot == 0 || slot == REMOVED
        });
        // there is always one
        if let Some(slot) = free {
            let uses = &mut self.shards[shard];
            uses.taken += usize::from(slot.load(Ordering::Relaxed) == 0);
            uses.live += 1;
            slot.store(slot_of(key, place), Ordering::Release);
        }
    }

    /// Asks memory for what the search of some keys begins with, for all of them at once.
    fn touch(&self, keys: &[u64]) {
        for key in keys {
            let slots = &self.slots[shard_of(*key)];
            let slot = slots.get(first_slot(*key, slots.len()));
            std::hint::black_box(slot.map(|slot| slot.load(Ordering::Relaxed)));
        }
    }

    /// Moves a shard's slots to a new array with room, without those that were removed.
    fn grow(&mut self, arrays: &Arrays, shard: usize) {
        let (old, chunks) = (&self.slots[shard], &self.chunks);
        let uses = &mut self.shards[shard];
        let length = (uses.live * 2).max(SMALLEST);
        let new: Slots = std::iter::repeat_with(AtomicU64::default).take(length).collect();
        for slot in old.iter().map(|slot| slot.load(Ordering::Relaxed)).filter(|slot| *slot != 0 && *slot != REMOVED) {
            let place = (slot & u64::from(u32::MAX)) as usize - 1;
            let Some(key) = entry(chunks, place).map(|entry| entry.key.load(Ordering::Relaxed)) else { continue };
            let first = first_slot(key, length);
            let mut from_first = new[first..].iter().chain(&new[..first]);
            if let Some(free) = from_first.find(|slot| slot.load(Ordering::Relaxed) == 0) {
                free.store(slot, Ordering::Relaxed);
            }
        }
        uses.taken = uses.live;
        self.slots[shard] = Arc::new(new);
        *arrays.shards[shard].write() = Arc::clone(&self.slots[shard]);
    }
}

impl BlockTable {
    /// Sets a group's bit for these blocks. In the order of their chain they are found fastest.
    pub(super) fn set(&self, hashes: impl Iterator<Item = BlockHash>, group: u32) {
        self.write(hashes, |writer, arrays, live, key| *live += usize::from(writer.set(arrays, key, group)));
    }

    /// Takes it away.
    pub(super) fn unset(&self, hashes: impl Iterator<Item = BlockHash>, group: u32) {
        self.write(hashes, |writer, arrays, live, key| *live -= usize::from(writer.unset(arrays, key, group)));
    }

    fn write(&self, hashes: impl Iterator<Item = BlockHash>, change: impl Fn(&mut Writer, &Arrays, &mut usize, u64)) {
        let mut hashes = hashes.peekable();
        while hashes.peek().is_some() {
            let mut writer = self.writer.lock();
            let arrays = Arc::clone(&self.arrays.read());
            // only the writer changes it
            let mut live = self.live.load(Ordering::Relaxed);
            for _ in 0..BATCH / TOGETHER {
                let mut keys = [0; TOGETHER];
                let mut count = 0;
                for (key, hash) in keys.iter_mut().zip(hashes.by_ref()) {
                    *key = key_of(hash);
                    count += 1;
                }
                writer.touch(&keys[..count]);
                keys[..count].iter().for_each(|key| change(&mut writer, &arrays, &mut live, *key));
            }
            self.live.store(live, Ordering::Relaxed);
            drop(arrays);
            MutexGuard::unlock_fair(writer);
        }
    }

    /// Takes away all of a group's bits; a table that lost most of its blocks gives its memory back. Nobody may set
    /// bits of this group meanwhile.
    pub(super) fn clear(&self, group: u32) {
        let _clearing = self.clearing.lock();
        let mut number = 0;
        loop {
            let mut writer = self.writer.lock();
            let arrays = Arc::clone(&self.arrays.read());
            let chunk = arrays.chunks.read().get(number).cloned();
            let (Some(chunk), true) = (chunk, writer.of_group[group as usize] > 0) else {
                return self.give_back(&mut writer, &arrays);
            };
            let mut gone = 0;
            for entry in chunk.iter() {
                if entry.bits.load(Ordering::Relaxed) & (1 << group) != 0 {
                    let key = entry.key.load(Ordering::Relaxed);
                    gone += usize::from(writer.unset(&arrays, key, group));
                }
            }
            self.live.fetch_sub(gone, Ordering::Relaxed);
            number += 1;
        }
    }

    /// Copies what is left to smaller arrays, where these have become too large for it.
    fn give_back(&self, writer: &mut Writer, arrays: &Arrays) {
        let live = self.live.load(Ordering::Relaxed);
        let room = arrays.chunks.read().iter().map(|chunk| chunk.len()).sum::<usize>();
        let slots = arrays.shards.iter().map(|shard| shard.read().len()).sum::<usize>();
        if room > (4 * live).max(2 * CHUNK) || slots > (8 * live).max(2 * SHARDS * SMALLEST) {
            self.rebuild(writer, arrays);
        }
    }

    /// Copies what is left, in its order, to new arrays.
    fn rebuild(&self, writer: &mut Writer, old: &Arrays) {
        let new = Arrays::default();
        *writer = Writer { of_group: writer.of_group, ..Writer::default() };
        for entry in old.chunks.read().iter().flat_map(|chunk| chunk.iter()) {
            let bits = entry.bits.load(Ordering::Relaxed);
            if bits != 0 {
                writer.put(&new, entry.key.load(Ordering::Relaxed), bits);
            }
        }
        *self.arrays.write() = Arc::new(new);
    }

    /// Blocks with any bit.
    pub(super) fn len(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }

    /// Bytes of the arrays.
    pub(super) fn bytes(&self) -> usize {
        let arrays = Arc::clone(&self.arrays.read());
        let slots: usize = arrays.shards.iter().map(|shard| shard.read().len()).sum();
        let chunks = arrays.chunks.read();
        let entries: usize = chunks.iter().map(|chunk| chunk.len()).sum();
        slots * size_of::<u64>() + entries * size_of::<Entry>() + chunks.len() * size_of::<Arc<Chunk>>()
    }

    /// The bits of one block.
    pub(super) fn bits(&self, hash: BlockHash) -> u64 {
        let key = key_of(hash);
        let arrays = Arc::clone(&self.arrays.read());
        let slots = Arc::clone(&arrays.shards[shard_of(key)].read());
        let chunks = Arc::clone(&arrays.chunks.read());
        find(&slots, &chunks, key).and_then(|(_, entry)| entry.bits_of(key)).unwrap_or(0)
    }

    /// Gives the bits of each block in turn to `see`, until it returns false.
    pub(super) fn walk(&self, hashes: &[BlockHash], mut see: impl FnMut(usize, u64) -> bool) {
        let mut search = Search::new(Arc::clone(&self.arrays.read()));
        let mut at = 0;
        let (mut run, mut run_before) = (LONG_RUN, LONG_RUN);
        while at < hashes.len() {
            let Some(place) = search.place_of(hashes, at, run.min(run_before)) else {
                if !see(at, 0) {
                    return;
                }
                at += 1;
                run = 0;
                continue;
            };
            run_before = run;
            run = 0;
            for (entry, hash) in search.entries_from(place).iter().zip(&hashes[at..]) {
                let Some(bits) = entry.bits_of(key_of(*hash)) else { break };
                if !see(at + run, bits) {
                    return;
                }
                run += 1;
            }
            if run == 0 && !see(at, 0) {
                // given to another block since it was found
                return;
            }
            at += run.max(1);
        }
    }
}

/// Where some blocks of a chain stand: `places[n]` is that of block `from + n * stride`.
#[derive(Default)]
struct Ahead {
    from: usize,
    stride: usize,
    places: Vec<Option<usize>>,
}

impl Ahead {
    /// Where block `at` stands, if its piece reaches to the next block that was looked for.
    fn guess(&self, at: usize) -> Option<usize> {
        let number = at.checked_sub(self.from)?.div_ceil(self.stride.max(1));
        let place = (*self.places.get(number)?)?;
        place.checked_sub(self.from + number * self.stride - at)
    }

    /// Whether blocks behind `at` were looked for.
    fn reaches(&self, at: usize) -> bool {
        at < self.from + self.places.len() * self.stride
    }
}

/// What one walk has seen so far.
struct Search {
    arrays: Arc<Arrays>,
    shards: [Option<Arc<Slots>>; SHARDS],
    chunks: Arc<Chunks>,
    ahead: Ahead,
}

impl Search {
    fn new(arrays: Arc<Arrays>) -> Self {
        let chunks = Arc::clone(&arrays.chunks.read());
        Self { arrays, shards: [const { None }; SHARDS], chunks, ahead: Ahead::default() }
    }

    /// The entries from a place to the end of its chunk.
    fn entries_from(&self, place: usize) -> &[Entry] {
        let chunk = self.chunks.get(place / CHUNK);
        chunk.and_then(|chunk| chunk.get(place % CHUNK..)).unwrap_or_default()
    }

    /// Where block `at` stands, behind pieces of at least `run` blocks.
    fn place_of(&mut self, hashes: &[BlockHash], at: usize, run: usize) -> Option<usize> {
        if run >= LONG_RUN {
            return self.find_some(&hashes[at..=at], 1).pop().flatten();
        }
        if self.ahead.reaches(at) {
            let key = key_of(hashes[at]);
            let is_here = |place: &usize| entry(&self.chunks, *place).is_some_and(|entry| entry.bits_of(key).is_some());
            let guess = self.ahead.guess(at).filter(is_here);
            return guess.or_else(|| self.find_some(&hashes[at..=at], 1).pop().flatten());
        }
        // pieces as long as the last ones have two of these each
        let stride = (run / 2 + 1).min(LONGEST_STRIDE);
        let places = self.find_some(&hashes[at..], stride);
        self.ahead = Ahead { from: at, stride, places };
        self.ahead.places.first().copied().flatten()
    }

    /// Where up to [`TOGETHER`] blocks stand, every `stride`-th of these: first the slots of all, so that memory is
    /// asked for all of them at once, then their entries.
    fn find_some(&mut self, hashes: &[BlockHash], stride: usize) -> Vec<Option<usize>> {
        let mut keys = [0; TOGETHER];
        let mut first = [0; TOGETHER];
        let mut count = 0;
        for hash in hashes.iter().step_by(stride).take(TOGETHER) {
            let key = key_of(*hash);
            let shard = shard_of(key);
            let slots = self.shards[shard].get_or_insert_with(|| Arc::clone(&self.arrays.shards[shard].read()));
            keys[count] = key;
            first[count] = slots.get(first_slot(key, slots.len())).map_or(0, |slot| slot.load(Ordering::Acquire));
            count += 1;
        }
        // entries that slots tell of are in chunks that were there before
        self.chunks = Arc::clone(&self.arrays.chunks.read());
        let chunks = &self.chunks;
        let slots = |key| self.shards[shard_of(key)].as_deref();
        let guess = |key: u64, first: u64| match place_in(first, key) {
            None if first != 0 => search(slots(key)?, key).find_map(|(_, slot)| place_in(slot, key)),
            place => place,
        };
        let mut guesses = [None; TOGETHER];
        for ((key, first), place) in keys.iter().zip(first).zip(&mut guesses).take(count) {
            *place = guess(*key, first);
            if let Some(place) = *place
                && count > 1
            {
                // the lines around it: what is read next
                for near in [place.saturating_sub(LINE), place, place + LINE] {
                    std::hint::black_box(entry(chunks, near).map(|entry| entry.key.load(Ordering::Relaxed)));
                }
            }
        }
        let sure = |key: u64, guess: Option<usize>| {
            let place = guess?;
            if entry(chunks, place).is_some_and(|entry| entry.key.load(Ordering::Acquire) == key) {
                return Some(place);
            }
            find(slots(key)?, chunks, key).map(|(place, _)| place)
        };
        keys.iter().zip(guesses).take(count).map(|(key, guess)| sure(*key, guess)).collect()
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

    /// A chain whose blocks stand one behind the other, in pieces, and not at all in order.
    #[test]
    fn walks_find_runs_and_what_stands_elsewhere() {
        let table = BlockTable::default();
        let chain: Vec<BlockHash> = (0..10_000).map(hash).collect();
        table.set(chain[..5_000].iter().copied(), 0);
        table.set(chain[7_000..].iter().rev().copied(), 1);
        table.set(chain[5_000..7_000].iter().step_by(2).copied(), 2);
        table.set(chain[5_000..7_000].iter().skip(1).step_by(2).copied(), 2);
        table.set(chain[100..200].iter().copied(), 3);
        let mut seen = 0;
        table.walk(&chain, |place, bits| {
            let expected = match place {
                100..200 => 0b1001,
                0..5_000 => 0b1,
                5_000..7_000 => 0b100,
                _ => 0b10,
            };
            assert_eq!(bits, expected, "{place}");
            seen += 1;
            true
        });
        assert_eq!(seen, chain.len());
        let most: Vec<BlockHash> = chain.iter().copied().filter(|hash| hash.0 % 5 > 0).collect();
        table.unset(chain.iter().copied().filter(|hash| hash.0 % 5 == 0), 0);
        table.walk(&most, |place, bits| {
            assert_eq!(bits, table.bits(most[place]), "{place}");
            assert_ne!(bits, 0);
            true
        });
        table.set(chain[..5_000].iter().copied(), 0);
        table.unset(chain[300..301].iter().copied(), 0);
        table.set(std::iter::once(hash(99_999)), 5);
        table.walk(&chain[..400], |place, bits| {
            assert_eq!(bits & 1, u64::from(place != 300));
            true
        });
    }

    /// Conversations told of a piece at a time, in turn, with pieces of every length, and blocks that are missing.
    #[test]
    fn walks_find_pieces_of_any_length() {
        for piece in [1, 2, 3, 5, 8, 15, 16, 31, 32, 33, 100, 127, 200, 5_000] {
            let table = BlockTable::default();
            let conversation = |number: u64| (0..3_000u64).map(|at| hash(number * 1_000_000 + at)).collect::<Vec<_>>();
            let conversations: Vec<Vec<BlockHash>> = (0..7).map(conversation).collect();
            for first in (0..3_000).step_by(piece) {
                for (bit, chain) in conversations.iter().enumerate() {
                    // lengths differ from piece to piece
                    let cut = first + (piece / 2) * usize::from((first / piece) % 3 == 1);
                    let end = (first + piece).min(chain.len());
                    table.set(chain[first..cut.min(end)].iter().copied(), bit as u32);
                    table.set(chain[cut.min(end)..end].iter().copied(), bit as u32);
                }
            }
            let missing = |at: usize| at % 701 == 700;
            for (bit, chain) in conversations.iter().enumerate() {
                table.unset((0..chain.len()).filter(|at| missing(*at)).map(|at| chain[at]), bit as u32);
            }
            for (bit, chain) in conversations.iter().enumerate() {
                let mut seen = 0;
                table.walk(chain, |place, bits| {
                    assert_eq!(bits, if missing(place) { 0 } else { 1 << bit }, "{piece} {place}");
                    assert_eq!(place, seen);
                    seen += 1;
                    true
                });
                assert_eq!(seen, chain.len());
            }
        }
    }

    #[test]
    fn a_table_that_is_emptied_gives_its_memory_back() {
        let table = BlockTable::default();
        table.set((0..200_000).map(hash), 1);
        table.set((0..200_000).step_by(1000).map(hash), 2);
        assert!(table.bytes() > 200_000 * size_of::<Entry>());
        table.clear(1);
        assert_eq!(table.len(), 200);
        assert!(table.bytes() < 200_000, "{}", table.bytes());
        assert!((0..200_000).step_by(1000).all(|number| table.bits(hash(number)) == 4));
        table.clear(2);
        assert_eq!(table.len(), 0);
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
