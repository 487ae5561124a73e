//! `/health`, `/ready`, `/metrics`, `/version`.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::State,
    http::{HeaderValue, Response, header},
    response::IntoResponse as _,
};
use serde::Serialize;

use super::error::ApiError;
use crate::service::Service;

#[derive(Serialize)]
struct Version {
    version: &'static str,
}

#[derive(Serialize)]
struct Ready {
    status: &'static str,
    ready_groups: usize,
}

/// A JSON response.
pub fn json(value: &impl Serialize) -> Response<Body> {
    match serde_json::to_vec(value) {
        Ok(bytes) => {
            let mut response = Response::new(Body::from(bytes));
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            response
        }
        Err(error) => ApiError::internal(error.to_string()).into_response(),
    }
}

/// Reports that the process is alive.
pub async fn health() -> Response<Body> {
    Response::new(Body::empty())
}

/// Reports whether at least one group accepts requests and the server is not stopping.
pub async fn ready(State(service): State<Arc<Service>>) -> Response<Body> {
    if service.shutdown().is_stopping() {
        return ApiError::shutting_down().into_response();
    }
    let ready_groups = service.fleet().view().groups().filter(|group| group.is_ready()).count();
    if ready_groups == 0 {
        return ApiError::unavailable("No group takes requests now.", 2).into_response();
    }
    json(&Ready { status: "ready", ready_groups })
}

/// The metrics for Prometheus.
pub async fn metrics(State(service): State<Arc<Service>>) -> Response<Body> {
    let mut response = Response::new(Body::from(service.metrics_text()));
    let kind = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

/// The release version.
pub async fn version() -> Response<Body> {
    json(&Version { version: env!("CARGO_PKG_VERSION") })
}
