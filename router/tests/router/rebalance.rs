//! A conversation leaves a group that was given more than the others, through the router's own placement, in virtual
//! time: nothing here waits, and nothing is drawn outside of the seed.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bora_common::blocks::hash_blocks;
use bora_proto::v1::Load;
use bora_router::{
    RouterOptions,
    fleet::view::{Fleet, Link},
    place::{
        admission::Class,
        choose::{Placement, PlacementRequest, Reason, place},
    },
};

use crate::{
    support::keys,
    virtual_time::{MODEL, record},
};

struct World {
    fleet: Arc<Fleet>,
    groups: Vec<Arc<Link>>,
    now: Instant,
}

impl World {
    /// Four groups: minutes ago the first computed prompts for 30 seconds, the others for 15.
    fn uneven() -> Self {
        let began = Instant::now();
        let fleet = Fleet::seeded(RouterOptions::default(), &keys(), 1);
        let names = ["g0", "g1", "g2", "g3"];
        let groups: Vec<Arc<Link>> =
            names.iter().map(|name| fleet.put_unwatched(record(name, 1), began).expect("an endpoint")).collect();
        for (number, link) in groups.iter().enumerate() {
            link.load_tracker.report(Load::default(), began);
            let prefill_seconds = if number == 0 { 30.0 } else { 15.0 };
            link.load_tracker.report(Load { prefill_seconds, ..Load::default() }, began);
        }
        Self { fleet, groups, now: began + Duration::from_secs(200) }
    }

    /// The next turn of a conversation of so many blocks, all of which that group holds.
    fn turn(&self, conversation: u32, blocks: u32, holds: usize, class: Option<Class>) -> Placement {
        let ids: Vec<u32> = (0..64 * blocks).map(|id| conversation * 1_000_000 + id).collect();
        let hashes = hash_blocks(&keys(), b"", &[], &ids);
        let stored: Vec<u8> = hashes.iter().flat_map(|hash| hash.to_bytes()).collect();
        self.fleet.index.apply(self.groups[holds].slot, &stored, &[]);
        let wanted = PlacementRequest {
            hashes: &hashes,
            tokens: ids.len() + 30,
            session: None,
            avoid: &[],
            weights: None,
            class,
            explain: true,
            now: self.now,
        };
        let view = self.fleet.view();
        let placement = place(&self.fleet, view.model(MODEL).expect("the model"), &wanted);
        placement.unwrap_or_else(|error| panic!("{error}"))
    }
}

const URGENT: Option<Class> = Some(Class::Interactive);

#[tokio::test]
async fn a_short_conversation_leaves_the_group_that_was_given_too_much_and_says_why() {
    let world = World::uneven();
    let moved = world.turn(1, 100, 0, URGENT);
    assert_ne!(moved.group.record.group, "g0");
    assert_eq!(moved.reason, Reason::Load);
    let explanation = moved.explanation.expect("was asked for");
    assert!(explanation.ends_with("; leaves g0, which was given more than the others"), "{explanation}");
    // where it went it stays
    let there = world.groups.iter().position(|link| link.group == moved.group.record.group).expect("one of them");
    drop(moved.booking);
    assert_eq!(world.turn(1, 100, there, URGENT).reason, Reason::Prefix);
}

#[tokio::test]
async fn what_would_cost_more_than_it_levels_stays_and_so_does_what_is_in_a_hurry() {
    let world = World::uneven();
    let stays = |placement: &Placement| placement.group.record.group == "g0" && placement.reason == Reason::Prefix;
    let long = world.turn(2, 1_000, 0, URGENT);
    assert!(stays(&long), "five seconds, and the others lack two: {:?}", long.explanation);
    drop(long);
    assert!(stays(&world.turn(3, 100, 0, None)), "a stream that goes on");
    let busy: Vec<Placement> = (1..4).map(|group| world.turn(10 + group as u32, 100, group, URGENT)).collect();
    assert!(busy.iter().all(|placement| placement.reason == Reason::Prefix), "those have no surplus");
    assert!(stays(&world.turn(4, 100, 0, URGENT)), "the others compute something");
}

#[tokio::test]
async fn moves_end_long_before_the_conversations_of_the_group_do() {
    let world = World::uneven();
    let moved = (0..90).filter(|number| world.turn(100 + number, 100, 0, URGENT).reason == Reason::Load).count();
    // of a third of a second each: they are also work that comes to the others now, and half of the surplus is left
    assert!((10..60).contains(&moved), "{moved}");
    assert_eq!(world.turn(999, 100, 0, URGENT).group.record.group, "g0");
}

#[tokio::test]
async fn what_new_work_will_level_is_left_to_it() {
    let mut world = World::uneven();
    // the same, a moment after it was computed: more of it will come
    world.now -= Duration::from_secs(198);
    assert_eq!(world.turn(5, 100, 0, URGENT).group.record.group, "g0");
}

#[tokio::test]
async fn a_turn_that_would_be_quick_stays() {
    let world = World::uneven();
    // ten times as long as the turn below: what is typical here
    for number in 0..200 {
        world.turn(1_000 + number, 1_000, 1 + number as usize % 3, URGENT);
    }
    assert_eq!(world.turn(6, 100, 0, URGENT).group.record.group, "g0");
    // and with nothing known of others it leaves, as above
    assert_ne!(World::uneven().turn(6, 100, 0, URGENT).group.record.group, "g0");
}
