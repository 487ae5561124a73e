//! Messages, their content and tool calls, read from OpenAI-style JSON.
//!
//! Reading checks types and values of single fields; what depends on several messages is in `validate`.
//! Unknown fields are ignored, as OpenAI's clients expect. Source: mistral-common 1.13, `from_openai`.

use super::ConversationLimits;
use super::error::{At, ConversationError, Rule};
use super::python_json::{Json, JsonError, dump_string};
use super::validate::{self, FunctionNames};
use crate::cpu_budget::{self, Stage};

/// A chunk of a message's content.
#[derive(Clone, Debug, PartialEq)]
pub enum Chunk {
    /// Text.
    Text(String),
    /// An image, by its URL; an index into the conversation's images.
    Image(usize),
    /// Reasoning of the assistant; `closed` when it is complete.
    Thinking {
        /// The reasoning.
        text: String,
        /// Whether it ends with its end marker.
        closed: bool,
    },
}

/// An image that a message shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSource {
    /// Its URL as the client wrote it: `data:`, `http(s):` or another scheme that the server resolves.
    pub url: String,
    /// Where in the request it stands, for error messages.
    pub param: String,
}

/// A call of a function by the assistant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolCall {
    /// The id that its result names.
    pub id: String,
    /// The function's name.
    pub name: String,
    /// JSON as Python's `json.dumps` writes it: the text that goes into the prompt.
    pub arguments: String,
}

/// Who says it, and what.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// Instructions; the role `developer` is the same.
    System {
        /// Text and reasoning.
        content: Vec<Chunk>,
    },
    /// What the user says or shows.
    User {
        /// Text and images.
        content: Vec<Chunk>,
    },
    /// What the model said and called.
    Assistant {
        /// Text and reasoning.
        content: Vec<Chunk>,
        /// Calls, in order.
        tool_calls: Vec<ToolCall>,
        /// Whether the model is to continue with this message instead of answering it.
        prefix: bool,
    },
    /// The result of a call.
    Tool {
        /// The call whose result this is.
        call_id: String,
        /// Text.
        content: Vec<Chunk>,
    },
}

impl Message {
    /// The role's name in messages to people.
    pub fn role(&self) -> &'static str {
        match self {
            Self::System { .. } => "system",
            Self::User { .. } => "user",
            Self::Assistant { .. } => "assistant",
            Self::Tool { .. } => "tool",
        }
    }

    /// What it says.
    pub fn content(&self) -> &[Chunk] {
        match self {
            Self::System { content }
            | Self::User { content }
            | Self::Assistant { content, .. }
            | Self::Tool { content, .. } => content,
        }
    }

    /// What it calls.
    pub fn tool_calls(&self) -> &[ToolCall] {
        match self {
            Self::Assistant { tool_calls, .. } => tool_calls,
            Self::System { .. } | Self::User { .. } | Self::Tool { .. } => &[],
        }
    }
}

/// How many entries the lists of a conversation have, and may have.
pub(super) struct Counts {
    limits: ConversationLimits,
    messages: usize,
    content_parts: usize,
    tool_calls: usize,
}

impl Counts {
    /// Of no message yet.
    pub(super) fn new(limits: ConversationLimits) -> Self {
        Self { limits, messages: 0, content_parts: 0, tool_calls: 0 }
    }

    /// Counts a message that was read before.
    pub(super) fn add_known(&mut self, content_parts: usize, message: &Message) {
        self.messages += 1;
        self.content_parts += content_parts;
        self.tool_calls += message.tool_calls().len();
    }

    /// Counts messages that are about to be read.
    fn add_messages(&mut self, count: usize, at: &At<'_>) -> Result<(), ConversationError> {
        self.messages += count;
        within(self.messages, self.limits.messages, "messages", at)
    }

    fn add(&mut self, message: &Message, at: &At<'_>) -> Result<(), ConversationError> {
        self.content_parts += message.content().len();
        within(self.content_parts, self.limits.content_parts, "content parts in all", &at.key("content"))?;
        self.tool_calls += message.tool_calls().len();
        within(self.tool_calls, self.limits.tool_calls, "tool calls in all", &at.key("tool_calls"))
    }
}

