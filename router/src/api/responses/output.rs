//! The response object: a list of items, each a message or a call, and the repeated parameters of the request.

use bora_proto::v1::PositionLogprobs;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value, value::RawValue};

use super::{
    items::Items,
    request::{Echo, TextOptions},
};
use crate::{
    api::{
        completion::{Choice, Completion},
        error::ApiError,
        response::{ChatLogprob, ChatLogprobs},
    },
    relay::emit::Finish,
};

/// `status` of a response or of an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(rename = "ResponseStatus")]
pub enum Status {
    /// In progress.
    InProgress,
    /// Complete.
    Completed,
    /// Cut off.
    Incomplete,
    /// Failed.
    Failed,
}

/// Logprobs in the form of chat; empty if none were requested.
pub fn logprobs_of<'a>(positions: &[PositionLogprobs], completion: &'a Completion) -> Vec<ChatLogprob<'a>> {
    match completion.params.top_logprobs {
        Some(top) => ChatLogprobs::new(positions, top, completion.names()).content,
        None => Vec::new(),
    }
}

/// The client's view of an item.
#[derive(Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "OutputItem")]
pub enum ItemObject<'a> {
    /// A message.
    Message {
        /// Its ID.
        id: &'a str,
        /// The status of the item.
        status: Status,
        /// `assistant`
        role: &'static str,
        /// One part; empty when the item starts.
        content: Vec<TextPart<'a>>,
    },
    /// A function call.
    FunctionCall {
        /// Its ID as an item.
        id: &'a str,
        /// The status of the item.
        status: Status,
        /// The ID that the call's result repeats.
        call_id: &'a str,
        /// The name of the function.
        name: &'a str,
        /// The namespace of the function's declaration.
        #[serde(skip_serializing_if = "Option::is_none")]
        namespace: Option<&'a str>,
        /// The arguments as JSON text.
        arguments: &'a str,
    },
    /// A call of a custom tool.
    CustomToolCall {
        /// Its ID as an item.
        id: &'a str,
        /// The status of the item.
        status: Status,
        /// The ID that the call's result repeats.
        call_id: &'a str,
        /// The name of the tool.
        name: &'a str,
        /// The namespace of the tool's declaration.
        #[serde(skip_serializing_if = "Option::is_none")]
        namespace: Option<&'a str>,
        /// The input text.
        input: String,
    },
}

/// The text of a message.
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "OutputText")]
pub struct TextPart<'a> {
    /// `output_text`
    pub r#type: &'static str,
    /// The text.
    pub text: &'a str,
    /// Always empty.
    pub annotations: [Value; 0],
    /// Logprobs of its tokens, if requested.
    pub logprobs: Vec<ChatLogprob<'a>>,
}

impl TextPart<'_> {
    /// The empty content of a message that starts.
    pub fn empty() -> Self {
        Self { r#type: "output_text", text: "", annotations: [], logprobs: Vec::new() }
    }
}

/// The response object.
#[derive(Serialize, JsonSchema)]
pub struct ResponseObject<'a> {
    id: &'a str,
    object: &'static str,
    created_at: u64,
    status: Status,
    background: bool,
    error: Option<ResponseError<'a>>,
    incomplete_details: Option<IncompleteDetails>,
    /// As in the request.
    #[schemars(with = "Option<Value>")]
    instructions: Option<&'a RawValue>,
    max_output_tokens: Option<i64>,
    max_tool_calls: Option<i64>,
    metadata: &'a Map<String, Value>,
    model: &'a str,
    output: Vec<ItemObject<'a>>,
    parallel_tool_calls: bool,
    previous_response_id: Option<&'a str>,
    prompt_cache_key: Option<&'a str>,
    reasoning: Value,
    safety_identifier: Option<&'a str>,
    service_tier: &'static str,
    store: bool,
    temperature: f32,
    #[schemars(with = "Map<String, Value>")]
    text: &'a TextOptions,
    tool_choice: &'a Value,
    #[schemars(with = "Vec<Value>")]
    tools: &'a [Box<RawValue>],
    top_logprobs: u32,
    top_p: f32,
    truncation: &'static str,
    usage: Option<ResponseUsage>,
    user: Option<&'a str>,
}

/// Why a response failed.
#[derive(Serialize, JsonSchema)]
pub struct ResponseError<'a> {
    code: &'a str,
    message: &'a str,
}

