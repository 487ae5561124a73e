//! Validation of a request's parameters, and their conversion to sampling and stop parameters for the group and output
//! rules for the emitter. Every refusal names the field and its limit.

use std::{collections::HashMap, sync::Arc};

use bora_common::conversation::FunctionNames;
use bora_proto::v1::{Logprobs, Sampling};
use serde_json::Value;

use super::{
    bounds::FieldBounds,
    declare::Operation,
    error::ApiError,
    fields::{Integer, LogprobsField, PriorityField},
    request::Body,
    response::TextOffset,
    structured::{self, Structure, ToolChoice},
};
use crate::{
    fleet::view::ModelGroups, models::ModelSpec, options::RouterOptions, place::admission::Class,
    relay::emit::EmitOptions,
};

/// The control tokens of tool calls. If a bias or a mask bans the first, it must ban the others too; otherwise the
/// output may hold a partial call.
const CALL_TOKENS: [&str; 3] = ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"];
/// A bias that bans a token: no logit outweighs it.
const FORBIDDEN: f32 = -1_000.0;
/// OpenAI's default of `max_tokens` in completions.
const COMPLETION_MAX_TOKENS: u32 = 16;

/// The API of a request. The APIs differ in a few defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
    /// `/v1/responses`
    Responses,
    /// `/v1/messages`
    Messages,
}

impl Endpoint {
    /// The prefix of the IDs of responses.
    pub fn id_prefix(self) -> &'static str {
        match self {
            Self::Chat => "chatcmpl-",
            Self::Completions => "cmpl-",
            Self::Responses => "resp_",
            Self::Messages => "msg_",
        }
    }

    /// Whether requests have a conversation.
    pub fn is_conversation(self) -> bool {
        self != Self::Completions
    }
}

/// The validated parameters of a request.
pub struct Params {
    /// Whether the response is streamed.
    pub stream: bool,
    /// Usage in a last chunk of its own.
    pub include_usage: bool,
    /// Usage so far in every chunk.
    pub continuous_usage: bool,
    /// Number of sequences per prompt.
    pub n: u32,
    /// Sampling parameters for the group; the seed is that of the first sequence.
    pub sampling: Sampling,
    /// The seed of the first sequence; the other seeds are derived from it.
    pub seed: u64,
    /// The requested `max_tokens`; `None` = the default of the endpoint.
    pub max_tokens: Option<u32>,
    /// Minimum number of tokens before the end.
    pub min_tokens: u32,
    /// Whether the end-of-sequence token is treated as an ordinary token.
    pub ignore_eos: bool,
    /// Additional token IDs that end a sequence.
    pub stop_token_ids: Vec<u32>,
    /// Number of logprobs requested from the group.
    pub logprobs: Option<Logprobs>,
    /// Alternatives per output token that the client gets.
    pub top_logprobs: Option<u32>,
    /// Alternatives per prompt position that the client gets.
    pub prompt_logprobs: Option<u32>,
    /// Whether the prompt is echoed in front of the output.
    pub echo: bool,
    /// `max_tokens: 0`, with `echo` or in Messages: nothing is generated; at most the prompt is returned.
    pub echo_only: bool,
    /// Whether the token IDs of prompt and output are returned.
    pub return_token_ids: bool,
    /// Whether logprobs name tokens as `token_id:7`.
    pub tokens_as_ids: bool,
    /// A hash of the session's name, or else of the sender.
    pub session: Option<u64>,
    /// The structured output.
    pub structure: Option<Structure>,
    /// The class of the request.
    pub class: Class,
    /// Output rules for the emitter.
    pub emit: Arc<EmitOptions>,
}

/// The audience of a response, as far as the form of the response depends on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Client {
    /// Clients of Mistral's API need usage without requesting it, and cannot parse a tool call in chunks.
    pub mistral: bool,
}

impl Params {
    /// The start state of an output's text.
    pub fn text_offset(&self) -> TextOffset {
        TextOffset::new(self.emit.tokenizer.as_ref(), self.emit.skip_special)
    }
}

/// The inputs besides the body that the form of an output depends on.
#[derive(Clone, Copy, Debug, Default)]
pub struct OutputForm {
    /// The audience of the response.
    pub client: Client,
    /// The function names that calls in the history may have.
    pub function_names: FunctionNames,
}

