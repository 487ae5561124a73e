//! What a checkpoint's model looks like: read from Hugging Face's `config.json` or Mistral's `params.json`
//! into one [`ModelConfig`], checked once. Nothing below reads those files again.
//!
//! Field names are the ones of `config.json` where a name exists there. See [`RopeConfig`] for the rotary
//! embedding (plain, YaRN, and Mistral's position-dependent query scale).

mod fields;
mod huggingface;
mod mistral;
mod rope;

use std::path::{Path, PathBuf};

pub use rope::{QueryScale, RopeConfig, RopeTable, Yarn};

/// The text decoder of a Ministral 3 model (Devstral 2 and its kin), and its vision tower if it has one.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of a head; need not be hidden_size / heads. Even.
    pub head_dim: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Ids 0..vocab_size.
    pub vocab_size: usize,
    /// Added to the mean square in every RMSNorm.
    pub rms_norm_eps: f32,
    /// Positions and query scale.
    pub rope: RopeConfig,
    /// Longest sequence that the checkpoint claims.
    pub max_position_embeddings: usize,
    /// Whether the head is the embedding. `None`: the file does not say; the presence of a head tensor does.
    pub tie_word_embeddings: Option<bool>,
    /// How the decoder's projections are stored.
    pub quantization: Quantization,
    /// Begins a sequence.
    pub bos_token_id: Option<u32>,
    /// Each of them ends a sequence.
    pub eos_token_ids: Vec<u32>,
    /// Pixtral tower and projector, for models that see.
    pub vision: Option<VisionConfig>,
}

/// How the decoder's projections are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantization {
    /// In the checkpoint's floating-point type.
    None,
    /// e4m3 with one static scale for each weight and each input.
    Fp8Static,
}

/// The Pixtral vision tower and the projector into the decoder's embedding space.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionConfig {
    /// Width of the tower.
    pub hidden_size: usize,
    /// Its layers.
    pub num_hidden_layers: usize,
    /// Its heads.
    pub num_attention_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of its gated MLP.
    pub intermediate_size: usize,
    /// Side of a patch, pixels.
    pub patch_size: usize,
    /// Longest side of an image, pixels.
    pub image_size: usize,
    /// Colours.
    pub num_channels: usize,
    /// Base of the 2-D rotary embedding.
    pub rope_theta: f64,
    /// Patches merged along each side into one token.
    pub spatial_merge_size: usize,
    /// Whether the projector's linears have a bias.
    pub projector_bias: bool,
    /// The placeholder id that image features replace.
    pub image_token_id: u32,
}

/// Why a model's description can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ModelConfigError {
    /// The folder has neither file.
    #[error("{} has neither config.json nor params.json", folder.display())]
    NoConfig {
        /// Where it was looked for.
        folder: PathBuf,
    },
    /// The file can't be read.
    #[error("can't read {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file is not JSON.
    #[error("{file} is not valid JSON: {reason}")]
    NotJson {
        /// The file's name.
        file: String,
        /// Line and column.
        reason: String,
    },
    /// A field that has no safe default is absent.
    #[error("{file}: `{field}` is missing")]
    Missing {
        /// The file's name.
        file: String,
        /// Path of the field, with dots.
        field: String,
    },
    /// A field has a wrong type or a value out of range.
    #[error("{file}: `{field}` is {found}, expected {expected}")]
    Invalid {
        /// The file's name.
        file: String,
        /// Path of the field, with dots.
        field: String,
        /// What stands there.
        found: String,
        /// What may stand there.
        expected: String,
    },
}

impl ModelConfig {
    /// Reads the description from a checkpoint's folder: `config.json` where there is one, else
    /// `params.json`. `generation_config.json` adds its end token IDs.
    pub fn from_dir(folder: &Path) -> Result<Self, ModelConfigError> {
        let mut config = match read_if_present(&folder.join("config.json"))? {
            Some(text) => Self::from_huggingface(&text)?,
            None => match read_if_present(&folder.join("params.json"))? {
                Some(text) => Self::from_mistral(&text)?,
                None => return Err(ModelConfigError::NoConfig { folder: folder.to_owned() }),
            },
        };
        if let Some(text) = read_if_present(&folder.join("generation_config.json"))? {
            for id in huggingface::generation_end_ids(&text)? {
                if !config.eos_token_ids.contains(&id) {
                    config.eos_token_ids.push(id);
                }
            }
        }
        Ok(config)
    }

    /// Reads the text of a Hugging Face `config.json` (`ministral3`, or `mistral3` with a text and a vision part).
    pub fn from_huggingface(text: &str) -> Result<Self, ModelConfigError> {
        huggingface::read(text)
    }

    /// Reads the text of a Mistral `params.json`.
    pub fn from_mistral(text: &str) -> Result<Self, ModelConfigError> {
        mistral::read(text)
    }

    /// Query heads that share one KV head.
    pub fn query_group(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// Bytes of KV cache that one token takes over all layers and heads.
    pub fn kv_bytes_per_token(&self, bytes_per_number: usize) -> usize {
        2 * self.num_key_value_heads * self.head_dim * self.num_hidden_layers * bytes_per_number
    }

    /// Relations between fields that hold in every model; both readers end with it.
    fn check(self, file: &str) -> Result<Self, ModelConfigError> {
        let wrong = |field: &str, found: usize, expected: String| ModelConfigError::Invalid {
            file: file.to_owned(),
            field: field.to_owned(),
            found: found.to_string(),
            expected,
        };
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let expected = format!("a divisor of the {} query heads", self.num_attention_heads);
            return Err(wrong("num_key_value_heads", self.num_key_value_heads, expected));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(wrong("head_dim", self.head_dim, "an even number".to_owned()));
        }
        for &id in &self.eos_token_ids {
            if id as usize >= self.vocab_size {
                return Err(wrong("eos_token_id", id as usize, format!("an id below {}", self.vocab_size)));
            }
        }
        Ok(self)
    }
}

fn read_if_present(path: &Path) -> Result<Option<String>, ModelConfigError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ModelConfigError::Unreadable { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests;
