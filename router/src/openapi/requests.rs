//! Bodies of requests, as the document describes them; what is read is [`crate::api::request`].

#![allow(missing_docs)] // the names are OpenAI's and vLLM's; what needs words has them

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde_json::{Map, Value};

/// What all generation requests share.
#[derive(JsonSchema)]
pub struct Sampling {
    #[schemars(range(min = 0, max = 2))]
    pub temperature: Option<f64>,
    #[schemars(range(max = 1), extend("exclusiveMinimum" = 0))]
    pub top_p: Option<f64>,
    /// -1 and 0: all.
    #[schemars(range(min = -1))]
    pub top_k: Option<i64>,
    #[schemars(range(min = 0, max = 1))]
    pub min_p: Option<f64>,
    #[schemars(range(min = -2, max = 2))]
    pub presence_penalty: Option<f64>,
    #[schemars(range(min = -2, max = 2))]
    pub frequency_penalty: Option<f64>,
    #[schemars(range(min = 0.01, max = 10))]
    pub repetition_penalty: Option<f64>,
    /// From token ids to numbers between -100 and 100.
    pub logit_bias: Option<BTreeMap<String, f64>>,
    pub seed: Option<i64>,
    #[schemars(range(min = 1, max = 128))]
    pub n: Option<u32>,
    /// Only `n` itself.
    #[schemars(range(min = 1, max = 128))]
    pub best_of: Option<u32>,
    #[schemars(range(min = 0))]
    pub min_tokens: Option<u32>,
    pub stop: Option<Stop>,
    #[schemars(length(max = 16))]
    pub stop_token_ids: Option<Vec<u32>>,
    pub include_stop_str_in_output: Option<bool>,
    pub ignore_eos: Option<bool>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub prompt_logprobs: Option<u32>,
    pub skip_special_tokens: Option<bool>,
    pub return_token_ids: Option<bool>,
    pub return_tokens_as_token_ids: Option<bool>,
    pub response_format: Option<ResponseFormat>,
    /// A JSON schema that the answer keeps (vLLM's).
    #[schemars(with = "Option<Map<String, Value>>")]
    pub guided_json: Option<Value>,
    pub guided_regex: Option<String>,
    pub guided_choice: Option<Vec<String>>,
    /// In llguidance's variant of Lark.
    pub guided_grammar: Option<String>,
    /// vLLM's newer form: one of `json`, `regex`, `choice`, `grammar`, `json_object`.
    #[schemars(with = "Option<Map<String, Value>>")]
    pub structured_outputs: Option<Value>,
    /// `interactive`, `batch`, or a number: above 0 is batch.
    pub priority: Option<Priority>,
    /// Separates cached prefixes.
    #[schemars(length(min = 1))]
    pub cache_salt: Option<String>,
}

/// `POST /v1/chat/completions`
#[derive(JsonSchema)]
pub struct ChatRequest {
    /// May be absent where one model is served.
    pub model: Option<String>,
    #[schemars(length(min = 1))]
    pub messages: Vec<Message>,
    pub tools: Option<Vec<Tool>>,
    pub tool_choice: Option<ToolChoice>,
    /// `false`: one call at most.
    pub parallel_tool_calls: Option<bool>,
    /// Cut to the room that the prompt leaves.
    #[schemars(range(min = 1))]
    pub max_tokens: Option<u32>,
    #[schemars(range(min = 1))]
    pub max_completion_tokens: Option<u32>,
    pub logprobs: Option<bool>,
    #[schemars(range(min = 0, max = 20))]
    pub top_logprobs: Option<u32>,
    pub add_generation_prompt: Option<bool>,
    /// The model goes on with the last message, which is the assistant's.
    pub continue_final_message: Option<bool>,
    #[serde(flatten)]
    pub sampling: Sampling,
}

/// `POST /v1/completions`
#[derive(JsonSchema)]
pub struct CompletionRequest {
    /// May be absent where one model is served.
    pub model: Option<String>,
    pub prompt: Prompt,
    /// Only the empty one.
    pub suffix: Option<String>,
    #[schemars(range(min = 0))]
    pub max_tokens: Option<u32>,
    #[schemars(range(min = 0, max = 20))]
    pub logprobs: Option<u32>,
    pub echo: Option<bool>,
    pub add_special_tokens: Option<bool>,
    #[serde(flatten)]
    pub sampling: Sampling,
}

