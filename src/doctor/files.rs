//! The model's files: whether all are there and whole, what they are, and whether they are what was published.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use bora_common::config::ModelOptions;
use bora_common::model::ModelConfig;
use bora_worker::weights::{ShardPlan, Weights};

use super::Check;
use crate::config::Config;

/// File of checksums, one `digest  name` a line, as sha256sum writes it.
const CHECKSUMS: &str = "SHA256SUMS";
const READ: usize = 1 << 20;
const AGAIN: &str = "fetch the files again";

pub(super) fn check(config: &Config, checksums: bool) -> Vec<Check> {
    if config.models.is_empty() {
        return vec![Check::skipped("model", "none is configured")];
    }
    let own = config.worker_model().ok().map(|model| model.name.clone());
    let mut checks = Vec::new();
    for model in &config.models {
        checks.push(tokenizer(model));
        let split = (own.as_ref() == Some(&model.name)).then_some(config.worker.tensor_parallel_size);
        checks.push(weights(model, split));
        checks.push(listed_checksums(model, checksums));
    }
    checks
}

fn tokenizer(model: &ModelOptions) -> Check {
    const NAME: &str = "tokenizer";
    let Some(path) = model.tokenizer_path() else {
        return Check::skipped(NAME, format!("{}: token ids only", model.name));
    };
    match crate::tokenize::open(path) {
        Ok(_) => Check::good(NAME, format!("{}: {}", model.name, path.display())),
        Err(error) => Check::failure(NAME, format!("{}: {error:#}", model.name), AGAIN),
    }
}

/// Opens every shard and looks whether it holds what its index and the model's shape say.
fn weights(model: &ModelOptions, ranks: Option<u32>) -> Check {
    const NAME: &str = "model";
    let failed = |reason: String| Check::failure(NAME, format!("{}: {reason}", model.name), AGAIN);
    let description = match ModelConfig::from_dir(&model.path) {
        Ok(description) => description,
        Err(error) => return failed(error.to_string()),
    };
    for rank in 0..ranks.unwrap_or(0) {
        if let Err(error) = ShardPlan::new(&description, rank as usize, ranks.unwrap_or(1) as usize) {
            let fix = "another worker.tensor_parallel_size";
            return Check::failure(NAME, format!("{}: {error}", model.name), fix);
        }
    }
    match Weights::open(&model.path, &description) {
        Ok(weights) => {
            let bytes: u64 = shards(&model.path).map(|(_, bytes)| bytes).sum();
            let gib = bytes as f64 / f64::from(1 << 30);
            let fingerprint = weights.fingerprint();
            Check::good(NAME, format!("{}: {gib:.2} GiB, complete, fingerprint {fingerprint}", model.name))
        }
        Err(error) if shards(&model.path).next().is_none() => {
            // a router's host may well have nothing but the tokenizer
            Check::skipped(NAME, format!("{}: no weights here ({error})", model.name))
        }
        Err(error) => failed(error.to_string()),
    }
}

fn shards(folder: &Path) -> impl Iterator<Item = (std::path::PathBuf, u64)> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let path = entry.path();
        let is_shard = path.extension().is_some_and(|extension| extension == "safetensors");
        // follows links: caches of downloads are full of them
        is_shard.then(|| std::fs::metadata(&path).ok()).flatten().map(|metadata| (path, metadata.len()))
    })
}

fn listed_checksums(model: &ModelOptions, wanted: bool) -> Check {
    const NAME: &str = "checksums";
    let list = match std::fs::read_to_string(model.path.join(CHECKSUMS)) {
        Ok(list) => list,
        Err(error) if wanted => {
            let fix = format!("put the publisher's list there, as `sha256sum * > {CHECKSUMS}` writes it");
            return Check::failure(NAME, format!("{}: {CHECKSUMS}: {error}", model.name), fix);
        }
        Err(_) => return Check::skipped(NAME, format!("{}: there is no {CHECKSUMS} beside the weights", model.name)),
    };
    if !wanted {
        return Check::skipped(NAME, format!("{}: not compared (--checksums)", model.name));
    }
    let mut compared = 0;
    for line in list.lines().filter(|line| !line.trim().is_empty()) {
        let Some((digest, name)) = line.split_once("  ").or_else(|| line.split_once(" *")) else {
            return Check::failure(NAME, format!("{}: `{line}` in {CHECKSUMS} is no checksum", model.name), AGAIN);
        };
        let file = name.trim_start_matches('*');
        match sha256(&model.path.join(file)) {
            Ok(found) if found == digest.to_ascii_lowercase() => compared += 1,
            Ok(_) => return Check::failure(NAME, format!("{}: {file} is not what was published", model.name), AGAIN),
            Err(error) => return Check::failure(NAME, format!("{}: {file}: {error}", model.name), AGAIN),
        }
    }
    Check::good(NAME, format!("{}: {compared} files are what was published", model.name))
}

fn sha256(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    let mut buffer = vec![0; READ];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        context.update(&buffer[..read]);
    }
    Ok(context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect())
}
