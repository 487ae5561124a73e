//! Structured output: which ids a sequence may draw next, by a grammar (a JSON schema, a regular expression,
//! or llguidance's Lark).
//!
//! llguidance compiles the grammar against the bytes of the model's tokens and computes, at each position, the
//! set of ids that can still lead to a text of the language. Every rank keeps the state of its sequences
//! ([`GrammarState`]) and computes the same masks from the same ids, so masks never travel. Compiling takes
//! milliseconds, and what would take much longer is refused before ([`limits`]). Callers compile before the step loop sees
//! the request ([`Grammars::prepare`]), and the result is kept for the ranks and for the next request with the same grammar.

mod limits;
mod pending;
mod state;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bora_common::tokenizer::{TokenizerError, Vocabulary};
use bora_proto::v1;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};

pub use limits::MAX_GRAMMAR_BYTES;
pub use pending::PendingGrammars;
pub(crate) use state::allows;
pub use state::{GrammarState, Mask};

/// Work spent on building a grammar: llguidance does 50,000 units in a millisecond.
const COMPILE_FUEL: u64 = 2_500_000;
/// Compiled grammars that are kept.
const KEPT: usize = 64;
/// Stack of the thread that compiles: schemas may be nested as deeply as JSON parsers allow.
const COMPILE_STACK: usize = 16 << 20;

const COMPILE_BUCKETS: [f64; 9] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.0];
const MASK_BUCKETS: [f64; 11] = [5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1, 1.0];

/// A grammar as it travels: from the router to the leader, and from there to every rank.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GrammarSource {
    /// Which language `text` is written in.
    pub kind: GrammarKind,
    /// At most [`MAX_GRAMMAR_BYTES`].
    pub text: String,
}

/// Languages for languages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GrammarKind {
    /// A JSON schema.
    JsonSchema,
    /// A regular expression in Rust's syntax, anchored at both ends.
    Regex,
    /// llguidance's variant of Lark.
    Lark,
}

/// A grammar can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GrammarError(pub String);

impl TryFrom<v1::Grammar> for GrammarSource {
    type Error = GrammarError;

    fn try_from(grammar: v1::Grammar) -> Result<Self, GrammarError> {
        let kind = match grammar.kind() {
            v1::grammar::Kind::JsonSchema => GrammarKind::JsonSchema,
            v1::grammar::Kind::Regex => GrammarKind::Regex,
            v1::grammar::Kind::Lark => GrammarKind::Lark,
            v1::grammar::Kind::Unspecified => return Err(GrammarError("its kind is not given".into())),
        };
        if grammar.source.len() > MAX_GRAMMAR_BYTES {
            let length = grammar.source.len();
            return Err(GrammarError(format!("it has {length} bytes, at most {MAX_GRAMMAR_BYTES} are taken")));
        }
        match kind {
            GrammarKind::JsonSchema => limits::check_schema(&grammar.source)?,
            GrammarKind::Regex | GrammarKind::Lark => limits::check_lark(&grammar.source)?,
        }
        Ok(Self { kind, text: grammar.source })
    }
}

/// Compiles grammars for one vocabulary and keeps the newest ones.
pub struct Grammars {
    factory: ParserFactory,
    kept: Mutex<Kept>,
    compile_seconds: Histogram,
    mask_seconds: Histogram,
}

#[derive(Default)]
struct Kept {
    /// Never advanced; each with the number of its last use.
    compiled: HashMap<GrammarSource, (Matcher, u64)>,
    uses: u64,
}

impl Grammars {
    /// Reads the vocabulary of a tokenizer file or model directory. A second of processor time for 131,072 ids, most of it for
    /// what llguidance prepares once: see [`PendingGrammars`].
    pub fn load(tokenizer: &Path) -> Result<Self, TokenizerError> {
        let vocabulary = Vocabulary::load(tokenizer)?;
        Self::new(&vocabulary)
            .map_err(|GrammarError(reason)| TokenizerError::Invalid { path: tokenizer.to_owned(), reason })
    }

