//! One upstream call: the connections to a group, the stream of a sequence, and the classification of its failures.
//!
//! Dropping the stream resets it, which aborts the sequence on every rank.

use std::{
    error::Error as _,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use axum::http::uri::PathAndQuery;
use bora_common::{
    peer::{Expected, identity},
    telemetry::TraceContext,
    tls, version,
};
use bora_proto::v1::{GenerateEvent, inference_client::InferenceClient};
use tonic::{
    Code, Status, Streaming,
    metadata::AsciiMetadataValue,
    transport::{Channel, Endpoint},
};

use super::codec::{GenerateCodec, Outgoing};
use crate::{
    fleet::validate::{Violation, ViolationKind, clip},
    options::RouterOptions,
};

/// Flow-control window per sequence, in bytes.
pub(super) const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

/// Creates a channel that connects on first use.
pub type Dial = Box<dyn Fn(&Endpoint) -> Channel + Send + Sync>;

/// Connects over TCP, with TLS if it is configured, or within the process if `in_process` is set.
pub fn dial_tcp(options: &RouterOptions) -> Dial {
    if let Some(local) = options.in_process.clone() {
        return Box::new(move |endpoint| local.channel(endpoint));
    }
    let tls = options.grpc.clone();
    Box::new(move |endpoint| tls::channel(endpoint, tls.as_ref()))
}

/// Connections to the leader of a group. They open on first use and reopen after a failure.
pub struct Channels {
    channels: Vec<Channel>,
    next: AtomicUsize,
}

impl Channels {
    /// Prepares connections to `host:port` without opening them.
    pub fn new(endpoint: &str, options: &RouterOptions, dial: &Dial) -> Result<Self, tonic::transport::Error> {
        let endpoint = Endpoint::from_shared(format!("http://{endpoint}"))?
            .tcp_nodelay(true)
            .connect_timeout(options.connect_timeout())
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(5))
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW);
        let channels = (0..options.connections_per_group).map(|_| dial(&endpoint)).collect();
        Ok(Self { channels, next: AtomicUsize::new(0) })
    }

    /// Returns the next connection, round robin.
    pub fn channel(&self) -> Channel {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        self.channels[index % self.channels.len()].clone()
    }

    /// Returns a client on the next connection with this limit of the message size, in bytes.
    pub fn client(&self, max_message_bytes: usize) -> InferenceClient<Channel> {
        InferenceClient::new(self.channel()).max_decoding_message_size(max_message_bytes)
    }
}

/// The reason why an upstream call failed. It determines whether a retry can help.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The queue of the group is full: retry on another group.
    #[error("the group is full: {0}")]
    Full(String),
    /// The group loads, drains or lost a rank: retry on another group.
    #[error("the group takes no requests: {0}")]
    Refused(String),
    /// The connection failed: retry on another group, and open the circuit breaker.
    #[error("the group is lost: {0}")]
    Lost(String),
    /// The deadline passed.
    #[error("the deadline passed")]
    TimedOut,
    /// The request is invalid: a fault of the client or of the router.
    #[error("{0}")]
    Invalid(String),
    /// Only this sequence failed. It would fail on any group.
    #[error("{0}")]
    Sequence(String),
    /// The group violated the contract: retry on another group, and avoid this group.
    #[error(transparent)]
    Violation(#[from] Violation),
}

impl Failure {
    /// Name of the variant, for traces.
    pub fn kind(&self) -> &'static str {
        match self {
            Failure::Full(_) => "full",
            Failure::Refused(_) => "refused",
            Failure::Lost(_) => "lost",
            Failure::TimedOut => "timed_out",
            Failure::Invalid(_) => "invalid",
            Failure::Sequence(_) => "sequence",
            Failure::Violation(_) => "violation",
        }
    }

    /// Classifies the status that ended an open stream. A group never sends `OUT_OF_RANGE` at that time, so this code
    /// means that a message exceeded the size limit.
    pub fn of_stream(status: &Status) -> Self {
        match status.code() {
            Code::OutOfRange => Violation::new(ViolationKind::TooLarge, "an event is too large for its request").into(),
            _ => Self::from(status),
        }
    }
}

impl From<&Status> for Failure {
    fn from(status: &Status) -> Self {
        if let Some(violation) = status.source().and_then(|source| source.downcast_ref::<Violation>()) {
            return Failure::Violation(violation.clone());
        }
        // the group's message: for logs and traces, never for clients
        let message = clip(status.message());
        // A status received from the group has no source. A status that reports a broken connection has one.
        let of_the_connection = status.source().is_some();
        if let Some(part) = identity::mismatch_of(status) {
            return Failure::Refused(format!("another server is at its address: {part} differs"));
        }
        match status.code() {
            Code::ResourceExhausted if !of_the_connection => Failure::Full(message),
            Code::DeadlineExceeded => Failure::TimedOut,
            Code::InvalidArgument | Code::OutOfRange | Code::FailedPrecondition => Failure::Invalid(message),
            _ if of_the_connection => Failure::Lost(message),
            Code::Unavailable | Code::Aborted | Code::Cancelled => Failure::Refused(message),
            // the handler ended without a status
            Code::Unknown => Failure::Lost(message),
            _ => Failure::Sequence(message),
        }
    }
}

/// Starts a sequence. `time_left` is the remaining time of the request, and the group uses it as the deadline.
/// `max_event_bytes` bounds the size of an event.
pub async fn open(
    channel: Channel,
    expected: Expected,
    message: Outgoing,
    max_event_bytes: usize,
    time_left: Duration,
    trace: Option<TraceContext>,
    tracestate: Option<AsciiMetadataValue>,
) -> Result<Streaming<GenerateEvent>, Status> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(time_left);
    let metadata = request.metadata_mut();
    expected.attach(metadata);
    metadata.insert(version::METADATA, AsciiMetadataValue::from_static(env!("CARGO_PKG_VERSION")));
    if let Some(traceparent) = trace.and_then(|trace| AsciiMetadataValue::try_from(trace.to_string()).ok()) {
        metadata.insert("traceparent", traceparent);
    }
    if let Some(tracestate) = tracestate {
        metadata.insert("tracestate", tracestate);
    }
    let mut client = tonic::client::Grpc::new(channel).max_decoding_message_size(max_event_bytes);
    client.ready().await.map_err(|error| Status::unknown(format!("the connection is not ready: {error}")))?;
    let path = PathAndQuery::from_static("/bora.v1.Inference/Generate");
    Ok(client.server_streaming(request, path, GenerateCodec).await?.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_over_the_wire_and_what_broke_it_are_told_apart() {
        let failure = |status: Status| Failure::from(&status);
        assert_eq!(failure(Status::resource_exhausted("queue")), Failure::Full("queue".into()));
        assert_eq!(failure(Status::unavailable("draining")), Failure::Refused("draining".into()));
        assert_eq!(failure(Status::internal("nan")), Failure::Sequence("nan".into()));
        assert_eq!(failure(Status::invalid_argument("bad")), Failure::Invalid("bad".into()));
        let io = std::io::Error::new(std::io::ErrorKind::ConnectionReset, "reset");
        let mut broken = Status::unavailable("tcp");
        broken.set_source(std::sync::Arc::new(io));
        assert_eq!(failure(broken), Failure::Lost("tcp".into()));
        let large = Failure::of_stream(&Status::out_of_range("decoded message length too large"));
        assert_eq!(large.kind(), "violation");
        let long = failure(Status::internal("x".repeat(1 << 20)));
        assert!(long.to_string().len() < 1_000, "what a group says is bounded");
    }
}
