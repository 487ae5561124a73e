//! The body of `POST /v1/responses`, and the chat request that it becomes.
//!
//! `instructions` is a system message in front. Items follow each other as messages: calls join the assistant's message
//! before them, reasoning is left out (this model has none to go on with). What needs a memory of ours is refused by
//! name: `previous_response_id`, `conversation`, `background`, `prompt`, references to items.

use std::{borrow::Cow, fmt};

use schemars::JsonSchema;
use serde::{
    Deserialize, Serialize,
    de::{Deserializer, IgnoredAny, SeqAccess, Visitor},
};
use serde_json::{Map, Value, json, value::RawValue};

use crate::api::{
    bounds::Limits,
    bounds::at_least,
    convert::{
        ChatCall, ChatContent, ChatFunction, ChatMessage, ChatPart, ChatTool, ChatToolFunction, Conversion, Dialect,
        Origin, Place, Text, entry, is_array, is_string, missing, refuse_foreign, unsupported,
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
};

const USES: Uses = Uses::of(&[Operation::Responses]);

fields! {
    /// The fields that only this API has, or means something else by.
    pub struct ResponsesRequest<'a> {}

    /// A text of the user's, or the items of the conversation.
    input: Input<'a> as agents::ResponsesInput, USES.required(&[Operation::Responses]);
    /// A system message in front of the input.
    instructions: &'a RawValue as String, USES;
    /// Most tokens that are generated; cut at the room left in the model's window.
    max_output_tokens: Integer, USES, within |_| at_least(1);
    /// The form of the text.
    text: TextOptions, USES;
    /// Functions that may be called.
    tools: Vec<&'a RawValue> as Vec<Tool<'static>>, USES;
    /// Whether and which.
    tool_choice: Value as agents::ResponsesChoice, USES;
    /// What else the answer is to hold: `message.output_text.logprobs`.
    include: Vec<String>, USES;
    /// Only `effort: none`.
    reasoning: Reasoning, USES;
    /// Comes back in the answer.
    metadata: Map<String, Value>, USES;
    /// Comes back in the answer.
    user: String, USES;
    /// Comes back in the answer.
    prompt_cache_key: String, USES;
    /// Comes back in the answer.
    safety_identifier: String, USES;
    /// Comes back in the answer: it counts the calls of tools that a server runs, and this one runs none.
    max_tool_calls: Integer, USES;
    /// Nothing is kept, whatever it says.
    store: bool, USES;
    /// Nothing is cut off, whatever it says.
    truncation: String, USES;
    /// Only `false`: nothing is kept.
    background: bool, USES;
    /// Refused.
    previous_response_id: Value as (), USES;
    /// Refused.
    conversation: Value as (), USES;
    /// Refused.
    prompt: Value as (), USES;
    /// Refused: the field is `input`.
    messages: IgnoredAny as (), USES;
    /// Says nothing that matters here.
    stream_options: IgnoredAny as Map<String, Value>, USES;
}

/// `input`.
#[derive(Debug)]
pub enum Input<'a> {
    /// What the user says.
    Text(String),
    /// The conversation.
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
    /// Comes back in the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verbosity: Option<String>,
}

/// `reasoning`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
pub struct Reasoning {
    /// Only `none`.
    pub effort: Option<String>,
}

/// One of the items of `input`.
#[derive(Debug, Deserialize)]
struct Item<'a> {
    r#type: Option<Cow<'a, str>>,
    role: Option<Cow<'a, str>>,
    #[serde(borrow)]
    content: Option<&'a RawValue>,
    call_id: Option<String>,
    name: Option<String>,
    #[serde(borrow)]
    arguments: Option<&'a RawValue>,
    #[serde(borrow)]
    output: Option<&'a RawValue>,
}

/// One of the parts of an item's content.
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

/// One of `tools`: a function.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "ResponsesTool")]
struct Tool<'a> {
    /// `function`
    #[schemars(required)]
    r#type: Option<Cow<'a, str>>,
    #[serde(borrow)]
    #[schemars(required, with = "String")]
    name: Option<&'a RawValue>,
    #[serde(borrow)]
    #[schemars(with = "Option<String>")]
    description: Option<&'a RawValue>,
    /// A JSON schema.
    #[serde(borrow)]
    #[schemars(with = "Option<Map<String, Value>>")]
    parameters: Option<&'a RawValue>,
    strict: Option<bool>,
}

/// What of a request comes back in its answer.
#[derive(Debug, Default)]
pub struct Echo {
    /// As it came.
    pub instructions: Option<Box<RawValue>>,
    /// As they came.
    pub tools: Vec<Box<RawValue>>,
    /// As it came, or `auto`.
    pub tool_choice: Value,
    /// As it came, or true.
    pub parallel_tool_calls: bool,
    /// With its default.
    pub text: TextOptions,
    /// As it came, or empty.
    pub metadata: Map<String, Value>,
    /// As it came.
    pub user: Option<String>,
    /// As it came.
    pub prompt_cache_key: Option<String>,
    /// As it came.
    pub safety_identifier: Option<String>,
    /// As it came.
    pub max_output_tokens: Option<i64>,
    /// As it came.
    pub max_tool_calls: Option<i64>,
}

