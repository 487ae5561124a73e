//! The engine below the scheduler at a real model's shape with random weights: start, decode steps at several
//! batch sizes and contexts, prefill. Tokens in and out through the same runner that serves.

use std::path::Path;
use std::time::Instant;

use bora_common::blocks::BLOCK_TOKENS;
use bora_common::model::ModelConfig;
use serde_json::json;

use super::super::{CudaBackend, CudaOptions, survey};
use super::Outcome;
use super::p2p_all_reduce::PeerFigures;
use super::reference::{Random, median};
use crate::backend::KvDtype;
use crate::backend::{Backend, KvBudget, Limits, RankSetup};
use crate::engine::runner::{Bounds, ModelRunner};
use crate::engine::step::{Admission, Step, StepRunner, Tokens, Work};
use crate::model::{KvShape, Ministral3};
use crate::parallel::SingleRank;
use crate::sample::SamplingParams;
use crate::weights::{ShardPlan, Weights};

type Failure = Box<dyn std::error::Error>;

/// Decode steps that are timed: (batch, context).
const DECODE: [(usize, usize); 7] =
    [(1, 1024), (8, 1024), (32, 1024), (64, 1024), (128, 1024), (1, 32_768), (4, 32_768)];
/// Prompts that are timed, in tokens.
const PREFILL: [usize; 2] = [8192, 32_768];
const CHUNK: usize = 8192;
const WARM_STEPS: usize = 8;
const TIMED_STEPS: usize = 64;

pub(super) fn run(config: Option<&Path>, only: &str, report: &mut dyn FnMut(Outcome)) {
    let Some(config) = config else {
        return report(Outcome::failure("engine", "--config FOLDER is needed: a model's config.json"));
    };
    for options in [
        CudaOptions::default(),
        CudaOptions { overlap: false, ..CudaOptions::default() },
        CudaOptions { kv: KvDtype::Fp8, ..CudaOptions::default() },
    ] {
        let name = format!("kv {}{}", options.kv.name(), if options.overlap { "" } else { ", no overlap" });
        if name.contains(only)
            && let Err(error) = measure(config, &name, options, report)
        {
            report(Outcome::failure(format!("engine, {name}"), error));
        }
    }
}

struct Driver {
    runner: ModelRunner<CudaBackend>,
    random: Random,
    step: u64,
    next_block: u32,
    blocks: usize,
    vocabulary: usize,
    live: Vec<u32>,
}

impl Driver {
    fn ids(&mut self, count: usize) -> Vec<u32> {
        (0..count).map(|_| 1000 + self.random.below(self.vocabulary - 1000) as u32).collect()
    }

    fn submit(&mut self, admit: Vec<Admission>, work: Vec<Work>) -> Result<(), Failure> {
        self.step += 1;
        let release = std::mem::take(&mut self.live);
        let release = if admit.is_empty() {
            self.live = release;
            Vec::new()
        } else {
            release
        };
        self.live.extend(admit.iter().map(|admission| admission.slot));
        Ok(self.runner.submit(Step { id: self.step, release, admit, work, ..Step::default() })?)
    }

    /// `batch` prompts of `context` random tokens, one after the other; seconds.
    fn prefill(&mut self, batch: usize, context: usize, more: usize) -> Result<f64, Failure> {
        self.next_block = 0;
        let mut admit: Vec<Admission> = (0..batch as u32)
            .map(|slot| Admission {
                slot,
                sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
                prompt_ids: Vec::new(),
                generated_ids: Vec::new(),
            })
            .collect();
        let started = Instant::now();
        let needed = (context + more).div_ceil(BLOCK_TOKENS) as u32;
        for slot in 0..batch as u32 {
            for start in (0..context).step_by(CHUNK) {
                let count = CHUNK.min(context - start);
                let new_blocks =
                    if start == 0 { (self.next_block..self.next_block + needed).collect() } else { Vec::new() };
                let tokens = Tokens::Ids(self.ids(count));
                let work = Work {
                    slot,
                    start: start as u32,
                    tokens,
                    new_blocks,
                    sample: start + count == context,
                    drafts: 0,
                    prompt_logprobs: None,
                };
                self.submit(std::mem::take(&mut admit), vec![work])?;
                self.runner.collect()?;
            }
            self.next_block += needed;
        }
        Ok(started.elapsed().as_secs_f64())
    }
}

