use std::collections::HashSet;

use bora_common::blocks::BlockChain;
use bora_common::secret::ClusterKeys;
use proptest::prelude::*;

use super::*;

fn chain(family: u32, blocks: usize) -> Vec<Arc<BlockContent>> {
    let ids: Vec<u32> = (0..64 * blocks as u32).map(|id| family << 24 | id).collect();
    let digests = BlockChain::new(&ClusterKeys::derive(&[1; 32]), b"", Vec::new()).extend(&ids);
    digests.into_iter().zip(ids.as_chunks().0).map(|(digest, ids)| BlockContent::new(digest, ids)).collect()
}

fn hashes_of(blocks: &[Arc<BlockContent>]) -> Vec<BlockHash> {
    blocks.iter().map(|block| block.hash()).collect()
}

/// Number of leading cached blocks.
fn found(cache: &KvCache, blocks: &[Arc<BlockContent>]) -> usize {
    cache.find(blocks).total
}

/// Total, used, cached and reserved blocks.
fn usage(cache: &KvCache) -> [usize; 4] {
    let usage = cache.usage();
    [usage.total, usage.used, usage.cached, usage.reserved]
}

fn fill(cache: &mut KvCache, lease: &mut Lease, hashes: &[Arc<BlockContent>]) {
    cache.grow(lease, hashes.len());
    for (block, hash) in lease.blocks.iter().zip(hashes) {
        cache.publish(*block, hash);
    }
}

#[test]
fn finds_shares_and_evicts_a_prefix_from_its_end() {
    let mut cache = KvCache::new(4, 0);
    let hashes = chain(1, 3);
    let mut first = cache.admit(&hashes, 4).unwrap();
    assert!(first.blocks.is_empty());
    fill(&mut cache, &mut first, &hashes);
    assert_eq!(found(&cache, &hashes), 3);

    assert!(cache.admit(&hashes, 5).is_none(), "more than there are");
    assert!(cache.admit(&hashes, 4).is_none(), "the first still has the fourth block reserved");
    let second = cache.admit(&hashes, 3).unwrap();
    assert_eq!(second.blocks, first.blocks, "shared");
    cache.release(first);
    assert_eq!(usage(&cache), [4, 3, 0, 0]);
    cache.release(second);
    assert_eq!(usage(&cache), [4, 0, 3, 0]);

    let mut other = cache.admit(&chain(2, 2), 2).unwrap();
    cache.grow(&mut other, 2);
    assert_eq!(found(&cache, &hashes), 2, "the end of the prefix went first");
    assert_eq!(cache.drain_changes().evicted, [], "stored and evicted in one delta: not mentioned");
    cache.check();
}

/// Blocks of the prompt are reported immediately, blocks of the output together when they are released.
#[test]
fn finds_generated_blocks_immediately_and_reports_them_on_release() {
    let mut cache = KvCache::new(8, 0);
    let hashes = chain(1, 4);
    let mut first = cache.admit(&hashes, 4).unwrap();
    fill(&mut cache, &mut first, &hashes[..1]);
    cache.grow(&mut first, 4);
    for (block, hash) in first.blocks.iter().zip(&hashes).skip(1) {
        cache.publish_generated(*block, hash);
        cache.check();
    }
    assert_eq!(cache.drain_changes().stored, hashes_of(&hashes[..1]));
    assert_eq!(cache.snapshot(), hashes_of(&hashes[..1]));
    let second = cache.admit(&hashes, 4).unwrap();
    assert_eq!(second.blocks, first.blocks, "another sequence finds all of them");
    cache.forget(first.blocks[3]);
    cache.release(second);
    assert_eq!(cache.drain_changes(), Delta { stored: hashes_of(&hashes[1..3]), evicted: vec![] });
    cache.release(first);
    assert!(cache.drain_changes().is_empty(), "reported once");
    assert_eq!(cache.snapshot().len(), 3);
    cache.check();
}

#[test]
fn names_equal_blocks_once() {
    let mut cache = KvCache::new(4, 0);
    let hashes = chain(1, 2);
    let mut first = cache.admit(&[], 2).unwrap();
    let mut second = cache.admit(&[], 2).unwrap();
    fill(&mut cache, &mut first, &hashes);
    fill(&mut cache, &mut second, &hashes);
    assert_eq!(cache.drain_changes().stored.len(), 2);
    cache.release(second);
    assert_eq!(cache.usage().cached, 0, "the unnamed copies are free immediately");
    cache.release(first);
    assert_eq!(cache.usage().cached, 2);
    assert_eq!(cache.flush(), 2);
    assert_eq!(cache.drain_changes().evicted.len(), 2);
    assert_eq!(usage(&cache), [4, 0, 0, 0]);
}

