//! The charge of a request against its tenant's tokens per minute.
//!
//! Tokens are reserved when the prompt is encoded and settled when the request ends: the unused part is returned.
//! Tokens beyond the reservation are charged while they are generated, so that later requests see them; the bucket may
//! become negative. A request larger than a minute's worth is admitted if the bucket is full.
//!
//! - The prompt costs its tokens, and twice as much with `prompt_logprobs`.
//! - The output is reserved up to `max_tokens` if the client set it, and otherwise up to the recent mean of the
//!   tenant's
//!   requests ([`ExpectedOutput`]), but never above the room in the model's context window.
//! - The final charge is what the group generated, whether or not the client read it.
//! - Encoding and counting tokens costs a tenth of them.

use std::sync::{Mutex, PoisonError};

use super::{Caller, limits::Slot};
use crate::api::error::ApiError;

/// Cost of a prompt token with logprobs: the prefix cache saves nothing, and the output layer runs at every position.
const PROMPT_LOGPROBS_WEIGHT: f64 = 2.0;
/// Cost of a token that is only encoded, decoded or counted.
const ENCODED_WEIGHT: f64 = 0.1;
/// Expected completion tokens of a sequence before the tenant has generated any.
const FIRST_EXPECTED_TOKENS: f64 = 512.0;
const MIN_EXPECTED_TOKENS: f64 = 16.0;
const MAX_EXPECTED_TOKENS: f64 = 8192.0;
/// Weight of the latest request in the mean.
const MEAN_STEP: f64 = 1.0 / 16.0;

/// The quantities of a request that quotas depend on.
#[derive(Clone, Copy, Debug, Default)]
pub struct QuotaRequest {
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Tokens of the longest prompt.
    pub longest_prompt: u64,
    /// Whether logprobs of the prompt are requested.
    pub prompt_logprobs: bool,
    /// Sequences over all prompts.
    pub sequences: u64,
    /// Maximum completion tokens of all sequences together.
    pub max_tokens: u64,
    /// Whether the client set `max_tokens`.
    pub names_max_tokens: bool,
}

/// The recent mean of completion tokens per sequence of a tenant.
#[derive(Debug)]
pub(super) struct ExpectedOutput(Mutex<f64>);

impl Default for ExpectedOutput {
    fn default() -> Self {
        Self(Mutex::new(FIRST_EXPECTED_TOKENS))
    }
}

impl ExpectedOutput {
    fn tokens(&self) -> f64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clamp(MIN_EXPECTED_TOKENS, MAX_EXPECTED_TOKENS)
    }

    fn observe(&self, tokens: f64) {
        let mut mean = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *mean += (tokens - *mean) * MEAN_STEP;
    }
}

impl Caller {
    /// Admits the tokens of a request that has begun, or refuses it (403, 429). The charge is settled when the permit
    /// is dropped.
    pub fn admit(&self, wish: QuotaRequest, slot: Slot) -> Result<Permit, ApiError> {
        let tenant = &self.tenant;
        if let Some(most) = tenant.limits.max_context
            && wish.longest_prompt > u64::from(most)
        {
            let message =
                format!("This API key's prompts may have {most} tokens; this one has {}.", wish.longest_prompt);
            return Err(ApiError::forbidden(message));
        }
        let weight = if wish.prompt_logprobs { PROMPT_LOGPROBS_WEIGHT } else { 1.0 };
        let prompt = wish.prompt_tokens as f64 * weight;
        let output = if wish.names_max_tokens {
            wish.max_tokens as f64
        } else {
            (tenant.output.tokens() * wish.sequences as f64).min(wish.max_tokens as f64)
        };
        let mut reserved = 0.0;
        if let Some(bucket) = &tenant.tokens {
            reserved = prompt + output;
            if let Err(seconds) = bucket.take(reserved) {
                tenant.forget_request();
                return Err(ApiError::rate_limited(bucket.exhausted("tokens"), seconds));
            }
        }
        let sequences = wish.sequences.max(1) as f64;
        Ok(Permit { caller: self.clone(), _slot: slot, reserved, prompt, sequences, completion_tokens: 0 })
    }

    /// Charges the cost of encoding, decoding or counting that many tokens. The bucket may become negative.
    pub fn charge_encoded(&self, tokens: u64) {
        if let Some(bucket) = &self.tenant.tokens {
            bucket.give_back(-(tokens as f64) * ENCODED_WEIGHT);
        }
    }
}

/// The reservation of an admitted request.
#[derive(Debug)]
pub struct Permit {
    caller: Caller,
    _slot: Slot,
    /// Charged to the bucket so far.
    reserved: f64,
    /// The cost of the prompt.
    prompt: f64,
    sequences: f64,
    completion_tokens: u64,
}

impl Permit {
    /// Charges tokens that a group generated.
    pub fn generated(&mut self, tokens: u64) {
        self.completion_tokens += tokens;
        let used = self.used();
        if used > self.reserved
            && let Some(bucket) = &self.caller.tenant.tokens
        {
            bucket.give_back(self.reserved - used);
            self.reserved = used;
        }
    }

    fn used(&self) -> f64 {
        self.prompt + self.completion_tokens as f64
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let tenant = &self.caller.tenant;
        if let Some(bucket) = &tenant.tokens {
            bucket.give_back(self.reserved - self.used());
        }
        if self.completion_tokens > 0 {
            tenant.output.observe(self.completion_tokens as f64 / self.sequences);
        }
    }
}
