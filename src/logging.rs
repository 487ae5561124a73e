//! Log lines on standard error. Nothing here blocks or panics: see [`LogWriter`].

use std::fs::File;
use std::io::{IsTerminal, Write as _};
use std::os::fd::AsFd as _;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, anyhow};
use bora_common::config::{LogFormat, LogOptions};
use bora_common::telemetry::log_writer::LogWriter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, fmt, reload};

/// How long the last lines may take at the end of the process.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(500);

const LEVELS: &str = "off, error, warn, info, debug, trace";

static WRITER: OnceLock<LogWriter> = OnceLock::new();

type SetFilter = Box<dyn Fn(EnvFilter) -> anyhow::Result<()> + Send + Sync>;

static SET_FILTER: OnceLock<SetFilter> = OnceLock::new();

/// Starts logging.
///
/// # Errors
/// The level is no filter, or logging was started before.
pub(crate) fn start(options: &LogOptions) -> anyhow::Result<()> {
    let filter = filter(options)?;
    // a descriptor of its own: a blocked write must not hold the lock of `std::io::stderr`
    let sink = File::from(std::io::stderr().as_fd().try_clone_to_owned().context("standard error")?);
    let writer = LogWriter::start(sink).context("the thread that writes the log")?;
    let _ = WRITER.set(writer.clone());
    let make_writer = move || writer.clone();
    let (filter, handle) = reload::Layer::new(filter);
    let _ = SET_FILTER.set(Box::new(move |filter| Ok(handle.reload(filter)?)));
    let registry = tracing_subscriber::registry().with(filter);
    let lines = fmt::layer().log_internal_errors(false).with_writer(make_writer);
    let started = match options.format {
        LogFormat::Text => registry.with(lines.with_ansi(std::io::stderr().is_terminal())).try_init(),
        LogFormat::Json => registry.with(lines.json().flatten_event(true)).try_init(),
    };
    started.map_err(|error| anyhow!("logging: {error}"))?;
    // the default hook writes to standard error, and waits for whoever reads it
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("unnamed");
        let location = panic.location().map(tracing::field::display);
        // a formatted message may hold text of a user: it is logged at debug level only
        let reason = panic.payload().downcast_ref::<&'static str>().copied().unwrap_or("see level debug");
        tracing::error!(thread, location, reason, "a thread panicked");
        tracing::debug!(thread, "{panic}");
    }));
    Ok(())
}

/// Applies the level of a configuration that was read again.
///
/// # Errors
/// The level is no filter.
pub(crate) fn apply_level(options: &LogOptions) -> anyhow::Result<()> {
    let filter = filter(options)?;
    SET_FILTER.get().map_or(Ok(()), |set| set(filter))
}

/// The filter of the configuration; `BORA_LOG` takes precedence.
fn filter(options: &LogOptions) -> anyhow::Result<EnvFilter> {
    match std::env::var("BORA_LOG") {
        Ok(level) => parse_filter(&level).map_err(|reason| anyhow!("BORA_LOG: {reason}")),
        Err(_) => {
            parse_filter(options.level.as_deref().unwrap_or("info")).map_err(|reason| anyhow!("log.level: {reason}"))
        }
    }
}

/// Reads a list of levels and `target=level` pairs.
///
/// # Errors
/// What is wrong with it and what is expected.
pub(crate) fn parse_filter(text: &str) -> Result<EnvFilter, String> {
    // EnvFilter takes a bare word that is no level for a target: a mistyped level would silence the log
    for directive in text.split(',').map(str::trim).filter(|directive| !directive.is_empty()) {
        let name = directive.rsplit_once('=').map_or(directive, |(_, level)| level.trim());
        if !directive.ends_with(']') && name.parse::<LevelFilter>().is_err() {
            return Err(format!(
                "`{name}` is no level: expected one of {LEVELS}, or target=level as in bora_router=debug,warn"
            ));
        }
    }
    EnvFilter::try_new(text).map_err(|error| {
        format!("`{text}` is no filter ({error}): expected for example info or bora_router=debug,warn")
    })
}

/// Writes a line to standard error whatever the log's filter hides. Losses are counted, never reported to the caller.
pub(crate) fn print(line: &str) {
    match WRITER.get() {
        Some(writer) => writer.push(format!("{line}\n").as_bytes()),
        None => drop(writeln!(std::io::stderr(), "{line}")),
    }
}

/// Gives the last lines a moment to be written.
pub(crate) fn flush() {
    if let Some(writer) = WRITER.get() {
        writer.flush_within(FLUSH_TIMEOUT);
    }
}
