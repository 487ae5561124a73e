//! What is counted and traced of one sequence, from what its caller is notified of it.

use std::sync::Arc;

use bora_common::telemetry::TraceContext;
use bora_proto::v1::{self, generate_event::Event};

use crate::engine::EngineError;
use crate::telemetry::engine::{End, EngineMetrics};
use crate::telemetry::spans::SequenceSpan;

/// One sequence; what was not reported to be over when it is dropped was aborted by its caller.
pub(super) struct WatchStream {
    metrics: Arc<EngineMetrics>,
    span: SequenceSpan,
    over: bool,
}

impl WatchStream {
    /// A request came.
    pub(super) fn new(
        metrics: &Arc<EngineMetrics>,
        parent: Option<&TraceContext>,
        request: &v1::GenerateRequest,
    ) -> Self {
        Self { metrics: Arc::clone(metrics), span: SequenceSpan::arrived(parent, request), over: false }
    }

    /// What its work on the ranks is done under.
    pub(super) fn context(&self) -> Option<TraceContext> {
        self.span.context()
    }

    /// The engine did not take it.
    pub(super) fn refused(&mut self, reason: &str) {
        self.end(End::Refused);
        self.span.failed(reason);
    }

    /// The next event, or the end of the stream.
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

    /// It went wrong.
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
