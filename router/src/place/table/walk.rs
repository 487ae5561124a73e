//! How the table is read: block by block along a chain.
//!
//! A walk continues from entry to entry as long as the next one is the next block's. Where a run ends, the next one has
//! to be found by the map: a slot, then the entry, each of them far from everything else. So behind short runs a walk
//! looks ahead: it asks for the slots of many blocks that are still to come, at once, and then for their entries, so
//! that it waits for memory once and not with every run ([`Ahead`]).

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
};

use bora_common::blocks::BlockHash;

use super::{BlockTable, CHUNK, Chunks, Entry, Shards, entry, find, first_slot_of, key_of, place_in, search, shard_of};

/// Behind runs of so many blocks only the next one is looked for: another long one most likely begins with it.
const LONG_RUN: usize = 128;
/// Blocks that are looked for at once: with 32 or 64 it is slower.
const AHEAD: usize = 16;
/// Longest way from one block that is looked for ahead to the next.
const MAX_STRIDE: usize = 32;
/// Entries of a line of the processor's cache.
const LINE: usize = 64 / size_of::<Entry>();

impl BlockTable {
    /// Gives the bits of each block in turn to `see`, until it returns false. Blocks that come or go meanwhile may be
    /// seen or not.
    pub(in crate::place) fn walk(&self, hashes: &[BlockHash], mut see: impl FnMut(usize, u64) -> bool) {
        let arrays = Arc::clone(&self.arrays.read());
        let (shards, chunks) = arrays.now();
        let mut search = Search { shards, chunks, ahead: VecDeque::with_capacity(AHEAD) };
        let mut at = 0;
        let mut typical = LONG_RUN;
        while at < hashes.len() {
            let Some(place) = search.place_of(hashes, at, typical) else {
                if !see(at, 0) {
                    return;
                }
                at += 1;
                continue;
            };
            let mut run = 0;
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
            typical = (typical + run) / 2;
        }
    }
}

/// A block that was looked for ahead.
struct Ahead {
    at: usize,
    key: u64,
    /// What the first slot of its search has.
    slot: u64,
    place: Option<usize>,
}

/// What one walk looks into: all that was in the table when it began is found.
struct Search {
    shards: Arc<Shards>,
    chunks: Arc<Chunks>,
    ahead: VecDeque<Ahead>,
}

impl Search {
    /// The entries from a place to the end of its chunk.
    fn entries_from(&self, place: usize) -> &[Entry] {
        let chunk = self.chunks.get(place / CHUNK);
        chunk.and_then(|chunk| chunk.get(place % CHUNK..)).unwrap_or_default()
    }

    /// Where block `at` stands, if runs have about `typical` blocks.
    fn place_of(&mut self, hashes: &[BlockHash], at: usize, typical: usize) -> Option<usize> {
        while self.ahead.front().is_some_and(|block| block.at < at) {
            self.ahead.pop_front();
        }
        if typical < LONG_RUN && self.ahead.is_empty() {
            // four to three runs of that length: a draft token goes back to where a run begins
            self.look_ahead(hashes, at, (typical * 3 / 4 + 1).min(MAX_STRIDE));
        }
        self.predict(hashes, at).or_else(|| {
            let key = key_of(hashes[at]);
            find(&self.shards[shard_of(key)], &self.chunks, key).map(|(place, _)| place)
        })
    }

    /// Where block `at` stands, if its run reaches to the next one that was looked for.
    fn predict(&self, hashes: &[BlockHash], at: usize) -> Option<usize> {
        let next = self.ahead.front()?;
        let place = next.place?.checked_sub(next.at - at)?;
        let key = key_of(hashes[at]);
        entry(&self.chunks, place)?.bits_of(key).map(|_| place)
    }

    /// Looks for every `stride`-th block from `at` on: first the slots of all, so that memory is asked for all of them
    /// at once, then the entries around theirs.
    fn look_ahead(&mut self, hashes: &[BlockHash], at: usize, stride: usize) {
        for at in (at..hashes.len()).step_by(stride).take(AHEAD) {
            let key = key_of(hashes[at]);
            let slot = first_slot_of(&self.shards[shard_of(key)], key);
            self.ahead.push_back(Ahead { at, key, slot, place: None });
        }
        for block in &mut self.ahead {
            let search_on = || search(&self.shards[shard_of(block.key)], block.key);
            block.place = match place_in(block.slot, block.key) {
                None if block.slot != 0 => search_on().find_map(|(_, slot)| place_in(slot, block.key)),
                place => place,
            };
            let Some(place) = block.place else { continue };
            // the lines around it: what is read next
            for near in [place.saturating_sub(LINE), place, place + LINE] {
                std::hint::black_box(entry(&self.chunks, near).map(|entry| entry.key.load(Ordering::Relaxed)));
            }
        }
    }
}
