//! Runs a checkpoint on the CPU backend with one or several ranks and returns its logits.
#![allow(dead_code, unreachable_pub, missing_docs)] // each test file uses a part of it

use std::path::{Path, PathBuf};
use std::time::Duration;

use bora_common::blocks::BLOCK_TOKENS;
use bora_common::model::ModelConfig;
use bora_worker::backend::cpu::{CpuBackend, CpuOptions};
use bora_worker::backend::{Backend, Batch, BatchSequence, Limits, RankSetup};
use bora_worker::model::{KvShape, Ministral3};
use bora_worker::parallel::{Collective, SharedRank, SingleRank};
use bora_worker::weights::{ShardPlan, Weights};
use safetensors::SafeTensors;

pub const LIMITS: Limits = Limits { step_tokens: 4096, sequences: 8, model_len: 2048, logit_rows: 4096 };
pub const KV_BLOCKS: usize = 96;

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

/// The goldens of a tiny checkpoint.
pub struct Goldens(Vec<u8>);

impl Goldens {
    pub fn of(name: &str) -> Self {
        Self(std::fs::read(fixture(name).join("goldens.safetensors")).unwrap())
    }

    pub fn floats(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = tensors.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), safetensors::Dtype::F32);
        tensor.data().as_chunks::<4>().0.iter().map(|four| f32::from_le_bytes(*four)).collect()
    }

    pub fn ids(&self, name: &str) -> Vec<u32> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = tensors.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), safetensors::Dtype::I32);
        tensor.data().as_chunks::<4>().0.iter().map(|four| u32::from_le_bytes(*four)).collect()
    }
}

/// A chunk of a sequence to compute.
#[derive(Clone)]
pub struct Chunk<'a> {
    pub slot: u32,
    pub start: usize,
    pub ids: &'a [u32],
    pub blocks: Vec<u32>,
}

/// One rank with its weights and its cache.
pub struct Rank {
    pub backend: CpuBackend,
    pub model: Ministral3<CpuBackend>,
    pub config: ModelConfig,
}

impl Rank {
    pub fn load(weights: &Weights, plan: ShardPlan, collective: Box<dyn Collective>, options: CpuOptions) -> Self {
        let config = weights.config().clone();
        let shape = KvShape::new(&config, &plan);
        let setup = RankSetup { config: config.clone(), plan: plan.clone(), limits: LIMITS, collective };
        let mut backend = CpuBackend::new(setup, options);
        let model = Ministral3::load(&mut backend, weights, &plan, |_| {}).unwrap();
        backend.allocate_kv(&shape, KV_BLOCKS).unwrap();
        Self { backend, model, config }
    }

