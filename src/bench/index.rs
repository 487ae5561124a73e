//! `bora bench index`: memory and lookup time of the router's prefix index, full.
//!
//! Groups hold conversations as long as the prompt that is looked up, no two alike. They report them a run at a
//! time, all conversations in turn, so that no two runs of one stand together; and then conversations are evicted
//! and others come in their place, as in a fleet that has run for a while.

use std::time::Instant;

use bora_common::blocks::BlockHash;
use bora_router::place::{Slot, index::Index};
use clap::Args;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde_json::json;
use xxhash_rust::xxh3::xxh3_128;

/// Conversations that grow at the same time while others are replaced.
const GROW_TOGETHER: usize = 64;
const LOOKUPS: u64 = 400;

/// How full.
#[derive(Args, Debug)]
pub(crate) struct IndexArgs {
    /// groups
    #[arg(long, default_value_t = 64)]
    groups: u32,
    /// blocks of each group, no two alike
    #[arg(long, default_value_t = 300_000)]
    blocks: u64,
    /// blocks of the prompt that is looked up (64 tokens each)
    #[arg(long, default_value_t = 4096)]
    prompt: u64,
    /// blocks that a group reports at once
    #[arg(long, default_value_t = 4096)]
    block_run: u64,
    /// of each run, the last so many blocks one by one, as groups that report a response while they generate it
    #[arg(long, default_value_t = 0)]
    singly: u64,
    /// runs differ: half as long to one and a half times as long
    #[arg(long)]
    vary: bool,
    /// how often every conversation is replaced by another before prompts are looked up
    #[arg(long, default_value_t = 0.0)]
    turnover: f64,
}

/// One conversation in one group.
#[derive(Clone, Copy)]
struct Conversation {
    group: u32,
    number: u64,
    generation: u32,
    blocks: u64,
}

impl Conversation {
    fn hashes(self, first: u64, blocks: u64) -> impl Iterator<Item = BlockHash> {
        (first..(first + blocks).min(self.blocks)).map(move |block| {
            let mut bytes = [0; 24];
            bytes[..4].copy_from_slice(&self.group.to_le_bytes());
            bytes[4..8].copy_from_slice(&self.generation.to_le_bytes());
            bytes[8..16].copy_from_slice(&self.number.to_le_bytes());
            bytes[16..].copy_from_slice(&block.to_le_bytes());
            BlockHash(xxh3_128(&bytes))
        })
    }
}

struct Bench<'a> {
    args: &'a IndexArgs,
    index: Index,
    slots: Vec<Slot>,
    conversations: Vec<Conversation>,
    random: StdRng,
}

impl Bench<'_> {
    /// Reports these conversations, a run of each in turn.
    fn store(&self, some: &[Conversation]) {
        let mut first = 0;
        while first < self.args.prompt {
            let block_run = match (self.args.block_run.max(1), self.args.vary) {
                (block_run, true) => (block_run / 2 + xxh3_128(&first.to_le_bytes()) as u64 % (block_run + 1)).max(1),
                (block_run, false) => block_run,
            };
            let at_once = block_run.saturating_sub(self.args.singly);
            let reported =
                std::iter::once((first, at_once)).chain((at_once..block_run).map(|block| (first + block, 1)));
            for (first, blocks) in reported.filter(|(_, blocks)| *blocks > 0) {
                for one in some {
                    let reported: Vec<u8> = one.hashes(first, blocks).flat_map(BlockHash::to_bytes).collect();
                    self.index.apply(self.slots[one.group as usize], &reported, &[]);
                }
            }
            first += block_run;
        }
    }

    /// Some conversations are evicted, their ends first, and others grow in their place.
    fn replace_some(&mut self) {
        let mut some = Vec::with_capacity(GROW_TOGETHER);
        for _ in 0..GROW_TOGETHER {
            let at = self.random.random_range(0..self.conversations.len());
            let one = &mut self.conversations[at];
            let mut gone: Vec<BlockHash> = one.hashes(0, one.blocks).collect();
            gone.reverse();
            let gone: Vec<u8> = gone.into_iter().flat_map(BlockHash::to_bytes).collect();
            self.index.apply(self.slots[one.group as usize], &[], &gone);
            one.generation += 1;
            some.push((at, *one));
        }
        // one that was drawn twice is there only as what it is now
        some.retain(|(at, one)| self.conversations[*at].generation == one.generation);
        self.store(&some.into_iter().map(|(_, one)| one).collect::<Vec<_>>());
    }

    /// Microseconds of a lookup: the median and the 99th percentile.
    fn look(&self) -> (f64, f64) {
        let whole: Vec<&Conversation> =
            self.conversations.iter().filter(|one| one.blocks == self.args.prompt).collect();
        let mut times: Vec<f64> = (0..LOOKUPS)
            .map(|turn| {
                let one = whole[(turn * 7919) as usize % whole.len()];
                let prompt: Vec<BlockHash> = one.hashes(0, one.blocks).collect();
                let began = Instant::now();
                let held = self.index.held(&prompt, &self.slots);
                let micros = began.elapsed().as_secs_f64() * 1e6;
                assert_eq!(held[one.group as usize], prompt.len() as u32, "its group holds all of it");
                micros
            })
            .collect();
        times.sort_by(f64::total_cmp);
        let at = |share: f64| (times[((times.len() - 1) as f64 * share) as usize] * 10.0).round() / 10.0;
        (at(0.5), at(0.99))
    }
}

