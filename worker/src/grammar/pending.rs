//! Grammars that are made while something else is done: a worker's weights are read meanwhile.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use bora_common::tokenizer::TokenizerError;

use super::Grammars;

/// What comes of it: `None` where the model has no tokenizer.
type Outcome = Result<Option<Arc<Grammars>>, String>;

/// A handle on grammars that are there later; clones share them.
#[derive(Clone, Debug)]
pub struct PendingGrammars {
    outcome: Arc<OnceLock<Outcome>>,
}

impl PendingGrammars {
    /// None at all.
    pub fn none() -> Self {
        Self { outcome: Arc::new(OnceLock::from(Ok(None))) }
    }

    /// Begins to read a tokenizer file or model directory, on a thread of its own.
    pub fn load(tokenizer: PathBuf) -> std::io::Result<Self> {
        let pending = Self { outcome: Arc::default() };
        let outcome = pending.outcome.clone();
        std::thread::Builder::new().name("grammars".into()).spawn(move || {
            let loaded = catch_unwind(AssertUnwindSafe(|| Grammars::load(&tokenizer)));
            // set in any case: somebody waits for it
            let _ = outcome.set(match loaded {
                Ok(Ok(grammars)) => Ok(Some(Arc::new(grammars))),
                // token IDs in, token IDs out: the router says whether it needs one
                Ok(Err(TokenizerError::Missing(_))) => Ok(None),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("{}: reading it failed", tokenizer.display())),
            });
        })?;
        Ok(pending)
    }

    /// Waits until they are there; an error says what is wrong with the tokenizer.
    pub fn wait(&self) -> Outcome {
        self.outcome.wait().clone()
    }
}
