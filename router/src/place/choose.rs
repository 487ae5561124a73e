//! The formula of placement: the group that would give the first token soonest.
//!
//! [`CostModel::placement_seconds`](bora_common::cost::CostModel::placement_seconds) is the formula.
//! No thresholds: a group that holds the prefix but is busy loses exactly when waiting there takes longer
//! than computing anew.

use std::{collections::HashMap, fmt::Write as _, sync::Arc, time::Instant};

use bora_common::{
    blocks::{BLOCK_TOKENS, BlockHash},
    cost::GroupLoad,
};

use rand::{Rng as _, rngs::StdRng};

use super::{
    Slot,
    admission::Class,
    index::milestones,
    load_tracker::Booking,
    rebalance::{GroupShare, Typical, migration_target},
};
use crate::fleet::view::{Fleet, Group, ModelGroups};

/// Scores closer than this share of the best one are equal.
const TIE: f64 = 1e-3;
/// Candidates that an explanation names.
const MAX_NAMED: usize = 16;

/// Why no group was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoGroup {
    /// None is ready.
    #[error("no group of this model takes requests now")]
    NoneReady,
    /// The ready ones were all tried, or are too small for the prompt.
    #[error("no other group of this model can take the request")]
    NoneLeft,
    /// The best one can't start it now.
    #[error("every group of this model that could take the request is busy")]
    NoRoom,
    /// Too many wait for room already.
    #[error("too many requests wait for a group of this model")]
    QueueFull,
    /// It made room for another request while it waited.
    #[error("the request made room for another one while it waited for a group")]
    Displaced,
    /// It waited for room until its time was over.
    #[error("no group of this model had room in time")]
    WaitedTooLong,
}

/// What is to be placed.
pub struct PlacementRequest<'a> {
    /// The chain of its full blocks.
    pub hashes: &'a [BlockHash],
    /// Its length in tokens, resumed ones included.
    pub tokens: usize,
    /// The conversation that the client says it belongs to.
    pub session: Option<u64>,
    /// Groups that failed it already.
    pub avoid: &'a [Slot],
    /// Fingerprint of the weights that generated its tokens so far: only the same ones can continue with it.
    pub weights: Option<&'a str>,
    /// To be placed only where it can start now. None: at once, as a stream that lost its group.
    pub class: Option<Class>,
    /// Whether to write down the reasons.
    pub explain: bool,
    /// The time (simulations have their own).
    pub now: Instant,
}

/// A choice, already booked.
pub struct Placement {
    /// Where it goes.
    pub group: Arc<Group>,
    /// Its load on that group, until dropped.
    pub booking: Booking,
    /// What decided.
    pub reason: Reason,
    /// Seconds until its first token, as the cost model sees them now.
    pub predicted_seconds: f64,
    /// The candidates' scores in words, if asked for.
    pub explanation: Option<String>,
}

/// What placements have in common, one after the other.
pub struct PlacerState {
    /// Samples one of several equal groups, and pauses.
    pub random: StdRng,
    /// How long prompts of each model take.
    typical: HashMap<String, Typical>,
}

impl PlacerState {
    /// Nothing was placed yet.
    pub fn new(random: StdRng) -> Self {
        Self { random, typical: HashMap::new() }
    }
}

/// What decided a placement, for counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Only one group could take it.
    Only,
    /// Of several groups, it went to one that holds as much of its prefix as any other, and something.
    Prefix,
    /// Another group holds more of its prefix, but was too busy.
    Load,
    /// No group holds anything of it.
    New,
}

impl Reason {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 4] = [Self::Only, Self::Prefix, Self::Load, Self::New];

    /// Its name on labels.
    pub fn name(self) -> &'static str {
        match self {
            Reason::Only => "only",
            Reason::Prefix => "prefix",
            Reason::Load => "load",
            Reason::New => "new",
        }
    }

    fn of(held: &[u32], chosen: usize) -> Self {
        let most = held.iter().copied().max().unwrap_or(0);
        match held {
            [_] => Reason::Only,
            _ if most == 0 => Reason::New,
            _ if held.get(chosen).is_some_and(|own| *own < most) => Reason::Load,
            _ => Reason::Prefix,
        }
    }
}

