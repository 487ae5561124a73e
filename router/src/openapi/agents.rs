//! Schemas of the items and blocks of OpenAI's Responses and Anthropic's Messages.
//!
//! The fields of the bodies are declared where they are parsed, and response schemas are derived from the serialized
//! types ([`crate::api::responses`], [`crate::api::messages`]). An entry of a conversation is parsed by one struct for
//! all kinds, so that a refusal can name the field; the types here say which fields belong together.

#![allow(missing_docs)] // the names are OpenAI's and Anthropic's; those that need an explanation have a comment

use schemars::JsonSchema;
use serde_json::{Map, Value};

/// The user's text, or the items of the conversation.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum ResponsesInput {
    Text(String),
    Items(Vec<InputItem>),
}

/// A message, a call, a call's result, or more tools. Reasoning and calls of tools that other servers run are left out.
#[derive(JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum InputItem {
    Message { role: InputRole, content: InputContent },
    FunctionCall { call_id: String, namespace: Option<String>, name: String, arguments: String },
    FunctionCallOutput { call_id: String, output: InputContent },
    CustomToolCall { call_id: String, namespace: Option<String>, name: String, input: String },
    CustomToolCallOutput { call_id: String, output: InputContent },
    AdditionalTools { tools: Vec<Map<String, Value>> },
}

/// The role of a message.
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

/// A text or an image (`data:` URLs only).
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

/// The role of a message.
#[derive(JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AgentRole {
    User,
    Assistant,
    System,
}

/// A text, or blocks.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum AgentContent {
    Text(String),
    Blocks(Vec<AgentBlock>),
}

/// A content block of a message.
#[derive(JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum AgentBlock {
    Text { text: String },
    Image { source: AgentImage },
    Document { source: AgentDocument },
    ToolReference { tool_name: String },
    ToolUse { id: String, name: String, input: Map<String, Value> },
    ToolResult { tool_use_id: String, content: Option<String>, is_error: Option<bool> },
}

/// The text of a document.
#[derive(JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum AgentDocument {
    Text { data: String },
    Content { content: String },
}

/// The source of an image.
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
