//! What is shown, made from two looks: how things stand, and what happened between the two.

use std::time::{SystemTime, UNIX_EPOCH};

use bora_common::registry::Device;
use bora_common::telemetry::exposition::{Family, Sample};

use super::ask::{Group, Look};
use super::table::Table;

/// Lines and tables, as text.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct View {
    /// Of the router and of what clients see.
    pub(super) summary: Vec<String>,
    pub(super) lines: Table,
    pub(super) groups: Table,
    pub(super) ranks: Table,
}

impl View {
    pub(super) fn new(before: &Look, now: &Look) -> Self {
        Self {
            summary: summary(before, now),
            lines: lines(now),
            groups: groups(before, now),
            ranks: ranks(before, now),
        }
    }

    pub(super) fn text(&self) -> String {
        let mut parts = vec![self.summary.join("\n")];
        let tables = [&self.lines, &self.groups, &self.ranks];
        parts.extend(tables.into_iter().filter(|table| !table.rows.is_empty()).map(Table::text));
        parts.join("\n\n") + "\n"
    }
}

fn family<'a>(look: &'a Look, name: &str) -> Option<&'a Family> {
    look.metrics.iter().find(|family| family.name == name)
}

/// The sum of a metric's samples that `of` chooses.
fn sum(look: &Look, name: &str, of: impl Fn(&Sample) -> bool) -> f64 {
    let samples = family(look, name).map(|family| family.samples.as_slice()).unwrap_or_default();
    samples.iter().filter(|sample| of(sample)).map(|sample| sample.value).sum()
}

/// Increase a second of a counter.
fn rate(before: &Look, now: &Look, name: &str, of: impl Fn(&Sample) -> bool) -> f64 {
    let seconds = (now.at - before.at).as_secs_f64().max(1e-3);
    let counted = |look| sum(look, name, |sample| sample.suffix == "_total" && of(sample));
    (counted(now) - counted(before)).max(0.0) / seconds
}

/// The quantile of what a histogram counted between two looks, or since the start where nothing came meanwhile.
fn quantile(before: &Look, now: &Look, name: &str, share: f64) -> Option<f64> {
    let buckets = |look: &Look| -> Vec<(f64, f64)> {
        let samples = family(look, name).map(|family| family.samples.clone()).unwrap_or_default();
        let of_bucket = samples.into_iter().filter(|sample| sample.suffix == "_bucket");
        of_bucket.filter_map(|sample| Some((bound(sample.label("le")?)?, sample.value))).collect()
    };
    let (earlier, later) = (buckets(before), buckets(now));
    let mut between: Vec<(f64, f64)> = later
        .iter()
        .enumerate()
        .map(|(at, (bound, count))| (*bound, count - earlier.get(at).map_or(0.0, |(_, count)| *count)))
        .collect();
    if between.last().is_none_or(|(_, count)| *count <= 0.0) {
        between = later;
    }
    let total = between.last()?.1;
    if total <= 0.0 {
        return None;
    }
    let wanted = total * share;
    let (mut low, mut below) = (0.0, 0.0);
    for (bound, count) in between {
        if count >= wanted {
            if bound.is_infinite() {
                return Some(low);
            }
            let within = if count > below { (wanted - below) / (count - below) } else { 1.0 };
            return Some(low + (bound - low) * within);
        }
        (low, below) = (bound, count);
    }
    None
}

fn bound(text: &str) -> Option<f64> {
    if text == "+Inf" { Some(f64::INFINITY) } else { text.parse().ok() }
}

fn summary(before: &Look, now: &Look) -> Vec<String> {
    let any = |_: &Sample| true;
    let kind = |wanted: &'static str| move |sample: &Sample| sample.label("kind") == Some(wanted);
    let ready = now.groups.iter().filter(|group| group.state() == "ready").count();
    let requests = rate(before, now, "bora_router_requests", any);
    let failed = rate(before, now, "bora_router_requests", |sample| {
        sample.label("status").is_some_and(|status| status.starts_with('5') || status == "429")
    });
    let (prompt, cached) = (
        rate(before, now, "bora_router_tokens", kind("prompt")),
        rate(before, now, "bora_router_tokens", kind("cached")),
    );
    let share = if prompt > 0.0 { format!(" ({:.0} % cached)", 100.0 * cached / prompt) } else { String::new() };
    let first = |share| seconds(quantile(before, now, "bora_router_time_to_first_token_seconds", share));
    let between = |share| seconds(quantile(before, now, "bora_router_inter_token_latency_seconds", share));
    let moved = sum(now, "bora_router_failovers", any);
    let cpu = rate(before, now, "process_cpu_seconds", any);
    vec![
        format!(
            "bora {} at {}: {ready} of {} groups ready, {} open requests, {:.0} blocks in the index",
            now.version,
            now.router,
            now.groups.len(),
            sum(now, "bora_router_open_requests", any),
            sum(now, "bora_router_indexed_blocks", any),
        ),
        format!(
            "requests {requests:.1}/s, refused or failed {failed:.1}/s   prompt tokens {prompt:.0}/s{share}   answer tokens {:.0}/s   sequences moved {moved:.0}",
            rate(before, now, "bora_router_tokens", kind("completion")),
        ),
        format!(
            "first token p50 {} p95 {}   between tokens p50 {} p95 {}   router {cpu:.2} cores, {}",
            first(0.5),
            first(0.95),
            between(0.5),
            between(0.95),
            bytes(sum(now, "process_resident_memory_bytes", any)),
        ),
    ]
}