/// Refuses unsupported fields that would change the response.
pub fn refuse_unserved(body: &Body<'_>) -> Result<(), ApiError> {
    if let Some((refused, _)) = body.refused.iter().find(|(refused, value)| !refused.harmless.includes(value)) {
        return Err(refused.error());
    }
    if body.use_beam_search == Some(true) {
        return Err(ApiError::invalid("use_beam_search", "`use_beam_search` is not supported."));
    }
    match &body.suffix {
        None => Ok(()),
        Some(Value::String(suffix)) if suffix.is_empty() => Ok(()),
        Some(_) => Err(ApiError::invalid("suffix", "`suffix` is not supported.")),
    }
}

/// Validates everything except the prompt.
pub fn check(
    body: &Body<'_>,
    endpoint: Endpoint,
    form: OutputForm,
    model: &ModelGroups,
    spec: &ModelSpec,
    options: &RouterOptions,
) -> Result<Params, ApiError> {
    refuse_unserved(body)?;
    let choice = if endpoint.is_conversation() { ToolChoice::of(body)? } else { ToolChoice::NoTools };
    let structure = structured::structure(body, endpoint, &choice, spec)?;
    let stream = body.stream.unwrap_or(false);
    if body.stream_options.is_some() && !stream {
        return Err(ApiError::invalid("stream_options", "`stream_options` is only allowed when `stream` is true."));
    }
    let limits = &FieldBounds { operation: endpoint.into(), options };
    let n = body.n(limits)?.unwrap_or(1) as u32;
    let best_of = body.best_of(limits)?;
    if best_of.is_some_and(|best_of| best_of != i64::from(n)) {
        return Err(ApiError::invalid("best_of", "`best_of` is not supported."));
    }
    let (max_field, max_tokens) = match body.max_completion_tokens(limits)? {
        Some(most) => ("max_completion_tokens", Some(most)),
        None => ("max_tokens", body.max_tokens(limits)?),
    };
    let echo = body.echo.unwrap_or(false);
    if echo && endpoint.is_conversation() {
        return Err(ApiError::invalid("echo", "`echo` is a field of /v1/completions only."));
    }
    let echo_only = max_tokens == Some(0) && (echo || endpoint == Endpoint::Messages);
    if max_tokens == Some(0) && !echo_only {
        return Err(ApiError::invalid(max_field, format!("`{max_field}` must be at least 1, got 0.")));
    }
    let max_tokens = max_tokens.map(|most| most.max(1) as u32);
    let min_tokens = body.min_tokens(limits)?.unwrap_or(0) as u32;
    if max_tokens.is_some_and(|max_tokens| min_tokens > max_tokens) {
        return Err(ApiError::invalid("min_tokens", format!("`min_tokens` must not be above `{max_field}`.")));
    }

    let stops = body.stop(limits)?.unwrap_or_default().to_vec();
    let stop_token_ids = body.stop_token_ids(limits)?.unwrap_or_default().to_vec();
    if let Some(id) = stop_token_ids.iter().find(|id| **id >= model.vocabulary_size) {
        return Err(no_such_id("stop_token_ids", *id, model.vocabulary_size));
    }
    if spec.tokenizer.is_none() && !stops.is_empty() {
        return Err(ApiError::invalid("stop", "`stop` needs text, and this model is served without a tokenizer."));
    }

    let top_logprobs = top_logprobs(body, limits)?;
    let prompt_logprobs = body.prompt_logprobs(limits)?.map(|top| top as u32);
    if prompt_logprobs.is_some() && stream {
        return Err(ApiError::invalid("prompt_logprobs", "`prompt_logprobs` is not available when `stream` is true."));
    }
    if echo && top_logprobs.is_some() && stream {
        return Err(ApiError::invalid("echo", "`echo` with `logprobs` is not available when `stream` is true."));
    }
    // vLLM returns logprobs of the echoed prompt as well
    let prompt_top = prompt_logprobs.max(top_logprobs.filter(|_| echo));
    let logprobs =
        (top_logprobs.is_some() || prompt_top.is_some()).then_some(Logprobs { top: top_logprobs, prompt_top });

    body.cache_salt(limits)?;
    if structure.is_some() && min_tokens > 0 {
        return Err(ApiError::invalid(
            "min_tokens",
            "`min_tokens` can't be kept where the form of the answer is given.",
        ));
    }
    let (mut sampling, seed) = sampling(body, limits, model, spec)?;
    // without tools, a call could only be appended to the text
    if endpoint.is_conversation() && matches!(choice, ToolChoice::Forbidden | ToolChoice::NoTools) {
        let special = |name: &&str| spec.tokenizer.as_ref()?.special_id(name);
        sampling.logit_bias.extend(CALL_TOKENS.iter().filter_map(special).map(|id| (id, FORBIDDEN)));
    }
    let ignore_eos = body.ignore_eos.unwrap_or(false);
    let mut end_ids = stop_token_ids.clone();
    if !ignore_eos {
        end_ids.extend(&spec.end_ids);
    }
    let stream_options = body.stream_options.unwrap_or_default();
    let return_token_ids = body.return_token_ids.unwrap_or(false) || spec.tokenizer.is_none();
    let emit = EmitOptions {
        tokenizer: spec.tokenizer.clone(),
        skip_special: body.skip_special_tokens.unwrap_or(true),
        tool_calls: matches!(choice, ToolChoice::Auto(_) | ToolChoice::Forced(..)),
        drops_calls: endpoint.is_conversation()
            && matches!(choice, ToolChoice::Forbidden | ToolChoice::NoTools)
            && body.skip_special_tokens.unwrap_or(true),
        // in Messages, arguments are an object or its substitute, which is known only at their end
        whole_calls: form.client.mistral || endpoint == Endpoint::Messages,
        function_names: form.function_names,
        only_one_call: body.parallel_tool_calls == Some(false),
        stops,
        keep_stop: body.include_stop_str_in_output.unwrap_or(false),
        min_tokens,
        end_ids,
        stop_token_ids: stop_token_ids.clone(),
        token_ids: return_token_ids,
    };
    Ok(Params {
        stream,
        include_usage: stream_options.include_usage.unwrap_or(false),
        continuous_usage: stream_options.continuous_usage_stats.unwrap_or(false),
        n,
        sampling,
        seed,
        max_tokens,
        min_tokens,
        ignore_eos,
        stop_token_ids,
        logprobs,
        top_logprobs,
        prompt_logprobs,
        echo,
        echo_only,
        return_token_ids,
        tokens_as_ids: body.return_tokens_as_token_ids.unwrap_or(false),
        session: [body.prompt_cache_key, body.user].into_iter().flatten().find_map(|name| name.0),
        structure,
        class: class(body)?,
        emit: Arc::new(emit),
    })
}

