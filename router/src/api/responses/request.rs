//! The body of `POST /v1/responses`, and its conversion to a chat request.
//!
//! `instructions` becomes a system message at the front. Items become messages in the order of their turns
//! ([`turns`](crate::api::turns)). Reasoning is left out, because this model has none to continue, and so are calls of
//! tools that a server runs. Fields that need stored state are refused by name: `previous_response_id`, `conversation`,
//! `background`, `prompt`, references to items.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    fmt,
};

use schemars::JsonSchema;
use serde::{
    Deserialize, Serialize,
    de::{Deserializer, IgnoredAny, SeqAccess, Visitor},
};
use serde_json::{
    Map, Value, json,
    value::{RawValue, to_raw_value},
};

use super::tools::{INPUT, Tool, ToolNames, Tools, tool_choice};
use crate::api::{
    bounds::FieldBounds,
    bounds::at_least,
    convert::{
        ChatCall, ChatContent, ChatFunction, ChatMessage, ChatPart, ChatTool, Conversion, Dialect, Origin, Place, Text,
        entry, is_array, is_string, missing, refuse_foreign, unsupported,
    },
    declare::{Operation, Uses, fields},
    error::ApiError,
    fields::{Integer, LogprobsField, Name},
    request::Body,
};
use crate::{openapi::agents, options::RouterOptions};

const DIALECT: Dialect = Dialect {
    fields: &[("messages", "input"), ("max_tokens", "max_output_tokens"), ("response_format", "text.format")],
    tails: &[
        (".function.name", ".name"),
        (".function.arguments", ".arguments"),
        (".function.parameters", ".parameters"),
        (".function.description", ".description"),
        (".id", ".call_id"),
        (".tool_calls", ""),
        (".tool_call_id", ".call_id"),
        (".image_url.url", ".image_url"),
    ],
    no_images: None,
};

const USES: Uses = Uses::of(&[Operation::Responses]);

fields! {
    /// The fields that only this API has, or that it interprets differently.
    pub struct ResponsesRequest<'a> {}

    /// The user's text, or the items of the conversation.
    input: Input<'a> as agents::ResponsesInput, USES.required(&[Operation::Responses]);
    /// A system message in front of the input.
    instructions: &'a RawValue as String, USES;
    /// Maximum number of tokens to generate; reduced to the room in the context window.
    max_output_tokens: Integer, USES, within |_| at_least(1);
    /// The format of the text.
    text: TextOptions, USES;
    /// Functions, namespaces of functions and custom tools that may be called; other tools are left out.
    tools: Vec<&'a RawValue> as Vec<Tool<'static>>, USES;
    /// Whether a tool is called, and which one.
    tool_choice: Value as agents::ResponsesChoice, USES;
    /// Additional contents of the response: `message.output_text.logprobs`.
    include: Vec<String>, USES;
    /// The effort is accepted without effect: this model does not reason.
    reasoning: Reasoning, USES;
    /// Repeated in the response.
    metadata: Map<String, Value>, USES;
    /// Repeated in the response.
    user: String, USES;
    /// Repeated in the response.
    prompt_cache_key: String, USES;
    /// Repeated in the response.
    safety_identifier: String, USES;
    /// Repeated in the response. It limits calls of tools that a server runs, and this server runs none.
    max_tool_calls: Integer, USES;
    /// Without effect: no response is stored.
    store: bool, USES;
    /// Without effect: the input is never truncated.
    truncation: String, USES;
    /// Must be `false`: no response is stored.
    background: bool, USES;
    /// Refused.
    previous_response_id: Value as (), USES;
    /// Refused.
    conversation: Value as (), USES;
    /// Refused.
    prompt: Value as (), USES;
    /// Refused: the field of this API is `input`.
    messages: IgnoredAny as (), USES;
    /// Without effect.
    stream_options: IgnoredAny as Map<String, Value>, USES;
}

/// `input`.
#[derive(Debug)]
pub enum Input<'a> {
    /// The user's text.
    Text(String),
    /// The items of the conversation.
    Items(Vec<&'a RawValue>),
}

