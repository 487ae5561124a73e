//! The golden files and tokenizers that several tests read.

use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use bora_common::conversation::{DataUrls, ImageError, ImageSize, ImageSizes, image_size};
use bora_common::tokenizer::Tokenizer;
use serde_json::Value;

/// A path below `tests/fixtures`.
pub(crate) fn fixture(path: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures")).join(path)
}

/// The lines of a golden file.
pub(crate) fn lines(name: &str) -> Vec<String> {
    let text = std::fs::read_to_string(fixture(name)).expect("golden file");
    text.lines().map(str::to_owned).collect()
}

/// The lines of a golden file, parsed.
pub(crate) fn goldens(name: &str) -> Vec<Value> {
    lines(name).iter().map(|line| serde_json::from_str(line).expect("golden line")).collect()
}

static FULL: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| load("tekken-v13.json"));
static SMALL: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| load("tekken-v13-8k.json"));

/// The names of both tokenizer files.
pub(crate) const TOKENIZERS: [&str; 2] = ["tekken-v13.json", "tekken-v13-8k.json"];

fn load(name: &str) -> Arc<Tokenizer> {
    Arc::new(Tokenizer::from_file(fixture("tokenizers").join(name)).expect("tokenizer file"))
}

/// A tokenizer by its file's name.
pub(crate) fn tokenizer(name: &str) -> Arc<Tokenizer> {
    match name {
        "tekken-v13.json" => Arc::clone(&FULL),
        "tekken-v13-8k.json" => Arc::clone(&SMALL),
        other => panic!("no tokenizer {other}"),
    }
}

/// `data:` URLs, and `fixture://` URLs from the fixtures.
pub(crate) struct FixtureImages;

impl ImageSizes for FixtureImages {
    fn size(&self, url: &str) -> Result<ImageSize, ImageError> {
        match url.strip_prefix("fixture://") {
            Some(path) => image_size(&std::fs::read(fixture(path)).expect("fixture image")),
            None => DataUrls.size(url),
        }
    }
}

/// The token IDs of a JSON array.
pub(crate) fn ids(value: &Value) -> Vec<u32> {
    let id = |id: &Value| u32::try_from(id.as_u64().expect("id")).expect("id");
    value.as_array().expect("array of ids").iter().map(id).collect()
}
