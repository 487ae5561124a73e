//! What the router counts, in Prometheus' text form at `/metrics`.

mod vllm;

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use bora_common::telemetry::{self, MetricsSource, Span, TraceContext};
use parking_lot::Mutex;
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode_registry},
    metrics::{counter::Counter, exemplar::HistogramWithExemplars, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use vllm::VllmMetrics;

use crate::{
    fleet::{gauges::GroupGauges, view::Fleet},
    place::{
        admission::{Class, Queue},
        choose::Reason,
    },
    relay::emit::Finish,
};

/// Labels of a finished HTTP request. Both come from fixed lists.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    endpoint: &'static str,
    status: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TokenLabels {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelLabels {
    model: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LineLabels {
    model: String,
    class: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RepairLabels {
    repair: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MoveLabels {
    when: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

/// Names the trace of one of the requests that a bucket counts.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Exemplar {
    trace_id: String,
}

/// The router's counters.
pub struct Metrics {
    registry: Mutex<Registry>,
    requests: Family<RequestLabels, Counter>,
    open_requests: Gauge,
    unknown_fields: Counter,
    left_out_tools: Counter,
    ignored_efforts: Counter,
    unparsed_tool_calls: Counter,
    repairs: Family<RepairLabels, Counter>,
    failed_sequences: Counter,
    poison_pills: Counter,
    refused_retries: Counter,
    queued_sequences: Counter,
    waited_seconds: Histogram,
    waiting: Family<LineLabels, Gauge>,
    waiting_tokens: Family<LineLabels, Gauge>,
    unserved_requests: Family<ModelLabels, Counter>,
    failed_over: [Counter; 2],
    prompt_tokens: Counter,
    cached_tokens: Counter,
    completion_tokens: Counter,
    first_token_seconds: HistogramWithExemplars<Exemplar>,
    inter_token_seconds: Histogram,
    predicted_first_token_seconds: Histogram,
    placed_first_token_seconds: Histogram,
    first_token_over_prediction: Histogram,
    placements: [Counter; Reason::ALL.len()],
    prepare_seconds: Histogram,
    encoded_tokens: [Counter; 2],
    conversation_cache_bytes: Gauge,
    groups: Gauge,
    ready_groups: Gauge,
    refused_groups: Gauge,
    duplicate_groups: Gauge,
    indexed_blocks: Gauge,
    index_bytes: Gauge,
    group_gauges: GroupGauges,
    vllm: VllmMetrics,
    others: Mutex<Option<MetricsSource>>,
}

/// Between two tokens of one sequence.
const TOKEN_BUCKETS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 1.0, 5.0];
/// 1 is a prediction that came true.
const RATIO_BUCKETS: [f64; 12] = [0.1, 0.25, 0.5, 0.75, 0.9, 1.1, 1.5, 2.0, 3.0, 5.0, 10.0, 100.0];
/// Long prompts take long: the buckets end at ten minutes.
const WAIT_BUCKETS: [f64; 16] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0];
const WORK_BUCKETS: [f64; 12] = [2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.2];

impl Metrics {
    /// All counters at zero.
    pub fn new() -> Arc<Self> {
        let mut registry = Registry::with_prefix("bora_router");
        let requests = Family::<RequestLabels, Counter>::default();
        let open_requests = Gauge::default();
        let unknown_fields = Counter::default();
        let left_out_tools = Counter::default();
        let ignored_efforts = Counter::default();
        let unparsed_tool_calls = Counter::default();
        let repairs = Family::<RepairLabels, Counter>::default();
        let failed_sequences = Counter::default();
        let poison_pills = Counter::default();
        let refused_retries = Counter::default();
        let queued_sequences = Counter::default();
        let waited_seconds = Histogram::new(WAIT_BUCKETS);
        let waiting = Family::<LineLabels, Gauge>::default();
        let waiting_tokens = Family::<LineLabels, Gauge>::default();
        let unserved_requests = Family::<ModelLabels, Counter>::default();
        let moves = Family::<MoveLabels, Counter>::default();
        let tokens = Family::<TokenLabels, Counter>::default();
        let first_token_seconds = HistogramWithExemplars::new(WAIT_BUCKETS.into_iter());
        let inter_token_seconds = Histogram::new(TOKEN_BUCKETS);
        let predicted_first_token_seconds = Histogram::new(WAIT_BUCKETS);
        let placed_first_token_seconds = Histogram::new(WAIT_BUCKETS);
        let first_token_over_prediction = Histogram::new(RATIO_BUCKETS);
        let placements = Family::<ReasonLabels, Counter>::default();
        let prepare_seconds = Histogram::new(WORK_BUCKETS);
        let encoded = Family::<TokenLabels, Counter>::default();
        let conversation_cache_bytes = Gauge::default();
        let groups = Gauge::default();
        let ready_groups = Gauge::default();
        let refused_groups = Gauge::default();
        let duplicate_groups = Gauge::default();
        let indexed_blocks = Gauge::default();
        let index_bytes = Gauge::default();
        registry.register("requests", "HTTP requests answered", requests.clone());
        registry.register("open_requests", "HTTP requests not finished yet", open_requests.clone());
        registry.register("unknown_fields", "Request fields that were ignored", unknown_fields.clone());
        registry.register(
            "left_out_tools",
            "Tools of requests that were left out because a server would have to run them",
            left_out_tools.clone(),
        );
        registry.register(
            "ignored_efforts",
            "Requests that asked for an effort of reasoning, which the model does not have",
            ignored_efforts.clone(),
        );
        registry.register(
            "unparsed_tool_calls",
            "Answers whose tool calls are not what they should be",
            unparsed_tool_calls.clone(),
        );
        registry.register("repairs", "Repairs of conversations that the model was not trained on", repairs.clone());
        registry.register("failed_sequences", "Sequences that ended in an error", failed_sequences.clone());
        registry.register(
            "poison_pills",
            "Requests stopped because the groups that took them died",
            poison_pills.clone(),
        );
        registry.register("refused_retries", "Sequences not placed again for want of budget", refused_retries.clone());
        registry.register("queued_sequences", "Sequences that waited for a group with room", queued_sequences.clone());
        registry.register("queue_seconds", "How long such sequences waited", waited_seconds.clone());
        registry.register(
            "waiting_sequences",
            "Sequences that wait in the router for a group with room",
            waiting.clone(),
        );
        registry.register("waiting_tokens", "Prompt tokens of such sequences", waiting_tokens.clone());
        registry.register(
            "unserved_requests",
            "Requests for a model that no ready group served",
            unserved_requests.clone(),
        );
        registry.register("failovers", "Sequences placed again on another group", moves.clone());
        registry.register("tokens", "Tokens of finished sequences", tokens.clone());
        registry.register(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token",
            first_token_seconds.clone(),
        );
        registry.register(
            "inter_token_latency_seconds",
            "Between two messages of a group, for each token of the later one",
            inter_token_seconds.clone(),
        );
        registry.register(
            "predicted_first_token_seconds",
            "From a sequence's placement to its first token, as the cost model predicted it",
            predicted_first_token_seconds.clone(),
        );
        registry.register(
            "placed_first_token_seconds",
            "From a sequence's placement to its first token",
            placed_first_token_seconds.clone(),
        );
        registry.register(
            "first_token_over_prediction",
            "The time to the first token after the placement as a multiple of its prediction",
            first_token_over_prediction.clone(),
        );
        registry.register("placements", "Sequences placed on a group, by what decided", placements.clone());
        registry.register(
            "prepare_seconds",
            "Parsing, checking, encoding and hashing a request",
            prepare_seconds.clone(),
        );
        registry.register(
            "encoded_tokens",
            "Tokens of conversations, by whether they were encoded or known",
            encoded.clone(),
        );
        registry.register(
            "conversation_cache_bytes",
            "Bytes that known conversations take",
            conversation_cache_bytes.clone(),
        );
        registry.register("groups", "Groups known", groups.clone());
        registry.register("ready_groups", "Groups that take requests", ready_groups.clone());
        registry.register(
            "refused_groups",
            "Groups that this router refuses: of other releases, with invalid records or with other weights",
            refused_groups.clone(),
        );
        registry.register(
            "duplicate_groups",
            "Groups that are refused because another group has their name",
            duplicate_groups.clone(),
        );
        registry.register("indexed_blocks", "Distinct blocks in the prefix index", indexed_blocks.clone());
        registry.register("index_bytes", "Bytes that the prefix index takes", index_bytes.clone());
        let group_gauges = GroupGauges::new(&mut registry);
        let token_counter = |kind| tokens.get_or_create(&TokenLabels { kind }).clone();
        let encoded_counter = |kind| encoded.get_or_create(&TokenLabels { kind }).clone();
        let placement_counter =
            |reason: Reason| placements.get_or_create(&ReasonLabels { reason: reason.name() }).clone();
        let move_counter = |when| moves.get_or_create(&MoveLabels { when }).clone();
        Arc::new(Self {
            failed_over: [move_counter("before_first_token"), move_counter("mid_stream")],
            prompt_tokens: token_counter("prompt"),
            cached_tokens: token_counter("cached"),
            completion_tokens: token_counter("completion"),
            encoded_tokens: [encoded_counter("new"), encoded_counter("known")],
            conversation_cache_bytes,
            registry: Mutex::new(registry),
            requests,
            open_requests,
            unknown_fields,
            left_out_tools,
            ignored_efforts,
            unparsed_tool_calls,
            repairs,
            failed_sequences,
            poison_pills,
            refused_retries,
            queued_sequences,
            waited_seconds,
            waiting,
            waiting_tokens,
            unserved_requests,
            first_token_seconds,
            inter_token_seconds,
            predicted_first_token_seconds,
            placed_first_token_seconds,
            first_token_over_prediction,
            placements: Reason::ALL.map(placement_counter),
            prepare_seconds,
            groups,
            ready_groups,
            refused_groups,
            duplicate_groups,
            indexed_blocks,
            index_bytes,
            group_gauges,
            vllm: VllmMetrics::new(),
            others: Mutex::default(),
        })
    }

    /// A request arrived; its end is counted when the guard is dropped.
    pub fn request(self: &Arc<Self>, endpoint: &'static str) -> OpenRequest {
        self.open_requests.inc();
        OpenRequest { metrics: Arc::clone(self), endpoint, status: 499, span: None }
    }

    pub(crate) fn unknown_fields(&self, count: u32) {
        self.unknown_fields.inc_by(u64::from(count));
    }

    pub(crate) fn left_out_tools(&self, count: u32) {
        self.left_out_tools.inc_by(u64::from(count));
    }

    pub(crate) fn ignored_effort(&self) {
        self.ignored_efforts.inc();
    }

    pub(crate) fn unparsed_tool_call(&self) {
        self.unparsed_tool_calls.inc();
    }

    pub(crate) fn repaired(&self, repair: &'static str) {
        self.repairs.get_or_create(&RepairLabels { repair }).inc();
    }

    pub(crate) fn sequence_failed(&self) {
        self.failed_sequences.inc();
    }

    pub(crate) fn poison(&self) {
        self.poison_pills.inc();
    }

    pub(crate) fn retry_refused(&self) {
        self.refused_retries.inc();
    }

    pub(crate) fn queued(&self) {
        self.queued_sequences.inc();
    }

    pub(crate) fn waited(&self, seconds: f64) {
        self.waited_seconds.observe(seconds);
    }

    /// What stands in line; every known model has its series, so that a line that forms is seen to grow.
    fn waiting(&self, models: &BTreeSet<String>, queues: &HashMap<String, Queue>) {
        self.waiting.clear();
        self.waiting_tokens.clear();
        for model in models {
            let line = queues.get(model).copied().unwrap_or_default();
            for class in Class::ALL {
                let labels = LineLabels { model: model.clone(), class: class.name() };
                self.waiting.get_or_create(&labels).set(line.requests[class as usize] as i64);
                self.waiting_tokens.get_or_create(&labels).set(line.tokens[class as usize] as i64);
            }
        }
    }

    /// From now on the model is counted: a counter that is there at zero shows its first increase.
    pub(crate) fn know_model(&self, model: &str) {
        let _ = self.unserved_requests.get_or_create(&ModelLabels { model: model.to_owned() });
    }

    /// `model` is the name of a configured model or of one that groups announce, so that labels are bounded.
    pub(crate) fn unserved(&self, model: &str) {
        self.unserved_requests.get_or_create(&ModelLabels { model: model.to_owned() }).inc();
    }

    pub(crate) fn sequence_failed_over(&self, mid_stream: bool) {
        self.failed_over[usize::from(mid_stream)].inc();
    }

    /// Exports the metrics under vLLM's names, too, or does not.
    pub fn set_vllm_names(&self, enabled: bool) {
        self.vllm.set_enabled(enabled);
    }

    /// A sequence of the model ended.
    pub(crate) fn finished_sequence(&self, model: &str, finish: Finish) {
        self.vllm.finished_sequence(model, finish);
    }

    /// A request of the model ended after `seconds`, with these tokens.
    pub(crate) fn finished_request(&self, model: &str, seconds: f64, prompt: u64, cached: u64, completion: u64) {
        self.vllm.finished_request(model, seconds, prompt, completion);
        self.prompt_tokens.inc_by(prompt);
        self.cached_tokens.inc_by(cached);
        self.completion_tokens.inc_by(completion);
    }

    pub(crate) fn first_token(&self, model: &str, seconds: f64, trace: Option<&TraceContext>) {
        self.vllm.first_token(model, seconds);
        let exemplar = trace.filter(|trace| trace.sampled).map(|trace| Exemplar { trace_id: trace.trace_id_hex() });
        self.first_token_seconds.observe(seconds, exemplar, None);
    }

    /// Tokens came after the first ones.
    pub(crate) fn next_tokens(&self, model: &str, seconds: f64, tokens: usize) {
        let seconds = seconds / tokens.max(1) as f64;
        self.inter_token_seconds.observe(seconds);
        self.vllm.next_tokens(model, seconds);
    }

    pub(crate) fn placed(&self, reason: Reason) {
        self.placements[reason as usize].inc();
    }

    /// What became of the prediction of a placement.
    pub(crate) fn prediction(&self, predicted: f64, real: f64) {
        self.predicted_first_token_seconds.observe(predicted);
        self.placed_first_token_seconds.observe(real);
        if predicted > 0.0 {
            self.first_token_over_prediction.observe(real / predicted);
        }
    }

    pub(crate) fn prepared(&self, seconds: f64) {
        self.prepare_seconds.observe(seconds);
    }

    pub(crate) fn encoded(&self, tokens: usize, known: usize) {
        self.encoded_tokens[0].inc_by(tokens.saturating_sub(known) as u64);
        self.encoded_tokens[1].inc_by(known as u64);
    }

    pub(crate) fn conversation_cache(&self, bytes: usize) {
        self.conversation_cache_bytes.set(bytes as i64);
    }

    /// Lets other parts of the router add theirs.
    pub fn register(&self, add: impl FnOnce(&mut Registry)) {
        add(&mut self.registry.lock());
    }

    /// Another part of this process (a group beside the router) has metrics too: `/metrics` shows them from now on.
    pub fn add_source(&self, source: MetricsSource) {
        *self.others.lock() = Some(source);
    }

    /// Everything in OpenMetrics' text form, with what the system says of this process, the fleet and the requests in line as they are now.
    pub fn text(&self, fleet: &Fleet, models: &BTreeSet<String>, queues: &HashMap<String, Queue>) -> String {
        // held while the gauges of the groups are set: another scrape must not see half of them
        let registry = self.registry.lock();
        let view = fleet.view();
        self.groups.set(view.groups().count() as i64);
        self.ready_groups.set(view.groups().filter(|group| group.is_ready()).count() as i64);
        self.refused_groups.set(fleet.refused() as i64);
        self.duplicate_groups.set(fleet.duplicates() as i64);
        self.indexed_blocks.set(fleet.index.len() as i64);
        self.index_bytes.set(fleet.index.bytes() as i64);
        self.group_gauges.set(&view);
        self.waiting(models, queues);
        let mut text = String::new();
        // writing to a String can't fail
        let _ = encode_registry(&mut text, &registry);
        drop(registry);
        self.vllm.write(&mut text);
        if let Some(others) = &*self.others.lock() {
            text.push_str(&others());
        }
        telemetry::process::write(&mut text, env!("CARGO_PKG_VERSION"));
        telemetry::process::end(&mut text);
        text
    }
}

/// A request that is being served.
pub struct OpenRequest {
    metrics: Arc<Metrics>,
    endpoint: &'static str,
    status: u16,
    /// Ends with the request, where it is traced.
    pub(crate) span: Option<Span>,
}

impl OpenRequest {
    /// The status it was served with; without one the client left first (499).
    pub fn responded(&mut self, status: u16) {
        self.status = status;
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        self.metrics.open_requests.dec();
        let labels = RequestLabels { endpoint: self.endpoint, status: u32::from(self.status) };
        self.metrics.requests.get_or_create(&labels).inc();
        if let Some(mut span) = self.span.take() {
            span.set("http.response.status_code", i64::from(self.status));
            if self.status >= 500 || self.status == 499 {
                span.set("error.type", self.status.to_string());
                span.fail(if self.status == 499 { "the client left" } else { "" });
            }
            span.end();
        }
    }
}
