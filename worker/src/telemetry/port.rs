//! The port of a worker process that Prometheus and probes ask: `/metrics` and `/health`. It says nothing of
//! requests and takes nothing.

use std::sync::Arc;

use axum::http::header;
use axum::response::IntoResponse as _;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::WorkerMetrics;

const TEXT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves until `stop`.
pub(crate) async fn serve(listener: TcpListener, metrics: Arc<WorkerMetrics>, stop: CancellationToken) {
    let scrape = move || {
        let metrics = Arc::clone(&metrics);
        async move {
            // asking a GPU's driver may take a moment
            let text = tokio::task::spawn_blocking(move || metrics.text()).await.unwrap_or_default();
            ([(header::CONTENT_TYPE, TEXT)], text).into_response()
        }
    };
    let routes = axum::Router::new().route("/metrics", get(scrape)).route("/health", get(|| async { "" }));
    if let Err(error) = axum::serve(listener, routes).with_graceful_shutdown(stop.cancelled_owned()).await {
        tracing::warn!(%error, "metrics are no longer served");
    }
}
