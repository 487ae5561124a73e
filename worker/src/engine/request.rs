//! A checked request: everything that could make it impossible to run on this group has been refused.

use bora_common::blocks::ImageSpan;
use bora_proto::v1;

use super::config::EngineConfig;
use super::error::EngineError;
use crate::grammar::{GrammarError, GrammarSource};
use crate::sample::SamplingParams;

/// Maximum bytes of a request ID.
pub(crate) const MAX_REQUEST_ID: usize = 256;
/// Maximum bytes of a cache salt.
pub(crate) const MAX_CACHE_SALT: usize = 256;
/// Maximum stop token IDs of a request.
pub(crate) const MAX_STOP_IDS: usize = 256;
/// Maximum entries of a logit bias.
pub(crate) const MAX_LOGIT_BIAS: usize = 1_024;
/// Maximum logprob alternatives per position.
pub(crate) const MAX_LOGPROBS: u32 = 20;
/// Maximum images of a request.
pub(crate) const MAX_IMAGES: usize = 256;
/// Maximum bytes of an encoded image.
pub(crate) const MAX_IMAGE_BYTES: usize = 20 * 1024 * 1024;

/// Priority class, which is also the queue that a sequence waits in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    /// A user is waiting for the response.
    Interactive,
    /// Runs with the capacity that interactive sequences leave.
    Batch,
}

/// A request in the form that the scheduler needs.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// Request ID for logs.
    pub request_id: String,
    /// The prompt, then tokens that another group generated.
    pub token_ids: Vec<u32>,
    /// Tokens of the prompt alone.
    pub prompt_len: usize,
    /// Sampling parameters.
    pub sampling: SamplingParams,
    /// Maximum generated tokens, those of another group included.
    pub max_tokens: u32,
    /// Token IDs that end the sequence once `sampling.min_tokens` tokens were generated.
    pub end_ids: Vec<u32>,
    /// Alternatives at each prompt position, if prompt logprobs are requested.
    pub prompt_logprobs: Option<u32>,
    /// Images within the prompt.
    pub images: Vec<ImageSpan>,
    /// Cache salt, which separates tenants.
    pub salt: Vec<u8>,
    /// Priority class.
    pub class: Class,
}

impl Request {
    /// Checks a request against the group's configuration. The error names the field and the limit.
    pub(crate) fn check(request: v1::GenerateRequest, config: &EngineConfig) -> Result<Self, EngineError> {
        let class = match request.priority() {
            v1::Priority::Batch => Class::Batch,
            v1::Priority::Interactive | v1::Priority::Unspecified => Class::Interactive,
        };
        at_most("request_id", "bytes", request.request_id.len(), MAX_REQUEST_ID)?;
        at_most("cache_salt", "bytes", request.cache_salt.len(), MAX_CACHE_SALT)?;
        let prompt_len = check_token_ids(&request, config)?;
        let images = check_images(&request.images, prompt_len, config)?;
        let logprobs = request.logprobs.unwrap_or_default();
        for (field, top) in [("logprobs.top", logprobs.top), ("logprobs.prompt_top", logprobs.prompt_top)] {
            at_most(field, "alternatives", top.unwrap_or(0) as usize, MAX_LOGPROBS as usize)?;
        }
        let stopping = request.stopping.unwrap_or_default();
        at_most("stopping.stop_token_ids", "ids", stopping.stop_token_ids.len(), MAX_STOP_IDS)?;
        if let Some(id) = stopping.stop_token_ids.iter().find(|id| **id >= config.vocabulary_size) {
            return Err(outside("stopping.stop_token_ids", *id, config));
        }
        if stopping.max_tokens == 0 && logprobs.prompt_top.is_none() {
            return Err(EngineError::invalid("stopping.max_tokens", "must be at least 1"));
        }
        if stopping.min_tokens > stopping.max_tokens {
            return Err(EngineError::invalid(
                "stopping.min_tokens",
                format!("{} is more than max_tokens ({})", stopping.min_tokens, stopping.max_tokens),
            ));
        }
        let mut end_ids = stopping.stop_token_ids;
        if !stopping.ignore_eos {
            end_ids.extend(&config.eos_ids);
        }
        end_ids.sort_unstable();
        end_ids.dedup();
        let mut sampling = check_sampling(request.sampling.unwrap_or_default(), config)?;
        sampling.logprobs = logprobs.top;
        sampling.min_tokens = stopping.min_tokens;
        if sampling.min_tokens > 0 {
            sampling.end_ids.clone_from(&end_ids);
        }
        sampling.grammar = request.grammar.map(|grammar| check_grammar(grammar, config)).transpose()?;
        if sampling.grammar.is_some() && sampling.min_tokens > 0 {
            return Err(EngineError::invalid(
                "stopping.min_tokens",
                "is not supported with a grammar, which may end the output earlier",
            ));
        }
        Ok(Self {
            request_id: request.request_id,
            prompt_len,
            sampling,
            max_tokens: stopping.max_tokens,
            end_ids,
            // a resumed request received them from its first group
            prompt_logprobs: logprobs.prompt_top.filter(|_| request.generated_len == 0),
            token_ids: request.token_ids,
            images,
            salt: request.cache_salt,
            class,
        })
    }
}

