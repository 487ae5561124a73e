//! Grammars that load in the background while the worker loads its weights.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use bora_common::tokenizer::TokenizerError;

use super::Grammars;

/// Outcome of loading: `None` if the model has no tokenizer.
type Outcome = Result<Option<Arc<Grammars>>, String>;

/// Handle of a compiler of grammars that is still loading; clones share it.
#[derive(Clone, Debug)]
pub struct PendingGrammars {
    outcome: Arc<OnceLock<Outcome>>,
}

impl PendingGrammars {
    /// No compiler.
    pub fn none() -> Self {
        Self { outcome: Arc::new(OnceLock::from(Ok(None))) }
    }

    /// Starts to load a tokenizer file or model directory on a separate thread.
    pub fn load(tokenizer: PathBuf) -> std::io::Result<Self> {
        let pending = Self { outcome: Arc::default() };
        let outcome = pending.outcome.clone();
        std::thread::Builder::new().name("grammars".into()).spawn(move || {
            let loaded = catch_unwind(AssertUnwindSafe(|| Grammars::load(&tokenizer)));
            // always set, because callers wait for it
            let _ = outcome.set(match loaded {
                Ok(Ok(grammars)) => Ok(Some(Arc::new(grammars))),
                // token IDs in, token IDs out: the router decides whether a tokenizer is required
                Ok(Err(TokenizerError::Missing(_))) => Ok(None),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("{}: reading it failed", tokenizer.display())),
            });
        })?;
        Ok(pending)
    }

    /// Waits until loading ends. The error says what is wrong with the tokenizer.
    pub fn wait(&self) -> Outcome {
        self.outcome.wait().clone()
    }
}
