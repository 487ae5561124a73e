//! What is measured and traced of one sequence: its placements, its calls of groups, and the times of its tokens.

use std::time::Duration;

use bora_common::telemetry::{Span, TraceContext};
use bora_proto::v1::Finished;
use tokio::time::Instant;

use super::stream::Failure;
use crate::{metrics::Metrics, place::choose::Placement};

/// One sequence as it is seen by metrics and traces.
pub(super) struct Watch {
    trace: Option<TraceContext>,
    /// The search for a group.
    placing: Option<Span>,
    /// The call of the present group.
    call: Option<Span>,
    placed_at: Instant,
    predicted_seconds: f64,
    last_tokens: Option<Instant>,
}

impl Watch {
    /// A sequence that looks for a group from now on.
    pub(super) fn new(trace: Option<TraceContext>) -> Self {
        Self {
            placing: Span::below(trace.as_ref(), "place"),
            trace,
            call: None,
            placed_at: Instant::now(),
            predicted_seconds: 0.0,
            last_tokens: None,
        }
    }

    /// Whether the reasons of placements are wanted.
    pub(super) fn is_traced(&self) -> bool {
        self.placing.is_some() || self.call.is_some()
    }

    /// No group can start it now.
    pub(super) fn waits_in_line(&mut self) {
        if let Some(span) = &mut self.placing {
            span.event("no group had room", Vec::new());
        }
    }

    /// A group was found and will be called; returns what the call is made under.
    pub(super) fn placed(&mut self, placement: &Placement, attempt: u32, metrics: &Metrics) -> Option<TraceContext> {
        metrics.placed(placement.reason);
        self.placed_at = Instant::now();
        self.predicted_seconds = placement.predicted_seconds;
        let record = &placement.group.record;
        if let Some(mut span) = self.placing.take() {
            span.set("bora.group", record.group.clone());
            span.set("bora.place.reason", placement.reason.name());
            span.set("bora.place.predicted_first_token_seconds", placement.predicted_seconds);
            span.set("bora.attempt", i64::from(attempt));
            if let Some(explanation) = &placement.explanation {
                // behind the choice: each candidate with its score
                let candidates = explanation.split("; ").skip(1).map(str::to_owned);
                span.set_list("bora.place.candidates", candidates);
            }
            span.end();
        }
        self.call = Span::below(self.trace.as_ref(), "bora.v1.Inference/Generate").map(|span| {
            let mut span = span.client();
            span.set("rpc.system", "grpc");
            span.set("rpc.service", "bora.v1.Inference");
            span.set("rpc.method", "Generate");
            span.set("server.address", record.endpoint.clone());
            span.set("bora.group", record.group.clone());
            span
        });
        self.call.as_ref().map(Span::context).or(self.trace)
    }

    /// The group took it out of its queue.
    pub(super) fn started(&mut self, cached_tokens: u32) {
        if let Some(span) = &mut self.call {
            span.set("bora.cached_tokens", i64::from(cached_tokens));
        }
    }

    /// Tokens came.
    pub(super) fn tokens(&mut self, model: &str, count: usize, metrics: &Metrics) {
        let now = Instant::now();
        match self.last_tokens.replace(now) {
            Some(last) => metrics.next_tokens(model, (now - last).as_secs_f64(), count),
            None => {
                let took: Duration = now - self.placed_at;
                metrics.prediction(self.predicted_seconds, took.as_secs_f64());
                if let Some(span) = &mut self.call {
                    span.event("first token", Vec::new());
                }
            }
        }
    }

    /// The group failed it; another may be looked for.
    pub(super) fn failed(&mut self, failure: &Failure, generated: usize) {
        if let Some(mut span) = self.call.take() {
            span.set("bora.generated_tokens", generated as i64);
            span.set("error.type", failure.kind());
            span.fail(failure.to_string());
            span.end();
        }
        self.placing = Span::below(self.trace.as_ref(), "place");
    }

    /// It came to its end.
    pub(super) fn finished(&mut self, finished: &Finished) {
        if let Some(mut span) = self.call.take() {
            span.set("gen_ai.usage.output_tokens", i64::from(finished.completion_tokens));
            if let Some(timing) = &finished.timing {
                span.set("bora.queued_seconds", timing.queued_seconds);
                span.set("bora.prefill_seconds", timing.prefill_seconds);
                span.set("bora.decode_seconds", timing.decode_seconds);
                span.set("bora.steps", i64::from(timing.steps));
            }
            span.end();
        }
        self.placing = None;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(mut span) = self.call.take() {
            // a stop string was found, or the client left
            span.event("dropped by the router", Vec::new());
            span.end();
        }
    }
}