fn measure(config: &Path, name: &str, options: CudaOptions, report: &mut dyn FnMut(Outcome)) -> Result<(), Failure> {
    let started = Instant::now();
    let config = ModelConfig::from_dir(config)?;
    let weights = Weights::dummy(&config, 1);
    let plan = ShardPlan::new(&config, 0, 1)?;
    let limits = Limits { step_tokens: CHUNK, sequences: 256, model_len: 140_000, logit_rows: 256 };
    let setup =
        RankSetup { config: config.clone(), plan: plan.clone(), limits, collective: Box::new(SingleRank::default()) };
    let gpu = survey(0..1, 1)?.remove(0);
    let peer = PeerFigures::of(&gpu, config.hidden_size, options.kv.name());
    let mut backend = CudaBackend::new(setup, options)?;
    let opened = started.elapsed().as_secs_f64();
    let model = Ministral3::load(&mut backend, &weights, &plan, |_| {})?;
    let shape = KvShape::new(&config, &plan);
    let blocks = backend.kv_capacity(&shape, KvBudget::DeviceShare(0.92))?;
    backend.allocate_kv(&shape, blocks)?;
    let ready = started.elapsed().as_secs_f64();
    report(Outcome::timing(
        format!("start, {name}"),
        json!({ "opened_s": opened, "ready_s": ready, "kv_tokens": blocks * BLOCK_TOKENS }),
    ));
    let bounds = Bounds { limits, kv_blocks: blocks, vocabulary_size: config.vocab_size };
    let mut driver = Driver {
        runner: ModelRunner::new(backend, model, 0, bounds),
        random: Random::new(5),
        step: 0,
        next_block: 0,
        blocks,
        vocabulary: config.vocab_size,
        live: Vec::new(),
    };
    driver.prefill(1, 3000, 0)?;
    for (batch, context) in DECODE {
        let more = WARM_STEPS + TIMED_STEPS + 2;
        if batch * (context + more).div_ceil(BLOCK_TOKENS) > driver.blocks {
            continue;
        }
        driver.prefill(batch, context, more)?;
        let mut gaps = Vec::new();
        let mut device = Vec::new();
        let mut last = Instant::now();
        let mut first = None;
        let total = WARM_STEPS + TIMED_STEPS;
        let mut equal = std::collections::HashSet::new();
        for index in 0..=total {
            if index < total {
                let work = (0..batch as u32)
                    .map(|slot| Work {
                        slot,
                        start: (context + index) as u32,
                        tokens: Tokens::Sampled,
                        new_blocks: Vec::new(),
                        sample: true,
                        drafts: 0,
                        prompt_logprobs: None,
                    })
                    .collect();
                driver.submit(Vec::new(), work)?;
            }
            if index > 0 {
                let output = driver.runner.collect()?;
                for sampled in &output.sampled {
                    equal.extend(sampled.result.clone()?.iter().map(|sampled_tokens| sampled_tokens.token_id));
                }
                let now = Instant::now();
                if index > WARM_STEPS {
                    first.get_or_insert(last);
                    gaps.push(now.duration_since(last).as_secs_f64() * 1e3);
                    device.push(output.seconds * 1e3);
                }
                last = now;
            }
        }
        let milliseconds =
            first.map_or(f64::NAN, |first| last.duration_since(first).as_secs_f64() * 1e3) / gaps.len() as f64;
        let bar = peer.decode_ms(batch, context);
        let details = json!({
            "ms": milliseconds,
            "device_ms_p50": median(device),
            "gap_ms_p50": median(gaps),
            "tok_s": batch as f64 / milliseconds * 1e3,
            "vllm_ms": bar,
            "ratio": bar.map(|bar| milliseconds / bar),
            "different_ids": equal.len(),
        });
        report(Outcome::timing(format!("decode batch {batch} context {context}, {name}"), details));
    }
    for tokens in PREFILL {
        let mut times = Vec::new();
        for _ in 0..3 {
            times.push(driver.prefill(1, tokens, 0)?);
        }
        let best = times.iter().copied().fold(f64::INFINITY, f64::min);
        let bar = peer.prefill_s(tokens);
        let ratio = bar.map(|bar| best / bar);
        let details =
            json!({ "s": times, "best_s": best, "tok_s": tokens as f64 / best, "vllm_s": bar, "ratio": ratio });
        report(Outcome::timing(format!("prefill {tokens}, {name}"), details));
    }
    Ok(())
}
