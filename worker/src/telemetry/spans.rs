//! Spans of the worker: of a sequence in the leader's service, and of the sequence on each rank.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, SystemTime};

use bora_common::telemetry::{Span, TraceContext};
use bora_proto::v1;

use crate::engine::step::{Slot, Step, Tokens};

/// Spans of a sequence on the leader: `generate` with its children `queue`, `prefill` and `decode`.
pub(crate) struct SequenceSpan {
    span: Option<Span>,
    arrived: SystemTime,
}

impl SequenceSpan {
    /// Starts the span of a request under this context. An untraced request costs nothing.
    pub(crate) fn arrived(parent: Option<&TraceContext>, request: &v1::GenerateRequest) -> Self {
        let arrived = SystemTime::now();
        let span = Span::below_at(parent, "generate", arrived).map(|span| {
            let mut span = span.server();
            span.set("bora.request_id", request.request_id.clone());
            span.set("bora.prompt_tokens", request.token_ids.len() as i64 - i64::from(request.generated_len));
            span.set("bora.resumed_tokens", i64::from(request.generated_len));
            span
        });
        Self { span, arrived }
    }

    /// Trace context of the sequence's work on the ranks.
    pub(crate) fn context(&self) -> Option<TraceContext> {
        self.span.as_ref().map(Span::context)
    }

    pub(crate) fn started(&mut self, started: &v1::Started) {
        if let Some(span) = &mut self.span {
            span.set("bora.cached_tokens", i64::from(started.cached_tokens));
        }
    }

    pub(crate) fn finished(&mut self, finished: &v1::Finished) {
        let Some(mut span) = self.span.take() else { return };
        span.set("gen_ai.usage.input_tokens", i64::from(finished.prompt_tokens));
        span.set("gen_ai.usage.output_tokens", i64::from(finished.completion_tokens));
        span.set_list("gen_ai.response.finish_reasons", std::iter::once(finished.reason().as_str_name().to_owned()));
        let context = span.context();
        let timing = finished.timing.unwrap_or_default();
        span.set("bora.steps", i64::from(timing.steps));
        let mut begun = self.arrived;
        for (name, seconds) in
            [("queue", timing.queued_seconds), ("prefill", timing.prefill_seconds), ("decode", timing.decode_seconds)]
        {
            let end = begun + Duration::try_from_secs_f64(seconds).unwrap_or_default();
            if let Some(part) = Span::below_at(Some(&context), name, begun) {
                part.end_at(end);
            }
            begun = end;
        }
        span.end();
    }

    pub(crate) fn failed(&mut self, reason: &str) {
        if let Some(mut span) = self.span.take() {
            span.fail(reason);
            span.end();
        }
    }
}

/// A span that is dropped before its end belongs to an aborted sequence.
impl Drop for SequenceSpan {
    fn drop(&mut self) {
        if let Some(mut span) = self.span.take() {
            span.event("aborted by its caller", Vec::new());
            span.end();
        }
    }
}

/// Spans of traced sequences on one rank: one from a sequence's first step to its last, and one per chunk of its
/// prompt. Ranks receive the trace context with the step that admits the sequence.
pub(crate) struct RankSpans {
    rank: usize,
    running: HashMap<Slot, Running>,
    in_flight: VecDeque<OpenSpan>,
}

struct Running {
    span: Span,
    chunks: i64,
    decodes: i64,
    last_end: SystemTime,
}

struct OpenSpan {
    step: u64,
    submitted: SystemTime,
    /// Slot, first position and number of prompt tokens (0 = decode).
    work: Vec<(Slot, u32, usize)>,
}

impl RankSpans {
    pub(crate) fn new(rank: usize) -> Self {
        Self { rank, running: HashMap::new(), in_flight: VecDeque::new() }
    }

    /// Whether a sequence of this rank is traced.
    pub(crate) fn is_active(&self) -> bool {
        !self.running.is_empty()
    }

    /// Records the start of a step.
    pub(crate) fn submitted(&mut self, step: &Step) {
        if step.traces.is_empty() && self.running.is_empty() {
            return;
        }
        for slot in &step.release {
            self.end(*slot);
        }
        for (slot, context) in &step.traces {
            if let Some(mut span) = Span::below(Some(context), "rank") {
                span.set("bora.rank", self.rank as i64);
                self.running.insert(*slot, Running { span, chunks: 0, decodes: 0, last_end: SystemTime::now() });
            }
        }
        let traced = step.work.iter().filter(|work| self.running.contains_key(&work.slot));
        let work: Vec<_> = traced
            .map(|work| match &work.tokens {
                Tokens::Ids(ids) => (work.slot, work.start, ids.len()),
                Tokens::Sampled => (work.slot, work.start, 0),
            })
            .collect();
        if !work.is_empty() {
            self.in_flight.push_back(OpenSpan { step: step.id, submitted: SystemTime::now(), work });
        }
    }

    /// Records the end of a step.
    pub(crate) fn collected(&mut self, step: u64) {
        if self.in_flight.front().is_none_or(|flight| flight.step != step) {
            return;
        }
        let Some(flight) = self.in_flight.pop_front() else { return };
        let now = SystemTime::now();
        for (slot, start, tokens) in flight.work {
            let Some(running) = self.running.get_mut(&slot) else { continue };
            running.last_end = now;
            if tokens == 0 {
                running.decodes += 1;
                continue;
            }
            running.chunks += 1;
            let chunk = Span::below_at(Some(&running.span.context()), "prefill chunk", flight.submitted);
            if let Some(mut chunk) = chunk {
                chunk.set("bora.rank", self.rank as i64);
                chunk.set("bora.step", step as i64);
                chunk.set("bora.start", i64::from(start));
                chunk.set("bora.tokens", tokens as i64);
                chunk.end_at(now);
            }
        }
    }

    /// Ends the remaining spans at their last step, because no sequence runs.
    pub(crate) fn idle(&mut self) {
        self.in_flight.clear();
        let slots: Vec<Slot> = self.running.keys().copied().collect();
        for slot in slots {
            self.end(slot);
        }
    }

    fn end(&mut self, slot: Slot) {
        let Some(Running { mut span, chunks, decodes, last_end }) = self.running.remove(&slot) else { return };
        span.set("bora.prefill_chunks", chunks);
        span.set("bora.decode_steps", decodes);
        span.end_at(last_end);
    }
}
