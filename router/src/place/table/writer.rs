//! How the table is written: where a new entry stands, and when arrays are replaced by larger or smaller ones.
//!
//! What a group tells of at once is a piece of a chain, and a walk is as fast as pieces are whole. So a piece goes
//! where as many entries behind each other are free as it needs, also where that leaves smaller gaps behind; only
//! where gaps have become a good part of the table they are filled as they come.

use std::sync::{Arc, atomic::Ordering};

use bora_common::blocks::BlockHash;
use parking_lot::MutexGuard;

use super::{
    Arrays, BlockTable, CHUNK, Chunks, Entry, REMOVED, SHARDS, SMALLEST, Shards, Slots, entry, find, first_slot,
    first_slot_of, key_of, no_shards, search, shard_of, slot_of,
};

/// Blocks whose slots are asked for together.
const TOGETHER: usize = 16;
/// Blocks that are written before others may write.
const BATCH: usize = 1024;
/// A chunk is filled again when so many of its entries are free: enough for long runs.
const WORTH_FILLING: usize = CHUNK / 4;
/// Free entries that are enough for a piece of any length.
const LONG_GAP: usize = 128;
/// Chunks that are looked through for a gap before a new one is begun.
const CHUNKS_TO_TRY: usize = 2;

#[derive(Clone, Copy, Default)]
struct ShardUse {
    /// Slots that are or were used.
    taken: usize,
    live: usize,
}

/// What only the writer knows.
pub(super) struct Writer {
    /// The same arrays that readers see: nobody else replaces them, so the writer counts no owners to look into them.
    slots: Arc<Shards>,
    chunks: Arc<Chunks>,
    shards: [ShardUse; SHARDS],
    /// Blocks of each group.
    of_group: [usize; 64],
    /// Entries in use of each chunk, and of all.
    used: Vec<usize>,
    used_of_all: usize,
    /// Entries of all chunks.
    room: usize,
    /// Where the next entry is looked for.
    chunk: usize,
    place: usize,
    /// Whether the next entry is the first of a piece.
    piece_begins: bool,
}

impl Default for Writer {
    fn default() -> Self {
        Self {
            slots: no_shards(),
            chunks: Arc::default(),
            shards: [ShardUse::default(); SHARDS],
            of_group: [0; 64],
            used: Vec::new(),
            used_of_all: 0,
            room: 0,
            chunk: 0,
            place: 0,
            piece_begins: true,
        }
    }
}

impl Writer {
    /// Sets a group's bit of a key, the first of `piece` that are to stand together; true if it is the key's first one.
    fn set(&mut self, arrays: &Arrays, key: u64, group: u32, piece: usize) -> bool {
        let bit = 1 << group;
        if let Some((_, entry)) = find(&self.slots[shard_of(key)], &self.chunks, key) {
            let before = entry.bits.fetch_or(bit, Ordering::Relaxed);
            self.of_group[group as usize] += usize::from(before & bit == 0);
            return false;
        }
        self.put(arrays, key, bit, piece);
        self.of_group[group as usize] += 1;
        true
    }