/// The maximum tokens of a sequence's output, given the length of its prompt.
pub fn output_bound(params: &Params, endpoint: Endpoint, prompt_tokens: usize, window: u32) -> Result<u32, ApiError> {
    let prompt_field = if endpoint.is_conversation() { "messages" } else { "prompt" };
    let room = (window as usize).saturating_sub(prompt_tokens) as u32;
    if room == 0 && endpoint == Endpoint::Messages {
        // the text by which Anthropic's clients detect that they must shorten the conversation
        let most = window.saturating_sub(1);
        let message = format!("prompt is too long: {prompt_tokens} tokens > {most} maximum");
        return Err(ApiError::context_length(prompt_field, message));
    }
    if room == 0 {
        return Err(ApiError::context_length(
            prompt_field,
            format!(
                "This model's maximum context length is {window} tokens, of which at least one is generated. \
                 However, the {prompt_field} resulted in {prompt_tokens} tokens. Please reduce their length."
            ),
        ));
    }
    let bound = match (endpoint.is_conversation(), params.max_tokens) {
        (true, None) => room,
        (true, Some(wanted)) => wanted.min(room),
        (false, None) => COMPLETION_MAX_TOKENS.min(room),
        (false, Some(wanted)) if wanted > room => {
            return Err(ApiError::context_length(
                "max_tokens",
                format!(
                    "This model's maximum context length is {window} tokens. However, you requested {} tokens \
                     ({prompt_tokens} in the prompt, {wanted} for the completion). Please reduce one of them.",
                    prompt_tokens as u64 + u64::from(wanted)
                ),
            ));
        }
        (false, Some(wanted)) => wanted,
    };
    if params.min_tokens > bound {
        return Err(ApiError::invalid(
            "min_tokens",
            format!("`min_tokens` is {}, but there is only room for {bound} tokens.", params.min_tokens),
        ));
    }
    Ok(bound)
}

