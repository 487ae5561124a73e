//! The body of `POST /v1/messages`, and its conversion to a chat request.
//!
//! A user message may hold tool results: they come first, as in the model's training data, and the rest of the message
//! follows. Images that tools returned become part of the user message, because the model supports images only there.
//! Adjacent messages of one role form one turn, and a system message may be anywhere ([`turns`](crate::api::turns)). A
//! last message of the assistant is continued. Thinking blocks are left out, because this model does not think.

use std::{borrow::Cow, collections::HashMap};

use schemars::JsonSchema;
use serde::{Deserialize, de::IgnoredAny};
use serde_json::{Map, Value, json, value::RawValue};

use super::output::INVALID_JSON;
use crate::api::{
    bounds::FieldBounds,
    convert::{
        ChatCall, ChatContent, ChatFunction, ChatMessage, ChatPart, ChatTool, ChatToolFunction, Conversion, Dialect,
        Origin, Place, Text, entry, is_array, is_object, is_string, missing, refuse_foreign, unsupported,
    },
    declare::{Operation, Uses, fields},
    error::ApiError,
    fields::{Integer, OneOrMany},
    request::{Body, stops},
};
use crate::{openapi::agents, options::RouterOptions};

const DIALECT: Dialect = Dialect {
    fields: &[("stop", "stop_sequences"), ("response_format", "output_config.format")],
    tails: &[
        (".function.name", ".name"),
        (".function.arguments", ".input"),
        (".function.parameters", ".input_schema"),
        (".function.description", ".description"),
        (".tool_calls", ".content"),
        (".tool_call_id", ".tool_use_id"),
        (".image_url", ".source"),
    ],
    no_images: Some(no_images),
};

/// The text by which Anthropic's clients detect that they must remove images from the conversation.
fn no_images(place: Place) -> (String, &'static str) {
    (format!("{}.image", with_dots(place)), "this model does not support image input")
}

/// A position in the notation of Anthropic's server: `messages.3.content.0`.
fn with_dots(place: Place) -> String {
    place.to_string().replace('[', ".").replace(']', "")
}

const USES: Uses = Uses::of(&[Operation::Messages, Operation::CountTokens]);

fields! {
    /// The fields that only this API has, or that it interprets differently.
    pub struct MessagesRequest<'a> {}

    /// Instructions in front of the messages: a text, or text blocks.
    system: &'a RawValue as agents::AgentContent, USES;
    /// Tools that may be called. Tools that a server runs are left out; deferred tools are left out until a message
    /// refers to them.
    tools: Vec<&'a RawValue> as Vec<Tool<'static>>, USES;
    /// Whether a tool is called, and which one.
    tool_choice: ToolChoice, USES;
    /// Stop strings.
    stop_sequences: Vec<String>, USES, within stops;
    /// The format of the output.
    output_config: OutputConfig, USES;
    /// The format of the output, under its older name.
    output_format: Value as Map<String, Value>, USES;
    /// Ignored: this model does not think.
    thinking: IgnoredAny as Map<String, Value>, USES;
    /// Ignored: every prompt is cached.
    cache_control: IgnoredAny as Map<String, Value>, USES;
    /// Ignored: nothing is removed from a conversation.
    context_management: IgnoredAny as Map<String, Value>, USES;
    /// Refused unless it is empty.
    mcp_servers: Vec<IgnoredAny> as [(); 0], USES;
    /// Refused.
    container: Value as (), USES;
}

/// `tool_choice`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[schemars(rename = "AgentChoice")]
pub struct ToolChoice {
    /// `auto`, `any`, `tool` or `none`.
    #[schemars(with = "agents::AgentMode")]
    pub r#type: String,
    /// The name of the tool that must be called.
    pub name: Option<String>,
    /// At most one call.
    pub disable_parallel_tool_use: Option<bool>,
}

/// `output_config`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
pub struct OutputConfig {
    /// `{"type": "json_schema", "schema": {...}}`
    #[schemars(with = "Option<Map<String, Value>>")]
    pub format: Option<Value>,
    /// Accepted without effect: this model does not think.
    pub effort: Option<String>,
}

