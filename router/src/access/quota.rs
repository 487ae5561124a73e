//! What a request takes of its tenant's tokens per minute.
//!
//! Tokens are reserved when the prompt is encoded and settled when the request ends: what was not used goes back. What is
//! generated beyond the reservation is taken while it is generated, so that later requests see it; the bucket may owe. A
//! request larger than a minute's worth passes when the bucket is full.
//!
//! - The prompt weighs its tokens, and twice as much with `prompt_logprobs`.
//! - The output is reserved up to `max_tokens` if the client gave it, and otherwise up to what the tenant's requests
//!   generated lately ([`ExpectedOutput`]), but never more than the model's window leaves.
//! - What counts in the end is what the group generated, whether or not the client read it.
//! - Encoding and counting tokens takes a tenth of them.

use std::sync::{Mutex, PoisonError};

use super::{Caller, limits::Slot};
use crate::api::error::ApiError;

/// How much a prompt token weighs if its logprobs are asked for: no cached block spares it, and the output layer is
/// computed at every position.
const PROMPT_LOGPROBS_WEIGHT: f64 = 2.0;
/// How much a token weighs that is only encoded, decoded or counted.
const ENCODED_WEIGHT: f64 = 0.1;
/// Completion tokens that a sequence is expected to have before the tenant has generated any.
const FIRST_EXPECTED_TOKENS: f64 = 512.0;
const MIN_EXPECTED_TOKENS: f64 = 16.0;
const MAX_EXPECTED_TOKENS: f64 = 8192.0;
/// Weight of the latest request in the mean.
const MEAN_STEP: f64 = 1.0 / 16.0;

/// A request as far as quotas go.
#[derive(Clone, Copy, Debug, Default)]
pub struct QuotaRequest {
    /// Of all its prompts.
    pub prompt_tokens: u64,
    /// Of the longest prompt.
    pub longest_prompt: u64,
    /// Whether logprobs of the prompt are asked for.
    pub prompt_logprobs: bool,
    /// Sequences of all its prompts.
    pub sequences: u64,
    /// Most completion tokens of all its sequences together.
    pub max_tokens: u64,
    /// Whether the client named `max_tokens`.
    pub names_max_tokens: bool,
}

/// The mean number of tokens that a tenant's sequences generated lately.
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
    /// Lets a request in that has begun, or says why not (403, 429). What it takes is settled when the permit is dropped.
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

    /// Takes what encoding, decoding or counting that many tokens weighs. The bucket may owe.
    pub fn charge_encoded(&self, tokens: u64) {
        if let Some(bucket) = &self.tenant.tokens {
            bucket.give_back(-(tokens as f64) * ENCODED_WEIGHT);
        }
    }
}

/// A request that was let in.
#[derive(Debug)]
pub struct Permit {
    caller: Caller,
    _slot: Slot,
    /// Taken from the bucket so far.
    reserved: f64,
    /// What the prompt weighs.
    prompt: f64,
    sequences: f64,
    completion_tokens: u64,
}

impl Permit {
    /// A group generated tokens.
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
