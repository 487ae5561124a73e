//! Conversations that grow: what follows a beginning that was read, checked and laid out before.
//!
//! An agent sends its whole conversation again with every turn. What was seen before need not be read
//! again: of each message only its [`Outline`] (its role and the token IDs of its calls) takes part in the rules
//! for what follows. A *run* is what the layout makes one: neighbours of the same role. The beginning must
//! end where a run ends.
//!
//! Whatever is wrong with a conversation is said by [`Conversation::parse_json`](super::Conversation) alone:
//! here it is only found not to be a growth of what is known.

use super::error::{ConversationError, Rule};
use super::image::ImageSizes;
use super::layout::{Layout, Part, are_one, runs};
use super::message::{Counts, ImageSource, Message, ToolCall, read_messages};
use super::python_json::{Json, JsonError};
use super::{ConversationOptions, Encoded, TextEncoder, encode_parts, tool, validate};
use crate::cpu_budget::{self, Stage, Stopped};
use crate::tokenizer::Tokenizer;

/// What the rules need of a message that was read before.
#[derive(Clone, Debug)]
pub struct Outline {
    /// Without content, names and arguments.
    message: Message,
    content_parts: usize,
}

impl Outline {
    fn of(message: &Message) -> Self {
        let content = Vec::new();
        let outline = match message {
            Message::System { .. } => Message::System { content },
            Message::User { .. } => Message::User { content },
            Message::Assistant { tool_calls, prefix, .. } => {
                let outline =
                    |call: &ToolCall| ToolCall { id: call.id.clone(), name: String::new(), arguments: String::new() };
                Message::Assistant { content, tool_calls: tool_calls.iter().map(outline).collect(), prefix: *prefix }
            }
            Message::Tool { call_id, .. } => Message::Tool { call_id: call_id.clone(), content },
        };
        Self { message: outline, content_parts: message.content().len() }
    }

    /// Bytes that it takes, about.
    pub fn size(&self) -> usize {
        let ids = match &self.message {
            Message::Assistant { tool_calls, .. } => {
                tool_calls.iter().map(|call| call.id.len() + size_of::<ToolCall>()).sum()
            }
            Message::Tool { call_id, .. } => call_id.len(),
            Message::System { .. } | Message::User { .. } => 0,
        };
        size_of::<Self>() + ids
    }
}

/// Why what follows can't be read behind what is known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotGrown {
    /// The last known run continues: it must be read again.
    #[error("the known part ends within a run of messages")]
    WithinRun,
    /// The whole conversation is to be read and judged.
    #[error(transparent)]
    Invalid(#[from] ConversationError),
    /// A message or the tools are not JSON.
    #[error(transparent)]
    Json(#[from] JsonError),
    /// The work was stopped.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// Neighbours of the same role.
#[derive(Clone, Debug)]
pub struct Run {
    /// What later rules need of its messages.
    pub outlines: Vec<Outline>,
    /// Whether the model continues with it: then it does not end as it will when it is part of a longer
    /// conversation.
    pub is_continued: bool,
    parts: Vec<Part>,
}

/// What follows the known part of a conversation.
#[derive(Clone, Debug)]
pub struct Growth {
    /// Its runs, in order.
    pub runs: Vec<Run>,
    images: Vec<ImageSource>,
}

impl Growth {
    /// Reads `messages` (each a JSON text) behind `known` messages. The conversation as a whole is checked;
    /// `tools` are only looked at where they become part of what is new.
    pub fn read<'a>(
        known: &[&Outline],
        messages: impl Iterator<Item = &'a str>,
        tools: Option<&str>,
        options: ConversationOptions,
    ) -> Result<Self, NotGrown> {
        let mut counts = Counts::new(options.limits);
        known.iter().for_each(|outline| counts.add_known(outline.content_parts, &outline.message));
        let known: Vec<&Message> = known.iter().map(|outline| &outline.message).collect();
        let mut images = Vec::new();
        let messages: Vec<Json<'_>> = messages.map(Json::parse).collect::<Result<_, _>>()?;
        let mut messages = read_messages(&Json::Array(messages), options.function_names, &mut images, &mut counts)?;
        if let (Some(last), Some(first)) = (known.last(), messages.first())
            && are_one(last, first)
        {
            return Err(NotGrown::WithinRun);
        }
        if options.continue_final_message {
            match messages.last_mut() {
                Some(Message::Assistant { prefix, .. }) => *prefix = true,
                // reading more of the conversation changes nothing: it would be read again from each of its runs
                _ => {
                    let message = "the last message is not the assistant's";
                    return Err(ConversationError::new("continue_final_message", Rule::Prefix, message).into());
                }
            }
        }
        let all: Vec<&Message> = known.iter().copied().chain(&messages).collect();
        validate::messages(&all)?;
        let tools_are_shown = known.iter().any(|message| matches!(message, Message::User { .. }));
        let tools = match tools {
            Some(tools) if !tools_are_shown => {
                tool::read_tools(&Json::parse(tools)?, options.function_names, options.limits.tools)?
            }
            _ => Vec::new(),
        };
        let mut layout = Layout::after(known.iter().copied(), &tools);
        let mut index = known.len();
        let mut laid_out = Vec::new();
        for run in runs(messages) {
            cpu_budget::check(Stage::Validate)?;
            let outlines: Vec<Outline> = run.iter().map(Outline::of).collect();
            let is_continued = run.iter().any(|message| matches!(message, Message::Assistant { prefix: true, .. }));
            let parts = layout.lay_out_run(run, index)?;
            index += outlines.len();
            laid_out.push(Run { outlines, is_continued, parts });
        }
        Ok(Self { runs: laid_out, images })
    }

    /// The token IDs of one of its runs; offsets of images count from the run's first id.
    pub fn encode(
        &self,
        run: &Run,
        tokenizer: &Tokenizer,
        texts: &dyn TextEncoder,
        sizes: &dyn ImageSizes,
    ) -> Result<Encoded, ConversationError> {
        encode_parts(&run.parts, &self.images, tokenizer, texts, sizes)
    }
}
