//! The port of a worker process for Prometheus and probes: `/metrics`, `/health` (the process runs) and `/ready` (its
//! whole group runs). It accepts no requests of clients.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::http::{StatusCode, header};
use axum::response::IntoResponse as _;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::WorkerMetrics;

const TEXT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves until `stop`.
pub(crate) async fn serve(listener: TcpListener, metrics: Arc<WorkerMetrics>, stop: CancellationToken) {
    let probed = Arc::clone(&metrics);
    let ready = move || async move {
        if probed.group_runs().load(Ordering::Relaxed) {
            (StatusCode::OK, "")
        } else {
            (StatusCode::SERVICE_UNAVAILABLE, "the group does not run yet")
        }
    };
    let scrape = move || {
        let metrics = Arc::clone(&metrics);
        async move {
            // querying a GPU's driver may take a moment
            let text = tokio::task::spawn_blocking(move || metrics.text()).await.unwrap_or_default();
            ([(header::CONTENT_TYPE, TEXT)], text).into_response()
        }
    };
    let routes = axum::Router::new()
        .route("/metrics", get(scrape))
        .route("/health", get(|| async { "" }))
        .route("/ready", get(ready));
    if let Err(error) = axum::serve(listener, routes).with_graceful_shutdown(stop.cancelled_owned()).await {
        tracing::warn!(%error, "metrics are no longer served");
    }
}
