//! Telemetry that router and worker share: traces (W3C context in and out, OTLP), the text form of metrics and
//! its way to an OTLP collector, and what the system says of this process.
//!
//! Off unless an endpoint is configured. Nothing here is ever waited for on the road of a request: a span is put
//! into a bounded queue when it has ended, and dropped where the queue is full.

pub mod exposition;
pub mod log_writer;
mod otlp;
pub mod process;
pub mod trace;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry_sdk::Resource;
use serde::Deserialize;

use crate::config::{ConfigError, seconds};
use crate::tls::TlsError;
pub use trace::{Span, TraceContext};

/// What an operator sets: the `telemetry` section of the configuration.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetryOptions {
    /// `http://host:port` or `https://host:port` of an OTLP collector's gRPC service (usually port 4317); nothing is
    /// exported where it is absent. `OTEL_EXPORTER_OTLP_ENDPOINT` beats it.
    pub otlp_endpoint: Option<String>,
    /// PEM file of the authorities that the certificate of an `https` collector is checked against; those of the system
    /// where it is absent. `OTEL_EXPORTER_OTLP_CERTIFICATE` beats it.
    pub otlp_ca_file: Option<PathBuf>,
    /// Share of the requests that are traced, of those whose client decides nothing: a `traceparent` that comes with
    /// a request is obeyed.
    pub sample_ratio: f64,
    /// Whether metrics are sent to the collector as well (they are at `/metrics` in any case).
    pub metrics: bool,
    /// Whether `/metrics` has the quantities that vLLM exports under vLLM's names (`vllm:...`) as well.
    pub vllm_names: bool,
    /// How often.
    #[serde(deserialize_with = "seconds")]
    pub metrics_seconds: Duration,
}

impl Default for TelemetryOptions {
    fn default() -> Self {
        Self {
            otlp_endpoint: None,
            otlp_ca_file: None,
            sample_ratio: 0.01,
            metrics: true,
            vllm_names: true,
            metrics_seconds: Duration::from_secs(30),
        }
    }
}

impl TelemetryOptions {
    /// The options with what the environment says.
    fn with_environment(mut self) -> Self {
        let from_environment = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        self.otlp_endpoint = from_environment("OTEL_EXPORTER_OTLP_ENDPOINT").or(self.otlp_endpoint);
        let certificate = from_environment("OTEL_EXPORTER_OTLP_CERTIFICATE").map(PathBuf::from);
        self.otlp_ca_file = certificate.or(self.otlp_ca_file);
        self
    }

    /// Values that can't work.
    pub fn check(&self) -> Result<(), ConfigError> {
        let conflict = |text: String| Err(ConfigError::Conflict(text));
        if !(0.0..=1.0).contains(&self.sample_ratio) {
            return conflict(format!("telemetry.sample_ratio: expected 0 to 1, found {}", self.sample_ratio));
        }
        if let Some(endpoint) = &self.otlp_endpoint
            && !endpoint.starts_with("http://")
            && !endpoint.starts_with("https://")
        {
            return conflict(format!(
                "telemetry.otlp_endpoint: expected http://host:port or https://host:port of a collector's gRPC service, \
                 found `{endpoint}`"
            ));
        }
        Ok(())
    }
}

/// What this process calls itself: attributes of everything it exports.
#[derive(Clone, Debug)]
pub struct Identity {
    /// `bora-router`, `bora-worker` or `bora-serve`.
    pub service: &'static str,
    /// The release.
    pub version: &'static str,
    /// Name of the cluster.
    pub cluster: String,
    /// Attributes besides (a worker's group).
    pub attributes: Vec<(&'static str, String)>,
}

impl Identity {
    fn resource(&self) -> Resource {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let own = [
            ("service.version", self.version.to_owned()),
            ("service.namespace", self.cluster.clone()),
            ("service.instance.id", format!("{}-{}", host.trim(), std::process::id())),
            ("host.name", host.trim().to_owned()),
            ("process.pid", std::process::id().to_string()),
        ];
        let attributes = own.into_iter().chain(self.attributes.iter().cloned());
        Resource::builder()
            .with_service_name(self.service)
            .with_attributes(attributes.map(|(key, value)| KeyValue::new(key, value)))
            .build()
    }
}

/// Makes the text of this process's metrics.
pub type MetricsSource = Arc<dyn Fn() -> String + Send + Sync>;

/// Telemetry can't start like this.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// A value that can't work.
    #[error(transparent)]
    Options(ConfigError),
    /// The exporter can't be made.
    #[error("telemetry.otlp_endpoint: {0}")]
    Exporter(String),
    /// The authorities can't be used.
    #[error("telemetry.otlp_ca_file: {0}")]
    Authorities(#[from] TlsError),
}

/// Telemetry of this process; ends (and sends what is left, for a moment) when it is dropped.
#[must_use]
pub struct Telemetry {
    metrics: Option<tokio::task::JoinHandle<()>>,
    tracing: bool,
}

/// Starts what is configured. Must be called within a tokio runtime, once a process.
pub fn start(
    options: TelemetryOptions,
    identity: &Identity,
    source: Option<MetricsSource>,
) -> Result<Telemetry, TelemetryError> {
    let options = options.with_environment();
    options.check().map_err(TelemetryError::Options)?;
    let Some(endpoint) = &options.otlp_endpoint else { return Ok(Telemetry { metrics: None, tracing: false }) };
    let resource = identity.resource();
    let channel = otlp::channel(endpoint, options.otlp_ca_file.as_deref())?;
    trace::start(channel.clone(), options.sample_ratio, &resource)?;
    let metrics = match source {
        Some(source) if options.metrics => {
            let pusher = otlp::Pusher::new(channel, &resource, options.metrics_seconds);
            Some(tokio::spawn(pusher.run(source)))
        }
        _ => None,
    };
    tracing::info!(endpoint, sample_ratio = options.sample_ratio, metrics = metrics.is_some(), "exporting telemetry");
    Ok(Telemetry { metrics, tracing: true })
}

impl Telemetry {
    /// Sends the spans that are left, for at most two seconds, off the reactor.
    pub async fn stop(self) {
        if self.tracing {
            // an error is a panic of the exporter, which is over anyway
            let _ = tokio::task::spawn_blocking(trace::stop).await;
        }
    }
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Some(metrics) = self.metrics.take() {
            metrics.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_not_work_is_named() {
        assert!(TelemetryOptions::default().check().is_ok());
        let wrong = TelemetryOptions { sample_ratio: 2.0, ..Default::default() };
        assert!(wrong.check().is_err_and(|error| error.to_string().contains("sample_ratio")));
        let wrong = TelemetryOptions { otlp_endpoint: Some("collector:4317".into()), ..Default::default() };
        assert!(wrong.check().is_err_and(|error| error.to_string().contains("http://host:port")));
    }
}