/// Checks the limits of a grammar; it is compiled later.
fn check_grammar(grammar: v1::Grammar, config: &EngineConfig) -> Result<GrammarSource, EngineError> {
    let invalid = |GrammarError(reason): GrammarError| EngineError::invalid("grammar", reason);
    if config.grammars.is_none() {
        return Err(EngineError::invalid("grammar", "this group has no tokenizer, which grammars need"));
    }
    GrammarSource::try_from(grammar).map_err(invalid)
}

fn at_most(field: &'static str, what: &str, count: usize, limit: usize) -> Result<(), EngineError> {
    if count > limit {
        return Err(EngineError::invalid(field, format!("{count} {what}, at most {limit} are allowed")));
    }
    Ok(())
}

fn outside(field: &'static str, id: u32, config: &EngineConfig) -> EngineError {
    EngineError::invalid(field, format!("token ID {id} lies outside the vocabulary (0..{})", config.vocabulary_size))
}

/// Returns the number of prompt tokens.
fn check_token_ids(request: &v1::GenerateRequest, config: &EngineConfig) -> Result<usize, EngineError> {
    let total = request.token_ids.len();
    let generated = request.generated_len as usize;
    if generated >= total {
        let reason = if total == 0 { "must not be empty" } else { "must begin with a prompt" };
        return Err(EngineError::invalid("token_ids", reason));
    }
    let prompt_len = total - generated;
    // at least one token must fit after the prompt
    let max_prompt = config.max_model_len as usize - 1;
    if prompt_len > max_prompt || total > config.max_model_len as usize {
        return Err(EngineError::invalid(
            "token_ids",
            format!("{total} tokens, at most {max_prompt} fit into the window of {}", config.max_model_len),
        ));
    }
    match request.token_ids.iter().find(|id| **id >= config.vocabulary_size) {
        Some(id) => Err(outside("token_ids", *id, config)),
        None => Ok(prompt_len),
    }
}

fn check_images(images: &[v1::Image], prompt_len: usize, config: &EngineConfig) -> Result<Vec<ImageSpan>, EngineError> {
    if !images.is_empty() && !config.images {
        return Err(EngineError::invalid("images", "this group takes no images"));
    }
    at_most("images", "images", images.len(), MAX_IMAGES)?;
    let mut spans: Vec<ImageSpan> = Vec::with_capacity(images.len());
    for image in images {
        at_most("images.data", "bytes", image.data.len(), MAX_IMAGE_BYTES)?;
        let Ok(hash) = <[u8; 16]>::try_from(&image.hash[..]) else {
            return Err(EngineError::invalid("images.hash", "must have 16 bytes"));
        };
        // the content of a block depends on its images, so their hashes are verified
        if config.keys.image_hash(&image.data) != u128::from_le_bytes(hash) {
            return Err(EngineError::invalid("images.hash", "is not that of the data under this cluster's keys"));
        }
        let (offset, length) = (image.offset as usize, image.length as usize);
        let previous_end = spans.last().map_or(0, |span| span.offset + span.length);
        if length == 0 || offset < previous_end || offset + length > prompt_len {
            return Err(EngineError::invalid(
                "images.offset",
                format!("{offset} + {length} tokens must lie within the prompt, in order and without overlap"),
            ));
        }
        spans.push(ImageSpan { hash: u128::from_le_bytes(hash), offset, length });
    }
    Ok(spans)
}

fn check_sampling(sampling: v1::Sampling, config: &EngineConfig) -> Result<SamplingParams, EngineError> {
    let neutral = SamplingParams::default();
    let temperature = within("sampling.temperature", sampling.temperature, neutral.temperature, 0.0, 100.0)?;
    let top_p = within("sampling.top_p", sampling.top_p, neutral.top_p, f32::MIN_POSITIVE, 1.0)?;
    let min_p = within("sampling.min_p", sampling.min_p, neutral.min_p, 0.0, 1.0)?;
    let presence_penalty =
        within("sampling.presence_penalty", sampling.presence_penalty, neutral.presence_penalty, -2.0, 2.0)?;
    let frequency_penalty =
        within("sampling.frequency_penalty", sampling.frequency_penalty, neutral.frequency_penalty, -2.0, 2.0)?;
    let repetition_penalty =
        within("sampling.repetition_penalty", sampling.repetition_penalty, neutral.repetition_penalty, 0.01, 100.0)?;
    at_most("sampling.logit_bias", "entries", sampling.logit_bias.len(), MAX_LOGIT_BIAS)?;
    let mut logit_bias: Vec<(u32, f32)> = sampling.logit_bias.into_iter().collect();
    logit_bias.sort_unstable_by_key(|(id, _)| *id);
    for (id, bias) in &logit_bias {
        if *id >= config.vocabulary_size {
            return Err(outside("sampling.logit_bias", *id, config));
        }
        within("sampling.logit_bias", Some(*bias), 0.0, -1_000.0, 1_000.0)?;
    }
    Ok(SamplingParams {
        temperature,
        top_p,
        top_k: sampling.top_k.unwrap_or(0),
        min_p,
        presence_penalty,
        frequency_penalty,
        repetition_penalty,
        logit_bias,
        seed: sampling.seed,
        ..neutral
    })
}

fn within(field: &'static str, value: Option<f32>, neutral: f32, least: f32, most: f32) -> Result<f32, EngineError> {
    let value = value.unwrap_or(neutral);
    if (least..=most).contains(&value) {
        return Ok(value);
    }
    let least = if least == f32::MIN_POSITIVE { "above 0".to_owned() } else { format!("from {least}") };
    Err(EngineError::invalid(field, format!("{value} is not {least} to {most}")))
}
