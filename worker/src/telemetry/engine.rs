//! Metrics of the engine: steps, their contents, and the ends of sequences.

use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::roofline::Rooflines;
use crate::engine::step::{Step, StepOutput, Tokens};

const STEP_BUCKETS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.0075, 0.01, 0.0125, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 5.0];
const WAIT_BUCKETS: [f64; 14] = [0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0];
const SIZE_BUCKETS: [f64; 15] =
    [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabels {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndLabels {
    end: &'static str,
}

/// How a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Finished,
    /// The caller disconnected.
    Aborted,
    Failed,
    /// The engine refused it.
    Refused,
}

impl End {
    fn name(self) -> &'static str {
        match self {
            End::Finished => "finished",
            End::Aborted => "aborted",
            End::Failed => "failed",
            End::Refused => "refused",
        }
    }
}

/// Contents of one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StepShape {
    /// Tokens computed for sequences that decode, draft tokens included.
    pub(crate) decoded_tokens: u64,
    /// Draft tokens among them.
    pub(crate) drafted_tokens: u64,
    pub(crate) prefilled_tokens: u64,
    pub(crate) sequences: u64,
    /// Tokens of KV cache that attention reads.
    pub(crate) context_tokens: u64,
    /// Pairs of tokens that prefill attention computes.
    pub(crate) pairs: u64,
}

impl StepShape {
    pub(crate) fn of(step: &Step) -> Self {
        let mut shape = Self { sequences: step.work.len() as u64, ..Self::default() };
        for work in &step.work {
            let (start, count) = (u64::from(work.start), work.tokens.count() as u64);
            shape.context_tokens += start + count;
            if work.drafts > 0 || work.tokens == Tokens::Sampled {
                shape.decoded_tokens += count;
                shape.drafted_tokens += u64::from(work.drafts);
            } else {
                shape.prefilled_tokens += count;
                shape.pairs += count * start + count * (count + 1) / 2;
            }
        }
        shape
    }

    fn kind(&self) -> &'static str {
        match (self.decoded_tokens, self.prefilled_tokens) {
            (_, 0) => "decode",
            (0, _) => "prefill",
            _ => "mixed",
        }
    }
}

/// Metrics of the engine, updated by the loop and by the service; registered when the group is ready.
pub(crate) struct EngineMetrics {
    step_seconds: Family<KindLabels, Histogram>,
    step_sequences: Histogram,
    step_tokens: Histogram,
    step_predicted_seconds: Counter<f64, AtomicU64>,
    step_floor_seconds: Counter<f64, AtomicU64>,
    rooflines: OnceLock<Rooflines>,
    tokens: Family<KindLabels, Counter>,
    drafted_tokens: Counter,
    accepted_tokens: Counter,
    queue_seconds: Histogram,
    prefill_seconds: Histogram,
    sequences: Family<EndLabels, Counter>,
    stored_blocks: Counter,
    evicted_blocks: Counter,
    mismatched_blocks: Counter,
    /// Prompt tokens looked up in the prefix cache.
    queried_tokens: Counter,
    /// Prompt tokens found in the prefix cache.
    hit_tokens: Counter,
}

impl Default for EngineMetrics {
    fn default() -> Self {
        Self {
            step_seconds: Family::new_with_constructor(|| Histogram::new(STEP_BUCKETS)),
            step_sequences: Histogram::new(SIZE_BUCKETS),
            step_tokens: Histogram::new(SIZE_BUCKETS),
            step_predicted_seconds: Counter::default(),
            step_floor_seconds: Counter::default(),
            rooflines: OnceLock::new(),
            tokens: Family::default(),
            drafted_tokens: Counter::default(),
            accepted_tokens: Counter::default(),
            queue_seconds: Histogram::new(WAIT_BUCKETS),
            prefill_seconds: Histogram::new(WAIT_BUCKETS),
            sequences: Family::default(),
            stored_blocks: Counter::default(),
            evicted_blocks: Counter::default(),
            mismatched_blocks: Counter::default(),
            queried_tokens: Counter::default(),
            hit_tokens: Counter::default(),
        }
    }
}

