//! Of OpenAI's Responses and Anthropic's Messages what the code that reads them can't be asked for: their other fields are
//! derived from [`crate::api::responses`] and [`crate::api::messages`], and so are all their answers.
//!
//! Fields that all generation endpoints share are read in one place ([`crate::api::request`]) that knows no endpoint, and an
//! entry of a conversation is read by one structure whatever its kind, so that a refusal can name the field: here stands which
//! of them belong together.

#![allow(missing_docs)] // the names are OpenAI's and Anthropic's; what needs words has them

use schemars::JsonSchema;
use serde_json::{Map, Value};

use crate::api::{messages, responses};

/// `POST /v1/responses`
#[derive(JsonSchema)]
pub struct ResponsesRequest {
    /// May be absent where one model is served.
    pub model: Option<String>,
    #[serde(flatten)]
    pub own: responses::request::ResponsesRequest<'static>,
    pub parallel_tool_calls: Option<bool>,
    #[schemars(range(min = 0, max = 20))]
    pub top_logprobs: Option<u32>,
    #[schemars(range(min = 0, max = 2))]
    pub temperature: Option<f64>,
    #[schemars(range(max = 1), extend("exclusiveMinimum" = 0))]
    pub top_p: Option<f64>,
    pub seed: Option<i64>,
    pub stream: Option<bool>,
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
    Message { role: InputRole, content: InputContent },
    FunctionCall { call_id: String, name: String, arguments: String },
    FunctionCallOutput { call_id: String, output: InputContent },
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

/// A text, or parts.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum InputContent {
    Text(String),
    Parts(Vec<InputPart>),
}

/// A text or a picture (`data:` URLs only).
#[derive(JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum InputPart {
    InputText { text: String },
    OutputText { text: String },
    Refusal { refusal: String },
    InputImage { image_url: String },
}

/// `auto`, `none`, `required`, or an object that names a function.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum ResponsesChoice {
    Mode(String),
    Named(#[schemars(with = "Map<String, Value>")] Map<String, Value>),
}

/// `POST /v1/messages`
#[derive(JsonSchema)]
pub struct MessagesRequest {
    #[serde(flatten)]
    pub prompt: CountRequest,
    #[schemars(range(min = 1))]
    pub max_tokens: u32,
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
    /// May be absent where one model is served.
    pub model: Option<String>,
    #[schemars(length(min = 1))]
    pub messages: Vec<messages::request::Message<'static>>,
    #[serde(flatten)]
    pub own: messages::request::MessagesRequest<'static>,
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
    Image { source: AgentImage },
    ToolUse { id: String, name: String, input: Map<String, Value> },
    ToolResult { tool_use_id: String, content: Option<String>, is_error: Option<bool> },
}

/// Where a picture is.
#[derive(JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum AgentImage {
    Base64 { media_type: String, data: String },
    Url { url: String },
}

/// Whether a tool is called, and which.
#[derive(JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AgentMode {
    Auto,
    Any,
    Tool,
    None,
}
