//! What the router knows of each group, as gauges at `/metrics`: how long the queue is in the cost model's own
//! seconds, how full the KV cache is. Autoscalers, alerts and dashboards read these.
//!
//! All routers report the same of a group (it reported them), so a query takes the `max` over routers before it adds
//! up groups. A group that is gone is gone from here: the label values are those of the groups known now.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{family::Family, gauge::Gauge},
    registry::Registry,
};
use std::sync::atomic::AtomicU64;

use super::view::View;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GroupLabels {
    model: String,
    group: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BlockLabels {
    model: String,
    group: String,
    state: &'static str,
}

/// One gauge a group.
pub struct GroupGauges {
    ready: Family<GroupLabels, Gauge>,
    announced: Family<GroupLabels, Gauge>,
    responding: Family<GroupLabels, Gauge>,
    draining: Family<GroupLabels, Gauge>,
    running: Family<GroupLabels, Gauge>,
    waiting: Family<GroupLabels, Gauge>,
    max_sequences: Family<GroupLabels, Gauge>,
    queued_prefill_tokens: Family<GroupLabels, Gauge>,
    queued_prefill_seconds: Family<GroupLabels, Gauge<f64, AtomicU64>>,
    prefill_rate: Family<GroupLabels, Gauge<f64, AtomicU64>>,
    kv_blocks: Family<BlockLabels, Gauge>,
    steps: Family<GroupLabels, Gauge>,
}

impl GroupGauges {
    /// Adds them, without a group, to `registry`.
    pub fn new(registry: &mut Registry) -> Self {
        let gauges = Self {
            ready: Family::default(),
            announced: Family::default(),
            responding: Family::default(),
            draining: Family::default(),
            running: Family::default(),
            waiting: Family::default(),
            max_sequences: Family::default(),
            queued_prefill_tokens: Family::default(),
            queued_prefill_seconds: Family::default(),
            prefill_rate: Family::default(),
            kv_blocks: Family::default(),
            steps: Family::default(),
        };
        registry.register("group_ready", "1 where the group takes requests", gauges.ready.clone());
        registry.register("group_announced", "1 if the registry lists the group", gauges.announced.clone());
        registry.register("group_responding", "1 if the group reports its state", gauges.responding.clone());
        registry.register(
            "group_draining",
            "1 if the group was drained and takes no requests until it is resumed or ends",
            gauges.draining.clone(),
        );
        registry.register("group_running_sequences", "Sequences that run on the group", gauges.running.clone());
        registry.register("group_waiting_sequences", "Sequences that wait in the group", gauges.waiting.clone());
        registry.register(
            "group_max_sequences",
            "Sequences that run on the group at once",
            gauges.max_sequences.clone(),
        );
        registry.register(
            "group_queued_prefill_tokens",
            "Prompt tokens that the group has not computed yet",
            gauges.queued_prefill_tokens.clone(),
        );
        registry.register(
            "group_queued_prefill_seconds",
            "The same in seconds of the group's measured prefill rate, as placement counts them",
            gauges.queued_prefill_seconds.clone(),
        );
        registry.register(
            "group_prefill_tokens_per_second",
            "Prompt tokens that the group computes per second, as measured at its start",
            gauges.prefill_rate.clone(),
        );
        registry.register(
            "group_kv_blocks",
            "Blocks of KV cache: used by running sequences, cached (free, but found again) and free",
            gauges.kv_blocks.clone(),
        );
        registry.register("group_steps", "Steps that the group has run since its start", gauges.steps.clone());
        gauges
    }

    /// Takes the groups as they are now.
    pub fn set(&self, view: &View) {
        self.clear();
        for group in view.groups() {
            let labels = GroupLabels { model: group.record.model.clone(), group: group.record.group.clone() };
            let (update, busy) = (group.link.load_tracker.reported(), group.link.load_tracker.busy());
            let rate = group.record.speed.prefill_tokens_per_second.max(1.0);
            self.ready.get_or_create(&labels).set(i64::from(group.is_ready()));
            self.announced.get_or_create(&labels).set(i64::from(group.link.is_announced()));
            self.responding.get_or_create(&labels).set(i64::from(group.link.is_responding()));
            self.draining.get_or_create(&labels).set(i64::from(group.is_draining()));
            self.running.get_or_create(&labels).set(i64::from(update.running));
            self.waiting.get_or_create(&labels).set(i64::from(update.waiting));
            self.max_sequences.get_or_create(&labels).set(i64::from(group.record.max_sequences));
            self.queued_prefill_tokens.get_or_create(&labels).set(busy.queued_tokens as i64);
            self.queued_prefill_seconds.get_or_create(&labels).set(busy.queued_tokens as f64 / rate);
            self.prefill_rate.get_or_create(&labels).set(group.record.speed.prefill_tokens_per_second);
            self.steps.get_or_create(&labels).set(update.steps as i64);
            let free = update.blocks_total.saturating_sub(update.blocks_used).saturating_sub(update.blocks_cached);
            for (state, blocks) in [("used", update.blocks_used), ("cached", update.blocks_cached), ("free", free)] {
                let labels = BlockLabels { model: labels.model.clone(), group: labels.group.clone(), state };
                self.kv_blocks.get_or_create(&labels).set(i64::from(blocks));
            }
        }
    }

    fn clear(&self) {
        let families = [
            &self.ready,
            &self.announced,
            &self.responding,
            &self.draining,
            &self.running,
            &self.waiting,
            &self.max_sequences,
            &self.queued_prefill_tokens,
            &self.steps,
        ];
        for family in families {
            family.clear();
        }
        self.queued_prefill_seconds.clear();
        self.prefill_rate.clear();
        self.kv_blocks.clear();
    }
}
