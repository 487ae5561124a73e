//! `bora bench index`: memory and lookup time of the router's prefix index, full.

use std::time::Instant;

use bora_common::blocks::BlockHash;
use bora_router::place::index::Index;
use clap::Args;
use serde_json::json;
use xxhash_rust::xxh3::xxh3_128;

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
}

/// Fills an index, looks prompts up while it is still and while another thread changes it, and prints a line.
pub(crate) fn run(args: &IndexArgs) {
    let index = Index::new();
    let slots: Vec<_> = (0..args.groups).map(|_| index.assign()).collect();
    let hash = |group: u32, block: u64| {
        let mut bytes = [0; 12];
        bytes[..4].copy_from_slice(&group.to_le_bytes());
        bytes[4..].copy_from_slice(&block.to_le_bytes());
        BlockHash(xxh3_128(&bytes))
    };
    let began = Instant::now();
    for (group, slot) in (0..).zip(&slots) {
        for first in (0..args.blocks).step_by(4096) {
            let some: Vec<u8> =
                (first..(first + 4096).min(args.blocks)).flat_map(|block| hash(group, block).to_bytes()).collect();
            index.apply(*slot, &some, &[]);
        }
    }
    let fill_seconds = began.elapsed().as_secs_f64();
    let prompt_of = |turn: u64| -> Vec<BlockHash> {
        let group = (turn % u64::from(args.groups)) as u32;
        let first = turn * 7919 % (args.blocks - args.prompt.min(args.blocks) + 1);
        (first..first + args.prompt.min(args.blocks)).map(|block| hash(group, block)).collect()
    };
    let look = |rounds: u64| {
        let mut times: Vec<f64> = (0..rounds)
            .map(|turn| {
                let prompt = prompt_of(turn);
                let began = Instant::now();
                let held = index.held(&prompt, &slots);
                let micros = began.elapsed().as_secs_f64() * 1e6;
                assert_eq!(held.iter().copied().max(), Some(prompt.len() as u32), "one group holds all of it");
                micros
            })
            .collect();
        times.sort_by(f64::total_cmp);
        let at = |share: f64| (times[((times.len() - 1) as f64 * share) as usize] * 10.0).round() / 10.0;
        (at(0.5), at(0.99))
    };
    let still = look(400);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let (changed, while_changing) = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut changed = 0u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let some: Vec<u8> = (0..64).flat_map(|block| hash(1 << 20, changed + block).to_bytes()).collect();
                index.apply(slots[0], &some, &[]);
                index.apply(slots[0], &[], &some);
                changed += 64;
            }
            changed
        });
        let times = look(400);
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        (writer.join().unwrap_or(0), times)
    });
    println!(
        "{}",
        json!({
            "kind": "index", "groups": args.groups, "blocks": index.len(), "megabytes": index.bytes() / 1_000_000,
            "fill_seconds": (fill_seconds * 10.0).round() / 10.0, "prompt_tokens": args.prompt * 64,
            "lookup_p50_us": still.0, "lookup_p99_us": still.1,
            "lookup_p50_us_while_changing": while_changing.0, "lookup_p99_us_while_changing": while_changing.1,
            "blocks_changed_meanwhile": changed,
        })
    );
}
