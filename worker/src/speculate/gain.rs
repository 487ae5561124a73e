//! How many draft tokens are worth their rows.
//!
//! A step of B sequences takes S seconds and each further row c: a row costs `B c / S` token IDs that the step could have brought
//! instead (the price). A draft token comes true if all before it do, so with the share r of draft tokens that came true, the k-th brings
//! `r^k` token IDs. Draft tokens are made while that is more than the price.

use super::index::continuation;
use super::{SpeculativeOptions, SuffixIndex};

/// Share of draft tokens that come true, where nothing is known.
const PRIOR: f64 = 0.6;
/// Weight of the newest draft token in the running share.
const LEARNING_RATE: f64 = 0.1;
/// How fast a sequence that stopped speculation believes in it again, with each step.
const FORGETTING_RATE: f64 = 0.01;
/// A match of so many token IDs is a long one, with a share of its own.
const LONG_MATCH: usize = 8;
/// Draft tokens for each id that matches: short matches say little about what comes much later.
const DRAFTS_A_MATCHED_TOKEN: usize = 2;
/// Places that the index takes in for each step: some tens of microseconds.
const PLACES_A_STEP: usize = 16_384;
/// What a step with draft tokens costs beside its rows, in steps: the next one can't be made while it runs.
const OVERHEAD: f64 = 0.05;
/// Rows cost more than the model of prompts says, and GEMMs grow in jumps.
const SAFETY: f64 = 1.5;

/// Whether the token IDs that `gain` promises for a step of `sequences` are more than what it costs to look.
pub(crate) fn worthwhile(gain: f64, sequences: usize) -> bool {
    gain > OVERHEAD * sequences as f64
}

/// What one sequence knows about speculation.
#[derive(Clone, Debug)]
pub(crate) struct Speculator {
    index: SuffixIndex,
    most: usize,
    complete: bool,
    /// Share of draft tokens that came true: after short matches, after long ones.
    shares: [f64; 2],
    /// Which of them the draft tokens in flight belong to.
    drafted_by: usize,
}

/// Draft tokens and what they promise.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Proposal {
    /// What is drafted to come.
    pub(crate) ids: Vec<u32>,
    /// Ids more than one that a step brings, expected, less the price of the rows.
    pub(crate) gain: f64,
}

impl Speculator {
    /// `None` where nothing shall be drafted.
    pub(crate) fn new(options: &SpeculativeOptions) -> Option<Self> {
        let most = options.num_speculative_tokens.min(super::MAX_DRAFTS) as usize;
        (most > 0).then(|| Self {
            index: SuffixIndex::new(options.prompt_lookup_min as usize, options.prompt_lookup_max as usize),
            most,
            complete: false,
            shares: [PRIOR; 2],
            drafted_by: 0,
        })
    }

    /// Takes in what came; a long prompt over several steps.
    pub(crate) fn catch_up(&mut self, ids: &[u32]) {
        self.complete = self.index.catch_up(ids, PLACES_A_STEP);
    }

    /// What comes after `ids`, in at most `room` draft tokens. The first `unknown` of them are being sampled already: they bring
    /// nothing, but have to come true.
    pub(crate) fn propose(&mut self, ids: &[u32], unknown: usize, room: usize, price: f64) -> Proposal {
        let found = if self.complete { self.index.find(ids) } else { None };
        let Some(found) = found else { return Proposal::default() };
        self.drafted_by = usize::from(found.length >= LONG_MATCH);
        let share = self.shares[self.drafted_by];
        let believable = (found.length * DRAFTS_A_MATCHED_TOKEN).min(self.most).min(room);
        let (mut count, mut gain, mut likely) = (0, 0.0, share.powi(unknown as i32));
        while count < believable {
            likely *= share;
            if likely <= price * SAFETY {
                break;
            }
            gain += likely - price;
            count += 1;
        }
        Proposal { ids: continuation(ids, found.next, unknown + count).split_off(unknown), gain }
    }

    /// A step was made without draft tokens.
    pub(crate) fn pass(&mut self) {
        let share = &mut self.shares[self.drafted_by];
        *share += FORGETTING_RATE * (PRIOR - *share);
    }

    /// Of `drafted` draft tokens the first `accepted` came true.
    pub(crate) fn learn(&mut self, drafted: usize, accepted: usize) {
        let share = &mut self.shares[self.drafted_by];
        for _ in 0..accepted {
            *share += LEARNING_RATE * (1.0 - *share);
        }
        if accepted < drafted {
            *share -= LEARNING_RATE * *share;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn speculator() -> Speculator {
        Speculator::new(&SpeculativeOptions::default()).unwrap()
    }

    #[test]
    fn dear_rows_are_not_wasted_and_cheap_ones_are_used() {
        let ids: Vec<u32> = (0..200).map(|i| i % 50).collect();
        let mut speculator = speculator();
        speculator.catch_up(&ids);
        let draft_tokens = |price: f64, room: usize| speculator.clone().propose(&ids, 0, room, price).ids.len();
        assert_eq!(draft_tokens(0.0, 100), 15);
        assert_eq!(draft_tokens(0.0, 4), 4);
        assert_eq!(draft_tokens(0.1, 100), 3, "0.6 ^ 4 is less than 1.5 times the price");
        assert_eq!(draft_tokens(0.5, 100), 0, "above the knee");
        let proposal = speculator.propose(&ids, 1, 100, 0.0);
        assert_eq!(proposal.ids[..3], [1, 2, 3], "the id in flight is 0");
        assert!(proposal.gain < 1.0);
    }

    #[test]
    fn drafts_less_after_rejections_and_probes_again_later() {
        let ids: Vec<u32> = (0..200).map(|i| i % 50).collect();
        let mut speculator = speculator();
        speculator.catch_up(&ids);
        let gain = |speculator: &Speculator| speculator.clone().propose(&ids, 0, 100, 0.02).gain;
        let begin = gain(&speculator);
        for _ in 0..5 {
            speculator.propose(&ids, 0, 100, 0.02);
            speculator.learn(15, 15);
        }
        assert!(gain(&speculator) > 3.0 * begin);
        for _ in 0..60 {
            speculator.learn(5, 0);
        }
        assert!(!worthwhile(gain(&speculator), 1));
        for _ in 0..300 {
            speculator.pass();
        }
        assert!(worthwhile(gain(&speculator), 1));
    }

    #[test]
    fn drafts_nothing_without_a_match() {
        let mut speculator = speculator();
        let ids: Vec<u32> = (0..100).collect();
        speculator.catch_up(&ids);
        assert_eq!(speculator.propose(&ids, 0, 100, 0.0), Proposal::default());
        assert!(Speculator::new(&SpeculativeOptions::off()).is_none());
    }
}
