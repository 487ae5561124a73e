//! Generated token IDs to content and tool calls, as they come.
//!
//! Token IDs before the first `[TOOL_CALLS]` are content; each `[TOOL_CALLS]` begins a call: its name up to `[ARGS]`, then
//! JSON. Markers are decided on token IDs: the same characters inside arguments are ordinary text, and no marker is ever
//! part of an output.
//!
//! Nothing that was emitted is taken back, so a whole response and a streamed one say the same. Output that is not
//! well-formed has one meaning each:
//!
//! - Arguments end with the bracket that closes them; what follows is content.
//! - Arguments that begin with no bracket, or whose brackets are never closed, are handed over as they are.
//! - A call with nothing behind `[ARGS]` has the arguments `{}`; so has a function name that no `[ARGS]` follows.
//! - What no `[ARGS]` follows and is no function name, and what stands behind `[ARGS]` without a name, is content.
//! - Where the output was cut off, the last call may be partial. A name that was cut off is dropped.

use std::sync::Arc;

use rand::Rng;

use super::brackets::Brackets;
use super::layout::Special;
use super::python_json::Json;
use super::validate::FunctionNames;
use crate::tokenizer::{IncrementalDecoder, Tokenizer};

/// What one more token ID adds to the output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delta {
    /// More content.
    Content(String),
    /// A call begins; its name is complete.
    CallStart {
        /// Which call of this output, from 0.
        index: usize,
        /// The function's name.
        name: String,
    },
    /// More of a call's arguments.
    Arguments {
        /// Which call.
        index: usize,
        /// JSON text, or what the model wrote in its place.
        text: String,
    },
    /// A call is complete. A call that was cut off never is.
    CallEnd {
        /// Which call.
        index: usize,
    },
}

/// What is wrong with the calls of an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// A call has no `[ARGS]`.
    #[error("a tool call has no [ARGS]")]
    NoArguments,
    /// `[ARGS]` stands outside of a call, or twice in one.
    #[error("[ARGS] stands outside of a tool call")]
    StrayArguments,
    /// A call has no name.
    #[error("a tool call has no function name")]
    NoName,
    /// The arguments are not a JSON object.
    #[error("the arguments of a tool call are not a JSON object")]
    InvalidArguments,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Content,
    /// Behind the closing bracket of a call's arguments: white space up to the first text is dropped.
    BehindCall,
    Name,
    /// Behind `[CALL_ID]`, which other versions of the layout have: the text is dropped.
    CallId,
    Arguments,
}

/// Parses one output.
#[derive(Clone, Debug)]
pub struct ToolCallParser {
    call_marker: Option<u32>,
    id_marker: Option<u32>,
    arguments_marker: Option<u32>,
    end_of_text: u32,
    state: State,
    decoder: IncrementalDecoder,
    /// A name that is not complete.
    name: String,
    /// Calls so far; the last one is open in [`State::Arguments`].
    calls: usize,
    /// The open call's arguments so far.
    arguments: String,
    brackets: Brackets,
    error: Option<CallError>,
}

