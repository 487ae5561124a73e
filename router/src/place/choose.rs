//! The formula of placement: the group that would give the first token soonest.
//!
//! `expected seconds = queued prefill tokens and this prompt's tokens that the group does not hold, at its
//! measured rate (with the quadratic term of attention), + its decode pressure`. No thresholds: a group
//! that holds the prefix but is busy loses exactly when waiting there takes longer than computing anew.

use std::{fmt::Write as _, sync::Arc};

use bora_common::{
    blocks::{BLOCK_TOKENS, BlockHash},
    registry::Speed,
};

use super::{
    Slot,
    ledger::{Booking, Busy},
};
use crate::fleet::view::{Fleet, Group, ModelGroups};

/// Scores closer than this share of the best one are equal.
const TIE: f64 = 1e-3;

/// Why no group was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoGroup {
    /// None is ready.
    #[error("no group of this model takes requests now")]
    NoneReady,
    /// The ready ones were all tried, or are too small for the prompt.
    #[error("no other group of this model can take the request")]
    NoneLeft,
}

/// What is to be placed.
pub struct Wanted<'a> {
    /// The chain of its full blocks.
    pub hashes: &'a [BlockHash],
    /// Its length in tokens, resumed ones included.
    pub tokens: usize,
    /// Groups that failed it already.
    pub avoid: &'a [Slot],
    /// Whether to write down the reasons.
    pub explain: bool,
}

/// A choice, already booked.
pub struct Placement {
    /// Where it goes.
    pub group: Arc<Group>,
    /// Its load on that group, until dropped.
    pub booking: Booking,
    /// The candidates' scores in words, if asked for.
    pub explanation: Option<String>,
}

/// Seconds until the first token of a prompt of `tokens`, of which the group holds the first `held`.
pub fn expected_seconds(speed: &Speed, tokens: usize, held: usize, busy: Busy, max_sequences: u32) -> f64 {
    let seconds_per_token = 1.0 / speed.prefill_tokens_per_second.max(1.0);
    // at least one token is computed: its logits are needed
    let held = held.min(tokens.saturating_sub(1)) as f64;
    let computed = tokens as f64 - held;
    let queue = busy.queued_tokens as f64 * seconds_per_token;
    let linear = computed * seconds_per_token;
    let attention = speed.prefill_seconds_per_token_pair * computed * (held + computed / 2.0);
    queue + linear + attention + decode_pressure(speed, busy.sequences, max_sequences)
}

/// Every running sequence makes the steps that carry the prompt a little longer; a sequence beyond the
/// group's capacity waits for another to end.
fn decode_pressure(speed: &Speed, sequences: u32, max_sequences: u32) -> f64 {
    const STEPS_OF_A_SEQUENCE: f64 = 256.0;
    let capacity = max_sequences.max(1);
    let share = f64::from(sequences.min(capacity)) / f64::from(capacity);
    let above = f64::from((sequences + 1).saturating_sub(capacity));
    speed.decode_step_seconds * (share + above * STEPS_OF_A_SEQUENCE / f64::from(capacity))
}