impl EngineMetrics {
    /// Sets the rooflines of the device.
    pub(crate) fn set_rooflines(&self, rooflines: Rooflines) {
        // set once, at the start
        let _ = self.rooflines.set(rooflines);
    }

    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register("step_seconds", "Time of a step on the device", self.step_seconds.clone());
        registry.register("step_sequences", "Sequences in a step", self.step_sequences.clone());
        registry.register("step_tokens", "Tokens in a step", self.step_tokens.clone());
        registry.register("step_predicted_seconds", "Predicted time of the steps", self.step_predicted_seconds.clone());
        if self.rooflines.get().is_some() {
            registry.register(
                "step_floor_seconds",
                "Lower bound of the time of the steps at the datasheet's rates",
                self.step_floor_seconds.clone(),
            );
        }
        registry.register(
            "tokens",
            "Tokens of prompts that were computed (prefill) or found in the prefix cache (cached), and sampled tokens (decode)",
            self.tokens.clone(),
        );
        registry.register("drafted_tokens", "Draft tokens that were verified", self.drafted_tokens.clone());
        registry.register("accepted_tokens", "Of those, the accepted ones", self.accepted_tokens.clone());
        registry.register("queue_seconds", "From a sequence's arrival to its first step", self.queue_seconds.clone());
        registry.register(
            "prefill_seconds",
            "From a sequence's first step to its first token",
            self.prefill_seconds.clone(),
        );
        registry.register("sequences", "Sequences that ended", self.sequences.clone());
        registry.register("stored_blocks", "Blocks stored in the prefix cache", self.stored_blocks.clone());
        registry.register("evicted_blocks", "Cached blocks that were evicted for room", self.evicted_blocks.clone());
        registry.register(
            "mismatched_blocks",
            "Cached blocks with the name of a requested block and another content, which were not used",
            self.mismatched_blocks.clone(),
        );
        // created at zero, so that the first increase is visible
        for end in [End::Finished, End::Aborted, End::Failed, End::Refused] {
            let _ = self.sequences.get_or_create(&EndLabels { end: end.name() });
        }
        for kind in ["prefill", "decode", "cached"] {
            let _ = self.tokens.get_or_create(&KindLabels { kind });
        }
        for kind in ["decode", "prefill", "mixed"] {
            let _ = self.step_seconds.get_or_create(&KindLabels { kind });
        }
    }

    /// Registers the metrics that vLLM's engine exports as well, under vLLM's names.
    pub(super) fn register_vllm_names(&self, registry: &mut Registry) {
        registry.register(
            "vllm:prefix_cache_queries",
            "Prompt tokens looked up in the prefix cache",
            self.queried_tokens.clone(),
        );
        registry.register(
            "vllm:prefix_cache_hits",
            "Prompt tokens that the prefix cache held",
            self.hit_tokens.clone(),
        );
    }

    /// Records a completed step.
    pub(crate) fn step(&self, shape: &StepShape, output: &StepOutput, predicted: f64) {
        let seconds = output.seconds;
        let sampled_tokens = output.sampled.iter().filter_map(|sampled| sampled.result.as_ref().ok());
        let (ids, sequences) =
            sampled_tokens.fold((0, 0), |(ids, count), sampled_tokens| (ids + sampled_tokens.len() as u64, count + 1));
        if shape.sequences == 0 {
            return;
        }
        self.step_seconds.get_or_create(&KindLabels { kind: shape.kind() }).observe(seconds);
        self.step_sequences.observe(shape.sequences as f64);
        self.step_tokens.observe((shape.decoded_tokens + shape.prefilled_tokens) as f64);
        self.step_predicted_seconds.inc_by(predicted.max(0.0));
        if let Some(rooflines) = self.rooflines.get() {
            self.step_floor_seconds.inc_by(rooflines.step(shape));
        }
        self.tokens.get_or_create(&KindLabels { kind: "decode" }).inc_by(ids);
        self.drafted_tokens.inc_by(shape.drafted_tokens);
        self.accepted_tokens.inc_by(ids.saturating_sub(sequences));
        self.tokens.get_or_create(&KindLabels { kind: "prefill" }).inc_by(shape.prefilled_tokens);
    }

    /// Records changes of the prefix cache.
    pub(crate) fn blocks(&self, stored: usize, evicted: usize, mismatched: u64) {
        self.stored_blocks.inc_by(stored as u64);
        self.evicted_blocks.inc_by(evicted as u64);
        self.mismatched_blocks.inc_by(mismatched);
    }

    /// Records that a sequence left the queue.
    pub(crate) fn started(&self, prompt_tokens: u32, cached_tokens: u32, queued_seconds: f64) {
        self.queried_tokens.inc_by(u64::from(prompt_tokens));
        self.hit_tokens.inc_by(u64::from(cached_tokens));
        self.tokens.get_or_create(&KindLabels { kind: "cached" }).inc_by(u64::from(cached_tokens));
        self.queue_seconds.observe(queued_seconds);
    }

    pub(crate) fn prefilled(&self, seconds: f64) {
        self.prefill_seconds.observe(seconds);
    }

    pub(crate) fn ended(&self, end: End) {
        self.sequences.get_or_create(&EndLabels { end: end.name() }).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::step::{Sampled, SampledToken, Work};

    #[test]
    fn distinguishes_prompts_from_decodes() {
        let work = |start, tokens| Work {
            slot: 0,
            start,
            tokens,
            new_blocks: Vec::new(),
            sample: true,
            drafts: 0,
            prompt_logprobs: None,
        };
        let step =
            Step { id: 1, work: vec![work(99, Tokens::Sampled), work(10, Tokens::Ids(vec![1; 4]))], ..Step::default() };
        let drafted = Work { drafts: 2, ..work(99, Tokens::Ids(vec![1; 3])) };
        let draft_matches = StepShape::of(&Step { id: 2, work: vec![drafted], ..Step::default() });
        assert_eq!(
            (draft_matches.decoded_tokens, draft_matches.drafted_tokens, draft_matches.kind()),
            (3, 2, "decode")
        );
        let shape = StepShape::of(&step);
        assert_eq!((shape.decoded_tokens, shape.prefilled_tokens, shape.sequences), (1, 4, 2));
        assert_eq!((shape.context_tokens, shape.pairs), (100 + 14, 40 + 10));
        assert_eq!(shape.kind(), "mixed");
        assert_eq!(StepShape { prefilled_tokens: 0, ..shape }.kind(), "decode");
        assert_eq!(StepShape { decoded_tokens: 0, ..shape }.kind(), "prefill");
    }

    #[test]
    fn exports_counters() {
        let metrics = EngineMetrics::default();
        let mut registry = Registry::with_prefix("w");
        metrics.register(&mut registry);
        let token = SampledToken { token_id: 1, logprobs: None };
        let sampled = vec![Sampled { slot: 0, result: Ok(vec![token.clone(), token]) }];
        let output = StepOutput { id: 1, sampled, seconds: 0.01, ..StepOutput::default() };
        let shape = StepShape { decoded_tokens: 4, drafted_tokens: 3, sequences: 1, ..StepShape::default() };
        metrics.step(&shape, &output, 0.02);
        metrics.started(100, 64, 0.5);
        metrics.ended(End::Aborted);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "w_step_seconds_count{kind=\"decode\"} 1",
            "w_tokens_total{kind=\"decode\"} 2",
            "w_drafted_tokens_total 3",
            "w_accepted_tokens_total 1",
            "w_tokens_total{kind=\"cached\"} 64",
            "w_sequences_total{end=\"aborted\"} 1",
            "w_sequences_total{end=\"failed\"} 0",
            "w_step_predicted_seconds_total 0.02",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("floor"), "unknown on this machine");
    }
}
