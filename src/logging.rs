//! Log lines on standard error.

use std::io::IsTerminal;

use anyhow::Context;
use bora_common::config::{LogFormat, LogOptions};
use tracing_subscriber::EnvFilter;

/// Starts logging. `BORA_LOG` beats the configuration.
pub(crate) fn start(options: &LogOptions) -> anyhow::Result<()> {
    let level = std::env::var("BORA_LOG").ok().or_else(|| options.level.clone());
    let level = level.unwrap_or_else(|| "info".into());
    let filter = EnvFilter::try_new(&level).with_context(|| format!("log.level: `{level}` is no filter"))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = match options.format {
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("logging: {error}"))
}
