//! The state of one sequence in its grammar.

use std::fmt::Display;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use llguidance::api::StopReason;
use llguidance::toktrie::SimpleVob;
use llguidance::{TokenParser, panic_utils};

use super::GrammarError;
use super::memory::{self, LiveBytes, MAX_STATE_BYTES};

/// One bit per token ID of the vocabulary, starting at the lowest bit of the first word; 1 means allowed. Token IDs
/// beyond the mask are not allowed.
pub type Mask = Arc<[u32]>;

/// The state of a sequence in its grammar. An error is final.
///
/// Lexer states are created as they are reached, and each token adds a row to the parser. If the tables of a state
/// exceed [`MAX_STATE_BYTES`], the state fails, and its sequence with it. A state also fails if it grows while all
/// states of the process together exceed [`MAX_LIVE_BYTES`](memory::MAX_LIVE_BYTES), on the rank that decides.
pub struct GrammarState {
    parser: TokenParser,
    /// Upper bound of the items in the parser's rows.
    items: usize,
    live: LiveBytes,
    failed: Option<GrammarError>,
}

impl GrammarState {
    pub(super) fn new(parser: TokenParser, live: LiveBytes) -> Self {
        let mut state = Self { parser, items: 0, live, failed: None };
        state.live.set(memory::of_parser(&state.parser, 0));
        state
    }

    /// Accepts a sampled token. Tokens after the end are ignored, because the sequence is about to be released.
    pub fn accept(&mut self, id: u32) -> Result<(), GrammarError> {
        if self.is_stopped() && self.failed.is_none() {
            return Ok(());
        }
        self.consume(id)?;
        self.check_memory()
    }

    /// Accepts tokens that another group generated.
    pub(super) fn resume(&mut self, ids: &[u32]) -> Result<(), GrammarError> {
        ids.iter().try_for_each(|id| self.consume(*id).and_then(|()| self.check_memory()))
    }

    /// The token IDs that may follow: those of the language, and the end-of-sequence token if the output may end here
    /// (only that token if it must).
    pub fn mask(&mut self) -> Result<Mask, GrammarError> {
        let mask = self.compute_mask()?;
        self.check_memory()?;
        Ok(mask.as_slice().into())
    }

    /// The mask of the next token, and the masks after each of `draft_tokens` as far as they match the grammar; at
    /// least one. The state is not advanced.
    pub fn masks_along(&mut self, draft_tokens: &[u32]) -> Result<Vec<Mask>, GrammarError> {
        let mut masks = vec![self.mask()?];
        let items = self.items;
        let mut accepted = 0;
        for draft in draft_tokens {
            // after the end nothing is accepted, so nothing could be rolled back
            if self.is_stopped() || !allows(&masks[accepted], *draft) {
                break;
            }
            self.consume(*draft)?;
            accepted += 1;
            masks.push(self.mask()?);
        }
        if accepted > 0 {
            self.attempt(|parser| parser.rollback(accepted))?;
            self.items = items;
        }
        Ok(masks)
    }

    /// Whether the output may end here.
    pub fn may_end(&mut self) -> bool {
        self.is_stopped() || self.attempt(|parser| Ok::<_, String>(parser.is_accepting())).unwrap_or(false)
    }

    /// Estimated bytes of the tables.
    pub fn bytes(&self) -> usize {
        self.live.bytes()
    }

    fn compute_mask(&mut self) -> Result<SimpleVob, GrammarError> {
        if self.is_stopped() && self.failed.is_none() {
            return Ok(self.parser.token_env.tok_trie().eos_token_set());
        }
        self.attempt(TokenParser::compute_mask)
    }

    fn is_stopped(&self) -> bool {
        self.parser.stop_reason() != StopReason::NotStopped
    }

    fn consume(&mut self, id: u32) -> Result<(), GrammarError> {
        let before = self.parser.parser_stats().all_items;
        let backtracked = self.attempt(|parser| parser.consume_token(id))?;
        self.attempt(TokenParser::check_stop)?;
        self.items += self.parser.parser_stats().all_items.saturating_sub(before);
        if backtracked > 0 {
            return Err(self.fail(GrammarError("it reverts sampled tokens".into())));
        }
        Ok(())
    }

    /// Fails the state if its tables exceed the limits.
    fn check_memory(&mut self) -> Result<(), GrammarError> {
        let bytes = memory::of_parser(&self.parser, self.items);
        let grew = self.live.set(bytes);
        if bytes > MAX_STATE_BYTES {
            let reason = format!("matching it takes more than {} MiB of memory", MAX_STATE_BYTES >> 20);
            return Err(self.fail(GrammarError(reason)));
        }
        if grew && self.live.exceeds_total() {
            let reason = "the grammars in use take too much memory for this one to continue";
            return Err(self.fail(GrammarError(reason.into())));
        }
        Ok(())
    }

    fn attempt<T, E: Display>(
        &mut self,
        work: impl FnOnce(&mut TokenParser) -> Result<T, E>,
    ) -> Result<T, GrammarError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let parser = &mut self.parser;
        let outcome =
            panic_utils::catch_unwind(AssertUnwindSafe(|| Ok(work(parser).map_err(|error| error.to_string()))));
        let reason = match outcome {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(reason)) => reason,
            Err(panicked) => panicked.to_string(),
        };
        Err(self.fail(GrammarError(super::first_line(&reason))))
    }

    fn fail(&mut self, error: GrammarError) -> GrammarError {
        self.failed = Some(error.clone());
        error
    }
}

/// Whether `mask` allows `id`.
pub(crate) fn allows(mask: &Mask, id: u32) -> bool {
    mask.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1)
}
