//! Metrics of requests under the names that vLLM exports, so that dashboards and gateways made for vLLM work with Bora.
//!
//! The router exports latencies, tokens and finished requests. A group exports its queue, its KV cache and its prefix
//! cache (`bora_worker::telemetry`). No quantity is exported by both, so a sum over all pods counts nothing twice.

use std::sync::atomic::{AtomicBool, Ordering};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode_registry},
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::Registry,
};

use super::{TOKEN_BUCKETS, WAIT_BUCKETS};
use crate::relay::emit::Finish;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelLabels {
    model_name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FinishLabels {
    model_name: String,
    finished_reason: &'static str,
}

/// One family for each of vLLM's metrics of requests, by model.
pub(super) struct VllmMetrics {
    registry: Registry,
    enabled: AtomicBool,
    time_to_first_token: Family<ModelLabels, Histogram>,
    inter_token_latency: Family<ModelLabels, Histogram>,
    request_latency: Family<ModelLabels, Histogram>,
    prompt_tokens: Family<ModelLabels, Counter>,
    generation_tokens: Family<ModelLabels, Counter>,
    finished_requests: Family<FinishLabels, Counter>,
}

impl VllmMetrics {
    pub(super) fn new() -> Self {
        let histogram = |buckets: fn() -> Histogram| Family::new_with_constructor(buckets);
        let mut registry = Registry::default();
        let metrics = Self {
            time_to_first_token: histogram(|| Histogram::new(WAIT_BUCKETS)),
            inter_token_latency: histogram(|| Histogram::new(TOKEN_BUCKETS)),
            request_latency: histogram(|| Histogram::new(WAIT_BUCKETS)),
            prompt_tokens: Family::default(),
            generation_tokens: Family::default(),
            finished_requests: Family::default(),
            enabled: AtomicBool::new(true),
            registry: Registry::default(),
        };
        registry.register(
            "vllm:time_to_first_token_seconds",
            "Time to first token of a request",
            metrics.time_to_first_token.clone(),
        );
        registry.register(
            "vllm:inter_token_latency_seconds",
            "Time between two tokens of a sequence",
            metrics.inter_token_latency.clone(),
        );
        registry.register(
            "vllm:e2e_request_latency_seconds",
            "Time from the arrival to the end of a request",
            metrics.request_latency.clone(),
        );
        registry.register("vllm:prompt_tokens", "Prompt tokens of finished requests", metrics.prompt_tokens.clone());
        registry.register(
            "vllm:generation_tokens",
            "Generated tokens of finished requests",
            metrics.generation_tokens.clone(),
        );
        registry.register("vllm:request_success", "Finished sequences by reason", metrics.finished_requests.clone());
        Self { registry, ..metrics }
    }

    pub(super) fn set_enabled(&self, enabled: bool) {
        self.enabled.store(enabled, Ordering::Relaxed);
    }

    pub(super) fn first_token(&self, model: &str, seconds: f64) {
        self.time_to_first_token.get_or_create(&labels(model)).observe(seconds);
    }

    pub(super) fn next_tokens(&self, model: &str, seconds: f64) {
        self.inter_token_latency.get_or_create(&labels(model)).observe(seconds);
    }

    pub(super) fn finished_sequence(&self, model: &str, finish: Finish) {
        let finished_reason = match finish {
            // vLLM's engine knows no tool calls: such a sequence ends with a stop token
            Finish::Stop | Finish::ToolCalls => "stop",
            Finish::Length => "length",
        };
        let labels = FinishLabels { model_name: model.to_owned(), finished_reason };
        self.finished_requests.get_or_create(&labels).inc();
    }

    pub(super) fn finished_request(&self, model: &str, seconds: f64, prompt_tokens: u64, generation_tokens: u64) {
        let labels = labels(model);
        self.request_latency.get_or_create(&labels).observe(seconds);
        self.prompt_tokens.get_or_create(&labels).inc_by(prompt_tokens);
        self.generation_tokens.get_or_create(&labels).inc_by(generation_tokens);
    }

    /// Appends OpenMetrics' text form, without its end.
    pub(super) fn write(&self, text: &mut String) {
        if self.enabled.load(Ordering::Relaxed) {
            // writing to a String can't fail
            let _ = encode_registry(text, &self.registry);
        }
    }
}

fn labels(model: &str) -> ModelLabels {
    ModelLabels { model_name: model.to_owned() }
}
