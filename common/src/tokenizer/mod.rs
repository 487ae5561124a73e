//! The tokenizer of a model: text to token IDs, token IDs to bytes, and nothing about roles or layout.
//!
//! [`Tokenizer`] reads Mistral's `tekken.json` ([`tekken`](self)) or a Hugging Face `tokenizer.json`, and
//! looks the same for both. Text is always ordinary text: a special token's name inside it is encoded as
//! the characters it is made of, so nobody can write control token IDs into a prompt. The token IDs of special tokens
//! are looked up by name and placed by `conversation`.

mod decode;
mod encode;
mod huggingface;
mod tekken;
mod vocabulary;

use std::path::{Path, PathBuf};

pub use decode::IncrementalDecoder;

pub use vocabulary::Vocabulary;

use crate::cpu_budget::{self, Stage, Stopped};
use encode::Encoder;

/// The file name of Mistral's tokenizer in a model directory.
pub const TEKKEN_FILE: &str = "tekken.json";
/// The file name of Hugging Face's tokenizer in a model directory.
pub const HUGGING_FACE_FILE: &str = "tokenizer.json";

/// Why a tokenizer could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The directory holds no tokenizer file.
    #[error("{0} has neither tekken.json nor tokenizer.json")]
    Missing(PathBuf),
    /// The file is JSON, but of neither format, or it is not JSON.
    #[error("{path} is not a tokenizer file: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// Which file format a tokenizer came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenizerFormat {
    /// Mistral's `tekken.json`.
    Tekken,
    /// Hugging Face's `tokenizer.json`.
    HuggingFace,
}

/// How images become placeholder token IDs, as the tokenizer file says (absent for models that read no images).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageGeometry {
    /// Side of a square patch in pixels.
    pub patch_size: u32,
    /// An image's longer side is shrunk to this many pixels at most.
    pub max_image_size: u32,
    /// Patches merged into one placeholder along each side.
    pub spatial_merge_size: u32,
}

/// A loaded tokenizer. Immutable and shared by `Arc`; every method may be called from any thread.
pub struct Tokenizer {
    format: TokenizerFormat,
    version: Option<String>,
    vocabulary: Vocabulary,
    encoder: Encoder,
    bos_id: Option<u32>,
    image: Option<ImageGeometry>,
}

