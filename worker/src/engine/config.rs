//! What an engine is given at its start.

use std::sync::Arc;
use std::time::Duration;

use bora_common::blocks::BLOCK_TOKENS;
use bora_common::config::{seconds, some_seconds};
use bora_common::registry::{GroupRecord, Speed};
use bora_common::secret::ClusterKeys;
use serde::Deserialize;

use crate::engine::step::HostMemory;
use crate::grammar::Grammars;
use crate::speculate::SpeculativeOptions;

/// What an operator may tune.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EngineOptions {
    /// Sequences that run at once.
    pub max_num_seqs: u32,
    /// Tokens in a step, whatever the time they take; at least `max_num_seqs`.
    pub max_num_batched_tokens: u32,
    /// Predicted time of a step while streams are being decoded: prompts are cut into chunks that fit. Where absent 50 ms, or
    /// where that is longer what a decode step and 1,024 tokens of prompts take, at most ten decode steps.
    #[serde(deserialize_with = "some_seconds")]
    pub step_seconds: Option<Duration>,
    /// The same while nothing is being decoded: how long a new request or an abort may have to wait.
    #[serde(deserialize_with = "seconds")]
    pub idle_step_seconds: Duration,
    /// Sequences that may wait, for each priority class; one more is refused.
    pub max_waiting: u32,
    /// Whether computed blocks are found again.
    pub prefix_cache: bool,
    /// How token IDs are drafted; if absent, a CPU draft tokens as [`SpeculativeOptions`] do by themselves, other devices do not.
    pub speculative: Option<SpeculativeOptions>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            max_num_seqs: 256,
            max_num_batched_tokens: 8_192,
            step_seconds: None,
            idle_step_seconds: Duration::from_secs(1),
            max_waiting: 1_024,
            prefix_cache: true,
            speculative: None,
        }
    }
}

impl EngineOptions {
    /// Rows of a step whose logits are wanted, at most: backends size their buffers by it.
    pub fn max_logit_rows(&self) -> usize {
        (self.max_num_seqs as usize + crate::schedule::MAX_SCORED_POSITIONS).min(self.max_num_batched_tokens as usize)
    }
}

/// Everything the engine has to know of its group.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// What an operator may tune.
    pub options: EngineOptions,
    /// Changes with every start of the group; in every event.
    pub epoch: u64,
    /// Blocks of KV cache.
    pub kv_blocks: u32,
    /// Host memory that blocks may go to.
    pub host: HostMemory,
    /// Longest prompt plus output, tokens.
    pub max_model_len: u32,
    /// Ids are below this.
    pub vocabulary_size: u32,
    /// Ids that end a sequence unless it ignores them.
    pub eos_ids: Vec<u32>,
    /// Whether images are taken.
    pub images: bool,
    /// How fast the group is, for the time of a chunk.
    pub speed: Speed,
    /// Prompts get this many tokens of a step, however slow it already is.
    pub least_chunk: usize,
    /// Steps that the runner ran before: the first one of the engine follows them.
    pub steps_run: u64,
    /// What compiles grammars; `None` refuses them.
    pub grammars: Option<Arc<Grammars>>,
    /// What blocks and images are named under.
    pub keys: ClusterKeys,
}

/// The engine can't start like this.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("engine: {0}")]
pub struct EngineConfigError(String);

impl EngineConfig {
    /// As announced in the group's record.
    pub fn of_group(record: &GroupRecord, eos_ids: Vec<u32>, options: EngineOptions, keys: ClusterKeys) -> Self {
        Self {
            options: EngineOptions { max_num_seqs: record.max_sequences, ..options },
            epoch: record.epoch,
            kv_blocks: record.kv_blocks,
            host: HostMemory::default(),
            max_model_len: record.max_model_len,
            vocabulary_size: record.vocabulary_size,
            eos_ids,
            images: record.images,
            speed: record.speed,
            least_chunk: 1,
            steps_run: 0,
            grammars: None,
            keys,
        }
    }

    /// Refuses what can't work.
    pub fn check(&self) -> Result<(), EngineConfigError> {
        let wrong = |reason: String| Err(EngineConfigError(reason));
        let options = &self.options;
        if options.max_num_seqs == 0 {
            return wrong("max_num_seqs must be at least 1".into());
        }
        if options.max_num_batched_tokens < options.max_num_seqs {
            return wrong(format!(
                "max_num_batched_tokens ({}) must be at least max_num_seqs ({}): every running sequence \
                 decodes in every step",
                options.max_num_batched_tokens, options.max_num_seqs
            ));
        }
        if let Some(Err((field, reason))) = options.speculative.as_ref().map(SpeculativeOptions::check) {
            return wrong(format!("speculative.{field}: {reason}"));
        }
        if options.max_waiting == 0 {
            return wrong("max_waiting must be at least 1".into());
        }
        if self.max_model_len < 2 {
            return wrong("max_model_len must be at least 2: one token in, one token out".into());
        }
        if u64::from(self.max_model_len) > self.kv_tokens() {
            return wrong(format!(
                "max_model_len ({}) does not fit into the KV cache of {} blocks ({} tokens)",
                self.max_model_len,
                self.kv_blocks,
                self.kv_tokens()
            ));
        }
        if let Some(id) = self.eos_ids.iter().find(|id| **id >= self.vocabulary_size) {
            return wrong(format!("end-of-sequence id {id} lies outside the vocabulary of {}", self.vocabulary_size));
        }
        Ok(())
    }

    fn kv_tokens(&self) -> u64 {
        u64::from(self.kv_blocks) * BLOCK_TOKENS as u64
    }
}