/// Refuses token IDs outside the model's vocabulary.
pub fn check_ids(field: &str, ids: &[u32], vocabulary_size: u32) -> Result<(), ApiError> {
    match ids.iter().find(|id| **id >= vocabulary_size) {
        Some(id) => Err(no_such_id(field, *id, vocabulary_size)),
        None => Ok(()),
    }
}

fn sampling(
    body: &Body<'_>,
    limits: &FieldBounds<'_>,
    model: &ModelGroups,
    spec: &ModelSpec,
) -> Result<(Sampling, u64), ApiError> {
    let defaults = &spec.defaults;
    // a seed may be any 64 bits
    let seed = body.seed(limits)?.map_or_else(rand::random, |seed| seed as u64);
    let top_k = body.top_k(limits)?.map(|top_k| top_k.max(0) as u32);
    let sampling = Sampling {
        temperature: Some(body.temperature(limits)?.or(defaults.temperature).unwrap_or(1.0)),
        top_p: Some(body.top_p(limits)?.or(defaults.top_p).unwrap_or(1.0)),
        top_k: Some(top_k.or(defaults.top_k).unwrap_or(0)),
        min_p: Some(body.min_p(limits)?.or(defaults.min_p).unwrap_or(0.0)),
        presence_penalty: Some(body.presence_penalty(limits)?.unwrap_or(0.0)),
        frequency_penalty: Some(body.frequency_penalty(limits)?.unwrap_or(0.0)),
        repetition_penalty: Some(body.repetition_penalty(limits)?.or(defaults.repetition_penalty).unwrap_or(1.0)),
        logit_bias: logit_bias(body, limits, model.vocabulary_size)?,
        seed,
    };
    Ok((sampling, seed))
}

fn logit_bias(body: &Body<'_>, limits: &FieldBounds<'_>, vocabulary_size: u32) -> Result<HashMap<u32, f32>, ApiError> {
    let biases = body.logit_bias(limits)?.unwrap_or_default();
    match biases.iter().find(|(id, _)| *id >= vocabulary_size) {
        Some((id, _)) => Err(no_such_id("logit_bias", *id, vocabulary_size)),
        None => Ok(biases.into_iter().collect()),
    }
}

fn top_logprobs(body: &Body<'_>, limits: &FieldBounds<'_>) -> Result<Option<u32>, ApiError> {
    let top = body.top_logprobs(limits)?;
    match body.logprobs(limits)? {
        Some(LogprobsField::Count(Integer(count))) => Ok(Some(count as u32)),
        Some(LogprobsField::Flag(true)) => Ok(Some(top.unwrap_or(0) as u32)),
        None | Some(LogprobsField::Flag(false)) if limits.operation == Operation::Completions => Ok(None),
        None | Some(LogprobsField::Flag(false)) => match top {
            Some(1..) => Err(ApiError::invalid("top_logprobs", "`top_logprobs` needs `logprobs` to be true.")),
            _ => Ok(None),
        },
    }
}

fn no_such_id(field: &str, id: u32, vocabulary_size: u32) -> ApiError {
    ApiError::invalid(
        field,
        format!("`{field}`: {id} is not a token ID of this model (token IDs are below {vocabulary_size})."),
    )
}

/// The input of `/tokenize`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenizeTarget {
    /// A conversation.
    Messages,
    /// A text.
    Prompt,
}

fn class(body: &Body<'_>) -> Result<Class, ApiError> {
    match &body.priority {
        None => Ok(Class::Interactive),
        Some(PriorityField::Number(Integer(number))) if *number > 0 => Ok(Class::Batch),
        Some(PriorityField::Number(_)) => Ok(Class::Interactive),
        Some(PriorityField::Name(name)) => match name.as_str() {
            "interactive" => Ok(Class::Interactive),
            "batch" => Ok(Class::Batch),
            _ => Err(ApiError::invalid("priority", "`priority` must be \"interactive\", \"batch\" or an integer.")),
        },
    }
}

/// Requires exactly one of `messages` and `prompt`.
pub fn tokenize_target(body: &Body<'_>) -> Result<TokenizeTarget, ApiError> {
    match (&body.messages, &body.prompt) {
        (Some(_), None) => Ok(TokenizeTarget::Messages),
        (None, Some(_)) => Ok(TokenizeTarget::Prompt),
        (Some(_), Some(_)) => Err(ApiError::invalid("prompt", "`prompt` and `messages` exclude each other.")),
        (None, None) => Err(ApiError::invalid("prompt", "`prompt` or `messages` is required.")),
    }
}
