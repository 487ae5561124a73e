//! Conversion of other APIs' requests to chat requests, and of the errors' field names back.
//!
//! Requests of `/v1/responses` and `/v1/messages` are converted to chat messages once ([`Conversion`]), and all later
//! steps are shared: rules, prompt, placement, failover. An error about such a message names the field of the client's
//! API ([`Conversion::in_words_of_client`]).
//!
//! Texts, arguments and schemas are copied as unparsed JSON, so that the prompt holds exactly what the client wrote.

use std::borrow::Cow;

use bora_common::{
    conversation::Json,
    cpu_budget::{self, Stage},
};
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

use super::{
    error::ApiError,
    fields::{Integer, Messages},
    request::Body,
    turns,
};

/// The error code of an image for a model that accepts none.
pub const NO_IMAGES: &str = "unsupported_image";

/// A position in the client's request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A field of the body: `instructions`, `system`.
    Field(&'static str),
    /// An entry of a list in the body: `input[3]`.
    Entry(&'static str, u32),
    /// An entry of a list in such an entry: `messages[3].content[1]`.
    Part(&'static str, u32, &'static str, u32),
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::Field(name) => f.write_str(name),
            Place::Entry(list, index) => write!(f, "{list}[{index}]"),
            Place::Part(list, index, inner, part) => write!(f, "{list}[{index}].{inner}[{part}]"),
        }
    }
}

/// A message of a chat request.
#[derive(Debug, Serialize)]
pub struct ChatMessage<'a> {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: &'static str,
    /// The content.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<ChatContent<'a>>,
    /// The tool calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ChatCall<'a>>,
    /// The ID of the call whose result this message is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<Cow<'a, str>>,
    /// Whether the model continues this message.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub prefix: bool,
}

/// The content of a [`ChatMessage`].
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum ChatContent<'a> {
    /// As the client wrote it.
    ChatInput(&'a RawValue),
    /// Text and image parts.
    Parts(Vec<ChatPart<'a>>),
}

impl ChatContent<'_> {
    /// Whether the content is empty.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::ChatInput(written) => matches!(written.get(), "\"\"" | "null"),
            Self::Parts(parts) => parts.is_empty(),
        }
    }
}

/// A text or an image.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ChatPart<'a> {
    /// A text; the value is the client's JSON value, normally a string.
    Text {
        /// The text.
        text: Text<'a>,
    },
    /// An image.
    ImageUrl {
        /// The URL of the image.
        image_url: Text<'a>,
    },
}

/// A JSON value of the client, or a text of the router.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Text<'a> {
    /// As the client wrote it.
    ChatInput(&'a RawValue),
    /// Created by the router.
    Made(String),
}

impl<'a> ChatPart<'a> {
    /// A text as the client wrote it; an absent text becomes `null`, which the conversation parser refuses.
    pub fn text(text: Option<&'a RawValue>) -> Self {
        Self::Text { text: Text::ChatInput(text.unwrap_or(RawValue::NULL)) }
    }
}

/// A tool call of a [`ChatMessage`].
#[derive(Debug, Serialize)]
pub struct ChatCall<'a> {
    /// The ID of the call.
    pub id: Cow<'a, str>,
    /// The function.
    pub function: ChatFunction<'a>,
}

/// Function and arguments of a [`ChatCall`].
#[derive(Debug, Serialize)]
pub struct ChatFunction<'a> {
    /// The name of the function.
    pub name: Cow<'a, str>,
    /// The arguments: an object, or a text that holds one.
    pub arguments: Cow<'a, RawValue>,
}

/// A tool of a chat request.
#[derive(Clone, Debug, Serialize)]
pub struct ChatTool<'a> {
    /// `function`
    pub r#type: &'static str,
    /// The function.
    pub function: ChatToolFunction<'a>,
}

/// The function of a [`ChatTool`].
#[derive(Clone, Debug, Serialize)]
pub struct ChatToolFunction<'a> {
    /// The name of the function.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<Text<'a>>,
    /// The description of the function.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<Text<'a>>,
    /// The JSON schema of its arguments.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Cow<'a, RawValue>>,
    /// Whether arguments must match the schema exactly.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strict: Option<bool>,
}

impl ChatTool<'_> {
    /// The tool as text, written as in the prompt's list of tools. The model's format has one place for tools, in front
    /// of the first user message. A tool that appears later is shown as text at its position, so that the prompt before
    /// it does not change.
    pub fn as_text(&self) -> String {
        let written = serde_json::to_string(self).unwrap_or_default();
        let mut text = String::with_capacity(written.len() + 64);
        match Json::parse(&written) {
            Ok(tool) => tool.dump(&mut text),
            Err(_) => text.push_str(&written),
        }
        text
    }
}

/// Parses one entry of a list; an error names its position.
pub fn entry<'a, T: serde::Deserialize<'a>>(written: &'a RawValue, place: Place) -> Result<T, ApiError> {
    cpu_budget::check(Stage::Parse)?;
    serde_json::from_str(written.get()).map_err(|error| {
        let text = error.to_string();
        let reason = text.rfind(" at line ").map_or(text.as_str(), |at| &text[..at]);
        ApiError::invalid(place.to_string(), format!("`{place}`: {reason}."))
    })
}

