//! Where requests go: conversations with a name, and groups that have just come. No group is a process here.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use bora_common::blocks::{BlockHash, hash_blocks};
use bora_proto::v1::Load;
use bora_router::{
    RouterOptions,
    fleet::view::Fleet,
    place::{
        admission::Class,
        choose::{Placement, PlacementRequest, place},
    },
};

use crate::{
    support::keys,
    virtual_time::{MAX_SEQUENCES, MODEL, record},
};

fn fleet(groups: usize, now: Instant) -> Arc<Fleet> {
    let fleet = Fleet::seeded(RouterOptions::default(), &keys(), 1);
    for number in 0..groups {
        fleet.put_unwatched(record(&format!("g{number}"), 1), now).expect("an endpoint");
    }
    fleet
}

/// A prompt that nothing is known of.
fn new_prompt(number: u32) -> Vec<BlockHash> {
    let ids: Vec<u32> = (0..64 * 20).map(|id| number * 10_000 + id).collect();
    hash_blocks(&keys(), b"", &[], &ids)
}

fn send(fleet: &Fleet, hashes: &[BlockHash], session: Option<u64>, now: Instant) -> Placement {
    let view = fleet.view();
    let wanted = PlacementRequest {
        hashes,
        tokens: hashes.len() * 64 + 9,
        session,
        avoid: &[],
        weights: None,
        class: Some(Class::Interactive),
        explain: false,
        now,
    };
    place(fleet, view.model(MODEL).expect("the model"), &wanted).expect("room")
}

fn name(placement: &Placement) -> String {
    placement.group.record.group.clone()
}

#[tokio::test]
async fn a_named_conversation_goes_home_as_long_as_home_is_there() {
    let now = Instant::now();
    let fleet = fleet(8, now);
    let affine = name(&send(&fleet, &new_prompt(0), Some(7), now));
    // its history is new each time: nothing but the name says where it belongs
    for turn in 1..20u32 {
        let now = now + Duration::from_secs(120) * turn;
        assert_eq!(name(&send(&fleet, &new_prompt(turn), Some(7), now)), affine, "turn {turn}");
    }
    let elsewhere: HashSet<String> =
        (20..60u32).map(|number| name(&send(&fleet, &new_prompt(number), None, now))).collect();
    assert!(elsewhere.len() > 4, "those without a name are spread: {elsewhere:?}");

    let link = fleet.view().groups().find(|group| group.record.group == affine).map(|group| Arc::clone(&group.link));
    fleet.remove(&link.expect("its home"));
    let now = now + Duration::from_secs(10_000);
    fleet.put_unwatched(record(&affine, 2), now).expect("an endpoint");
    let again: HashSet<String> =
        (100..140u32).map(|number| name(&send(&fleet, &new_prompt(number), Some(u64::from(number)), now))).collect();
    assert!(again.len() > 4, "{again:?}");
}

#[tokio::test]
async fn one_name_for_everything_does_not_heap_it_on_one_group() {
    let now = Instant::now();
    let fleet = fleet(8, now);
    let running: Vec<Placement> = (0..16u32).map(|number| send(&fleet, &new_prompt(number), Some(7), now)).collect();
    let most = fleet.view().groups().map(|group| group.link.load_tracker.busy().sequences).max();
    assert!(most <= Some(4), "{most:?} of {} in one of eight groups", running.len());
}

/// A group reports its load fifty milliseconds apart: until then it looks as full as it was before the responses ended.
#[tokio::test]
async fn a_turn_that_follows_at_once_goes_where_the_conversation_is() {
    let now = Instant::now();
    let fleet = fleet(2, now);
    let conversations: Vec<Vec<BlockHash>> = (0..2 * MAX_SEQUENCES).map(new_prompt).collect();
    let mut running: Vec<Placement> = conversations.iter().map(|hashes| send(&fleet, hashes, None, now)).collect();
    let affine_groups: Vec<String> = running.iter().map(name).collect();
    for group in fleet.view().groups() {
        let here = || conversations.iter().zip(&affine_groups).filter(|(_, affine)| **affine == group.record.group);
        let stored: Vec<u8> = here().flat_map(|(hashes, _)| hashes).flat_map(|hash| hash.to_bytes()).collect();
        fleet.index.apply(group.link.slot, &stored, &[]);
        group.link.load_tracker.report(Load { running: here().count() as u32, ..Load::default() }, now);
        assert!(!group.has_room(Class::Interactive), "{} is full", group.record.group);
    }
    running.iter_mut().for_each(|placement| placement.booking.received_token(now));
    drop(running);
    for (hashes, affine) in conversations.iter().zip(&affine_groups) {
        assert_eq!(&name(&send(&fleet, hashes, None, now)), affine);
    }
}

/// Siblings are placed by them at once; what the group has not reported two seconds after the first token, it did not keep.
#[tokio::test]
async fn expected_blocks_that_the_group_does_not_confirm_in_time_are_dropped() {
    let began = Instant::now();
    let after = |milliseconds| began + Duration::from_millis(milliseconds);
    for confirms in [false, true] {
        let fleet = fleet(1, began);
        let prompt = new_prompt(1);
        let mut placement = send(&fleet, &prompt, None, began);
        let slot = placement.group.link.slot;
        let known = || fleet.index.with_expected(&prompt, slot, fleet.index.held(&prompt, &[slot])[0]);
        assert_eq!(known(), 16, "two pieces of eight blocks");
        placement.booking.received_token(after(60_000));
        if confirms {
            let stored: Vec<u8> = prompt.iter().flat_map(|hash| hash.to_bytes()).collect();
            fleet.index.apply(slot, &stored, &[]);
        }
        let all = prompt.len() as u32;
        for in_time in [60_010, 61_990] {
            placement.booking.received_token(after(in_time));
            assert_eq!(known(), if confirms { all } else { 16 });
            assert_eq!(fleet.index.expected(), 2);
        }
        placement.booking.received_token(after(62_010));
        assert_eq!(fleet.index.expected(), 0, "one way or the other");
        assert_eq!(known(), if confirms { all } else { 0 });
        drop(placement);
        assert_eq!(known(), if confirms { all } else { 0 });
    }
}

/// The other groups have been busy for a while, each with conversations of its own.
#[tokio::test]
async fn a_group_that_joins_gets_its_share_of_new_conversations_and_not_all() {
    let mut now = Instant::now();
    let fleet = fleet(4, now);
    let mut number = 0;
    let mut send_for_a_minute = |now: &mut Instant, to: &str| {
        let mut there = 0;
        for _ in 0..120 {
            number += 1;
            *now += Duration::from_millis(500);
            there += usize::from(name(&send(&fleet, &new_prompt(number), None, *now)) == to);
        }
        there
    };
    send_for_a_minute(&mut now, "");
    send_for_a_minute(&mut now, "");
    fleet.put_unwatched(record("new", 1), now).expect("an endpoint");
    let there = send_for_a_minute(&mut now, "new");
    assert!((12..=48).contains(&there), "{there} of 120, where 24 are a fifth");
}
