//! Measures the speed of a group at its start. The group's record announces the speed, and the scheduler sizes chunks
//! by it.

use std::time::Instant;

use bora_common::blocks::BLOCK_TOKENS;
use bora_common::registry::Speed;

use super::step::{Admission, RunError, Step, StepRunner, Tokens, Work};
use crate::sample::SamplingParams;

/// Timed steps of each kind; the fastest counts.
const REPEATS: usize = 3;
/// Context of the first attempt to time attention.
const NEAR_CONTEXT: usize = 4_096;
/// Attention is timed reliably if it makes a step longer by this share.
const VISIBLE: f64 = 0.25;
/// Longer contexts are not tried after a step takes this long.
const LONG_STEP_SECONDS: f64 = 0.5;

/// Times steps of an idle runner whose sequences may have `positions` positions: the first `chunk` tokens of a prompt,
/// decode steps, and `chunk` tokens after a context that is long enough for attention to be measurable. Returns the
/// speed and the number of steps that were run.
///
/// The tokens after a long context attend to arbitrary cache contents; their output is ignored. The first step
/// of the device is a warm-up and is not counted.
pub fn calibrate(runner: &mut dyn StepRunner, chunk: usize, positions: usize) -> Result<(Speed, u64), RunError> {
    let chunk = chunk.min(positions.saturating_sub(REPEATS)).max(1);
    let mut probe = Probe { runner, steps: 0, position: 0, blocks: 0, release: false };
    probe.prompt(chunk, 0)?;
    let first = probe.fastest_prompt(chunk, 0)?;
    let mut decode = f64::INFINITY;
    for _ in 0..REPEATS {
        decode = decode.min(probe.run(Tokens::Sampled)?);
    }
    let farthest = positions.saturating_sub(chunk) / BLOCK_TOKENS * BLOCK_TOKENS;
    let mut context = NEAR_CONTEXT.min(farthest);
    let mut seconds_per_pair = 0.0;
    while context > 0 {
        let far = probe.fastest_prompt(chunk, context)?;
        seconds_per_pair = ((far - first) / (chunk * context) as f64).max(0.0);
        if context == farthest || far > first * (1.0 + VISIBLE) || far > LONG_STEP_SECONDS {
            break;
        }
        context = (context * 4).min(farthest);
    }
    probe.submit(Step { release: vec![0], ..Step::default() })?;
    let tokens = chunk as f64;
    // the first chunk includes the attention of its own tokens to each other
    let linear = (first - seconds_per_pair * tokens * tokens / 2.0).max(first * 0.1);
    let speed = Speed {
        prefill_tokens_per_second: tokens / linear.max(1e-9),
        prefill_seconds_per_token_pair: seconds_per_pair,
        decode_step_seconds: decode,
    };
    Ok((speed, probe.steps))
}

/// One sequence in slot 0.
struct Probe<'a> {
    runner: &'a mut dyn StepRunner,
    steps: u64,
    position: usize,
    blocks: usize,
    release: bool,
}

impl Probe<'_> {
    fn fastest_prompt(&mut self, count: usize, context: usize) -> Result<f64, RunError> {
        let mut fastest = f64::INFINITY;
        for _ in 0..REPEATS {
            fastest = fastest.min(self.prompt(count, context)?);
        }
        Ok(fastest)
    }

    /// Seconds of `count` tokens of a new sequence after `context` tokens, as if the context had been found in the
    /// cache.
    fn prompt(&mut self, count: usize, context: usize) -> Result<f64, RunError> {
        let mut step = Step::default();
        if std::mem::replace(&mut self.release, true) {
            step.release.push(0);
        }
        (self.position, self.blocks) = (context, 0);
        step.admit.push(Admission {
            slot: 0,
            sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
            prompt_ids: Vec::new(),
            generated_ids: Vec::new(),
        });
        // token IDs below every vocabulary size; the values do not matter for the time
        self.work(step, Tokens::Ids((0..count).map(|i| (i % 7) as u32).collect()))
    }

    fn run(&mut self, tokens: Tokens) -> Result<f64, RunError> {
        self.work(Step::default(), tokens)
    }

    fn work(&mut self, mut step: Step, tokens: Tokens) -> Result<f64, RunError> {
        let start = self.position;
        self.position += tokens.count();
        let blocks = self.position.div_ceil(BLOCK_TOKENS);
        step.work.push(Work {
            slot: 0,
            start: start as u32,
            tokens,
            new_blocks: (self.blocks as u32..blocks as u32).collect(),
            sample: true,
            drafts: 0,
            prompt_logprobs: None,
        });
        self.blocks = blocks;
        self.submit(step)
    }

    fn submit(&mut self, mut step: Step) -> Result<f64, RunError> {
        self.steps += 1;
        step.id = self.steps;
        let started = Instant::now();
        self.runner.submit(step)?;
        self.runner.collect()?;
        Ok(started.elapsed().as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::fake::{FakeOptions, FakeRunner};

    #[test]
    fn measures_the_configured_speed_of_a_fake_group() {
        let options = FakeOptions {
            prefill_tokens_per_second: 20_000.0,
            prefill_seconds_per_token_pair: 2e-7,
            decode_step_seconds: 0.01,
            decode_seconds_per_sequence: 0.0,
            ..FakeOptions::default()
        };
        let mut runner = FakeRunner::new(options);
        let (speed, steps) = calibrate(&mut runner, 1024, 6_400).unwrap();
        assert_eq!(steps, 11);
        // a slow machine may be slower than configured, never faster
        let share = speed.prefill_tokens_per_second / 20_000.0;
        assert!(share < 1.3 && share > 0.2, "{speed:?}");
        let share = speed.prefill_seconds_per_token_pair / 2e-7;
        assert!(share > 0.5 && share < 2.0, "{speed:?}");
        assert!(speed.decode_step_seconds >= 0.0099 && speed.decode_step_seconds < 0.05, "{speed:?}");
        // the engine continues from this step
        runner.submit(Step { id: steps + 1, ..Step::default() }).unwrap();
        assert_eq!(runner.collect().unwrap().id, steps + 1);
    }

    #[test]
    fn fits_into_a_tiny_cache() {
        let mut runner = FakeRunner::new(FakeOptions { time_scale: 0.0, kv_blocks: 2, ..FakeOptions::default() });
        assert!(calibrate(&mut runner, 4096, 128).is_ok());
    }
}
