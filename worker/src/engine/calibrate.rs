//! How fast a group is, measured at its start: what its record says, and what chunks are cut by.

use std::time::Instant;

use bora_common::blocks::BLOCK_TOKENS;
use bora_common::registry::Speed;

use super::step::{Admission, RunError, Step, StepRunner, Tokens, Work};
use crate::sample::SamplingParams;

/// Steps of a kind that are timed; the fastest counts.
const REPEATS: usize = 3;
/// Context of the first attempt at timing attention.
const NEAR_CONTEXT: usize = 4_096;
/// Attention is timed well where it makes a step longer by this share.
const VISIBLE: f64 = 0.25;
/// No longer context is tried once a step takes this long.
const LONG_STEP_SECONDS: f64 = 0.5;

/// Times steps of an idle runner whose sequences may have `positions` positions: a prompt's first `chunk` tokens,
/// decode steps, and `chunk` tokens so far into a prompt that attention shows. Returns its speed and the number of
/// steps that it has run by then.
///
/// The far tokens attend to whatever the cache holds; nobody looks at what they say. A device's first step pays for
/// what later ones find ready, and is not counted.
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
    // the first chunk has its pairs with itself
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

    /// Seconds of `count` tokens of a new sequence after `context` tokens, as if those had been found in the cache.
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
        // token IDs below every vocabulary; which ones does not matter for the time
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
    fn a_fake_group_is_as_fast_as_it_was_told_to_be() {
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
        // the machine may be slow, never fast
        let share = speed.prefill_tokens_per_second / 20_000.0;
        assert!(share < 1.3 && share > 0.2, "{speed:?}");
        let share = speed.prefill_seconds_per_token_pair / 2e-7;
        assert!(share > 0.5 && share < 2.0, "{speed:?}");
        assert!(speed.decode_step_seconds >= 0.0099 && speed.decode_step_seconds < 0.05, "{speed:?}");
        // and it runs on from there
        runner.submit(Step { id: steps + 1, ..Step::default() }).unwrap();
        assert_eq!(runner.collect().unwrap().id, steps + 1);
    }

    #[test]
    fn a_tiny_cache_is_enough() {
        let mut runner = FakeRunner::new(FakeOptions { time_scale: 0.0, kv_blocks: 2, ..FakeOptions::default() });
        assert!(calibrate(&mut runner, 4096, 128).is_ok());
    }
}
