//! Requests to prompts: messages or texts become token IDs and block hashes, on threads of their own
//! ([`pool`]), and what was seen before is not encoded again ([`cache`]).

pub mod cache;
mod generations;
pub mod pool;
mod queue;
pub mod wire;

use bora_common::{
    blocks::{BlockHash, ImageSpan, hash_blocks},
    conversation::{Conversation, ConversationError, DataUrls, EncodedImage, Json, JsonError, data_url_bytes},
    cpu_budget::Stopped,
    secret::{CacheSalt, ClusterKeys},
    tokenizer::Tokenizer,
};
use bora_proto::v1::Image;
use bytes::Bytes;

use cache::ChatInput;
use wire::PackedIds;

/// A prompt in the form that goes to a group.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EncodedPrompt {
    /// Ids, packed.
    pub ids: PackedIds,
    /// Images and where their placeholders stand.
    pub images: Vec<Image>,
    /// The hashes of its full blocks.
    pub hashes: Vec<BlockHash>,
    /// Ids that were known before.
    pub reused_tokens: usize,
}

impl EncodedPrompt {
    /// Names the blocks of a prompt that is not known from before.
    pub fn new(token_ids: &[u32], images: Vec<Image>, keys: &ClusterKeys, salt: CacheSalt) -> Self {
        let hashes = hash_blocks(keys, salt.as_ref(), &image_spans(&images), token_ids);
        Self { ids: PackedIds::of(token_ids), images, hashes, reused_tokens: 0 }
    }
}

/// Where images stand, for the hash chain.
fn image_spans(images: &[Image]) -> Vec<ImageSpan> {
    let span = |image: &Image| {
        let mut hash = [0; 16];
        let length = image.hash.len().min(16);
        hash[..length].copy_from_slice(&image.hash[..length]);
        ImageSpan { hash: u128::from_le_bytes(hash), offset: image.offset as usize, length: image.length as usize }
    };
    images.iter().map(span).collect()
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

/// Messages and tools, in the model's own layout, all of it read and judged.
pub fn conversation(
    tokenizer: &Tokenizer,
    messages: &Json<'_>,
    written: &ChatInput<'_>,
) -> Result<EncodedPrompt, EncodeError> {
    let tools = written
        .tools
        .map(|tools| Json::parse(tools.get()))
        .transpose()
        .map_err(|error| EncodeError::Json { field: "tools", error })?;
    let conversation = Conversation::parse_json(messages, tools.as_ref(), written.options())?;
    if let Some(image) = conversation.images().first()
        && !written.takes_images
    {
        return Err(EncodeError::NoImages { param: image.param.clone() });
    }
    let encoded = conversation.encode(tokenizer, &DataUrls)?;
    let images = encoded.images.iter().map(|image| shown_image(image, 0, written.keys)).collect();
    Ok(EncodedPrompt::new(&encoded.token_ids, images, written.keys, written.salt))
}

/// An image as groups take it; `begin` is where the token IDs that its offset counts from stand in the prompt.
fn shown_image(image: &EncodedImage, begin: usize, keys: &ClusterKeys) -> Image {
    // its size was read from the same URL a moment ago
    let data = Bytes::from(data_url_bytes(&image.source.url).unwrap_or_default());
    Image {
        hash: keys.image_hash(&data).to_le_bytes().to_vec(),
        data,
        offset: (begin + image.offset) as u32,
        length: image.length as u32,
    }
}

/// The token IDs of a plain text, after the id that begins a prompt if `special` token IDs are wanted.
pub fn text(tokenizer: &Tokenizer, text: &str, special: bool) -> Result<Vec<u32>, Stopped> {
    let mut token_ids = Vec::with_capacity(text.len() / 3 + 1);
    if special {
        token_ids.extend(tokenizer.bos_id());
    }
    tokenizer.encode_within_budget(text, &mut token_ids)?;
    Ok(token_ids)
}
