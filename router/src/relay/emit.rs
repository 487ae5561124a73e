//! What generated token IDs mean to the client: text without stop strings, tool calls, logprobs, and why it ended.
//!
//! An [`Emitter`] turns each batch of token IDs into an addition to a [`Delta`]. A streamed response sends and clears
//! the delta after every batch, a plain one lets it grow to the end: both say the same, because nothing that was
//! emitted is taken back.

use std::sync::Arc;

use bora_common::{
    conversation::{Delta as Parsed, FunctionNames, ToolCallParser, new_call_id},
    tokenizer::{IncrementalDecoder, Tokenizer},
};
use bora_proto::v1::{FinishReason, PositionLogprobs, Tokens};

use super::stop::StopMatcher;

/// How a request wants its output.
#[derive(Clone, Default)]
pub struct EmitOptions {
    /// None: token IDs in, token IDs out, no text at all.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Special tokens are left out of the text.
    pub skip_special: bool,
    /// Tools were offered: calls are looked for.
    pub tool_calls: bool,
    /// No tools were offered, so the text contains no part of a call that the model starts anyhow.
    pub drops_calls: bool,
    /// A call comes whole, when it is complete or the output ends: the client can't put one together from chunks, or its
    /// API has a form for arguments that are no object.
    pub whole_calls: bool,
    /// The names that calls may have in the history: a call of another name, which the model made up, is content.
    pub function_names: FunctionNames,
    /// `parallel_tool_calls: false`: calls after the first are dropped.
    pub only_one_call: bool,
    /// Stop strings.
    pub stops: Vec<String>,
    /// The stop string (or token) is part of the output.
    pub keep_stop: bool,
    /// No stop string counts before that many token IDs.
    pub min_tokens: u32,
    /// Ids that end a sequence; their own text is not part of it.
    pub end_ids: Vec<u32>,
    /// Of those, the ones that the request named.
    pub stop_token_ids: Vec<u32>,
    /// The client wants token IDs.
    pub token_ids: bool,
}

/// What is new since the delta was last cleared.
#[derive(Debug, Default)]
pub struct Delta {
    /// Text.
    pub text: String,
    /// Chunks of tool calls, at most one for each call.
    pub calls: Vec<CallDelta>,
    /// The token IDs, if wanted.
    pub token_ids: Vec<u32>,
    /// Their logprobs, if wanted.
    pub logprobs: Vec<PositionLogprobs>,
}

impl Delta {
    /// Whether there is nothing that a client could see.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.calls.is_empty() && self.token_ids.is_empty()
    }

    /// Text and calls in the order of the output.
    pub fn parts(&self) -> impl Iterator<Item = Part<'_>> {
        let ends = self.calls.iter().map(|call| call.text_before).chain([self.text.len()]);
        let begins = [0].into_iter().chain(self.calls.iter().map(|call| call.text_before));
        let texts = begins.zip(ends).map(|(begin, end)| self.text.get(begin..end).unwrap_or_default());
        let calls = self.calls.iter().map(Some).chain([None]);
        texts.zip(calls).flat_map(|(text, call)| {
            let text = (!text.is_empty()).then_some(Part::Text(text));
            text.into_iter().chain(call.map(Part::Call))
        })
    }

    /// Forgets what was sent, keeps the memory.
    pub fn clear(&mut self) {
        self.text.clear();
        self.calls.clear();
        self.token_ids.clear();
        self.logprobs.clear();
    }
}

/// A part of a [`Delta`], in the order of the output.
#[derive(Clone, Copy, Debug)]
pub enum Part<'a> {
    /// Text; never empty.
    Text(&'a str),
    /// A chunk of a call.
    Call(&'a CallDelta),
}

/// A chunk of a tool call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CallDelta {
    /// Which call of the message.
    pub index: u32,
    /// Present in the first chunk.
    pub start: Option<CallStart>,
    /// More of its JSON.
    pub arguments: String,
    /// Whether the call ends here. One that was cut off never does.
    pub is_complete: bool,
    /// Bytes of the delta's text that precede it.
    pub text_before: usize,
}

/// The head of a tool call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallStart {
    /// Nine letters or digits, as in Mistral's own API.
    pub id: String,
    /// The function.
    pub name: String,
}

