//! What each signal does: SIGTERM and SIGINT stop the process in order, SIGHUP reloads what can be reloaded, and SIGUSR1,
//! SIGUSR2 and SIGQUIT are ignored (their default action would end the process).

use std::path::PathBuf;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::logging;

/// A token that is cancelled by the first SIGTERM or SIGINT.
///
/// # Errors
/// The system refuses a handler.
pub(crate) fn stop_token() -> std::io::Result<CancellationToken> {
    let token = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let cancelled = token.clone();
    tokio::spawn(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        tracing::info!(signal = name, "stopping");
        cancelled.cancel();
    });
    let ignored = [
        ("SIGUSR1", SignalKind::user_defined1()),
        ("SIGUSR2", SignalKind::user_defined2()),
        ("SIGQUIT", SignalKind::quit()),
    ];
    for (name, kind) in ignored {
        let mut received = signal(kind)?;
        tokio::spawn(async move {
            while received.recv().await.is_some() {
                tracing::info!(signal = name, "signal ignored");
            }
        });
    }
    Ok(token)
}

/// SIGHUP, received from now on; without a receiver it would end the process.
///
/// # Errors
/// The system refuses a handler.
pub(crate) fn hangups() -> std::io::Result<Signal> {
    signal(SignalKind::hangup())
}

/// At each SIGHUP: reads the configuration again, applies its log level, and calls `reload` for what else can be reloaded. A
/// configuration with an error changes nothing.
pub(crate) async fn reload_at(mut hangups: Signal, config: Option<PathBuf>, reload: impl Fn()) {
    while hangups.recv().await.is_some() {
        if let Some(path) = &config {
            let applied =
                Config::read(path).map_err(anyhow::Error::from).and_then(|config| logging::apply_level(&config.log));
            if let Err(error) = applied {
                tracing::error!("SIGHUP: nothing was reloaded: {error:#}");
                continue;
            }
        }
        reload();
        tracing::info!(
            "SIGHUP: log level, API keys and tenant limits were reloaded; other settings apply at a restart"
        );
    }
}