/// One of `messages`.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "AgentMessage")]
pub struct Message<'a> {
    #[schemars(required, with = "agents::AgentRole")]
    role: Option<Cow<'a, str>>,
    #[serde(borrow)]
    #[schemars(required, with = "agents::AgentContent")]
    content: Option<&'a RawValue>,
}

/// A content block of a message; its fields are parsed when its kind is known.
#[derive(Debug, Deserialize)]
struct Block<'a> {
    r#type: Option<Cow<'a, str>>,
    #[serde(borrow)]
    text: Option<&'a RawValue>,
    #[serde(borrow)]
    source: Option<&'a RawValue>,
    #[serde(borrow)]
    id: Option<&'a RawValue>,
    #[serde(borrow)]
    name: Option<&'a RawValue>,
    #[serde(borrow)]
    input: Option<&'a RawValue>,
    #[serde(borrow)]
    tool_use_id: Option<&'a RawValue>,
    #[serde(borrow)]
    tool_name: Option<&'a RawValue>,
    #[serde(borrow)]
    content: Option<&'a RawValue>,
    #[serde(borrow)]
    is_error: Option<&'a RawValue>,
}

/// The source of an image or a document.
#[derive(Debug, Deserialize)]
struct Source<'a> {
    r#type: Option<Cow<'a, str>>,
    media_type: Option<String>,
    #[serde(borrow)]
    data: Option<Cow<'a, str>>,
    url: Option<String>,
    #[serde(borrow)]
    content: Option<&'a RawValue>,
}

/// One of `tools`.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "AgentTool")]
struct Tool<'a> {
    /// `custom`, or absent; other tools are left out.
    #[allow(dead_code)] // it is read before
    r#type: Option<Cow<'a, str>>,
    #[serde(borrow)]
    #[schemars(required, with = "String")]
    name: Option<&'a RawValue>,
    #[serde(borrow)]
    #[schemars(with = "Option<String>")]
    description: Option<&'a RawValue>,
    /// A JSON schema.
    #[serde(borrow)]
    #[schemars(required, with = "Map<String, Value>")]
    input_schema: Option<&'a RawValue>,
    strict: Option<bool>,
    /// Whether the tool is shown only if a `tool_reference` names it.
    defer_loading: Option<bool>,
}

/// The kind of an entry of `tools`.
#[derive(Deserialize)]
struct ToolKind<'a> {
    r#type: Option<Cow<'a, str>>,
    input_schema: Option<IgnoredAny>,
}

const MESSAGES: &str = "messages";
const NO_ARGUMENTS: &str = "{}";
/// The prefix of a line that Claude Code puts in front of its instructions. The line has a number that differs in each
/// request.
const BILLING: &str = "x-anthropic-billing-header";

