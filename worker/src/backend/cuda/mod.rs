//! The CUDA backend: one rank on one NVIDIA GPU of compute capability 9.0 or later.
//!
//! Kernels come from `worker/kernels`, large matrix products from cuBLASLt, both loaded at run time. The
//! residual stream is f32, everything between kernels bf16 or, before FP8 linears, e4m3. All memory is taken
//! before the first step. All work goes through one stream; a step of single tokens is recorded as a graph
//! when its size comes for the second time, and replayed from then on.

#![allow(unsafe_code)] // the driver's interface is C; each use says why it holds

pub mod check;
mod driver;
mod kernels;
mod libraries;
mod linear;
mod matmul;
mod sampler;
mod step;

use std::collections::HashMap;

use bora_common::blocks::BLOCK_TOKENS;
use bora_common::model::RopeTable;

use super::{Backend, BackendError, Batch, KvBudget, RankSetup, Result, SampleRequest, SampleResults};
use crate::engine::step::{Admission, Slot};
use crate::model::KvShape;
use crate::weights::{LinearShard, Slice, VocabularyShard};

use driver::{Address, Arguments, Buffer, Device, Graph, Shape};
use kernels::Kernels;
use linear::TensorFormat;
use linear::{InputFormat, load_slice};
pub use linear::{Linear, Tensor};
use matmul::Matmul;
use sampler::Sampler;
use step::StepInputs;

/// Why there is no CUDA backend on this machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaUnavailable {
    /// Built without nvcc.
    #[error(
        "this build has no GPU kernels: it was built where no nvcc was found (scripts/cuda-toolchain installs one)"
    )]
    NoKernels,
    /// No libcuda.
    #[error("no NVIDIA driver on this machine: {reason}")]
    NoDriver {
        /// In the loader's words.
        reason: String,
    },
    /// The driver is there but does not work.
    #[error("the NVIDIA driver reports no usable GPU: {reason}")]
    Refused {
        /// In the driver's words.
        reason: String,
    },
    /// The driver is older than the kernels.
    #[error("the NVIDIA driver supports CUDA {found}, 13.0 is needed (driver 580 or later)")]
    OldDriver {
        /// The newest CUDA that it supports.
        found: String,
    },
    /// Fewer GPUs than asked for.
    #[error("there is no GPU {ordinal}, this machine has {count}")]
    NoSuchDevice {
        /// The one asked for, from 0.
        ordinal: usize,
        /// GPUs that there are.
        count: usize,
    },
    /// A GPU before Hopper.
    #[error("{name} has compute capability {capability}, 9.0 or later is needed (H100, H200 and what followed)")]
    OldDevice {
        /// The GPU.
        name: String,
        /// What it has.
        capability: String,
    },
    /// No cuBLASLt.
    #[error("libcublasLt.so.13 was not found (it comes with CUDA 13 and with NVIDIA's nvidia-cublas wheel): {reason}")]
    NoCublasLt {
        /// In the loader's words.
        reason: String,
    },
}

impl From<CudaUnavailable> for BackendError {
    fn from(error: CudaUnavailable) -> Self {
        BackendError::Device(error.to_string())
    }
}

/// What the KV cache holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvDtype {
    /// bfloat16.
    #[default]
    Bf16,
    /// FP8 (e4m3, scale 1): half the memory and half the traffic.
    E4m3,
}

impl KvDtype {
    fn size(self) -> usize {
        match self {
            KvDtype::Bf16 => 2,
            KvDtype::E4m3 => 1,
        }
    }

    fn name(self) -> &'static str {
        match self {
            KvDtype::Bf16 => "bf16",
            KvDtype::E4m3 => "e4m3",
        }
    }
}

/// How the CUDA backend computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaOptions {
    /// Which GPU of the machine.
    pub device: usize,
    /// What the KV cache holds.
    pub kv: KvDtype,
    /// Record steps as graphs.
    pub graphs: bool,
    /// Let a kernel start while the one before it ends (programmatic dependent launch).
    pub overlap: bool,
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self { device: 0, kv: KvDtype::Bf16, graphs: true, overlap: true }
    }
}

