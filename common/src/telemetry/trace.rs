//! Traces: W3C trace context, and spans that are recorded when they have ended.
//!
//! Nothing is made for a request that is not traced: whether it is, is decided once, where it arrives. A span's
//! token IDs are known before it begins (they travel in `traceparent`), its times are those of the work itself, and it
//! goes to OpenTelemetry's own batch processor as a whole when it is over. That queue is bounded and never waits.

use std::fmt;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::trace::{Event, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue, Value};
use opentelemetry_otlp::{WithExportConfig as _, WithTonicConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{BatchConfigBuilder, BatchSpanProcessor, SpanData, SpanProcessor};
use serde::{Deserialize, Serialize};
use tonic::transport::Channel;

use super::TelemetryError;
use super::otlp::SEND_WITHIN;

/// Spans that wait to be sent; more are dropped.
const QUEUE: usize = 8_192;
/// Spans of one message.
const BATCH: usize = 512;
/// How long spans are gathered.
const DELAY: Duration = Duration::from_secs(1);
/// How long the last spans may take at the end of the process.
const FLUSH_WITHIN: Duration = Duration::from_secs(2);

/// A place in a trace: what a `traceparent` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TraceContext {
    /// Of the whole trace; not 0.
    pub trace_id: u128,
    /// Of the span that is the parent of what follows; not 0.
    pub span_id: u64,
    /// Whether spans are recorded.
    pub sampled: bool,
}

impl TraceContext {
    /// The start of a new trace.
    pub fn root(sampled: bool) -> Self {
        Self { trace_id: rand::random::<u128>().max(1), span_id: rand::random::<u64>().max(1), sampled }
    }

    /// A new span of the same trace.
    pub fn child(&self) -> Self {
        Self { span_id: rand::random::<u64>().max(1), ..*self }
    }

    /// Reads a `traceparent` as in W3C Trace Context (level 1; of later versions what this one knows).
    pub fn parse(header: &str) -> Option<Self> {
        let lowercase_hex = |text: &str| text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let mut parts = header.trim().split('-');
        let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let lengths = (version.len(), trace.len(), span.len(), flags.len());
        if lengths != (2, 32, 16, 2) || version == "ff" || (version == "00" && parts.next().is_some()) {
            return None;
        }
        if ![version, trace, span, flags].into_iter().all(lowercase_hex) {
            return None;
        }
        let trace_id = u128::from_str_radix(trace, 16).ok().filter(|id| *id != 0)?;
        let span_id = u64::from_str_radix(span, 16).ok().filter(|id| *id != 0)?;
        let sampled = u8::from_str_radix(flags, 16).ok()? & 1 == 1;
        Some(Self { trace_id, span_id, sampled })
    }

    /// The trace's id as it stands in logs, exemplars and collectors.
    pub fn trace_id_hex(&self) -> String {
        format!("{:032x}", self.trace_id)
    }
}

/// As a `traceparent`.
impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace_id, self.span_id, u8::from(self.sampled))
    }
}

struct Tracer {
    processor: BatchSpanProcessor,
    sample_ratio: f64,
    scope: InstrumentationScope,
}

static TRACER: OnceLock<Tracer> = OnceLock::new();

pub(super) fn start(channel: Channel, sample_ratio: f64, resource: &Resource) -> Result<(), TelemetryError> {
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_channel(channel)
        .with_timeout(SEND_WITHIN)
        .build()
        .map_err(|error| TelemetryError::Exporter(error.to_string()))?;
    let config = BatchConfigBuilder::default()
        .with_max_queue_size(QUEUE)
        .with_max_export_batch_size(BATCH)
        .with_scheduled_delay(DELAY)
        .build();
    let mut processor = BatchSpanProcessor::builder(exporter).with_batch_config(config).build();
    processor.set_resource(resource);
    let scope = InstrumentationScope::builder("bora").with_version(env!("CARGO_PKG_VERSION")).build();
    TRACER
        .set(Tracer { processor, sample_ratio, scope })
        .map_err(|_| TelemetryError::Exporter("traces were started twice".into()))
}

/// Sends what is left.
pub(super) fn stop() {
    if let Some(tracer) = TRACER.get()
        && let Err(error) = tracer.processor.shutdown_with_timeout(FLUSH_WITHIN)
    {
        tracing::debug!(%error, "the last spans were not sent");
    }
}

/// Whether spans are recorded at all.
pub fn is_on() -> bool {
    TRACER.get().is_some()
}

/// A request as it arrives from outside.
#[derive(Debug, Default)]
pub struct Arrival {
    /// What its work is done under and handed on with; `None` where there is nothing to record and nothing to hand on.
    pub context: Option<TraceContext>,
    /// Its span, where it is recorded.
    pub span: Option<Span>,
}

/// A request arrived with this `traceparent`: the client's decision is obeyed; without one, some are chosen.
pub fn arrive(traceparent: Option<&str>, name: &'static str) -> Arrival {
    let given = traceparent.and_then(TraceContext::parse);
    let sample_ratio = TRACER.get().map_or(0.0, |tracer| tracer.sample_ratio);
    let span = match &given {
        Some(_) => Span::below(given.as_ref(), name).map(Span::server),
        None if sample_ratio > 0.0 && rand::random::<f64>() < sample_ratio => {
            Span::below(Some(&TraceContext::root(true)), name).map(|span| span.server().without_parent())
        }
        None => None,
    };
    // where nothing is recorded here, it is handed on as it came: workers may record
    Arrival { context: span.as_ref().map(Span::context).or(given), span }
}

