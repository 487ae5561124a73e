//! Structured output: computes the token IDs that may follow in a sequence with a grammar (a JSON schema, a regular
//! expression, or llguidance's Lark).
//!
//! llguidance compiles the grammar against the bytes of the model's tokens and computes, at each position, the set of
//! token IDs that can still lead to a text of the language. Every rank keeps the state of its sequences
//! ([`GrammarState`]) and computes the same masks from the same tokens, so masks are never sent between ranks.
//!
//! A client that sends a grammar may be hostile, so every stage has a bound:
//!
//! - [`limits`] bounds the source before it is compiled.
//! - [`compile`] queues compilations and bounds them by fuel.
//! - [`kept`] caches compiled and refused grammars, bounded by bytes.
//! - [`memory`] measures at each token the tables that grow while a sequence runs.
//!
//! The engine compiles a grammar before the loop receives the request ([`Grammars::prepare_then`]). Ranks prepare the
//! state of a sequence in the background ([`Grammars::begin_later`]).

mod compile;
mod kept;
mod limits;
mod memory;
mod pending;
mod state;

use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bora_common::tokenizer::{TokenizerError, Vocabulary};
use bora_proto::v1;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{ParserFactory, TokenParser};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};

pub use limits::MAX_GRAMMAR_BYTES;
pub use memory::{MAX_LIVE_BYTES, MAX_STATE_BYTES};
pub use pending::PendingGrammars;
pub(crate) use state::allows;
pub use state::{GrammarState, Mask};

use compile::Job;
use kept::Kept;
use memory::{LiveBytes, TotalBytes};

/// Maximum fuel of a compilation, which bounds its time and memory. llguidance uses 50,000 units per millisecond.
const COMPILE_FUEL: u64 = 400_000;
/// Maximum fuel of one mask.
const MASK_FUEL: u64 = 100_000;
/// Maximum lexer states of a sequence.
const MAX_LEXER_STATES: usize = 50_000;

const COMPILE_BUCKETS: [f64; 9] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.0];
const MASK_BUCKETS: [f64; 11] = [5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1, 1.0];

/// Source of a grammar, as it is sent from the router to the leader and from the leader to every rank.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GrammarSource {
    /// Language of `text`.
    pub kind: GrammarKind,
    /// The grammar, at most [`MAX_GRAMMAR_BYTES`].
    pub text: String,
}

/// Grammar languages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GrammarKind {
    /// A JSON schema.
    JsonSchema,
    /// A regular expression in Rust's syntax, anchored at both ends.
    Regex,
    /// llguidance's variant of Lark.
    Lark,
}

/// Why a grammar is invalid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GrammarError(pub String);

/// Why a grammar could not be prepared.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrepareError {
    /// The grammar is invalid on every group.
    #[error(transparent)]
    Refused(GrammarError),
    /// The grammar can't be compiled now on this group.
    #[error("the grammar can't be compiled now: {0}")]
    Busy(String),
}

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
            return Err(GrammarError(format!("it has {length} bytes, at most {MAX_GRAMMAR_BYTES} are allowed")));
        }
        limits::check(kind, &grammar.source)?;
        Ok(Self { kind, text: grammar.source })
    }
}

/// Handle of a compiled grammar. The grammar stays cached while the handle exists.
#[derive(Clone, Debug)]
pub struct Prepared(#[expect(dead_code, reason = "held, not read")] Arc<Compiled>);

/// A parser that is never advanced, and its estimated bytes.
struct Compiled {
    parser: Mutex<TokenParser>,
    live: LiveBytes,
}

impl Compiled {
    fn bytes(&self) -> usize {
        self.live.bytes()
    }
}

impl std::fmt::Debug for Compiled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compiled").field("live", &self.live).finish_non_exhaustive()
    }
}

/// Compiles grammars for one vocabulary and caches the most recently used.
pub struct Grammars {
    compiler: Arc<Compiler>,
    jobs: Sender<Job>,
    mask_seconds: Histogram,
}

struct Compiler {
    factory: ParserFactory,
    kept: Mutex<Kept>,
    live: TotalBytes,
    seconds: Histogram,
}

impl Grammars {
    /// Loads the vocabulary of a tokenizer file or model directory. This takes a second of CPU time for 131,072 token
    /// IDs, mostly for tables that llguidance prepares once: see [`PendingGrammars`].
    pub fn load(tokenizer: &Path) -> Result<Self, TokenizerError> {
        let vocabulary = Vocabulary::load(tokenizer)?;
        Self::new(&vocabulary)
            .map_err(|GrammarError(reason)| TokenizerError::Invalid { path: tokenizer.to_owned(), reason })
    }

