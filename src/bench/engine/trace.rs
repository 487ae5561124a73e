//! Workloads of many sequences: conversations of an agent, and a pile of prompts.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use bora_proto::v1::generate_event::Event;
use bora_worker::engine::EngineHandle;
use futures::StreamExt as _;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::{Bench, percentile, round, submit};

/// A workload that is not done by then is broken off, as in the baseline.
const LONGEST: Duration = Duration::from_secs(120);

/// What was seen of all sequences.
#[derive(Default)]
struct Seen {
    first: Vec<f64>,
    per_token: Vec<f64>,
    gaps: Vec<f64>,
    whole: Vec<f64>,
    prompt_tokens: usize,
    cached_tokens: usize,
    output_tokens: usize,
    requests: usize,
    /// Seconds that the uncached prompt tokens take at the machine's rates.
    floor: f64,
}

impl Bench {
    /// `count` prompts at once, of `input` tokens of which the first `shared` are equal.
    pub(super) async fn throughput(
        &mut self,
        count: usize,
        shared: usize,
        input: usize,
        output: usize,
    ) -> anyhow::Result<()> {
        let prefix = self.tokens(shared);
        let prompts: Vec<Vec<u32>> = (0..count)
            .map(|_| {
                let mut prompt = prefix.clone();
                prompt.extend(self.tokens(input - shared));
                prompt
            })
            .collect();
        let turns = prompts.into_iter().map(|prompt| (prompt, Vec::new())).collect();
        let info = json!({ "n_req": count, "n_in": input, "shared_prefix": shared, "n_out": output });
        self.trace("throughput", turns, output, info).await
    }

    /// `count` conversations of `turns` turns: each turn's prompt is the last one, its response, and `more` new tokens.
    pub(super) async fn agentic(
        &mut self,
        count: usize,
        turns: usize,
        start: usize,
        more: usize,
        output: usize,
    ) -> anyhow::Result<()> {
        let conversations = (0..count)
            .map(|_| (self.tokens(start), (1..turns).map(|_| self.tokens(more)).collect::<Vec<_>>()))
            .collect();
        let info = json!({ "convs": count, "turns": turns, "start": start, "add": more, "n_out": output });
        self.trace("agentic", conversations, output, info).await
    }

    /// Runs conversations side by side: a first prompt, and what each later turn adds.
    async fn trace(
        &mut self,
        kind: &str,
        conversations: Vec<(Vec<u32>, Vec<Vec<u32>>)>,
        output: usize,
        info: Value,
    ) -> anyhow::Result<()> {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let floors = self.floors;
        let started = Instant::now();
        let mut tasks = JoinSet::new();
        for (prompt, additions) in conversations {
            let (engine, seen) = (self.engine.clone(), seen.clone());
            let floor = move |context, tokens| floors.map_or(0.0, |floors| floors.prefill(context, tokens));
            tasks.spawn(async move { converse(&engine, prompt, additions, output, &seen, floor).await });
        }
        let all = async {
            while let Some(ended) = tasks.join_next().await {
                ended.context("a conversation's task failed")??;
            }
            anyhow::Ok(())
        };
        let truncated = match tokio::time::timeout(LONGEST, all).await {
            Ok(outcome) => outcome.map(|()| false)?,
            Err(_) => true,
        };
        let wall = started.elapsed().as_secs_f64();
        tasks.shutdown().await;
        self.engine.flush().await?;
        let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        let seconds = |values: &[f64], q| percentile(values, q).map(|seconds| round(seconds, 4));
        let total = (seen.prompt_tokens + seen.output_tokens) as f64;
        let mut line = json!({
            "kind": kind, "wall_s": round(wall, 3), "truncated": truncated, "requests_done": seen.requests,
            "prompt_tokens": seen.prompt_tokens, "cached_tokens": seen.cached_tokens, "out_tokens": seen.output_tokens,
            "out_tok_s": round(seen.output_tokens as f64 / wall, 1), "total_tok_s": round(total / wall, 1),
            "req_s": round(seen.requests as f64 / wall, 3),
            "ttft_p50_s": seconds(&seen.first, 0.5), "ttft_p95_s": seconds(&seen.first, 0.95),
            "tpot_p50_s": seconds(&seen.per_token, 0.5), "tpot_p95_s": seconds(&seen.per_token, 0.95),
            "itl_p50_s": seconds(&seen.gaps, 0.5), "itl_p99_s": seconds(&seen.gaps, 0.99),
            "e2e_p50_s": seconds(&seen.whole, 0.5), "e2e_p95_s": seconds(&seen.whole, 0.95),
            // arithmetic of the uncached prompt tokens alone
            "prefill_floor_s": self.floors.map(|_| round(seen.floor, 2)),
        });
        if let (Value::Object(line), Value::Object(info)) = (&mut line, info) {
            line.extend(info);
        }
        drop(seen);
        self.out.line(line)
    }
}

async fn converse(
    engine: &EngineHandle,
    mut prompt: Vec<u32>,
    additions: Vec<Vec<u32>>,
    output: usize,
    seen: &Mutex<Seen>,
    floor: impl Fn(usize, usize) -> f64,
) -> anyhow::Result<()> {
    let mut additions = additions.into_iter();
    loop {
        let asked = Instant::now();
        let mut stream = submit(engine, prompt.clone(), output)?;
        let (mut first, mut last, mut of_first) = (None, asked, 0);
        let mut gaps = Vec::new();
        let mut response = Vec::new();
        let mut cached = 0;
        while let Some(event) = stream.next().await {
            match event?.event {
                Some(Event::Tokens(tokens)) => {
                    let now = Instant::now();
                    if first.is_none() {
                        (first, of_first) = (Some(now), tokens.token_ids.len());
                    } else {
                        gaps.push(now.duration_since(last).as_secs_f64() / tokens.token_ids.len() as f64);
                    }
                    last = now;
                    response.extend(tokens.token_ids);
                }
                Some(Event::Finished(finished)) => cached = finished.cached_tokens as usize,
                _ => {}
            }
        }
        let ended = Instant::now();
        {
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(first) = first {
                seen.first.push(first.duration_since(asked).as_secs_f64());
                let rest = response.len() - of_first;
                if rest > 0 {
                    seen.per_token.push(last.duration_since(first).as_secs_f64() / rest as f64);
                }
            }
            seen.gaps.extend(gaps);
            seen.whole.push(ended.duration_since(asked).as_secs_f64());
            seen.prompt_tokens += prompt.len();
            seen.cached_tokens += cached;
            seen.output_tokens += response.len();
            seen.requests += 1;
            seen.floor += floor(cached, prompt.len() - cached);
        }
        let Some(more) = additions.next() else { return Ok(()) };
        prompt.extend(response);
        prompt.extend(more);
    }
}
