//! Requests to prompts: messages or texts become token ids and block hashes, off the reactor when they are
//! long ([`pool`]).

pub mod pool;

use std::sync::Arc;

use bora_common::{
    conversation::{Conversation, ConversationError, ConversationOptions, DataUrls, Json, JsonError, data_url_bytes},
    tokenizer::Tokenizer,
};
use bora_proto::v1::Image;
use bytes::Bytes;
use serde_json::value::RawValue;
use xxhash_rust::xxh3::xxh3_128;

/// A prompt in the form that goes to a group.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EncodedPrompt {
    /// Ids.
    pub token_ids: Vec<u32>,
    /// Images and where their placeholders stand.
    pub images: Vec<Image>,
}

/// Why messages have no prompt.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// A field is no JSON that Python would read.
    #[error("{field}: {error}")]
    Json {
        /// `messages` or `tools`.
        field: &'static str,
        /// Where.
        error: JsonError,
    },
    /// A rule of conversations is broken.
    #[error(transparent)]
    Conversation(#[from] ConversationError),
    /// The model takes no images.
    #[error("this model does not take images")]
    NoImages {
        /// The field.
        param: String,
    },
}

/// Messages and tools, in the model's own layout.
pub fn conversation(
    tokenizer: &Arc<Tokenizer>,
    messages: &RawValue,
    tools: Option<&RawValue>,
    continue_final_message: bool,
    takes_images: bool,
) -> Result<EncodedPrompt, EncodeError> {
    let messages = Json::parse(messages.get()).map_err(|error| EncodeError::Json { field: "messages", error })?;
    let tools = tools
        .map(|tools| Json::parse(tools.get()))
        .transpose()
        .map_err(|error| EncodeError::Json { field: "tools", error })?;
    let options = ConversationOptions { continue_final_message };
    let conversation = Conversation::parse_json(&messages, tools.as_ref(), options)?;
    if let Some(image) = conversation.images().first()
        && !takes_images
    {
        return Err(EncodeError::NoImages { param: image.param.clone() });
    }
    let encoded = conversation.encode(tokenizer, &DataUrls)?;
    let images = encoded
        .images
        .iter()
        .map(|image| {
            // sizes were read from the same URL a moment ago
            let data = Bytes::from(data_url_bytes(&image.source.url).unwrap_or_default());
            Image {
                hash: xxh3_128(&data).to_le_bytes().to_vec(),
                data,
                offset: image.offset as u32,
                length: image.length as u32,
            }
        })
        .collect();
    Ok(EncodedPrompt { token_ids: encoded.token_ids, images })
}

/// A plain text, after the id that begins a prompt if `special` ids are wanted.
pub fn text(tokenizer: &Tokenizer, text: &str, special: bool) -> EncodedPrompt {
    let mut token_ids = Vec::with_capacity(text.len() / 3 + 1);
    if special {
        token_ids.extend(tokenizer.bos_id());
    }
    tokenizer.encode_into(text, &mut token_ids);
    EncodedPrompt { token_ids, images: Vec::new() }
}