/// Steps in flight: the CPU prepares one while the GPU runs another.
const PIPELINE_DEPTH: usize = 2;
/// Largest step that is recorded as a graph.
const LARGEST_GRAPH: usize = 256;
/// Blocks of decode attention that fit on a multiprocessor.
const DECODE_BLOCKS_A_MULTIPROCESSOR: usize = 2;
/// Most parts that one row's keys are cut into.
const MOST_KEY_SPLITS: usize = 128;
/// Left free of KV cache for what is taken later: graphs, kernels' code, samplers with penalties.
const RESERVED_BYTES: u64 = 512 << 20;

/// One rank on a GPU.
pub struct CudaBackend {
    // fields drop in this order: what was recorded before what it reads, the device last
    graphs: HashMap<usize, Recording>,
    kernels: Kernels,
    matmul: Matmul,
    inputs: StepInputs,
    sampler: Sampler,
    cache: Option<Cache>,
    buffers: Option<Buffers>,
    rope: RopeTable,
    frequencies: Buffer,
    widths: Widths,
    setup: RankSetup,
    options: CudaOptions,
    device: Device,
}

/// A step size's graph.
enum Recording {
    /// It ran once: kernels are loaded and matrix products chosen.
    Warm,
    Recorded(Graph),
}

/// What the activation buffers must hold for a row, known once the weights are.
#[derive(Clone, Copy, Debug, Default)]
struct Widths {
    input_bytes: usize,
    outputs: usize,
}

/// K and V of every layer: [layer][K, V][blocks + 1][kv heads][64][head_dim].
struct Cache {
    buffer: Buffer,
    plane_bytes: u64,
    shape: KvShape,
}

/// Activations. Each step uses them over again: a linear's input, its product, the queries, the residual.
struct Buffers {
    residual: Buffer,
    input: Buffer,
    product: Buffer,
    query: Buffer,
    logits: Buffer,
    partial_attention: Buffer,
    log_sums: Buffer,
    finished: Buffer,
    angles: Buffer,
    query_scale: Buffer,
    kv_place: Buffer,
}

/// Rows of logits on the device, over the whole vocabulary.
pub struct Logits {
    rows: usize,
}

impl CudaBackend {
    /// Opens a GPU. Its memory is taken by the weights as they are loaded and by `allocate_kv`.
    pub fn new(setup: RankSetup, options: CudaOptions) -> Result<Self> {
        let head_dim = setup.config.head_dim;
        if ![32, 64, 128].contains(&head_dim) {
            return Err(BackendError::Unsupported {
                tensor: "head_dim".to_owned(),
                reason: format!("{head_dim}: the kernels know 32, 64 and 128"),
            });
        }
        let group = setup.plan.query_group();
        if group > 16 {
            return Err(BackendError::Unsupported {
                tensor: "heads".to_owned(),
                reason: format!("{group} query heads a KV head, at most 16 work"),
            });
        }
        let device = Device::open(options.device)?;
        let kernels = Kernels::load()?;
        let matmul = Matmul::new()?;
        let rope = setup.config.rope.table(head_dim);
        let frequencies = Buffer::new(rope.frequencies.len() * 4, "the rotary frequencies")?;
        let bytes: Vec<u8> = rope.frequencies.iter().flat_map(|frequency| frequency.to_le_bytes()).collect();
        device.upload(frequencies.address, &bytes, "the rotary frequencies")?;
        let inputs = StepInputs::new(&setup.limits, group)?;
        let sampler = Sampler::new(&device, &setup.limits, setup.config.vocab_size)?;
        tracing::info!(gpu = device.name, multiprocessors = device.multiprocessors, "opened a GPU");
        Ok(Self {
            graphs: HashMap::new(),
            kernels,
            matmul,
            inputs,
            sampler,
            cache: None,
            buffers: None,
            rope,
            frequencies,
            widths: Widths::default(),
            setup,
            options,
            device,
        })
    }

