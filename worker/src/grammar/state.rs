//! Where one sequence stands in its grammar.

use std::sync::Arc;

use llguidance::Matcher;

use super::GrammarError;

/// One bit for each id of the vocabulary, from the lowest bit of the first word on; 1 = may be drawn. Ids
/// beyond its end may not.
pub type Mask = Arc<[u32]>;

/// Where a sequence stands in its grammar.
pub struct GrammarState {
    matcher: Matcher,
}

impl GrammarState {
    pub(super) fn new(matcher: Matcher) -> Self {
        Self { matcher }
    }

    /// An id was drawn. After the end of the text, whatever follows is ignored: the sequence is about to be
    /// released.
    pub fn accept(&mut self, id: u32) -> Result<(), GrammarError> {
        if self.matcher.is_stopped() && self.matcher.get_error().is_none() {
            return Ok(());
        }
        self.matcher.consume_token(id).map_err(|error| GrammarError(error.to_string()))
    }

    /// The ids that may come next: those of the language, and the end-of-sequence id where the text may end
    /// (it alone where it must).
    pub fn mask(&mut self) -> Result<Mask, GrammarError> {
        let mask = self.matcher.compute_mask_or_eos().map_err(|error| GrammarError(error.to_string()))?;
        Ok(mask.as_slice().into())
    }

    /// The masks of the next id and of those that follow each of `guesses`, as far as they are in the language: one at least.
    /// The state stays where it is.
    pub fn masks_along(&mut self, guesses: &[u32]) -> Result<Vec<Mask>, GrammarError> {
        let mut masks = vec![self.mask()?];
        let mut accepted = 0;
        for guess in guesses {
            // after the end nothing is accepted, and nothing could be taken back
            if self.matcher.is_stopped() || !allows(&masks[accepted], *guess) {
                break;
            }
            self.matcher.consume_token(*guess).map_err(|error| GrammarError(error.to_string()))?;
            accepted += 1;
            masks.push(self.mask()?);
        }
        if accepted > 0 {
            self.matcher.rollback(accepted).map_err(|error| GrammarError(error.to_string()))?;
        }
        Ok(masks)
    }

    /// Whether the text may end here.
    pub fn may_end(&mut self) -> bool {
        self.matcher.is_stopped() || self.matcher.is_accepting().unwrap_or(false)
    }
}

/// Whether `mask` lets `id` be drawn.
pub(crate) fn allows(mask: &Mask, id: u32) -> bool {
    mask.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1)
}
