//! `bora bench engine`: the engine as it serves (scheduler, prefix cache, loop, ranks), without router and network:
//! token IDs in, token IDs out, greedy, prompts of random token IDs.
//!
//! Workloads, counting and names of the JSON fields are those of the baseline that was measured with vLLM (see
//! docs/benchmarks.md), so that two files can be compared row by row. Beside a figure stand the machine's floor and
//! the share of it that was reached.
//!
//! - `decode`: B sequences at a context of C tokens; steady milliseconds per token of each, from the moment when all
//!   decode until the first ends.
//! - `prefill`: seconds from a prompt to its first id; the best of several.
//! - `agentic`: conversations whose turns each add to the one before; `throughput`: many prompts at once that share
//!   their first half.
//! - `edit`: responses that repeat their prompt; `mixed`: one long context decoded among many short ones; `revisit`: prompts that come
//!   again when others have been computed in between. Not in the baseline.
//!
//! A line `steps` behind each says what kinds of steps it took and how long they were, by the engine's own metrics.

mod edit;
mod sections;
mod steps;
mod trace;

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use bora_common::config::{LogOptions, ModelOptions};
use bora_common::model::ModelConfig;
use bora_common::registry::{Device, GroupRecord};
use bora_common::secret::ClusterKeys;
use bora_common::tokenizer::Tokenizer;
use bora_proto::v1::{GenerateRequest, Sampling, Stopping};
use bora_worker::engine::{EngineHandle, EventStream};
use bora_worker::telemetry::roofline::Rooflines;
use bora_worker::{KvDtype, SpeculativeOptions, WorkerMetrics, WorkerOptions, WorkerSettings};
use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::{Value, json};

use self::steps::Steps;
use crate::flags::EngineFlags;
use crate::{logging, tokenize};

/// What to measure, on what.
#[derive(Args, Debug)]
pub(crate) struct EngineArgs {
    /// directory with the model's config.json (and its weights, unless --load-format dummy)
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    engine: EngineFlags,
    /// longest prompt plus output, tokens
    #[arg(long, default_value_t = 140_000)]
    max_model_len: u32,
    /// tokenizer file or directory, which `edit` needs
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// what to measure, in this order
    #[arg(long, value_enum, value_delimiter = ',', default_value = "decode,prefill,agentic,throughput")]
    workload: Vec<Workload>,
    /// divide every length by this, for a try
    #[arg(long, default_value_t = 1)]
    scale: usize,
    /// append the JSON lines to this file too
    #[arg(long)]
    out: Option<PathBuf>,
}

/// A section of the baseline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Workload {
    /// decode at 1k (1, 8, 32, 64, 128 sequences) and at 32k (1, 4)
    Decode,
    /// prompts of 8k, 32k and 128k
    Prefill,
    /// 16 conversations of 8 turns
    Agentic,
    /// 256 prompts of 4k, half of it shared
    Throughput,
    /// decode at 128k (1, 4)
    Declong,
    /// a prompt of 255k and decode at 250k
    Long256,
    /// source files said again with a name changed; for --speculative-config
    Edit,
    /// decode of 63 sequences at 1k beside one at 100k
    Mixed,
    /// 12 prompts of 16k, one after the other, twice; for --num-kv-blocks and --kv-offloading-size
    Revisit,
}

/// Measures, and prints JSON lines.
pub(crate) async fn run(args: EngineArgs) -> anyhow::Result<()> {
    logging::start(&LogOptions::default())?;
    let mut out = Out::open(args.out.as_ref())?;
    let started = Instant::now();
    let metrics = WorkerMetrics::new();
    let (engine, record) = bora_worker::open_engine(settings(&args, &metrics)).await?;
    let start_seconds = started.elapsed().as_secs_f64();
    let gpu = gpu_name(record.device, args.engine.tensor_parallel_size as usize);
    let model = ModelConfig::from_dir(&args.model)?;
    let kv_bytes = if args.engine.kv_cache_dtype == KvDtype::Fp8 { 1.0 } else { 2.0 };
    out.line(json!({
        "kind": "engine", "bora": env!("CARGO_PKG_VERSION"), "device": gpu, "start_s": round(start_seconds, 2),
        "kv_tokens": u64::from(record.kv_blocks) * u64::from(record.block_tokens), "block": record.block_tokens,
        "kv_cache_dtype": format!("{:?}", args.engine.kv_cache_dtype).to_lowercase(), "ranks": record.ranks.len(),
        "max_num_batched_tokens": engine.config().options.max_num_batched_tokens,
        "max_num_seqs": engine.config().options.max_num_seqs, "max_model_len": record.max_model_len,
        "speed": record.speed,
    }))?;
    let mut bench = Bench {
        floors: Rooflines::of(&model, record.ranks.len(), &gpu, kv_bytes),
        engine,
        metrics,
        record,
        out,
        random: 1234,
        scale: args.scale.max(1),
        tokenizer: args.tokenizer.as_deref().map(tokenize::open).transpose()?.map(Arc::new),
    };
    bench.warm_up().await?;
    for workload in &args.workload {
        let before = Steps::of(&bench.metrics.text());
        bench.section(*workload).await?;
        let steps = Steps::of(&bench.metrics.text()).since(&before);
        bench.out.line(steps.line(*workload))?;
    }
    bench.out.line(json!({ "kind": "done", "total_s": round(started.elapsed().as_secs_f64(), 1) }))
}