    /// Logits as numbers [rows, vocabulary], for checks.
    fn read_logits(&self, logits: &Logits) -> Result<Vec<f32>> {
        let mut bytes = vec![0u8; logits.rows * self.setup.config.vocab_size * 4];
        self.device.download(&mut bytes, self.buffers()?.logits.address, "reading logits")?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|four| f32::from_le_bytes(*four)).collect())
    }

    fn buffers(&self) -> Result<&Buffers> {
        self.buffers.as_ref().ok_or_else(|| BackendError::Device("the KV cache is not allocated".to_owned()))
    }

    fn take_buffers(&mut self) -> Result<()> {
        if self.buffers.is_some() {
            return Ok(());
        }
        let (limits, config, plan) = (&self.setup.limits, &self.setup.config, &self.setup.plan);
        let rows = Matmul::padded_rows(limits.step_tokens.max(limits.sequences));
        let logit_rows = Matmul::padded_rows(limits.logit_rows.max(limits.sequences));
        let heads = plan.heads.len();
        let decode_blocks =
            (self.device.multiprocessors as usize * DECODE_BLOCKS_A_MULTIPROCESSOR).max(rows * plan.kv_heads.len());
        // each block leaves one row a head of its group; splits are rounded up
        let partials = (decode_blocks + rows * plan.kv_heads.len()) * plan.query_group();
        self.buffers = Some(Buffers {
            residual: Buffer::new(rows * config.hidden_size * 4, "the residual stream")?,
            input: Buffer::new(rows * self.widths.input_bytes.max(config.hidden_size * 2), "the inputs of linears")?,
            product: Buffer::new(
                Linear::product_bytes(self.widths.outputs, rows).max(rows * config.hidden_size * 4),
                "the products of linears",
            )?,
            query: Buffer::new(rows * heads * config.head_dim * 2, "the queries")?,
            logits: Buffer::new(logit_rows * config.vocab_size * 4, "the logits")?,
            partial_attention: Buffer::new(partials * config.head_dim * 4, "the partial sums of attention")?,
            log_sums: Buffer::new(partials * 4, "the partial sums of attention")?,
            finished: Buffer::new(rows * plan.kv_heads.len() * 4, "the counters of attention")?,
            angles: Buffer::new(rows * config.head_dim * 4, "the rotary angles")?,
            query_scale: Buffer::new(rows * 4, "the query scales")?,
            kv_place: Buffer::new(rows * 4, "the places in the cache")?,
        });
        // counters are zero between steps
        self.device.fill(&self.buffers()?.finished, 0)
    }

    fn launch(&mut self, name: &str, shape: Shape, arguments: Arguments) -> Result<()> {
        self.kernels.launch(&self.device, name, shape, arguments, self.options.overlap)
    }

    /// Address of a layer's keys and values.
    fn planes(&self, layer: usize) -> Result<(Address, Address)> {
        let cache =
            self.cache.as_ref().ok_or_else(|| BackendError::Device("the KV cache is not allocated".to_owned()))?;
        if layer >= cache.shape.layers {
            return Err(BackendError::Device(format!("there is no layer {layer} in the cache")));
        }
        let keys = cache.buffer.address + 2 * layer as u64 * cache.plane_bytes;
        Ok((keys, keys + cache.plane_bytes))
    }

    /// Parts that each row's keys are cut into when `rows` rows are decoded.
    fn key_splits(&self, rows: usize) -> usize {
        let blocks = rows.max(1) * self.setup.plan.kv_heads.len();
        // rounded down: all blocks run at once, and none is left for a second round
        (self.device.multiprocessors as usize * DECODE_BLOCKS_A_MULTIPROCESSOR / blocks).clamp(1, MOST_KEY_SPLITS)
    }

    /// Adds up a partial product over the ranks, through host memory: right everywhere, fast nowhere. The
    /// hook for NCCL and peer memory.
    fn reduce_over_ranks(&mut self, partial: Tensor) -> Result<Tensor> {
        if self.setup.plan.ranks == 1 {
            return Ok(partial);
        }
        let count = partial.rows * partial.columns;
        let scale = partial.part_scales.first().copied().unwrap_or(1.0);
        let mut sum = vec![0f32; count];
        match partial.format {
            TensorFormat::Bf16 => {
                let mut bytes = vec![0u8; count * 2];
                self.device.download(&mut bytes, partial.address, "reading a partial sum")?;
                for (sum, two) in sum.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *sum = half::bf16::from_le_bytes(*two).to_f32() * scale;
                }
            }
            TensorFormat::E4m3 => {
                return Err(BackendError::Device("a partial sum in e4m3".to_owned()));
            }
            TensorFormat::F32 | TensorFormat::F32Splits(_) => {
                let (splits, _) = partial.splits();
                let mut bytes = vec![0u8; count * 4 * splits as usize];
                self.device.download(&mut bytes, partial.address, "reading a partial sum")?;
                for (index, four) in bytes.as_chunks::<4>().0.iter().enumerate() {
                    sum[index % count] += f32::from_le_bytes(*four) * scale;
                }
            }
        }
        self.setup.collective.all_reduce(&mut sum)?;
        let bytes: Vec<u8> = sum.iter().flat_map(|number| number.to_le_bytes()).collect();
        self.device.upload(partial.address, &bytes, "writing a sum over the ranks")?;
        Ok(Tensor { format: TensorFormat::F32, part_scales: vec![1.0], ..partial })
    }

    /// Submits the norm of the residual's rows (all, or those listed at `rows`).
    fn submit_norm(
        &mut self,
        residual: &Tensor,
        partial: Option<Tensor>,
        gain: &Buffer,
        format: InputFormat,
        rows: Option<(Address, usize)>,
    ) -> Result<Tensor> {
        let hidden = residual.columns;
        let (rows_address, row_count) = rows.unwrap_or((0, residual.rows));
        let target = self.buffers()?.input.address;
        let (suffix, scale, tensor_format) = match format {
            InputFormat::Bf16 => ("bf16", 1.0, TensorFormat::Bf16),
            InputFormat::E4m3(scale) => ("e4m3", scale, TensorFormat::E4m3),
        };
        let (name, address, (splits, stride), partial_scale) = match &partial {
            None => (format!("norm_to_{suffix}"), 0, (1, 0), 1.0),
            Some(partial) => {
                let name = format!("add_{}_norm_to_{suffix}", partial.product_name());
                (name, partial.address, partial.splits(), partial.part_scales.first().copied().unwrap_or(1.0))
            }
        };
        let arguments = Arguments::default()
            .address(residual.address)
            .address(address)
            .u32(splits)
            .u64(stride)
            .f32(partial_scale)
            .address(gain.address)
            .address(target)
            .f32(scale)
            .address(rows_address)
            .u32(hidden as u32)
            .f32(self.setup.config.rms_norm_eps);
        let block = (hidden / 4).next_multiple_of(32).clamp(32, 1024) as u32;
        self.launch(&name, Shape { grid: [row_count as u32, 1, 1], block, shared: hidden as u32 * 4 }, arguments)?;
        Ok(Tensor { address: target, rows: row_count, columns: hidden, format: tensor_format, part_scales: Vec::new() })
    }

    fn gather_vocabulary(&mut self, rows: usize, own: usize) -> Result<()> {
        let (ranks, per_rank) = (self.setup.plan.ranks, self.setup.plan.vocabulary_per_rank);
        let vocabulary = self.setup.config.vocab_size;
        let address = self.buffers()?.logits.address;
        let mut bytes = vec![0u8; rows * own * 4];
        self.device.download(&mut bytes, address, "reading logits")?;
        let mut padded = vec![0f32; rows * per_rank];
        for (index, four) in bytes.as_chunks::<4>().0.iter().enumerate() {
            padded[index / own * per_rank + index % own] = f32::from_le_bytes(*four);
        }
        let mut all = vec![0f32; ranks * padded.len()];
        self.setup.collective.all_gather(&padded, &mut all)?;
        let mut gathered = Vec::with_capacity(rows * vocabulary * 4);
        for row in 0..rows {
            for rank in 0..ranks {
                let count = per_rank.min(vocabulary.saturating_sub(rank * per_rank));
                for number in &all[(rank * rows + row) * per_rank..][..count] {
                    gathered.extend_from_slice(&number.to_le_bytes());
                }
            }
        }
        self.device.upload(address, &gathered, "writing logits")
    }

    /// Rows that a decode step of `rows` is filled up to.
    fn graph_rows(rows: usize) -> usize {
        match rows {
            0..=16 => rows,
            17..=64 => rows.next_multiple_of(8),
            65..=128 => rows.next_multiple_of(16),
            _ => rows.next_multiple_of(32),
        }
    }
}

