//! OpenAI's Responses and Anthropic's Messages, as the document describes them; what is read and written is in
//! [`crate::api::responses`] and [`crate::api::messages`].

#![allow(missing_docs)] // the names are OpenAI's and Anthropic's; what needs words has them

use schemars::JsonSchema;
use serde_json::{Map, Value};

use super::responses::ChatLogprob;

/// `POST /v1/responses`
#[derive(JsonSchema)]
pub struct ResponsesRequest {
    /// May be absent where one model is served.
    pub model: Option<String>,
    pub input: ResponsesInput,
    /// A system message in front of the input.
    pub instructions: Option<String>,
    /// Cut to the room that the prompt leaves.
    #[schemars(range(min = 1))]
    pub max_output_tokens: Option<u32>,
    pub text: Option<TextForm>,
    /// Functions.
    pub tools: Option<Vec<ResponsesTool>>,
    /// `auto`, `none`, `required`, or an object that names a function.
    pub tool_choice: Option<ResponsesChoice>,
    pub parallel_tool_calls: Option<bool>,
    /// `message.output_text.logprobs`
    pub include: Option<Vec<String>>,
    #[schemars(range(min = 0, max = 20))]
    pub top_logprobs: Option<u32>,
    #[schemars(range(min = 0, max = 2))]
    pub temperature: Option<f64>,
    #[schemars(range(max = 1), extend("exclusiveMinimum" = 0))]
    pub top_p: Option<f64>,
    pub seed: Option<i64>,
    pub stream: Option<bool>,
    /// Taken; nothing is kept.
    pub store: Option<bool>,
    /// Taken; nothing is cut off.
    pub truncation: Option<String>,
    /// Comes back in the answer, as the next ones.
    #[schemars(with = "Option<Map<String, Value>>")]
    pub metadata: Option<Map<String, Value>>,
    pub user: Option<String>,
    pub prompt_cache_key: Option<String>,
    pub safety_identifier: Option<String>,
}

/// A text of the user's, or the items of a conversation.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum ResponsesInput {
    Text(String),
    Items(Vec<InputItem>),
}

/// A message, a call, or what a call returned. Others are refused by name.
#[derive(JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum InputItem {
    Message { role: InputRole, content: String },
    FunctionCall { call_id: String, name: String, arguments: String },
    FunctionCallOutput { call_id: String, output: String },
}

/// Who speaks.
#[derive(JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum InputRole {
    System,
    Developer,
    User,
    Assistant,
}

/// The form of the text.
#[derive(JsonSchema)]
pub struct TextForm {
    /// `text`, `json_object`, or `json_schema` with a name and a schema.
    #[schemars(with = "Option<Map<String, Value>>")]
    pub format: Option<Map<String, Value>>,
}

/// A function that the model may call.
#[derive(JsonSchema)]
pub struct ResponsesTool {
    /// `function`
    pub r#type: String,
    pub name: String,
    pub description: Option<String>,
    /// A JSON schema.
    #[schemars(with = "Option<Map<String, Value>>")]
    pub parameters: Option<Map<String, Value>>,
    pub strict: Option<bool>,
}

/// Whether and what the model calls.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum ResponsesChoice {
    Mode(String),
    Named(#[schemars(with = "Map<String, Value>")] Map<String, Value>),
}

/// A response.
#[derive(JsonSchema)]
pub struct ResponseObject {
    pub id: String,
    pub object: String,
    pub created_at: u64,
    pub status: ResponseStatus,
    pub background: bool,
    pub error: Option<ResponseFailure>,
    pub incomplete_details: Option<IncompleteDetails>,
    /// As it was asked for.
    pub instructions: Option<Value>,
    pub max_output_tokens: Option<i64>,
    pub max_tool_calls: Option<i64>,
    pub metadata: Map<String, Value>,
    pub model: String,
    pub output: Vec<OutputItem>,
    pub parallel_tool_calls: bool,
    pub previous_response_id: Option<String>,
    pub prompt_cache_key: Option<String>,
    pub reasoning: Value,
    pub safety_identifier: Option<String>,
    pub service_tier: String,
    pub store: bool,
    pub temperature: f32,
    pub text: Map<String, Value>,
    pub tool_choice: Value,
    pub tools: Vec<Value>,
    pub top_logprobs: u32,
    pub top_p: f32,
    pub truncation: String,
    pub usage: Option<ResponseUsage>,
    pub user: Option<String>,
}

/// Of a response or an item.
#[derive(JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ResponseStatus {
    InProgress,
    Completed,
    Incomplete,
    Failed,
}

/// Why a response failed.
#[derive(JsonSchema)]
pub struct ResponseFailure {
    pub code: String,
    pub message: String,
}

/// Why a response was cut off.
#[derive(JsonSchema)]
pub struct IncompleteDetails {
    pub reason: String,
}

/// What the model says or calls.
#[derive(JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum OutputItem {
    Message { id: String, status: ResponseStatus, role: String, content: Vec<OutputText> },
    FunctionCall { id: String, status: ResponseStatus, call_id: String, name: String, arguments: String },
}

