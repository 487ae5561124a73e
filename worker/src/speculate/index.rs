//! Where the last token IDs of a sequence stood before: chains of the places at which each run of a few token IDs occurred, newest first,
//! in the manner of a compressor's dictionary.

/// No place.
const NONE: u32 = u32::MAX;
/// Places that are compared before one is chosen.
const CANDIDATES: usize = 16;
/// Ids of the table at first.
const FIRST_TABLE: usize = 1 << 10;

/// An index over the token IDs of one sequence, which grow at their end. It does not hold the token IDs: callers bring the same ones, grown,
/// every time.
#[derive(Clone, Debug)]
pub(crate) struct SuffixIndex {
    /// Ids that have to match.
    run: usize,
    /// Ids that are compared at most.
    longest: usize,
    /// By the hash of a run: the newest place, which is the index of the id that followed it.
    newest: Vec<u32>,
    /// For the place `i + run`: the one before it with the same hash.
    older: Vec<u32>,
}

/// A place where the last token IDs stood before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Match {
    /// Index of the id that followed them.
    pub(crate) next: usize,
    /// How many of the last token IDs stand before it.
    pub(crate) length: usize,
}

impl SuffixIndex {
    /// Nothing is indexed.
    pub(crate) fn new(run: usize, longest: usize) -> Self {
        Self { run: run.max(1), longest: longest.max(run), newest: Vec::new(), older: Vec::new() }
    }

    /// Takes in up to `most` further places; false where some are left for the next call.
    pub(crate) fn catch_up(&mut self, ids: &[u32], most: usize) -> bool {
        // the place behind the last id has no follower yet
        let places = ids.len().saturating_sub(self.run);
        let until = places.min(self.older.len() + most);
        if until > self.newest.len() {
            self.enlarge(ids, until);
        }
        for first in self.older.len()..until {
            self.insert(ids, first);
        }
        until == places
    }

    fn insert(&mut self, ids: &[u32], first: usize) {
        let bucket = self.bucket(&ids[first..first + self.run]);
        self.older.push(self.newest[bucket]);
        self.newest[bucket] = (first + self.run) as u32;
    }

    /// A table for `places` places: each id pays for it a constant number of times.
    fn enlarge(&mut self, ids: &[u32], places: usize) {
        let indexed = self.older.len();
        self.newest.clear();
        self.newest.resize(places.next_power_of_two().max(FIRST_TABLE), NONE);
        self.older.clear();
        for first in 0..indexed {
            self.insert(ids, first);
        }
    }

    fn bucket(&self, run: &[u32]) -> usize {
        let hash = run
            .iter()
            .fold(0u64, |hash, id| (hash ^ u64::from(*id)).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23));
        (hash.wrapping_mul(0xD6E8_FEB8_6659_FD93) >> 32) as usize & (self.newest.len() - 1)
    }

    /// The place with the longest match to the end of `ids`, of equally long ones the newest.
    pub(crate) fn find(&self, ids: &[u32]) -> Option<Match> {
        if ids.len() < self.run || self.newest.is_empty() {
            return None;
        }
        let mut best: Option<Match> = None;
        let mut place = self.newest[self.bucket(&ids[ids.len() - self.run..])];
        for _ in 0..CANDIDATES {
            if place == NONE {
                break;
            }
            let next = place as usize;
            let length = common_end(&ids[..next], ids, self.longest);
            // equal hashes are no match yet
            if length >= self.run && best.is_none_or(|best| length > best.length) {
                best = Some(Match { next, length });
            }
            if length == self.longest {
                break;
            }
            place = self.older[next - self.run];
        }
        best
    }
}

/// How many token IDs at their ends two slices have in common, counted up to `most`.
fn common_end(a: &[u32], b: &[u32], most: usize) -> usize {
    a.iter().rev().zip(b.iter().rev()).take(most).take_while(|(a, b)| a == b).count()
}

/// `count` token IDs from `next` on; behind the last known one they repeat, as what is copied may overlap its copy.
pub(crate) fn continuation(ids: &[u32], next: usize, count: usize) -> Vec<u32> {
    let period = ids.len() - next;
    (0..count).map(|i| ids[next + i % period]).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The longest match by looking at every place.
    fn by_force(ids: &[u32], run: usize, longest: usize) -> Option<Match> {
        (run..ids.len())
            .map(|next| Match { next, length: common_end(&ids[..next], ids, longest) })
            .filter(|found| found.length >= run)
            .max_by_key(|found| (found.length, found.next))
    }

    #[test]
    fn what_followed_before_is_found_and_overlapping_copies_go_on() {
        let ids = [1, 2, 3, 9, 8, 1, 2, 3];
        let mut index = SuffixIndex::new(3, 64);
        assert!(index.catch_up(&ids, usize::MAX));
        let found = index.find(&ids).unwrap();
        assert_eq!(found, Match { next: 3, length: 3 });
        assert_eq!(continuation(&ids, 3, 4), [9, 8, 1, 2]);
        let ids = [5, 7, 7, 7, 7];
        let mut index = SuffixIndex::new(2, 64);
        index.catch_up(&ids, usize::MAX);
        assert_eq!(continuation(&ids, index.find(&ids).unwrap().next, 6), [7; 6]);
        assert_eq!(SuffixIndex::new(3, 9).find(&[1, 2]), None);
    }

    #[test]
    fn a_long_prompt_is_taken_in_piece_by_piece() {
        let ids: Vec<u32> = (0..5_000).map(|i| i % 2_500).collect();
        let mut index = SuffixIndex::new(3, 64);
        let mut calls = 1;
        while !index.catch_up(&ids, 1_000) {
            calls += 1;
        }
        assert_eq!(calls, 5);
        assert_eq!(index.find(&ids), Some(Match { next: 2_500, length: 64 }));
    }

    proptest! {
        #[test]
        fn the_longest_match_is_found(ids in prop::collection::vec(0u32..4, 0..60), run in 1usize..5, step in 1usize..9) {
            let mut index = SuffixIndex::new(run, 12);
            for end in (0..ids.len()).step_by(step) {
                index.catch_up(&ids[..end], 7);
            }
            while !index.catch_up(&ids, 7) {}
            let found = index.find(&ids);
            let best = by_force(&ids, run, 12);
            prop_assert_eq!(found.is_some(), best.is_some());
            if let (Some(found), Some(best)) = (found, best) {
                prop_assert_eq!(common_end(&ids[..found.next], &ids, 12), found.length);
                // only so many places are compared
                prop_assert!(found.length == best.length || ids.len() > CANDIDATES);
            }
        }
    }
}