/// The wall clock's time of an instant that lies a short while back.
pub fn wall(instant: Instant) -> SystemTime {
    let now = SystemTime::now();
    now.checked_sub(instant.elapsed()).unwrap_or(now)
}

/// A span in the making. It is recorded by [`end`](Self::end) and costs nothing more when it is dropped.
#[derive(Clone, Debug)]
pub struct Span {
    name: String,
    kind: SpanKind,
    context: TraceContext,
    parent: u64,
    parent_is_remote: bool,
    begun: SystemTime,
    attributes: Vec<KeyValue>,
    events: Vec<Event>,
    error: Option<String>,
}

impl Span {
    /// Begins a span below `parent`, now; `None` where it would not be recorded.
    pub fn below(parent: Option<&TraceContext>, name: impl Into<String>) -> Option<Self> {
        Self::below_at(parent, name, SystemTime::now())
    }

    /// The same for work that began earlier.
    pub fn below_at(parent: Option<&TraceContext>, name: impl Into<String>, begun: SystemTime) -> Option<Self> {
        let parent = parent.filter(|parent| parent.sampled && is_on())?;
        Some(Self {
            name: name.into(),
            kind: SpanKind::Internal,
            context: parent.child(),
            parent: parent.span_id,
            parent_is_remote: false,
            begun,
            attributes: Vec::new(),
            events: Vec::new(),
            error: None,
        })
    }

    /// The side of a call that responds; its parent is another process.
    pub fn server(mut self) -> Self {
        self.kind = SpanKind::Server;
        self.parent_is_remote = true;
        self
    }

    /// The side of a call that asks.
    pub fn client(mut self) -> Self {
        self.kind = SpanKind::Client;
        self
    }

    /// The first span of a trace.
    fn without_parent(mut self) -> Self {
        self.parent = 0;
        self.parent_is_remote = false;
        self
    }

    /// Its place: what its children have as parent.
    pub fn context(&self) -> TraceContext {
        self.context
    }

    /// A fact about it.
    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        self.attributes.push(KeyValue::new(key, value));
    }

    /// A list of texts about it.
    pub fn set_list(&mut self, key: &'static str, values: impl Iterator<Item = String>) {
        let values: Vec<opentelemetry::StringValue> = values.map(Into::into).collect();
        self.attributes.push(KeyValue::new(key, Value::Array(values.into())));
    }

    /// Another name than it began with.
    pub fn rename(&mut self, name: String) {
        self.name = name;
    }

    /// Something that happened within it.
    pub fn event(&mut self, name: &'static str, attributes: Vec<KeyValue>) {
        self.events.push(Event::new(name, SystemTime::now(), attributes, 0));
    }

    /// What went wrong.
    pub fn fail(&mut self, reason: impl Into<String>) {
        self.error = Some(reason.into());
    }

    /// Ends it now.
    pub fn end(self) {
        self.end_at(SystemTime::now());
    }

    /// Ends it at that time.
    pub fn end_at(self, end: SystemTime) {
        let Some(tracer) = TRACER.get() else { return };
        let mut events = opentelemetry_sdk::trace::SpanEvents::default();
        events.events = self.events;
        tracer.processor.on_end(SpanData {
            span_context: SpanContext::new(
                TraceId::from(self.context.trace_id),
                SpanId::from(self.context.span_id),
                TraceFlags::SAMPLED,
                false,
                TraceState::NONE,
            ),
            parent_span_id: SpanId::from(self.parent),
            parent_span_is_remote: self.parent_is_remote,
            span_kind: self.kind,
            name: self.name.into(),
            start_time: self.begun,
            end_time: end.max(self.begun),
            attributes: self.attributes,
            dropped_attributes_count: 0,
            events,
            links: Default::default(),
            status: self.error.map_or(Status::Unset, Status::error),
            instrumentation_scope: tracer.scope.clone(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_traceparent_is_read_and_written_as_the_standard_says() {
        let context = TraceContext::parse(EXAMPLE).unwrap();
        assert_eq!(context.to_string(), EXAMPLE);
        assert_eq!(context.trace_id_hex(), "0af7651916cd43dd8448eb211c80319c");
        assert!(context.sampled && !TraceContext::parse(&EXAMPLE.replace("-01", "-00")).unwrap().sampled);
        // a later version may say more, and other flags
        assert_eq!(TraceContext::parse(&format!("{}-what-else", EXAMPLE.replace("00-", "01-"))), Some(context));
        assert!(TraceContext::parse(&EXAMPLE.replace("-01", "-03")).unwrap().sampled);
        for wrong in [
            "",
            "00",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b716920333é-01",
        ] {
            assert_eq!(TraceContext::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_child_stays_in_its_trace() {
        let root = TraceContext::root(true);
        let child = root.child();
        assert_eq!((root.trace_id, true), (child.trace_id, child.sampled));
        assert_ne!(root.span_id, child.span_id);
        assert_eq!(TraceContext::parse(&root.to_string()), Some(root));
    }

    #[test]
    fn without_a_collector_nothing_is_made_and_a_context_is_handed_on() {
        assert!(arrive(None, "request").context.is_none());
        let arrival = arrive(Some(EXAMPLE), "request");
        assert!(arrival.span.is_none());
        assert_eq!(arrival.context, TraceContext::parse(EXAMPLE));
    }
}
