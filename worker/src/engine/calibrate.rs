//! How fast a group is, measured at its start: what its record says, and what chunks are cut by.

use std::time::Instant;

use bora_common::blocks::BLOCK_TOKENS;
use bora_common::registry::Speed;

use super::step::{Admission, RunError, Step, StepRunner, Tokens, Work};
use crate::sample::SamplingParams;

/// Decode steps timed; the fastest counts.
const DECODES: usize = 4;

/// Runs a prompt of two chunks of up to `chunk` tokens and a few decode steps through an idle runner that has at
/// least `blocks` blocks. Returns its speed and the number of steps that it has run by then.
///
/// The first chunk is run twice: a device's first step pays for what later ones find ready.
pub fn calibrate(runner: &mut dyn StepRunner, chunk: usize, blocks: usize) -> Result<(Speed, u64), RunError> {
    // two chunks and the decoded ids have to fit
    let room = (blocks * BLOCK_TOKENS).saturating_sub(DECODES + 1) / 2;
    let chunk = chunk.min(room).max(1);
    let mut probe = Probe { runner, steps: 0, position: 0, blocks: 0, release: false };
    probe.prompt(chunk, true)?;
    let first = probe.prompt(chunk, true)?;
    let second = probe.prompt(chunk, false)?;
    let mut decode = f64::INFINITY;
    for _ in 0..DECODES {
        decode = decode.min(probe.run(Tokens::Sampled, false)?);
    }
    probe.submit(Step { release: vec![0], ..Step::default() })?;
    // the first chunk has its pairs with itself (half of chunk^2), the second one chunk^2 more
    let tokens = chunk as f64;
    let per_pair = ((second - first) / (tokens * tokens)).max(0.0);
    let linear = (first - per_pair * tokens * tokens / 2.0).max(first * 0.1);
    let speed = Speed {
        prefill_tokens_per_second: tokens / linear.max(1e-9),
        prefill_seconds_per_token_pair: per_pair,
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
    /// Computes the next `count` tokens of the prompt, or the first ones of a new sequence; seconds.
    fn prompt(&mut self, count: usize, anew: bool) -> Result<f64, RunError> {
        // ids below every vocabulary; which ones does not matter for the time
        self.run(Tokens::Ids((0..count).map(|i| (i % 7) as u32).collect()), anew)
    }

    fn run(&mut self, tokens: Tokens, anew: bool) -> Result<f64, RunError> {
        let mut step = Step::default();
        if anew {
            if std::mem::replace(&mut self.release, true) {
                step.release.push(0);
            }
            (self.position, self.blocks) = (0, 0);
            step.admit.push(Admission {
                slot: 0,
                sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
                prompt_ids: Vec::new(),
                generated_ids: Vec::new(),
            });
        }
        let start = self.position;
        self.position += tokens.count();
        let blocks = self.position.div_ceil(BLOCK_TOKENS);
        step.work.push(Work {
            slot: 0,
            start: start as u32,
            tokens,
            new_blocks: (self.blocks as u32..blocks as u32).collect(),
            sample: true,
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
        let (speed, steps) = calibrate(&mut runner, 1024, 100).unwrap();
        assert_eq!(steps, 8);
        // the machine may be slow, never fast
        let share = speed.prefill_tokens_per_second / 20_000.0;
        assert!(share < 1.3 && share > 0.2, "{speed:?}");
        assert!(speed.decode_step_seconds >= 0.0099 && speed.decode_step_seconds < 0.05, "{speed:?}");
        // and it runs on from there
        runner.submit(Step { id: steps + 1, ..Step::default() }).unwrap();
        assert_eq!(runner.collect().unwrap().id, steps + 1);
    }

    #[test]
    fn a_tiny_cache_is_enough() {
        let mut runner = FakeRunner::new(FakeOptions { time_scale: 0.0, kv_blocks: 2, ..FakeOptions::default() });
        assert!(calibrate(&mut runner, 4096, 2).is_ok());
    }
}
