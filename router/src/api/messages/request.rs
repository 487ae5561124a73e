//! The body of `POST /v1/messages`, and the chat request that it becomes.
//!
//! A user's message may hold results of tools: they come first, as the model saw it in training, and what else the
//! message says follows; pictures that tools returned are shown there too, because the model looks at pictures in a
//! user's message only. A last message of the assistant's is continued. Thinking is left out: this model does not think.

use std::borrow::Cow;

use schemars::JsonSchema;
use serde::{Deserialize, de::IgnoredAny};
use serde_json::{Map, Value, json, value::RawValue};

use crate::api::{
    bounds::Limits,
    convert::{
        ChatCall, ChatContent, ChatFunction, ChatMessage, ChatPart, ChatTool, ChatToolFunction, Conversion, Dialect,
        Origin, Place, Text, entry, is_array, is_object, is_string, missing, refuse_foreign, unsupported,
    },
    declare::{Operation, Uses, fields},
    error::ApiError,
    fields::OneOrMany,
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
};

const USES: Uses = Uses::of(&[Operation::Messages, Operation::CountTokens]);

fields! {
    /// The fields that only this API has, or means something else by.
    pub struct MessagesRequest<'a> {}

    /// Instructions in front of the messages: a text, or blocks of text.
    system: &'a RawValue as agents::AgentContent, USES;
    /// Tools that may be called; only the client's own.
    tools: Vec<&'a RawValue> as Vec<Tool<'static>>, USES;
    /// Whether and which.
    tool_choice: ToolChoice, USES;
    /// Texts that end the answer.
    stop_sequences: Vec<String>, USES, within stops;
    /// The form of the answer.
    output_config: OutputConfig, USES;
    /// The form of the answer, under its older name.
    output_format: Value as Map<String, Value>, USES;
    /// Ignored: this model does not think.
    thinking: IgnoredAny as Map<String, Value>, USES;
    /// Ignored: every prompt is cached.
    cache_control: IgnoredAny as Map<String, Value>, USES;
    /// Ignored: nothing is taken out of a conversation.
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
    /// Of the tool that must be called.
    pub name: Option<String>,
    /// One call at most.
    pub disable_parallel_tool_use: Option<bool>,
}

/// `output_config`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
pub struct OutputConfig {
    /// `{"type": "json_schema", "schema": {...}}`
    #[schemars(with = "Option<Map<String, Value>>")]
    pub format: Option<Value>,
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

/// One of the blocks of a message's content.
#[derive(Debug, Deserialize)]
struct Block<'a> {
    r#type: Option<Cow<'a, str>>,
    #[serde(borrow)]
    text: Option<&'a RawValue>,
    #[serde(borrow)]
    source: Option<Source<'a>>,
    id: Option<String>,
    name: Option<String>,
    #[serde(borrow)]
    input: Option<&'a RawValue>,
    tool_use_id: Option<String>,
    #[serde(borrow)]
    content: Option<&'a RawValue>,
    is_error: Option<bool>,
}

/// Where a picture is.
#[derive(Debug, Deserialize)]
struct Source<'a> {
    r#type: Option<Cow<'a, str>>,
    media_type: Option<String>,
    #[serde(borrow)]
    data: Option<Cow<'a, str>>,
    url: Option<String>,
}

/// One of `tools`.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "AgentTool")]
struct Tool<'a> {
    /// `custom`, or absent.
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
}

const MESSAGES: &str = "messages";
const NO_ARGUMENTS: &str = "{}";
/// Claude Code puts a line with a number that is another one in each request in front of its instructions.
const BILLING: &str = "x-anthropic-billing-header";

/// Reads a request: its conversation and its other fields. Counting tokens needs no `max_tokens`.
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
    if let Some(stops) = request.stop_sequences(&Limits { operation, options })? {
        fields.stop = Some(OneOrMany(stops.to_vec()));
    }
    if request.mcp_servers.is_some_and(|servers| !servers.is_empty()) {
        return Err(ApiError::invalid("mcp_servers", "`mcp_servers` is not supported: this server calls no tools."));
    }
    if request.container.is_some() {
        return Err(ApiError::invalid("container", "`container` is not supported."));
    }
    let written = fields.messages.take().ok_or_else(|| ApiError::invalid(MESSAGES, "`messages` is required."))?;
    let mut conversion = Conversion::new(&DIALECT);
    if let Some(system) = request.system {
        read_system(system, &mut conversion)?;
    }
    let last = written.list().len().saturating_sub(1);
    for (index, message) in written.list().iter().enumerate() {
        read_message(message, index as u32, index == last, &mut conversion)?;
    }
    if written.list().is_empty() {
        return Err(ApiError::invalid(MESSAGES, "`messages` must be an array with at least one message."));
    }
    conversion.set_tools(&tools(request.tools.as_deref().unwrap_or_default())?)?;
    if let Some(choice) = request.tool_choice {
        if choice.disable_parallel_tool_use == Some(true) {
            fields.parallel_tool_calls = Some(false);
        }
        fields.tool_choice = Some(tool_choice(choice)?);
    }
    let format = request.output_config.and_then(|config| config.format).or(request.output_format);
    if let Some(format) = format {
        fields.structured.push(("response_format", response_format(&format)?));
    }
    Ok((conversion, fields))
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

