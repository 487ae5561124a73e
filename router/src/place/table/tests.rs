use std::collections::HashMap;

use super::*;

fn hash(number: u64) -> BlockHash {
    BlockHash(u128::from(number.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

/// The same as a plain map, whatever comes and goes.
#[test]
fn it_is_a_map() {
    let table = BlockTable::default();
    let mut map: HashMap<u64, u64> = HashMap::new();
    let mut state = 1u64;
    for step in 0..200_000u64 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let (number, bit) = ((state >> 40) % 3000, (state >> 20) as u32 % 64);
        let bits = map.entry(number).or_default();
        if (state >> 33).is_multiple_of(2) {
            *bits |= 1 << bit;
            table.set(std::iter::once(hash(number)), bit);
        } else {
            *bits &= !(1 << bit);
            table.unset(std::iter::once(hash(number)), bit);
        }
        if step % 20_000 == 0 {
            let bit = (step / 20_000) as u32;
            map.values_mut().for_each(|bits| *bits &= !(1 << bit));
            table.clear(bit);
        }
    }
    let numbers: Vec<BlockHash> = (0..3001).map(hash).collect();
    let mut seen = 0;
    table.walk(&numbers, |place, bits| {
        assert_eq!(bits, map.get(&(place as u64)).copied().unwrap_or(0), "{place}");
        assert_eq!(bits, table.bits(numbers[place]));
        seen += 1;
        true
    });
    assert_eq!(seen, numbers.len());
    assert_eq!(table.len(), map.values().filter(|bits| **bits != 0).count());
}

/// Keys that no slot distinguishes: one shard, and searches that begin at one slot. Few are left, so that slots are freed
/// in all orders, and readers find all that is there.
#[test]
fn keys_that_share_all_that_slots_know_are_told_apart() {
    let table = BlockTable::default();
    let alike = |number: u64| BlockHash(u128::from(0xfeed_f00d << 32 | number << 6));
    let mut there = [false; 40];
    let mut state = 7u64;
    for _ in 0..20_000 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let number = (state >> 40) as usize % there.len();
        let stays = (state >> 33).is_multiple_of(4);
        there[number] = stays;
        match stays {
            true => table.set(std::iter::once(alike(number as u64)), 3),
            false => table.unset(std::iter::once(alike(number as u64)), 3),
        }
        for (number, there) in there.iter().enumerate() {
            assert_eq!(table.bits(alike(number as u64)), u64::from(*there) << 3, "{number}");
        }
    }
    assert_eq!(table.len(), there.iter().filter(|there| **there).count());
    assert!(table.bytes() < 200_000, "slots that were freed are used again: {}", table.bytes());
}

/// A chain whose blocks stand one behind the other, in runs, and not at all in order.
#[test]
fn walks_find_runs_and_what_stands_elsewhere() {
    let table = BlockTable::default();
    let chain: Vec<BlockHash> = (0..10_000).map(hash).collect();
    table.set(chain[..5_000].iter().copied(), 0);
    table.set(chain[7_000..].iter().rev().copied(), 1);
    table.set(chain[5_000..7_000].iter().step_by(2).copied(), 2);
    table.set(chain[5_000..7_000].iter().skip(1).step_by(2).copied(), 2);
    table.set(chain[100..200].iter().copied(), 3);
    let mut seen = 0;
    table.walk(&chain, |place, bits| {
        let expected = match place {
            100..200 => 0b1001,
            0..5_000 => 0b1,
            5_000..7_000 => 0b100,
            _ => 0b10,
        };
        assert_eq!(bits, expected, "{place}");
        seen += 1;
        true
    });
    assert_eq!(seen, chain.len());
    let most: Vec<BlockHash> = chain.iter().copied().filter(|hash| hash.0 % 5 > 0).collect();
    table.unset(chain.iter().copied().filter(|hash| hash.0 % 5 == 0), 0);
    table.walk(&most, |place, bits| {
        assert_eq!(bits, table.bits(most[place]), "{place}");
        assert_ne!(bits, 0);
        true
    });
    table.set(chain[..5_000].iter().copied(), 0);
    table.unset(chain[300..301].iter().copied(), 0);
    table.set(std::iter::once(hash(99_999)), 5);
    table.walk(&chain[..400], |place, bits| {
        assert_eq!(bits & 1, u64::from(place != 300));
        true
    });
}

/// Conversations reported a run at a time, in turn, with runs of every length, and blocks that are missing.
#[test]
fn walks_find_pieces_of_any_length() {
    for run in [1, 2, 3, 5, 8, 15, 16, 31, 32, 33, 100, 127, 200, 5_000] {
        let table = BlockTable::default();
        let conversation = |number: u64| (0..3_000u64).map(|at| hash(number * 1_000_000 + at)).collect::<Vec<_>>();
        let conversations: Vec<Vec<BlockHash>> = (0..7).map(conversation).collect();
        for first in (0..3_000).step_by(run) {
            for (bit, chain) in conversations.iter().enumerate() {
                // lengths differ from run to run
                let cut = first + (run / 2) * usize::from((first / run) % 3 == 1);
                let end = (first + run).min(chain.len());
                table.set(chain[first..cut.min(end)].iter().copied(), bit as u32);
                table.set(chain[cut.min(end)..end].iter().copied(), bit as u32);
            }
        }
        let missing = |at: usize| at % 701 == 700;
        for (bit, chain) in conversations.iter().enumerate() {
            table.unset((0..chain.len()).filter(|at| missing(*at)).map(|at| chain[at]), bit as u32);
        }
        for (bit, chain) in conversations.iter().enumerate() {
            let mut seen = 0;
            table.walk(chain, |place, bits| {
                assert_eq!(bits, if missing(place) { 0 } else { 1 << bit }, "{run} {place}");
                assert_eq!(place, seen);
                seen += 1;
                true
            });
            assert_eq!(seen, chain.len());
        }
    }
}

/// Entries that all chunks have room for.
fn room(table: &BlockTable) -> usize {
    table.arrays.read().now().1.iter().map(|chunk| chunk.len()).sum()
}

/// How often the next block of a chain does not stand behind the one before it.
fn breaks(table: &BlockTable, chain: &[BlockHash]) -> usize {
    let (shards, chunks) = table.arrays.read().now();
    let place = |hash: &BlockHash| {
        let key = key_of(*hash);
        find(&shards[shard_of(key)], &chunks, key).expect("it is there").0
    };
    chain.windows(2).filter(|two| place(&two[1]) != place(&two[0]) + 1).count()
}

/// Conversations grow in turn, a run at a time, in the place of others that went.
#[test]
fn pieces_stay_whole_where_others_were() {
    const BLOCKS: usize = 300;
    let table = BlockTable::default();
    let chain_of = |number: u64| (0..BLOCKS as u64).map(|at| hash(number * 1_000 + at)).collect::<Vec<_>>();
    let length = |turn: usize| 8 + turn * 7 % 15;
    let store = |chains: &[Vec<BlockHash>]| {
        let (mut first, mut turn) = (0, 0);
        while first < BLOCKS {
            let end = (first + length(turn)).min(BLOCKS);
            chains.iter().for_each(|chain| table.set(chain[first..end].iter().copied(), 1));
            (first, turn) = (end, turn + 1);
        }
        turn
    };
    let mut chains: Vec<Vec<BlockHash>> = (0..128).map(chain_of).collect();
    let runs = store(&chains);
    for round in 0..40u64 {
        let (gone, kept): (Vec<_>, Vec<_>) =
            chains.into_iter().enumerate().partition(|(number, _)| number * 37 % 8 == round as usize % 8);
        chains = kept.into_iter().map(|(_, chain)| chain).collect();
        gone.iter().for_each(|(_, chain)| table.unset(chain.iter().rev().copied(), 1));
        let new: Vec<Vec<BlockHash>> =
            (0..gone.len() as u64).map(|number| chain_of(1_000 + round * 100 + number)).collect();
        store(&new);
        chains.extend(new);
    }
    assert_eq!(table.len(), 128 * BLOCKS);
    let breaks: usize = chains.iter().map(|chain| breaks(&table, chain)).sum();
    assert!(breaks < 128 * runs * 11 / 10, "{breaks} of {} pieces", 128 * runs);
    assert!(room(&table) < 2 * table.len(), "{} for {}", room(&table), table.len());
}

/// No run fits into gaps of three, but they are not left empty for it.
#[test]
fn gaps_that_no_piece_fits_into_are_filled_where_there_are_many() {
    let table = BlockTable::default();
    table.set((0..40_000).map(hash), 1);
    table.unset((0..40_000).filter(|number| number % 4 > 0).map(hash), 1);
    let before = room(&table);
    let added: Vec<BlockHash> = (50_000..60_000).map(hash).collect();
    added.chunks(15).for_each(|run| table.set(run.iter().copied(), 2));
    assert_eq!(room(&table), before);
    assert_eq!(table.len(), 20_000);
    let mut seen = 0;
    table.walk(&added, |place, bits| {
        assert_eq!((place, bits), (seen, 0b100));
        seen += 1;
        true
    });
    assert_eq!(seen, added.len());
}

#[test]
fn a_table_that_is_emptied_gives_its_memory_back() {
    let table = BlockTable::default();
    table.set((0..200_000).map(hash), 1);
    table.set((0..200_000).step_by(1000).map(hash), 2);
    assert!(table.bytes() > 200_000 * size_of::<Entry>());
    table.clear(1);
    assert_eq!(table.len(), 200);
    assert!(table.bytes() < 200_000, "{}", table.bytes());
    assert!((0..200_000).step_by(1000).all(|number| table.bits(hash(number)) == 4));
    table.clear(2);
    assert_eq!(table.len(), 0);
}

#[test]
fn blocks_that_come_and_go_leave_nothing() {
    let table = BlockTable::default();
    for round in 0..200u64 {
        let some = || (0..1000).map(move |number| hash(round * 1000 + number));
        table.set(some(), 3);
        table.unset(some(), 3);
    }
    assert_eq!(table.len(), 0);
    assert!(table.bytes() < 200_000, "{}", table.bytes());
}

#[test]
fn readers_see_every_block_that_was_there_before_they_looked() {
    let table = Arc::new(BlockTable::default());
    table.set((0..500).map(hash), 1);
    let writer = {
        let table = Arc::clone(&table);
        std::thread::spawn(move || {
            for round in 1..100u64 {
                table.set((round * 1000..round * 1000 + 500).map(hash), 2);
                table.unset((round * 1000..round * 1000 + 400).map(hash), 2);
            }
        })
    };
    let numbers: Vec<BlockHash> = (0..500).map(hash).collect();
    while !writer.is_finished() {
        table.walk(&numbers, |place, bits| {
            assert_eq!(bits, 2, "{place}");
            true
        });
    }
    writer.join().expect("the writer");
}