impl<'de> Deserialize<'de> for Input<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InputVisitor;
        impl<'de> Visitor<'de> for InputVisitor {
            type Value = Input<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or an array of items")
            }

            fn visit_str<E>(self, text: &str) -> Result<Input<'de>, E> {
                Ok(Input::Text(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Input<'de>, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element()? {
                    items.push(item);
                }
                Ok(Input::Items(items))
            }
        }
        deserializer.deserialize_any(InputVisitor)
    }
}

/// `text`.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
pub struct TextOptions {
    /// `{"type": "text"}`, `{"type": "json_object"}` or `{"type": "json_schema", "name", "schema", "strict"}`.
    #[schemars(with = "Option<Map<String, Value>>")]
    pub format: Option<Value>,
    /// Repeated in the response.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verbosity: Option<String>,
}

/// `reasoning`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
pub struct Reasoning {
    /// Without effect.
    pub effort: Option<String>,
}

/// The kind of an item of `input`.
#[derive(Debug, Deserialize)]
struct ItemKind<'a> {
    r#type: Option<Cow<'a, str>>,
    role: Option<Cow<'a, str>>,
}

/// A message, a call or a result.
#[derive(Debug, Deserialize)]
struct Item<'a> {
    role: Option<Cow<'a, str>>,
    #[serde(borrow)]
    content: Option<&'a RawValue>,
    call_id: Option<String>,
    namespace: Option<String>,
    name: Option<String>,
    #[serde(borrow)]
    arguments: Option<&'a RawValue>,
    #[serde(borrow)]
    input: Option<&'a RawValue>,
    #[serde(borrow)]
    output: Option<&'a RawValue>,
    #[serde(borrow)]
    tools: Option<Vec<&'a RawValue>>,
}

/// A content part of an item.
#[derive(Debug, Deserialize)]
struct Part<'a> {
    r#type: Option<Cow<'a, str>>,
    #[serde(borrow)]
    text: Option<&'a RawValue>,
    #[serde(borrow)]
    refusal: Option<&'a RawValue>,
    #[serde(borrow)]
    image_url: Option<&'a RawValue>,
}

/// The parameters of a request that its response repeats.
#[derive(Debug, Default)]
pub struct Echo {
    /// As in the request.
    pub instructions: Option<Box<RawValue>>,
    /// As in the request.
    pub tools: Vec<Box<RawValue>>,
    /// The names that the client uses for the tools.
    pub names: ToolNames,
    /// As in the request; default `auto`.
    pub tool_choice: Value,
    /// As in the request; default true.
    pub parallel_tool_calls: bool,
    /// As in the request, with its default.
    pub text: TextOptions,
    /// As in the request; default empty.
    pub metadata: Map<String, Value>,
    /// As in the request.
    pub user: Option<String>,
    /// As in the request.
    pub prompt_cache_key: Option<String>,
    /// As in the request.
    pub safety_identifier: Option<String>,
    /// As in the request.
    pub max_output_tokens: Option<i64>,
    /// As in the request.
    pub max_tool_calls: Option<i64>,
}

