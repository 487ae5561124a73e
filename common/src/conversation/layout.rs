//! Messages, tools and images in the order and between the markers that the model was trained on
//! (mistral-common's tokenizer version 13).
//!
//! ```text
//! <s> [SYSTEM_PROMPT]text[/SYSTEM_PROMPT]* [AVAILABLE_TOOLS]json[/AVAILABLE_TOOLS] [INST]user[/INST] response</s> ...
//! assistant:     text [TOOL_CALLS]name[ARGS]json [TOOL_CALLS]name[ARGS]json </s>
//! tool results:  [TOOL_RESULTS]text[/TOOL_RESULTS] for each call, in the order of the calls
//! ```
//!
//! Each bracketed name is one id; nothing is added between them. Every text between two of them is
//! tokenised on its own, so the token IDs of a text do not depend on its neighbours and may be cached by text.

use std::collections::HashMap;

use super::error::{At, ConversationError, Rule};
use super::message::{Chunk, Message, ToolCall};
use super::tool::{Tool, dump_tools};
use crate::cpu_budget::{self, Stage};

/// A marker of the layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is the marker that `name` gives")]
pub enum Special {
    Begin,
    End,
    BeginSystem,
    EndSystem,
    BeginTools,
    EndTools,
    BeginInstruction,
    EndInstruction,
    ToolCall,
    Arguments,
    BeginToolResult,
    EndToolResult,
    Image,
    ImageBreak,
    ImageEnd,
    BeginThinking,
    EndThinking,
}

impl Special {
    /// All markers.
    pub const ALL: [Self; 17] = [
        Self::Begin,
        Self::End,
        Self::BeginSystem,
        Self::EndSystem,
        Self::BeginTools,
        Self::EndTools,
        Self::BeginInstruction,
        Self::EndInstruction,
        Self::ToolCall,
        Self::Arguments,
        Self::BeginToolResult,
        Self::EndToolResult,
        Self::Image,
        Self::ImageBreak,
        Self::ImageEnd,
        Self::BeginThinking,
        Self::EndThinking,
    ];

    /// The special token's name in the tokenizer file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Begin => "<s>",
            Self::End => "</s>",
            Self::BeginSystem => "[SYSTEM_PROMPT]",
            Self::EndSystem => "[/SYSTEM_PROMPT]",
            Self::BeginTools => "[AVAILABLE_TOOLS]",
            Self::EndTools => "[/AVAILABLE_TOOLS]",
            Self::BeginInstruction => "[INST]",
            Self::EndInstruction => "[/INST]",
            Self::ToolCall => "[TOOL_CALLS]",
            Self::Arguments => "[ARGS]",
            Self::BeginToolResult => "[TOOL_RESULTS]",
            Self::EndToolResult => "[/TOOL_RESULTS]",
            Self::Image => "[IMG]",
            Self::ImageBreak => "[IMG_BREAK]",
            Self::ImageEnd => "[IMG_END]",
            Self::BeginThinking => "[THINK]",
            Self::EndThinking => "[/THINK]",
        }
    }
}

/// A chunk of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    /// One marker.
    Special(Special),
    /// Text, tokenised on its own.
    Text(String),
    /// An image's placeholders; an index into the conversation's images.
    Image(usize),
}

/// A message as the prompt shows it, after merging and sorting: a prompt is a list of these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its chunks in order. The first part of a prompt starts with `<s>`; the tools stand in front of the
    /// first user message, in its part.
    pub segments: Vec<Segment>,
}

/// Lays out valid messages.
pub(super) fn lay_out(messages: Vec<Message>, tools: &[Tool]) -> Result<Vec<Part>, ConversationError> {
    let mut layout = Layout::new(tools);
    let mut parts = Vec::new();
    let mut index = 0;
    for run in runs(messages) {
        cpu_budget::check(Stage::Validate)?;
        let messages = run.len();
        parts.append(&mut layout.lay_out_run(run, index)?);
        index += messages;
    }
    Ok(parts)
}

/// Neighbours that the layout makes one: users, assistants, results of tools. A system message stands alone.
pub(super) fn runs(messages: Vec<Message>) -> Vec<Vec<Message>> {
    let mut runs: Vec<Vec<Message>> = Vec::new();
    for message in messages {
        match runs.last_mut() {
            Some(run) if run.last().is_some_and(|last| are_one(last, &message)) => run.push(message),
            _ => runs.push(vec![message]),
        }
    }
    runs
}

/// Whether two neighbours belong to one run.
pub(super) fn are_one(first: &Message, second: &Message) -> bool {
    std::mem::discriminant(first) == std::mem::discriminant(second) && !matches!(first, Message::System { .. })
}

/// What a prompt's beginning leaves behind for what follows.
pub(super) struct Layout<'t> {
    tools: Option<&'t [Tool]>,
    call_ids: Vec<String>,
    begun: bool,
}

impl<'t> Layout<'t> {
    /// At the beginning.
    pub(super) fn new(tools: &'t [Tool]) -> Self {
        Self { tools: (!tools.is_empty()).then_some(tools), call_ids: Vec::new(), begun: false }
    }