/// Fills an index, looks prompts up while it is still and while another thread changes it, empties a group, and prints
/// a line.
pub(crate) fn run(args: &IndexArgs) {
    let index = Index::new();
    let slots = (0..args.groups).map(|_| index.assign()).collect();
    let length = args.prompt.clamp(1, args.blocks.max(1));
    let args = &IndexArgs { prompt: length, ..*args };
    let of_group = |group: u32| {
        let firsts = (0..args.blocks).step_by(length as usize).zip(0..);
        firsts.map(move |(first, number)| Conversation {
            group,
            number,
            generation: 0,
            blocks: length.min(args.blocks - first),
        })
    };
    let conversations = (0..args.groups).flat_map(of_group).collect();
    let mut bench = Bench { args, index, slots, conversations, random: StdRng::seed_from_u64(1) };
    let began = Instant::now();
    bench.store(&bench.conversations);
    let fill_seconds = began.elapsed().as_secs_f64();
    let replaced = (bench.conversations.len() as f64 * args.turnover / GROW_TOGETHER as f64).round() as usize;
    (0..replaced).for_each(|_| bench.replace_some());
    let megabytes = bench.index.bytes() / 1_000_000;
    let still = bench.look();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let (changed, while_changing) = std::thread::scope(|scope| {
        let bench = &bench;
        let stop = &stop;
        let writer = scope.spawn(move || {
            let mut changed = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let new = Conversation { group: u32::MAX, number: changed, generation: 0, blocks: 64 };
                let some: Vec<u8> = new.hashes(0, 64).flat_map(BlockHash::to_bytes).collect();
                bench.index.apply(bench.slots[0], &some, &[]);
                bench.index.apply(bench.slots[0], &[], &some);
                changed += 64;
            }
            changed
        });
        let times = bench.look();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        (writer.join().unwrap_or(0), times)
    });
    let blocks = bench.index.len();
    let began = Instant::now();
    bench.index.clear(bench.slots[0]);
    let clear_seconds = began.elapsed().as_secs_f64();
    println!(
        "{}",
        json!({
            "kind": "index", "groups": args.groups, "blocks": blocks, "megabytes": megabytes,
            "block_run": args.block_run, "singly": args.singly, "vary": args.vary, "turnover": args.turnover,
            "fill_seconds": (fill_seconds * 10.0).round() / 10.0, "prompt_tokens": args.prompt * 64,
            "lookup_p50_us": still.0, "lookup_p99_us": still.1,
            "lookup_p50_us_while_changing": while_changing.0, "lookup_p99_us_while_changing": while_changing.1,
            "blocks_changed_meanwhile": changed, "clear_ms": (clear_seconds * 1e4).round() / 10.0,
        })
    );
}
