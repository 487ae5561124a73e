//! The answer as typed events, each with its number: the response begins, items are added, grow and are done, the
//! response is over.

use serde::Serialize;

use super::{
    output::{Item, ItemObject, ResponseObject, Status, TextPart, final_status, logprobs_of, objects},
    request::Echo,
};
use crate::api::{
    answer::Answer,
    error::ApiError,
    response::ChatLogprob,
    sse::{EventWriter, write_named_event},
};

/// What every event has.
#[derive(Serialize)]
struct Numbered<T> {
    r#type: &'static str,
    sequence_number: u64,
    #[serde(flatten)]
    event: T,
}

/// `response.created`, `.in_progress`, `.completed`, `.incomplete`, `.failed`.
#[derive(Serialize)]
struct ResponseEvent<'a> {
    response: ResponseObject<'a>,
}

/// `response.output_item.added`, `.done`.
#[derive(Serialize)]
struct ItemEvent<'a> {
    output_index: usize,
    item: ItemObject<'a>,
}

/// `response.content_part.added`, `.done`.
#[derive(Serialize)]
struct PartEvent<'a> {
    item_id: &'a str,
    output_index: usize,
    content_index: usize,
    part: TextPart<'a>,
}

/// `response.output_text.delta`.
#[derive(Serialize)]
struct TextDelta<'a> {
    item_id: &'a str,
    output_index: usize,
    content_index: usize,
    delta: &'a str,
    logprobs: Vec<ChatLogprob<'a>>,
}

/// `response.output_text.done`.
#[derive(Serialize)]
struct TextDone<'a> {
    item_id: &'a str,
    output_index: usize,
    content_index: usize,
    text: &'a str,
    logprobs: Vec<ChatLogprob<'a>>,
}

/// `response.function_call_arguments.delta`.
#[derive(Serialize)]
struct ArgumentsDelta<'a> {
    item_id: &'a str,
    output_index: usize,
    delta: &'a str,
}

/// `response.function_call_arguments.done`.
#[derive(Serialize)]
struct ArgumentsDone<'a> {
    item_id: &'a str,
    output_index: usize,
    name: &'a str,
    arguments: &'a str,
}

/// Writes the events of a streamed response.
pub struct ResponsesWriter {
    echo: Box<Echo>,
    items: Vec<Item>,
    /// Whether the last item may grow.
    is_open: bool,
    events: Numbers,
}

/// Numbers events as they are written.
#[derive(Default)]
struct Numbers {
    next: u64,
}

