//! Decode steps and single prompts.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bora_proto::v1::generate_event::Event;
use bora_worker::engine::EventStream;
use futures::StreamExt as _;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{Bench, percentile, round, submit};

/// Steps that a decode figure is taken from, after those that are dropped.
const STEPS: usize = 64;
/// Steps dropped at the window's begin.
const DROPPED: usize = 4;
/// Fewer steps say nothing.
const MIN_STEPS: usize = 8;
/// A sequence that brings no id for so long is stuck.
const SILENCE: Duration = Duration::from_secs(120);
/// Prompt tokens that each step computes at least while others decode: sequences that were prefilled first continue
/// decoding until all are there, and need token IDs for that.
const SLOWEST_FILL: usize = 256;

/// One sequence's token IDs arrived.
struct Arrival {
    sequence: usize,
    at: Instant,
    ids: usize,
    ended: bool,
}

impl Bench {
    pub(super) async fn warm_up(&mut self) -> anyhow::Result<()> {
        let started = Instant::now();
        let mut streams = Vec::new();
        for count in [3000 / self.scale.min(8), 200, 200, 200] {
            let prompt = self.tokens(count);
            streams.push(submit(&self.engine, prompt, 16)?);
        }
        for stream in streams {
            read_to_end(stream).await?;
        }
        self.engine.flush().await?;
        self.out.line(json!({ "kind": "warmup", "s": round(started.elapsed().as_secs_f64(), 2) }))
    }

    /// Steady milliseconds a step with a sequence at each of `contexts`. A line names the longest, and the tokens of all where they
    /// differ.
    pub(super) async fn decode(&mut self, contexts: &[usize]) -> anyhow::Result<()> {
        let (batch, all) = (contexts.len(), contexts.iter().sum::<usize>());
        let context = contexts.iter().copied().max().unwrap_or(0);
        let kind = if all == batch * context { "decode" } else { "mixed" };
        let output = STEPS + 2 * DROPPED + all / SLOWEST_FILL / 2 + 24;
        let window = self.record.max_model_len as usize;
        let output = output.min(window.saturating_sub(context));
        let need = all + batch * (output + 2 * self.record.block_tokens as usize);
        let have = self.record.kv_blocks as usize * self.record.block_tokens as usize;
        if need > have || output <= STEPS {
            let skipped = format!("needs {need} KV tokens in a window of {window}, have {have}");
            return self.out.line(json!({ "kind": kind, "batch": batch, "ctx": context, "skipped": skipped }));
        }
        let prompts: Vec<_> = contexts.iter().map(|context| self.tokens(*context)).collect();
        let begun = Instant::now();
        let (sender, mut arrivals) = mpsc::channel(1024);
        let mut readers = JoinSet::new();
        for (sequence, prompt) in prompts.into_iter().enumerate() {
            readers.spawn(forward(sequence, submit(&self.engine, prompt, output)?, sender.clone()));
        }
        drop(sender);
        let mut started = vec![false; batch];
        let (mut missing, mut all_at) = (batch, None);
        let mut ids = Vec::new(); // when each id came, once all decode
        while let Ok(Some(arrival)) = tokio::time::timeout(SILENCE, arrivals.recv()).await {
            if all_at.is_some() {
                ids.extend(std::iter::repeat_n(arrival.at, arrival.ids));
            } else if arrival.ids > 0 && !std::mem::replace(&mut started[arrival.sequence], true) {
                missing -= 1;
                all_at = (missing == 0).then_some(arrival.at);
            }
            if arrival.ended || ids.len() >= (STEPS + 2 * DROPPED) * batch {
                break;
            }
        }
        // ends the sequences
        readers.shutdown().await;
        drop(arrivals);
        self.engine_is_idle().await;
        self.engine.flush().await?;
        // a step has ended when all its token IDs have come
        let marks: Vec<Instant> = ids.chunks_exact(batch).map(|step| step[batch - 1]).skip(DROPPED).collect();
        let fill = all_at.map(|at| at.duration_since(begun).as_secs_f64());
        let (Some(fill), Some(first), Some(last)) = (fill, marks.first(), marks.last()) else {
            return self.out.line(json!({
                "kind": kind, "batch": batch, "ctx": context, "error": format!("window too short: {} steps", marks.len()),
            }));
        };
        if marks.len() < MIN_STEPS {
            bail!("decode {batch} x {context}: only {} steps with all sequences", marks.len());
        }
        let steps = marks.len() - 1;
        let step = last.duration_since(*first).as_secs_f64() / steps as f64;
        let gaps: Vec<f64> = marks.windows(2).map(|pair| pair[1].duration_since(pair[0]).as_secs_f64()).collect();
        let milliseconds = |seconds: Option<f64>| seconds.map(|seconds| round(seconds * 1e3, 3));
        let floor = self.floors.map(|floors| floors.decode(batch, all / batch));
        self.out.line(json!({
            "kind": kind, "batch": batch, "ctx": context, "ctx_sum": all, "tpot_ms": round(step * 1e3, 3),
            "tok_s": round(batch as f64 / step, 1), "steps": steps,
            "gap_p50_ms": milliseconds(percentile(&gaps, 0.5)), "gap_p95_ms": milliseconds(percentile(&gaps, 0.95)),
            "fill_s": round(fill, 3), "fill_tok_s": round(all as f64 / fill, 1),
            "floor_ms": milliseconds(floor), "share": floor.map(|floor| round(floor / step, 3)),
        }))
    }