/// Parses a request: its conversation and its other fields. Counting tokens needs no `max_tokens`.
pub fn read<'b>(
    bytes: &'b [u8],
    operation: Operation,
    options: &RouterOptions,
) -> Result<(Conversion, Body<'b>), ApiError> {
    let (mut fields, request) = Body::parse_with::<MessagesRequest<'_>>(bytes, operation)?;
    if fields.max_tokens.is_none() && operation != Operation::CountTokens {
        return Err(ApiError::invalid("max_tokens", "`max_tokens` is required."));
    }
    refuse_foreign(&fields)?;
    if let Some(stops) = request.stop_sequences(&FieldBounds { operation, options })? {
        fields.stop = Some(OneOrMany(stops.to_vec()));
    }
    if request.mcp_servers.is_some_and(|servers| !servers.is_empty()) {
        return Err(ApiError::invalid("mcp_servers", "`mcp_servers` is not supported: this server calls no tools."));
    }
    if request.container.is_some() {
        return Err(ApiError::invalid("container", "`container` is not supported."));
    }
    let written = fields.messages.take().ok_or_else(|| ApiError::invalid(MESSAGES, "`messages` is required."))?;
    if written.list().is_empty() {
        return Err(ApiError::invalid(MESSAGES, "`messages` must be an array with at least one message."));
    }
    let mut draft = Draft::default();
    let forced = request.tool_choice.as_ref().and_then(|choice| choice.name.as_deref());
    fields.left_out += draft.read_tools(request.tools.as_deref().unwrap_or_default(), forced)?;
    if let Some(system) = request.system {
        draft.read_system(system)?;
    }
    let last = written.list().len() - 1;
    for (index, message) in written.list().iter().enumerate() {
        draft.read_message(message, index as u32, index == last)?;
    }
    fields.late_tools = draft.has_late_tools;
    let conversion = Conversion::new(&DIALECT, draft.messages, draft.tools)?;
    let fills_cache = fields.max_tokens == Some(Integer(0));
    if let Some(choice) = request.tool_choice {
        if fills_cache && matches!(choice.r#type.as_str(), "any" | "tool") {
            return Err(nothing_generated("`tool_choice` forces a call"));
        }
        if choice.disable_parallel_tool_use == Some(true) {
            fields.parallel_tool_calls = Some(false);
        }
        fields.tool_choice = Some(tool_choice(choice)?);
    }
    let (format, effort) = request.output_config.map_or((None, None), |config| (config.format, config.effort));
    fields.reasoning_effort = fields.reasoning_effort.or(effort);
    if let Some(format) = format.or(request.output_format) {
        if fills_cache {
            return Err(nothing_generated("`output_config.format` asks for a form"));
        }
        fields.structured.push(("response_format", response_format(&format)?));
    }
    if fills_cache && fields.stream == Some(true) {
        return Err(nothing_generated("`stream` is true"));
    }
    Ok((conversion, fields))
}

fn nothing_generated(why_not: &str) -> ApiError {
    let message =
        format!("`max_tokens` must be at least 1 if {why_not}: with 0 the prompt is cached and nothing else.");
    ApiError::invalid("max_tokens", message)
}

fn tool_choice(choice: ToolChoice) -> Result<Value, ApiError> {
    match (choice.r#type.as_str(), choice.name) {
        ("auto", _) => Ok("auto".into()),
        ("any", _) => Ok("required".into()),
        ("none", _) => Ok("none".into()),
        ("tool", Some(name)) => Ok(json!({"type": "function", "function": {"name": name}})),
        ("tool", None) => Err(ApiError::invalid("tool_choice.name", "`tool_choice.name` is required.")),
        _ => Err(ApiError::invalid(
            "tool_choice.type",
            "`tool_choice.type` must be \"auto\", \"any\", \"tool\" or \"none\".",
        )),
    }
}

fn response_format(format: &Value) -> Result<Value, ApiError> {
    match (format.get("type").and_then(Value::as_str), format.get("schema")) {
        (Some("json_schema"), Some(schema)) => {
            Ok(json!({"type": "json_schema", "json_schema": {"schema": schema, "strict": true}}))
        }
        _ => {
            let message = "`output_config.format` must have the type \"json_schema\" and a `schema`.";
            Err(ApiError::invalid("output_config.format", message))
        }
    }
}