/// Chooses a group and books the request on it, in one step that no other choice can come between.
pub fn place(fleet: &Fleet, model: &ModelGroups, wanted: &PlacementRequest<'_>) -> Result<Placement, NoGroup> {
    let ready: Vec<&Arc<Group>> = model.groups.iter().filter(|group| group.is_ready()).collect();
    if ready.is_empty() {
        return Err(NoGroup::NoneReady);
    }
    let fits = |group: &&Arc<Group>| {
        wanted.tokens < group.record.max_model_len as usize
            && !wanted.avoid.contains(&group.link.slot)
            && wanted.weights.is_none_or(|weights| *weights == *group.link.weights)
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

    // The long walk before the lock, what other placements may have changed since behind it.
    let held = fleet.index.held(wanted.hashes, &slots);
    let mut placing = fleet.placing.lock();
    let PlacerState { random, typical } = &mut *placing;
    let typical = typical.entry(model.name.clone()).or_default();
    let matched: Vec<u32> =
        slots.iter().zip(held).map(|(slot, held)| fleet.index.with_expected(wanted.hashes, *slot, held)).collect();
    let affine = wanted.session.and_then(|session| fleet.sessions.affine_group(session));
    let scores: Vec<f64> = candidates
        .iter()
        .zip(&matched)
        .map(|(group, blocks)| {
            let held = *blocks as usize * BLOCK_TOKENS;
            let load = GroupLoad {
                uncached_share: 1.0 - held.min(wanted.tokens) as f64 / wanted.tokens.max(1) as f64,
                is_affine: affine == Some((group.link.slot, group.link.epoch)),
                ..group.load(wanted.now)
            };
            group.cost.placement_seconds(wanted.tokens as u64, held as u64, load)
        })
        .collect();
    let is_affine = |at: usize| affine == Some((candidates[at].link.slot, candidates[at].link.epoch));
    let soonest = pick(&scores, is_affine, random);
    // of this prompt alone: the score also has what others would wait
    let first_token_seconds = |at: usize| {
        let held = matched[at] as usize * BLOCK_TOKENS;
        let load = candidates[at].load(wanted.now);
        candidates[at].cost.first_token_seconds(wanted.tokens as u64, held as u64, load)
    };
    let soonest_seconds = first_token_seconds(soonest);
    let migration =
        if typical.is_quick(soonest_seconds) { None } else { migration(&candidates, &matched, soonest, wanted) };
    let chosen = migration.unwrap_or(soonest);
    let group = Arc::clone(candidates[chosen]);
    // The score has the wait in it: where the best group has no room, waiting for it beats the others.
    if wanted.class.is_some_and(|class| !group.has_room(class)) {
        return Err(NoGroup::NoRoom);
    }
    if let Some(session) = wanted.session {
        fleet.sessions.settle(session, (group.link.slot, group.link.epoch));
    }
    let held_blocks = (matched[chosen] as usize).min(wanted.hashes.len());
    let computed = wanted.tokens.saturating_sub(held_blocks * BLOCK_TOKENS).max(1);
    let reason = Reason::of(&matched, chosen);
    typical.add(soonest_seconds);
    let predicted_seconds = first_token_seconds(chosen);
    let explanation = wanted.explain.then(|| {
        let mut text = explain(&candidates, &matched, &scores, chosen, wanted.now);
        if migration.is_some() {
            let _ = write!(text, "; leaves {}, which was given more than the others", candidates[soonest].record.group);
        }
        text
    });
    let seconds = group.cost.prefill_seconds((wanted.tokens - computed.min(wanted.tokens)) as u64, computed as u64);
    let booking = Booking::new(
        Arc::clone(&group.link),
        Arc::clone(&fleet.index),
        computed as u64,
        seconds,
        milestones(wanted.hashes, held_blocks),
        wanted.now,
    );
    group.link.breaker.chosen();
    Ok(Placement { group, booking, reason, predicted_seconds, explanation })
}

/// Where the prompt goes in place of the group that would respond soonest and holds most of it, if it should move.
/// Streams that continue elsewhere are in a hurry, and do not.
fn migration(
    candidates: &[&Arc<Group>],
    matched: &[u32],
    soonest: usize,
    wanted: &PlacementRequest<'_>,
) -> Option<usize> {
    let class = wanted.class?;
    let held = |at: usize| (matched[at] as usize * BLOCK_TOKENS).min(wanted.tokens.saturating_sub(1));
    if held(soonest) * 2 < wanted.tokens {
        return None;
    }
    let level = |(at, group): (usize, &&Arc<Group>)| {
        let given = group.link.load_tracker.given(wanted.now);
        GroupShare {
            given: given.seconds,
            pace: given.pace,
            cost: group.cost.prefill_seconds(held(at) as u64, (wanted.tokens - held(at)) as u64),
            is_idle: group.link.load_tracker.busy().queued_tokens == 0 && group.has_room(class),
        }
    };
    let levels: Vec<GroupShare> = candidates.iter().enumerate().map(level).collect();
    migration_target(soonest, &levels)
}

/// The least score; of equals the conversation's home, or any of them at random. `scores` is not empty.
fn pick(scores: &[f64], is_affine: impl Fn(usize) -> bool, random: &mut StdRng) -> usize {
    let least = scores.iter().copied().fold(f64::INFINITY, f64::min);
    let limit = least + least.abs() * TIE + 1e-9;
    let equals = || scores.iter().enumerate().filter(|(_, score)| **score <= limit).map(|(at, _)| at);
    if let Some(affine) = equals().find(|at| is_affine(*at)) {
        return affine;
    }
    let number = equals().count();
    if number <= 1 {
        return equals().next().unwrap_or(0);
    }
    equals().nth(random.random_range(0..number)).unwrap_or(0)
}

/// Which candidates an explanation names: the chosen one, and behind it those of the best scores, the best one first.
fn named(scores: &[f64], chosen: usize) -> Vec<usize> {
    let mut others: Vec<usize> = (0..scores.len()).filter(|at| *at != chosen).collect();
    others.sort_by(|one, other| scores[*one].total_cmp(&scores[*other]));
    std::iter::once(chosen).chain(others).take(MAX_NAMED).collect()
}

fn explain(candidates: &[&Arc<Group>], matched: &[u32], scores: &[f64], chosen: usize, now: Instant) -> String {
    let mut text = format!("chose={}", candidates[chosen].record.group);
    for at in named(scores, chosen) {
        let group = candidates[at];
        let busy = group.link.load_tracker.busy();
        let _ = write!(
            text,
            "; {}: {:.6}s held_blocks={} queued_tokens={} sequences={} utilization={:.2}",
            group.record.group,
            scores[at],
            matched[at],
            busy.queued_tokens,
            busy.sequences,
            group.link.load_tracker.utilization(now)
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;

    use super::*;

    #[test]
    fn what_decided_is_told_by_what_the_groups_hold() {
        assert_eq!(Reason::of(&[5], 0), Reason::Only);
        assert_eq!(Reason::of(&[0, 0], 1), Reason::New);
        assert_eq!(Reason::of(&[3, 0], 0), Reason::Prefix);
        assert_eq!(Reason::of(&[3, 0], 1), Reason::Load);
        assert!(Reason::ALL.iter().enumerate().all(|(number, reason)| *reason as usize == number));
    }

    #[test]
    fn an_explanation_names_the_chosen_one_and_then_the_best_of_the_others() {
        // twenty groups, the best one last; one that is worse than most was chosen, for its level
        let scores: Vec<f64> = (0..20).map(|number| f64::from(20 - number)).collect();
        let best_others = (5..20).rev();
        assert_eq!(named(&scores, 2), [2].into_iter().chain(best_others).collect::<Vec<usize>>());
        assert_eq!(named(&scores, 19), (4..20).rev().collect::<Vec<usize>>());
        assert_eq!(named(&[3.0, 1.0, 2.0], 0), [0, 1, 2]);
        assert_eq!(named(&[1.0], 0), [0]);
    }

    #[test]
    fn equals_are_chosen_at_random_and_only_they() {
        let mut seen = [0; 4];
        let mut random = StdRng::seed_from_u64(1);
        for _ in 0..2000 {
            seen[pick(&[1.0, 0.5, 0.500_01, 2.0], |at| at == 3, &mut random)] += 1;
        }
        assert!((0..50).all(|_| pick(&[1.0, 0.5, 0.500_01, 2.0], |at| at == 2, &mut random) == 2), "home");
        assert_eq!((seen[0], seen[3]), (0, 0));
        assert!(seen[1] > 800 && seen[2] > 800, "{seen:?}");
    }
}
