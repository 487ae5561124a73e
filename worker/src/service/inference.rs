//! `bora.v1.Inference`, the service that routers call.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bora_common::telemetry::TraceContext;
use bora_common::version;
use bora_proto::v1::{self, inference_server::Inference};
use futures::{Stream, StreamExt as _};
use tokio::time::{Instant, Sleep};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use super::Host;
use super::watch_stream::WatchStream;
use crate::engine::EventStream;

pub(super) struct InferenceService {
    pub(super) host: Host,
    pub(super) stopping: CancellationToken,
}

type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Inference for InferenceService {
    type GenerateStream = GenerateStream;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let deadline = deadline(request.metadata())?;
        check_version(request.metadata())?;
        let parent = request.metadata().get("traceparent").and_then(|value| TraceContext::parse(value.to_str().ok()?));
        let request = request.into_inner();
        tracing::debug!(
            request_id = request.request_id,
            trace_id = parent.map(|parent| parent.trace_id_hex()),
            tokens = request.token_ids.len(),
            resumed = request.generated_len,
            "generate"
        );
        let engine = self.host.group()?.engine.clone();
        let mut watched = WatchStream::new(engine.metrics(), parent.as_ref(), &request);
        let trace = watched.context();
        let accepted = if request.grammar.is_some() {
            // checking the limits of a grammar may take milliseconds
            tokio::task::spawn_blocking(move || engine.generate_under(request, trace))
                .await
                .map_err(|_| Status::internal("the request could not be checked"))?
        } else {
            engine.generate_under(request, trace)
        };
        let events = match accepted {
            Ok(events) => events,
            Err(error) => {
                watched.refused(&error.to_string());
                return Err(error.into());
            }
        };
        let deadline = deadline.map(|at| Box::pin(tokio::time::sleep_until(at)));
        Ok(Response::new(GenerateStream { events: Some(events), deadline, watched }))
    }

    type WatchStream = BoxStream<v1::GroupEvent>;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        check_version(request.metadata())?;
        let events = self.host.group()?.engine.watch(request.into_inner().watcher).await?;
        let stopping = self.stopping.clone().cancelled_owned();
        let stream = ReceiverStream::new(events).map(Ok).take_until(stopping);
        Ok(Response::new(Box::pin(stream)))
    }

    async fn describe(&self, _: Request<v1::DescribeRequest>) -> Result<Response<v1::DescribeResponse>, Status> {
        let record_json = serde_json::to_string(&self.host.group()?.record())
            .map_err(|error| Status::internal(format!("group record: {error}")))?;
        Ok(Response::new(v1::DescribeResponse { record_json, cluster: self.host.cluster().to_owned() }))
    }
}

/// Events of a sequence until its deadline. Dropping the stream aborts the sequence; gRPC drops it if the caller
/// disconnects.
pub(super) struct GenerateStream {
    events: Option<EventStream>,
    deadline: Option<Pin<Box<Sleep>>>,
    watched: WatchStream,
}

impl Stream for GenerateStream {
    type Item = Result<v1::GenerateEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(events) = self.events.as_mut() else { return Poll::Ready(None) };
        if let Poll::Ready(event) = events.poll_next_unpin(context) {
            self.watched.event(event.as_ref());
            return Poll::Ready(event.map(|event| event.map_err(Status::from)));
        }
        let Some(deadline) = self.deadline.as_mut() else { return Poll::Pending };
        std::task::ready!(deadline.as_mut().poll(context));
        self.events = None;
        self.watched.failed("the request's deadline passed");
        Poll::Ready(Some(Err(Status::deadline_exceeded("the request's deadline passed"))))
    }
}

/// Refuses a router of an incompatible release, so that the router tries another group.
fn check_version(metadata: &MetadataMap) -> Result<(), Status> {
    let peer = metadata.get(version::METADATA).and_then(|value| value.to_str().ok()).unwrap_or_default();
    version::check(env!("CARGO_PKG_VERSION"), peer).map_err(|skew| Status::unavailable(skew.to_string()))
}

/// Deadline of the call from `grpc-timeout`, if the header is present. tonic itself applies it only to the headers of a
/// stream.
fn deadline(metadata: &MetadataMap) -> Result<Option<Instant>, Status> {
    let Some(value) = metadata.get("grpc-timeout") else { return Ok(None) };
    let timeout = value.to_str().ok().and_then(parse_timeout);
    let timeout = timeout.ok_or_else(|| Status::invalid_argument("grpc-timeout: 1 to 8 digits and one of HMSmun"))?;
    Ok(Instant::now().checked_add(timeout))
}

/// Parses a timeout of the gRPC specification: at most 8 digits and a unit.
fn parse_timeout(value: &str) -> Option<Duration> {
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(amount * 3_600)),
        "M" => Some(Duration::from_secs(amount * 60)),
        "S" => Some(Duration::from_secs(amount)),
        "m" => Some(Duration::from_millis(amount)),
        "u" => Some(Duration::from_micros(amount)),
        "n" => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_a_router_of_an_incompatible_version() {
        let mut metadata = MetadataMap::new();
        assert!(check_version(&metadata).is_ok(), "a tool sends no version");
        metadata.insert(version::METADATA, env!("CARGO_PKG_VERSION").parse().unwrap());
        assert!(check_version(&metadata).is_ok());
        metadata.insert(version::METADATA, "9.0.0".parse().unwrap());
        let refused = check_version(&metadata).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unavailable);
        assert!(refused.message().contains("version 9.0.0 can't work with version"), "{}", refused.message());
    }

    #[test]
    fn parses_timeouts_of_the_specification() {
        assert_eq!(parse_timeout("100m"), Some(Duration::from_millis(100)));
        assert_eq!(parse_timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3_600)));
        assert_eq!(parse_timeout("7u"), Some(Duration::from_micros(7)));
        for wrong in ["", "S", "1", "1x", "-1S", "123456789S", "1.5S", "é"] {
            assert_eq!(parse_timeout(wrong), None, "{wrong}");
        }
    }
}
