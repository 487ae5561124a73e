//! What makes a conversation one that the model was trained on: the order of roles, the pairing of calls
//! and results, names and ids. The rules are those of mistral-common 1.13 for version 13 when serving.

use std::collections::HashSet;
use std::sync::LazyLock;

use jsonschema::{Validator, draft7};
use serde_json::{Value, json};

use super::error::{At, ConversationError, Rule};
use super::message::Message;
use crate::cpu_budget::{self, Stage};

/// Which names functions may have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum FunctionNames {
    /// 1 to 64 of `a-z A-Z 0-9 _ -`, as in the reference.
    #[default]
    Reference,
    /// Up to 128 of these characters, as agents' APIs allow.
    Api,
    /// The same for tools; a call of the history may have any name that a model made up.
    Lenient,
}

impl FunctionNames {
    fn max_length(self) -> usize {
        match self {
            Self::Reference => 64,
            Self::Api | Self::Lenient => 128,
        }
    }

    /// Whether a tool may have this name.
    pub fn allow(self, name: &str) -> bool {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
        (1..=self.max_length()).contains(&name.len()) && name.bytes().all(good)
    }

    /// Whether a call may have this name.
    pub fn allow_call(self, name: &str) -> bool {
        match self {
            Self::Lenient => !name.is_empty(),
            Self::Reference | Self::Api => self.allow(name),
        }
    }

    /// Checks the name of a tool.
    pub(super) fn check(self, name: &str, at: &At<'_>) -> Result<(), ConversationError> {
        if self.allow(name) { Ok(()) } else { Err(self.error(name, at)) }
    }

    /// Checks the name of a call.
    pub(super) fn check_call(self, name: &str, at: &At<'_>) -> Result<(), ConversationError> {
        if self.allow_call(name) { Ok(()) } else { Err(self.error(name, at)) }
    }

    fn error(self, name: &str, at: &At<'_>) -> ConversationError {
        let shown: String = name.chars().take(80).collect();
        let max_length = self.max_length();
        let message =
            format!("function name '{shown}' must be 1 to {max_length} of a-z, A-Z, 0-9, underscore and dash");
        at.error(Rule::FunctionName, message)
    }
}

/// A tool call id is any string but the empty one and `null`.
pub(super) fn call_id(id: &str, at: &At<'_>) -> Result<(), ConversationError> {
    if !id.is_empty() && id != "null" {
        return Ok(());
    }
    Err(at.error(Rule::ToolCallId, "a tool call id must be a non-empty string other than 'null'"))
}

/// The meta-schema of draft 7. No text is bound by its format. Regular expressions in particular come in every dialect (the
/// reference takes Python's), and nobody but a form that is forced has to read them.
static META_SCHEMA: LazyLock<Option<Validator>> = LazyLock::new(|| {
    draft7::options()
        .should_validate_formats(false)
        .build(&json!({"$ref": "http://json-schema.org/draft-07/schema#"}))
        .inspect_err(|error| tracing::error!(%error, "the draft 7 meta-schema cannot be built"))
        .ok()
});

/// A function's parameters must be a JSON Schema of draft 7.
pub(super) fn schema(schema: &Value, at: &At<'_>) -> Result<(), ConversationError> {
    let outcome = match META_SCHEMA.as_ref() {
        Some(validator) => validator.validate(schema),
        None => draft7::meta::validate(schema),
    };
    outcome.map_err(|error| {
        let place = error.instance_path().to_string();
        let place = if place.is_empty() { "/" } else { &place };
        at.error(Rule::ToolSchema, format!("invalid JSON Schema (draft 7) at '{place}': {error}"))
    })
}

/// Checks everything that depends on more than one message.
pub(super) fn messages(messages: &[&Message]) -> Result<(), ConversationError> {
    let at = At::root("messages");
    let Some(last) = messages.last() else {
        return Err(at.error(Rule::NoMessages, "a conversation must have at least one message"));
    };
    let last_at = at.index(messages.len() - 1);
    if messages.len() == 1 && matches!(last, Message::Assistant { .. } | Message::Tool { .. }) {
        let message = "a conversation must start with a user message or a system message";
        return Err(at.index(0).key("role").error(Rule::RoleOrder, message));
    }
    if matches!(last, Message::Assistant { prefix: false, .. }) {
        let message = "the last message must be from the user or a tool, or an assistant message to continue";
        return Err(last_at.key("role").error(Rule::RoleOrder, message));
    }
    role_order(messages, &at)?;
    tool_pairing(messages, &at)?;
    for (index, message) in messages[..messages.len() - 1].iter().enumerate() {
        if matches!(message, Message::Assistant { prefix: true, .. }) {
            let message = "only the last message can be a prefix to continue";
            return Err(at.index(index).key("prefix").error(Rule::Prefix, message));
        }
    }
    Ok(())
}

fn role_order(messages: &[&Message], at: &At<'_>) -> Result<(), ConversationError> {
    for (index, pair) in messages.windows(2).enumerate() {
        let allowed = matches!(
            (pair[0], pair[1]),
            (Message::System { .. }, Message::User { .. } | Message::Assistant { .. } | Message::System { .. })
                | (Message::User { .. }, Message::Assistant { .. } | Message::System { .. } | Message::User { .. })
                | (Message::Assistant { .. }, Message::Assistant { .. } | Message::User { .. } | Message::Tool { .. })
                | (Message::Tool { .. }, Message::Assistant { .. } | Message::Tool { .. } | Message::User { .. })
        );
        if !allowed {
            let message = format!("unexpected role '{}' after role '{}'", pair[1].role(), pair[0].role());
            return Err(at.index(index + 1).key("role").error(Rule::RoleOrder, message));
        }
    }
    Ok(())
}

/// Each assistant message's calls must be served exactly once each before the next assistant message and
/// before the end. As in the reference, the first message's own calls are not counted.
fn tool_pairing(messages: &[&Message], at: &At<'_>) -> Result<(), ConversationError> {
    let mut expected: HashSet<&str> = HashSet::new();
    let mut observed: HashSet<&str> = HashSet::new();
    let mut caller = 0;
    let unanswered = |caller: usize| {
        let message = "not every tool call of this message is answered by a tool message";
        Err(at.index(caller).key("tool_calls").error(Rule::ToolPairing, message))
    };
    for (index, message) in messages.iter().enumerate().skip(1) {
        cpu_budget::check(Stage::Validate)?;
        match message {
            Message::Tool { call_id, .. } => {
                let here = at.index(index);
                let here = here.key("tool_call_id");
                if !expected.contains(call_id.as_str()) {
                    return Err(
                        here.error(Rule::ToolPairing, format!("unexpected tool call id '{call_id}' in tool results"))
                    );
                }
                if !observed.insert(call_id) {
                    return Err(
                        here.error(Rule::ToolPairing, format!("duplicate tool call id '{call_id}' in tool results"))
                    );
                }
            }
            Message::Assistant { tool_calls, .. } => {
                if expected.len() != observed.len() {
                    return unanswered(caller);
                }
                // clearing a set takes as long as it was ever large
                (expected, observed) = Default::default();
                caller = index;
                for (call_index, call) in tool_calls.iter().enumerate() {
                    if !expected.insert(&call.id) {
                        let message = format!("duplicate tool call id '{}' in assistant message", call.id);
                        let calls = at.index(index);
                        let calls = calls.key("tool_calls");
                        return Err(calls.index(call_index).key("id").error(Rule::ToolPairing, message));
                    }
                }
            }
            Message::System { .. } | Message::User { .. } => {}
        }
    }
    if expected.len() != observed.len() {
        return unanswered(caller);
    }
    Ok(())
}