/// Parses a request: its conversation, its other fields, and the parameters that the response repeats.
pub fn read<'b>(bytes: &'b [u8], options: &RouterOptions) -> Result<(Conversion, Body<'b>, Echo), ApiError> {
    let limits = FieldBounds { operation: Operation::Responses, options };
    let (mut fields, mut request) = Body::parse_with::<ResponsesRequest<'_>>(bytes, limits.operation)?;
    refuse_memory(&request)?;
    refuse_foreign(&fields)?;
    let max_output_tokens = request.max_output_tokens(&limits)?;
    let mut echo = echo(&mut request, &fields);
    fields.prompt_cache_key = echo.prompt_cache_key.as_deref().map(|name| Name::of(name.as_bytes()));
    fields.user = echo.user.as_deref().map(|name| Name::of(name.as_bytes()));
    fields.reasoning_effort = request.reasoning.take().and_then(|reasoning| reasoning.effort);
    let mut tools = Tools::default();
    let declared = tools.read(request.tools.as_deref().unwrap_or_default(), |index| Place::Entry("tools", index))?;
    let mut items = Items::new(tools, declared);
    if let Some(instructions) = request.instructions {
        if !is_string(instructions) {
            return Err(ApiError::invalid("instructions", "`instructions` must be a string."));
        }
        let content = Some(ChatContent::ChatInput(instructions));
        items.messages.push((message("system", content), Place::Field("instructions").into()));
    }
    match request.input {
        None => return Err(ApiError::invalid("input", "`input` is required.")),
        Some(Input::Text(text)) => {
            let content = ChatContent::Parts(vec![ChatPart::Text { text: Text::Made(text) }]);
            items.messages.push((message("user", Some(content)), Place::Field("input").into()));
        }
        Some(Input::Items(written)) => items.read(written)?,
    }
    fields.late_tools = items.has_late_tools;
    fields.left_out += items.tools.left_out;
    fields.tool_choice = request.tool_choice.map(|choice| tool_choice(choice, &items.tools.names)).transpose()?;
    let conversion = Conversion::new(&DIALECT, items.messages, items.declared)?;
    echo.names = items.tools.names;
    if let Some(most) = max_output_tokens {
        fields.max_tokens = Some(Integer(most.into()));
        fields.max_completion_tokens = None;
    }
    let wants_logprobs = request.include.iter().flatten().any(|name| name == "message.output_text.logprobs");
    fields.logprobs = wants_logprobs.then_some(LogprobsField::Flag(true));
    fields.top_logprobs = fields.top_logprobs.filter(|_| wants_logprobs);
    if let Some(format) = request.text.and_then(|text| text.format) {
        fields.structured.push(("response_format", response_format(format)));
    }
    Ok((conversion, fields, echo))
}

fn refuse_memory(request: &ResponsesRequest<'_>) -> Result<(), ApiError> {
    let memory = "this server keeps no responses. Send the whole conversation as `input`.";
    for (name, is_there, reason) in [
        ("previous_response_id", request.previous_response_id.is_some(), memory),
        ("conversation", request.conversation.is_some(), memory),
        ("background", request.background == Some(true), "this server keeps no responses. Stream the answer instead."),
        ("prompt", request.prompt.is_some(), "this server keeps no prompt templates. Send `instructions` and `input`."),
        ("messages", request.messages.is_some(), "the conversation of this API is `input`."),
    ] {
        if is_there {
            return Err(ApiError::invalid(name, format!("`{name}` is not supported: {reason}")));
        }
    }
    Ok(())
}

fn echo(request: &mut ResponsesRequest<'_>, fields: &Body<'_>) -> Echo {
    let mut text = request.text.clone().unwrap_or_default();
    text.format.get_or_insert_with(|| json!({"type": "text"}));
    Echo {
        instructions: request.instructions.map(ToOwned::to_owned),
        tools: request.tools.iter().flatten().map(|tool| (*tool).to_owned()).collect(),
        names: ToolNames::default(),
        tool_choice: request.tool_choice.clone().unwrap_or_else(|| "auto".into()),
        parallel_tool_calls: fields.parallel_tool_calls.unwrap_or(true),
        text,
        metadata: request.metadata.take().unwrap_or_default(),
        user: request.user.take(),
        prompt_cache_key: request.prompt_cache_key.take(),
        safety_identifier: request.safety_identifier.take(),
        max_output_tokens: request.max_output_tokens.map(|Integer(most)| most as i64),
        max_tool_calls: request.max_tool_calls.map(|Integer(most)| most as i64),
    }
}

fn message<'a>(role: &'static str, content: Option<ChatContent<'a>>) -> ChatMessage<'a> {
    ChatMessage { role, content, tool_calls: Vec::new(), tool_call_id: None, prefix: false }
}

/// Converts a format to chat's form, which has the schema one level deeper.
fn response_format(mut format: Value) -> Value {
    let is_schema = format.get("type").and_then(Value::as_str) == Some("json_schema");
    match format.as_object_mut() {
        Some(fields) if is_schema && !fields.contains_key("json_schema") => {
            fields.remove("type");
            json!({"type": "json_schema", "json_schema": format})
        }
        _ => format,
    }
}

