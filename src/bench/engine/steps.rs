//! What kinds of steps a workload took, read from the engine's metrics as anybody would.

use serde_json::{Map, Value, json};

use super::{Workload, round};

/// Kinds of steps as the metrics name them.
const KINDS: [&str; 3] = ["decode", "mixed", "prefill"];

/// Counts of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Kind {
    steps: f64,
    seconds: f64,
}

/// Everything since the engine started.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Steps {
    kinds: [Kind; KINDS.len()],
    prompt_tokens: f64,
    decoded_tokens: f64,
}

impl Steps {
    /// Of a worker's metrics in OpenMetrics' text form.
    pub(super) fn of(text: &str) -> Self {
        let mut steps = Self::default();
        for line in text.lines() {
            let Some((series, value)) = line.rsplit_once(' ') else { continue };
            let (Some((name, _)), Ok(value)) = (series.split_once('{'), value.parse::<f64>()) else { continue };
            let Some(kind) = series.split_once("kind=\"").and_then(|(_, rest)| rest.split('"').next()) else {
                continue;
            };
            match name {
                "bora_worker_step_seconds_count" | "bora_worker_step_seconds_sum" => {
                    let Some(index) = KINDS.iter().position(|known| *known == kind) else { continue };
                    let of_kind = &mut steps.kinds[index];
                    *(if name.ends_with("sum") { &mut of_kind.seconds } else { &mut of_kind.steps }) = value;
                }
                "bora_worker_tokens_total" if kind == "prefill" => steps.prompt_tokens = value,
                "bora_worker_tokens_total" if kind == "decode" => steps.decoded_tokens = value,
                _ => {}
            }
        }
        steps
    }

    pub(super) fn since(mut self, before: &Self) -> Self {
        for (now, then) in self.kinds.iter_mut().zip(&before.kinds) {
            now.steps -= then.steps;
            now.seconds -= then.seconds;
        }
        self.prompt_tokens -= before.prompt_tokens;
        self.decoded_tokens -= before.decoded_tokens;
        self
    }

    /// As a line of the results.
    pub(super) fn line(&self, workload: Workload) -> Value {
        let mut line = Map::new();
        line.insert("kind".into(), "steps".into());
        line.insert("workload".into(), json!(workload));
        for (name, kind) in KINDS.iter().zip(&self.kinds) {
            line.insert((*name).to_owned(), json!({ "steps": kind.steps, "s": round(kind.seconds, 3) }));
        }
        line.insert("prompt_tokens".into(), json!(self.prompt_tokens));
        line.insert("decoded_tokens".into(), json!(self.decoded_tokens));
        Value::Object(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_read_from_the_metrics_and_taken_from_each_other() {
        let text = |decode: u32, seconds: f64, tokens: u32| {
            format!(
                "# TYPE bora_worker_step_seconds histogram\n\
                 bora_worker_step_seconds_count{{model=\"m\",group=\"g\",kind=\"decode\"}} {decode}\n\
                 bora_worker_step_seconds_sum{{model=\"m\",group=\"g\",kind=\"decode\"}} {seconds}\n\
                 bora_worker_step_seconds_bucket{{model=\"m\",kind=\"decode\",le=\"1\"}} 7\n\
                 bora_worker_tokens_total{{model=\"m\",kind=\"prefill\"}} {tokens}\n\
                 bora_worker_running 3\n# EOF\n"
            )
        };
        let steps = Steps::of(&text(12, 0.5, 900)).since(&Steps::of(&text(2, 0.25, 100)));
        let line = steps.line(Workload::Agentic);
        assert_eq!(line["workload"], "agentic");
        assert_eq!(line["decode"], json!({ "steps": 10.0, "s": 0.25 }));
        assert_eq!(line["prefill"], json!({ "steps": 0.0, "s": 0.0 }));
        assert_eq!(line["prompt_tokens"], 800.0);
    }
}