fn tools<'a>(written: &[&'a RawValue]) -> Result<Vec<ChatTool<'a>>, ApiError> {
    let tool = |(index, written): (usize, &&'a RawValue)| {
        let place = Place::Entry("tools", index as u32);
        let Tool { r#type, name, description, input_schema, strict } = entry(written, place)?;
        if r#type.as_deref().is_some_and(|kind| kind != "custom") {
            return Err(unsupported(place, "tools", r#type.as_deref()));
        }
        let parameters = input_schema.ok_or_else(|| missing(place, "input_schema"))?;
        let function = ChatToolFunction { name, description, parameters: Some(parameters), strict };
        Ok(ChatTool { r#type: "function", function })
    };
    written.iter().enumerate().map(tool).collect()
}

fn message<'a>(role: &'static str, content: ChatContent<'a>) -> ChatMessage<'a> {
    ChatMessage { role, content: Some(content), tool_calls: Vec::new(), tool_call_id: None, prefix: false }
}

fn read_system(written: &RawValue, conversion: &mut Conversion) -> Result<(), ApiError> {
    let place = Place::Field("system");
    if !is_array(written) {
        if !is_string(written) {
            return Err(ApiError::invalid("system", "`system` must be a string or an array of text blocks."));
        }
        if is_billing(written) {
            let text: String = entry(written, place)?;
            let rest = text.split_once('\n').map_or("", |(_, rest)| rest).to_owned();
            let content = ChatContent::Parts(vec![ChatPart::Text { text: Text::Made(rest) }]);
            return conversion.push(&message("system", content), place);
        }
        return conversion.push(&message("system", ChatContent::Written(written)), place);
    }
    let blocks: Vec<&RawValue> = entry(written, place)?;
    let mut parts = Vec::new();
    let mut origin = Origin::from(place);
    for (index, written) in blocks.into_iter().enumerate() {
        let place = Place::Entry("system", index as u32);
        let block: Block<'_> = entry(written, place)?;
        match block.r#type.as_deref() {
            Some("text") if block.text.is_some_and(is_billing) => {}
            Some("text") => {
                parts.push(ChatPart::text(block.text));
                origin.parts.push(place);
            }
            kind => return Err(unsupported(place, "blocks", kind)),
        }
    }
    if parts.is_empty() {
        return Ok(());
    }
    conversion.push(&message("system", ChatContent::Parts(parts)), origin)
}

fn is_billing(text: &RawValue) -> bool {
    text.get().strip_prefix('"').is_some_and(|text| text.starts_with(BILLING))
}

fn read_message(written: &RawValue, index: u32, is_last: bool, conversion: &mut Conversion) -> Result<(), ApiError> {
    let place = Place::Entry(MESSAGES, index);
    let Message { role, content } = entry(written, place)?;
    let content = content.ok_or_else(|| missing(place, "content"))?;
    let role = match role.as_deref() {
        Some("user") => "user",
        Some("assistant") => "assistant",
        Some("system") => "system",
        Some(_) => {
            let message = format!("`{place}.role` must be \"user\" or \"assistant\".");
            return Err(ApiError::invalid(format!("{place}.role"), message));
        }
        None => return Err(missing(place, "role")),
    };
    if !is_array(content) {
        let prefix = is_last && role == "assistant";
        return conversion.push(&ChatMessage { prefix, ..message(role, ChatContent::Written(content)) }, place);
    }
    let blocks: Vec<&RawValue> = entry(content, place)?;
    let mut reader = Blocks::new(place);
    for (number, written) in blocks.into_iter().enumerate() {
        let place = Place::Part(MESSAGES, index, "content", number as u32);
        let block: Block<'_> = entry(written, place)?;
        reader.read(block, role, place, conversion)?;
    }
    reader.finish(role, is_last, conversion)
}

/// The blocks of one message.
struct Blocks<'a> {
    parts: Vec<ChatPart<'a>>,
    calls: Vec<ChatCall<'a>>,
    origin: Origin,
    /// Pictures that tools returned.
    pictures: Vec<(ChatPart<'a>, Place)>,
    has_results: bool,
    has_thought: bool,
}

impl<'a> Blocks<'a> {
    fn new(place: Place) -> Self {
        let (parts, calls, pictures) = Default::default();
        Self { parts, calls, pictures, origin: place.into(), has_results: false, has_thought: false }
    }

    fn read(
        &mut self,
        block: Block<'a>,
        role: &str,
        place: Place,
        conversion: &mut Conversion,
    ) -> Result<(), ApiError> {
        match (block.r#type.as_deref(), role) {
            (Some("text"), _) => {
                self.parts.push(ChatPart::text(block.text));
                self.origin.parts.push(place);
            }
            (Some("image"), "user") => {
                self.parts.push(picture(block.source, place)?);
                self.origin.parts.push(place);
            }
            (Some("tool_use"), "assistant") => {
                let arguments = match block.input {
                    // the chat API takes arguments as a text, this one does not
                    Some(input) if !is_object(input) => {
                        let message = format!("`{place}.input` must be an object.");
                        return Err(ApiError::invalid(format!("{place}.input"), message));
                    }
                    Some(input) => input,
                    None => entry(no_arguments(), place)?,
                };
                let function =
                    ChatFunction { name: block.name.ok_or_else(|| missing(place, "name"))?.into(), arguments };
                self.calls.push(ChatCall { id: block.id.ok_or_else(|| missing(place, "id"))?.into(), function });
                self.origin.calls.push(place);
            }
            (Some("tool_result"), "user") => {
                self.has_results = true;
                self.result(block, place, conversion)?;
            }
            (Some("thinking" | "redacted_thinking"), "assistant") => self.has_thought = true,
            (kind, _) => return Err(unsupported(place, "blocks", kind)),
        }
        Ok(())
    }

    fn result(&mut self, block: Block<'a>, place: Place, conversion: &mut Conversion) -> Result<(), ApiError> {
        let call_id = block.tool_use_id.ok_or_else(|| missing(place, "tool_use_id"))?;
        let failed = block.is_error == Some(true);
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
                            origin.parts.push(place);
                        }
                        Some("text") => {
                            texts.push(ChatPart::text(block.text));
                            origin.parts.push(place);
                        }
                        Some("image") => self.pictures.push((picture(block.source, place)?, place)),
                        kind => return Err(unsupported(place, "blocks", kind)),
                    }
                }
                ChatContent::Parts(texts)
            }
            Some(written) if failed && is_string(written) => {
                ChatContent::Parts(vec![text(as_error(entry(written, place)?))])
            }
            Some(written) => ChatContent::Written(written),
        };
        let result = ChatMessage { tool_call_id: Some(call_id.into()), ..message("tool", content) };
        conversion.push(&result, origin)
    }

    fn finish(mut self, role: &'static str, is_last: bool, conversion: &mut Conversion) -> Result<(), ApiError> {
        if !self.pictures.is_empty() {
            let (pictures, places): (Vec<_>, Vec<_>) = self.pictures.into_iter().unzip();
            self.parts.splice(0..0, pictures);
            self.origin.parts.splice(0..0, places);
        }
        let is_empty = self.parts.is_empty() && self.calls.is_empty();
        if is_empty && (self.has_results || self.has_thought) {
            return Ok(());
        }
        let prefix = is_last && role == "assistant" && self.calls.is_empty();
        let content = ChatContent::Parts(self.parts);
        conversion.push(&ChatMessage { tool_calls: self.calls, prefix, ..message(role, content) }, self.origin)
    }
}

