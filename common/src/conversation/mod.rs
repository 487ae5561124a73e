//! Conversations to token IDs, and generated token IDs back to content and tool calls.
//!
//! [`Conversation::parse`] reads and checks OpenAI-style messages and tools (`message`, `tool`, `validate`)
//! and lays them out between the model's markers (`layout`); [`Conversation::encode`] turns that into token IDs.
//! [`ToolCallParser`] reads the output of the model, on token IDs. The rules are those of mistral-common's tokenizer
//! version 13; other layouts are refused rather than drafted.

mod brackets;
mod error;
mod image;
mod incremental;
pub mod jsonl;
mod layout;
mod message;
mod python_json;
pub mod repair;
mod tool;
mod toolcall;
mod validate;

use serde_json::Value;

use crate::cpu_budget::{self, Stage, Stopped};
use crate::tokenizer::{ImageGeometry, Tokenizer, TokenizerFormat};

pub use error::{ConversationError, Rule};
pub use image::{DataUrls, ImageError, ImageGrid, ImageSize, ImageSizes, data_url_bytes, data_url_size, image_size};
pub use incremental::{Growth, NotGrown, Outline, Run};
pub use layout::{Part, Segment, Special};
pub use message::{Chunk, ImageSource, Message, ToolCall};
pub use python_json::{Json, JsonError};
pub use tool::Tool;
pub use toolcall::{CallError, Delta, ToolCallParser, new_call_id};
pub use validate::FunctionNames;

use error::At;

/// What a request says about its conversation besides messages and tools.
#[derive(Clone, Copy, Debug, Default)]
pub struct ConversationOptions {
    /// The model continues with the last message, which is the assistant's (`continue_final_message`).
    pub continue_final_message: bool,
    /// Which names functions may have.
    pub function_names: FunctionNames,
    /// How long its lists may be.
    pub limits: ConversationLimits,
}

/// How many entries the lists of a request may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConversationLimits {
    /// Messages.
    pub messages: usize,
    /// Parts of the content of all messages; a text is one part.
    pub content_parts: usize,
    /// Tool calls of all messages.
    pub tool_calls: usize,
    /// Tools.
    pub tools: usize,
}

impl Default for ConversationLimits {
    /// No limits.
    fn default() -> Self {
        Self { messages: usize::MAX, content_parts: usize::MAX, tool_calls: usize::MAX, tools: usize::MAX }
    }
}

/// A valid conversation, laid out and ready to be encoded.
#[derive(Clone, Debug)]
pub struct Conversation {
    parts: Vec<Part>,
    images: Vec<ImageSource>,
    tools: Vec<Tool>,
}

/// Turns a text into token IDs: the tokenizer, or a cache in front of it. Every text of a conversation is
/// tokenised on its own, so its token IDs depend on nothing else.
pub trait TextEncoder {
    /// Appends the token IDs of a text. After an error only a part of them may have been appended.
    fn encode_into(&self, text: &str, token_ids: &mut Vec<u32>) -> Result<(), Stopped>;
}

impl TextEncoder for Tokenizer {
    fn encode_into(&self, text: &str, token_ids: &mut Vec<u32>) -> Result<(), Stopped> {
        self.encode_within_budget(text, token_ids)
    }
}

/// A prompt in token IDs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// The token IDs.
    pub token_ids: Vec<u32>,
    /// The images, in the order of their placeholders.
    pub images: Vec<EncodedImage>,
    /// For each [`Part`] (a message after merging and sorting), the number of token IDs up to its end.
    pub message_ends: Vec<usize>,
}

/// An image's place in a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedImage {
    /// Which of [`Conversation::images`] it is.
    pub index: usize,
    /// Its URL and where the request has it.
    pub source: ImageSource,
    /// Index of its first placeholder id.
    pub offset: usize,
    /// Number of its placeholder token IDs, row breaks included.
    pub length: usize,
    /// Placeholders in a row.
    pub columns: u32,
    /// Rows.
    pub rows: u32,
}

impl Conversation {
    /// Reads and checks the `messages` and `tools` of a chat completion request.
    ///
    /// Integers beyond 64 bits in tool schemas lose digits in `serde_json`; [`Conversation::parse_json`]
    /// keeps them.
    pub fn parse(
        messages: &Value,
        tools: Option<&Value>,
        options: ConversationOptions,
    ) -> Result<Self, ConversationError> {
        let tools = tools.map(Json::from);
        Self::parse_json(&Json::from(messages), tools.as_ref(), options)
    }

    /// The same from exact JSON.
    pub fn parse_json(
        messages: &Json<'_>,
        tools: Option<&Json<'_>>,
        options: ConversationOptions,
    ) -> Result<Self, ConversationError> {
        let mut images = Vec::new();
        let mut counts = message::Counts::new(options.limits);
        let mut messages = message::read_messages(messages, options.function_names, &mut images, &mut counts)?;
        if options.continue_final_message {
            match messages.last_mut() {
                Some(Message::Assistant { prefix, .. }) => *prefix = true,
                _ => {
                    let message = "continue_final_message requires the last message to be the assistant's";
                    return Err(ConversationError::new("continue_final_message", Rule::Prefix, message));
                }
            }
        }
        validate::messages(&messages.iter().collect::<Vec<_>>())?;
        let read_tools = |tools| tool::read_tools(tools, options.function_names, options.limits.tools);
        let tools = tools.map(read_tools).transpose()?.unwrap_or_default();
        let parts = layout::lay_out(messages, &tools)?;
        Ok(Self { parts, images, tools })
    }