/// Chooses a group and books the request on it, in one step that no other choice can come between.
pub fn place(fleet: &Fleet, model: &ModelGroups, wanted: &Wanted<'_>) -> Result<Placement, NoGroup> {
    let ready: Vec<&Arc<Group>> = model.groups.iter().filter(|group| group.is_ready()).collect();
    if ready.is_empty() {
        return Err(NoGroup::NoneReady);
    }
    let fits = |group: &&Arc<Group>| {
        wanted.tokens < group.record.max_model_len as usize && !wanted.avoid.contains(&group.link.slot)
    };
    let mut candidates: Vec<&Arc<Group>> = ready.iter().copied().filter(fits).collect();
    if candidates.is_empty() {
        return Err(NoGroup::NoneLeft);
    }
    // Where every breaker is open, trying beats refusing.
    if candidates.iter().any(|group| group.link.breaker.allows()) {
        candidates.retain(|group| group.link.breaker.allows());
    }
    let slots: Vec<Slot> = candidates.iter().map(|group| group.link.slot).collect();

    let _one_at_a_time = fleet.placing.lock();
    let matched = fleet.index.matched(wanted.hashes, &slots);
    let scores: Vec<f64> = candidates
        .iter()
        .zip(&matched)
        .map(|(group, blocks)| {
            let held = *blocks as usize * BLOCK_TOKENS;
            let record = &group.record;
            expected_seconds(&record.speed, wanted.tokens, held, group.link.ledger.busy(), record.max_sequences)
        })
        .collect();
    let chosen = pick(&scores);
    let group = Arc::clone(candidates[chosen]);
    let held_blocks = (matched[chosen] as usize).min(wanted.hashes.len());
    let computed = wanted.tokens.saturating_sub(held_blocks * BLOCK_TOKENS).max(1);
    let explanation = wanted.explain.then(|| explain(&candidates, &matched, &scores, chosen));
    let booking = Booking::new(
        Arc::clone(&group.link),
        Arc::clone(&fleet.index),
        computed as u64,
        wanted.hashes[held_blocks..].to_vec(),
    );
    group.link.breaker.chosen();
    Ok(Placement { group, booking, explanation })
}

/// The least score; one of the equals at random. `scores` is not empty.
fn pick(scores: &[f64]) -> usize {
    let least = scores.iter().copied().fold(f64::INFINITY, f64::min);
    let limit = least + least.abs() * TIE + 1e-9;
    let equals = || scores.iter().enumerate().filter(|(_, score)| **score <= limit).map(|(at, _)| at);
    let number = equals().count();
    if number <= 1 {
        return equals().next().unwrap_or(0);
    }
    equals().nth(rand::random_range(0..number)).unwrap_or(0)
}

fn explain(candidates: &[&Arc<Group>], matched: &[u32], scores: &[f64], chosen: usize) -> String {
    let mut text = format!("chose={}", candidates[chosen].record.group);
    for ((group, blocks), score) in candidates.iter().zip(matched).zip(scores).take(16) {
        let busy = group.link.ledger.busy();
        let _ = write!(
            text,
            "; {}: {:.6}s held_blocks={} queued_tokens={} sequences={}",
            group.record.group, score, blocks, busy.queued_tokens, busy.sequences
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEED: Speed =
        Speed { prefill_tokens_per_second: 10_000.0, prefill_seconds_per_token_pair: 1e-8, decode_step_seconds: 0.01 };

    #[test]
    fn a_held_prefix_wins_until_the_wait_beats_the_recompute() {
        let idle = Busy::default();
        let cold = expected_seconds(&SPEED, 20_000, 0, idle, 64);
        let warm = expected_seconds(&SPEED, 20_000, 19_200, idle, 64);
        assert!(warm < cold / 10.0, "{warm} {cold}");
        let queued = |tokens| Busy { queued_tokens: tokens, sequences: 0 };
        assert!(expected_seconds(&SPEED, 20_000, 19_200, queued(10_000), 64) < cold);
        assert!(expected_seconds(&SPEED, 20_000, 19_200, queued(60_000), 64) > cold);
    }

    #[test]
    fn more_running_sequences_never_look_better() {
        let at = |sequences| expected_seconds(&SPEED, 100, 0, Busy { queued_tokens: 0, sequences }, 8);
        for sequences in 0..20 {
            assert!(at(sequences) < at(sequences + 1), "{sequences}");
        }
    }

    #[test]
    fn equals_are_chosen_at_random_and_only_they() {
        let mut seen = [0; 4];
        for _ in 0..2000 {
            seen[pick(&[1.0, 0.5, 0.500_01, 2.0])] += 1;
        }
        assert_eq!((seen[0], seen[3]), (0, 0));
        assert!(seen[1] > 800 && seen[2] > 800, "{seen:?}");
    }
}