impl ToolCallParser {
    /// A parser for one output.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self {
            call_marker: tokenizer.special_id(Special::ToolCall.name()),
            id_marker: tokenizer.special_id("[CALL_ID]"),
            arguments_marker: tokenizer.special_id(Special::Arguments.name()),
            end_of_text: tokenizer.eos_id(),
            state: State::Content,
            decoder: IncrementalDecoder::new(tokenizer, true),
            name: String::new(),
            calls: 0,
            arguments: String::new(),
            brackets: Brackets::default(),
            error: None,
        }
    }

    /// Adds one generated token ID; the one that ends the text may be among them or not.
    pub fn push(&mut self, id: u32) -> Vec<Delta> {
        let mut deltas = Vec::new();
        if id == self.end_of_text {
            return deltas;
        }
        if Some(id) == self.call_marker {
            self.end_state(&mut deltas);
            self.state = State::Name;
        } else if Some(id) == self.arguments_marker {
            self.begin_arguments(&mut deltas);
        } else if Some(id) == self.id_marker && self.state == State::Name {
            self.flush(&mut deltas);
            self.state = State::CallId;
        } else {
            let text = self.decoder.push(id);
            self.add_text(&text, &mut deltas);
        }
        deltas
    }

    /// What was wrong so far, if anything.
    pub fn error(&self) -> Option<CallError> {
        self.error
    }

    /// The end of the output: the last deltas. `cut`: it was cut off, so that what is open is partial.
    pub fn finish(&mut self, cut: bool) -> Vec<Delta> {
        let mut deltas = Vec::new();
        if cut {
            self.flush(&mut deltas);
        } else {
            self.end_state(&mut deltas);
        }
        self.state = State::Content;
        deltas
    }

    /// Bytes of a character that will not be completed.
    fn flush(&mut self, deltas: &mut Vec<Delta>) {
        let rest = self.decoder.finish();
        self.add_text(&rest, deltas);
    }

    fn add_text(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        if text.is_empty() {
            return;
        }
        match self.state {
            State::Content => deltas.push(Delta::Content(text.to_owned())),
            State::BehindCall => {
                let text = text.trim_start();
                if !text.is_empty() {
                    self.state = State::Content;
                    deltas.push(Delta::Content(text.to_owned()));
                }
            }
            State::Name => self.name.push_str(text),
            State::CallId => {}
            State::Arguments => self.add_arguments(text, deltas),
        }
    }

    fn add_arguments(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        let text = if self.arguments.is_empty() { text.trim_start() } else { text };
        let end = self.brackets.close_at(text);
        let (text, behind) = text.split_at(end.unwrap_or(text.len()));
        if !text.is_empty() {
            self.arguments.push_str(text);
            deltas.push(Delta::Arguments { index: self.calls - 1, text: text.to_owned() });
        }
        if end.is_some() {
            self.end_call(deltas);
            self.state = State::BehindCall;
            self.add_text(behind, deltas);
        }
    }

    fn begin_arguments(&mut self, deltas: &mut Vec<Delta>) {
        self.flush(deltas);
        match self.state {
            State::Name | State::CallId => {
                let name = std::mem::take(&mut self.name);
                if name.trim().is_empty() {
                    self.note(CallError::NoName);
                    self.state = State::Content;
                } else {
                    self.begin_call(name.trim(), deltas);
                    self.state = State::Arguments;
                }
            }
            State::Content | State::BehindCall | State::Arguments => self.note(CallError::StrayArguments),
        }
    }

    fn begin_call(&mut self, name: &str, deltas: &mut Vec<Delta>) {
        deltas.push(Delta::CallStart { index: self.calls, name: name.to_owned() });
        self.calls += 1;
        self.arguments.clear();
        self.brackets = Brackets::default();
    }

    fn end_call(&mut self, deltas: &mut Vec<Delta>) {
        let index = self.calls - 1;
        if self.arguments.is_empty() {
            deltas.push(Delta::Arguments { index, text: "{}".to_owned() });
        } else if !matches!(Json::parse(&self.arguments), Ok(Json::Object(_))) {
            self.note(CallError::InvalidArguments);
        }
        deltas.push(Delta::CallEnd { index });
    }

    /// Content, name or arguments end here, and are complete.
    fn end_state(&mut self, deltas: &mut Vec<Delta>) {
        self.flush(deltas);
        match self.state {
            State::Name | State::CallId => {
                self.note(CallError::NoArguments);
                let name = std::mem::take(&mut self.name);
                if FunctionNames::Api.allow(name.trim()) {
                    self.begin_call(name.trim(), deltas);
                    self.end_call(deltas);
                } else if !name.is_empty() {
                    deltas.push(Delta::Content(name));
                }
            }
            State::Arguments => self.end_call(deltas),
            State::Content | State::BehindCall => {}
        }
    }

    fn note(&mut self, error: CallError) {
        self.error.get_or_insert(error);
    }
}

/// A fresh tool call id: nine characters of `a-z A-Z 0-9`, as Mistral's clients expect.
pub fn new_call_id() -> String {
    let mut random = rand::rng();
    (0..9).map(|_| char::from(random.sample(rand::distr::Alphanumeric))).collect()
}
