//! How the table is written: where a new entry stands, and when arrays are replaced by larger or smaller ones.
//!
//! What a group reports at once is a run of a chain, and a walk is as fast as runs are whole. So a run goes
//! where as many entries behind each other are free as it needs, also where that leaves smaller gaps behind; only
//! where gaps have become a good part of the table they are filled as they come.

use std::sync::{Arc, atomic::Ordering};

use bora_common::blocks::BlockHash;
use parking_lot::MutexGuard;

use super::{
    Arrays, BlockTable, CHUNK, Chunks, Entry, Found, REMOVED, SHARDS, SMALLEST, Shards, Slots, entry, first_slot,
    first_slot_of, key_of, locate, no_shards, shard_of, slot_of,
};

/// Blocks whose slots are asked for together.
const TOGETHER: usize = 16;
/// Blocks that are written before others may write.
const BATCH: usize = 1024;
/// A chunk is filled again when so many of its entries are free: enough for long runs.
const WORTH_FILLING: usize = CHUNK / 4;
/// Free entries that are enough for a run of any length.
const LONG_GAP: usize = 128;
/// Chunks that are looked through for a gap before a new one is begun.
const CHUNKS_TO_TRY: usize = 2;

/// What a group's bit of a key was before it was set.
enum Was {
    Set,
    /// Not set, but bits of other groups.
    Others,
    /// No bit was set.
    Unknown,
}

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
    /// Whether the next entry is the first of a run.
    run_begins: bool,
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
            run_begins: true,
        }
    }
}

impl Writer {
    /// Sets a group's bit of a key, the first of `run` that are to stand together.
    fn set(&mut self, arrays: &Arrays, key: u64, group: u32, run: usize) -> Was {
        let bit = 1 << group;
        match locate(&self.slots[shard_of(key)], &self.chunks, key) {
            Ok(Found { entry, .. }) => {
                let before = entry.bits.fetch_or(bit, Ordering::Relaxed);
                if before & bit != 0 {
                    return Was::Set;
                }
                self.of_group[group as usize] += 1;
                Was::Others
            }
            Err(free) => {
                self.put(arrays, key, bit, run, free);
                self.of_group[group as usize] += 1;
                Was::Unknown
            }
        }
    }

    /// A key that is not there yet; `slot` is the first that it could be written to, if it was looked for.
    fn put(&mut self, arrays: &Arrays, key: u64, bits: u64, run: usize, slot: Option<usize>) {
        let place = self.free_place(arrays, run);
        if let Some(entry) = entry(&self.chunks, place) {
            entry.bits.store(bits, Ordering::Release);
            entry.key.store(key, Ordering::Release);
            self.used[place / CHUNK] += 1;
            self.used_of_all += 1;
        }
        self.put_in_map(arrays, key, place, slot);
    }

    /// Takes a group's bit of a key away; true if it was the last one.
    fn unset(&mut self, arrays: &Arrays, key: u64, group: u32) -> bool {
        let Ok(Found { slot, place, entry }) = locate(&self.slots[shard_of(key)], &self.chunks, key) else {
            return false;
        };
        let bit = 1 << group;
        let before = entry.bits.fetch_and(!bit, Ordering::Relaxed);
        self.of_group[group as usize] -= usize::from(before & bit != 0);
        let last = before == bit;
        if last {
            entry.key.store(0, Ordering::Release);
            self.remove(arrays, shard_of(key), slot, place);
        }
        last
    }