/// Why a response is incomplete.
#[derive(Serialize, JsonSchema)]
pub struct IncompleteDetails {
    reason: &'static str,
}

/// `usage`.
#[derive(Clone, Copy, Serialize, JsonSchema)]
pub struct ResponseUsage {
    /// Tokens of the prompt.
    pub input_tokens: u32,
    /// Details of the prompt tokens.
    pub input_tokens_details: InputTokensDetails,
    /// Generated tokens.
    pub output_tokens: u32,
    /// Details of the generated tokens.
    pub output_tokens_details: OutputTokensDetails,
    /// The sum of both.
    pub total_tokens: u32,
}

/// Part of [`ResponseUsage`].
#[derive(Clone, Copy, Serialize, JsonSchema)]
pub struct InputTokensDetails {
    /// Tokens found in the group's prefix cache.
    pub cached_tokens: u32,
    /// Always 0: writing to the cache is free.
    pub cache_write_tokens: u32,
}

/// Part of [`ResponseUsage`].
#[derive(Clone, Copy, Serialize, JsonSchema)]
pub struct OutputTokensDetails {
    /// Always 0: this model does not reason.
    pub reasoning_tokens: u32,
}

impl<'a> ResponseObject<'a> {
    /// The current response with these items. It has a usage only if it is complete.
    pub fn new(
        completion: &'a Completion,
        echo: &'a Echo,
        status: Status,
        output: Vec<ItemObject<'a>>,
        error: Option<&'a ApiError>,
    ) -> Self {
        let sampling = &completion.params.sampling;
        let is_over = matches!(status, Status::Completed | Status::Incomplete);
        Self {
            id: &completion.id,
            object: "response",
            created_at: completion.created,
            status,
            background: false,
            error: error.map(|error| ResponseError { code: error.code.unwrap_or(error.kind), message: &error.message }),
            incomplete_details: (status == Status::Incomplete)
                .then_some(IncompleteDetails { reason: "max_output_tokens" }),
            instructions: echo.instructions.as_deref(),
            max_output_tokens: echo.max_output_tokens,
            max_tool_calls: echo.max_tool_calls,
            metadata: &echo.metadata,
            model: &completion.model,
            output,
            parallel_tool_calls: echo.parallel_tool_calls,
            previous_response_id: None,
            prompt_cache_key: echo.prompt_cache_key.as_deref(),
            reasoning: serde_json::json!({"effort": null, "summary": null}),
            safety_identifier: echo.safety_identifier.as_deref(),
            service_tier: "default",
            store: false,
            temperature: sampling.temperature.unwrap_or(1.0),
            text: &echo.text,
            tool_choice: &echo.tool_choice,
            tools: &echo.tools,
            top_logprobs: completion.params.top_logprobs.unwrap_or(0),
            top_p: sampling.top_p.unwrap_or(1.0),
            truncation: "disabled",
            usage: is_over.then(|| usage(completion)),
            user: echo.user.as_deref(),
        }
    }
}

fn usage(completion: &Completion) -> ResponseUsage {
    let usage = completion.usage();
    ResponseUsage {
        input_tokens: usage.prompt_tokens,
        input_tokens_details: InputTokensDetails {
            cached_tokens: usage.prompt_tokens_details.cached_tokens,
            cache_write_tokens: 0,
        },
        output_tokens: usage.completion_tokens,
        output_tokens_details: OutputTokensDetails { reasoning_tokens: 0 },
        total_tokens: usage.total_tokens,
    }
}

/// How a response ended.
pub fn final_status(choice: &Choice) -> Status {
    if choice.finish == Some(Finish::Length) { Status::Incomplete } else { Status::Completed }
}

/// Runs a response to its end and collects its items.
pub async fn collect(completion: &mut Completion, echo: &Echo) -> Result<Items, ApiError> {
    let mut items = Items::default();
    while let Some(step) = std::future::poll_fn(|cx| completion.poll_step(cx)).await {
        let choice = &mut completion.choices[step?];
        items.take(&mut choice.delta, choice.finish, &completion.id, &echo.names);
    }
    Ok(items)
}

/// Writes a complete response that is not streamed.
pub fn object(completion: &Completion, echo: &Echo, items: &Items) -> serde_json::Result<Vec<u8>> {
    let status = final_status(&completion.choices[0]);
    serde_json::to_vec(&ResponseObject::new(completion, echo, status, items.objects(completion), None))
}
