//! Measures grammars: the time to read a vocabulary, to compile each schema of a file, and to make the masks of an
//! output that matches it.
//!
//! ```text
//! cargo run --workspace --example grammar_bench -- TOKENIZER SCHEMAS
//! ```
//!
//! SCHEMAS is a JSON list of `{"name", "schema"}`, such as `tests/fixtures/tool_schemas.json`. Prints one line per
//! schema.

use std::path::Path;
use std::time::Instant;

use bora_worker::grammar::{GrammarKind, GrammarSource, Grammars};

/// Compilations per schema; the median is printed.
const COMPILED: usize = 7;
/// Maximum tokens of an output.
const LONGEST: usize = 300;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [tokenizer, schemas] = arguments.as_slice() else {
        return Err("usage: grammar_bench TOKENIZER SCHEMAS".into());
    };
    let started = Instant::now();
    let grammars = Grammars::load(Path::new(tokenizer))?;
    println!("vocabulary: {:.0} ms", milliseconds(started));
    let entries: Vec<serde_json::Value> = serde_json::from_str(&std::fs::read_to_string(schemas)?)?;
    println!("{:24}{:>11}{:>8}{:>10}{:>10}{:>10}", "schema", "compile ms", "masks", "p50 us", "p99 us", "max us");
    let mut all = Vec::new();
    for entry in &entries {
        let name = entry["name"].as_str().ok_or("a schema without a name")?;
        let mut compiled = Vec::new();
        let mut state = None;
        for number in 0..COMPILED {
            // a new title each time, because compiled grammars are cached
            let mut schema = entry["schema"].clone();
            schema["title"] = format!("{name} {number}").into();
            let source = GrammarSource { kind: GrammarKind::JsonSchema, text: schema.to_string() };
            let started = Instant::now();
            state = Some(grammars.begin(&source, &[])?);
            compiled.push(milliseconds(started));
        }
        compiled.sort_by(f64::total_cmp);
        let compile = compiled[COMPILED / 2];
        let mut state = state.ok_or("compiled at least once")?;
        let mut times = Vec::new();
        let mut random = 7u64;
        for _ in 0..LONGEST {
            let started = Instant::now();
            let mask = state.mask()?;
            times.push(milliseconds(started) * 1e3);
            let allowed: Vec<u32> =
                (0..mask.len() as u32 * 32).filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1).collect();
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let id = allowed[(random >> 33) as usize % allowed.len()];
            state.accept(id)?;
            // end of the output
            if id == 2 {
                break;
            }
        }
        print_line(name, compile, &mut times);
        all.extend(times);
    }
    print_line("all", 0.0, &mut all);
    Ok(())
}

fn print_line(name: &str, compile: f64, times: &mut [f64]) {
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    println!("{name:24}{compile:>11.1}{:>8}{:>10.0}{:>10.0}{:>10.0}", times.len(), at(0.5), at(0.99), at(1.0));
}

fn milliseconds(started: Instant) -> f64 {
    started.elapsed().as_secs_f64() * 1e3
}
