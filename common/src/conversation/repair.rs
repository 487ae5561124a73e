//! Conversations that the reference refuses, made into the nearest ones that it takes.
//!
//! Agents send histories that the model was never trained on: a response that says nothing, a call whose tool was denied
//! and never served, a reminder in the role `system` behind a response. [`repair`] mends a fixed list of such cases
//! ([`Repair`]); everything else stays as it is, for [`Conversation`](super::Conversation) to judge.
//!
//! Two things hold, and tests keep them:
//!
//! - What is valid gives the same prompt as without repair.
//! - A conversation that grows keeps its beginning, so that caches of prompts continue to work. A *turn* is one response of
//!   the assistant (neighbouring messages are one response) and all that follows up to the next one; requests are sent at
//!   the end of a turn. What a turn becomes depends on that turn alone. (A last message that is continued ends later.)
//!
//! A result without a call is dropped rather than shown as a user's words: what tools return is not to be obeyed.

use std::collections::{HashMap, HashSet, VecDeque};

use super::python_json::{Json, JsonError};
use crate::cpu_budget::{self, Stage};

/// What stands where a call has no result.
pub const NOT_RUN: &str = "This call was not run: no result was given.";

/// One kind of repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Repair {
    /// An assistant message that says nothing and calls nothing is dropped.
    EmptyAssistant,
    /// Calls of an assistant message that is followed by another one are made by the last of them.
    SplitCalls,
    /// A call without a result gets one that says it was not run.
    MissingResult,
    /// A result that responds no call of the turn, or one that has its result, is dropped.
    OrphanResult,
    /// A result behind a user or system message moves to its call.
    LateResult,
    /// Calls without an id, or with the same one, and their results get ids of their own. No id is part of a prompt.
    CallId,
    /// A system message behind a response or a tool's result is a user's message.
    LateSystem,
    /// Content that is absent or `null` is empty.
    NoContent,
    /// `prefix: true` on a message that is not the last is taken away.
    StalePrefix,
    /// A last message that is the assistant's is continued.
    FinalAssistant,
}

impl Repair {
    /// Every kind.
    pub const ALL: [Self; 10] = [
        Self::EmptyAssistant,
        Self::SplitCalls,
        Self::MissingResult,
        Self::OrphanResult,
        Self::LateResult,
        Self::CallId,
        Self::LateSystem,
        Self::NoContent,
        Self::StalePrefix,
        Self::FinalAssistant,
    ];

    /// Its name in counters and documentation.
    pub fn name(self) -> &'static str {
        match self {
            Self::EmptyAssistant => "empty_assistant",
            Self::SplitCalls => "split_calls",
            Self::MissingResult => "missing_result",
            Self::OrphanResult => "orphan_result",
            Self::LateResult => "late_result",
            Self::CallId => "call_id",
            Self::LateSystem => "late_system",
            Self::NoContent => "no_content",
            Self::StalePrefix => "stale_prefix",
            Self::FinalAssistant => "final_assistant",
        }
    }
}

/// A message of a repaired conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepairedMessage {
    /// The message of the request that it comes from.
    pub index: usize,
    /// Its JSON where that changed; `None`: as it was written.
    pub changed: Option<String>,
}

/// A repaired conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Repaired {
    /// Its messages.
    pub messages: Vec<RepairedMessage>,
    /// What was done, by the message of the request that it was done to.
    pub repairs: Vec<(usize, Repair)>,
    /// Whether the model continues with the last message, for `continue_final_message` as for `prefix`.
    pub continue_final_message: bool,
}