/// The refusal of an entry without a required field.
pub fn missing(place: Place, name: &str) -> ApiError {
    ApiError::invalid(format!("{place}.{name}"), format!("`{place}.{name}` is required."))
}

/// The refusal of an entry of an unsupported kind; `what` names such entries.
pub fn unsupported(place: Place, what: &str, kind: Option<&str>) -> ApiError {
    let Some(kind) = kind else { return missing(place, "type") };
    let kind: String = kind.chars().take(64).collect();
    ApiError::invalid(format!("{place}.type"), format!("`{place}`: {what} of type \"{kind}\" are not supported."))
}

/// Whether a JSON value is a string.
pub fn is_string(written: &RawValue) -> bool {
    written.get().starts_with('"')
}

/// Whether a JSON value is an array.
pub fn is_array(written: &RawValue) -> bool {
    written.get().starts_with('[')
}

/// Whether a JSON value is an object.
pub fn is_object(written: &RawValue) -> bool {
    written.get().starts_with('{')
}

/// Refuses fields of the chat API that an API with a single output per request does not have.
pub fn refuse_foreign(fields: &Body<'_>) -> Result<(), ApiError> {
    let is_above_one = |number: &Option<Integer>| number.is_some_and(|Integer(number)| number != 1);
    for (name, is_there) in [
        ("n", is_above_one(&fields.n)),
        ("best_of", is_above_one(&fields.best_of)),
        ("prompt_logprobs", fields.prompt_logprobs.is_some()),
        ("continue_final_message", fields.continue_final_message == Some(true)),
    ] {
        if is_there {
            return Err(ApiError::invalid(name, format!("`{name}` is not a field of this API.")));
        }
    }
    Ok(())
}

/// The source of a chat message in the client's request.
#[derive(Clone, Debug)]
pub struct Origin {
    /// The position of the message itself.
    pub message: Place,
    /// The position of each content part, if the content was split.
    pub parts: Vec<Place>,
    /// The position of each tool call.
    pub calls: Vec<Place>,
}

impl From<Place> for Origin {
    fn from(message: Place) -> Self {
        Self { message, parts: Vec::new(), calls: Vec::new() }
    }
}

