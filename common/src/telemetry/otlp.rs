//! Metrics to an OTLP collector: what `/metrics` says, sent now and then. One source for both ways, so that they
//! never disagree; a collector that is slow or away costs nothing but its own figures.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_client::MetricsServiceClient;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value};
use opentelemetry_proto::tonic::metrics::v1::{
    AggregationTemporality, Gauge, Histogram, HistogramDataPoint, Metric, NumberDataPoint, ResourceMetrics,
    ScopeMetrics, Sum, metric, number_data_point,
};
use opentelemetry_proto::tonic::resource::v1::Resource as ResourceMessage;
use opentelemetry_sdk::Resource;
use tonic::transport::{Channel, Endpoint};

use super::exposition::{Family, Sample, parse};
use super::{MetricsSource, TelemetryError};
use crate::tls::HttpsConnector;

/// How long the collector may take for one message.
pub(super) const SEND_WITHIN: Duration = Duration::from_secs(5);

/// The way to the collector, opened when something is first sent; with TLS where the address begins with `https`.
pub(super) fn channel(endpoint: &str, ca_file: Option<&Path>) -> Result<Channel, TelemetryError> {
    let wrong = |error: tonic::transport::Error| TelemetryError::Exporter(format!("`{endpoint}`: {error}"));
    let of =
        |address: String| Endpoint::from_shared(address).map(|to| to.connect_timeout(SEND_WITHIN).timeout(SEND_WITHIN));
    let Some(authority) = endpoint.strip_prefix("https://") else {
        return Ok(of(endpoint.to_owned()).map_err(wrong)?.connect_lazy());
    };
    let connector = HttpsConnector::for_grpc(ca_file)?;
    let origin = endpoint.parse().map_err(|error| TelemetryError::Exporter(format!("`{endpoint}`: {error}")))?;
    // the connector speaks TLS itself; what is sent says https
    Ok(connector.channel(&of(format!("http://{authority}")).map_err(wrong)?.origin(origin)))
}

pub(super) struct Pusher {
    client: MetricsServiceClient<Channel>,
    resource: ResourceMessage,
    every: Duration,
    began: u64,
}

impl Pusher {
    pub(super) fn new(channel: Channel, resource: &Resource, every: Duration) -> Self {
        let attributes = resource.iter().map(|(key, value)| attribute(key.as_str(), &value.to_string())).collect();
        let resource = ResourceMessage { attributes, ..Default::default() };
        Self { client: MetricsServiceClient::new(channel), resource, every, began: nanoseconds() }
    }

    /// Sends until it is dropped.
    pub(super) async fn run(mut self, source: MetricsSource) {
        let mut away = false;
        loop {
            tokio::time::sleep(self.every).await;
            let request = self.message(&source());
            match self.client.export(request).await {
                Ok(_) => away = false,
                // said once for each outage
                Err(error) if !away => {
                    away = true;
                    tracing::warn!(reason = error.message(), "the collector takes no metrics");
                }
                Err(_) => {}
            }
        }
    }

    fn message(&self, text: &str) -> ExportMetricsServiceRequest {
        let now = nanoseconds();
        let metrics = parse(text).into_iter().filter_map(|family| convert(family, self.began, now)).collect();
        let scope = InstrumentationScope {
            name: "bora".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        };
        let metrics = ScopeMetrics { scope: Some(scope), metrics, ..Default::default() };
        let of_process = ResourceMetrics {
            resource: Some(self.resource.clone()),
            scope_metrics: vec![metrics],
            ..Default::default()
        };
        ExportMetricsServiceRequest { resource_metrics: vec![of_process] }
    }
}

fn nanoseconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

fn attribute(key: &str, value: &str) -> KeyValue {
    let value = AnyValue { value: Some(any_value::Value::StringValue(value.to_owned())) };
    KeyValue { key: key.to_owned(), value: Some(value), ..Default::default() }
}