/// Why a sequence ended, in OpenAI's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// End of sequence or a stop string.
    Stop,
    /// `max_tokens` or the model's window.
    Length,
    /// It called tools.
    ToolCalls,
}

impl Finish {
    /// OpenAI's name of it.
    pub fn as_str(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::ToolCalls => "tool_calls",
        }
    }
}

/// What stopped a sequence, as vLLM's `stop_reason` reports it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(untagged)]
pub enum StopReason {
    /// One of `stop_token_ids`.
    Token(u32),
    /// One of `stop`.
    Text(String),
}

enum Decode {
    IdsOnly,
    Text(IncrementalDecoder),
    ToolCalls(ToolCallParser),
}

/// Turns the token IDs of one sequence into output.
pub struct Emitter {
    options: Arc<EmitOptions>,
    decode: Decode,
    stops: StopMatcher,
    /// An id that may end the sequence: whether it did is known when the next event comes.
    held_end: Option<u32>,
    /// With `whole_calls`: the call that is not complete yet.
    open_call: Option<CallDelta>,
    /// The call that the parser reads is content: its name could not be sent back.
    is_unnameable: bool,
    /// Calls handed out.
    calls: u32,
    completion_tokens: u32,
    stop_reason: Option<StopReason>,
}

impl Emitter {
    /// For one sequence.
    pub fn new(options: Arc<EmitOptions>) -> Self {
        let decode = match &options.tokenizer {
            None => Decode::IdsOnly,
            Some(tokenizer) if options.tool_calls || options.drops_calls => {
                Decode::ToolCalls(ToolCallParser::new(Arc::clone(tokenizer)))
            }
            Some(tokenizer) => Decode::Text(IncrementalDecoder::new(Arc::clone(tokenizer), options.skip_special)),
        };
        Self {
            decode,
            stops: StopMatcher::new(options.stops.clone(), options.keep_stop),
            held_end: None,
            open_call: None,
            is_unnameable: false,
            calls: 0,
            completion_tokens: 0,
            stop_reason: None,
            options,
        }
    }

    /// Ids generated, up to the one that completed a stop string.
    pub fn completion_tokens(&self) -> u32 {
        self.completion_tokens
    }

    /// Whether its tool calls are not what they should be.
    pub fn unparsed_tool_calls(&self) -> bool {
        matches!(&self.decode, Decode::ToolCalls(parser) if parser.error().is_some())
    }

    /// What stopped it, where that was something the request named.
    pub fn stop_reason(&self) -> Option<&StopReason> {
        self.stop_reason.as_ref()
    }

    /// Adds a batch of token IDs. Returns true when a stop string was completed: then the sequence is over,
    /// whatever else its group may still send.
    pub fn push(&mut self, tokens: Tokens, delta: &mut Delta) -> bool {
        let mut logprobs = tokens.logprobs.into_iter();
        for id in tokens.token_ids {
            self.completion_tokens += 1;
            if self.options.token_ids {
                delta.token_ids.push(id);
            }
            delta.logprobs.extend(logprobs.next());
            if let Some(not_the_end) = self.held_end.take()
                && self.decode(not_the_end, delta)
            {
                return true;
            }
            if self.options.end_ids.contains(&id) {
                self.held_end = Some(id);
                continue;
            }
            if self.decode(id, delta) {
                return true;
            }
        }
        false
    }

    /// The group said that the sequence is over: everything held back comes out.
    pub fn finish(&mut self, reason: FinishReason, delta: &mut Delta) -> Finish {
        if let Some(id) = self.held_end.take() {
            if reason != FinishReason::Stop {
                self.decode(id, delta);
            } else {
                if self.options.stop_token_ids.contains(&id) {
                    self.stop_reason = Some(StopReason::Token(id));
                }
                if self.options.keep_stop {
                    self.decode(id, delta);
                }
            }
        }
        self.end_of_text(reason == FinishReason::Length, delta);
        self.how_it_ended(reason)
    }

    /// A stop string was found: reports how the sequence ended. No call is open then: calls have no stop strings.
    pub fn finish_at_stop_string(&self) -> Finish {
        self.how_it_ended(FinishReason::Stop)
    }