/// Repairs a conversation, given as the JSON of each message. Fails where a message is not JSON.
pub fn repair(messages: &[&str], continue_final_message: bool) -> Result<Repaired, JsonError> {
    let mut work = Work::default();
    let mut items = Vec::with_capacity(messages.len());
    for (index, text) in messages.iter().enumerate() {
        items.push(Item { index, json: Json::parse(text)?, changed: false });
    }
    let last = items.len();
    let mut turn = Turn::default();
    for mut item in items {
        cpu_budget::check(Stage::Repair)?;
        work.complete(&mut item);
        work.stale_prefix(&mut item, last);
        if item.role() == "assistant" {
            if !turn.rest.is_empty() {
                work.finish(std::mem::take(&mut turn));
            }
            turn.response.push(item);
        } else {
            turn.rest.push(item);
        }
    }
    work.finish(turn);
    let mut continue_final_message = continue_final_message;
    if let Some(last) = work.output.last_mut()
        && last.role() == "assistant"
    {
        if !continue_final_message && last.json.get("prefix") != Some(&Json::Bool(true)) {
            last.set("prefix", Json::Bool(true));
            work.repairs.push((last.index, Repair::FinalAssistant));
        }
    } else if work.repairs.iter().any(|(_, repair)| *repair == Repair::EmptyAssistant) {
        // what was to be continued said nothing
        continue_final_message = false;
    }
    let messages = work.output.into_iter().map(Item::written).collect();
    Ok(Repaired { messages, repairs: work.repairs, continue_final_message })
}

/// A message while it is looked at.
#[derive(Debug)]
struct Item<'a> {
    index: usize,
    json: Json<'a>,
    changed: bool,
}

impl<'a> Item<'a> {
    fn role(&self) -> &str {
        self.json.get("role").and_then(Json::as_str).unwrap_or_default()
    }

    fn set(&mut self, key: &'static str, value: Json<'a>) {
        let Json::Object(fields) = &mut self.json else { return };
        match fields.iter_mut().find(|(name, _)| name == key) {
            Some((_, old)) => *old = value,
            None => fields.push((key.into(), value)),
        }
        self.changed = true;
    }

    fn calls(&self) -> &[Json<'a>] {
        match self.json.get("tool_calls") {
            Some(Json::Array(calls)) => calls,
            _ => &[],
        }
    }

    /// The call that a result names.
    fn call_id(&self) -> Option<&str> {
        usable_id(self.json.get("tool_call_id"))
    }

    /// Nothing said and nothing called. Reasoning is something said.
    fn is_silent(&self) -> bool {
        let is_empty_text = |chunk: &Json<'_>| {
            chunk.get("type").and_then(Json::as_str) == Some("text")
                && chunk.get("text").and_then(Json::as_str) == Some("")
        };
        let has_no_content = match self.json.get("content") {
            None | Some(Json::Null) => true,
            Some(Json::String(text)) => text.is_empty(),
            Some(Json::Array(chunks)) => chunks.iter().all(is_empty_text),
            Some(_) => false,
        };
        let reasons = ["reasoning_content", "reasoning"].iter().any(|key| self.json.get(key).is_some_and(is_not_null));
        let has_calls = match self.json.get("tool_calls") {
            None | Some(Json::Null) => false,
            Some(Json::Array(calls)) => !calls.is_empty(),
            Some(_) => true,
        };
        has_no_content && !reasons && !has_calls
    }

    fn written(self) -> RepairedMessage {
        let changed = self.changed.then(|| {
            let mut text = String::new();
            self.json.dump(&mut text);
            text
        });
        RepairedMessage { index: self.index, changed }
    }
}

fn is_not_null(value: &Json<'_>) -> bool {
    *value != Json::Null
}

fn usable_id<'v>(id: Option<&'v Json<'_>>) -> Option<&'v str> {
    id.and_then(Json::as_str).filter(|id| !id.is_empty() && *id != "null")
}

/// A response and what follows it; the first turn may have no response.
#[derive(Default)]
struct Turn<'a> {
    response: Vec<Item<'a>>,
    rest: Vec<Item<'a>>,
}

/// A call of a turn.
struct Call {
    /// As the client wrote it.
    given: Option<String>,
    id: String,
    is_answered: bool,
}

#[derive(Default)]
struct Work<'a> {
    output: Vec<Item<'a>>,
    repairs: Vec<(usize, Repair)>,
}

impl<'a> Work<'a> {
    fn note(&mut self, index: usize, repair: Repair) {
        self.repairs.push((index, repair));
    }