/// A text, several, token ids, or several lists of them.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    IdLists(Vec<Vec<u32>>),
}

/// One stop string or several, at most 16.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum Stop {
    One(String),
    Many(Vec<String>),
}

/// Who waits first when every group is busy.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum Priority {
    Class(PriorityClass),
    Number(i64),
}

/// Classes of requests.
#[derive(JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PriorityClass {
    Interactive,
    Batch,
}

/// Only with `stream: true`.
#[derive(JsonSchema)]
pub struct StreamOptions {
    /// A last chunk with the usage.
    pub include_usage: Option<bool>,
    /// The usage so far in every chunk.
    pub continuous_usage_stats: Option<bool>,
}

/// The form of the answer.
#[derive(JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ResponseFormat {
    Text,
    JsonObject,
    JsonSchema { json_schema: NamedSchema },
}

/// A schema with its name.
#[derive(JsonSchema)]
pub struct NamedSchema {
    pub name: Option<String>,
    #[schemars(with = "Map<String, Value>")]
    pub schema: Value,
    /// Refuses keywords that can't be kept.
    pub strict: Option<bool>,
}

/// A message of a conversation.
#[derive(JsonSchema)]
pub struct Message {
    pub role: Role,
    pub content: Option<Content>,
    /// The assistant's.
    pub tool_calls: Option<Vec<ToolCall>>,
    /// Of a tool's answer.
    pub tool_call_id: Option<String>,
    pub name: Option<String>,
    /// The model goes on with this message (Mistral's).
    pub prefix: Option<bool>,
}

/// Who speaks.
#[derive(JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    System,
    Developer,
    User,
    Assistant,
    Tool,
}

/// A text, or chunks.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum Content {
    Text(String),
    Chunks(Vec<Chunk>),
}

/// A text or a picture (`data:` URLs only).
#[derive(JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Chunk {
    Text { text: String },
    ImageUrl { image_url: ImageUrl },
}

/// Where a picture is.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum ImageUrl {
    Url(String),
    Object { url: String },
}

/// A call that was made.
#[derive(JsonSchema)]
pub struct ToolCall {
    pub id: String,
    pub r#type: Option<String>,
    pub function: CalledFunction,
}

/// Part of [`ToolCall`].
#[derive(JsonSchema)]
pub struct CalledFunction {
    pub name: String,
    /// JSON text.
    pub arguments: String,
}

/// A function that the model may call.
#[derive(JsonSchema)]
pub struct Tool {
    pub r#type: ToolKind,
    pub function: Function,
}

/// Kinds of tools.
#[derive(JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ToolKind {
    Function,
}

/// Part of [`Tool`].
#[derive(JsonSchema)]
pub struct Function {
    #[schemars(regex(pattern = "^[a-zA-Z0-9_-]{1,64}$"))]
    pub name: String,
    pub description: Option<String>,
    /// A JSON schema.
    #[schemars(with = "Option<Map<String, Value>>")]
    pub parameters: Option<Value>,
    pub strict: Option<bool>,
}

/// Whether and what the model calls.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum ToolChoice {
    Mode(ToolMode),
    /// A named function, or `allowed_tools`.
    #[schemars(with = "Map<String, Value>")]
    Named(Value),
}

/// Modes of [`ToolChoice`].
#[derive(JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ToolMode {
    Auto,
    None,
    Required,
    Any,
}

/// `POST /tokenize`: `messages` (and `tools`) or `prompt`.
#[derive(JsonSchema)]
pub struct TokenizeRequest {
    pub model: Option<String>,
    pub prompt: Option<String>,
    pub messages: Option<Vec<Message>>,
    pub tools: Option<Vec<Tool>>,
    pub add_special_tokens: Option<bool>,
    pub add_generation_prompt: Option<bool>,
    pub continue_final_message: Option<bool>,
    pub return_token_strs: Option<bool>,
}

/// `POST /detokenize`
#[derive(JsonSchema)]
pub struct DetokenizeRequest {
    pub model: Option<String>,
    pub tokens: Vec<u32>,
}
