//! `bora tokenize`: token IDs of requests, one a line.

use std::path::{Path, PathBuf};

use bora_common::conversation::jsonl;
use bora_common::tokenizer::{Tokenizer, TokenizerError};
use clap::Args;

/// Which tokenizer.
#[derive(Args, Debug)]
pub(crate) struct TokenizeArgs {
    /// tekken.json, or the directory that holds it
    #[arg(long)]
    tokenizer: PathBuf,
    /// directory of images that requests name as fixture://images/NAME
    #[arg(long)]
    images: Option<PathBuf>,
}

/// Answers every line of standard input on standard output.
pub(crate) fn run(args: TokenizeArgs) -> anyhow::Result<()> {
    let tokenizer = open(&args.tokenizer)?;
    let (input, output) = (std::io::stdin().lock(), std::io::stdout().lock());
    jsonl::run(&tokenizer, args.images.as_deref(), input, std::io::BufWriter::new(output))?;
    Ok(())
}

/// Opens a tokenizer by its file or by the directory that holds it.
pub(crate) fn open(path: &Path) -> Result<Tokenizer, TokenizerError> {
    if path.is_dir() { Tokenizer::from_dir(path) } else { Tokenizer::from_file(path) }
}