/// Refuses a list that is longer than its limit.
pub(super) fn within(count: usize, limit: usize, what: &str, at: &At<'_>) -> Result<(), ConversationError> {
    if count <= limit {
        return Ok(());
    }
    Err(at.error(Rule::TooLong, format!("a request may have at most {limit} {what}")))
}

/// Reads the `messages` array; images are collected in `images` in the order of the request.
pub(super) fn read_messages(
    messages: &Json<'_>,
    names: FunctionNames,
    images: &mut Vec<ImageSource>,
    counts: &mut Counts,
) -> Result<Vec<Message>, ConversationError> {
    let at = At::root("messages");
    let items = array(messages, &at)?;
    counts.add_messages(items.len(), &at)?;
    let mut read = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        cpu_budget::check(Stage::Validate)?;
        let message = read_message(item, &at.index(index), names, images)?;
        counts.add(&message, &at.index(index))?;
        read.push(message);
    }
    Ok(read)
}

fn read_message(
    message: &Json<'_>,
    at: &At<'_>,
    names: FunctionNames,
    images: &mut Vec<ImageSource>,
) -> Result<Message, ConversationError> {
    if !matches!(message, Json::Object(_)) {
        return Err(wrong_type(message, at, "an object"));
    }
    let role = required_string(message, at, "role")?;
    let content_at = at.key("content");
    let content = message.get("content").unwrap_or(&Json::Null);
    let mut read = |role| read_content(content, &content_at, role, images);
    match role {
        "system" | "developer" => Ok(Message::System { content: read(Role::System)? }),
        "user" => Ok(Message::User { content: read(Role::User)? }),
        "assistant" => {
            let content = if *content == Json::Null { Vec::new() } else { read(Role::Assistant)? };
            let content = with_reasoning(message, at, content)?;
            Ok(Message::Assistant {
                content,
                tool_calls: read_tool_calls(message, at, names)?,
                prefix: optional_bool(message, at, "prefix")?.unwrap_or(false),
            })
        }
        "tool" => {
            let content = read(Role::Tool)?;
            let call_id = required_string(message, at, "tool_call_id")?;
            validate::call_id(call_id, &at.key("tool_call_id"))?;
            if let Some(name) = optional_string(message, at, "name")? {
                names.check_call(name, &at.key("name"))?;
            }
            Ok(Message::Tool { call_id: call_id.to_owned(), content })
        }
        other => Err(at.key("role").error(Rule::Value, format!("unknown message role '{other}'"))),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    System,
    User,
    Assistant,
    Tool,
}

fn read_content(
    content: &Json<'_>,
    at: &At<'_>,
    role: Role,
    images: &mut Vec<ImageSource>,
) -> Result<Vec<Chunk>, ConversationError> {
    match content {
        Json::String(text) => Ok(vec![Chunk::Text(text.to_string())]),
        Json::Array(chunks) => {
            chunks.iter().enumerate().map(|(index, chunk)| read_chunk(chunk, &at.index(index), role, images)).collect()
        }
        _ => Err(wrong_type(content, at, "a string or an array of content parts")),
    }
}

fn read_chunk(
    chunk: &Json<'_>,
    at: &At<'_>,
    role: Role,
    images: &mut Vec<ImageSource>,
) -> Result<Chunk, ConversationError> {
    if !matches!(chunk, Json::Object(_)) {
        return Err(wrong_type(chunk, at, "an object"));
    }
    let kind = required_string(chunk, at, "type")?;
    match (kind, role) {
        ("text", _) => Ok(Chunk::Text(required_string(chunk, at, "text")?.to_owned())),
        ("thinking", Role::System | Role::Assistant) => Ok(Chunk::Thinking {
            text: read_thinking(chunk, at)?,
            closed: optional_bool(chunk, at, "closed")?.unwrap_or(true),
        }),
        ("image_url", Role::User) => read_image(chunk, at, images),
        ("thinking" | "image_url", _) => Err(at
            .key("type")
            .error(Rule::ContentType, format!("content of type '{kind}' cannot stand in a message of this role"))),
        ("input_audio" | "audio_url" | "image" | "file" | "input_file", _) => Err(at
            .key("type")
            .error(Rule::ContentType, format!("content of type '{kind}' is not supported by this model"))),
        _ => Err(at.key("type").error(Rule::Value, format!("'{kind}' is not a known type of content"))),
    }
}

/// A text, or a list of text chunks as Mistral's client writes it.
fn read_thinking(chunk: &Json<'_>, at: &At<'_>) -> Result<String, ConversationError> {
    let Some(Json::Array(chunks)) = chunk.get("thinking") else {
        return Ok(required_string(chunk, at, "thinking")?.to_owned());
    };
    let at = at.key("thinking");
    let mut thinking = String::new();
    for (index, chunk) in chunks.iter().enumerate() {
        thinking.push_str(required_string(chunk, &at.index(index), "text")?);
    }
    Ok(thinking)
}

fn read_image(chunk: &Json<'_>, at: &At<'_>, images: &mut Vec<ImageSource>) -> Result<Chunk, ConversationError> {
    let at = at.key("image_url");
    let (url, param) = match chunk.get("image_url") {
        Some(Json::String(url)) => (url.to_string(), at.to_string()),
        Some(image @ Json::Object(_)) => {
            optional_string(image, &at, "detail")?;
            (required_string(image, &at, "url")?.to_owned(), at.key("url").to_string())
        }
        Some(other) => return Err(wrong_type(other, &at, "a string or an object with a url")),
        None => return Err(at.error(Rule::Missing, "image_url is missing")),
    };
    images.push(ImageSource { url, param });
    Ok(Chunk::Image(images.len() - 1))
}

/// Puts `reasoning_content` (or `reasoning`, which must be equal) in front of the content.
fn with_reasoning(message: &Json<'_>, at: &At<'_>, mut content: Vec<Chunk>) -> Result<Vec<Chunk>, ConversationError> {
    let reasoning_content = optional_string(message, at, "reasoning_content")?;
    let reasoning = optional_string(message, at, "reasoning")?;
    if let (Some(first), Some(second)) = (reasoning_content, reasoning)
        && first != second
    {
        return Err(at.key("reasoning").error(Rule::Value, "`reasoning_content` and `reasoning` must be equal"));
    }
    let Some(text) = reasoning_content.or(reasoning) else {
        return Ok(content);
    };
    if content.iter().any(|chunk| matches!(chunk, Chunk::Thinking { .. })) {
        let message = "a message cannot have both thinking content and a `reasoning_content` or `reasoning` field";
        return Err(at.key("content").error(Rule::Value, message));
    }
    content.insert(0, Chunk::Thinking { text: text.to_owned(), closed: true });
    Ok(content)
}

fn read_tool_calls(message: &Json<'_>, at: &At<'_>, names: FunctionNames) -> Result<Vec<ToolCall>, ConversationError> {
    let at = at.key("tool_calls");
    match message.get("tool_calls") {
        None | Some(Json::Null) => Ok(Vec::new()),
        Some(calls) => {
            let calls = array(calls, &at)?.iter().enumerate();
            calls.map(|(index, call)| read_tool_call(call, &at.index(index), names)).collect()
        }
    }
}

fn read_tool_call(call: &Json<'_>, at: &At<'_>, names: FunctionNames) -> Result<ToolCall, ConversationError> {
    if !matches!(call, Json::Object(_)) {
        return Err(wrong_type(call, at, "an object"));
    }
    let id = required_string(call, at, "id")?;
    validate::call_id(id, &at.key("id"))?;
    function_type(call, at)?;
    let function_at = at.key("function");
    let function = required_object(call, at, "function")?;
    let name = required_string(function, &function_at, "name")?;
    names.check_call(name, &function_at.key("name"))?;
    let arguments_at = function_at.key("arguments");
    let arguments =
        function.get("arguments").ok_or_else(|| arguments_at.error(Rule::Missing, "arguments is missing"))?;
    Ok(ToolCall { id: id.to_owned(), name: name.to_owned(), arguments: read_arguments(arguments, &arguments_at)? })
}

/// The arguments as the prompt shows them: parsed and written again the Python way. Empty is `{}`; a text
/// that is not JSON becomes a JSON string.
fn read_arguments(arguments: &Json<'_>, at: &At<'_>) -> Result<String, ConversationError> {
    let mut dumped = String::new();
    match arguments {
        Json::Null => dumped.push_str("{}"),
        Json::String(text) if text.is_empty() => dumped.push_str("{}"),
        Json::String(text) => match Json::parse(text) {
            Ok(value) => value.dump(&mut dumped),
            Err(JsonError::Syntax(_)) => dump_string(text, &mut dumped),
            Err(JsonError::Stopped(stopped)) => return Err(stopped.into()),
            Err(error @ JsonError::Depth) => return Err(at.error(Rule::Json, error.to_string())),
        },
        Json::Object(_) => arguments.dump(&mut dumped),
        _ => return Err(wrong_type(arguments, at, "a string or an object")),
    }
    Ok(dumped)
}

/// Checks that `type` is `function`, or absent.
pub(super) fn function_type(object: &Json<'_>, at: &At<'_>) -> Result<(), ConversationError> {
    match object.get("type") {
        None => Ok(()),
        Some(Json::String(kind)) if kind == "function" => Ok(()),
        Some(Json::String(kind)) => {
            Err(at.key("type").error(Rule::Value, format!("type must be 'function', not '{kind}'")))
        }
        Some(other) => Err(wrong_type(other, &at.key("type"), "a string")),
    }
}

pub(super) fn array<'v, 'a>(value: &'v Json<'a>, at: &At<'_>) -> Result<&'v [Json<'a>], ConversationError> {
    match value {
        Json::Array(items) => Ok(items),
        _ => Err(wrong_type(value, at, "an array")),
    }
}

pub(super) fn required_object<'v, 'a>(
    object: &'v Json<'a>,
    at: &At<'_>,
    key: &str,
) -> Result<&'v Json<'a>, ConversationError> {
    match object.get(key) {
        Some(value @ Json::Object(_)) => Ok(value),
        Some(value) => Err(wrong_type(value, &at.key(key), "an object")),
        None => Err(at.key(key).error(Rule::Missing, format!("{key} is missing"))),
    }
}

pub(super) fn required_string<'v>(object: &'v Json<'_>, at: &At<'_>, key: &str) -> Result<&'v str, ConversationError> {
    match object.get(key) {
        Some(Json::String(text)) => Ok(text),
        Some(value) => Err(wrong_type(value, &at.key(key), "a string")),
        None => Err(at.key(key).error(Rule::Missing, format!("{key} is missing"))),
    }
}

pub(super) fn optional_string<'v>(
    object: &'v Json<'_>,
    at: &At<'_>,
    key: &str,
) -> Result<Option<&'v str>, ConversationError> {
    match object.get(key) {
        None | Some(Json::Null) => Ok(None),
        Some(Json::String(text)) => Ok(Some(text)),
        Some(value) => Err(wrong_type(value, &at.key(key), "a string")),
    }
}

pub(super) fn optional_bool(object: &Json<'_>, at: &At<'_>, key: &str) -> Result<Option<bool>, ConversationError> {
    match object.get(key) {
        None | Some(Json::Null) => Ok(None),
        Some(Json::Bool(value)) => Ok(Some(*value)),
        Some(value) => Err(wrong_type(value, &at.key(key), "a boolean")),
    }
}

fn wrong_type(value: &Json<'_>, at: &At<'_>, expected: &str) -> ConversationError {
    at.error(Rule::Type, format!("expected {expected}, got {}", value.kind()))
}
