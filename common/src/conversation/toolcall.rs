//! Generated ids to content and tool calls, as they come.
//!
//! Ids before the first `[TOOL_CALLS]` are content; each `[TOOL_CALLS]` begins a call: its name up to
//! `[ARGS]`, then a JSON object up to the next `[TOOL_CALLS]` or the end. Everything is decided on ids: the
//! same characters inside arguments are ordinary text.
//!
//! What does not parse is content in the end: [`FinalParse::error`] says why. A stream has by then
//! sent what it could; a name is held back until it is complete, so a call without `[ARGS]` never shows as
//! one.

use std::sync::Arc;

use rand::Rng;

use super::json::Json;
use super::layout::Special;
use crate::tokenizer::{IncrementalDecoder, Tokenizer};

/// What one more id adds to the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delta {
    /// More content.
    Content(String),
    /// A call begins; its name is complete.
    CallStart {
        /// Which call of this answer, from 0.
        index: usize,
        /// The function's name.
        name: String,
    },
    /// More of a call's arguments.
    Arguments {
        /// Which call.
        index: usize,
        /// JSON text.
        text: String,
    },
    /// A call is complete: [`ToolCallParser::calls`] has it whole.
    CallEnd {
        /// Which call.
        index: usize,
    },
}

/// A call that the model made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParsedCall {
    /// The function's name.
    pub name: String,
    /// The arguments as the model wrote them: JSON text.
    pub arguments: String,
}

/// Why an answer's calls do not parse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// A call has no `[ARGS]`.
    #[error("a tool call has no [ARGS]")]
    NoArguments,
    /// A call has more than one `[ARGS]`.
    #[error("a tool call has more than one [ARGS]")]
    SecondArguments,
    /// `[ARGS]` stands outside of a call.
    #[error("[ARGS] stands outside of a tool call")]
    StrayArguments,
    /// A call has no name.
    #[error("a tool call has no function name")]
    NoName,
    /// The arguments are not a JSON object.
    #[error("the arguments of a tool call are not a JSON object")]
    InvalidArguments,
}

/// The whole answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FinalParse {
    /// The content, if there is any; the whole text with its markers when the calls do not parse.
    pub content: Option<String>,
    /// The calls; none when they do not parse.
    pub tool_calls: Vec<ParsedCall>,
    /// Why the calls do not parse.
    pub error: Option<CallError>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Content,
    Name,
    Arguments,
    /// After an error: what follows is text with its markers printed.
    Broken,
}

/// Parses one answer.
#[derive(Clone, Debug)]
pub struct ToolCallParser {
    call_id: Option<u32>,
    arguments_id: Option<u32>,
    end_id: u32,
    state: State,
    /// The text of the current state, without markers.
    decoder: IncrementalDecoder,
    /// The text of the whole answer, with markers.
    whole_decoder: IncrementalDecoder,
    whole: String,
    /// Where in `whole` the marker of the last call begins.
    marker_at: usize,
    content: String,
    /// A name that is not complete.
    name: String,
    calls: Vec<ParsedCall>,
    error: Option<CallError>,
}

