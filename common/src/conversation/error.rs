//! What can be wrong with a conversation, said so that a client can find it: the parameter's path, a code,
//! and a sentence.

use std::fmt;

use crate::cpu_budget::Stopped;

/// The rule that a request broke. [`Rule::code`] is the `code` of the OpenAI error object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// A field is missing.
    Missing,
    /// A field has the wrong JSON type.
    Type,
    /// A field has a value that is not one of the known ones.
    Value,
    /// The text is not JSON, or nests too deeply.
    Json,
    /// There are no messages.
    NoMessages,
    /// A role cannot stand where it stands.
    RoleOrder,
    /// A kind of content cannot stand in a message of this role, or the model cannot read it.
    ContentType,
    /// An assistant message says nothing and calls nothing.
    EmptyAssistant,
    /// Tool calls and tool results do not answer each other one to one.
    ToolPairing,
    /// A tool call id is empty or `null`.
    ToolCallId,
    /// A function name is not 1 to 64 of `a-z A-Z 0-9 _ -`.
    FunctionName,
    /// A function's parameters are not a JSON Schema (draft 7).
    ToolSchema,
    /// A prefix (a message to continue) is not the last message, or not the assistant's.
    Prefix,
    /// A parameter that this model does not support.
    Unsupported,
    /// An image cannot be read.
    Image,
    /// The tokenizer has no chat layout that we know.
    Layout,
    /// A list has too many entries.
    TooLong,
    /// The work was stopped: see [`crate::cpu_budget`].
    Stopped(Stopped),
}

impl Rule {
    /// The `code` of the OpenAI error object.
    pub fn code(self) -> &'static str {
        match self {
            Self::Missing => "missing_required_parameter",
            Self::Type => "invalid_type",
            Self::Value => "invalid_value",
            Self::Json => "invalid_json",
            Self::NoMessages => "empty_array",
            Self::RoleOrder => "invalid_message_order",
            Self::ContentType => "unsupported_content_type",
            Self::EmptyAssistant => "empty_assistant_message",
            Self::ToolPairing => "invalid_tool_messages",
            Self::ToolCallId => "invalid_tool_call_id",
            Self::FunctionName => "invalid_function_name",
            Self::ToolSchema => "invalid_function_parameters",
            Self::Prefix => "invalid_prefix",
            Self::Unsupported => "unsupported_parameter",
            Self::Image => "invalid_image",
            Self::Layout => "unsupported_tokenizer",
            Self::TooLong => "array_above_max_length",
            Self::Stopped(_) => "cpu_budget_exceeded",
        }
    }
}

/// A conversation that cannot be encoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{param}: {message}")]
pub struct ConversationError {
    /// Path of the offending field, such as `messages[3].content[1].type`.
    pub param: String,
    /// The broken rule.
    pub rule: Rule,
    /// A sentence for people.
    pub message: String,
}

impl ConversationError {
    /// An error at a path.
    pub fn new(param: impl fmt::Display, rule: Rule, message: impl Into<String>) -> Self {
        Self { param: param.to_string(), rule, message: message.into() }
    }

    /// The `code` of the OpenAI error object.
    pub fn code(&self) -> &'static str {
        self.rule.code()
    }

    /// The OpenAI error object: `{"error": {"message", "type", "param", "code"}}`.
    pub fn to_openai(&self) -> serde_json::Value {
        serde_json::json!({"error": {
            "message": self.message,
            "type": "invalid_request_error",
            "param": self.param,
            "code": self.code(),
        }})
    }
}

impl From<Stopped> for ConversationError {
    fn from(stopped: Stopped) -> Self {
        Self::new("", Rule::Stopped(stopped), stopped.to_string())
    }
}

/// Where in the request something stands; written out only when it is wrong.
#[derive(Clone, Copy)]
pub(super) struct At<'a> {
    parent: Option<&'a At<'a>>,
    step: Step<'a>,
}

#[derive(Clone, Copy)]
enum Step<'a> {
    Key(&'a str),
    Index(usize),
}

impl<'a> At<'a> {
    /// A field of the request.
    pub(super) fn root(key: &'a str) -> Self {
        Self { parent: None, step: Step::Key(key) }
    }

    /// A field of the object here.
    pub(super) fn key(&'a self, key: &'a str) -> Self {
        Self { parent: Some(self), step: Step::Key(key) }
    }

    /// An item of the array here.
    pub(super) fn index(&'a self, index: usize) -> Self {
        Self { parent: Some(self), step: Step::Index(index) }
    }

    /// An error here.
    pub(super) fn error(&self, rule: Rule, message: impl Into<String>) -> ConversationError {
        ConversationError::new(self, rule, message)
    }
}

impl fmt::Display for At<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            parent.fmt(f)?;
        }
        match self.step {
            Step::Key(key) if self.parent.is_none() => f.write_str(key),
            Step::Key(key) => write!(f, ".{key}"),
            Step::Index(index) => write!(f, "[{index}]"),
        }
    }
}
