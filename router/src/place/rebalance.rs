//! When a conversation leaves a group that holds it, though it would be served soonest there: where a group was given
//! more than the others, its conversations turned out to be the long ones, and new ones can't make up for it.
//!
//! Computing a conversation anew takes a hundred times as long as its next turn, so few may move, and only where it
//! helps: away from a group whose surplus the others will not reach soon by what comes to them anyhow, for less than
//! that surplus, and to a group that computes nothing now and lacks as much as the move costs it. So a move brings
//! both nearer to the mean, and moves end by themselves, however many routers decide on them: all go by what groups report.
//! A turn that would be served quickly stays: it would wait a hundred times as long, where one that waits anyhow, or is long
//! itself, is hardly slower for the move ([`Typical`]).

/// A surplus that the others reach within these seconds by what comes to them anyhow is left to that.
const REACHED_SECONDS: f64 = 30.0;
/// A smaller share of the mean is no surplus.
const MIN_IMBALANCE: f64 = 0.03;
/// Where groups were given less on average (a fiftieth of the five minutes that are looked at), nobody gains by a move.
const MIN_GIVEN: f64 = 6.0;

/// A turn is quick below this share of what is typical. Simulated: at 1 the busiest of 16 groups has 11 % more than the mean,
/// without any such limit 9 %.
const QUICK: f64 = 0.8;
/// How far each turn moves what is typical.
const STEP: f64 = 0.02;

/// The running median of the seconds until the first token, of one model's prompts as they would be served soonest. A
/// step up for each that is above it and down for each below ("frugal streaming": Ma, Muthukrishnan and Sandler, 2013).
#[derive(Clone, Copy, Debug, Default)]
pub struct Typical(Option<f64>);

impl Typical {
    /// Whether a prompt that takes so long is one of the quick ones.
    pub fn is_quick(self, seconds: f64) -> bool {
        self.0.is_some_and(|median| seconds < QUICK * median)
    }

    /// One more that takes so long.
    pub fn add(&mut self, seconds: f64) {
        let median = self.0.unwrap_or(seconds);
        self.0 = Some(if seconds > median { median * (1.0 + STEP) } else { median / (1.0 + STEP) });
    }
}

/// One group, for one prompt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupShare {
    /// Seconds of prompts that it was given in the last minutes.
    pub given: f64,
    /// Seconds of prompts a second that it is given now.
    pub pace: f64,
    /// Seconds to compute this prompt there.
    pub cost: f64,
    /// Whether it could begin at once: it computes nothing, and has room.
    pub is_idle: bool,
}

