use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

fn chain(family: u128, blocks: usize) -> Vec<BlockHash> {
    (0..blocks as u128).map(|i| BlockHash(family << 32 | i)).collect()
}

fn fill(cache: &mut KvCache, lease: &mut Lease, hashes: &[BlockHash]) {
    cache.grow(lease, hashes.len());
    for (block, hash) in lease.blocks.iter().zip(hashes) {
        cache.publish(*block, *hash);
    }
}

#[test]
fn a_prefix_is_found_shared_and_given_up_end_first() {
    let mut cache = KvCache::new(4);
    let hashes = chain(1, 3);
    let mut first = cache.admit(&hashes, 4).unwrap();
    assert!(first.blocks.is_empty());
    fill(&mut cache, &mut first, &hashes);
    assert_eq!(cache.find(&hashes), 3);

    assert!(cache.admit(&hashes, 5).is_none(), "more than there are");
    assert!(cache.admit(&hashes, 4).is_none(), "the first still has the fourth block reserved");
    let second = cache.admit(&hashes, 3).unwrap();
    assert_eq!(second.blocks, first.blocks, "shared");
    cache.release(first);
    assert_eq!(cache.usage(), Usage { total: 4, used: 3, cached: 0, reserved: 0 });
    cache.release(second);
    assert_eq!(cache.usage(), Usage { total: 4, used: 0, cached: 3, reserved: 0 });

    let mut other = cache.admit(&chain(2, 2), 2).unwrap();
    cache.grow(&mut other, 2);
    assert_eq!(cache.find(&hashes), 2, "the end of the prefix went first");
    assert_eq!(cache.drain_changes().evicted, [], "stored and evicted in one delta: not mentioned");
    cache.check();
}

#[test]
fn blocks_that_hold_the_same_are_named_once() {
    let mut cache = KvCache::new(4);
    let hashes = chain(1, 2);
    let mut first = cache.admit(&[], 2).unwrap();
    let mut second = cache.admit(&[], 2).unwrap();
    fill(&mut cache, &mut first, &hashes);
    fill(&mut cache, &mut second, &hashes);
    assert_eq!(cache.drain_changes().stored.len(), 2);
    cache.release(second);
    assert_eq!(cache.usage().cached, 0, "the unnamed copies are free at once");
    cache.release(first);
    assert_eq!(cache.usage().cached, 2);
    assert_eq!(cache.flush(), 2);
    assert_eq!(cache.drain_changes().evicted.len(), 2);
    assert_eq!(cache.usage(), Usage { total: 4, used: 0, cached: 0, reserved: 0 });
}

#[test]
fn forgotten_blocks_are_not_found_but_stay_with_their_users() {
    let mut cache = KvCache::new(2);
    let hashes = chain(1, 2);
    let mut lease = cache.admit(&hashes, 2).unwrap();
    fill(&mut cache, &mut lease, &hashes);
    cache.forget(lease.blocks[0]);
    assert_eq!(cache.find(&hashes), 0);
    assert_eq!(cache.usage().used, 2);
    cache.release(lease);
    assert_eq!(cache.usage().cached, 1);
    cache.check();
}

#[derive(Clone, Debug)]
enum Action {
    Admit { family: u8, length: usize },
    Grow { lease: usize, by: usize },
    Release { lease: usize },
    Forget { lease: usize },
    Flush,
    Drain,
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let action = prop_oneof![
        4 => (0u8..4, 1usize..9).prop_map(|(family, length)| Action::Admit { family, length }),
        6 => (any::<usize>(), 1usize..4).prop_map(|(lease, by)| Action::Grow { lease, by }),
        3 => any::<usize>().prop_map(|lease| Action::Release { lease }),
        1 => any::<usize>().prop_map(|lease| Action::Forget { lease }),
        1 => Just(Action::Flush),
        2 => Just(Action::Drain),
    ];
    proptest::collection::vec(action, 1..120)
}

proptest! {
    #[test]
    fn no_block_is_lost_or_given_twice(blocks in 1u32..24, actions in actions()) {
        let mut cache = KvCache::new(blocks);
        let mut running: Vec<(Lease, Vec<BlockHash>)> = Vec::new();
        let mut watched: HashSet<BlockHash> = HashSet::new();
        for action in actions {
            match action {
                Action::Admit { family, length } => {
                    let hashes = chain(u128::from(family), length);
                    // as the scheduler does: the last block is always computed
                    if let Some(lease) = cache.admit(&hashes[..length - 1], length) {
                        prop_assert_eq!(lease.blocks.len() + lease.reserved, length);
                        running.push((lease, hashes));
                    }
                }
                Action::Grow { lease, by } if !running.is_empty() => {
                    let index = lease % running.len();
                    let (lease, hashes) = &mut running[index];
                    let wanted = (lease.blocks.len() + by).min(hashes.len());
                    cache.grow(lease, wanted);
                    prop_assert_eq!(lease.blocks.len(), wanted, "an admitted sequence always gets its blocks");
                    for (block, hash) in lease.blocks.iter().zip(hashes.iter()) {
                        cache.publish(*block, *hash);
                    }
                }
                Action::Release { lease } if !running.is_empty() => {
                    let (lease, _) = running.swap_remove(lease % running.len());
                    cache.release(lease);
                }
                Action::Forget { lease } if !running.is_empty() => {
                    let index = lease % running.len();
                    if let Some(block) = running[index].0.blocks.last() {
                        cache.forget(*block);
                    }
                }
                Action::Flush => {
                    cache.flush();
                }
                Action::Drain => {
                    let delta = cache.drain_changes();
                    for hash in delta.evicted {
                        prop_assert!(watched.remove(&hash), "evicted before it was stored");
                    }
                    for hash in delta.stored {
                        prop_assert!(watched.insert(hash), "stored twice");
                    }
                    let held: HashSet<_> = cache.snapshot().into_iter().collect();
                    prop_assert_eq!(&watched, &held, "a watcher knows exactly what is there");
                }
                Action::Grow { .. } | Action::Release { .. } | Action::Forget { .. } => {}
            }
            cache.check();
            let used: HashSet<BlockId> = running.iter().flat_map(|(lease, _)| lease.blocks.clone()).collect();
            let usage = cache.usage();
            prop_assert_eq!(usage.used, used.len(), "used = referenced by a running sequence");
            prop_assert_eq!(usage.reserved, running.iter().map(|(lease, _)| lease.reserved).sum::<usize>());
        }
        for (lease, _) in running {
            cache.release(lease);
        }
        prop_assert_eq!(cache.usage().used, 0);
    }
}