/// The conversation of a request while it is parsed.
#[derive(Default)]
struct Draft<'a> {
    messages: Vec<(ChatMessage<'a>, Origin)>,
    /// The tools of the prompt.
    tools: Vec<(ChatTool<'a>, Place)>,
    /// Tools that are shown at the first reference to them, by name.
    deferred: HashMap<String, ChatTool<'a>>,
    has_late_tools: bool,
}

fn message<'a>(role: &'static str, content: ChatContent<'a>) -> ChatMessage<'a> {
    ChatMessage { role, content: Some(content), tool_calls: Vec::new(), tool_call_id: None, prefix: false }
}

impl<'a> Draft<'a> {
    /// Parses the tools; returns how many are left out. The tool that must be called is always included.
    fn read_tools(&mut self, written: &[&'a RawValue], forced: Option<&str>) -> Result<u32, ApiError> {
        let mut left_out = 0;
        for (index, written) in written.iter().enumerate() {
            let place = Place::Entry("tools", index as u32);
            let kind: ToolKind<'_> = entry(written, place)?;
            if kind.input_schema.is_none() && kind.r#type.is_some_and(|kind| kind != "custom") {
                left_out += 1;
                continue;
            }
            let Tool { name, description, input_schema, strict, defer_loading, .. } = entry(written, place)?;
            let parameters = Some(Cow::Borrowed(input_schema.ok_or_else(|| missing(place, "input_schema"))?));
            let (text, description) = (name.map(Text::ChatInput), description.map(Text::ChatInput));
            let tool = ChatTool {
                r#type: "function",
                function: ChatToolFunction { name: text, description, parameters, strict },
            };
            let name: Option<String> = name.and_then(|name| serde_json::from_str(name.get()).ok());
            match name {
                Some(name) if defer_loading == Some(true) && forced != Some(&name) => {
                    self.deferred.insert(name, tool);
                }
                _ => self.tools.push((tool, place)),
            }
        }
        Ok(left_out)
    }

    /// The text for a reference to a tool: its definition at the first reference, then its name.
    fn reference(&mut self, block: &Block<'a>, place: Place) -> Result<ChatPart<'a>, ApiError> {
        let name: String = entry(block.tool_name.ok_or_else(|| missing(place, "tool_name"))?, place)?;
        Ok(text(match self.deferred.remove(&name) {
            Some(tool) => {
                self.has_late_tools = true;
                tool.as_text()
            }
            None => name,
        }))
    }

    fn read_system(&mut self, written: &'a RawValue) -> Result<(), ApiError> {
        let place = Place::Field("system");
        if !is_array(written) {
            if !is_string(written) {
                return Err(ApiError::invalid("system", "`system` must be a string or an array of text blocks."));
            }
            if is_billing(written) {
                let text: String = entry(written, place)?;
                let rest = text.split_once('\n').map_or("", |(_, rest)| rest).to_owned();
                let content = ChatContent::Parts(vec![ChatPart::Text { text: Text::Made(rest) }]);
                self.messages.push((message("system", content), place.into()));
                return Ok(());
            }
            self.messages.push((message("system", ChatContent::ChatInput(written)), place.into()));
            return Ok(());
        }
        let blocks: Vec<&'a RawValue> = entry(written, place)?;
        let mut parts = Vec::new();
        let mut origin = Origin::from(place);
        for (index, written) in blocks.into_iter().enumerate() {
            let place = Place::Entry("system", index as u32);
            let block: Block<'a> = entry(written, place)?;
            match block.r#type.as_deref() {
                Some("text") if block.text.is_some_and(is_billing) => {}
                Some("text") => {
                    parts.push(ChatPart::text(block.text));
                    origin.parts.push(place);
                }
                kind => return Err(unsupported(place, "blocks", kind)),
            }
        }
        if !parts.is_empty() {
            self.messages.push((message("system", ChatContent::Parts(parts)), origin));
        }
        Ok(())
    }

    fn read_message(&mut self, written: &'a RawValue, index: u32, is_last: bool) -> Result<(), ApiError> {
        let place = Place::Entry(MESSAGES, index);
        let Message { role, content } = entry(written, place)?;
        let content = content.ok_or_else(|| missing(place, "content"))?;
        let role = match role.as_deref() {
            Some("user") => "user",
            Some("assistant") => "assistant",
            Some("system") => "system",
            Some(_) => {
                let message = format!("`{place}.role` must be \"user\", \"assistant\" or \"system\".");
                return Err(ApiError::invalid(format!("{place}.role"), message));
            }
            None => return Err(missing(place, "role")),
        };
        if !is_array(content) {
            let prefix = is_last && role == "assistant";
            let message = ChatMessage { prefix, ..message(role, ChatContent::ChatInput(content)) };
            self.messages.push((message, place.into()));
            return Ok(());
        }
        let blocks: Vec<&'a RawValue> = entry(content, place)?;
        let mut reader = Blocks::new(place);
        for (number, written) in blocks.into_iter().enumerate() {
            let place = Place::Part(MESSAGES, index, "content", number as u32);
            let block: Block<'a> = entry(written, place)?;
            reader.read(block, role, place, self)?;
        }
        reader.finish(role, is_last, self);
        Ok(())
    }
}

fn is_billing(text: &RawValue) -> bool {
    text.get().strip_prefix('"').is_some_and(|text| text.starts_with(BILLING))
}

/// The content blocks of one message.
struct Blocks<'a> {
    parts: Vec<ChatPart<'a>>,
    calls: Vec<ChatCall<'a>>,
    origin: Origin,
    /// Images that tools returned.
    images: Vec<(ChatPart<'a>, Place)>,
    has_results: bool,
    has_thought: bool,
}

impl<'a> Blocks<'a> {
    fn new(place: Place) -> Self {
        let (parts, calls, images) = Default::default();
        Self { parts, calls, images, origin: place.into(), has_results: false, has_thought: false }
    }

    fn read(&mut self, block: Block<'a>, role: &str, place: Place, draft: &mut Draft<'a>) -> Result<(), ApiError> {
        match (block.r#type.as_deref(), role) {
            (Some("text"), _) => self.push(ChatPart::text(block.text), place),
            (Some("image"), "user") => self.push(image(block.source, place)?, place),
            (Some("document"), "user") => {
                for part in document(block.source, place)? {
                    self.push(part, place);
                }
            }
            (Some("tool_reference"), "user") => {
                let part = draft.reference(&block, place)?;
                self.push(part, place);
            }
            (Some("tool_use"), "assistant") => {
                let name: String = entry(block.name.ok_or_else(|| missing(place, "name"))?, place)?;
                let id: String = entry(block.id.ok_or_else(|| missing(place, "id"))?, place)?;
                let function = ChatFunction { name: name.into(), arguments: arguments(block.input, place)? };
                self.calls.push(ChatCall { id: id.into(), function });
                self.origin.calls.push(place);
            }
            (Some("tool_result"), "user") => {
                self.has_results = true;
                self.result(block, place, draft)?;
            }
            (Some("thinking" | "redacted_thinking"), "assistant") => self.has_thought = true,
            (kind, _) => return Err(unsupported(place, "blocks", kind)),
        }
        Ok(())
    }

    fn push(&mut self, part: ChatPart<'a>, place: Place) {
        self.parts.push(part);
        self.origin.parts.push(place);
    }

    fn result(&mut self, block: Block<'a>, place: Place, draft: &mut Draft<'a>) -> Result<(), ApiError> {
        let call_id: String = entry(block.tool_use_id.ok_or_else(|| missing(place, "tool_use_id"))?, place)?;
        let failed =
            block.is_error.map(|failed| entry::<Option<bool>>(failed, place)).transpose()?.flatten() == Some(true);
        let mut origin = Origin::from(place);
        let content = match block.content {
            None => ChatContent::Parts(failed.then(|| text("Error".into())).into_iter().collect()),
            Some(written) if is_array(written) => {
                let mut texts = Vec::new();
                for block in entry::<Vec<&'a RawValue>>(written, place)? {
                    let block: Block<'a> = entry(block, place)?;
                    match block.r#type.as_deref() {
                        Some("text") if failed && texts.is_empty() => {
                            let said: String = entry(block.text.unwrap_or(RawValue::NULL), place)?;
                            texts.push(text(as_error(said)));
                        }
                        Some("text") => texts.push(ChatPart::text(block.text)),
                        Some("tool_reference") => texts.push(draft.reference(&block, place)?),
                        Some("document") => texts.append(&mut document(block.source, place)?),
                        Some("image") => self.images.push((image(block.source, place)?, place)),
                        kind => return Err(unsupported(place, "blocks", kind)),
                    }
                }
                origin.parts = vec![place; texts.len()];
                ChatContent::Parts(texts)
            }
            Some(written) if failed && is_string(written) => {
                ChatContent::Parts(vec![text(as_error(entry(written, place)?))])
            }
            Some(written) => ChatContent::ChatInput(written),
        };
        let result = ChatMessage { tool_call_id: Some(call_id.into()), ..message("tool", content) };
        draft.messages.push((result, origin));
        Ok(())
    }

    fn finish(mut self, role: &'static str, is_last: bool, draft: &mut Draft<'a>) {
        if !self.images.is_empty() {
            let (images, places): (Vec<_>, Vec<_>) = self.images.into_iter().unzip();
            self.parts.splice(0..0, images);
            self.origin.parts.splice(0..0, places);
        }
        let is_empty = self.parts.is_empty() && self.calls.is_empty();
        if is_empty && (self.has_results || self.has_thought) {
            return;
        }
        let prefix = is_last && role == "assistant" && self.calls.is_empty();
        let message = ChatMessage { tool_calls: self.calls, prefix, ..message(role, ChatContent::Parts(self.parts)) };
        draft.messages.push((message, self.origin));
    }
}