#[test]
fn keeps_forgotten_blocks_for_their_sequences_only() {
    let mut cache = KvCache::new(2, 0);
    let hashes = chain(1, 2);
    let mut lease = cache.admit(&hashes, 2).unwrap();
    fill(&mut cache, &mut lease, &hashes);
    cache.forget(lease.blocks[0]);
    assert_eq!(found(&cache, &hashes), 0);
    assert_eq!(cache.usage().used, 2);
    cache.release(lease);
    assert_eq!(cache.usage().cached, 1);
    cache.check();
}

/// The state that a forger of names would reach: a cached block with a given name and another content, on the device
/// and in host memory.
#[test]
fn misses_a_block_of_the_same_name_and_other_content() {
    let blocks = chain(1, 3);
    let other = *chain(2, 1)[0].token_ids();
    for forged in [blocks[1].forged(&other), blocks[1].behind_another_prefix()] {
        assert_eq!(forged.hash(), blocks[1].hash());
        let mut cache = KvCache::new(4, 4);
        let mut lease = cache.admit(&blocks, 3).unwrap();
        fill(&mut cache, &mut lease, &blocks);
        cache.release(lease);
        assert_eq!(cache.find(&blocks), Found { on_device: 3, total: 3, in_host: 0, mismatch: false });
        cache.forge(Arc::clone(&forged));
        let miss = Found { on_device: 1, total: 1, in_host: 0, mismatch: true };
        assert_eq!(cache.find(&blocks), miss);
        assert!(!cache.contains(&blocks[1]) && cache.contains(&forged));
        let mut lease = cache.admit(&blocks, 3).unwrap();
        assert_eq!(lease.blocks.len(), 1, "nothing behind it is used either");
        // the recomputed block gets the name only after the other block is evicted
        fill(&mut cache, &mut lease, &blocks);
        assert_eq!(cache.find(&blocks), miss);
        cache.release(lease);
        cache.check();

        // both go to host memory, which has one block per name
        let lease = cache.admit(&chain(3, 4), 4).map(|mut lease| {
            cache.grow(&mut lease, 4);
            lease
        });
        cache.release(lease.unwrap());
        assert_eq!(cache.find(&blocks), Found { on_device: 0, total: 1, in_host: 1, mismatch: true });
        cache.check();
        cache.flush();
        assert_eq!(cache.find(&blocks), Found::default());
    }
}

/// Simulated content of the blocks of device and host.
struct Memory {
    device: Vec<Option<BlockHash>>,
    host: Vec<Option<BlockHash>>,
}

impl Memory {
    fn new(blocks: u32, host_blocks: u32) -> Self {
        Self { device: vec![None; blocks as usize], host: vec![None; host_blocks as usize] }
    }

    fn copy(&mut self, copies: &[BlockCopy]) {
        for copy in copies {
            match *copy {
                BlockCopy::ToHost { block, host } => self.host[host as usize] = self.device[block as usize],
                BlockCopy::FromHost { host, block } => self.device[block as usize] = self.host[host as usize],
            }
        }
    }
}

#[test]
fn fetches_evicted_blocks_from_host_memory_and_evicts_its_oldest() {
    let mut cache = KvCache::new(3, 3);
    let (first, second, third) = (chain(1, 2), chain(2, 3), chain(3, 3));
    let mut lease = cache.admit(&first, 3).unwrap();
    fill(&mut cache, &mut lease, &first);
    cache.release(lease);
    // copied in advance: the later block of the prefix first, at most one per step
    assert_eq!(cache.spill(3, 1), [BlockCopy::ToHost { block: 1, host: 0 }]);
    let mut lease = cache.admit(&second, 3).unwrap();
    fill(&mut cache, &mut lease, &second);
    // taking the third block evicted the first one, which was not copied in advance
    assert_eq!(cache.take_copies(), [BlockCopy::ToHost { block: 0, host: 1 }]);
    cache.release(lease);
    assert_eq!(cache.find(&first), Found { on_device: 0, total: 2, in_host: 2, mismatch: false });
    assert_eq!(cache.drain_changes().stored.len(), 5);

    // fetched again: the oldest blocks of the device and unpinned blocks of host memory make room
    let mut lease = cache.admit(&first, 2).unwrap();
    assert_eq!(lease.blocks.len(), 2);
    assert_eq!(cache.take_copies().len(), 2, "into the one free host block: the blocks of the lease are pinned");
    assert_eq!(cache.drain_changes().evicted, hashes_of(&second[2..]), "neither here nor there");
    assert_eq!(cache.fetch(&mut lease, 1).len(), 1);
    assert_eq!(cache.host_pinned(), 2, "one in flight, one still required");
    cache.begin_step();
    assert_eq!(cache.host_pinned(), 1);
    // the caller disconnects
    cache.release(lease);
    assert_eq!(cache.host_pinned(), 0);
    assert_eq!(found(&cache, &first), 2, "its copies stay");
    cache.check();

    let lease = cache.admit(&third, 3).unwrap();
    cache.release(lease);
    assert_eq!(cache.flush(), 4, "one on the device, three in host memory");
    assert_eq!(cache.snapshot(), []);
}