impl Backend for CudaBackend {
    type Tensor = Tensor;
    type Linear = Linear;
    type Gain = Gain;
    type Embedding = Embedding;
    type Logits = Logits;

    fn load_linear(&mut self, parts: &[LinearShard<'_>]) -> Result<Linear> {
        let linear = Linear::load(&self.device, &mut self.kernels, parts)?;
        let size = if linear.input_format == InputFormat::Bf16 { 2 } else { 1 };
        self.widths.input_bytes = self.widths.input_bytes.max(linear.inputs * size);
        self.widths.outputs = self.widths.outputs.max(linear.outputs);
        Ok(linear)
    }

    fn load_gain(&mut self, gain: &Slice<'_>) -> Result<Gain> {
        let buffer = Buffer::new(gain.columns * 2, gain.name)?;
        load_slice(&self.device, &mut self.kernels, buffer.address, gain)?;
        Ok(Gain { buffer })
    }

    fn load_embedding(&mut self, rows: &VocabularyShard<'_>) -> Result<Embedding> {
        let slice = &rows.rows;
        let table = Buffer::new(slice.rows * slice.columns * 2, slice.name)?;
        load_slice(&self.device, &mut self.kernels, table.address, slice)?;
        Ok(Embedding { table, first_id: rows.first_id as u32, count: slice.rows as u32 })
    }

    fn load_head(&mut self, rows: &VocabularyShard<'_>) -> Result<Linear> {
        Linear::load(&self.device, &mut self.kernels, &[LinearShard { weight: rows.rows.clone(), scales: None }])
    }

    fn kv_capacity(&mut self, shape: &KvShape, budget: KvBudget) -> Result<usize> {
        self.take_buffers()?;
        let block = shape.block_bytes(self.options.kv.size()) as u64;
        let (free, total) = self.device.memory()?;
        let bytes = match budget {
            KvBudget::Blocks(blocks) => return Ok(blocks),
            KvBudget::Bytes(bytes) => bytes,
            KvBudget::DeviceShare(share) => {
                let used = (total - free) as u64;
                ((total as f64 * f64::from(share)) as u64)
                    .saturating_sub(used)
                    .min((free as u64).saturating_sub(RESERVED_BYTES))
            }
        };
        // one block more is taken: the spare one
        match (bytes / block).saturating_sub(1) {
            0 => Err(BackendError::OutOfMemory(format!(
                "{bytes} bytes are left for the KV cache, but two blocks of {BLOCK_TOKENS} tokens take {}; {} of {total} bytes are used",
                2 * block,
                total - free,
            ))),
            blocks => Ok(blocks as usize),
        }
    }

    fn allocate_kv(&mut self, shape: &KvShape, blocks: usize) -> Result<()> {
        self.take_buffers()?;
        let plane_bytes = (blocks + 1) * shape.kv_heads * BLOCK_TOKENS * shape.head_dim * self.options.kv.size();
        let buffer = Buffer::new(2 * shape.layers * plane_bytes, "the KV cache")?;
        self.device.fill(&buffer, 0)?;
        self.cache = Some(Cache { buffer, plane_bytes: plane_bytes as u64, shape: *shape });
        self.inputs.set_spare_block(blocks as u32);
        self.device.synchronize()
    }

    fn execute(&mut self, batch: &Batch, forward: impl FnOnce(&mut Self) -> Result<Logits>) -> Result<Logits> {
        self.device.make_current()?;
        let real = batch.token_ids.len();
        let recorded = self.options.graphs
            && self.setup.plan.ranks == 1
            && StepInputs::is_decode(batch)
            && (1..=LARGEST_GRAPH.min(self.setup.limits.sequences)).contains(&real);
        let rows = if recorded { Self::graph_rows(real).min(self.setup.limits.sequences.max(real)) } else { real };
        self.sampler.step_begins(&self.device)?;
        self.inputs.upload(&self.device, batch, rows)?;
        if !recorded {
            return forward(self);
        }
        match self.graphs.get(&rows) {
            None => {
                let logits = forward(self)?;
                self.graphs.insert(rows, Recording::Warm);
                Ok(logits)
            }
            Some(Recording::Warm) => {
                self.device.begin_capture()?;
                let outcome = forward(self);
                let graph = self.device.end_capture();
                let logits = outcome?;
                let graph = graph?;
                self.device.replay(&graph)?;
                self.graphs.insert(rows, Recording::Recorded(graph));
                Ok(logits)
            }
            Some(Recording::Recorded(graph)) => {
                self.device.replay(graph)?;
                Ok(Logits { rows: self.inputs.shape.logit_rows })
            }
        }
    }

    fn embed(&mut self, table: &Embedding) -> Result<Tensor> {
        let (hidden, head_dim) = (self.setup.config.hidden_size, self.setup.config.head_dim);
        let rows = self.inputs.shape.rows;
        let step = self.inputs.addresses();
        let buffers = self.buffers()?;
        let residual = buffers.residual.address;
        let (beta, original_length) = self.rope.query_scale;
        let prepare = Arguments::default()
            .address(buffers.angles.address)
            .address(buffers.query_scale.address)
            .address(buffers.kv_place.address)
            .address(step.positions)
            .address(step.row_sequence)
            .address(step.tables)
            .address(step.table_start)
            .address(self.frequencies.address)
            .u32(head_dim as u32 / 2)
            .f32(self.rope.attention_factor)
            .f32(beta)
            .u32(original_length);
        let grid = [rows as u32, 1, 1];
        // the first kernel of a step follows copies, not a kernel
        self.kernels.launch(&self.device, "prepare_rows", Shape { grid, block: 64, shared: 0 }, prepare, false)?;
        let embed = Arguments::default()
            .address(residual)
            .address(table.table.address)
            .address(step.ids)
            .address(step.row_slot)
            .address(self.sampler.last_drawn.address)
            .u32(table.first_id)
            .u32(table.count)
            .u32(hidden as u32);
        self.launch("embed", Shape { grid, block: 256, shared: 0 }, embed)?;
        let residual =
            Tensor { address: residual, rows, columns: hidden, format: TensorFormat::F32, part_scales: Vec::new() };
        self.reduce_over_ranks(residual)
    }

    fn norm(&mut self, residual: &mut Tensor, partial: Option<Tensor>, gain: &Gain, next: &Linear) -> Result<Tensor> {
        let partial = partial.map(|partial| self.reduce_over_ranks(partial)).transpose()?;
        self.submit_norm(residual, partial, &gain.buffer, next.input_format, None)
    }

    fn linear(&mut self, input: &Tensor, weights: &Linear) -> Result<Tensor> {
        let target = self.buffers()?.product.address;
        weights.apply((&self.device, &mut self.kernels, &mut self.matmul), input, target, false, self.options.overlap)
    }

    fn rotate_and_store(&mut self, qkv: Tensor, layer: usize) -> Result<Tensor> {
        let head_dim = self.setup.config.head_dim;
        let (heads, kv_heads) = (self.setup.plan.heads.len(), self.setup.plan.kv_heads.len());
        let (keys, values) = self.planes(layer)?;
        let buffers = self.buffers()?;
        let query = buffers.query.address;
        let [q_scale, k_scale, v_scale] = *qkv.part_scales.as_slice() else {
            return Err(BackendError::Device("q, k and v are three parts of one linear".to_owned()));
        };
        let (splits, stride) = qkv.splits();
        let arguments = Arguments::default()
            .address(qkv.address)
            .u32(splits)
            .u64(stride)
            .f32(q_scale)
            .f32(k_scale)
            .f32(v_scale)
            .address(query)
            .address(keys)
            .address(values)
            .address(buffers.angles.address)
            .address(buffers.query_scale.address)
            .address(buffers.kv_place.address)
            .u32(heads as u32)
            .u32(kv_heads as u32)
            .u32(head_dim as u32);
        let name = format!("rope_{}_kv_{}", qkv.product_name(), self.options.kv.name());
        // few rows: as many blocks as there is work; many rows: a block a row
        let items = (heads + 2 * kv_heads) * head_dim / 4;
        let blocks = if qkv.rows <= 128 { items.div_ceil(256) } else { 1 };
        let shape = Shape { grid: [qkv.rows as u32, blocks as u32, 1], block: 256, shared: 0 };
        self.launch(&name, shape, arguments)?;
        Ok(Tensor {
            address: query,
            rows: qkv.rows,
            columns: heads * head_dim,
            format: TensorFormat::Bf16,
            part_scales: Vec::new(),
        })
    }

    fn attend(&mut self, q: Tensor, layer: usize, next: &Linear) -> Result<Tensor> {
        let head_dim = self.setup.config.head_dim;
        let (heads, kv_heads) = (self.setup.plan.heads.len() as u32, self.setup.plan.kv_heads.len() as u32);
        let (keys, values) = self.planes(layer)?;
        let step = self.inputs.addresses();
        let shape = self.inputs.shape;
        let buffers = self.buffers()?;
        let (target, partial, log_sums) =
            (buffers.input.address, buffers.partial_attention.address, buffers.log_sums.address);
        let finished = buffers.finished.address;
        let (suffix, scale, format) = match next.input_format {
            InputFormat::Bf16 => ("bf16", 1.0, TensorFormat::Bf16),
            InputFormat::E4m3(scale) => ("e4m3", scale, TensorFormat::E4m3),
        };
        let kv = self.options.kv;
        let score_scale = std::f32::consts::LOG2_E / (head_dim as f32).sqrt();
        if shape.tiles > 0 {
            let arguments = Arguments::default()
                .address(q.address)
                .address(keys)
                .address(values)
                .address(step.tiles)
                .address(step.positions)
                .address(step.tables)
                .address(step.table_start)
                .address(target)
                .f32(scale)
                .u32(heads)
                .u32(kv_heads)
                .f32(score_scale);
            let (name, shared) = prefill_kernel(head_dim, kv, suffix, self.device.hopper);
            let launch = Shape { grid: [kv_heads, shape.tiles as u32, 1], block: 256, shared };
            self.launch(&name, launch, arguments)?;
        }
        if shape.decode_rows > 0 {
            let splits = self.key_splits(shape.decode_rows) as u32;
            let arguments = Arguments::default()
                .address(q.address)
                .address(keys)
                .address(values)
                .address(step.decode_rows)
                .address(step.positions)
                .address(step.row_sequence)
                .address(step.tables)
                .address(step.table_start)
                .address(partial)
                .address(log_sums)
                .address(finished)
                .address(target)
                .f32(scale)
                .u32(heads)
                .u32(kv_heads)
                .f32(score_scale);
            let name = format!("decode_attention_{head_dim}_{}_to_{suffix}", kv.name());
            let launch = Shape {
                grid: [splits, kv_heads, shape.decode_rows as u32],
                block: 128,
                shared: decode_shared_bytes(head_dim, kv),
            };
            self.launch(&name, launch, arguments)?;
        }
        Ok(Tensor { address: target, rows: q.rows, columns: q.columns, format, part_scales: Vec::new() })
    }

    fn gate(&mut self, gate_up: Tensor, next: &Linear) -> Result<Tensor> {
        let width = gate_up.columns / 2;
        let target = self.buffers()?.input.address;
        let (suffix, scale, format) = match next.input_format {
            InputFormat::Bf16 => ("bf16", 1.0, TensorFormat::Bf16),
            InputFormat::E4m3(scale) => ("e4m3", scale, TensorFormat::E4m3),
        };
        let [gate_scale, up_scale] = *gate_up.part_scales.as_slice() else {
            return Err(BackendError::Device("gate and up are two parts of one linear".to_owned()));
        };
        let (splits, stride) = gate_up.splits();
        let arguments = Arguments::default()
            .address(gate_up.address)
            .u32(splits)
            .u64(stride)
            .f32(gate_scale)
            .f32(up_scale)
            .address(target)
            .f32(scale)
            .u32(width as u32);
        let shape = Shape { grid: [(width / 4).div_ceil(256) as u32, gate_up.rows as u32, 1], block: 256, shared: 0 };
        self.launch(&format!("gate_{}_to_{suffix}", gate_up.product_name()), shape, arguments)?;
        Ok(Tensor { address: target, rows: gate_up.rows, columns: width, format, part_scales: Vec::new() })
    }

    fn head(&mut self, residual: Tensor, partial: Option<Tensor>, gain: &Gain, head: &Linear) -> Result<Logits> {
        let rows = self.inputs.shape.logit_rows;
        if rows == 0 {
            // every rank sees the same batch, so none of them enters a collective here
            return Ok(Logits { rows: 0 });
        }
        let partial = partial.map(|partial| self.reduce_over_ranks(partial)).transpose()?;
        let listed = (self.inputs.addresses().logit_rows, rows);
        let normed = self.submit_norm(&residual, partial, &gain.buffer, head.input_format, Some(listed))?;
        let target = self.buffers()?.logits.address;
        head.apply((&self.device, &mut self.kernels, &mut self.matmul), &normed, target, true, self.options.overlap)?;
        if self.setup.plan.ranks > 1 {
            self.gather_vocabulary(rows, head.outputs)?;
        }
        Ok(Logits { rows })
    }

    fn admit(&mut self, admission: &Admission) -> Result<()> {
        self.device.make_current()?;
        self.sampler.admit(&self.device, &mut self.kernels, admission)
    }

    fn release(&mut self, _slot: Slot) {
        // a slot's memory is kept for its next sequence
    }

    fn sample(&mut self, logits: Logits, requests: &[SampleRequest]) -> Result<()> {
        let wanted = |request: &SampleRequest| match *request {
            SampleRequest::Next { row, .. } | SampleRequest::Score { row, .. } => row as usize,
        };
        if requests.iter().any(|request| wanted(request) >= logits.rows) {
            return Err(BackendError::Device("a row of logits is wanted that was not computed".to_owned()));
        }
        let address = self.buffers()?.logits.address;
        self.sampler.sample(&self.device, &mut self.kernels, address, requests)
    }

    fn collect(&mut self) -> Result<SampleResults> {
        self.sampler.collect()
    }

    fn pipeline_depth(&self) -> usize {
        PIPELINE_DEPTH
    }
}

/// A norm's gain, bf16.
pub struct Gain {
    buffer: Buffer,
}

/// This rank's embedding rows, bf16.
pub struct Embedding {
    table: Buffer,
    first_id: u32,
    count: u32,
}

/// The kernel for chunks of a prompt and its shared memory (as its file says).
fn prefill_kernel(head_dim: usize, kv: KvDtype, suffix: &str, hopper: bool) -> (String, u32) {
    if head_dim == 128 && hopper {
        let tile = BLOCK_TOKENS * 256;
        let (kernel, bytes) = match kv {
            KvDtype::Bf16 => ("piped", 1024 + 6 * tile),
            KvDtype::E4m3 => ("wide", 1024 + 2 * tile + 4 * BLOCK_TOKENS * 128),
        };
        return (format!("{kernel}_attention_{}_to_{suffix}", kv.name()), bytes as u32);
    }
    let padded = head_dim * 2 + 16;
    let bytes = match kv {
        KvDtype::Bf16 => 4 * BLOCK_TOKENS * padded,
        KvDtype::E4m3 => 4 * BLOCK_TOKENS * head_dim + 2 * BLOCK_TOKENS * padded,
    };
    (format!("prefill_attention_{head_dim}_{}_to_{suffix}", kv.name()), bytes as u32)
}

/// `decode_shared_bytes` of attention_decode.cu.
fn decode_shared_bytes(head_dim: usize, kv: KvDtype) -> u32 {
    let (warps, tokens, stages) = (4, 16, 3);
    let padded = head_dim * 2 + 16;
    let (raw, unpacked) = match kv {
        KvDtype::Bf16 => (padded, 0),
        KvDtype::E4m3 => (head_dim, 2 * tokens * padded),
    };
    let ring = warps * (stages * 2 * tokens * raw + unpacked);
    let merge = warps * 16 * (head_dim + 2) * 4;
    ring.max(merge) as u32
}
