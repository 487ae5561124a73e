//! Memory and time of hostile grammars, by the allocator's count. Runs alone in its process.

use std::time::{Duration, Instant};

use bora_common::tokenizer::Vocabulary;
use bora_proto::v1;
use bora_worker::grammar::{GrammarError, GrammarSource, GrammarState, Grammars, MAX_STATE_BYTES, PrepareError};
use peak_alloc::PeakAlloc;
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Bound of the bytes allocated by a compilation.
const MAX_COMPILE_BYTES: usize = 64 << 20;
/// Bound of the time of a compilation, on a busy machine and without optimisation.
const MAX_COMPILE_TIME: Duration = Duration::from_secs(5);

const TOKENIZER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/tokenizers/tekken-v13-8k.json");

fn doubling(levels: usize, line: impl Fn(usize) -> String, end: &str) -> String {
    let lines: Vec<String> = (0..levels).map(line).collect();
    format!("start: t0\n{}\nt{levels}: {end}\n", lines.join("\n"))
}

fn terminals(text: &str) -> String {
    text.replace('t', "T").replace("sTarT", "start")
}

fn list(count: usize, value: impl Fn(usize) -> Value) -> Value {
    (0..count).map(value).collect::<Vec<_>>().into()
}

/// Definitions, each of which refers to the next one twice.
fn references(levels: usize, level: impl Fn(Value) -> Value) -> Value {
    let definitions: serde_json::Map<String, Value> = (0..levels)
        .map(|number| (format!("d{number}"), level(json!({"$ref": format!("#/$defs/d{}", number + 1)}))))
        .chain([(format!("d{levels}"), json!({"type": "string", "pattern": "^a+$"}))])
        .collect();
    json!({"$defs": definitions, "$ref": "#/$defs/d0"})
}