    /// Takes a key out whose entry is free again.
    fn remove(&mut self, arrays: &Arrays, shard: usize, slot: usize, place: usize) {
        let uses = &mut self.shards[shard];
        uses.taken -= free_slot(&self.slots[shard], slot);
        uses.live -= 1;
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

    /// The next free entry: behind the last one, or the first of `run` free ones.
    fn free_place(&mut self, arrays: &Arrays, run: usize) -> usize {
        let next = self.chunks.get(self.chunk).and_then(|chunk| chunk.get(self.place));
        if std::mem::take(&mut self.run_begins) || !next.is_some_and(Entry::is_free) {
            self.find_gap(arrays, run);
        }
        let place = self.chunk * CHUNK + self.place;
        self.place += 1;
        place
    }

    /// Goes to where the next entries are written.
    fn find_gap(&mut self, arrays: &Arrays, run: usize) {
        let wanted = if self.gaps_are_many() { 1 } else { run.clamp(1, LONG_GAP) };
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

    fn put_in_map(&mut self, arrays: &Arrays, key: u64, place: usize, slot: Option<usize>) {
        let shard = shard_of(key);
        let (uses, slots) = (self.shards[shard], &self.slots[shard]);
        let is_full = (uses.taken + 1) * 10 > slots.len() * 7;
        // one that was removed makes no shard fuller
        let slot = slot.filter(|slot| !is_full || slots[*slot].load(Ordering::Relaxed) == REMOVED);
        let slot = slot.or_else(|| {
            if is_full {
                self.grow(arrays, shard);
            }
            first_free(&self.slots[shard], key)
        });
        // there is always one
        if let Some(slot) = slot.and_then(|slot| self.slots[shard].get(slot)) {
            let uses = &mut self.shards[shard];
            uses.taken += usize::from(slot.load(Ordering::Relaxed) == 0);
            uses.live += 1;
            slot.store(slot_of(key, place), Ordering::Release);
        }
    }

    /// Moves a shard's slots to a new array with room, without those that were removed.
    fn grow(&mut self, arrays: &Arrays, shard: usize) {
        let old = &self.slots[shard];
        let uses = &mut self.shards[shard];
        let length = (uses.live * 2).max(SMALLEST);
        let new: Slots = std::iter::repeat_with(Default::default).take(length).collect();
        for slot in old.iter().map(|slot| slot.load(Ordering::Relaxed)).filter(|slot| *slot != 0 && *slot != REMOVED) {
            // a slot has the half of its key that says where it goes
            if let Some(free) = first_free(&new, slot) {
                new[free].store(slot, Ordering::Relaxed);
            }
        }
        uses.taken = uses.live;
        let mut shards = Shards::clone(&self.slots);
        shards[shard] = Arc::new(new);
        self.slots = Arc::new(shards);
        *arrays.shards.write() = Arc::clone(&self.slots);
    }
}

/// The first slot of a key's search that nothing is in.
fn first_free(slots: &Slots, key: u64) -> Option<usize> {
    let first = first_slot(key, slots.len());
    let is_free = |number: &usize| matches!(slots[*number].load(Ordering::Relaxed), 0 | REMOVED);
    (first..slots.len()).chain(0..first).find(is_free)
}

/// Gives a slot free; the number of slots that are again as if never used. No search goes beyond a slot that was never
/// used, so one before such a slot, and those removed before it, need not say that searches continue.
fn free_slot(slots: &Slots, number: usize) -> usize {
    let before = |number: usize| number.checked_sub(1).unwrap_or(slots.len() - 1);
    slots[number].store(REMOVED, Ordering::Release);
    let next = if number + 1 == slots.len() { 0 } else { number + 1 };
    if slots[next].load(Ordering::Relaxed) != 0 {
        return 0;
    }
    let (mut last, mut freed) = (number, 0);
    while slots[last].load(Ordering::Relaxed) == REMOVED {
        slots[last].store(0, Ordering::Release);
        last = before(last);
        freed += 1;
    }
    freed
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
        self.set_or(hashes, group, |_| ());
    }

    /// The same; `again` is given the keys of those for which it was set before.
    pub(in crate::place) fn set_or(
        &self,
        hashes: impl Iterator<Item = BlockHash>,
        group: u32,
        mut again: impl FnMut(u64),
    ) {
        self.write(hashes, |writer, arrays, live, key, run| match writer.set(arrays, key, group, run) {
            Was::Set => again(key),
            Was::Others => {}
            Was::Unknown => *live += 1,
        });
    }

    /// Bits that are set, of all groups.
    pub(in crate::place) fn bits_set(&self) -> usize {
        self.writer.lock().of_group.iter().sum()
    }

    /// Bits that are set, of one group.
    pub(in crate::place) fn bits_of(&self, group: u32) -> usize {
        self.writer.lock().of_group[group as usize]
    }

    /// Takes it away.
    pub(in crate::place) fn unset(&self, hashes: impl Iterator<Item = BlockHash>, group: u32) {
        self.write(hashes, |writer, arrays, live, key, _| *live -= usize::from(writer.unset(arrays, key, group)));
    }

    fn write(
        &self,
        hashes: impl Iterator<Item = BlockHash>,
        mut change: impl FnMut(&mut Writer, &Arrays, &mut usize, u64, usize),
    ) {
        let mut hashes = hashes.peekable();
        while hashes.peek().is_some() {
            let mut writer = self.writer.lock();
            writer.run_begins = true;
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
                    let run = behind.saturating_sub(done).max(count - done);
                    change(&mut writer, &arrays, &mut live, *key, run);
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
                writer.put(&new, entry.key.load(Ordering::Relaxed), bits, 1, None);
            }
        }
        *self.arrays.write() = Arc::new(new);
    }
}
