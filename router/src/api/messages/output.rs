//! The answer as a message: blocks of text and of tool use.

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value, value::RawValue};

use bora_common::conversation::Json;

use crate::{
    api::answer::{Answer, Choice},
    relay::emit::{Finish, StopReason},
};

/// A message of the assistant's.
#[derive(Serialize, JsonSchema)]
pub struct MessageObject<'a> {
    /// Of the message.
    pub id: &'a str,
    /// `message`
    pub r#type: &'static str,
    /// `assistant`
    pub role: &'static str,
    /// The name that the client used.
    pub model: &'a str,
    /// What it says and calls.
    pub content: Vec<ContentBlock<'a>>,
    /// Why it ended; `null` while it has not.
    pub stop_reason: Option<&'static str>,
    /// The one of `stop_sequences` that ended it.
    pub stop_sequence: Option<&'a str>,
    /// Tokens.
    pub usage: MessageUsage,
}

/// A block of a message.
#[derive(Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ContentBlock<'a> {
    /// Text.
    Text {
        /// The text.
        text: &'a str,
    },
    /// A call.
    ToolUse {
        /// Names it in its result.
        id: String,
        /// The tool.
        name: &'a str,
        /// Its arguments.
        #[schemars(with = "Map<String, Value>")]
        input: Box<RawValue>,
    },
}

/// `usage`: what was read from the cache is not part of `input_tokens`.
#[derive(Clone, Copy, Serialize, JsonSchema)]
pub struct MessageUsage {
    /// Ids of the prompt that were computed.
    pub input_tokens: u32,
    /// Writing to the cache costs nothing.
    pub cache_creation_input_tokens: u32,
    /// Ids of the prompt found in the group's prefix cache.
    pub cache_read_input_tokens: u32,
    /// Ids generated.
    pub output_tokens: u32,
}

impl MessageUsage {
    /// So far.
    pub fn of(answer: &Answer) -> Self {
        let usage = answer.usage();
        let cached = usage.prompt_tokens_details.cached_tokens;
        Self {
            input_tokens: usage.prompt_tokens.saturating_sub(cached),
            cache_creation_input_tokens: 0,
            cache_read_input_tokens: cached,
            output_tokens: usage.completion_tokens,
        }
    }
}

/// The id of a call that the engine knows by another one.
pub fn tool_use_id(id: &str) -> String {
    format!("toolu_{id}")
}

/// Arguments as JSON. What Python reads and JSON does not know (`NaN`) is `null`.
pub fn arguments(text: &str) -> Box<RawValue> {
    let written = RawValue::from_string(text.to_owned());
    let read = || Json::parse(text).map(|json| json.to_value().to_string()).unwrap_or_default();
    written.or_else(|_| RawValue::from_string(read())).unwrap_or_else(|_| empty())
}

/// An object without fields.
pub fn empty() -> Box<RawValue> {
    RawValue::from_string("{}".to_owned()).unwrap_or_else(|_| RawValue::NULL.to_owned())
}

/// Why an answer ended, in Anthropic's words.
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
    /// The message as it is now, with this content.
    pub fn new(answer: &'a Answer, content: Vec<ContentBlock<'a>>) -> Self {
        let (stop_reason, stop_sequence) = stop_reason(&answer.choices[0]);
        Self {
            id: &answer.id,
            r#type: "message",
            role: "assistant",
            model: &answer.model,
            content,
            stop_reason,
            stop_sequence,
            usage: MessageUsage::of(answer),
        }
    }
}

/// The plain answer, complete.
pub fn object(answer: &Answer) -> serde_json::Result<Vec<u8>> {
    let delta = &answer.choices[0].delta;
    let mut content = Vec::with_capacity(1 + delta.calls.len());
    if !delta.text.is_empty() || delta.calls.is_empty() {
        content.push(ContentBlock::Text { text: &delta.text });
    }
    for call in &delta.calls {
        if let Some(start) = &call.start {
            content.push(ContentBlock::ToolUse {
                id: tool_use_id(&start.id),
                name: &start.name,
                input: arguments(&call.arguments),
            });
        }
    }
    serde_json::to_vec(&MessageObject::new(answer, content))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_always_json() {
        for (text, json) in
            [(r#"{"a": 1.50}"#, r#"{"a": 1.50}"#), (r#"{"a": NaN}"#, r#"{"a":null}"#), (r#"{"a": "#, "{}"), ("", "{}")]
        {
            assert_eq!(arguments(text).get(), json);
        }
    }
}