    fn how_it_ended(&self, reason: FinishReason) -> Finish {
        match reason {
            FinishReason::Length => Finish::Length,
            _ if self.calls > 0 => Finish::ToolCalls,
            _ => Finish::Stop,
        }
    }

    /// Decodes one id; true when it completed a stop string.
    fn decode(&mut self, id: u32, delta: &mut Delta) -> bool {
        match &mut self.decode {
            Decode::IdsOnly => false,
            Decode::Text(decoder) => {
                let text = decoder.push(id);
                self.text(&text, delta)
            }
            Decode::ToolCalls(parser) => {
                let parsed = parser.push(id);
                self.parsed(parsed, delta)
            }
        }
    }

    /// `cut`: the output was cut off, so that a call may be partial.
    fn end_of_text(&mut self, cut: bool, delta: &mut Delta) {
        match &mut self.decode {
            Decode::IdsOnly => {}
            Decode::Text(decoder) => {
                let rest = decoder.finish();
                self.text(&rest, delta);
                self.stops.flush(&mut delta.text);
            }
            Decode::ToolCalls(parser) => {
                let rest = parser.finish(cut);
                self.parsed(rest, delta);
                self.stops.flush(&mut delta.text);
                self.close_call(delta);
            }
        }
    }

    fn text(&mut self, text: &str, delta: &mut Delta) -> bool {
        if text.is_empty() {
            return false;
        }
        if self.completion_tokens < self.options.min_tokens {
            self.stops.pass(text, &mut delta.text);
            return false;
        }
        let stopped = self.stops.push(text, &mut delta.text);
        if stopped {
            self.stop_reason = self.stops.found().map(|stop| StopReason::Text(stop.to_string()));
        }
        stopped
    }

    fn parsed(&mut self, parsed: Vec<Parsed>, delta: &mut Delta) -> bool {
        for part in parsed {
            match part {
                Parsed::Content(text) => {
                    if self.text(&text, delta) {
                        return true;
                    }
                }
                _ if self.options.drops_calls => {}
                Parsed::CallStart { name, .. } => {
                    self.is_unnameable = !self.options.function_names.allow_call(&name);
                    if self.is_unnameable {
                        if self.text(&name, delta) {
                            return true;
                        }
                        continue;
                    }
                    self.stops.flush(&mut delta.text);
                    self.calls += 1;
                    self.call(delta, |call| call.start = Some(CallStart { id: new_call_id(), name }));
                }
                Parsed::Arguments { text, .. } if self.is_unnameable => {
                    if self.text(&text, delta) {
                        return true;
                    }
                }
                Parsed::Arguments { text, .. } => self.call(delta, |call| call.arguments = text),
                Parsed::CallEnd { .. } if self.is_unnameable => self.is_unnameable = false,
                Parsed::CallEnd { .. } => {
                    self.call(delta, |call| call.is_complete = true);
                    self.close_call(delta);
                }
            }
        }
        false
    }

    /// Adds a chunk to the last call.
    fn call(&mut self, delta: &mut Delta, fill: impl FnOnce(&mut CallDelta)) {
        if self.options.only_one_call && self.calls > 1 {
            return;
        }
        let text_before = delta.text.len();
        let mut chunk = CallDelta { index: self.calls.saturating_sub(1), text_before, ..CallDelta::default() };
        fill(&mut chunk);
        if !self.options.whole_calls {
            add_chunk(&mut delta.calls, chunk);
            return;
        }
        match &mut self.open_call {
            Some(open) if chunk.start.is_none() => open.append(chunk),
            open => *open = Some(chunk),
        }
    }

    /// Nothing is added to the open call any more.
    fn close_call(&mut self, delta: &mut Delta) {
        if let Some(mut call) = self.open_call.take() {
            call.text_before = delta.text.len();
            delta.calls.push(call);
        }
    }
}

impl CallDelta {
    fn append(&mut self, chunk: Self) {
        self.arguments.push_str(&chunk.arguments);
        self.is_complete |= chunk.is_complete;
    }
}

/// Chunks of the same call that go out together are one.
fn add_chunk(calls: &mut Vec<CallDelta>, chunk: CallDelta) {
    match calls.last_mut() {
        Some(last) if last.index == chunk.index && chunk.start.is_none() => last.append(chunk),
        _ => calls.push(chunk),
    }
}
