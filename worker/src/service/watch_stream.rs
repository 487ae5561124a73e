//! Counts and traces one sequence by the events that its caller receives.

use std::sync::Arc;

use bora_common::telemetry::TraceContext;
use bora_proto::v1::{self, generate_event::Event};

use crate::engine::EngineError;
use crate::telemetry::engine::{End, EngineMetrics};
use crate::telemetry::spans::SequenceSpan;

/// Metrics and span of one sequence. If it is dropped before the end, the caller aborted the sequence.
pub(super) struct WatchStream {
    metrics: Arc<EngineMetrics>,
    span: SequenceSpan,
    over: bool,
}

impl WatchStream {
    /// Records the arrival of a request.
    pub(super) fn new(
        metrics: &Arc<EngineMetrics>,
        parent: Option<&TraceContext>,
        request: &v1::GenerateRequest,
    ) -> Self {
        Self { metrics: Arc::clone(metrics), span: SequenceSpan::arrived(parent, request), over: false }
    }

    /// Trace context of the sequence's work on the ranks.
    pub(super) fn context(&self) -> Option<TraceContext> {
        self.span.context()
    }

    /// Records that the engine refused the request.
    pub(super) fn refused(&mut self, reason: &str) {
        self.end(End::Refused);
        self.span.failed(reason);
    }

    /// Records the next event, or the end of the stream.
    pub(super) fn event(&mut self, event: Option<&Result<v1::GenerateEvent, EngineError>>) {
        match event {
            Some(Ok(v1::GenerateEvent { event: Some(Event::Started(started)) })) => {
                self.metrics.started(started.prompt_tokens, started.cached_tokens, started.queued_seconds);
                self.span.started(started);
            }
            Some(Ok(v1::GenerateEvent { event: Some(Event::Finished(finished)) })) => {
                if let Some(timing) = &finished.timing {
                    self.metrics.prefilled(timing.prefill_seconds);
                }
                self.end(End::Finished);
                self.span.finished(finished);
            }
            Some(Err(error)) => self.failed(&error.to_string()),
            Some(Ok(_)) | None => {}
        }
    }

    /// Records a failure.
    pub(super) fn failed(&mut self, reason: &str) {
        self.end(End::Failed);
        self.span.failed(reason);
    }

    fn end(&mut self, end: End) {
        if !std::mem::replace(&mut self.over, true) {
            self.metrics.ended(end);
        }
    }
}

impl Drop for WatchStream {
    fn drop(&mut self) {
        self.end(End::Aborted);
    }
}
