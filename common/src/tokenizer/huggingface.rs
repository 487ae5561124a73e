//! Hugging Face's `tokenizer.json`, for other models than Mistral's: small ones in tests, mostly.
//!
//! The library splits, normalises and merges; here is only what it does not report directly: the bytes of an
//! id, and which token IDs begin and end a text (`tokenizer_config.json` or `generation_config.json` beside it).

use std::path::Path;

use serde_json::Value;

use super::encode::Encoder;
use super::vocabulary::{Entry, Vocabulary};
use super::{Tokenizer, TokenizerFormat};

/// Reads the text of a `tokenizer.json` found at `path`; the error says what is wrong with it.
pub(super) fn load(text: &str, path: &Path) -> Result<Tokenizer, String> {
    let mut tokenizer: tokenizers::Tokenizer = text.parse().map_err(|error: tokenizers::Error| error.to_string())?;
    tokenizer.set_encode_special_tokens(true);
    let file: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let byte_level = uses_byte_level(&file["decoder"]) || uses_byte_level(&file["pre_tokenizer"]);

    let special: std::collections::HashMap<u32, String> = tokenizer
        .get_added_tokens_decoder()
        .into_iter()
        .filter(|(_, token)| token.special)
        .map(|(id, token)| (id, token.content))
        .collect();
    let added: std::collections::HashSet<u32> = tokenizer.get_added_tokens_decoder().into_keys().collect();
    let largest = tokenizer.get_vocab(true).into_values().max().ok_or("the vocabulary is empty")?;
    let entries = (0..=largest).map(|id| {
        if let Some(name) = special.get(&id) {
            return Entry::Special(name.clone());
        }
        match tokenizer.id_to_token(id) {
            None => Entry::Unused,
            Some(token) if added.contains(&id) => Entry::Ordinary(token.into_bytes()),
            Some(token) if byte_level => Entry::Ordinary(from_byte_level(&token)),
            Some(token) => Entry::Ordinary(from_sentence_piece(&token)),
        }
    });
    let mut vocabulary = Vocabulary::new(entries)?;
    let configs = ["tokenizer_config.json", "generation_config.json", "config.json"]
        .map(|name| read_json(&path.with_file_name(name)));
    let find = |token_key: &str, id_key: &str, usual: &[&str]| {
        let named = configs.iter().flatten().find_map(|config| {
            let name = config[token_key].as_str().or_else(|| config[token_key]["content"].as_str())?;
            vocabulary.special_id(name)
        });
        let numbered = || {
            configs.iter().flatten().find_map(|config| {
                let value = &config[id_key];
                let id = value.as_u64().or_else(|| value.get(0).and_then(Value::as_u64))?;
                u32::try_from(id).ok().filter(|id| (*id as usize) < vocabulary.len())
            })
        };
        named.or_else(numbered).or_else(|| usual.iter().find_map(|name| vocabulary.special_id(name)))
    };
    let bos_id = find("bos_token", "bos_token_id", &["<s>", "<|begin_of_text|>", "<bos>"]);
    let eos_id = find("eos_token", "eos_token_id", &["</s>", "<|im_end|>", "<|eot_id|>", "<eos>", "<|endoftext|>"])
        .ok_or("no end-of-text token is named in it or in the configuration files beside it")?;
    vocabulary.eos_id = eos_id;
    Ok(Tokenizer {
        format: TokenizerFormat::HuggingFace,
        version: None,
        encoder: Encoder::HuggingFace(Box::new(tokenizer)),
        vocabulary,
        bos_id,
        image: None,
    })
}

fn read_json(path: &Path) -> Option<Value> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// Whether a decoder or pre-tokenizer, or one of its parts, is the byte-level one.
fn uses_byte_level(component: &Value) -> bool {
    if component["type"] == "ByteLevel" {
        return true;
    }
    ["decoders", "pretokenizers"]
        .iter()
        .any(|key| component[key].as_array().is_some_and(|parts| parts.iter().any(uses_byte_level)))
}

/// Undoes GPT-2's mapping of bytes to printable characters; characters outside the mapping stay themselves.
fn from_byte_level(token: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(token.len());
    for character in token.chars() {
        match byte_of(character) {
            Some(byte) => bytes.push(byte),
            None => bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    bytes
}

/// The byte that GPT-2's table writes as this character: printable Latin-1 characters stand for
/// themselves, the other 68 bytes for U+0100 onwards, in order.
fn byte_of(character: char) -> Option<u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let code = u32::from(character);
    if let Ok(byte) = u8::try_from(code) {
        return printable(byte).then_some(byte);
    }
    let index = code.checked_sub(0x100)? as usize;
    (0..=u8::MAX).filter(|byte| !printable(*byte)).nth(index)
}

/// SentencePiece's segments: U+2581 is a space, `<0xNN>` a byte.
fn from_sentence_piece(token: &str) -> Vec<u8> {
    let byte = token
        .strip_prefix("<0x")
        .and_then(|rest| rest.strip_suffix('>'))
        .and_then(|hex| u8::from_str_radix(hex, 16).ok());
    match byte {
        Some(byte) => vec![byte],
        None => token.replace('\u{2581}', " ").into_bytes(),
    }
}
