//! Configuration of an engine.

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

/// Options that an operator may tune.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EngineOptions {
    /// Maximum sequences that run at the same time.
    pub max_num_seqs: u32,
    /// Maximum tokens of a step, at least `max_num_seqs`.
    pub max_num_batched_tokens: u32,
    /// Target time of a step while sequences decode: prompts are cut into chunks that fit. Default: 50 ms, or the time
    /// of a decode step plus 1,024 prompt tokens if that is longer, limited to ten decode steps.
    #[serde(deserialize_with = "some_seconds")]
    pub step_seconds: Option<Duration>,
    /// Target time of a step while no sequence decodes: bounds how long a new request or an abort waits.
    #[serde(deserialize_with = "seconds")]
    pub idle_step_seconds: Duration,
    /// Maximum waiting sequences of each priority class; further ones are refused.
    pub max_waiting: u32,
    /// Whether later sequences reuse computed blocks.
    pub prefix_cache: bool,
    /// Speculative decoding. Default: on a CPU as in [`SpeculativeOptions::default`], on other devices off.
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
    /// Maximum rows of logits in a step; backends size their buffers by it.
    pub fn max_logit_rows(&self) -> usize {
        (self.max_num_seqs as usize + crate::schedule::MAX_SCORED_POSITIONS).min(self.max_num_batched_tokens as usize)
    }
}

/// Everything that the engine needs to know of its group.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Options that an operator may tune.
    pub options: EngineOptions,
    /// Epoch of the group, part of every event.
    pub epoch: u64,
    /// Blocks of KV cache.
    pub kv_blocks: u32,
    /// Host memory for offloaded blocks.
    pub host: HostMemory,
    /// Maximum tokens of prompt plus output.
    pub max_model_len: u32,
    /// Vocabulary size: token IDs are below it.
    pub vocabulary_size: u32,
    /// Token IDs that end a sequence unless it ignores them.
    pub eos_ids: Vec<u32>,
    /// Whether the group accepts images.
    pub images: bool,
    /// Measured speed, from which the time of a chunk is predicted.
    pub speed: Speed,
    /// Minimum prompt tokens of a step, however long the step takes.
    pub least_chunk: usize,
    /// Number of steps that the runner has run already; the engine's first step follows them.
    pub steps_run: u64,
    /// Compiler of grammars; `None` refuses requests with a grammar.
    pub grammars: Option<Arc<Grammars>>,
    /// Keys of block and image names.
    pub keys: ClusterKeys,
}

/// Why the engine can't start with a configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("engine: {0}")]
pub struct EngineConfigError(String);

impl EngineConfig {
    /// The configuration that the group's record announces.
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

    /// Refuses an invalid configuration. The error names the key and the limit.
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
            return wrong("max_model_len must be at least 2: one prompt token and one output token".into());
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
            return wrong(format!(
                "end-of-sequence token ID {id} lies outside the vocabulary of {}",
                self.vocabulary_size
            ));
        }
        Ok(())
    }

    fn kv_tokens(&self) -> u64 {
        u64::from(self.kv_blocks) * BLOCK_TOKENS as u64
    }
}