/// Hostile grammars; each is refused, or compiled within the bounds.
fn bombs() -> Vec<(&'static str, v1::grammar::Kind, String)> {
    let next = |level: usize| level + 1;
    let lark = [
        ("doubling terminals", terminals(&doubling(22, |n| format!("t{n}: t{0} t{0}", next(n)), "\"a\""))),
        ("a little doubling", terminals(&doubling(14, |n| format!("t{n}: t{0} t{0}", next(n)), "\"a\""))),
        (
            "doubling choices",
            terminals(&doubling(15, |n| format!("t{n}: t{0} \"b\" | \"c\" t{0}", next(n)), "/[a-f]/")),
        ),
        (
            "doubling conjunctions",
            terminals(&doubling(12, |n| format!("t{n}: (t{0} /.*/) & ~(t{0} \"c\")", next(n)), "/a|b/")),
        ),
        ("doubling rules", doubling(40, |n| format!("t{n}: t{0} t{0}", next(n)), "\"a\"")),
        ("doubling options", doubling(40, |n| format!("t{n}: t{0}? t{0}?", next(n)), "\"a\"")),
        ("nested repetitions", doubling(30, |n| format!("t{n}: t{0}{{0,1000}}", next(n)), "\"a\"")),
        (
            "repetitions of terminals",
            terminals(&doubling(30, |n| format!("t{n}: (t{0} \"b\"){{0,1000}}", next(n)), "/[a-c]/")),
        ),
        ("a chain of terminals", terminals(&doubling(3_500, |n| format!("t{n}: t{}", next(n)), "\"a\""))),
        ("a chain of rules", doubling(3_500, |n| format!("t{n}: t{} \"a\"", next(n)), "\"a\"")),
        (
            "nested brackets",
            doubling(150, |n| format!("t{n}: {}t{}{}", "(".repeat(25), next(n), ")?".repeat(25)), "\"a\""),
        ),
        (
            "long texts",
            format!("start: {}", (0..1_000).map(|n| format!("\"{n}{}\" ", "x".repeat(200))).collect::<String>()),
        ),
        ("caseless text", format!("start: \"{}\"i", "k".repeat(12_000))),
        ("many texts", format!("start: {}", (0..12_000).map(|n| format!("\"{n}\"")).collect::<Vec<_>>().join("|"))),
        (
            "many classes",
            format!("start: {}", (0..45).map(|n| format!("/[\\w--{}]/ ", (b'A' + n) as char)).collect::<String>()),
        ),
        ("substrings", format!("start: %regex {{\"substring_chars\": \"{}\"}}", "ab".repeat(8_000))),
        (
            "many lexemes at once",
            format!("start: {}", (1..400).map(|n| format!("/[a-z]{{{n}}}x/")).collect::<Vec<_>>().join("|")),
        ),
        (
            "imports",
            format!(
                "%import common (WORD, WS, FLOAT)\n{}",
                terminals(&doubling(12, |n| format!("t{n}: t{0} t{0}", next(n)), "WORD FLOAT WS"))
            ),
        ),
        (
            "a schema within",
            format!(
                "start: a\na: %json {}",
                references(12, |next| json!({"anyOf": [next, {"allOf": [next, {"minLength": 1}]}]}))
            ),
        ),
        (
            "an alternative of negations",
            terminals(&doubling(10, |n| format!("t{n}: ~(t{0} | t{0} t{0})", next(n)), "/.{3}a.{9}/")),
        ),
    ];
    let schemas = [
        ("references to allOf", references(20, |next| json!({"allOf": [next.clone(), next]}))),
        (
            "references to anyOf",
            references(20, |next| json!({"anyOf": [next.clone(), {"type": "array", "items": next}]})),
        ),
        ("references to both", references(20, |next| json!({"anyOf": [next, {"allOf": [next, {"minLength": 1}]}]}))),
        (
            "a product",
            json!({"allOf": list(3, |part| json!({"anyOf": list(18, |number| json!({"type": "object", "properties": {format!("p{part}_{number}"): {}}}))}))}),
        ),
        (
            "many properties times many choices",
            json!({"allOf": [
            {"type": "object", "properties": (0..400).map(|number| (format!("p{number}"), json!({"type": "string"}))).collect::<serde_json::Map<_, _>>()},
            {"anyOf": list(300, |number| json!({"required": [format!("p{number}")]}))}]}),
        ),
        ("a huge enum", json!({"enum": list(15_000, |number| json!(format!("name {number}")))})),
        ("long constants", json!({"enum": list(100, |number| json!(format!("{number}{}", "y".repeat(2_000))))})),
        (
            "patterns",
            json!({"type": "object", "properties": (0..60).map(|number| (format!("p{number}"), json!({"type": "string", "pattern": format!("^k{number}[\\w.]{{1,200}}@\\w+$")}))).collect::<serde_json::Map<_, _>>()}),
        ),
        ("a wide pattern", json!({"type": "string", "pattern": "^((a|b|c){0,50}x){0,50}$", "maxLength": 5_000})),
        (
            "references to a reference and its siblings",
            references(
                20,
                |next| json!({"$ref": next["$ref"], "allOf": [{"properties": {"x": next.clone()}}, {"properties": {"x": next}}]}),
            ),
        ),
        ("a reference to itself twice", json!({"allOf": [{"$ref": "#"}, {"$ref": "#"}], "type": "object"})),
        (
            "pattern properties",
            json!({"type": "object", "patternProperties": (0..60).map(|number| (format!("^(a|b)*a(a|b){{{number}}}$"), json!({}))).collect::<serde_json::Map<_, _>>()}),
        ),
        (
            "long arrays",
            json!({"type": "array", "minItems": 900_000_000, "items": {"type": "array", "maxItems": 2_000_000_000}}),
        ),
        ("long strings", json!({"type": "string", "minLength": 2_000_000, "maxLength": 4_000_000_000_u32})),
        ("a multiple", json!({"type": "number", "multipleOf": 0.9973, "minimum": -1e15, "maximum": 1.234_567_8e15})),
        (
            "options of the compiler",
            json!({"type": "object", "x-guidance": {"whitespace_pattern": format!("({}){{0,1000}}", "[\\w--a]|".repeat(500)), "item_separator": "(,|;){1,1000}"}}),
        ),
    ];
    let regexes = [
        ("nested bounds", "(((a{0,1000}){0,1000}){0,1000}b){0,1000}".to_owned()),
        ("an exponential automaton", "(a|b)*a(a|b){30}".to_owned()),
        ("exponential automata", (0..20).map(|n| format!("(a|b)*a(a|b){{{}}}c", 10 + n)).collect::<Vec<_>>().join("|")),
        ("every class", r"(?i)[\p{L}\p{N}\p{Greek}]+\W*".repeat(100)),
        ("long alternatives", (0..6_000).map(|n| format!("w{n}o")).collect::<Vec<_>>().join("|")),
    ];
    let kind = |kind| move |(name, text): (&'static str, String)| (name, kind, text);
    let schemas = schemas.map(|(name, schema)| (name, schema.to_string()));
    lark.into_iter()
        .map(kind(v1::grammar::Kind::Lark))
        .chain(schemas.into_iter().map(kind(v1::grammar::Kind::JsonSchema)))
        .chain(regexes.into_iter().map(kind(v1::grammar::Kind::Regex)))
        .collect()
}

/// Walks along tokens that do not end the output and that create new lexer states.
fn walk(
    state: &mut GrammarState,
    vocabulary: &Vocabulary,
    steps: usize,
    random: &mut u64,
) -> Result<usize, GrammarError> {
    for step in 0..steps {
        let mask = state.mask()?;
        let allowed: Vec<u32> = (0..vocabulary.len() as u32)
            .filter(|id| mask.get(*id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1))
            .filter(|id| *id != vocabulary.eos_id())
            .collect();
        if allowed.is_empty() {
            return Ok(step);
        }
        *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.accept(allowed[(*random >> 33) as usize % allowed.len()])?;
    }
    Ok(steps)
}

#[test]
fn bounds_memory_and_time_of_hostile_grammars() {
    let vocabulary = Vocabulary::load(TOKENIZER).unwrap();
    let grammars = Grammars::load(TOKENIZER.as_ref()).unwrap();
    let mut random = 7;
    let mut faults = Vec::new();
    for (name, kind, source) in bombs() {
        let before = ALLOCATOR.current_usage();
        ALLOCATOR.reset_peak_usage();
        let begun = Instant::now();
        let grammar = v1::Grammar { kind: kind.into(), source };
        let prepared = GrammarSource::try_from(grammar).map_err(PrepareError::Refused).and_then(|source| {
            let prepared = grammars.prepare(&source)?;
            Ok((source, prepared))
        });
        let (took, peak) = (begun.elapsed(), ALLOCATOR.peak_usage().saturating_sub(before));
        let kept = ALLOCATOR.current_usage().saturating_sub(before);
        if peak > MAX_COMPILE_BYTES || took > MAX_COMPILE_TIME {
            faults.push(format!("{name}: {} MiB in {took:?} to compile", peak >> 20));
        }
        let mut line = format!("{name}: {} KiB at most, {} KiB kept, {took:?}", peak >> 10, kept >> 10);
        match prepared {
            Err(error) => line += &format!(": {error}"),
            Ok((source, prepared)) => {
                let before = ALLOCATOR.current_usage();
                let mut state = grammars.begin(&source, &[]).unwrap();
                let outcome = walk(&mut state, &vocabulary, 40, &mut random);
                let (real, estimated) = (ALLOCATOR.current_usage().saturating_sub(before), state.bytes());
                line += &format!("; walked {outcome:?}: {} KiB, estimated {} KiB", real >> 10, estimated >> 10);
                // the tables behind an estimate may take twice as much while they grow
                if real > estimated + (4 << 20) || real > 2 * MAX_STATE_BYTES {
                    faults.push(format!("{name}: {} KiB, estimated {} KiB", real >> 10, estimated >> 10));
                }
                drop(prepared);
            }
        }
        println!("{line}");
    }
    assert!(faults.is_empty(), "{faults:#?}");
}
