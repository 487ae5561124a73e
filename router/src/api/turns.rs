//! The order of messages that another API's conversation has in the model's format.
//!
//! Responses and Messages allow sequences that chat's rules refuse: adjacent assistant messages with tool calls,
//! messages between calls and their results, instructions anywhere. A *turn* is one reply of the assistant
//! and everything up to its next reply. Within it the reply comes first, and its last message has all of its calls; the
//! results follow, then all other messages. Instructions directly after a reply or a result become a user message,
//! because the format has no other place for them. The output of a turn depends on that turn alone, so a
//! growing conversation keeps its beginning.

use std::collections::HashMap;

use super::convert::{ChatContent, ChatMessage, Origin};

/// A message and its position in the client's request.
pub type Entry<'a> = (ChatMessage<'a>, Origin);

/// A reply and the messages after it.
#[derive(Default)]
struct Turn<'a> {
    completion: Vec<Entry<'a>>,
    results: Vec<Entry<'a>>,
    others: Vec<Entry<'a>>,
    /// The position of the last result for a call of this reply.
    last_result: usize,
}

impl<'a> Turn<'a> {
    fn has_answer_and_more(&self) -> bool {
        !(self.completion.is_empty() || self.results.is_empty() && self.others.is_empty())
    }

    fn write(mut self, ordered: &mut Vec<Entry<'a>>) {
        join_calls(&mut self.completion);
        ordered.append(&mut self.completion);
        ordered.append(&mut self.results);
        let mut is_after_completion = true;
        for (mut message, origin) in self.others {
            if message.role == "user" {
                is_after_completion = false;
            } else if is_after_completion {
                message.role = "user";
            }
            ordered.push((message, origin));
        }
    }
}

