use serde::{Deserialize, Serialize};

use crate::grammar::GrammarSource;

/// How a sequence's token IDs are sampled, already checked. Order of application, as in vLLM: logit bias and
/// masks, penalties, temperature, min-p, top-k, top-p.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// 0 = greedy.
    pub temperature: f32,
    /// (0, 1]; 1 = off.
    pub top_p: f32,
    /// 0 = off.
    pub top_k: u32,
    /// [0, 1]; 0 = off.
    pub min_p: f32,
    /// Subtracted once from token IDs that were generated before.
    pub presence_penalty: f32,
    /// Subtracted for every time an id was generated before.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of token IDs in prompt or output; 1 = off.
    pub repetition_penalty: f32,
    /// Added to the logits of these token IDs.
    pub logit_bias: Vec<(u32, f32)>,
    /// Key of the random stream; the position of the sampled token is its counter.
    pub seed: u64,
    /// Ids masked until `min_tokens` token IDs were generated (end of sequence and stop token IDs).
    pub end_ids: Vec<u32>,
    /// See `end_ids`; generated token IDs of an earlier group count.
    pub min_tokens: u32,
    /// Logprobs of sampled token IDs with this many alternatives; `None` = no logprobs.
    pub logprobs: Option<u32>,
    /// What the generated token IDs must match; `None` = anything.
    pub grammar: Option<GrammarSource>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
            end_ids: Vec::new(),
            min_tokens: 0,
            logprobs: None,
            grammar: None,
        }
    }
}