/// The arguments of a call. The substitute for arguments that were not an object becomes the model's original text.
fn arguments<'a>(input: Option<&'a RawValue>, place: Place) -> Result<Cow<'a, RawValue>, ApiError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Invalid<'a> {
        #[serde(borrow, rename = "INVALID_JSON")]
        written: &'a RawValue,
    }
    let Some(input) = input else { return Ok(Cow::Borrowed(entry(no_arguments(), place)?)) };
    // the chat API accepts arguments as text, this API does not
    if !is_object(input) {
        let message = format!("`{place}.input` must be an object.");
        return Err(ApiError::invalid(format!("{place}.input"), message));
    }
    if input.get().contains(INVALID_JSON)
        && let Ok(Invalid { written }) = serde_json::from_str(input.get())
        && is_string(written)
    {
        return Ok(Cow::Borrowed(written));
    }
    Ok(Cow::Borrowed(input))
}

fn text<'a>(text: String) -> ChatPart<'a> {
    ChatPart::Text { text: Text::Made(text) }
}

/// The model's format has no marker for a failed call, so the text of its result begins with "Error".
fn as_error(text: String) -> String {
    if text.starts_with("Error") { text } else { format!("Error: {text}") }
}

fn no_arguments() -> &'static RawValue {
    serde_json::from_str(NO_ARGUMENTS).unwrap_or(RawValue::NULL)
}