    /// A compiler for the tokens of this vocabulary.
    pub fn new(vocabulary: &Vocabulary) -> Result<Self, GrammarError> {
        let count = vocabulary.len() as u32;
        let words: Vec<Vec<u8>> = (0..count)
            .map(|id| match (vocabulary.ordinary(id), vocabulary.special_name(id)) {
                (Some(bytes), _) => bytes.to_vec(),
                // the marker prevents text from matching a special token
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
        let limits = factory.limits_mut();
        limits.initial_lexer_fuel = COMPILE_FUEL;
        limits.step_lexer_fuel = MASK_FUEL;
        limits.max_lexer_states = MAX_LEXER_STATES;
        limits.max_grammar_size = limits::MAX_SYMBOLS;
        limits.verbose_errors = false;
        let compiler = Arc::new(Compiler {
            factory,
            kept: Mutex::default(),
            live: TotalBytes::default(),
            seconds: Histogram::new(COMPILE_BUCKETS),
        });
        let jobs = compile::start(&compiler)?;
        Ok(Self { compiler, jobs, mask_seconds: Histogram::new(MASK_BUCKETS) })
    }

    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register(
            "grammar_compile_seconds",
            "Compiling a grammar that was not kept",
            self.compiler.seconds.clone(),
        );
        registry.register(
            "grammar_mask_seconds",
            "Making the masks of a step's sequences, on one rank",
            self.mask_seconds.clone(),
        );
    }

    /// Records the time of a step's masks.
    pub(crate) fn masked(&self, seconds: f64) {
        self.mask_seconds.observe(seconds);
    }

    /// Compiles a grammar or finds it in the cache; waits for the compilation.
    pub fn prepare(&self, source: &GrammarSource) -> Result<Prepared, PrepareError> {
        let (sender, receiver) = sync_channel(1);
        self.prepare_then(
            source,
            || true,
            move |outcome| {
                let _ = sender.send(outcome);
            },
        );
        receiver.recv().unwrap_or_else(|_| Err(PrepareError::Busy("the compiler stopped".into())))
    }

    /// Finds a grammar in the cache or queues its compilation, and calls `done` with the outcome. Never waits. The
    /// compilation is skipped if the request is gone when its turn comes.
    pub fn prepare_then(
        &self,
        source: &GrammarSource,
        is_wanted: impl Fn() -> bool + Send + 'static,
        done: impl FnOnce(Result<Prepared, PrepareError>) + Send + 'static,
    ) {
        if let Some(found) = self.compiler.find(source) {
            return done(found.map(Prepared).map_err(PrepareError::Refused));
        }
        if self.compiler.live.get() > MAX_LIVE_BYTES {
            return done(Err(PrepareError::Busy("the grammars in use take too much memory".into())));
        }
        let job = Job {
            source: source.clone(),
            is_wanted: Box::new(is_wanted),
            done: Box::new(move |outcome| done(outcome.map(Prepared))),
        };
        // the threads live as long as this sender; if sending fails, dropping the job reports the failure to its owner
        let _ = self.jobs.send(job);
    }

    /// The state of a sequence that has generated `generated_ids` so far; waits for the compilation if the grammar is
    /// not cached.
    pub fn begin(&self, source: &GrammarSource, generated_ids: &[u32]) -> Result<GrammarState, GrammarError> {
        self.compiler.begin(source, generated_ids, true)
    }

    /// Like [`Self::begin`], on a separate thread. If `is_judge`, memory of other sequences may fail this one. Only one
    /// rank is the judge, because ranks must agree.
    pub(crate) fn begin_later(
        &self,
        source: GrammarSource,
        generated_ids: Vec<u32>,
        is_judge: bool,
    ) -> Receiver<Result<GrammarState, GrammarError>> {
        let (sender, receiver) = sync_channel(1);
        let compiler = self.compiler.clone();
        let failed = sender.clone();
        let thread = std::thread::Builder::new().name("grammar-begin".into()).spawn(move || {
            let _ = sender.send(compiler.begin(&source, &generated_ids, is_judge));
        });
        if let Err(error) = thread {
            let _ = failed.send(Err(GrammarError(format!("no thread to begin it: {error}"))));
        }
        receiver
    }
}

impl Compiler {
    fn find(&self, source: &GrammarSource) -> Option<Result<Arc<Compiled>, GrammarError>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).get(source)
    }

    fn keep(&self, source: &GrammarSource, outcome: &Result<Arc<Compiled>, GrammarError>) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).add(source, outcome);
    }

    fn begin(
        self: &Arc<Self>,
        source: &GrammarSource,
        generated_ids: &[u32],
        is_judge: bool,
    ) -> Result<GrammarState, GrammarError> {
        let compiled = match self.find(source) {
            Some(found) => found?,
            None => {
                let compiling = compile::spawn(self, source);
                let compiling = compiling.ok_or_else(|| GrammarError("no thread to compile it".into()))?;
                compiling.recv().unwrap_or_else(|_| Err(GrammarError("it can't be compiled".into())))?
            }
        };
        let parser = compiled.parser.lock().unwrap_or_else(PoisonError::into_inner).deep_clone();
        let mut state = GrammarState::new(parser, LiveBytes::new(&self.live, is_judge));
        state.resume(generated_ids).map_err(|GrammarError(reason)| {
            GrammarError(format!("the tokens generated so far do not match it: {reason}"))
        })?;
        Ok(state)
    }

    fn compile(&self, source: &GrammarSource) -> Result<Arc<Compiled>, GrammarError> {
        let begun = Instant::now();
        let tag = match source.kind {
            GrammarKind::JsonSchema => "json_schema",
            GrammarKind::Regex => "regex",
            GrammarKind::Lark => "lark",
        };
        let failed = |error: &dyn std::fmt::Display| GrammarError(first_line(&error.to_string()));
        let grammar = TopLevelGrammar::from_tagged_str(tag, &source.text).map_err(|error| failed(&error))?;
        let mut parser = self.factory.create_parser(grammar).map_err(|error| failed(&error))?;
        parser.start_without_prompt();
        // refuses a grammar that matches nothing, or whose first mask exceeds the limits
        let mut first = GrammarState::new(parser.deep_clone(), LiveBytes::new(&self.live, false));
        if first.mask()?.iter().all(|word| *word == 0) {
            return Err(GrammarError("no text matches it".into()));
        }
        let mut live = LiveBytes::new(&self.live, false);
        live.set(memory::of_parser(&parser, 0));
        self.seconds.observe(begun.elapsed().as_secs_f64());
        Ok(Arc::new(Compiled { parser: Mutex::new(parser), live }))
    }
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").finish_non_exhaustive()
    }
}

/// First line of the compiler's error. The message of a panic is not shown to clients.
fn first_line(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    if line.starts_with("panic:") { "it can't be compiled".into() } else { line.chars().take(500).collect() }
}

#[cfg(test)]
mod tests;