impl Tokenizer {
    /// Loads `tekken.json` or `tokenizer.json`; the content decides, not the name.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        let path = path.as_ref();
        let (text, format) = read(path)?;
        let loaded = match format {
            TokenizerFormat::Tekken => tekken::load(&text),
            TokenizerFormat::HuggingFace => huggingface::load(&text, path),
        };
        loaded.map_err(|reason| TokenizerError::Invalid { path: path.to_owned(), reason })
    }

    /// Loads the tokenizer of a model directory: `tekken.json` if there is one, else `tokenizer.json`.
    pub fn from_dir(directory: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        Self::from_file(file_in(directory.as_ref())?)
    }

    /// The token IDs of a text; special-token names in it are plain text.
    ///
    /// The first call on a thread fills that thread's word cache (about 0.1 s and 30 MB for the full
    /// vocabulary): encode on a few threads that live as long as the process, not on a pool that grows and
    /// shrinks.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        self.encode_into(text, &mut ids);
        ids
    }

    /// Appends the token IDs of a text to `ids`.
    pub fn encode_into(&self, text: &str, ids: &mut Vec<u32>) {
        self.encoder.encode_into(text, ids);
    }

    /// The same within the CPU budget of the thread, which is looked at between parts of a long text. After an error
    /// only a part of the IDs was appended.
    pub fn encode_within_budget(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), Stopped> {
        self.encoder.encode_checked(text, ids, || cpu_budget::check(Stage::Encode))
    }

    /// Number of token IDs, special ones included; every id is below it.
    pub fn vocabulary_size(&self) -> usize {
        self.vocabulary.len()
    }

    /// The id that begins a prompt, if the tokenizer has one (Tekken always does).
    pub fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// The id that ends a response.
    pub fn eos_id(&self) -> u32 {
        self.vocabulary.eos_id
    }

    /// The bytes of an ordinary id, which need not be whole characters; `None` for special and unknown token IDs.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.vocabulary.ordinary(id)
    }

    /// The name of a special id, such as `[INST]`; `None` for ordinary and unknown token IDs.
    pub fn special_name(&self, id: u32) -> Option<&str> {
        self.vocabulary.special_name(id)
    }

    /// The id of a special token.
    pub fn special_id(&self, name: &str) -> Option<u32> {
        self.vocabulary.special_id(name)
    }

    /// Whether the id is a special one.
    pub fn is_special(&self, id: u32) -> bool {
        self.vocabulary.special_name(id).is_some()
    }

    /// The file format that this tokenizer came from.
    pub fn format(&self) -> TokenizerFormat {
        self.format
    }

    /// The version that `tekken.json` states, such as `v13`.
    pub fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    /// How images become placeholder token IDs, if the tokenizer file says so.
    pub fn image_geometry(&self) -> Option<ImageGeometry> {
        self.image
    }

    /// The text of token IDs. Bytes that are not UTF-8 become U+FFFD, as in Python's `decode(errors="replace")`;
    /// special token IDs are dropped or print their names; unknown token IDs are dropped.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut text = String::with_capacity(ids.len() * 4);
        let mut pending = decode::PendingBytes::default();
        for id in ids {
            decode::push(self, *id, skip_special, &mut pending, &mut text);
        }
        pending.finish(&mut text);
        text
    }
}

impl Vocabulary {
    /// The vocabulary of a tokenizer file, or of the one in a model directory, without what encoding text
    /// takes (most of the time of loading a tokenizer).
    pub fn load(path: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        let path = path.as_ref();
        let path = if path.is_dir() { file_in(path)? } else { path.to_owned() };
        let (text, format) = read(&path)?;
        let loaded = match format {
            TokenizerFormat::Tekken => tekken::parse(&text).map(|tekken| tekken.vocabulary),
            TokenizerFormat::HuggingFace => huggingface::load(&text, &path).map(|tokenizer| tokenizer.vocabulary),
        };
        loaded.map_err(|reason| TokenizerError::Invalid { path, reason })
    }
}

/// The tokenizer file of a model directory.
fn file_in(directory: &Path) -> Result<PathBuf, TokenizerError> {
    for name in [TEKKEN_FILE, HUGGING_FACE_FILE] {
        let path = directory.join(name);
        match path.try_exists() {
            Ok(true) => return Ok(path),
            Ok(false) => {}
            Err(source) => return Err(TokenizerError::Read { path, source }),
        }
    }
    Err(TokenizerError::Missing(directory.to_owned()))
}

/// The text of a tokenizer file, and which format it is.
fn read(path: &Path) -> Result<(String, TokenizerFormat), TokenizerError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| TokenizerError::Read { path: path.to_owned(), source })?;
    let invalid = |reason: String| TokenizerError::Invalid { path: path.to_owned(), reason };
    #[derive(serde::Deserialize)]
    struct Probe {
        config: Option<serde::de::IgnoredAny>,
        model: Option<serde::de::IgnoredAny>,
    }
    let probe: Probe = serde_json::from_str(&text).map_err(|error| invalid(error.to_string()))?;
    match probe {
        Probe { config: Some(_), .. } => Ok((text, TokenizerFormat::Tekken)),
        Probe { model: Some(_), .. } => Ok((text, TokenizerFormat::HuggingFace)),
        _ => Err(invalid("it has neither `config` (tekken.json) nor `model` (tokenizer.json)".to_owned())),
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("format", &self.format)
            .field("version", &self.version)
            .field("vocabulary_size", &self.vocabulary_size())
            .finish_non_exhaustive()
    }
}
