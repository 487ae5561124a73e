//! The items of a response while it is generated. Each addition of output returns a list of changes: a stream writes
//! the changes as events, and a plain response only keeps the items, so both have the same contents.

use bora_common::conversation::Json;
use bora_proto::v1::PositionLogprobs;

use super::{
    output::{ItemObject, Status, TextPart, logprobs_of},
    tools::{INPUT, ToolName, ToolNames},
};
use crate::{
    api::completion::Completion,
    relay::emit::{CallDelta, Delta, Finish, Part},
};

/// An item of the response.
pub struct Item {
    id: String,
    status: Status,
    /// Type and content of the item.
    pub content: Content,
}

/// The content of an item.
pub enum Content {
    /// A message.
    Message {
        /// The text so far.
        text: String,
        /// Logprobs of its tokens, if requested.
        logprobs: Vec<PositionLogprobs>,
    },
    /// A tool call.
    Call {
        /// Its ID as a call.
        call_id: String,
        /// The name of the tool in the client's declaration.
        tool: ToolName,
        /// The arguments so far, as JSON text.
        arguments: String,
    },
}

impl Item {
    fn message(response: &str, number: usize) -> Self {
        let content = Content::Message { text: String::new(), logprobs: Vec::new() };
        Self { id: format!("msg_{}_{number}", bare(response)), status: Status::InProgress, content }
    }

    /// Creates a call; `None` for a chunk that does not start a call.
    fn call(response: &str, number: usize, chunk: &CallDelta, names: &ToolNames) -> Option<Self> {
        let start = chunk.start.as_ref()?;
        let tool = names.resolve(&start.name);
        let prefix = if tool.is_custom { "ctc" } else { "fc" };
        let id = format!("{prefix}_{}_{number}", bare(response));
        let content = Content::Call { call_id: format!("call_{}", start.id), tool, arguments: String::new() };
        Some(Self { id, status: Status::InProgress, content })
    }

    /// Its ID as an item.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The client's view of the item when it starts.
    pub fn begun<'a>(&'a self, completion: &'a Completion) -> ItemObject<'a> {
        let mut object = self.object_with(Status::InProgress, completion);
        if let ItemObject::FunctionCall { arguments, .. } = &mut object {
            *arguments = "";
        }
        object
    }

    /// The client's view of the item now.
    pub fn object<'a>(&'a self, completion: &'a Completion) -> ItemObject<'a> {
        self.object_with(self.status, completion)
    }

    fn object_with<'a>(&'a self, status: Status, completion: &'a Completion) -> ItemObject<'a> {
        let id = &self.id;
        match &self.content {
            Content::Message { .. } => {
                let is_begun = status != Status::InProgress;
                let content = self.part(completion).filter(|_| is_begun).into_iter().collect();
                ItemObject::Message { id, status, role: "assistant", content }
            }
            Content::Call { call_id, tool, arguments } => {
                let (name, namespace) = (&*tool.name, tool.namespace.as_deref());
                if tool.is_custom {
                    let input = if status == Status::InProgress { String::new() } else { input_of(arguments) };
                    return ItemObject::CustomToolCall { id, status, call_id, name, namespace, input };
                }
                ItemObject::FunctionCall { id, status, call_id, name, namespace, arguments }
            }
        }
    }

