//! Mistral's `tekken.json`: byte-pair ranks in base64, the pattern that splits text into words, the names
//! of the special token IDs, and how images become placeholders.
//!
//! Special token IDs come first, `0..default_num_special_tokens`; rank `r` has the id that many higher. The file
//! may hold more ranks than the model knows: only the first `default_vocab_size` minus the special ones
//! count. Source: mistral-common 1.13.

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::encode::Encoder;
use super::vocabulary::{Entry, Vocabulary};
use super::{ImageGeometry, Tokenizer, TokenizerFormat};

#[derive(Deserialize)]
struct TekkenFile<'a> {
    config: Config,
    #[serde(borrow)]
    vocab: Vec<Rank<'a>>,
    #[serde(default)]
    special_tokens: Option<Vec<SpecialToken>>,
    #[serde(default, alias = "multimodal")]
    image: Option<ImageConfig>,
}

#[derive(Deserialize)]
struct Config {
    pattern: String,
    default_vocab_size: usize,
    default_num_special_tokens: usize,
    version: String,
}

#[derive(Deserialize)]
struct Rank<'a> {
    rank: usize,
    #[serde(borrow)]
    token_bytes: Cow<'a, str>,
}

#[derive(Deserialize)]
struct SpecialToken {
    rank: usize,
    token_str: String,
}

#[derive(Deserialize)]
struct ImageConfig {
    image_patch_size: u32,
    max_image_size: u32,
    #[serde(default = "one")]
    spatial_merge_size: u32,
}

fn one() -> u32 {
    1
}

/// The special tokens of files that are older than the list in the file.
const OLD_SPECIAL_TOKENS: [&str; 20] = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
];

/// What a `tekken.json` says.
pub(super) struct Tekken {
    pub(super) vocabulary: Vocabulary,
    version: String,
    pattern: String,
    ranks: Vec<Vec<u8>>,
    first_id: u32,
    bos_id: u32,
    image: Option<ImageGeometry>,
}

/// Reads the text of a `tekken.json`; the error says what is wrong with it.
pub(super) fn load(text: &str) -> Result<Tokenizer, String> {
    let tekken = parse(text)?;
    Ok(Tokenizer {
        format: TokenizerFormat::Tekken,
        version: Some(tekken.version),
        encoder: Encoder::from_ranks(tekken.ranks, &tekken.pattern, tekken.first_id)?,
        vocabulary: tekken.vocabulary,
        bos_id: Some(tekken.bos_id),
        image: tekken.image,
    })
}

/// All of [`load`] but what encoding needs.
pub(super) fn parse(text: &str) -> Result<Tekken, String> {
    let file: TekkenFile<'_> = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let special_count = file.config.default_num_special_tokens;
    let ordinary_count = file
        .config
        .default_vocab_size
        .checked_sub(special_count)
        .ok_or("config.default_vocab_size is smaller than config.default_num_special_tokens")?;
    if file.vocab.len() < ordinary_count {
        return Err(format!("vocab has {} entries, config asks for {ordinary_count}", file.vocab.len()));
    }
    let first_id = u32::try_from(special_count).map_err(|_| "too many special tokens".to_owned())?;
    let special_names = special_names(file.special_tokens, special_count)?;
    let ranks = ordinary_tokens(&file.vocab[..ordinary_count])?;

    let entries = special_names.into_iter().map(Entry::Special).chain(ranks.iter().cloned().map(Entry::Ordinary));
    let mut vocabulary = Vocabulary::new(entries)?;
    let required = |name: &str| vocabulary.special_id(name).ok_or(format!("there is no special token {name}"));
    let bos_id = required("<s>")?;
    vocabulary.eos_id = required("</s>")?;
    let image = match file.image {
        None => None,
        Some(ImageConfig { image_patch_size: patch, spatial_merge_size: merge, max_image_size: max })
            if patch == 0 || merge == 0 || max == 0 || patch.checked_mul(merge).is_none() =>
        {
            return Err("the sizes in `image` must be positive".to_owned());
        }
        Some(config) => Some(ImageGeometry {
            patch_size: config.image_patch_size,
            max_image_size: config.max_image_size,
            spatial_merge_size: config.spatial_merge_size,
        }),
    };
    Ok(Tekken {
        vocabulary,
        version: file.config.version,
        pattern: file.config.pattern,
        ranks,
        first_id,
        bos_id,
        image,
    })
}

/// The names of token IDs `0..count`; token IDs that the file does not name print as `<SPECIAL_n>`.
fn special_names(tokens: Option<Vec<SpecialToken>>, count: usize) -> Result<Vec<String>, String> {
    let mut names: Vec<Option<String>> = vec![None; count];
    let mut put = |id: usize, name: String| match names.get_mut(id) {
        Some(slot @ None) => {
            *slot = Some(name);
            Ok(())
        }
        Some(Some(other)) => Err(format!("special token {id} is named twice: {other} and {name}")),
        None => Err(format!("special token {name} has id {id}, but there are only {count}")),
    };
    match tokens {
        Some(tokens) => tokens.into_iter().try_for_each(|token| put(token.rank, token.token_str))?,
        None => OLD_SPECIAL_TOKENS.iter().enumerate().try_for_each(|(id, name)| put(id, (*name).to_owned()))?,
    }
    Ok(names.into_iter().enumerate().map(|(id, name)| name.unwrap_or_else(|| format!("<SPECIAL_{id}>"))).collect())
}

/// The bytes of each rank. The first 256 must be the single bytes, or some text would have no encoding.
fn ordinary_tokens(entries: &[Rank<'_>]) -> Result<Vec<Vec<u8>>, String> {
    let mut tokens = Vec::with_capacity(entries.len());
    for (rank, entry) in entries.iter().enumerate() {
        if entry.rank != rank {
            return Err(format!("vocab[{rank}] has rank {}", entry.rank));
        }
        let bytes = STANDARD
            .decode(entry.token_bytes.as_bytes())
            .map_err(|error| format!("vocab[{rank}].token_bytes: {error}"))?;
        if rank < 256 && bytes != [rank as u8] {
            return Err(format!("vocab[{rank}] is not the single byte {rank}"));
        }
        tokens.push(bytes);
    }
    if tokens.len() < 256 {
        return Err("vocab has fewer than 256 entries".to_owned());
    }
    Ok(tokens)
}