/// Converts items to messages.
struct Items<'a> {
    messages: Vec<(ChatMessage<'a>, Origin)>,
    tools: Tools,
    /// The tools in front of the first user message.
    declared: Vec<(ChatTool<'a>, Place)>,
    /// Whether a later item defined tools.
    has_late_tools: bool,
    /// IDs of calls that were left out; their results are left out too.
    left_out: HashSet<String>,
}

const INPUT_ITEMS: &str = "input";

impl<'a> Items<'a> {
    fn new(tools: Tools, declared: Vec<(ChatTool<'a>, Place)>) -> Self {
        Self { messages: Vec::new(), tools, declared, has_late_tools: false, left_out: HashSet::new() }
    }

    fn read(&mut self, items: Vec<&'a RawValue>) -> Result<(), ApiError> {
        for (index, written) in items.into_iter().enumerate() {
            let index = index as u32;
            let place = Place::Entry(INPUT_ITEMS, index);
            let ItemKind { r#type, role } = entry(written, place)?;
            match r#type.as_deref() {
                None if role.is_none() => return Err(missing(place, "type")),
                None | Some("message") => self.message(entry(written, place)?, index)?,
                Some("function_call" | "custom_tool_call") => self.call(entry(written, place)?, place)?,
                Some("function_call_output" | "custom_tool_call_output") => {
                    self.result(entry(written, place)?, index)?;
                }
                Some("additional_tools") => self.additional_tools(entry(written, place)?, index)?,
                Some("item_reference") => {
                    let message = format!("`{place}`: this server keeps no items. Send the item itself.");
                    return Err(ApiError::invalid(format!("{place}.type"), message));
                }
                Some(kind) if is_left_out(kind) => self.leave_out(written),
                kind => return Err(unsupported(place, "items", kind)),
            }
        }
        Ok(())
    }

    fn leave_out(&mut self, written: &RawValue) {
        #[derive(Deserialize)]
        struct Named {
            call_id: Option<String>,
        }
        if let Ok(Named { call_id: Some(id) }) = serde_json::from_str(written.get()) {
            self.left_out.insert(id);
        }
    }

    fn message(&mut self, item: Item<'a>, index: u32) -> Result<(), ApiError> {
        let place = Place::Entry(INPUT_ITEMS, index);
        let role = match item.role.as_deref() {
            Some("user") => "user",
            Some("system" | "developer") => "system",
            Some("assistant") => "assistant",
            Some(_) => {
                let message = format!("`{place}.role` must be \"user\", \"assistant\", \"system\" or \"developer\".");
                return Err(ApiError::invalid(format!("{place}.role"), message));
            }
            None => return Err(missing(place, "role")),
        };
        let mut origin = Origin::from(place);
        let content = match item.content {
            Some(written) if is_array(written) => {
                let parts = parts(written, index, "content")?;
                origin.parts = parts.iter().map(|(_, place)| *place).collect();
                Some(ChatContent::Parts(parts.into_iter().map(|(part, _)| part).collect()))
            }
            Some(written) => Some(ChatContent::ChatInput(written)),
            None => Some(ChatContent::ChatInput(RawValue::NULL)).filter(|_| role != "assistant"),
        };
        self.messages.push((message(role, content), origin));
        Ok(())
    }

    /// Adds a call of a function, or of a custom tool, whose single argument is its input.
    fn call(&mut self, item: Item<'a>, place: Place) -> Result<(), ApiError> {
        let name = item.name.ok_or_else(|| missing(place, "name"))?;
        let arguments = match (item.arguments, item.input) {
            (Some(arguments), _) => Cow::Borrowed(arguments),
            (None, Some(input)) => {
                let arguments = to_raw_value(&HashMap::from([(INPUT, input)]));
                Cow::Owned(arguments.map_err(|error| ApiError::internal(error.to_string()))?)
            }
            (None, None) => return Err(missing(place, "arguments")),
        };
        let name = self.tools.names.in_prompt(item.namespace.as_deref(), &name).into_owned();
        let call = ChatCall {
            id: item.call_id.ok_or_else(|| missing(place, "call_id"))?.into(),
            function: ChatFunction { name: name.into(), arguments },
        };
        let origin = Origin { message: place, parts: Vec::new(), calls: vec![place] };
        self.messages.push((ChatMessage { tool_calls: vec![call], ..message("assistant", None) }, origin));
        Ok(())
    }

    /// Adds the result of a call. Its images become a user message, because the model supports images only there.
    fn result(&mut self, item: Item<'a>, index: u32) -> Result<(), ApiError> {
        let place = Place::Entry(INPUT_ITEMS, index);
        let call_id = item.call_id.ok_or_else(|| missing(place, "call_id"))?;
        let output = item.output.ok_or_else(|| missing(place, "output"))?;
        if self.left_out.contains(&call_id) {
            return Ok(());
        }
        let mut origin = Origin::from(place);
        let (mut images, mut image_places) = (Vec::new(), Vec::new());
        let content = if is_array(output) {
            let mut texts = Vec::new();
            for (part, place) in parts(output, index, "output")? {
                if matches!(part, ChatPart::ImageUrl { .. }) {
                    images.push(part);
                    image_places.push(place);
                } else {
                    texts.push(part);
                    origin.parts.push(place);
                }
            }
            ChatContent::Parts(texts)
        } else if is_string(output) {
            ChatContent::ChatInput(output)
        } else {
            let message = format!("`{place}.output` must be a string or an array.");
            return Err(ApiError::invalid(format!("{place}.output"), message));
        };
        let result = ChatMessage { tool_call_id: Some(call_id.into()), ..message("tool", Some(content)) };
        self.messages.push((result, origin));
        if !images.is_empty() {
            let origin = Origin { message: place, parts: image_places, calls: Vec::new() };
            self.messages.push((message("user", Some(ChatContent::Parts(images))), origin));
        }
        Ok(())
    }

    /// Adds tools: before the first user message to the request's tools, later as text.
    fn additional_tools(&mut self, item: Item<'a>, index: u32) -> Result<(), ApiError> {
        let place = Place::Entry(INPUT_ITEMS, index);
        let written = item.tools.ok_or_else(|| missing(place, "tools"))?;
        let mut tools = self.tools.read(&written, |number| Place::Part(INPUT_ITEMS, index, "tools", number))?;
        if !self.messages.iter().any(|(message, _)| message.role == "user") {
            self.declared.append(&mut tools);
        } else if !tools.is_empty() {
            let texts = tools.iter().map(|(tool, _)| ChatPart::Text { text: Text::Made(tool.as_text()) }).collect();
            self.messages.push((message("system", Some(ChatContent::Parts(texts))), place.into()));
            self.has_late_tools = true;
        }
        Ok(())
    }
}

/// Item types that are left out: reasoning, and calls that a server or another client's tool ran.
fn is_left_out(kind: &str) -> bool {
    let kinds = ["reasoning", "compaction", "tool_search_output", "mcp_list_tools", "mcp_approval_request"];
    kinds.contains(&kind) || ["_call", "_call_output", "_approval_response"].iter().any(|end| kind.ends_with(end))
}

/// The parts of an item's content or output, with their positions.
fn parts<'a>(written: &'a RawValue, index: u32, list: &'static str) -> Result<Vec<(ChatPart<'a>, Place)>, ApiError> {
    let written: Vec<&'a RawValue> = entry(written, Place::Entry(INPUT_ITEMS, index))?;
    let part = |(number, written): (usize, &'a RawValue)| {
        let place = Place::Part(INPUT_ITEMS, index, list, number as u32);
        let part: Part<'a> = entry(written, place)?;
        let chat = match part.r#type.as_deref() {
            Some("input_text" | "output_text" | "text") => ChatPart::text(part.text),
            Some("refusal") => ChatPart::text(part.refusal),
            Some("input_image") => {
                let url = part.image_url.ok_or_else(|| {
                    let message = format!("`{place}.image_url` is required: this server keeps no files.");
                    ApiError::invalid(format!("{place}.image_url"), message)
                })?;
                ChatPart::ImageUrl { image_url: Text::ChatInput(url) }
            }
            kind => return Err(unsupported(place, "parts", kind)),
        };
        Ok((chat, place))
    };
    written.into_iter().enumerate().map(part).collect()
}