/// Text of a message.
#[derive(JsonSchema)]
pub struct OutputText {
    pub r#type: String,
    pub text: String,
    pub annotations: Vec<Value>,
    pub logprobs: Vec<ChatLogprob>,
}

/// Tokens that a response used.
#[derive(JsonSchema)]
pub struct ResponseUsage {
    pub input_tokens: u32,
    pub input_tokens_details: InputTokensDetails,
    pub output_tokens: u32,
    pub output_tokens_details: OutputTokensDetails,
    pub total_tokens: u32,
}

/// Part of [`ResponseUsage`].
#[derive(JsonSchema)]
pub struct InputTokensDetails {
    /// Found in the group's prefix cache.
    pub cached_tokens: u32,
    pub cache_write_tokens: u32,
}

/// Part of [`ResponseUsage`].
#[derive(JsonSchema)]
pub struct OutputTokensDetails {
    pub reasoning_tokens: u32,
}

/// `POST /v1/messages`
#[derive(JsonSchema)]
pub struct MessagesRequest {
    /// May be absent where one model is served.
    pub model: Option<String>,
    #[schemars(length(min = 1))]
    pub messages: Vec<AgentMessage>,
    #[schemars(range(min = 1))]
    pub max_tokens: u32,
    /// Instructions in front of the messages.
    pub system: Option<SystemText>,
    pub tools: Option<Vec<AgentTool>>,
    pub tool_choice: Option<AgentChoice>,
    #[schemars(length(max = 16))]
    pub stop_sequences: Option<Vec<String>>,
    #[schemars(range(min = 0, max = 2))]
    pub temperature: Option<f64>,
    #[schemars(range(max = 1), extend("exclusiveMinimum" = 0))]
    pub top_p: Option<f64>,
    #[schemars(range(min = -1))]
    pub top_k: Option<i64>,
    pub stream: Option<bool>,
    #[schemars(with = "Option<Map<String, Value>>")]
    pub metadata: Option<Map<String, Value>>,
}

/// `POST /v1/messages/count_tokens`
#[derive(JsonSchema)]
pub struct CountRequest {
    pub model: Option<String>,
    #[schemars(length(min = 1))]
    pub messages: Vec<AgentMessage>,
    pub system: Option<SystemText>,
    pub tools: Option<Vec<AgentTool>>,
}

/// A text, or blocks of text.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum SystemText {
    Text(String),
    Blocks(Vec<AgentBlock>),
}

/// A message of a conversation.
#[derive(JsonSchema)]
pub struct AgentMessage {
    pub role: AgentRole,
    pub content: AgentContent,
}

/// Who speaks.
#[derive(JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AgentRole {
    User,
    Assistant,
}

/// A text, or blocks.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum AgentContent {
    Text(String),
    Blocks(Vec<AgentBlock>),
}

/// A block of a message.
#[derive(JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum AgentBlock {
    Text { text: String },
    ToolUse { id: String, name: String, input: Map<String, Value> },
    ToolResult { tool_use_id: String, content: Option<String>, is_error: Option<bool> },
}

/// A tool of the client's.
#[derive(JsonSchema)]
pub struct AgentTool {
    pub name: String,
    pub description: Option<String>,
    /// A JSON schema.
    pub input_schema: Map<String, Value>,
}

/// Whether and what the model calls.
#[derive(JsonSchema)]
pub struct AgentChoice {
    pub r#type: AgentMode,
    /// The tool of `tool`.
    pub name: Option<String>,
    pub disable_parallel_tool_use: Option<bool>,
}

/// Modes of [`AgentChoice`].
#[derive(JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AgentMode {
    Auto,
    Any,
    Tool,
    None,
}

/// A message of the assistant's.
#[derive(JsonSchema)]
pub struct MessageObject {
    pub id: String,
    pub r#type: String,
    pub role: String,
    pub model: String,
    pub content: Vec<ContentBlock>,
    pub stop_reason: Option<String>,
    pub stop_sequence: Option<String>,
    pub usage: MessageUsage,
}

/// A block of [`MessageObject`].
#[derive(JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ContentBlock {
    Text { text: String },
    ToolUse { id: String, name: String, input: Map<String, Value> },
}

/// Tokens that a message used; what was read from the cache is not part of `input_tokens`.
#[derive(JsonSchema)]
pub struct MessageUsage {
    pub input_tokens: u32,
    pub cache_creation_input_tokens: u32,
    pub cache_read_input_tokens: u32,
    pub output_tokens: u32,
}

/// Tokens of a prompt.
#[derive(JsonSchema)]
pub struct TokenCount {
    pub input_tokens: usize,
}

/// Anthropic's form of an error.
#[derive(JsonSchema)]
pub struct AgentError {
    pub r#type: String,
    pub error: AgentErrorFields,
    pub request_id: String,
}

/// Part of [`AgentError`].
#[derive(JsonSchema)]
pub struct AgentErrorFields {
    pub r#type: String,
    pub message: String,
}
