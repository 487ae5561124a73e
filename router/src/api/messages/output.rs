//! The response as a message with blocks of text and of tool use.

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{
    Map, Value, json,
    value::{RawValue, to_raw_value},
};

use crate::{
    api::completion::{Choice, Completion},
    relay::emit::{CallDelta, Finish, Part, StopReason},
};

/// A message of the assistant.
#[derive(Serialize, JsonSchema)]
pub struct MessageObject<'a> {
    /// The ID of the message.
    pub id: &'a str,
    /// `message`
    pub r#type: &'static str,
    /// `assistant`
    pub role: &'static str,
    /// The model name that the client used.
    pub model: &'a str,
    /// The content blocks.
    pub content: Vec<ContentBlock<'a>>,
    /// The stop reason; `null` while the message is incomplete.
    pub stop_reason: Option<&'static str>,
    /// The entry of `stop_sequences` that ended the message.
    pub stop_sequence: Option<&'a str>,
    /// The usage in tokens.
    pub usage: MessageUsage,
}

/// A content block of a message.
#[derive(Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ContentBlock<'a> {
    /// Text.
    Text {
        /// The text.
        text: &'a str,
    },
    /// A tool call.
    ToolUse {
        /// The ID that the call's result repeats.
        id: String,
        /// The name of the tool.
        name: &'a str,
        /// The arguments.
        #[schemars(with = "Map<String, Value>")]
        input: Box<RawValue>,
    },
}

/// `usage`: tokens that were found in the cache are not part of `input_tokens`.
#[derive(Clone, Copy, Serialize, JsonSchema)]
pub struct MessageUsage {
    /// Prompt tokens that were computed.
    pub input_tokens: u32,
    /// Always 0: writing to the cache is free.
    pub cache_creation_input_tokens: u32,
    /// Prompt tokens found in the group's prefix cache.
    pub cache_read_input_tokens: u32,
    /// Generated tokens.
    pub output_tokens: u32,
}

impl MessageUsage {
    /// The usage so far.
    pub fn of(completion: &Completion) -> Self {
        let usage = completion.usage();
        let cached = usage.prompt_tokens_details.cached_tokens;
        Self {
            input_tokens: usage.prompt_tokens.saturating_sub(cached),
            cache_creation_input_tokens: 0,
            cache_read_input_tokens: cached,
            output_tokens: usage.completion_tokens,
        }
    }
}

/// The arguments of a call. Arguments that are not a JSON object (truncated, `NaN`, or other text of the model) become
/// `{"INVALID_JSON": "the text"}`, the form in Anthropic's documentation.
pub fn input(call: &CallDelta) -> Box<RawValue> {
    let is_object = call.is_complete && call.arguments.starts_with('{');
    let object = is_object.then(|| RawValue::from_string(call.arguments.clone()).ok()).flatten();
    let wrapped = || to_raw_value(&json!({INVALID_JSON: call.arguments})).ok();
    object.or_else(wrapped).unwrap_or_else(empty)
}

/// The field of an input that holds arguments which are not an object.
pub const INVALID_JSON: &str = "INVALID_JSON";

/// An object without fields.
pub fn empty() -> Box<RawValue> {
    RawValue::from_string("{}".to_owned()).unwrap_or_else(|_| RawValue::NULL.to_owned())
}

/// The stop reason in Anthropic's terms.
pub fn stop_reason(choice: &Choice) -> (Option<&'static str>, Option<&str>) {
    let sequence = match choice.stop_reason() {
        Some(StopReason::Text(text)) => Some(text.as_str()),
        _ => None,
    };
    let reason = choice.finish.map(|finish| match finish {
        Finish::Length => "max_tokens",
        Finish::ToolCalls => "tool_use",
        Finish::Stop if sequence.is_some() => "stop_sequence",
        Finish::Stop => "end_turn",
    });
    (reason, sequence)
}

impl<'a> MessageObject<'a> {
    /// The current message with this content.
    pub fn new(completion: &'a Completion, content: Vec<ContentBlock<'a>>) -> Self {
        let (mut stop_reason, stop_sequence) = stop_reason(&completion.choices[0]);
        if completion.params.echo_only {
            stop_reason = Some("max_tokens");
        }
        Self {
            id: &completion.id,
            r#type: "message",
            role: "assistant",
            model: &completion.model,
            content,
            stop_reason,
            stop_sequence,
            usage: MessageUsage::of(completion),
        }
    }
}

/// Converts a call to a block.
pub fn tool_use(call: &CallDelta, input: Box<RawValue>) -> ContentBlock<'_> {
    let (id, name) = call.start.as_ref().map_or(("", ""), |start| (&start.id, &start.name));
    ContentBlock::ToolUse { id: format!("toolu_{id}"), name, input }
}

/// Writes a complete response that is not streamed.
pub fn object(completion: &Completion) -> serde_json::Result<Vec<u8>> {
    let delta = &completion.choices[0].delta;
    let block = |part| match part {
        Part::Text(text) => ContentBlock::Text { text },
        Part::Call(call) => tool_use(call, input(call)),
    };
    let mut content: Vec<ContentBlock<'_>> = delta.parts().map(block).collect();
    if content.is_empty() && !completion.params.echo_only {
        content.push(ContentBlock::Text { text: "" });
    }
    serde_json::to_vec(&MessageObject::new(completion, content))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn converts_every_input_to_an_object() {
        for (arguments, is_complete, expected) in [
            (r#"{"a": 1.50}"#, true, r#"{"a": 1.50}"#),
            (r#"{"a": NaN}"#, true, r#"{"INVALID_JSON":"{\"a\": NaN}"}"#),
            ("[1]", true, r#"{"INVALID_JSON":"[1]"}"#),
            (r#"{"a": "#, true, r#"{"INVALID_JSON":"{\"a\": "}"#),
            (r#"{"a": 1}"#, false, r#"{"INVALID_JSON":"{\"a\": 1}"}"#),
            ("", false, r#"{"INVALID_JSON":""}"#),
        ] {
            let call = CallDelta { arguments: arguments.to_owned(), is_complete, ..CallDelta::default() };
            assert_eq!(input(&call).get(), expected);
        }
    }
}
