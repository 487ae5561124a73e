//! Requests in, token IDs out, one a line: what `bora tokenize` does.

use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Conversation, ConversationError, DataUrls, ImageError, ImageSize, ImageSizes, Json, Rule, image_size};
use crate::tokenizer::Tokenizer;

/// Images from `data:` and `file:` URLs, and `fixture://` URLs from a folder.
struct LocalImages<'a> {
    folder: Option<&'a Path>,
}

impl ImageSizes for LocalImages<'_> {
    fn size(&self, url: &str) -> Result<ImageSize, ImageError> {
        let path = if let Some(path) = url.strip_prefix("file://") {
            PathBuf::from(path)
        } else if let (Some(name), Some(folder)) = (url.strip_prefix("fixture://images/"), self.folder) {
            folder.join(name)
        } else {
            return DataUrls.size(url);
        };
        let bytes =
            std::fs::read(&path).map_err(|error| ImageError::Unavailable(format!("{}: {error}", path.display())))?;
        image_size(&bytes)
    }
}

#[derive(Serialize)]
struct Line<'a> {
    token_ids: &'a [u32],
}

/// Reads one OpenAI-style chat completion request a line and writes `{"token_ids": [...]}` or
/// `{"error": {...}}` a line. `images` is the folder that `fixture://images/NAME` names. Empty lines are
/// passed over. Ends with the input, or when reading or writing fails.
pub fn run(
    tokenizer: &Tokenizer,
    images: Option<&Path>,
    mut reader: impl BufRead,
    mut writer: impl Write,
) -> std::io::Result<()> {
    let sizes = LocalImages { folder: images };
    let mut line = String::new();
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return writer.flush();
        }
        if line.trim().is_empty() {
            continue;
        }
        match encode_line(&line, tokenizer, &sizes) {
            Ok(token_ids) => serde_json::to_writer(&mut writer, &Line { token_ids: &token_ids })?,
            Err(error) => serde_json::to_writer(&mut writer, &error.to_openai())?,
        }
        writer.write_all(b"\n")?;
    }
}

fn encode_line(line: &str, tokenizer: &Tokenizer, sizes: &dyn ImageSizes) -> Result<Vec<u32>, ConversationError> {
    let request = Json::parse(line).map_err(|error| ConversationError::new("", Rule::Json, error.to_string()))?;
    let conversation = Conversation::parse_request(&request)?;
    Ok(conversation.encode(tokenizer, sizes)?.token_ids)
}