/// Reads a request: its conversation, its other fields, and what comes back.
pub fn read<'b>(bytes: &'b [u8], options: &RouterOptions) -> Result<(Conversion, Body<'b>, Echo), ApiError> {
    let limits = Limits { operation: Operation::Responses, options };
    let (mut fields, mut request) = Body::parse_with::<ResponsesRequest<'_>>(bytes, limits.operation)?;
    refuse_memory(&request)?;
    refuse_foreign(&fields)?;
    let max_output_tokens = request.max_output_tokens(&limits)?;
    let echo = echo(&mut request, &fields);
    fields.prompt_cache_key = echo.prompt_cache_key.as_deref().map(|name| Name::of(name.as_bytes()));
    fields.user = echo.user.as_deref().map(|name| Name::of(name.as_bytes()));
    let mut conversion = Conversion::new(&DIALECT);
    if let Some(instructions) = request.instructions {
        if !is_string(instructions) {
            return Err(ApiError::invalid("instructions", "`instructions` must be a string."));
        }
        let content = Some(ChatContent::Written(instructions));
        conversion.push(&message("system", content), Place::Field("instructions"))?;
    }
    match request.input {
        None => return Err(ApiError::invalid("input", "`input` is required.")),
        Some(Input::Text(text)) => {
            let content = ChatContent::Parts(vec![ChatPart::Text { text: Text::Made(text) }]);
            conversion.push(&message("user", Some(content)), Place::Field("input"))?;
        }
        Some(Input::Items(items)) => Items::new(&mut conversion).read(items)?,
    }
    conversion.set_tools(&tools(request.tools.as_deref().unwrap_or_default())?)?;
    fields.tool_choice = request.tool_choice.map(tool_choice);
    if let Some(most) = max_output_tokens {
        fields.max_tokens = Some(Integer(most));
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
    match request.reasoning.as_ref().and_then(|reasoning| reasoning.effort.as_deref()) {
        None | Some("none") => Ok(()),
        Some(_) => Err(ApiError::invalid(
            "reasoning.effort",
            "`reasoning.effort` is not supported: this model does not reason.",
        )),
    }
}

fn echo(request: &mut ResponsesRequest<'_>, fields: &Body<'_>) -> Echo {
    let mut text = request.text.clone().unwrap_or_default();
    text.format.get_or_insert_with(|| json!({"type": "text"}));
    Echo {
        instructions: request.instructions.map(ToOwned::to_owned),
        tools: request.tools.iter().flatten().map(|tool| (*tool).to_owned()).collect(),
        tool_choice: request.tool_choice.clone().unwrap_or_else(|| "auto".into()),
        parallel_tool_calls: fields.parallel_tool_calls.unwrap_or(true),
        text,
        metadata: request.metadata.take().unwrap_or_default(),
        user: request.user.take(),
        prompt_cache_key: request.prompt_cache_key.take(),
        safety_identifier: request.safety_identifier.take(),
        max_output_tokens: request.max_output_tokens.map(|Integer(most)| most),
        max_tool_calls: request.max_tool_calls.map(|Integer(most)| most),
    }
}

fn message<'a>(role: &'static str, content: Option<ChatContent<'a>>) -> ChatMessage<'a> {
    ChatMessage { role, content, tool_calls: Vec::new(), tool_call_id: None, prefix: false }
}

fn tools<'a>(written: &[&'a RawValue]) -> Result<Vec<ChatTool<'a>>, ApiError> {
    let tool = |(index, written): (usize, &&'a RawValue)| {
        let place = Place::Entry("tools", index as u32);
        let tool: Tool<'a> = entry(written, place)?;
        match tool.r#type.as_deref() {
            Some("function") => {
                let Tool { name, description, parameters, strict, .. } = tool;
                Ok(ChatTool {
                    r#type: "function",
                    function: ChatToolFunction { name, description, parameters, strict },
                })
            }
            kind => Err(unsupported(place, "tools", kind)),
        }
    };
    written.iter().enumerate().map(tool).collect()
}

/// Chat names the tools that are allowed one level deeper.
fn tool_choice(choice: Value) -> Value {
    if choice.get("type").and_then(Value::as_str) != Some("allowed_tools") || choice.get("allowed_tools").is_some() {
        return choice;
    }
    let names = choice.get("tools").and_then(Value::as_array).map(|tools| {
        tools.iter().map(|tool| json!({"type": tool.get("type"), "function": {"name": tool.get("name")}})).collect()
    });
    let names: Value = names.map_or(Value::Null, Value::Array);
    json!({"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": names}})
}

/// Chat has the schema one level deeper.
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

/// Writes items as messages.
struct Items<'a, 'c> {
    conversion: &'c mut Conversion,
    /// The assistant's message that calls may still join.
    assistant: Option<(ChatMessage<'a>, Origin)>,
    /// Pictures that tools returned: the model looks at pictures in a user's message only.
    pictures: Vec<ChatPart<'a>>,
    places: Vec<Place>,
}

const INPUT: &str = "input";

impl<'a, 'c> Items<'a, 'c> {
    fn new(conversion: &'c mut Conversion) -> Self {
        Self { conversion, assistant: None, pictures: Vec::new(), places: Vec::new() }
    }

