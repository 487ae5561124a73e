//! What requests of other APIs become: a chat request, and the way back from its fields to theirs.
//!
//! `/v1/responses` and `/v1/messages` say in other words what a chat completion says. Their requests are written as
//! chat messages once ([`Conversion`]), and everything behind is the same: rules, prompt, placement, failover. A rule
//! that such a message breaks is given by the name that the client knows ([`Conversion::in_words_of_client`]).
//!
//! Texts, arguments and schemas are copied as JSON, unread: what reaches the prompt is what the client wrote.

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

/// The code of the error that says that a model takes no images.
pub const NO_IMAGES: &str = "unsupported_image";

/// A place in the client's request.
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

/// A message as a chat request has it.
#[derive(Debug, Serialize)]
pub struct ChatMessage<'a> {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: &'static str,
    /// What it says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<ChatContent<'a>>,
    /// What it calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ChatCall<'a>>,
    /// The call whose result this is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<Cow<'a, str>>,
    /// Whether the model continues with it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub prefix: bool,
}

/// Content of a [`ChatMessage`].
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum ChatContent<'a> {
    /// As the client wrote it.
    ChatInput(&'a RawValue),
    /// Texts and images.
    Parts(Vec<ChatPart<'a>>),
}

impl ChatContent<'_> {
    /// Whether it says nothing.
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
    /// A text; the value is a JSON string, or whatever the client wrote in its place.
    Text {
        /// The text.
        text: Text<'a>,
    },
    /// An image.
    ImageUrl {
        /// Where it is.
        image_url: Text<'a>,
    },
}

/// A JSON value of the client's, or a text of our own.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Text<'a> {
    /// As the client wrote it.
    ChatInput(&'a RawValue),
    /// Put together here.
    Made(String),
}

impl<'a> ChatPart<'a> {
    /// A text as the client wrote it; one that is missing is `null`, which the conversation's reader refuses.
    pub fn text(text: Option<&'a RawValue>) -> Self {
        Self::Text { text: Text::ChatInput(text.unwrap_or(RawValue::NULL)) }
    }
}

/// A call of a [`ChatMessage`].
#[derive(Debug, Serialize)]
pub struct ChatCall<'a> {
    /// Its id.
    pub id: Cow<'a, str>,
    /// The function.
    pub function: ChatFunction<'a>,
}

/// Function and arguments of a [`ChatCall`].
#[derive(Debug, Serialize)]
pub struct ChatFunction<'a> {
    /// Its name.
    pub name: Cow<'a, str>,
    /// An object, or a text that holds one.
    pub arguments: Cow<'a, RawValue>,
}

/// A tool as a chat request has it.
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
    /// Its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<Text<'a>>,
    /// What it is for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<Text<'a>>,
    /// The schema of its arguments.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Cow<'a, RawValue>>,
    /// Whether arguments must keep to it in every detail.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strict: Option<bool>,
}

impl ChatTool<'_> {
    /// The tool as a text, written as the prompt's list of tools has it. The model's format has one place for tools, in
    /// front of the first user message: a tool that becomes known later is shown as text where that happens, so that the
    /// prompt up to there stays what it was.
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

/// Reads one entry of a list; an error names its place.
pub fn entry<'a, T: serde::Deserialize<'a>>(written: &'a RawValue, place: Place) -> Result<T, ApiError> {
    cpu_budget::check(Stage::Parse)?;
    serde_json::from_str(written.get()).map_err(|error| {
        let text = error.to_string();
        let reason = text.rfind(" at line ").map_or(text.as_str(), |at| &text[..at]);
        ApiError::invalid(place.to_string(), format!("`{place}`: {reason}."))
    })
}

/// A field of an entry that must be there.
pub fn missing(place: Place, name: &str) -> ApiError {
    ApiError::invalid(format!("{place}.{name}"), format!("`{place}.{name}` is required."))
}

/// An entry of a kind that nobody serves; `what` are such entries.
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

/// Refuses what other APIs have and one with a single response has not.
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

/// Where a chat message comes from.
#[derive(Clone, Debug)]
pub struct Origin {
    /// The message itself.
    pub message: Place,
    /// Each part of its content, where that was taken apart.
    pub parts: Vec<Place>,
    /// Each of its calls.
    pub calls: Vec<Place>,
}

impl From<Place> for Origin {
    fn from(message: Place) -> Self {
        Self { message, parts: Vec::new(), calls: Vec::new() }
    }
}

/// Field and message of a refusal for a place.
pub type Refusal = fn(Place) -> (String, &'static str);

/// How fields are named in the client's API.
pub struct Dialect {
    /// Chat's name of a field of the body, and the client's.
    pub fields: &'static [(&'static str, &'static str)],
    /// What follows a message's, a part's, a call's or a tool's place in a chat request, and in the client's; the first
    /// that fits counts.
    pub tails: &'static [(&'static str, &'static str)],
    /// How an image for a model that takes none is refused: field and message for its place.
    pub no_images: Option<Refusal>,
}

/// A request on its way to become a chat request.
pub struct Conversion {
    messages: Vec<Box<RawValue>>,
    origins: Vec<Origin>,
    tools: Option<Box<RawValue>>,
    tool_places: Vec<Place>,
    dialect: &'static Dialect,
}

impl Conversion {
    /// Messages in the order of their turns, and the tools of the prompt.
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

    /// The chat request: a body that has the conversation's messages and tools.
    pub fn body<'b>(&'b self, mut fields: Body<'b>) -> Body<'b> {
        fields.messages = Some(Messages::List(self.messages.iter().map(|message| &**message).collect()));
        fields.tools = self.tools.as_deref();
        fields
    }

    /// An error of the chat request, reported by the names of the client's.
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
            // as a whole (`stop` but not `stop_token_ids`), or with what follows it: `messages[3].content`
            for end in ['`', '[', '.'] {
                error.message = error.message.replace(&format!("`{name}{end}"), &format!("`{own}{end}"));
            }
        }
        error.param = Some(path);
        error
    }

    /// Where a part of a chat message comes from.
    fn place(&self, param: &str) -> Option<Place> {
        let (index, rest) = indexed(param, "messages")?;
        let origin = self.origins.get(index)?;
        let (number, _) = indexed(rest.strip_prefix('.')?, "content")?;
        origin.parts.get(number).copied()
    }

    /// The client's path of a chat request's path, where the two differ.
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

    /// The client's name of a field that a grammar came from.
    pub fn own_field(&self, name: &'static str) -> &'static str {
        self.dialect.fields.iter().find(|(chat, _)| *chat == name).map_or(name, |(_, own)| own)
    }
}

/// `name[7].rest` as 7 and `.rest`.
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
    fn a_name_that_begins_like_another_stays() {
        let conversion = Conversion::new(&DIALECT, Vec::new(), Vec::new()).unwrap();
        let reported = |message: &str| conversion.in_words_of_client(ApiError::invalid("x", message)).message;
        assert_eq!(reported("`max_tokens_per_day` is wrong"), "`max_tokens_per_day` is wrong");
        assert_eq!(reported("`messages[2].role` and `max_tokens`"), "`input[2].role` and `max_output_tokens`");
    }

    #[test]
    fn errors_are_told_in_the_clients_words() {
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
        // the client's first and third tools are none of the prompt's
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