    /// What a message lacks by itself.
    fn complete(&mut self, item: &mut Item<'a>) {
        if item.index == 0 && item.role() == "tool" && item.call_id().is_none() {
            item.set("tool_call_id", Json::String("call0".into()));
            self.note(item.index, Repair::CallId);
        }
        let needs_content = matches!(item.role(), "user" | "system" | "developer" | "tool");
        if needs_content && !item.json.get("content").is_some_and(is_not_null) {
            item.set("content", Json::String("".into()));
            self.note(item.index, Repair::NoContent);
        }
    }

    fn stale_prefix(&mut self, item: &mut Item<'a>, messages: usize) {
        let is_prefix = item.json.get("prefix") == Some(&Json::Bool(true));
        if is_prefix && item.index + 1 < messages && item.role() == "assistant" {
            item.set("prefix", Json::Bool(false));
            self.note(item.index, Repair::StalePrefix);
        }
    }

    /// Puts a turn out as it should be.
    fn finish(&mut self, turn: Turn<'a>) {
        let is_first = self.output.is_empty();
        let mut response = self.speaking(turn.response);
        if is_first && !response.is_empty() {
            // the reference does not count the calls of a first message, so nothing can answer them
            let mut first = response.remove(0);
            self.read_calls(&mut first);
            self.output.push(first);
        }
        self.join_calls(&mut response);
        let mut calls = response.last_mut().map(|last| self.read_calls(last)).unwrap_or_default();
        let (results, others) = self.match_results(turn.rest, &mut calls);
        let caller = response.last().map_or(0, |item| item.index);
        self.output.append(&mut response);
        self.output.extend(results);
        let missing = calls.iter().filter(|call| !call.is_answered);
        let missing: Vec<Item<'a>> = missing.map(|call| not_run(caller, &call.id)).collect();
        if !missing.is_empty() {
            self.note(caller, Repair::MissingResult);
            if let Some(item) = self.output.iter_mut().rev().find(|item| item.index == caller)
                && item.json.get("prefix") == Some(&Json::Bool(true))
            {
                item.set("prefix", Json::Bool(false));
            }
            self.output.extend(missing);
        }
        let is_after_completion = self.output.last().is_some_and(|item| matches!(item.role(), "assistant" | "tool"));
        self.put_others(others, is_after_completion);
    }