impl Numbers {
    fn write(&mut self, name: &'static str, event: impl Serialize, out: &mut Vec<u8>) {
        write_named_event(name, &Numbered { r#type: name, sequence_number: self.next, event }, out);
        self.next += 1;
    }
}

impl ResponsesWriter {
    /// For one response.
    pub fn new(echo: Box<Echo>) -> Self {
        Self { echo, items: Vec::new(), is_open: false, events: Numbers::default() }
    }

    fn open(&mut self, item: Item, answer: &Answer, out: &mut Vec<u8>) {
        let output_index = self.items.len();
        let added = ItemEvent { output_index, item: item.object(Status::InProgress, answer) };
        self.events.write("response.output_item.added", added, out);
        if let Some(part) = item.part(answer) {
            let event = PartEvent { item_id: item.id(), output_index, content_index: 0, part };
            self.events.write("response.content_part.added", event, out);
        }
        self.items.push(item);
        self.is_open = true;
    }

    /// Nothing is added to the last item any more.
    fn close(&mut self, status: Status, answer: &Answer, out: &mut Vec<u8>) {
        if !std::mem::replace(&mut self.is_open, false) {
            return;
        }
        let output_index = self.items.len() - 1;
        let Some(item) = self.items.last() else { return };
        let item_id = item.id();
        match item {
            Item::Message { text, logprobs, .. } => {
                let logprobs = logprobs_of(logprobs, answer);
                let done = TextDone { item_id, output_index, content_index: 0, text, logprobs };
                self.events.write("response.output_text.done", done, out);
                if let Some(part) = item.part(answer) {
                    let event = PartEvent { item_id, output_index, content_index: 0, part };
                    self.events.write("response.content_part.done", event, out);
                }
            }
            Item::Call { name, arguments, .. } => {
                let done = ArgumentsDone { item_id, output_index, name, arguments };
                self.events.write("response.function_call_arguments.done", done, out);
            }
        }
        let done = ItemEvent { output_index, item: item.object(status, answer) };
        self.events.write("response.output_item.done", done, out);
    }

    fn add_text(&mut self, answer: &Answer, out: &mut Vec<u8>) {
        let delta = &answer.choices[0].delta;
        if !(self.is_open && matches!(self.items.last(), Some(Item::Message { .. }))) {
            self.close(Status::Completed, answer, out);
            self.open(Item::message(&answer.id, self.items.len()), answer, out);
        }
        let output_index = self.items.len() - 1;
        if let Some(Item::Message { id, text, logprobs }) = self.items.last_mut() {
            text.push_str(&delta.text);
            logprobs.extend_from_slice(&delta.logprobs);
            let event = TextDelta {
                item_id: id,
                output_index,
                content_index: 0,
                delta: &delta.text,
                logprobs: logprobs_of(&delta.logprobs, answer),
            };
            self.events.write("response.output_text.delta", event, out);
        }
    }

    fn add_calls(&mut self, answer: &Answer, out: &mut Vec<u8>) {
        for piece in &answer.choices[0].delta.calls {
            if let Some(item) = Item::call(&answer.id, self.items.len(), piece) {
                self.close(Status::Completed, answer, out);
                self.open(item, answer, out);
            }
            let output_index = self.items.len().saturating_sub(1);
            if let Some(Item::Call { id, arguments, .. }) = self.items.last_mut()
                && !piece.arguments.is_empty()
            {
                arguments.push_str(&piece.arguments);
                let event = ArgumentsDelta { item_id: id, output_index, delta: &piece.arguments };
                self.events.write("response.function_call_arguments.delta", event, out);
            }
        }
    }

    fn over(
        &mut self,
        name: &'static str,
        status: Status,
        error: Option<&ApiError>,
        answer: &Answer,
        out: &mut Vec<u8>,
    ) {
        let items = objects(&self.items, if status == Status::Completed { status } else { Status::Incomplete }, answer);
        let response = ResponseObject::new(answer, &self.echo, status, items, error);
        self.events.write(name, ResponseEvent { response }, out);
    }
}

impl EventWriter for ResponsesWriter {
    fn begin(&mut self, answer: &mut Answer, out: &mut Vec<u8>) {
        for name in ["response.created", "response.in_progress"] {
            let response = ResponseObject::new(answer, &self.echo, Status::InProgress, Vec::new(), None);
            self.events.write(name, ResponseEvent { response }, out);
        }
    }

    fn progress(&mut self, answer: &mut Answer, number: usize, out: &mut Vec<u8>) {
        let choice = &answer.choices[number];
        let is_over = choice.finish.is_some();
        let is_empty = self.items.is_empty() && choice.delta.calls.is_empty();
        if !choice.delta.text.is_empty() || (is_over && is_empty) {
            self.add_text(answer, out);
        }
        self.add_calls(answer, out);
        if is_over {
            self.close(final_status(&answer.choices[number]), answer, out);
        }
        answer.choices[number].delta.clear();
    }

    fn end(&mut self, answer: &mut Answer, out: &mut Vec<u8>) {
        let status = final_status(&answer.choices[0]);
        let name = if status == Status::Incomplete { "response.incomplete" } else { "response.completed" };
        self.over(name, status, None, answer, out);
    }

    fn failed(&mut self, answer: &mut Answer, error: &ApiError, out: &mut Vec<u8>) {
        self.over("response.failed", Status::Failed, Some(error), answer, out);
    }
}
