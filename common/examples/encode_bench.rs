//! How fast texts become token IDs: `cargo run --release -p bora-common --example encode_bench -- TOKENIZER FILE...`
//!
//! Each file is cut into chunks of 300 KB. Printed are MB/s on one thread: for the first chunk a thread ever
//! encodes, the median of the chunks after it (text never seen, vocabulary warm), and the best of twenty runs
//! over the first chunk (text seen before). Besides that the time to load, the first call on a fresh thread,
//! many short texts, texts that make careless encoders quadratic, and the names of a prompt's blocks (beside XXH3-128, which has
//! no key, over the same bytes).

use std::hint::black_box;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bora_common::blocks::{BLOCK_TOKENS, hash_blocks};
use bora_common::secret::ClusterKeys;
use bora_common::tokenizer::Tokenizer;
use xxhash_rust::xxh3::xxh3_128;

const SEGMENT: usize = 300_000;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((tokenizer, files)) = arguments.split_first() else {
        eprintln!("usage: encode_bench TOKENIZER FILE...");
        return ExitCode::FAILURE;
    };
    match run(tokenizer, files) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(tokenizer: &str, files: &[String]) -> Result<(), Box<dyn std::error::Error>> {
    let (loading, tokenizer) = timed(|| Tokenizer::from_file(tokenizer));
    let tokenizer = Arc::new(tokenizer?);
    println!("load {:.0} ms", loading.as_secs_f64() * 1e3);
    println!("first call {:.2} ms", timed(|| tokenizer.encode("hello")).0.as_secs_f64() * 1e3);
    let elsewhere = Arc::clone(&tokenizer);
    let fresh = std::thread::spawn(move || timed(|| elsewhere.encode("hello")).0).join().map_err(|_| "thread")?;
    println!("first call on another thread {:.2} ms", fresh.as_secs_f64() * 1e3);
    for file in files {
        let text = String::from_utf8_lossy(&std::fs::read(file)?).into_owned();
        let segments = segments(&text);
        let rates: Vec<f64> =
            segments.iter().map(|segment| rate(segment.len(), timed(|| tokenizer.encode(segment)).0)).collect();
        let (first, mut next) = (rates[0], rates[1..].to_vec());
        next.sort_by(f64::total_cmp);
        let again =
            (0..20).map(|_| rate(segments[0].len(), timed(|| tokenizer.encode(segments[0])).0)).fold(0.0, f64::max);
        let median = next.get(next.len() / 2).copied().unwrap_or(first);
        println!("{file}: {} bytes, first {first:.0} MB/s, then {median:.0} MB/s, again {again:.0} MB/s", text.len());
        let lines: Vec<&str> = text.lines().take(20_000).collect();
        let each = timed(|| lines.iter().map(|line| tokenizer.encode(line).len()).sum::<usize>()).0;
        println!(
            "{file}: {} lines one by one, {:.0} ns each",
            lines.len(),
            each.as_secs_f64() * 1e9 / lines.len().max(1) as f64
        );
    }
    for (name, unit) in [
        ("a", "a"),
        ("space", " "),
        ("newline", "\n"),
        ("dash", "-"),
        ("digit", "0"),
        ("han", "\u{6f22}"),
        ("mark", "\u{301}"),
    ] {
        let text = unit.repeat((1 << 20) / unit.len());
        println!("1 MiB of {name}: {:.0} ms", timed(|| tokenizer.encode(&text)).0.as_secs_f64() * 1e3);
    }
    let keys = ClusterKeys::random();
    for tokens in [512, 117_000, 262_144] {
        let ids: Vec<u32> = (0..tokens).map(|id: u32| id.wrapping_mul(0x9e37_79b1) >> 15).collect();
        let keyed = fastest(|| hash_blocks(&keys, b"salt", &[], &ids));
        let unkeyed = fastest(|| chain_without_key(&ids));
        let micros = |time: Duration| time.as_secs_f64() * 1e6;
        println!("names of {tokens} tokens: {:.1} us, without a key {:.1} us", micros(keyed), micros(unkeyed));
    }
    Ok(())
}

/// What names of blocks were before they had a key: to compare with, in the same run.
fn chain_without_key(ids: &[u32]) -> Vec<u128> {
    let mut parent = 0;
    let name = |block: &[u32; BLOCK_TOKENS]| {
        let mut bytes = [0; 16 + 4 * BLOCK_TOKENS];
        bytes[..16].copy_from_slice(&u128::to_le_bytes(parent));
        for (place, id) in bytes[16..].as_chunks_mut::<4>().0.iter_mut().zip(block) {
            *place = id.to_le_bytes();
        }
        parent = xxh3_128(&bytes);
        parent
    };
    ids.as_chunks::<BLOCK_TOKENS>().0.iter().map(name).collect()
}

fn fastest<T>(mut work: impl FnMut() -> T) -> Duration {
    (0..50).map(|_| timed(&mut work).0).min().unwrap_or_default()
}

fn timed<T>(work: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let result = black_box(work());
    (start.elapsed(), result)
}

fn rate(bytes: usize, elapsed: Duration) -> f64 {
    bytes as f64 / 1e6 / elapsed.as_secs_f64()
}

/// At least one chunk, each of whole characters.
fn segments(text: &str) -> Vec<&str> {
    let mut segments = Vec::new();
    let mut rest = text;
    while rest.len() > SEGMENT {
        let cut = (SEGMENT..).find(|at| rest.is_char_boundary(*at)).unwrap_or(rest.len());
        let (segment, after) = rest.split_at(cut);
        segments.push(segment);
        rest = after;
    }
    if segments.is_empty() {
        segments.push(rest);
    }
    segments
}