    /// Logits of every token of the chunks, which run as one batch.
    pub fn run(&mut self, parts: &[Chunk<'_>]) -> Vec<Vec<Vec<f32>>> {
        let mut batch = Batch::default();
        for part in parts {
            batch.sequences.push(BatchSequence {
                slot: part.slot,
                first_row: batch.token_ids.len() as u32,
                rows: part.ids.len() as u32,
                context: (part.start + part.ids.len()) as u32,
                blocks: part.blocks.clone(),
            });
            batch.token_ids.extend(part.ids.iter().copied().map(Some));
            batch.positions.extend((part.start..part.start + part.ids.len()).map(|position| position as u32));
        }
        batch.logit_rows = (0..batch.token_ids.len() as u32).collect();
        let model = &self.model;
        let logits = self.backend.execute(&batch, |backend| model.forward(backend)).unwrap();
        let mut rows = logits.elements.chunks_exact(logits.columns).map(<[f32]>::to_vec);
        parts.iter().map(|part| rows.by_ref().take(part.ids.len()).collect()).collect()
    }

    /// Logits of every token of a sequence, computed in chunks.
    pub fn run_in_chunks(&mut self, ids: &[u32], blocks: &[u32], chunk: usize) -> Vec<Vec<f32>> {
        let mut logits = Vec::new();
        for (index, ids) in ids.chunks(chunk).enumerate() {
            let part = Chunk { slot: 0, start: index * chunk, ids, blocks: blocks.to_vec() };
            logits.extend(self.run(&[part]).remove(0));
        }
        logits
    }

    /// The greedy output after the prompt.
    pub fn greedy(&mut self, prompt: &[u32], blocks: &[u32], count: usize) -> Vec<u32> {
        let mut last = self.run_in_chunks(prompt, blocks, prompt.len()).pop().unwrap();
        let mut generated = Vec::new();
        loop {
            generated.push(argmax(&last));
            if generated.len() == count {
                return generated;
            }
            let ids = [*generated.last().unwrap()];
            let start = prompt.len() + generated.len() - 1;
            last = self.run(&[Chunk { slot: 0, start, ids: &ids, blocks: blocks.to_vec() }]).remove(0).remove(0);
        }
    }
}

/// One rank that holds the whole model.
pub fn single(folder: &Path, options: CpuOptions) -> Rank {
    let config = ModelConfig::from_dir(folder).unwrap();
    let weights = Weights::open(folder, &config).unwrap();
    let plan = ShardPlan::new(&config, 0, 1).unwrap();
    Rank::load(&weights, plan, Box::new(SingleRank::default()), options)
}

/// Runs the same work on every rank of a group of threads.
pub fn threads<R: Send>(folder: &Path, ranks: usize, work: impl Fn(&mut Rank) -> R + Sync) -> Vec<R> {
    let collectives = SharedRank::group(ranks, Duration::from_secs(60));
    let collectives = collectives.into_iter().map(|rank| Box::new(rank) as Box<dyn Collective>).collect();
    over(folder, collectives, work)
}

/// Runs the same work on every rank of a group that is connected by `collectives`.
pub fn over<R: Send>(
    folder: &Path,
    collectives: Vec<Box<dyn Collective>>,
    work: impl Fn(&mut Rank) -> R + Sync,
) -> Vec<R> {
    let config = ModelConfig::from_dir(folder).unwrap();
    let weights = Weights::open(folder, &config).unwrap();
    let ranks = collectives.len();
    std::thread::scope(|scope| {
        let (work, weights, config) = (&work, &weights, &config);
        let threads: Vec<_> = collectives
            .into_iter()
            .enumerate()
            .map(|(rank, collective)| {
                scope.spawn(move || {
                    let plan = ShardPlan::new(config, rank, ranks).unwrap();
                    work(&mut Rank::load(weights, plan, collective, CpuOptions::default()))
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Blocks for a sequence of `tokens` from `first` on, in a permuted order.
pub fn blocks(first: u32, tokens: usize) -> Vec<u32> {
    let count = tokens.div_ceil(BLOCK_TOKENS) as u32;
    (first..first + count).rev().collect()
}

pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

pub fn logsumexp(logits: &[f32]) -> f32 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - largest).exp()).sum();
    largest + sum.ln() as f32
}

/// The maximum difference between two sets of rows.
pub fn difference(ours: &[Vec<f32>], theirs: &[Vec<f32>]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let mut largest: f32 = 0.0;
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert_eq!(ours.len(), theirs.len());
        for (a, b) in ours.iter().zip(theirs) {
            assert!(a.is_finite() && b.is_finite());
            largest = largest.max((a - b).abs());
        }
    }
    largest
}

/// The shape of a random model; writes its `config.json`.
pub struct Shape {
    pub heads: usize,
    pub kv_heads: usize,
    pub vocabulary: usize,
    pub tied: bool,
}

impl Shape {
    pub fn config(&self) -> serde_json::Value {
        serde_json::json!({
            "architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3",
            "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": 16, "intermediate_size": 80,
            "vocab_size": self.vocabulary, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
            "tie_word_embeddings": self.tied, "eos_token_id": 2,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 8.0, "beta_slow": 1.0,
                "mscale": 1.0, "mscale_all_dim": 0.0, "original_max_position_embeddings": 32,
                "llama_4_scaling_beta": 0.2
            }
        })
    }

    /// Writes a checkpoint of random bf16 elements with the magnitude of trained weights.
    pub fn write(&self, folder: &Path) {
        let (hidden, inner, width) = (48, 80, self.heads * 16);
        let kv_width = self.kv_heads * 16;
        let mut tensors = vec![
            ("model.embed_tokens.weight".to_owned(), vec![self.vocabulary, hidden]),
            ("model.norm.weight".to_owned(), vec![hidden]),
        ];
        if !self.tied {
            tensors.push(("lm_head.weight".to_owned(), vec![self.vocabulary, hidden]));
        }
        for layer in 0..2 {
            for (name, shape) in [
                ("input_layernorm", vec![hidden]),
                ("post_attention_layernorm", vec![hidden]),
                ("self_attn.q_proj", vec![width, hidden]),
                ("self_attn.k_proj", vec![kv_width, hidden]),
                ("self_attn.v_proj", vec![kv_width, hidden]),
                ("self_attn.o_proj", vec![hidden, width]),
                ("mlp.gate_proj", vec![inner, hidden]),
                ("mlp.up_proj", vec![inner, hidden]),
                ("mlp.down_proj", vec![hidden, inner]),
            ] {
                tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
            }
        }
        let mut state = 1u64;
        let mut random = move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let stored: Vec<Stored> = tensors
            .into_iter()
            .map(|(name, shape)| {
                let spread = if shape.len() == 1 { 0.2 } else { 2.5 / (shape[1] as f32).sqrt() };
                let shift = if shape.len() == 1 { 1.0 } else { 0.0 };
                let count = shape.iter().product();
                let numbers = (0..count).map(|_| half::bf16::from_f32(shift + spread * random()));
                let bytes = numbers.flat_map(half::bf16::to_le_bytes).collect();
                Stored { name, dtype: safetensors::Dtype::BF16, shape, bytes }
            })
            .collect();
        write_tensors(&folder.join("model.safetensors"), &stored);
        std::fs::write(folder.join("config.json"), self.config().to_string()).unwrap();
    }
}

/// A tensor to write.
#[derive(Clone)]
pub struct Stored {
    pub name: String,
    pub dtype: safetensors::Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

pub fn read_tensors(path: &Path) -> Vec<Stored> {
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    tensors
        .tensors()
        .into_iter()
        .map(|(name, view)| Stored {
            name,
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            bytes: view.data().to_vec(),
        })
        .collect()
}

pub fn write_tensors(path: &Path, tensors: &[Stored]) {
    let views: Vec<(&str, safetensors::tensor::TensorView<'_>)> = tensors
        .iter()
        .map(|tensor| {
            let view = safetensors::tensor::TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes);
            (tensor.name.as_str(), view.unwrap())
        })
        .collect();
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}