fn image<'a>(source: Option<&RawValue>, place: Place) -> Result<ChatPart<'a>, ApiError> {
    let wrong = |what: &str| ApiError::invalid(format!("{place}.source"), format!("`{place}.source` {what}."));
    let source: Source<'_> = entry(source.ok_or_else(|| wrong("is required"))?, place)?;
    let url = match (source.r#type.as_deref(), source.media_type, source.data, source.url) {
        (Some("base64"), Some(media_type), Some(data), _) => format!("data:{media_type};base64,{data}"),
        (Some("base64"), ..) => return Err(wrong("must have `media_type` and `data`")),
        (Some("url"), _, _, Some(url)) => url,
        (Some("url"), ..) => return Err(wrong("must have a `url`")),
        _ => return Err(wrong("must have the type \"base64\" or \"url\"")),
    };
    Ok(ChatPart::ImageUrl { image_url: Text::Made(url) })
}

/// The text of a text document. Other documents are refused with the text by which Anthropic's clients detect that they
/// must remove the document from the conversation.
fn document<'a>(source: Option<&'a RawValue>, place: Place) -> Result<Vec<ChatPart<'a>>, ApiError> {
    let refused = || {
        let param = format!("{}.document", with_dots(place));
        ApiError::invalid(param, "this model does not support PDF input")
    };
    let source: Source<'a> = entry(source.ok_or_else(refused)?, place)?;
    match (source.r#type.as_deref(), source.data, source.content) {
        (Some("text"), Some(data), _) => Ok(vec![text(data.into_owned())]),
        (Some("content"), _, Some(content)) if is_string(content) => Ok(vec![ChatPart::text(Some(content))]),
        (Some("content"), _, Some(content)) => {
            let blocks: Vec<Block<'a>> = entry(content, place)?;
            let as_text = |block: Block<'a>| match block.r#type.as_deref() {
                Some("text") => Ok(ChatPart::text(block.text)),
                kind => Err(unsupported(place, "blocks", kind)),
            };
            blocks.into_iter().map(as_text).collect()
        }
        _ => Err(refused()),
    }
}
