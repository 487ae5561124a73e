//! The response as events: start of the message; start, deltas and end of each block; end of the message.

use serde::Serialize;

use super::{
    error::error_json,
    output::{ContentBlock, MessageObject, MessageUsage, empty, input, stop_reason, tool_use},
};
use crate::{
    api::{
        completion::Completion,
        error::ApiError,
        sse::{EventWriter, write_named_event},
    },
    relay::emit::Part,
};

/// One event.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Event<'a> {
    MessageStart { message: MessageObject<'a> },
    ContentBlockStart { index: usize, content_block: ContentBlock<'a> },
    ContentBlockDelta { index: usize, delta: BlockDelta<'a> },
    ContentBlockStop { index: usize },
    MessageDelta { delta: MessageEnd<'a>, usage: MessageUsage },
    MessageStop,
}

impl Event<'_> {
    fn name(&self) -> &'static str {
        match self {
            Event::MessageStart { .. } => "message_start",
            Event::ContentBlockStart { .. } => "content_block_start",
            Event::ContentBlockDelta { .. } => "content_block_delta",
            Event::ContentBlockStop { .. } => "content_block_stop",
            Event::MessageDelta { .. } => "message_delta",
            Event::MessageStop => "message_stop",
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        write_named_event(self.name(), self, out);
    }
}

/// The new part of a block.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum BlockDelta<'a> {
    TextDelta { text: &'a str },
    InputJsonDelta { partial_json: &'a str },
}

/// Stop reason and stop string of the message.
#[derive(Serialize)]
struct MessageEnd<'a> {
    stop_reason: Option<&'static str>,
    stop_sequence: Option<&'a str>,
}

/// The kind of the open block.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Open {
    None,
    Text,
    ToolUse,
}

/// Writes the events of a streamed message.
pub struct MessagesWriter {
    begun: bool,
    open: Open,
    /// Number of blocks so far.
    blocks: usize,
}

impl MessagesWriter {
    /// Creates the writer of one message.
    pub fn new() -> Self {
        Self { begun: false, open: Open::None, blocks: 0 }
    }

    /// Starts the message as soon as the group has reported the cached tokens.
    fn begin_message(&mut self, completion: &Completion, out: &mut Vec<u8>) {
        if !std::mem::replace(&mut self.begun, true) {
            let message =
                MessageObject { stop_reason: None, stop_sequence: None, ..MessageObject::new(completion, vec![]) };
            Event::MessageStart { message }.write(out);
            out.extend_from_slice(MessagesWriter::SIGN_OF_LIFE);
        }
    }

    fn begin_block(&mut self, open: Open, content_block: ContentBlock<'_>, out: &mut Vec<u8>) {
        self.end_block(out);
        Event::ContentBlockStart { index: self.blocks, content_block }.write(out);
        self.open = open;
        self.blocks += 1;
    }

    fn add_text(&mut self, text: &str, out: &mut Vec<u8>) {
        if self.open != Open::Text {
            self.begin_block(Open::Text, ContentBlock::Text { text: "" }, out);
        }
        self.grow(BlockDelta::TextDelta { text }, out);
    }

    fn grow(&self, delta: BlockDelta<'_>, out: &mut Vec<u8>) {
        Event::ContentBlockDelta { index: self.blocks.saturating_sub(1), delta }.write(out);
    }

    fn end_block(&mut self, out: &mut Vec<u8>) {
        if std::mem::replace(&mut self.open, Open::None) != Open::None {
            Event::ContentBlockStop { index: self.blocks.saturating_sub(1) }.write(out);
        }
    }
}

impl Default for MessagesWriter {
    fn default() -> Self {
        Self::new()
    }
}

impl EventWriter for MessagesWriter {
    const SIGN_OF_LIFE: &'static [u8] = b"event: ping\ndata: {\"type\":\"ping\"}\n\n";

    fn begin(&mut self, _answer: &mut Completion, _out: &mut Vec<u8>) {}

    fn progress(&mut self, completion: &mut Completion, number: usize, out: &mut Vec<u8>) {
        self.begin_message(completion, out);
        let choice = &completion.choices[number];
        for part in choice.delta.parts() {
            match part {
                Part::Text(text) => self.add_text(text, out),
                // a call arrives complete
                Part::Call(call) => {
                    self.begin_block(Open::ToolUse, tool_use(call, empty()), out);
                    self.grow(BlockDelta::InputJsonDelta { partial_json: input(call).get() }, out);
                }
            }
        }
        if self.blocks == 0 && choice.finish.is_some() {
            self.add_text("", out);
        }
        completion.choices[number].delta.clear();
    }

    fn end(&mut self, completion: &mut Completion, out: &mut Vec<u8>) {
        self.end_block(out);
        let (stop_reason, stop_sequence) = stop_reason(&completion.choices[0]);
        let delta = MessageEnd { stop_reason, stop_sequence };
        Event::MessageDelta { delta, usage: MessageUsage::of(completion) }.write(out);
        Event::MessageStop.write(out);
    }

    fn failed(&mut self, completion: &mut Completion, error: &ApiError, out: &mut Vec<u8>) {
        let id = completion.context().request_id.clone();
        out.extend_from_slice(b"event: error\ndata: ");
        out.extend_from_slice(&error_json(error, &id));
        out.extend_from_slice(b"\n\n");
    }
}