/// The group that takes the conversation from `home`, if one should: of those that it levels, the one that was given least.
pub fn migration_target(affine: usize, groups: &[GroupShare]) -> Option<usize> {
    let count = groups.len().max(1) as f64;
    let mean = groups.iter().map(|group| group.given).sum::<f64>() / count;
    let pace = groups.iter().map(|group| group.pace).sum::<f64>() / count;
    let imbalance = groups.get(affine)?.given - mean;
    if mean < MIN_GIVEN || imbalance < pace * REACHED_SECONDS || imbalance < mean * MIN_IMBALANCE {
        return None;
    }
    let takes = |(at, group): &(usize, &GroupShare)| {
        *at != affine && group.is_idle && group.cost <= imbalance.min(mean - group.given)
    };
    let least =
        groups.iter().enumerate().filter(takes).min_by(|(_, one), (_, other)| one.given.total_cmp(&other.given));
    least.map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sixteen groups, all given as much, of which nothing comes now; a move costs half a second.
    fn groups() -> Vec<GroupShare> {
        vec![GroupShare { given: 16.0, pace: 0.0, cost: 0.5, is_idle: true }; 16]
    }

    /// The first was given two seconds more than the mean, the last two less.
    fn uneven() -> Vec<GroupShare> {
        let mut groups = groups();
        groups[0] = GroupShare { given: 18.0, cost: 0.03, ..groups[0] };
        groups[15].given = 14.0;
        groups
    }

    #[test]
    fn nothing_moves_where_all_were_given_as_much_or_there_is_nowhere_to_go() {
        assert_eq!(migration_target(0, &groups()), None);
        assert_eq!(migration_target(0, &groups()[..1]), None);
        assert_eq!(migration_target(0, &[]), None);
        let mut nearly = groups();
        nearly[0].given = 16.4;
        nearly[15].given = 15.0;
        assert_eq!(migration_target(0, &nearly), None, "a surplus of less than three in a hundred");
    }

    #[test]
    fn a_fleet_that_does_next_to_nothing_is_left_alone() {
        let with_idle = |idle| {
            let mut groups = uneven();
            groups.iter_mut().for_each(|group| group.given -= idle);
            migration_target(0, &groups)
        };
        assert_eq!(with_idle(9.0), Some(15));
        assert_eq!(with_idle(11.0), None);
    }

    #[test]
    fn a_conversation_leaves_the_group_with_the_surplus_for_the_one_that_was_given_least() {
        let mut groups = uneven();
        groups[7].given = 15.0;
        groups[0].given = 19.0;
        assert_eq!(migration_target(0, &groups), Some(15));
        assert_eq!(migration_target(3, &groups), None, "that one has no surplus");
        groups[15].is_idle = false;
        assert_eq!(migration_target(0, &groups), Some(7));
        groups[7].is_idle = false;
        assert_eq!(migration_target(0, &groups), None, "nobody lacks as much as it costs");
    }

    #[test]
    fn a_move_costs_neither_more_than_the_surplus_nor_more_than_what_the_other_lacks() {
        let with_cost = |cost| {
            let mut groups = uneven();
            groups.iter_mut().skip(1).for_each(|group| group.cost = cost);
            migration_target(0, &groups)
        };
        assert_eq!(with_cost(1.9), Some(15));
        assert_eq!(with_cost(2.1), None);
        let mut groups = uneven();
        groups[15].given = 15.8;
        assert_eq!(migration_target(0, &groups), None, "it lacks 0.3 seconds and a move costs 0.5");
    }

    #[test]
    fn what_is_quick_follows_what_is_typical() {
        let mut typical = Typical::default();
        assert!(!typical.is_quick(0.001), "nothing is known");
        // half of them between 20 and 30 ms, a third at 40, the others at a second
        let turn = |number: usize| [0.02, 0.022, 0.03, 0.04, 0.04, 1.0][number % 6];
        (0..600).for_each(|number| typical.add(turn(number)));
        let quick = (600..6_000).filter(|number| {
            typical.add(turn(*number));
            typical.is_quick(turn(*number))
        });
        assert_eq!(quick.count(), 1_800, "those at 20 and 22 ms; not at 30, which is near the median");
        (0..400).for_each(|_| typical.add(2.0));
        assert!(typical.is_quick(1.0), "what was slow is quick where all is slower");
    }

    #[test]
    fn a_surplus_that_new_work_will_hide_is_left_to_it() {
        let with_pace = |pace| {
            let mut groups = uneven();
            groups.iter_mut().for_each(|group| group.pace = pace);
            migration_target(0, &groups)
        };
        assert_eq!(with_pace(0.05), Some(15), "1.5 seconds in the next 30");
        assert_eq!(with_pace(0.1), None, "3 seconds in the next 30");
    }

    /// Turn after turn, whoever decides: it ends before the conversations of the group do.
    #[test]
    fn moves_end_by_themselves() {
        let mut groups = uneven();
        groups[0].given = 20.0;
        groups[1].given = 13.5;
        let mut moves = 0;
        while let Some(to) = migration_target(0, &groups) {
            groups[to].given += groups[to].cost;
            moves += 1;
            assert!(moves < 20, "no end");
        }
        assert!((5..16).contains(&moves), "{moves}");
        let mean = groups.iter().map(|group| group.given).sum::<f64>() / 16.0;
        assert!(groups[1..].iter().all(|group| group.given <= mean + 0.5));
    }
}