#[derive(Clone, Debug)]
enum Action {
    Admit { family: u8, length: usize },
    Grow { lease: usize, by: usize },
    Release { lease: usize },
    Forget { lease: usize },
    Flush,
    Spill { wanted: usize, most: usize },
    Drain,
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let action = prop_oneof![
        4 => (0u8..4, 1usize..9).prop_map(|(family, length)| Action::Admit { family, length }),
        6 => (any::<usize>(), 1usize..4).prop_map(|(lease, by)| Action::Grow { lease, by }),
        3 => any::<usize>().prop_map(|lease| Action::Release { lease }),
        1 => any::<usize>().prop_map(|lease| Action::Forget { lease }),
        1 => Just(Action::Flush),
        2 => (0usize..9, 0usize..5).prop_map(|(wanted, most)| Action::Spill { wanted, most }),
        2 => Just(Action::Drain),
    ];
    proptest::collection::vec(action, 1..120)
}

proptest! {
    #[test]
    fn loses_no_block_and_hands_none_out_twice(blocks in 1u32..24, host_blocks in prop_oneof![Just(0u32), 1u32..20], actions in actions()) {
        let mut cache = KvCache::new(blocks, host_blocks);
        // content of each block, according to the copies of the steps
        let mut memory = Memory::new(blocks, host_blocks);
        let mut running: Vec<(Lease, Vec<Arc<BlockContent>>)> = Vec::new();
        let mut watched: HashSet<BlockHash> = HashSet::new();
        for action in actions {
            match action {
                Action::Admit { family, length } => {
                    let hashes = chain(u32::from(family), length);
                    // like the scheduler: the last block is always computed
                    if let Some(mut lease) = cache.admit(&hashes[..length - 1], length) {
                        prop_assert_eq!(lease.blocks.len() + lease.reserved, length);
                        // one or two steps until all blocks are fetched
                        memory.copy(&cache.take_copies());
                        while !lease.fetches.is_empty() {
                            cache.begin_step();
                            memory.copy(&cache.fetch(&mut lease, 2));
                        }
                        for (block, hash) in lease.blocks.iter().zip(&hashes) {
                            prop_assert_eq!(memory.device[*block as usize], Some(hash.hash()), "what was found is what it was");
                            cache.publish(*block, hash);
                        }
                        running.push((lease, hashes));
                    }
                }
                Action::Grow { lease, by } if !running.is_empty() => {
                    let index = lease % running.len();
                    let (lease, hashes) = &mut running[index];
                    let wanted = (lease.blocks.len() + by).min(hashes.len());
                    cache.grow(lease, wanted);
                    prop_assert_eq!(lease.blocks.len(), wanted, "an admitted sequence always gets its blocks");
                    memory.copy(&cache.take_copies());
                    for (block, hash) in lease.blocks.iter().zip(hashes.iter()) {
                        memory.device[*block as usize] = Some(hash.hash());
                        if hash.hash().0 % 3 == 0 {
                            cache.publish(*block, hash);
                        } else {
                            cache.publish_generated(*block, hash);
                        }
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
                Action::Spill { wanted, most } => {
                    cache.begin_step();
                    let copies = cache.spill(wanted, most);
                    prop_assert!(copies.len() <= most);
                    memory.copy(&copies);
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
                    prop_assert_eq!(&watched, &held, "the reported blocks are the cached blocks");
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
        cache.begin_step();
        prop_assert_eq!((cache.usage().used, cache.host_pinned()), (0, 0));
    }
}