    fn read(mut self, items: Vec<&'a RawValue>) -> Result<(), ApiError> {
        for (index, written) in items.into_iter().enumerate() {
            let place = Place::Entry(INPUT, index as u32);
            let item: Item<'a> = entry(written, place)?;
            match (item.r#type.as_deref(), &item.role) {
                (Some("message"), _) | (None, Some(_)) => self.message(item, index as u32)?,
                (Some("function_call"), _) => self.call(item, place)?,
                (Some("function_call_output"), _) => self.result(item, index as u32)?,
                (Some("reasoning"), _) => {}
                (Some("item_reference"), _) => {
                    let message = format!("`{place}`: this server keeps no items. Send the item itself.");
                    return Err(ApiError::invalid(format!("{place}.type"), message));
                }
                (kind, _) => return Err(unsupported(place, "items", kind)),
            }
        }
        self.end_assistant()?;
        self.end_results()
    }

    fn end_assistant(&mut self) -> Result<(), ApiError> {
        match self.assistant.take() {
            Some((message, origin)) => self.conversion.push(&message, origin),
            None => Ok(()),
        }
    }

    fn end_results(&mut self) -> Result<(), ApiError> {
        let Some(first) = self.places.first().copied() else { return Ok(()) };
        let content = ChatContent::Parts(std::mem::take(&mut self.pictures));
        let origin = Origin { message: first, parts: std::mem::take(&mut self.places), calls: Vec::new() };
        self.conversion.push(&message("user", Some(content)), origin)
    }

    fn message(&mut self, item: Item<'a>, index: u32) -> Result<(), ApiError> {
        self.end_assistant()?;
        self.end_results()?;
        let place = Place::Entry(INPUT, index);
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
            Some(written) => Some(ChatContent::Written(written)),
            None => Some(ChatContent::Written(RawValue::NULL)).filter(|_| role != "assistant"),
        };
        let message = message(role, content);
        if role == "assistant" {
            self.assistant = Some((message, origin));
            return Ok(());
        }
        self.conversion.push(&message, origin)
    }

    fn call(&mut self, item: Item<'a>, place: Place) -> Result<(), ApiError> {
        self.end_results()?;
        let call = ChatCall {
            id: item.call_id.ok_or_else(|| missing(place, "call_id"))?.into(),
            function: ChatFunction {
                name: item.name.ok_or_else(|| missing(place, "name"))?.into(),
                arguments: item.arguments.ok_or_else(|| missing(place, "arguments"))?,
            },
        };
        let (message, origin) = self.assistant.get_or_insert_with(|| (message("assistant", None), Origin::from(place)));
        message.tool_calls.push(call);
        origin.calls.push(place);
        Ok(())
    }

    fn result(&mut self, item: Item<'a>, index: u32) -> Result<(), ApiError> {
        self.end_assistant()?;
        let place = Place::Entry(INPUT, index);
        let call_id = item.call_id.ok_or_else(|| missing(place, "call_id"))?;
        let output = item.output.ok_or_else(|| missing(place, "output"))?;
        let mut origin = Origin::from(place);
        let content = if is_array(output) {
            let mut texts = Vec::new();
            for (part, place) in parts(output, index, "output")? {
                if matches!(part, ChatPart::ImageUrl { .. }) {
                    self.pictures.push(part);
                    self.places.push(place);
                } else {
                    texts.push(part);
                    origin.parts.push(place);
                }
            }
            ChatContent::Parts(texts)
        } else if is_string(output) {
            ChatContent::Written(output)
        } else {
            let message = format!("`{place}.output` must be a string or an array.");
            return Err(ApiError::invalid(format!("{place}.output"), message));
        };
        let message = ChatMessage { tool_call_id: Some(call_id.into()), ..message("tool", Some(content)) };
        self.conversion.push(&message, origin)
    }
}

/// The parts of an item's content or output, with their places.
fn parts<'a>(written: &'a RawValue, index: u32, list: &'static str) -> Result<Vec<(ChatPart<'a>, Place)>, ApiError> {
    let written: Vec<&'a RawValue> = entry(written, Place::Entry(INPUT, index))?;
    let part = |(number, written): (usize, &'a RawValue)| {
        let place = Place::Part(INPUT, index, list, number as u32);
        let part: Part<'a> = entry(written, place)?;
        let chat = match part.r#type.as_deref() {
            Some("input_text" | "output_text" | "text") => ChatPart::text(part.text),
            Some("refusal") => ChatPart::text(part.refusal),
            Some("input_image") => {
                let url = part.image_url.ok_or_else(|| {
                    let message = format!("`{place}.image_url` is required: this server keeps no files.");
                    ApiError::invalid(format!("{place}.image_url"), message)
                })?;
                ChatPart::ImageUrl { image_url: Text::Written(url) }
            }
            kind => return Err(unsupported(place, "parts", kind)),
        };
        Ok((chat, place))
    };
    written.into_iter().enumerate().map(part).collect()
}
