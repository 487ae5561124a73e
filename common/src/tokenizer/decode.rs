//! Ids to text, one id at a time: what a stream needs.
//!
//! A token's bytes need not be whole characters. The incomplete tail of what has been pushed is held back
//! until it completes, and what can never become a character turns into U+FFFD exactly as Python's
//! `decode(errors="replace")` does it.

use std::sync::Arc;

use super::Tokenizer;

/// The first bytes of a character whose rest has not come yet; at most three.
#[derive(Clone, Debug, Default)]
pub(super) struct PendingBytes(Vec<u8>);

impl PendingBytes {
    /// Adds bytes and appends every character that is now known to `text`.
    fn push(&mut self, bytes: &[u8], text: &mut String) {
        if self.0.is_empty() {
            let rest = append_complete(bytes, text);
            self.0.extend_from_slice(rest);
            return;
        }
        let mut joined = std::mem::take(&mut self.0);
        joined.extend_from_slice(bytes);
        let rest_length = append_complete(&joined, text).len();
        joined.drain(..joined.len() - rest_length);
        self.0 = joined;
    }

    /// Nothing follows: what is held back is an invalid sequence.
    pub(super) fn finish(&mut self, text: &mut String) {
        if !self.0.is_empty() {
            self.0.clear();
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

/// Appends the characters of `bytes` and returns the incomplete sequence at its end, if there is one.
fn append_complete<'a>(mut bytes: &'a [u8], text: &mut String) -> &'a [u8] {
    loop {
        match std::str::from_utf8(bytes) {
            Ok(valid) => {
                text.push_str(valid);
                return &[];
            }
            Err(error) => {
                let (valid, rest) = bytes.split_at(error.valid_up_to());
                text.push_str(std::str::from_utf8(valid).unwrap_or_default());
                let Some(invalid) = error.error_len() else {
                    return rest;
                };
                text.push(char::REPLACEMENT_CHARACTER);
                bytes = &rest[invalid..];
            }
        }
    }
}

/// Appends what one more id makes known.
pub(super) fn push(tokenizer: &Tokenizer, id: u32, skip_special: bool, pending: &mut PendingBytes, text: &mut String) {
    if let Some(bytes) = tokenizer.token_bytes(id) {
        pending.push(bytes, text);
        return;
    }
    let Some(name) = tokenizer.special_name(id) else {
        return;
    };
    pending.finish(text);
    if !skip_special {
        text.push_str(name);
    }
}

/// Turns generated token IDs into text as they come.
#[derive(Clone, Debug)]
pub struct IncrementalDecoder {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    pending: PendingBytes,
}

impl IncrementalDecoder {
    /// `skip_special` drops special token IDs instead of printing their names.
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, pending: PendingBytes::default() }
    }

    /// The text that one more id makes known; empty while a character is incomplete.
    pub fn push(&mut self, id: u32) -> String {
        let mut text = String::new();
        push(&self.tokenizer, id, self.skip_special, &mut self.pending, &mut text);
        text
    }

    /// The end of the stream: an incomplete character becomes U+FFFD. The decoder can be used again.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        self.pending.finish(&mut text);
        text
    }
}