/// Orders messages by turn.
pub fn order(messages: Vec<Entry<'_>>) -> Vec<Entry<'_>> {
    let last_results = last_results(&messages);
    let mut ordered = Vec::with_capacity(messages.len());
    let mut turn = Turn::default();
    for ((index, entry), last_result) in messages.into_iter().enumerate().zip(last_results) {
        match entry.0.role {
            "assistant" => {
                if turn.has_answer_and_more() && turn.last_result < index {
                    std::mem::take(&mut turn).write(&mut ordered);
                }
                turn.last_result = turn.last_result.max(last_result);
                turn.completion.push(entry);
            }
            // no reply precedes these messages
            _ if turn.completion.is_empty() => ordered.push(entry),
            "tool" => turn.results.push(entry),
            _ => turn.others.push(entry),
        }
    }
    turn.write(&mut ordered);
    ordered
}

/// For each message, the position of the last result for one of its calls, or 0.
fn last_results(messages: &[Entry<'_>]) -> Vec<usize> {
    let mut last = vec![0; messages.len()];
    let mut open: HashMap<&str, usize> = HashMap::new();
    for (index, (message, _)) in messages.iter().enumerate() {
        open.extend(message.tool_calls.iter().map(|call| (&*call.id, index)));
        if let Some(id) = &message.tool_call_id
            && let Some(caller) = open.remove(&**id)
        {
            last[caller] = index;
        }
    }
    last
}

/// Moves all calls of a reply to its last message. A message that becomes empty is dropped.
fn join_calls(completion: &mut Vec<Entry<'_>>) {
    let Some((last, before)) = completion.split_last_mut() else { return };
    if before.iter().all(|(message, _)| message.tool_calls.is_empty()) {
        return;
    }
    let (mut calls, mut places) = (Vec::new(), Vec::new());
    for (message, origin) in before.iter_mut().chain([last]) {
        calls.append(&mut message.tool_calls);
        places.append(&mut origin.calls);
    }
    before.iter_mut().for_each(|(message, _)| {
        if message.content.as_ref().is_some_and(ChatContent::is_empty) {
            message.content = None;
        }
    });
    if let Some((message, origin)) = completion.last_mut() {
        (message.tool_calls, origin.calls) = (calls, places);
    }
    completion.retain(|(message, _)| message.content.is_some() || !message.tool_calls.is_empty());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::convert::{ChatCall, ChatFunction, ChatPart, Place, Text};
    use serde_json::value::RawValue;

    fn entry(index: u32, written: &'static str) -> Entry<'static> {
        let (role, rest) = written.split_once(' ').unwrap_or((written, ""));
        let text = |text: &str| {
            (!text.is_empty()).then(|| ChatContent::Parts(vec![ChatPart::Text { text: Text::Made(text.to_owned()) }]))
        };
        let call = |id: &'static str| ChatCall {
            id: id.into(),
            function: ChatFunction { name: "f".into(), arguments: std::borrow::Cow::Borrowed(RawValue::NULL) },
        };
        let place = Place::Entry("input", index);
        let mut message =
            ChatMessage { role: "user", content: None, tool_calls: vec![], tool_call_id: None, prefix: false };
        let mut origin = Origin::from(place);
        match role {
            "call" => {
                message.role = "assistant";
                message.tool_calls = rest.split(' ').map(call).collect();
                origin.calls = vec![place; message.tool_calls.len()];
            }
            "result" => {
                message.role = "tool";
                message.tool_call_id = Some(rest.into());
            }
            role => {
                message.role = role;
                message.content = text(rest);
            }
        }
        (message, origin)
    }

    fn written((message, _): &Entry<'_>) -> String {
        let text = match &message.content {
            Some(ChatContent::Parts(parts)) => serde_json::to_value(&parts[0]).expect("JSON")["text"].to_string(),
            _ => String::new(),
        };
        let calls: Vec<&str> = message.tool_calls.iter().map(|call| &*call.id).collect();
        format!("{}{text}{}{}", message.role, calls.join("+"), message.tool_call_id.as_deref().unwrap_or_default())
    }

    fn ordered(conversation: &[&'static str]) -> Vec<String> {
        let entries = conversation.iter().enumerate().map(|(index, written)| entry(index as u32, written)).collect();
        order(entries).iter().map(written).collect()
    }

    #[test]
    fn orders_turns_for_the_model_format() {
        for (conversation, expected) in [
            (&["system s", "user a", "system b"][..], &["system\"s\"", "user\"a\"", "system\"b\""][..]),
            (
                &["user a", "assistant b", "system c", "user d"],
                &["user\"a\"", "assistant\"b\"", "user\"c\"", "user\"d\""],
            ),
            (&["user a", "call 1", "call 2", "result 1", "result 2"], &["user\"a\"", "assistant1+2", "tool1", "tool2"]),
            (
                &["user a", "call 1", "assistant b", "result 1", "system c"],
                &["user\"a\"", "assistant\"b\"1", "tool1", "user\"c\""],
            ),
            (
                &["user a", "call 1 2", "result 1", "user b", "assistant c", "result 2", "assistant d"],
                &["user\"a\"", "assistant\"c\"1+2", "tool1", "tool2", "user\"b\"", "assistant\"d\""],
            ),
            // the same ID in two turns
            (
                &["user a", "call 0", "result 0", "call 0", "result 0"],
                &["user\"a\"", "assistant0", "tool0", "assistant0", "tool0"],
            ),
            (&["result x", "user a"], &["toolx", "user\"a\""]),
        ] {
            assert_eq!(ordered(conversation), expected, "{conversation:?}");
        }
    }

    /// At each point at which an agent may send a request, its prompt is a prefix of its later prompts.
    #[test]
    fn keeps_the_beginning_of_a_growing_conversation() {
        let conversation = [
            "user a",
            "call 0",
            "assistant b",
            "result 0",
            "system c",
            "assistant d",
            "user e",
            "call 1",
            "call 2",
            "user f",
            "result 2",
            "result 1",
            "assistant g",
            "system h",
            "user i",
        ];
        for end in [1, 5, 7, 12, 15] {
            let whole = ordered(&conversation);
            let beginning = ordered(&conversation[..end]);
            assert_eq!(beginning, whole[..beginning.len()]);
        }
    }
}
