//! Text to ids. The one place that knows which library does it.

/// The encoder of one tokenizer file.
pub(super) enum Encoder {
    /// Byte-pair encoding over ranks, and what to add to a rank to get its id.
    Ranks {
        /// The library's tokenizer.
        tokenizer: Box<fastokens::Tokenizer>,
        /// Id of rank 0.
        first_id: u32,
    },
    /// A `tokenizer.json` of any kind.
    HuggingFace(Box<tokenizers::Tokenizer>),
}

impl Encoder {
    /// `ranks` in order of their rank; `pattern` splits text into words; id = `first_id` + rank.
    pub(super) fn from_ranks(ranks: Vec<Vec<u8>>, pattern: &str, first_id: u32) -> Result<Self, String> {
        let ranks: Vec<(Vec<u8>, u32)> = ranks.into_iter().zip(0..).collect();
        let config = fastokens::TiktokenConfig::new(pattern, Vec::new());
        let tokenizer = fastokens::Tokenizer::from_tiktoken_ranks(&ranks, config).map_err(|error| error.to_string())?;
        Ok(Self::Ranks { tokenizer: Box::new(tokenizer), first_id })
    }

    pub(super) fn encode_into(&self, text: &str, ids: &mut Vec<u32>) {
        match self {
            Self::Ranks { tokenizer, first_id } => match tokenizer.encode_ordinary(text) {
                Ok(ranks) => ids.extend(ranks.into_iter().map(|rank| rank + first_id)),
                Err(error) => tracing::error!(%error, "the tokenizer failed on a text"),
            },
            Self::HuggingFace(tokenizer) => match tokenizer.encode_fast(text, false) {
                Ok(encoding) => ids.extend_from_slice(encoding.get_ids()),
                Err(error) => tracing::error!(%error, "the tokenizer failed on a text"),
            },
        }
    }
}
