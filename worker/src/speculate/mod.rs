//! Speculation without a draft model: an agent's responses repeat much of what stands before them (the file that it edits, the
//! call that it makes again), so the token IDs that followed the last few token IDs the time before are good draft tokens at what comes now.
//!
//! The draft tokens ("drafts") are computed as further rows of the sequence's decode step. At each row the id is sampled as it would be
//! sampled without them: by the same seed, position, penalties and grammar, given the token IDs before it. The draft tokens are kept as long
//! as they are what was sampled, so the token IDs are those of a run without speculation, greedy or not; only the number of steps
//! differs. What a rejected row left in the KV cache lies behind the sequence's end and is written over by its next step.
//!
//! - [`index`](SuffixIndex): where the last token IDs stood before. Constant time and eight bytes an id, for running sequences only,
//!   so it is bounded by the KV cache.
//! - [`gain`](Speculator): how many draft tokens are worth their rows, by how many of this sequence's came true of late and by what a
//!   row costs beside the step. In a large batch a row costs as much as it can bring, and nothing is drafted.

mod gain;
mod index;

use serde::Deserialize;

pub(crate) use gain::{Speculator, worthwhile};
use index::SuffixIndex;

/// How token IDs are drafted; fields are named as in vLLM's `--speculative-config`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SpeculativeOptions {
    /// Where draft tokens come from.
    pub method: SpeculativeMethod,
    /// Draft tokens of a sequence in one step, at most; 0 = no speculation.
    pub num_speculative_tokens: u32,
    /// Ids that must have stood before in this order; at least 1.
    pub prompt_lookup_min: u32,
    /// Ids that are compared at most, to choose among several places.
    pub prompt_lookup_max: u32,
}

/// Where draft tokens come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SpeculativeMethod {
    /// What followed the same token IDs before, in the prompt or in the response.
    #[default]
    Ngram,
}

/// Draft tokens of a sequence in one step, whatever is configured.
pub const MAX_DRAFTS: u32 = 31;

impl Default for SpeculativeOptions {
    fn default() -> Self {
        Self {
            method: SpeculativeMethod::Ngram,
            num_speculative_tokens: 15,
            prompt_lookup_min: 3,
            prompt_lookup_max: 64,
        }
    }
}

impl std::str::FromStr for SpeculativeOptions {
    type Err = String;

    /// Of a flag's JSON.
    fn from_str(json: &str) -> Result<Self, String> {
        let options: Self = serde_json::from_str(json).map_err(|error| error.to_string())?;
        options.check().map_err(|(field, reason)| format!("{field}: {reason}"))?;
        Ok(options)
    }
}

impl SpeculativeOptions {
    /// No speculation at all.
    pub fn off() -> Self {
        Self { num_speculative_tokens: 0, ..Self::default() }
    }

    /// The field that can't be as it is, and why.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let found = self.num_speculative_tokens;
        if found > MAX_DRAFTS {
            return Err(("num_speculative_tokens", format!("expected 0 to {MAX_DRAFTS}, found {found}")));
        }
        if self.prompt_lookup_min == 0 || self.prompt_lookup_min > 16 {
            return Err(("prompt_lookup_min", format!("expected 1 to 16, found {}", self.prompt_lookup_min)));
        }
        if self.prompt_lookup_max < self.prompt_lookup_min || self.prompt_lookup_max > 1_024 {
            let (least, found) = (self.prompt_lookup_min, self.prompt_lookup_max);
            return Err(("prompt_lookup_max", format!("expected prompt_lookup_min ({least}) to 1024, found {found}")));
        }
        Ok(())
    }
}