    /// Drops messages that are silent; at the beginning of a conversation they stay with those that are not, because what
    /// comes first is counted in its own way.
    fn speaking(&mut self, response: Vec<Item<'a>>) -> Vec<Item<'a>> {
        if self.output.is_empty() && !response.iter().all(Item::is_silent) {
            return response;
        }
        let (silent, speaking): (Vec<_>, Vec<_>) = response.into_iter().partition(Item::is_silent);
        for item in silent {
            self.note(item.index, Repair::EmptyAssistant);
        }
        speaking
    }

    /// All calls of a response are made by its last message. A message of which nothing is left is dropped.
    fn join_calls(&mut self, response: &mut Vec<Item<'a>>) {
        let Some((last, before)) = response.split_last_mut() else { return };
        if before.iter().all(|item| item.calls().is_empty()) {
            return;
        }
        let mut joined = Vec::new();
        for item in before {
            if !item.calls().is_empty() {
                joined.extend_from_slice(item.calls());
                item.set("tool_calls", Json::Array(Vec::new()));
                self.note(item.index, Repair::SplitCalls);
            }
        }
        joined.extend_from_slice(last.calls());
        last.set("tool_calls", Json::Array(joined));
        response.retain(|item| !item.is_silent());
    }

    /// The calls of a message; ids that can't be used are replaced.
    fn read_calls(&mut self, item: &mut Item<'a>) -> Vec<Call> {
        let mut calls: Vec<Call> = Vec::new();
        let mut written = item.calls().to_vec();
        let given_ids: HashSet<&str> = item.calls().iter().filter_map(|call| usable_id(call.get("id"))).collect();
        let mut taken: HashSet<String> = HashSet::new();
        // numbers below were looked at for an earlier call and are not free
        let mut first_free = 0;
        let mut is_changed = false;
        for (number, call) in written.iter_mut().enumerate() {
            let given = usable_id(call.get("id")).map(str::to_owned);
            let id = match &given {
                Some(id) if !taken.contains(id) => id.clone(),
                _ => {
                    first_free = first_free.max(number);
                    let id = loop {
                        let id = format!("call{first_free}");
                        first_free += 1;
                        if !taken.contains(&id) && !given_ids.contains(id.as_str()) {
                            break id;
                        }
                    };
                    if let Json::Object(fields) = call {
                        fields.retain(|(name, _)| name != "id");
                        fields.push(("id".into(), Json::String(id.clone().into())));
                        is_changed = true;
                    }
                    id
                }
            };
            taken.insert(id.clone());
            calls.push(Call { given, id, is_answered: false });
        }
        if is_changed {
            item.set("tool_calls", Json::Array(written));
            self.note(item.index, Repair::CallId);
        }
        calls
    }

    /// The results of the turn's calls in the order they came, and all messages that are no results.
    fn match_results(&mut self, rest: Vec<Item<'a>>, calls: &mut [Call]) -> (Vec<Item<'a>>, Vec<Item<'a>>) {
        // the reference lets a conversation begin with a result of no call
        let is_tool = |item: &Item<'_>| item.role() == "tool" && item.index > 0;
        let mut responses = vec![None; rest.len()];
        // calls that have no result yet, by the name that the client gave them
        let mut open_calls: HashMap<String, VecDeque<usize>> = HashMap::new();
        for (number, call) in calls.iter().enumerate() {
            if let Some(name) = &call.given {
                open_calls.entry(name.clone()).or_default().push_back(number);
            }
        }
        // named ones first: a result without a name takes what is left
        let mut first_open = 0;
        for is_named in [true, false] {
            for (response, item) in responses.iter_mut().zip(&rest) {
                let named = item.call_id();
                if !is_tool(item) || named.is_some() != is_named {
                    continue;
                }
                let open = match named {
                    Some(name) => open_calls.get_mut(name).and_then(VecDeque::pop_front),
                    None => {
                        first_open += calls[first_open..].iter().take_while(|call| call.is_answered).count();
                        Some(first_open)
                    }
                };
                if let Some((number, call)) = open.and_then(|number| Some((number, calls.get_mut(number)?))) {
                    call.is_answered = true;
                    *response = Some(number);
                }
            }
        }
        let (mut results, mut others) = (Vec::new(), Vec::new());
        for (response, mut item) in responses.into_iter().zip(rest) {
            match response {
                _ if !is_tool(&item) => others.push(item),
                None => self.note(item.index, Repair::OrphanResult),
                Some(number) => {
                    let id = &calls[number].id;
                    if item.call_id() != Some(id.as_str()) {
                        item.set("tool_call_id", Json::String(id.clone().into()));
                    }
                    if !others.is_empty() {
                        self.note(item.index, Repair::LateResult);
                    }
                    results.push(item);
                }
            }
        }
        (results, others)
    }

    /// The turn's messages that are no results.
    fn put_others(&mut self, others: Vec<Item<'a>>, mut is_after_completion: bool) {
        for mut item in others {
            match item.role() {
                "system" | "developer" if is_after_completion => {
                    item.set("role", Json::String("user".into()));
                    self.note(item.index, Repair::LateSystem);
                }
                "user" => is_after_completion = false,
                "tool" => is_after_completion = true,
                _ => {}
            }
            self.output.push(item);
        }
    }
}

fn not_run<'a>(index: usize, call_id: &str) -> Item<'a> {
    let field = |name: &'static str, value: &str| (name.into(), Json::String(value.to_owned().into()));
    let json = Json::Object(vec![field("role", "tool"), field("tool_call_id", call_id), field("content", NOT_RUN)]);
    Item { index, json, changed: true }
}

#[cfg(test)]
mod tests;