/// Field and message of a refusal at a position.
pub type Refusal = fn(Place) -> (String, &'static str);

/// The names of fields in the client's API.
pub struct Dialect {
    /// The name in a chat request of a body field, and the name in the client's API.
    pub fields: &'static [(&'static str, &'static str)],
    /// Suffixes after the position of a message, part, call or tool: in a chat request, and in the client's API. The
    /// first match is used.
    pub tails: &'static [(&'static str, &'static str)],
    /// The refusal of an image for a model that accepts none: field and message at its position.
    pub no_images: Option<Refusal>,
}

/// A conversion to a chat request in progress.
pub struct Conversion {
    messages: Vec<Box<RawValue>>,
    origins: Vec<Origin>,
    tools: Option<Box<RawValue>>,
    tool_places: Vec<Place>,
    dialect: &'static Dialect,
}

impl Conversion {
    /// Adds the messages in the order of their turns, and the tools of the prompt.
    pub fn new(
        dialect: &'static Dialect,
        messages: Vec<(ChatMessage<'_>, Origin)>,
        tools: Vec<(ChatTool<'_>, Place)>,
    ) -> Result<Self, ApiError> {
        let internal = |error: serde_json::Error| ApiError::internal(error.to_string());
        let (messages, origins): (Vec<_>, Vec<_>) = turns::order(messages).into_iter().unzip();
        let written = |message: &ChatMessage<'_>| {
            cpu_budget::check(Stage::Parse)?;
            to_raw_value(message).map_err(internal)
        };
        let messages = messages.iter().map(written).collect::<Result<_, ApiError>>()?;
        let (tools, tool_places): (Vec<_>, Vec<_>) = tools.into_iter().unzip();
        let tools = (!tools.is_empty()).then(|| to_raw_value(&tools)).transpose().map_err(internal)?;
        Ok(Self { messages, origins, tools, tool_places, dialect })
    }

    /// Returns the chat request: a body with the conversation's messages and tools.
    pub fn body<'b>(&'b self, mut fields: Body<'b>) -> Body<'b> {
        fields.messages = Some(Messages::List(self.messages.iter().map(|message| &**message).collect()));
        fields.tools = self.tools.as_deref();
        fields
    }

    /// Renames the field of a chat request's error to the client's field.
    pub fn in_words_of_client(&self, mut error: ApiError) -> ApiError {
        let Some(param) = error.param.take() else { return error };
        if let (Some(no_images), Some(NO_IMAGES)) = (self.dialect.no_images, error.code)
            && let Some(place) = self.place(&param)
        {
            let (param, message) = no_images(place);
            error.message = message.to_owned();
            error.param = Some(param);
            return error;
        }
        let path = self.path(&param).unwrap_or_else(|| param.clone());
        for (name, own) in self.dialect.fields {
            // match the whole name (`stop` but not `stop_token_ids`), or the name with a suffix: `messages[3].content`
            for end in ['`', '[', '.'] {
                error.message = error.message.replace(&format!("`{name}{end}"), &format!("`{own}{end}"));
            }
        }
        error.param = Some(path);
        error
    }

    /// The source of a part of a chat message.
    fn place(&self, param: &str) -> Option<Place> {
        let (index, rest) = indexed(param, "messages")?;
        let origin = self.origins.get(index)?;
        let (number, _) = indexed(rest.strip_prefix('.')?, "content")?;
        origin.parts.get(number).copied()
    }

    /// The client's path of a chat request's path, if the two differ.
    fn path(&self, param: &str) -> Option<String> {
        if let Some((index, rest)) = indexed(param, "messages") {
            let Some(origin) = self.origins.get(index) else { return self.field("messages") };
            let from_list = |name: &str, places: &[Place]| {
                let (number, rest) = indexed(rest.strip_prefix('.')?, name)?;
                Some((*places.get(number)?, rest))
            };
            let (place, rest) = from_list("content", &origin.parts)
                .or_else(|| from_list("tool_calls", &origin.calls))
                .unwrap_or((origin.message, rest));
            if let (Place::Field(_), ".content" | ".role") = (place, rest) {
                return Some(place.to_string());
            }
            return Some(format!("{place}{}", self.tail(rest)));
        }
        if let Some((index, rest)) = indexed(param, "tools") {
            let place = self.tool_places.get(index)?;
            return Some(format!("{place}{}", self.tail(rest)));
        }
        self.field(param)
    }

    fn tail<'t>(&self, rest: &'t str) -> &'t str {
        self.dialect.tails.iter().find(|(chat, _)| *chat == rest).map_or(rest, |(_, own)| own)
    }

    fn field(&self, name: &str) -> Option<String> {
        self.dialect.fields.iter().find(|(chat, _)| *chat == name).map(|(_, own)| (*own).to_owned())
    }

    /// The client's name of the field that a grammar came from.
    pub fn own_field(&self, name: &'static str) -> &'static str {
        self.dialect.fields.iter().find(|(chat, _)| *chat == name).map_or(name, |(_, own)| own)
    }
}

/// Splits `name[7].rest` into 7 and `.rest`.
fn indexed<'p>(path: &'p str, name: &str) -> Option<(usize, &'p str)> {
    let (index, rest) = path.strip_prefix(name)?.strip_prefix('[')?.split_once(']')?;
    Some((index.parse().ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIALECT: Dialect = Dialect {
        fields: &[("messages", "input"), ("max_tokens", "max_output_tokens")],
        tails: &[(".function.name", ".name"), (".tool_call_id", ".call_id")],
        no_images: None,
    };

    #[test]
    fn keeps_names_with_a_common_prefix() {
        let conversion = Conversion::new(&DIALECT, Vec::new(), Vec::new()).unwrap();
        let reported = |message: &str| conversion.in_words_of_client(ApiError::invalid("x", message)).message;
        assert_eq!(reported("`max_tokens_per_day` is wrong"), "`max_tokens_per_day` is wrong");
        assert_eq!(reported("`messages[2].role` and `max_tokens`"), "`input[2].role` and `max_output_tokens`");
    }

    #[test]
    fn names_fields_of_the_client_in_errors() {
        let message =
            || ChatMessage { role: "user", content: None, tool_calls: vec![], tool_call_id: None, prefix: false };
        let origin = Origin {
            message: Place::Entry("input", 4),
            parts: vec![Place::Part("input", 4, "content", 2)],
            calls: vec![Place::Entry("input", 5)],
        };
        let messages = vec![(message(), Place::Field("instructions").into()), (message(), origin)];
        let function = ChatToolFunction { name: None, description: None, parameters: None, strict: None };
        let tool = |index| (ChatTool { r#type: "function", function: function.clone() }, Place::Entry("tools", index));
        // the client's first and third tools are not in the prompt
        let conversion = Conversion::new(&DIALECT, messages, vec![tool(1), tool(3)]).unwrap();
        for (chat, own) in [
            ("messages", "input"),
            ("messages[0].content", "instructions"),
            ("messages[1].role", "input[4].role"),
            ("messages[1].content[0].text", "input[4].content[2].text"),
            ("messages[1].content", "input[4].content"),
            ("messages[1].tool_calls[0].function.name", "input[5].name"),
            ("messages[1].tool_call_id", "input[4].call_id"),
            ("messages[9].content", "input"),
            ("tools[1].function.name", "tools[3].name"),
            ("max_tokens", "max_output_tokens"),
            ("temperature", "temperature"),
        ] {
            let error = conversion.in_words_of_client(ApiError::invalid(chat, "`max_tokens` is wrong"));
            assert_eq!(
                (error.param.as_deref(), &*error.message),
                (Some(own), "`max_output_tokens` is wrong"),
                "{chat}"
            );
        }
    }
}
