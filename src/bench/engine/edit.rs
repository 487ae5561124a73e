//! Responses that repeat their prompt, as an agent's do that edits code: real source files, each asked for once more with a name
//! changed throughout. A model with random weights would say something else, so the response's token IDs are forced by a grammar; how they
//! are drafted, computed and verified is as in earnest. Reported apart from the baseline's workloads: those have random token IDs.

use std::time::Instant;

use anyhow::Context;
use bora_common::tokenizer::Tokenizer;
use bora_proto::v1::{GenerateRequest, Grammar, Sampling, Stopping, generate_event::Event, grammar};
use futures::StreamExt as _;
use serde_json::json;
use tokio::task::JoinSet;

use super::{Bench, round};

/// Source files of this repository, and the name that is changed in each.
const FILES: [(&str, &str, &str); 4] = [
    (include_str!("../../../worker/src/engine/run.rs"), "scheduler", "planner"),
    (include_str!("../../../worker/src/cache/pool.rs"), "idle", "parked"),
    (include_str!("../../../worker/src/schedule/admit.rs"), "sequence", "request"),
    (include_str!("../../../worker/src/sample/sampler.rs"), "logits", "scores"),
];
/// Ids of a response at most.
const MAX_ANSWER: usize = 1_500;

impl Bench {
    /// One file after the other, then all at once.
    pub(super) async fn edit(&mut self, tokenizer: Option<&Tokenizer>) -> anyhow::Result<()> {
        let Some(tokenizer) = tokenizer else {
            return self.out.line(json!({ "kind": "edit", "skipped": "needs --tokenizer" }));
        };
        let window = self.record.max_model_len as usize;
        let tasks: Vec<(Vec<u32>, Vec<u32>)> = FILES
            .iter()
            .map(|(file, name, other)| {
                let mut prompt = tokenizer.encode(&format!("Rename `{name}` to `{other}` in this file:\n\n{file}\n"));
                let mut response = tokenizer.encode(&file.replace(name, other));
                response.truncate((MAX_ANSWER / self.scale).max(16));
                prompt.truncate(window.saturating_sub(response.len()));
                (prompt, response)
            })
            .filter(|(prompt, response)| prompt.iter().chain(response).all(|id| *id < self.record.vocabulary_size))
            .collect();
        for at_once in [1, tasks.len()] {
            self.edit_files(&tasks, at_once).await?;
        }
        Ok(())
    }

    async fn edit_files(&mut self, tasks: &[(Vec<u32>, Vec<u32>)], at_once: usize) -> anyhow::Result<()> {
        let before = self.engine.load();
        let (mut tokens, mut steps, mut seconds) = (0, 0, 0.0);
        let started = Instant::now();
        for together in tasks.chunks(at_once.max(1)) {
            let mut responses = JoinSet::new();
            for (prompt, response) in together {
                let mut stream = self.engine.generate(forced(prompt, response))?;
                let expected = response.clone();
                responses.spawn(async move {
                    let mut ids = Vec::with_capacity(expected.len());
                    let mut timing = None;
                    while let Some(event) = stream.next().await {
                        match event?.event {
                            Some(Event::Tokens(tokens)) => ids.extend(tokens.token_ids),
                            Some(Event::Finished(finished)) => timing = finished.timing,
                            _ => {}
                        }
                    }
                    anyhow::ensure!(ids == expected, "the answer is not the one that the grammar forces");
                    Ok((ids.len(), timing.unwrap_or_default()))
                });
            }
            while let Some(response) = responses.join_next().await {
                let (count, timing) = response.context("an answer's task failed")??;
                tokens += count;
                steps += timing.steps as usize;
                seconds += timing.decode_seconds;
            }
        }
        let wall = started.elapsed().as_secs_f64();
        self.engine.flush().await?;
        let load = self.engine.load();
        let drafted = load.draft_tokens - before.draft_tokens;
        let accepted = load.accepted_draft_tokens - before.accepted_draft_tokens;
        self.out.line(json!({
            "kind": "edit", "files": tasks.len(), "at_once": at_once, "out_tokens": tokens, "steps": steps,
            "tokens_a_step": round(tokens as f64 / steps.max(1) as f64, 2), "tpot_ms": round(seconds * 1e3 / tokens.max(1) as f64, 3),
            "wall_s": round(wall, 3), "drafted": drafted, "accepted": accepted,
        }))
    }
}

/// A request whose response can only be these token IDs.
fn forced(prompt: &[u32], response: &[u32]) -> GenerateRequest {
    let ids: Vec<String> = response.iter().map(|id| format!("<[{id}]>")).collect();
    GenerateRequest {
        request_id: "bench".into(),
        token_ids: prompt.to_vec(),
        sampling: Some(Sampling { temperature: Some(0.0), ..Sampling::default() }),
        stopping: Some(Stopping { max_tokens: response.len() as u32, ignore_eos: true, ..Stopping::default() }),
        grammar: Some(Grammar { kind: grammar::Kind::Lark.into(), source: format!("start: {}", ids.join(" ")) }),
        ..GenerateRequest::default()
    }
}
