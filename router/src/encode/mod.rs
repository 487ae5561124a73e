//! Encoding of requests into prompts: token IDs, images and block hashes.
//!
//! Messages and texts are encoded on a thread pool ([`pool`]). Encoded prefixes are cached ([`cache`]).

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

/// An encoded prompt, as it is sent to a group.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EncodedPrompt {
    /// Token IDs, packed.
    pub ids: PackedIds,
    /// Images and the positions of their placeholders.
    pub images: Vec<Image>,
    /// Hashes of its full blocks.
    pub hashes: Vec<BlockHash>,
    /// Number of tokens that came from the cache.
    pub reused_tokens: usize,
}

impl EncodedPrompt {
    /// Hashes the blocks of a prompt that is not cached.
    pub fn new(token_ids: &[u32], images: Vec<Image>, keys: &ClusterKeys, salt: CacheSalt) -> Self {
        let hashes = hash_blocks(keys, salt.as_ref(), &image_spans(&images), token_ids);
        Self { ids: PackedIds::of(token_ids), images, hashes, reused_tokens: 0 }
    }
}

/// Positions of the images, for the hash chain.
fn image_spans(images: &[Image]) -> Vec<ImageSpan> {
    let span = |image: &Image| {
        let mut hash = [0; 16];
        let length = image.hash.len().min(16);
        hash[..length].copy_from_slice(&image.hash[..length]);
        ImageSpan { hash: u128::from_le_bytes(hash), offset: image.offset as usize, length: image.length as usize }
    };
    images.iter().map(span).collect()
}

/// The reason why messages cannot be encoded.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// A field is not JSON that Python accepts.
    #[error("{field}: {error}")]
    Json {
        /// `messages` or `tools`.
        field: &'static str,
        /// The position and cause of the error.
        error: JsonError,
    },
    /// The conversation breaks a rule of the template.
    #[error(transparent)]
    Conversation(#[from] ConversationError),
    /// The model does not accept images.
    #[error("this model does not take images")]
    NoImages {
        /// Name of the field.
        param: String,
    },
}

/// Parses, validates and encodes messages and tools with the model's chat template.
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

/// Converts an image to the wire format. `begin` is the prompt position that its offset counts from.
fn shown_image(image: &EncodedImage, begin: usize, keys: &ClusterKeys) -> Image {
    // the size of the image was parsed from the same URL before
    let data = Bytes::from(data_url_bytes(&image.source.url).unwrap_or_default());
    Image {
        hash: keys.image_hash(&data).to_le_bytes().to_vec(),
        data,
        offset: (begin + image.offset) as u32,
        length: image.length as u32,
    }
}

/// Encodes a plain text. If `special` is set, the token that begins a prompt comes first.
pub fn text(tokenizer: &Tokenizer, text: &str, special: bool) -> Result<Vec<u32>, Stopped> {
    let mut token_ids = Vec::with_capacity(text.len() / 3 + 1);
    if special {
        token_ids.extend(tokenizer.bos_id());
    }
    tokenizer.encode_within_budget(text, &mut token_ids)?;
    Ok(token_ids)
}