fn convert(family: Family, began: u64, now: u64) -> Option<Metric> {
    let Family { name, kind, help, samples } = family;
    let temporality = AggregationTemporality::Cumulative as i32;
    let data = match kind.as_str() {
        "counter" => metric::Data::Sum(Sum {
            data_points: samples.iter().map(|sample| number(sample, began, now)).collect(),
            aggregation_temporality: temporality,
            is_monotonic: true,
        }),
        "gauge" | "info" => {
            metric::Data::Gauge(Gauge { data_points: samples.iter().map(|sample| number(sample, 0, now)).collect() })
        }
        "histogram" => metric::Data::Histogram(Histogram {
            data_points: histograms(&samples, began, now),
            aggregation_temporality: temporality,
        }),
        _ => return None,
    };
    Some(Metric { name, description: help, data: Some(data), ..Default::default() })
}

fn number(sample: &Sample, began: u64, now: u64) -> NumberDataPoint {
    NumberDataPoint {
        attributes: sample.labels.iter().map(|(key, value)| attribute(key, value)).collect(),
        start_time_unix_nano: began,
        time_unix_nano: now,
        value: Some(number_data_point::Value::AsDouble(sample.value)),
        ..Default::default()
    }
}

/// Puts the lines of each histogram together: those whose labels differ in nothing but `le`.
fn histograms(samples: &[Sample], began: u64, now: u64) -> Vec<HistogramDataPoint> {
    let mut points: Vec<(Vec<(String, String)>, HistogramDataPoint)> = Vec::new();
    for sample in samples {
        let labels: Vec<_> = sample.labels.iter().filter(|(key, _)| key != "le").cloned().collect();
        let at = points.iter().position(|(known, _)| *known == labels).unwrap_or_else(|| {
            let attributes = labels.iter().map(|(key, value)| attribute(key, value)).collect();
            let point = HistogramDataPoint {
                attributes,
                start_time_unix_nano: began,
                time_unix_nano: now,
                ..Default::default()
            };
            points.push((labels, point));
            points.len() - 1
        });
        let point = &mut points[at].1;
        match sample.suffix.as_str() {
            "_sum" => point.sum = Some(sample.value),
            "_count" => point.count = sample.value as u64,
            "_bucket" => {
                // the text counts what lies below each bound, OTLP what lies between two of them
                let below: u64 = point.bucket_counts.iter().sum();
                point.bucket_counts.push((sample.value as u64).saturating_sub(below));
                if let Some(bound) =
                    sample.label("le").and_then(|bound| bound.parse().ok()).filter(|b: &f64| b.is_finite())
                {
                    point.explicit_bounds.push(bound);
                }
            }
            _ => {}
        }
    }
    points.into_iter().map(|(_, point)| point).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_become_counts_between_bounds_for_each_set_of_labels() {
        let text = "# TYPE s histogram\ns_sum{k=\"a\"} 4\ns_count{k=\"a\"} 5\ns_bucket{le=\"1\",k=\"a\"} 2\n\
            s_bucket{le=\"2\",k=\"a\"} 2\ns_bucket{le=\"+Inf\",k=\"a\"} 5\ns_sum{k=\"b\"} 0\ns_count{k=\"b\"} 0\n\
            s_bucket{le=\"1\",k=\"b\"} 0\ns_bucket{le=\"2\",k=\"b\"} 0\ns_bucket{le=\"+Inf\",k=\"b\"} 0\n";
        let family = parse(text).into_iter().next().unwrap();
        let points = histograms(&family.samples, 1, 2);
        assert_eq!(points.len(), 2);
        assert_eq!((points[0].sum, points[0].count), (Some(4.0), 5));
        assert_eq!((&points[0].bucket_counts[..], &points[0].explicit_bounds[..]), (&[2, 0, 3][..], &[1.0, 2.0][..]));
        assert_eq!(points[1].bucket_counts, [0, 0, 0]);
    }

    #[test]
    fn counters_are_sums_and_what_is_no_metric_is_left_out() {
        let convert = |text: &str| convert(parse(text).into_iter().next().unwrap(), 1, 2);
        let counter = convert("# TYPE a counter\na_total{x=\"1\"} 3\n").unwrap();
        let Some(metric::Data::Sum(sum)) = counter.data else { panic!("no sum") };
        assert!(sum.is_monotonic);
        assert_eq!(sum.data_points[0].value, Some(number_data_point::Value::AsDouble(3.0)));
        assert!(convert("# TYPE a summary\na 3\n").is_none());
    }
}