    /// Reads a whole request: `messages`, `tools`, `continue_final_message`, and `reasoning_effort`, which
    /// these models do not have.
    pub fn parse_request(request: &Json<'_>) -> Result<Self, ConversationError> {
        if !matches!(request, Json::Object(_)) {
            return Err(ConversationError::new("", Rule::Type, "the request must be a JSON object"));
        }
        let effort = request.get("reasoning_effort").unwrap_or(&Json::Null);
        if *effort != Json::Null {
            let message = "reasoning_effort is not supported for this model";
            return Err(ConversationError::new("reasoning_effort", Rule::Unsupported, message));
        }
        let key = "continue_final_message";
        let continue_final_message = match request.get(key) {
            None | Some(Json::Null) => false,
            Some(Json::Bool(value)) => *value,
            Some(other) => {
                return Err(At::root(key).error(Rule::Type, format!("expected a boolean, got {}", other.kind())));
            }
        };
        let messages =
            request.get("messages").ok_or_else(|| At::root("messages").error(Rule::Missing, "messages is missing"))?;
        let options = ConversationOptions { continue_final_message, ..Default::default() };
        Self::parse_json(messages, request.get("tools"), options)
    }

    /// The images in the order of the request, to be fetched before [`Conversation::encode`].
    pub fn images(&self) -> &[ImageSource] {
        &self.images
    }

    /// The functions that the request offers.
    pub fn tools(&self) -> &[Tool] {
        &self.tools
    }

    /// The prompt before tokenisation.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The prompt's token IDs.
    pub fn encode(&self, tokenizer: &Tokenizer, sizes: &dyn ImageSizes) -> Result<Encoded, ConversationError> {
        self.encode_with(tokenizer, tokenizer, sizes)
    }

    /// The prompt's token IDs, where the token IDs of texts come from `texts` (a cache) and markers from `tokenizer`.
    pub fn encode_with(
        &self,
        tokenizer: &Tokenizer,
        texts: &dyn TextEncoder,
        sizes: &dyn ImageSizes,
    ) -> Result<Encoded, ConversationError> {
        encode_parts(&self.parts, &self.images, tokenizer, texts, sizes)
    }
}

/// The token IDs of parts, whose images are in `images`.
fn encode_parts(
    parts: &[Part],
    images: &[ImageSource],
    tokenizer: &Tokenizer,
    texts: &dyn TextEncoder,
    sizes: &dyn ImageSizes,
) -> Result<Encoded, ConversationError> {
    let markers = Markers::of(tokenizer)?;
    let mut encoded = Encoded::default();
    for part in parts {
        for segment in &part.segments {
            cpu_budget::check(Stage::Encode)?;
            match segment {
                Segment::Special(special) => encoded.token_ids.push(markers.id(*special)?),
                Segment::Text(text) => texts.encode_into(text, &mut encoded.token_ids)?,
                Segment::Image(index) => encode_image(images, *index, &markers, sizes, &mut encoded)?,
            }
        }
        encoded.message_ends.push(encoded.token_ids.len());
    }
    Ok(encoded)
}

fn encode_image(
    images: &[ImageSource],
    index: usize,
    markers: &Markers,
    sizes: &dyn ImageSizes,
    encoded: &mut Encoded,
) -> Result<(), ConversationError> {
    let Some(source) = images.get(index) else {
        return Ok(());
    };
    let at = At::root(&source.param);
    let geometry = markers.image.ok_or_else(|| at.error(Rule::ContentType, "this model does not read images"))?;
    let size = sizes.size(&source.url).map_err(|error| at.error(Rule::Image, error.to_string()))?;
    let grid = ImageGrid::of(size, geometry);
    let offset = encoded.token_ids.len();
    let (image, row_end, end) =
        (markers.id(Special::Image)?, markers.id(Special::ImageBreak)?, markers.id(Special::ImageEnd)?);
    for row in 1..=grid.rows {
        encoded.token_ids.extend(std::iter::repeat_n(image, grid.columns as usize));
        encoded.token_ids.push(if row == grid.rows { end } else { row_end });
    }
    encoded.images.push(EncodedImage {
        index,
        source: source.clone(),
        offset,
        length: grid.length(),
        columns: grid.columns,
        rows: grid.rows,
    });
    Ok(())
}

/// The token IDs of the layout's markers in one tokenizer.
struct Markers {
    ids: [Option<u32>; Special::ALL.len()],
    image: Option<ImageGeometry>,
}

impl Markers {
    /// Fails for tokenizers whose chat layout is not the one built here.
    fn of(tokenizer: &Tokenizer) -> Result<Self, ConversationError> {
        if tokenizer.format() != TokenizerFormat::Tekken {
            let message = "this model has no chat layout that the server knows (its tokenizer is not a tekken.json); use plain completions";
            return Err(ConversationError::new("messages", Rule::Layout, message));
        }
        if tokenizer.version() != Some("v13") {
            let message = format!(
                "the chat layout of tokenizer version {} is not supported, only v13",
                tokenizer.version().unwrap_or("(none)")
            );
            return Err(ConversationError::new("messages", Rule::Layout, message));
        }
        let ids = Special::ALL.map(|special| tokenizer.special_id(special.name()));
        Ok(Self { ids, image: tokenizer.image_geometry() })
    }

    fn id(&self, special: Special) -> Result<u32, ConversationError> {
        self.ids.get(special as usize).copied().flatten().ok_or_else(|| {
            let message = format!("the tokenizer has no special token {}", special.name());
            ConversationError::new("messages", Rule::Layout, message)
        })
    }
}