    /// A key that is not there yet.
    fn put(&mut self, arrays: &Arrays, key: u64, bits: u64, piece: usize) {
        let place = self.free_place(arrays, piece);
        if let Some(entry) = entry(&self.chunks, place) {
            entry.bits.store(bits, Ordering::Release);
            entry.key.store(key, Ordering::Release);
            self.used[place / CHUNK] += 1;
            self.used_of_all += 1;
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
        self.used_of_all -= 1;
        if self.used[chunk] == 0 && chunk != self.chunk {
            let mut chunks = self.chunks.to_vec();
            self.room -= chunks[chunk].len();
            chunks[chunk] = Arc::default();
            self.replace_chunks(arrays, chunks);
        }
    }

    fn replace_chunks(&mut self, arrays: &Arrays, chunks: Chunks) {
        self.chunks = Arc::new(chunks);
        *arrays.chunks.write() = Arc::clone(&self.chunks);
    }

    /// The next free entry: behind the last one, or the first of `piece` free ones.
    fn free_place(&mut self, arrays: &Arrays, piece: usize) -> usize {
        let next = self.chunks.get(self.chunk).and_then(|chunk| chunk.get(self.place));
        if std::mem::take(&mut self.piece_begins) || !next.is_some_and(Entry::is_free) {
            self.find_gap(arrays, piece);
        }
        let place = self.chunk * CHUNK + self.place;
        self.place += 1;
        place
    }

    /// Goes to where the next entries are written.
    fn find_gap(&mut self, arrays: &Arrays, piece: usize) {
        let wanted = if self.gaps_are_many() { 1 } else { piece.clamp(1, LONG_GAP) };
        for _ in 0..CHUNKS_TO_TRY {
            if let Some(place) = self.chunks.get(self.chunk).and_then(|chunk| gap(chunk, self.place, wanted)) {
                self.place = place;
                return;
            }
            // one with much room, behind this one and then from the first one on
            let is_roomy = |chunk: &usize| {
                let length = self.chunks[*chunk].len();
                length > 0 && length - self.used[*chunk] >= WORTH_FILLING
            };
            let behind = (self.chunk + 1..self.chunks.len()).chain(0..self.chunk.min(self.chunks.len()));
            let Some(roomy) = behind.into_iter().find(is_roomy) else { break };
            (self.chunk, self.place) = (roomy, 0);
        }
        self.begin_chunk(arrays);
    }

    /// Whether so much of the table is free that it has to be used whatever it is.
    fn gaps_are_many(&self) -> bool {
        self.used_of_all < self.room / 5 * 3
    }

    /// A new chunk, where one was given back or behind all others.
    fn begin_chunk(&mut self, arrays: &Arrays) {
        let mut chunks = self.chunks.to_vec();
        self.chunk = chunks.iter().position(|chunk| chunk.is_empty()).unwrap_or(chunks.len());
        if self.chunk == chunks.len() {
            chunks.push(Arc::default());
            self.used.push(0);
        }
        chunks[self.chunk] = std::iter::repeat_with(Entry::default).take(CHUNK).collect();
        self.room += CHUNK;
        self.place = 0;
        self.replace_chunks(arrays, chunks);
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

    /// Moves a shard's slots to a new array with room, without those that were removed.
    fn grow(&mut self, arrays: &Arrays, shard: usize) {
        let (old, chunks) = (&self.slots[shard], &self.chunks);
        let uses = &mut self.shards[shard];
        let length = (uses.live * 2).max(SMALLEST);
        let new: Slots = std::iter::repeat_with(Default::default).take(length).collect();
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
        let mut shards = Shards::clone(&self.slots);
        shards[shard] = Arc::new(new);
        self.slots = Arc::new(shards);
        *arrays.shards.write() = Arc::clone(&self.slots);
    }
}

/// Where in a chunk, from a place on, so many entries behind each other are free.
fn gap(chunk: &[Entry], from: usize, wanted: usize) -> Option<usize> {
    let mut first = from;
    for (at, entry) in chunk.iter().enumerate().skip(from) {
        if !entry.is_free() {
            first = at + 1;
        } else if at + 1 - first >= wanted {
            return Some(first);
        }
    }
    None
}

impl BlockTable {
    /// Sets a group's bit for these blocks. In the order of their chain they are found fastest.
    pub(in crate::place) fn set(&self, hashes: impl Iterator<Item = BlockHash>, group: u32) {
        self.write(hashes, |writer, arrays, live, key, piece| {
            *live += usize::from(writer.set(arrays, key, group, piece));
        });
    }

    /// Takes it away.
    pub(in crate::place) fn unset(&self, hashes: impl Iterator<Item = BlockHash>, group: u32) {
        self.write(hashes, |writer, arrays, live, key, _| *live -= usize::from(writer.unset(arrays, key, group)));
    }

    fn write(
        &self,
        hashes: impl Iterator<Item = BlockHash>,
        change: impl Fn(&mut Writer, &Arrays, &mut usize, u64, usize),
    ) {
        let mut hashes = hashes.peekable();
        while hashes.peek().is_some() {
            let mut writer = self.writer.lock();
            writer.piece_begins = true;
            let arrays = Arc::clone(&self.arrays.read());
            // only the writer changes it
            let mut live = self.live.load(Ordering::Relaxed);
            for _ in 0..BATCH / TOGETHER {
                let behind = hashes.size_hint().0;
                let mut keys = [0; TOGETHER];
                let mut count = 0;
                for (key, hash) in keys.iter_mut().zip(hashes.by_ref()) {
                    *key = key_of(hash);
                    count += 1;
                }
                // memory is asked for all of them at once
                for key in &keys[..count] {
                    std::hint::black_box(first_slot_of(&writer.slots[shard_of(*key)], *key));
                }
                for (done, key) in keys[..count].iter().enumerate() {
                    let piece = behind.saturating_sub(done).max(count - done);
                    change(&mut writer, &arrays, &mut live, *key, piece);
                }
            }
            self.live.store(live, Ordering::Relaxed);
            drop(arrays);
            MutexGuard::unlock_fair(writer);
        }
    }

    /// Takes away all of a group's bits; a table that lost most of its blocks gives its memory back. Nobody may set
    /// bits of this group meanwhile.
    pub(in crate::place) fn clear(&self, group: u32) {
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
        let slots = writer.slots.iter().map(|slots| slots.len()).sum::<usize>();
        if writer.room > (4 * live).max(2 * CHUNK) || slots > (8 * live).max(2 * SHARDS * SMALLEST) {
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
                writer.put(&new, entry.key.load(Ordering::Relaxed), bits, 1);
            }
        }
        *self.arrays.write() = Arc::new(new);
    }
}