    /// Seconds from a prompt of `count` tokens to its first id.
    pub(super) async fn prefill(&mut self, count: usize, repetitions: usize) -> anyhow::Result<()> {
        let window = self.record.max_model_len as usize;
        if count + 1 > window {
            let skipped = format!("longer than the window of {window}");
            return self.out.line(json!({ "kind": "prefill", "tokens": count, "skipped": skipped }));
        }
        let mut seconds = Vec::new();
        for _ in 0..repetitions {
            let prompt = self.tokens(count);
            let started = Instant::now();
            read_to_end(submit(&self.engine, prompt, 1)?).await?;
            seconds.push(started.elapsed().as_secs_f64());
        }
        self.engine.flush().await?;
        let best = seconds.iter().copied().fold(f64::INFINITY, f64::min);
        let median = percentile(&seconds, 0.5).unwrap_or(best);
        let floor = self.floors.map(|floors| floors.prefill(0, count));
        let rounded: Vec<f64> = seconds.iter().map(|seconds| round(*seconds, 4)).collect();
        self.out.line(json!({
            "kind": "prefill", "tokens": count, "s": rounded, "best_s": round(best, 4),
            "tok_s": round(count as f64 / best, 1), "tok_s_median": round(count as f64 / median, 1),
            "floor_s": floor.map(|floor| round(floor, 4)), "share": floor.map(|floor| round(floor / best, 3)),
        }))
    }

    /// Seconds to the first id of prompts that come one after the other, and all of them once more.
    pub(super) async fn revisit(&mut self, prompts: usize, count: usize) -> anyhow::Result<()> {
        let prompts: Vec<_> = (0..prompts).map(|_| self.tokens(count)).collect();
        let mut passes = Vec::new();
        for _ in 0..2 {
            let mut seconds = Vec::new();
            for prompt in &prompts {
                let started = Instant::now();
                read_to_end(submit(&self.engine, prompt.clone(), 1)?).await?;
                seconds.push(started.elapsed().as_secs_f64());
            }
            passes.push(percentile(&seconds, 0.5).map(|seconds| round(seconds, 4)));
        }
        self.engine.flush().await?;
        self.out.line(json!({
            "kind": "revisit", "prompts": prompts.len(), "tokens": count, "first_p50_s": passes[0], "again_p50_s": passes[1],
        }))
    }

    /// Until what was aborted has left the engine.
    async fn engine_is_idle(&self) {
        for _ in 0..1000 {
            if self.engine.load().running == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

async fn forward(sequence: usize, mut stream: EventStream, arrivals: mpsc::Sender<Arrival>) {
    while let Some(event) = stream.next().await {
        let at = Instant::now();
        let (ids, ended) = match event.ok().and_then(|event| event.event) {
            Some(Event::Tokens(tokens)) => (tokens.token_ids.len(), false),
            Some(Event::Finished(_)) | None => (0, true),
            Some(_) => continue,
        };
        if arrivals.send(Arrival { sequence, at, ids, ended }).await.is_err() {
            return;
        }
    }
}

async fn read_to_end(mut stream: EventStream) -> anyhow::Result<()> {
    while let Some(event) = tokio::time::timeout(SILENCE, stream.next()).await.context("the engine is silent")? {
        event?;
    }
    Ok(())
}