/// Models whose requests wait in the router.
fn lines(now: &Look) -> Table {
    let mut rows = Vec::new();
    let samples =
        family(now, "bora_router_waiting_sequences").map(|family| family.samples.as_slice()).unwrap_or_default();
    for sample in samples.iter().filter(|sample| sample.value > 0.0) {
        let (model, class) = (sample.label("model").unwrap_or("?"), sample.label("class").unwrap_or("?"));
        rows.push(vec![format!("{model} {class}"), sample.value.to_string()]);
    }
    Table { head: vec!["LINE", "WAITING"], rows }
}

fn groups(before: &Look, now: &Look) -> Table {
    let head = vec![
        "GROUP", "MODEL", "STATE", "DEVICE", "RANKS", "RUN", "MAX", "WAIT", "QUEUE s", "KV %", "CACHED %", "STEPS/s",
        "UP", "VERSION",
    ];
    let rows = now.groups.iter().map(|group| {
        let (record, load) = (&group.record, &group.load);
        let known =
            before.groups.iter().find(|one| one.record.group == record.group && one.record.epoch == record.epoch);
        let share = |blocks: u32| match load.blocks_total {
            0 => "-".into(),
            total => format!("{:.0}", 100.0 * f64::from(blocks) / f64::from(total)),
        };
        let device = match record.device {
            Device::Cpu => "cpu",
            Device::Cuda => "cuda",
            Device::Fake => "fake",
        };
        vec![
            record.group.clone(),
            record.model.clone(),
            group.state().into(),
            device.into(),
            record.ranks.len().to_string(),
            load.running.to_string(),
            record.max_sequences.to_string(),
            load.waiting.to_string(),
            format!("{:.1}", load.queued_prefill_tokens as f64 / record.speed.prefill_tokens_per_second.max(1.0)),
            share(load.blocks_used),
            share(load.blocks_cached),
            known.map_or("-".into(), |known| steps(known, group, before, now)),
            age(record.epoch),
            record.version.clone(),
        ]
    });
    Table { rows: rows.collect(), head }
}

fn steps(known: &Group, group: &Group, before: &Look, now: &Look) -> String {
    per_second(known.load.steps, group.load.steps, before, now)
}

fn per_second(earlier: u64, later: u64, before: &Look, now: &Look) -> String {
    format!("{:.1}", later.saturating_sub(earlier) as f64 / (now.at - before.at).as_secs_f64().max(1e-3))
}

fn ranks(before: &Look, now: &Look) -> Table {
    let mut rows = Vec::new();
    for (group, ranks) in &now.ranks {
        for rank in ranks {
            let known = before.ranks.get(group).and_then(|ranks| ranks.iter().find(|one| one.rank == rank.rank));
            rows.push(vec![
                group.clone(),
                rank.rank.to_string(),
                rank.host.clone(),
                rank.pid.to_string(),
                rank.steps.to_string(),
                known.map_or("-".into(), |known| per_second(known.steps, rank.steps, before, now)),
            ]);
        }
    }
    Table { head: vec!["GROUP", "RANK", "HOST", "PID", "STEPS", "STEPS/s"], rows }
}

/// How long ago a group started: its epoch is the time of its start.
fn age(epoch: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    match now.saturating_sub(epoch) / 1000 {
        seconds @ 0..60 => format!("{seconds}s"),
        seconds @ 60..3_600 => format!("{}m", seconds / 60),
        seconds @ 3_600..172_800 => format!("{}h", seconds / 3_600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

fn seconds(value: Option<f64>) -> String {
    match value {
        None => "-".into(),
        Some(value) if value < 1.0 => format!("{:.1} ms", value * 1e3),
        Some(value) => format!("{value:.2} s"),
    }
}

fn bytes(value: f64) -> String {
    if value < 1e9 { format!("{:.0} MB", value / 1e6) } else { format!("{:.1} GB", value / 1e9) }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::{Duration, Instant};

    use bora_common::telemetry::exposition::parse;

    use super::*;

    fn look(at: Instant, metrics: &str) -> Look {
        Look {
            at,
            router: "here".into(),
            version: "1".into(),
            groups: Vec::new(),
            metrics: parse(metrics),
            ranks: BTreeMap::new(),
        }
    }

    #[test]
    fn rates_and_quantiles_are_of_what_happened_between_two_looks() {
        let at = Instant::now();
        let text = |count: u32, low: u32, all: u32| {
            format!(
                "# TYPE c counter\nc_total{{kind=\"a\"}} {count}\n# TYPE h histogram\nh_bucket{{le=\"1\"}} {low}\n\
                 h_bucket{{le=\"2\"}} {all}\nh_bucket{{le=\"+Inf\"}} {all}\n"
            )
        };
        let (before, now) = (look(at, &text(10, 100, 100)), look(at + Duration::from_secs(2), &text(16, 100, 110)));
        assert_eq!(rate(&before, &now, "c", |_| true), 3.0);
        assert_eq!(rate(&before, &now, "none", |_| true), 0.0);
        let median = quantile(&before, &now, "h", 0.5).unwrap();
        assert!((median - 1.5).abs() < 1e-9, "the ten new ones lie between 1 and 2: {median}");
        let quiet = quantile(&now, &now, "h", 0.5).unwrap();
        assert!((quiet - 0.55).abs() < 1e-9, "all 110 where none came: {quiet}");
        assert_eq!(quantile(&before, &now, "none", 0.5), None);
        assert!(View::new(&before, &now).text().contains("0 of 0 groups ready"));
    }
}