    /// The text of a message.
    pub fn part<'a>(&'a self, completion: &'a Completion) -> Option<TextPart<'a>> {
        let Content::Message { text, logprobs } = &self.content else { return None };
        Some(TextPart { r#type: "output_text", text, annotations: [], logprobs: logprobs_of(logprobs, completion) })
    }
}

/// The input of a custom tool: the argument of its function, or the raw text if the model wrote other arguments.
pub fn input_of(arguments: &str) -> String {
    let input = Json::parse(arguments).ok().and_then(|json| Some(json.get(INPUT)?.as_str()?.to_owned()));
    input.unwrap_or_else(|| arguments.to_owned())
}

/// The ID of a response without its prefix.
fn bare(response: &str) -> &str {
    response.strip_prefix("resp_").unwrap_or(response)
}

/// A change of the items; each number is the index of an item.
pub enum Change {
    /// A new item.
    Added(usize),
    /// Text was appended to a message.
    Text(usize, String, Vec<PositionLogprobs>),
    /// Arguments were appended to a function call.
    Arguments(usize, String),
    /// The item is complete.
    Done(usize),
}

/// All items so far.
#[derive(Default)]
pub struct Items {
    list: Vec<Item>,
    /// Whether the last item is open.
    is_open: bool,
    /// Logprobs of tokens whose text has not arrived yet.
    logprobs: Vec<PositionLogprobs>,
}

impl Items {
    /// The item with an index.
    pub fn get(&self, number: usize) -> Option<&Item> {
        self.list.get(number)
    }

    /// The client's view of all items. An item that is still open was cut off.
    pub fn objects<'a>(&'a self, completion: &'a Completion) -> Vec<ItemObject<'a>> {
        let status = |item: &Item| if item.status == Status::InProgress { Status::Incomplete } else { item.status };
        self.list.iter().map(|item| item.object_with(status(item), completion)).collect()
    }

    /// Adds generated output. `finish`: it is the last output.
    pub fn take(
        &mut self,
        delta: &mut Delta,
        finish: Option<Finish>,
        response: &str,
        names: &ToolNames,
    ) -> Vec<Change> {
        let mut changes = Vec::new();
        self.logprobs.append(&mut delta.logprobs);
        for part in delta.parts() {
            match part {
                Part::Text(text) => self.add_text(text, response, &mut changes),
                Part::Call(chunk) => self.add_call(chunk, response, names, &mut changes),
            }
        }
        if let Some(finish) = finish {
            if self.list.is_empty() {
                self.add_text("", response, &mut changes);
            }
            self.close(if finish == Finish::Length { Status::Incomplete } else { Status::Completed }, &mut changes);
        }
        delta.clear();
        changes
    }

    fn open(&mut self, item: Item, changes: &mut Vec<Change>) {
        self.close(Status::Completed, changes);
        changes.push(Change::Added(self.list.len()));
        self.list.push(item);
        self.is_open = true;
    }

    fn close(&mut self, status: Status, changes: &mut Vec<Change>) {
        if !std::mem::replace(&mut self.is_open, false) {
            return;
        }
        let number = self.list.len() - 1;
        if let Some(item) = self.list.last_mut() {
            item.status = status;
            if let Content::Message { logprobs, .. } = &mut item.content {
                logprobs.append(&mut self.logprobs);
            }
        }
        // logprobs of a call's tokens have no field
        self.logprobs.clear();
        changes.push(Change::Done(number));
    }

    fn add_text(&mut self, more: &str, response: &str, changes: &mut Vec<Change>) {
        let is_message = matches!(self.list.last(), Some(Item { content: Content::Message { .. }, .. }));
        if !(self.is_open && is_message) {
            self.open(Item::message(response, self.list.len()), changes);
        }
        let number = self.list.len() - 1;
        if let Some(Item { content: Content::Message { text, logprobs }, .. }) = self.list.last_mut() {
            let new = std::mem::take(&mut self.logprobs);
            text.push_str(more);
            logprobs.extend_from_slice(&new);
            changes.push(Change::Text(number, more.to_owned(), new));
        }
    }

    fn add_call(&mut self, chunk: &CallDelta, response: &str, names: &ToolNames, changes: &mut Vec<Change>) {
        if let Some(item) = Item::call(response, self.list.len(), chunk, names) {
            self.open(item, changes);
        }
        let number = self.list.len().saturating_sub(1);
        if let Some(Item { content: Content::Call { tool, arguments, .. }, .. }) = self.list.last_mut()
            && !chunk.arguments.is_empty()
        {
            arguments.push_str(&chunk.arguments);
            // the input of a custom tool is known when the call is complete
            if !tool.is_custom {
                changes.push(Change::Arguments(number, chunk.arguments.clone()));
            }
        }
        if chunk.is_complete {
            self.close(Status::Completed, changes);
        }
    }
}
