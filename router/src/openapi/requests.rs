//! Schemas of request fields that are parsed where they are used: messages and tools by the conversation parser, output
//! formats by [`crate::api::structured`]. The fields themselves are declared in [`crate::api::request`].

#![allow(missing_docs)] // the names are OpenAI's and vLLM's; those that need an explanation have a comment

use schemars::JsonSchema;
use serde_json::{Map, Value};

/// At least one.
#[derive(JsonSchema)]
#[schemars(inline)]
pub struct OneOrMore<T>(#[schemars(length(min = 1))] pub Vec<T>);

/// The format of the output.
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
    /// Rejects schemas with unsupported keywords.
    pub strict: Option<bool>,
}

/// A message of a conversation.
#[derive(JsonSchema)]
pub struct Message {
    pub role: Role,
    pub content: Option<Content>,
    /// Tool calls; only in assistant messages.
    pub tool_calls: Option<Vec<ToolCall>>,
    /// The call's ID; only in tool messages.
    pub tool_call_id: Option<String>,
    pub name: Option<String>,
    /// Continues this message instead of a new one (Mistral).
    pub prefix: Option<bool>,
}

/// The role of a message.
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

/// A text or an image (`data:` URLs only).
#[derive(JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Chunk {
    Text { text: String },
    ImageUrl { image_url: ImageUrl },
}

/// The URL of an image.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum ImageUrl {
    Url(String),
    Object { url: String },
}

/// A call that the model made.
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

/// Whether the model calls a tool, and which one.
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