    /// Behind these messages, of which only roles and the token IDs of calls count.
    pub(super) fn after<'m>(known: impl Iterator<Item = &'m Message>, tools: &'t [Tool]) -> Self {
        let mut layout = Self::new(tools);
        for message in known {
            layout.begun = true;
            match message {
                Message::System { .. } => {}
                Message::User { .. } => layout.tools = None,
                Message::Assistant { tool_calls, .. } => {
                    layout.call_ids.extend(tool_calls.iter().map(|call| call.id.clone()));
                }
                Message::Tool { .. } => layout.call_ids.clear(),
            }
        }
        layout
    }

    /// The parts of one run, whose first message is number `index` of the request.
    pub(super) fn lay_out_run(&mut self, run: Vec<Message>, index: usize) -> Result<Vec<Part>, ConversationError> {
        let mut users = Vec::new();
        let mut assistants: Option<Assistant> = None;
        let mut results = Vec::new();
        let mut parts = Vec::new();
        for message in run {
            match message {
                Message::System { content } => parts.push(system(content)),
                Message::User { content } => users.push(content),
                Message::Assistant { content, tool_calls, prefix } => {
                    self.call_ids.extend(tool_calls.iter().map(|call| call.id.clone()));
                    let merged = assistants.get_or_insert_default();
                    merged.contents.push(content);
                    merged.tool_calls.extend(tool_calls);
                    merged.prefix |= prefix;
                }
                Message::Tool { call_id, content } => results.push((call_id, content)),
            }
        }
        if !users.is_empty() {
            parts.push(user(users, self.tools.take()));
        }
        if let Some(merged) = assistants {
            parts.push(assistant(merged, &At::root("messages").index(index))?);
        }
        if !results.is_empty() {
            // A call's place is its last one in the list: token IDs of earlier, unanswered calls may repeat.
            let places: HashMap<&str, usize> =
                self.call_ids.iter().enumerate().map(|(place, id)| (id.as_str(), place)).collect();
            results.sort_by_key(|(id, _)| places.get(id.as_str()).copied().unwrap_or(usize::MAX));
            self.call_ids.clear();
            parts.extend(results.into_iter().map(|(_, content)| tool_result(content)));
        }
        if !self.begun
            && let Some(first) = parts.first_mut()
        {
            first.segments.insert(0, Segment::Special(Special::Begin));
            self.begun = true;
        }
        Ok(parts)
    }
}

/// The contents of messages that become one: empty text vanishes, adjacent text is joined with a blank
/// line, other chunks stay apart.
fn join(contents: Vec<Vec<Chunk>>) -> Vec<Chunk> {
    let mut joined: Vec<Chunk> = Vec::new();
    for chunk in contents.into_iter().flatten() {
        match (chunk, joined.last_mut()) {
            (Chunk::Text(text), _) if text.is_empty() => {}
            (Chunk::Text(text), Some(Chunk::Text(before))) => {
                before.push_str("\n\n");
                before.push_str(&text);
            }
            (chunk, _) => joined.push(chunk),
        }
    }
    joined
}

fn push_chunk(chunk: Chunk, segments: &mut Vec<Segment>) {
    match chunk {
        Chunk::Text(text) => segments.push(Segment::Text(text)),
        Chunk::Image(image) => segments.push(Segment::Image(image)),
        Chunk::Thinking { text, closed } => {
            segments.push(Segment::Special(Special::BeginThinking));
            segments.push(Segment::Text(text));
            if closed {
                segments.push(Segment::Special(Special::EndThinking));
            }
        }
    }
}

fn enclosed(begin: Special, content: Vec<Chunk>, end: Special) -> Vec<Segment> {
    let mut segments = vec![Segment::Special(begin)];
    content.into_iter().for_each(|chunk| push_chunk(chunk, &mut segments));
    segments.push(Segment::Special(end));
    segments
}

fn system(content: Vec<Chunk>) -> Part {
    Part { segments: enclosed(Special::BeginSystem, join(vec![content]), Special::EndSystem) }
}

fn tool_result(content: Vec<Chunk>) -> Part {
    Part { segments: enclosed(Special::BeginToolResult, join(vec![content]), Special::EndToolResult) }
}

fn user(contents: Vec<Vec<Chunk>>, tools: Option<&[Tool]>) -> Part {
    let mut content = join(contents);
    // Text followed by the only image: the model saw the image first.
    if matches!(content.as_slice(), [Chunk::Text(_), Chunk::Image(_)]) {
        content.reverse();
    }
    let mut segments = Vec::new();
    if let Some(tools) = tools {
        segments.push(Segment::Special(Special::BeginTools));
        segments.push(Segment::Text(dump_tools(tools)));
        segments.push(Segment::Special(Special::EndTools));
    }
    segments.extend(enclosed(Special::BeginInstruction, content, Special::EndInstruction));
    Part { segments }
}

#[derive(Default)]
struct Assistant {
    contents: Vec<Vec<Chunk>>,
    tool_calls: Vec<ToolCall>,
    prefix: bool,
}

fn assistant(message: Assistant, at: &At<'_>) -> Result<Part, ConversationError> {
    let mut content = join(message.contents);
    if content.is_empty() && message.tool_calls.is_empty() {
        let text = "an assistant message must have content or tool calls";
        return Err(at.key("content").error(Rule::EmptyAssistant, text));
    }
    if let [Chunk::Text(text)] = content.as_mut_slice() {
        text.truncate(text.trim_end_matches(' ').len());
    }
    let mut segments = Vec::new();
    content.into_iter().for_each(|chunk| push_chunk(chunk, &mut segments));
    for call in message.tool_calls {
        segments.push(Segment::Special(Special::ToolCall));
        segments.push(Segment::Text(call.name));
        segments.push(Segment::Special(Special::Arguments));
        segments.push(Segment::Text(call.arguments));
    }
    if !message.prefix {
        segments.push(Segment::Special(Special::End));
    }
    Ok(Part { segments })
}
