//! The response as typed and numbered events: start of the response; start, deltas and end of each item; end of the
//! response.

use serde::Serialize;

use super::{
    items::{Change, Content, Item, Items, input_of},
    output::{ItemObject, ResponseObject, Status, TextPart, final_status, logprobs_of},
    request::Echo,
};
use crate::api::{
    completion::Completion,
    error::ApiError,
    response::ChatLogprob,
    sse::{EventWriter, write_named_event},
};

/// The fields of every event.
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

/// `response.function_call_arguments.delta`, `response.custom_tool_call_input.delta`.
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

/// `response.custom_tool_call_input.done`.
#[derive(Serialize)]
struct InputDone<'a> {
    item_id: &'a str,
    output_index: usize,
    input: &'a str,
}

/// Writes the events of a streamed response.
pub struct ResponsesWriter {
    echo: Box<Echo>,
    items: Items,
    events: Numbers,
}

/// Numbers and writes events.
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
    /// Creates the writer of one response.
    pub fn new(echo: Box<Echo>) -> Self {
        Self { echo, items: Items::default(), events: Numbers::default() }
    }

    fn write(&mut self, change: &Change, completion: &Completion, out: &mut Vec<u8>) {
        let events = &mut self.events;
        let (Change::Added(number) | Change::Text(number, ..) | Change::Arguments(number, _) | Change::Done(number)) =
            change;
        let output_index = *number;
        let Some(item) = self.items.get(output_index) else { return };
        let item_id = item.id();
        match change {
            Change::Added(_) => added(events, item, output_index, completion, out),
            Change::Text(_, delta, logprobs) => {
                let logprobs = logprobs_of(logprobs, completion);
                let event = TextDelta { item_id, output_index, content_index: 0, delta, logprobs };
                events.write("response.output_text.delta", event, out);
            }
            Change::Arguments(_, delta) => {
                let event = ArgumentsDelta { item_id, output_index, delta };
                events.write("response.function_call_arguments.delta", event, out);
            }
            Change::Done(_) => done(events, item, output_index, completion, out),
        }
    }

    fn over(
        &mut self,
        name: &'static str,
        status: Status,
        error: Option<&ApiError>,
        completion: &Completion,
        out: &mut Vec<u8>,
    ) {
        let items = self.items.objects(completion);
        let response = ResponseObject::new(completion, &self.echo, status, items, error);
        self.events.write(name, ResponseEvent { response }, out);
    }
}

/// Writes the events that start an item.
fn added(events: &mut Numbers, item: &Item, output_index: usize, completion: &Completion, out: &mut Vec<u8>) {
    events.write("response.output_item.added", ItemEvent { output_index, item: item.begun(completion) }, out);
    if matches!(item.content, Content::Message { .. }) {
        let part = TextPart::empty();
        let event = PartEvent { item_id: item.id(), output_index, content_index: 0, part };
        events.write("response.content_part.added", event, out);
    }
}

/// Writes the events that end an item.
fn done(events: &mut Numbers, item: &Item, output_index: usize, completion: &Completion, out: &mut Vec<u8>) {
    let item_id = item.id();
    match &item.content {
        Content::Message { text, logprobs } => {
            let logprobs = logprobs_of(logprobs, completion);
            let done = TextDone { item_id, output_index, content_index: 0, text, logprobs };
            events.write("response.output_text.done", done, out);
            if let Some(part) = item.part(completion) {
                let event = PartEvent { item_id, output_index, content_index: 0, part };
                events.write("response.content_part.done", event, out);
            }
        }
        Content::Call { tool, arguments, .. } if tool.is_custom => {
            let input = &input_of(arguments);
            let delta = ArgumentsDelta { item_id, output_index, delta: input };
            events.write("response.custom_tool_call_input.delta", delta, out);
            events.write("response.custom_tool_call_input.done", InputDone { item_id, output_index, input }, out);
        }
        Content::Call { tool, arguments, .. } => {
            let done = ArgumentsDone { item_id, output_index, name: &tool.name, arguments };
            events.write("response.function_call_arguments.done", done, out);
        }
    }
    events.write("response.output_item.done", ItemEvent { output_index, item: item.object(completion) }, out);
}

impl EventWriter for ResponsesWriter {
    fn begin(&mut self, completion: &mut Completion, out: &mut Vec<u8>) {
        for name in ["response.created", "response.in_progress"] {
            let response = ResponseObject::new(completion, &self.echo, Status::InProgress, Vec::new(), None);
            self.events.write(name, ResponseEvent { response }, out);
        }
    }

    fn progress(&mut self, completion: &mut Completion, number: usize, out: &mut Vec<u8>) {
        let choice = &mut completion.choices[number];
        let changes = self.items.take(&mut choice.delta, choice.finish, &completion.id, &self.echo.names);
        for change in changes {
            self.write(&change, completion, out);
        }
    }

    fn end(&mut self, completion: &mut Completion, out: &mut Vec<u8>) {
        let status = final_status(&completion.choices[0]);
        let name = if status == Status::Incomplete { "response.incomplete" } else { "response.completed" };
        self.over(name, status, None, completion, out);
    }

    fn failed(&mut self, completion: &mut Completion, error: &ApiError, out: &mut Vec<u8>) {
        self.over("response.failed", Status::Failed, Some(error), completion, out);
    }
}
