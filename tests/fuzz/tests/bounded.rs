//! Every target over its corpus and, for a few seconds, over what the mutator makes of it. `BORA_FUZZ_SECONDS` says how
//! long (for each target), `BORA_FUZZ_SEED` with which numbers; an input that fails is written to the target directory
//! and belongs into the corpus.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    time::{Duration, Instant},
};

use rand::{SeedableRng as _, rngs::StdRng};

/// Inputs that are tried whatever the time.
const FEWEST: u64 = 100;
/// An input that takes longer each time it is tried could be used to stop a router.
const LONGEST: Duration = Duration::from_secs(5);

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn run(name: &str, target: fn(&[u8])) {
    let mut corpus: Vec<(String, Vec<u8>)> = std::fs::read_dir(bora_fuzz::corpus(name))
        .expect("a corpus")
        .map(|entry| entry.expect("readable"))
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), std::fs::read(entry.path()).expect("readable")))
        .collect();
    corpus.sort();
    assert!(corpus.len() >= 10, "{name}: the corpus has {} inputs", corpus.len());
    for (file, input) in &corpus {
        check(name, target, input, file);
    }
    let inputs: Vec<Vec<u8>> = corpus.into_iter().map(|(_, input)| input).collect();
    let seed = setting("BORA_FUZZ_SEED", 1);
    let mut random = StdRng::seed_from_u64(seed);
    let end = Instant::now() + Duration::from_secs(setting("BORA_FUZZ_SECONDS", 4));
    let mut tried = 0_u64;
    // on a machine that stands still for that long, too, something is tried
    while Instant::now() < end || tried < FEWEST {
        let input = bora_fuzz::mutate::mutate(&inputs, &mut random);
        check(name, target, &input, &format!("seed {seed}, input {tried}"));
        tried += 1;
    }
    println!("{name}: {tried} inputs");
}

fn check(name: &str, target: fn(&[u8]), input: &[u8], what: &str) {
    // the machine may stand still once, but not each time
    let mut shortest = Duration::MAX;
    for _ in 0..3 {
        let began = Instant::now();
        try_once(name, target, input, what);
        shortest = shortest.min(began.elapsed());
        if shortest < LONGEST {
            return;
        }
    }
    panic!("{name} took {shortest:?} ({what})");
}

fn try_once(name: &str, target: fn(&[u8]), input: &[u8], what: &str) {
    if catch_unwind(AssertUnwindSafe(|| target(input))).is_err() {
        let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{name}"));
        std::fs::write(&file, input).expect("writable");
        panic!("{name} failed ({what}); the input is in {}", file.display());
    }
}

#[test]
fn request() {
    run("request", bora_fuzz::request);
}

#[test]
fn agents() {
    run("agents", bora_fuzz::agents);
}

#[test]
fn grammar() {
    run("grammar", bora_fuzz::grammar);
}

#[test]
fn tool_calls() {
    run("tool_calls", bora_fuzz::tool_calls);
}

#[test]
fn conversation() {
    run("conversation", bora_fuzz::conversation);
}

#[test]
fn worker() {
    run("worker", bora_fuzz::worker);
}