    /// For the tokens of this vocabulary.
    pub fn new(vocabulary: &Vocabulary) -> Result<Self, GrammarError> {
        let count = vocabulary.len() as u32;
        let words: Vec<Vec<u8>> = (0..count)
            .map(|id| match (vocabulary.ordinary(id), vocabulary.special_name(id)) {
                (Some(bytes), _) => bytes.to_vec(),
                // the marker keeps text from ever matching a special token
                (None, Some(name)) => [&[TokTrie::SPECIAL_TOKEN_MARKER], name.as_bytes()].concat(),
                (None, None) => Vec::new(),
            })
            .collect();
        let trie = TokTrie::from(&TokRxInfo::new(count, vocabulary.eos_id()), &words);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)
            .map_err(|error| GrammarError(error.to_string()))?;
        factory.quiet();
        let compiler = factory.limits_mut();
        compiler.initial_lexer_fuel = COMPILE_FUEL;
        compiler.max_grammar_size = limits::MAX_SYMBOLS;
        compiler.verbose_errors = false;
        Ok(Self {
            factory,
            kept: Mutex::default(),
            compile_seconds: Histogram::new(COMPILE_BUCKETS),
            mask_seconds: Histogram::new(MASK_BUCKETS),
        })
    }

    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register(
            "grammar_compile_seconds",
            "Compiling a grammar that was not kept",
            self.compile_seconds.clone(),
        );
        registry.register(
            "grammar_mask_seconds",
            "Making the masks of a step's sequences, on one rank",
            self.mask_seconds.clone(),
        );
    }

    /// The masks of a step took this long.
    pub(crate) fn masked(&self, seconds: f64) {
        self.mask_seconds.observe(seconds);
    }

    /// Compiles a grammar, or finds it. Up to some tens of milliseconds, on a thread of its own.
    pub fn prepare(&self, source: &GrammarSource) -> Result<(), GrammarError> {
        self.matcher(source).map(drop)
    }

    /// The state of a sequence that has generated `generated_ids` so far.
    pub fn begin(&self, source: &GrammarSource, generated_ids: &[u32]) -> Result<GrammarState, GrammarError> {
        let mut matcher = self.matcher(source)?;
        matcher
            .consume_tokens(generated_ids)
            .map_err(|error| GrammarError(format!("the ids generated so far do not match it: {error}")))?;
        Ok(GrammarState::new(matcher))
    }

    fn matcher(&self, source: &GrammarSource) -> Result<Matcher, GrammarError> {
        {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.uses += 1;
            let now = kept.uses;
            if let Some((matcher, last_use)) = kept.compiled.get_mut(source) {
                *last_use = now;
                return Ok(matcher.deep_clone());
            }
        }
        let begun = Instant::now();
        let matcher = std::thread::scope(|scope| {
            let compiling = std::thread::Builder::new()
                .name("grammar".into())
                .stack_size(COMPILE_STACK)
                .spawn_scoped(scope, || self.compile(source))
                .map_err(|error| GrammarError(format!("no thread to compile it: {error}")))?;
            compiling.join().unwrap_or_else(|_| Err(GrammarError("it can't be compiled".into())))
        })?;
        self.compile_seconds.observe(begun.elapsed().as_secs_f64());
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.compiled.len() >= KEPT
            && let Some(oldest) = kept.compiled.iter().min_by_key(|(_, (_, last_use))| *last_use)
        {
            let oldest = oldest.0.clone();
            kept.compiled.remove(&oldest);
        }
        let now = kept.uses;
        kept.compiled.insert(source.clone(), (matcher.deep_clone(), now));
        Ok(matcher)
    }

    fn compile(&self, source: &GrammarSource) -> Result<Matcher, GrammarError> {
        let tag = match source.kind {
            GrammarKind::JsonSchema => "json_schema",
            GrammarKind::Regex => "regex",
            GrammarKind::Lark => "lark",
        };
        let failed = |error: &dyn std::fmt::Display| GrammarError(first_line(&error.to_string()));
        let grammar = TopLevelGrammar::from_tagged_str(tag, &source.text).map_err(|error| failed(&error))?;
        let matcher = Matcher::new(self.factory.create_parser(grammar));
        if let Some(error) = matcher.get_error() {
            return Err(failed(&error));
        }
        // a grammar that matches nothing at all
        let mask = matcher.deep_clone().compute_mask_or_eos().map_err(|error| failed(&error))?;
        if mask.is_zero() { Err(GrammarError("no text matches it".into())) } else { Ok(matcher) }
    }
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").finish_non_exhaustive()
    }
}

/// What the compiler says first. What made it panic is no business of a client's.
fn first_line(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    if line.starts_with("panic:") { "it can't be compiled".into() } else { line.chars().take(500).collect() }
}

#[cfg(test)]
mod tests;