fn text<'a>(text: String) -> ChatPart<'a> {
    ChatPart::Text { text: Text::Made(text) }
}

/// The model's format has no mark for a call that failed: its result says so.
fn as_error(text: String) -> String {
    if text.starts_with("Error") { text } else { format!("Error: {text}") }
}

fn no_arguments() -> &'static RawValue {
    serde_json::from_str(NO_ARGUMENTS).unwrap_or(RawValue::NULL)
}

fn picture<'a>(source: Option<Source<'_>>, place: Place) -> Result<ChatPart<'a>, ApiError> {
    let wrong = |what: &str| ApiError::invalid(format!("{place}.source"), format!("`{place}.source` {what}."));
    let source = source.ok_or_else(|| wrong("is required"))?;
    let url = match (source.r#type.as_deref(), source.media_type, source.data, source.url) {
        (Some("base64"), Some(media_type), Some(data), _) => format!("data:{media_type};base64,{data}"),
        (Some("base64"), ..) => return Err(wrong("must have `media_type` and `data`")),
        (Some("url"), _, _, Some(url)) => url,
        (Some("url"), ..) => return Err(wrong("must have a `url`")),
        _ => return Err(wrong("must have the type \"base64\" or \"url\"")),
    };
    Ok(ChatPart::ImageUrl { image_url: Text::Made(url) })
}
