//! What stands in fields of requests and is read where it is used: messages and tools by the conversation's reader, forms of responses
//! by [`crate::api::structured`]. The fields themselves are declared where they are read: [`crate::api::request`].

#![allow(missing_docs)] // the names are OpenAI's and vLLM's; what needs words has them

use schemars::JsonSchema;
use serde_json::{Map, Value};

/// At least one.
#[derive(JsonSchema)]
#[schemars(inline)]
pub struct OneOrMore<T>(#[schemars(length(min = 1))] pub Vec<T>);

/// The form of the response.
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
    /// Of a tool's response.
    pub tool_call_id: Option<String>,
    pub name: Option<String>,
    /// The model continues with this message (Mistral's).
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

/// A text or an image (`data:` URLs only).
#[derive(JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Chunk {
    Text { text: String },
    ImageUrl { image_url: ImageUrl },
}

/// Where an image is.
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