fn settings(args: &EngineArgs, metrics: &Arc<WorkerMetrics>) -> WorkerSettings {
    let mut options = WorkerOptions { max_model_len: Some(args.max_model_len), ..WorkerOptions::default() };
    args.engine.clone().apply(&mut options);
    // random weights repeat themselves: speculation only where it is asked for
    options.schedule.speculative.get_or_insert_with(SpeculativeOptions::off);
    let model = ModelOptions {
        name: "bench".into(),
        aliases: Vec::new(),
        path: args.model.clone(),
        tokenizer: args.tokenizer.clone(),
        skip_tokenizer_init: args.tokenizer.is_none(),
        max_model_len: None,
        weight_fingerprint: None,
    };
    WorkerSettings {
        cluster: "bench".into(),
        options,
        model,
        metrics: Arc::clone(metrics),
        keys: ClusterKeys::random(),
    }
}

fn gpu_name(device: Device, ranks: usize) -> String {
    if device != Device::Cuda {
        return format!("{device:?}").to_lowercase();
    }
    let names = bora_worker::backend::cuda::survey(0..ranks, ranks).unwrap_or_default();
    names.into_iter().next().unwrap_or_default()
}

/// Where the lines go.
struct Out {
    file: Option<File>,
    started: Instant,
}

impl Out {
    fn open(path: Option<&PathBuf>) -> anyhow::Result<Self> {
        let open = |path: &PathBuf| File::options().create(true).append(true).open(path);
        let file = path.map(open).transpose().context("--out")?;
        Ok(Self { file, started: Instant::now() })
    }

    fn line(&mut self, mut line: Value) -> anyhow::Result<()> {
        line["t"] = json!(round(self.started.elapsed().as_secs_f64(), 1));
        println!("{line}");
        if let Some(file) = &mut self.file {
            writeln!(file, "{line}").context("--out")?;
        }
        Ok(())
    }
}

/// An engine under measurement.
struct Bench {
    engine: EngineHandle,
    metrics: Arc<WorkerMetrics>,
    record: GroupRecord,
    floors: Option<Rooflines>,
    out: Out,
    random: u64,
    scale: usize,
    tokenizer: Option<Arc<Tokenizer>>,
}

impl Bench {
    async fn section(&mut self, workload: Workload) -> anyhow::Result<()> {
        let k = (1024 / self.scale).max(1);
        match workload {
            Workload::Decode => {
                for batch in [1, 8, 32, 64, 128] {
                    self.decode(&vec![k; batch]).await?;
                }
                self.decode(&[32 * k]).await?;
                self.decode(&[32 * k; 4]).await?;
            }
            Workload::Prefill => {
                self.prefill(8 * k, 3).await?;
                self.prefill(32 * k, 2).await?;
                self.prefill(128 * k, 1).await?;
            }
            Workload::Agentic => self.agentic(16, 8, 8 * k, k, (200 / self.scale).max(1)).await?,
            Workload::Throughput => self.throughput(256, 2 * k, 4 * k, (256 / self.scale).max(1)).await?,
            Workload::Declong => {
                self.decode(&[128 * k]).await?;
                self.decode(&[128 * k; 4]).await?;
            }
            Workload::Long256 => {
                self.prefill(255 * k, 1).await?;
                self.decode(&[250 * k]).await?;
            }
            Workload::Mixed => {
                let mut contexts = vec![k; 64];
                self.decode(&contexts).await?;
                contexts[0] = 100 * k;
                self.decode(&contexts).await?;
            }
            Workload::Revisit => self.revisit(12, 16 * k).await?,
            Workload::Edit => {
                let tokenizer = self.tokenizer.clone();
                self.edit(tokenizer.as_deref()).await?;
            }
        }
        Ok(())
    }

    /// Random token IDs, no control token IDs among them.
    fn tokens(&mut self, count: usize) -> Vec<u32> {
        let first = 1000.min(self.record.vocabulary_size / 2);
        let span = u64::from(self.record.vocabulary_size - first);
        (0..count).map(|_| first + (self.next_random() % span) as u32).collect()
    }

    /// SplitMix64.
    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.random;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }
}

/// Begins a greedy sequence of exactly `output` token IDs.
fn submit(engine: &EngineHandle, prompt: Vec<u32>, output: usize) -> anyhow::Result<EventStream> {
    Ok(engine.generate(GenerateRequest {
        request_id: "bench".into(),
        token_ids: prompt,
        sampling: Some(Sampling { temperature: Some(0.0), ..Sampling::default() }),
        stopping: Some(Stopping { max_tokens: output as u32, ignore_eos: true, ..Stopping::default() }),
        ..GenerateRequest::default()
    })?)
}

/// `value` with so many decimals.
fn round(value: f64, decimals: i32) -> f64 {
    let unit = 10f64.powi(decimals);
    (value * unit).round() / unit
}

/// The value below which the share `q` of all lies, as the baseline counts it.
fn percentile(values: &[f64], q: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    sorted.get(((q * last as f64).round() as usize).min(last)).copied()
}