impl ToolCallParser {
    /// A parser for one answer.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self {
            call_id: tokenizer.special_id(Special::ToolCall.name()),
            arguments_id: tokenizer.special_id(Special::Arguments.name()),
            end_id: tokenizer.eos_id(),
            state: State::Content,
            decoder: IncrementalDecoder::new(Arc::clone(&tokenizer), true),
            whole_decoder: IncrementalDecoder::new(tokenizer, false),
            whole: String::new(),
            marker_at: 0,
            content: String::new(),
            name: String::new(),
            calls: Vec::new(),
            error: None,
        }
    }

    /// Adds one generated id; the end-of-text id may be among them or not.
    pub fn push(&mut self, id: u32) -> Vec<Delta> {
        let mut deltas = Vec::new();
        if id == self.end_id {
            return deltas;
        }
        let whole_before = self.whole.len();
        let printed = self.whole_decoder.push(id);
        self.whole.push_str(&printed);
        if self.state == State::Broken {
            self.push_content_delta(whole_before, &mut deltas);
        } else if Some(id) == self.call_id {
            self.end_state(&mut deltas);
            if self.state != State::Broken {
                self.state = State::Name;
                self.marker_at = self.whole.len() - Special::ToolCall.name().len();
            }
        } else if Some(id) == self.arguments_id {
            self.begin_arguments(whole_before, &mut deltas);
        } else {
            let text = self.decoder.push(id);
            self.add_text(text, &mut deltas);
        }
        deltas
    }

    /// The calls so far; the last one may be incomplete until its [`Delta::CallEnd`].
    pub fn calls(&self) -> &[ParsedCall] {
        &self.calls
    }

    /// Whether a call has begun.
    pub fn in_tool_calls(&self) -> bool {
        self.state != State::Content
    }

    /// The end of the answer: the last deltas, and all of it.
    pub fn finish(&mut self) -> (Vec<Delta>, FinalParse) {
        let mut deltas = Vec::new();
        let whole_before = self.whole.len();
        let printed = self.whole_decoder.finish();
        self.whole.push_str(&printed);
        if self.state == State::Broken {
            self.push_content_delta(whole_before, &mut deltas);
        } else {
            self.end_state(&mut deltas);
        }
        let content = if self.error.is_some() { &self.whole } else { &self.content };
        let parse = FinalParse {
            content: (!content.is_empty()).then(|| content.clone()),
            tool_calls: if self.error.is_some() { Vec::new() } else { self.calls.clone() },
            error: self.error,
        };
        (deltas, parse)
    }

    fn push_content_delta(&self, from: usize, deltas: &mut Vec<Delta>) {
        if self.whole.len() > from {
            deltas.push(Delta::Content(self.whole[from..].to_owned()));
        }
    }

    fn add_text(&mut self, text: String, deltas: &mut Vec<Delta>) {
        if text.is_empty() {
            return;
        }
        match self.state {
            State::Content => {
                self.content.push_str(&text);
                deltas.push(Delta::Content(text));
            }
            State::Name => self.name.push_str(&text),
            State::Arguments => {
                let index = self.calls.len().saturating_sub(1);
                if let Some(call) = self.calls.last_mut() {
                    call.arguments.push_str(&text);
                }
                deltas.push(Delta::Arguments { index, text });
            }
            State::Broken => {}
        }
    }

    fn begin_arguments(&mut self, whole_before: usize, deltas: &mut Vec<Delta>) {
        let rest = self.decoder.finish();
        self.add_text(rest, deltas);
        match self.state {
            State::Name if !self.name.trim().is_empty() => {
                let name = std::mem::take(&mut self.name).trim().to_owned();
                self.calls.push(ParsedCall { name: name.clone(), arguments: String::new() });
                deltas.push(Delta::CallStart { index: self.calls.len() - 1, name });
                self.state = State::Arguments;
            }
            State::Name => self.break_with_held_name(CallError::NoName, deltas),
            State::Arguments => self.break_at(CallError::SecondArguments, whole_before, deltas),
            State::Content => self.break_at(CallError::StrayArguments, whole_before, deltas),
            State::Broken => {}
        }
    }

    /// Content, name or arguments end here.
    fn end_state(&mut self, deltas: &mut Vec<Delta>) {
        let rest = self.decoder.finish();
        self.add_text(rest, deltas);
        match self.state {
            State::Name => self.break_with_held_name(CallError::NoArguments, deltas),
            State::Arguments => {
                let valid =
                    self.calls.last().is_some_and(|call| matches!(Json::parse(&call.arguments), Ok(Json::Object(_))));
                if !valid {
                    // The stream has it already; only the whole answer turns into content.
                    self.error = self.error.or(Some(CallError::InvalidArguments));
                }
                deltas.push(Delta::CallEnd { index: self.calls.len().saturating_sub(1) });
            }
            State::Content | State::Broken => {}
        }
    }

    fn break_at(&mut self, error: CallError, whole_from: usize, deltas: &mut Vec<Delta>) {
        self.error = self.error.or(Some(error));
        self.state = State::Broken;
        self.push_content_delta(whole_from, deltas);
    }

    /// The marker and the name that were held back become content.
    fn break_with_held_name(&mut self, error: CallError, deltas: &mut Vec<Delta>) {
        self.name.clear();
        self.break_at(error, self.marker_at, deltas);
    }
}

/// A fresh tool call id: nine characters of `a-z A-Z 0-9`, as Mistral's clients expect.
pub fn new_call_id() -> String {
    let mut random = rand::rng();
    (0..9).map(|_| char::from(random.sample(rand::distr::Alphanumeric))).collect()
}
