//! The CUDA backend: one rank on one NVIDIA GPU of compute capability 9.0 or later.
//!
//! Kernels come from `worker/kernels`, large GEMMs from cuBLASLt, both loaded at run time. The
//! residual stream is f32, everything between kernels bf16 or, before FP8 linears, e4m3. All memory is taken
//! before the first step. All work goes through one stream; steps of single tokens are replayed from graphs.

#![allow(unsafe_code)] // the driver's interface is C; each use says why it holds

mod attention;
pub mod check;
mod decode_kernel;
mod driver;
mod graphs;
mod host;
pub mod inspect;
mod kernels;
mod libraries;
mod linear;
mod machine;
mod matmul;
mod nccl;
mod norm;
mod options;
mod p2p_all_reduce;
mod ranks;
mod sampler;
mod skinny_gemm;
mod split_kv;
mod step;
mod tiles;

use std::collections::HashMap;
use std::sync::Arc;

use bora_common::blocks::BLOCK_TOKENS;
use bora_common::model::RopeTable;

use super::{Backend, BackendError, Batch, KvBudget, KvDtype, RankSetup, Result, SampleRequest, SampleResults};
use crate::engine::step::{Admission, BlockCopy, Slot};
use crate::model::KvShape;
use crate::parallel::Abort;
use crate::weights::{LinearShard, Slice, VocabularyShard};

use decode_kernel::DecodeParts;
use driver::{Address, Arguments, Buffer, Device, Shape};
use graphs::{GraphSize, KnownGemm, Recording};
use host::HostBlocks;
use kernels::Kernels;
use linear::{InputFormat, TensorFormat, load_slice};
pub use linear::{Linear, Tensor};
pub(crate) use machine::memory;
pub use machine::{CudaUnavailable, survey};
use matmul::Matmul;
use nccl::Communicator;
pub use options::{AllReduceKind, CudaOptions};
use p2p_all_reduce::Peers;
use sampler::Sampler;
use skinny_gemm::Wide;
use step::{ITEM_ROWS, StepInputs};

/// Steps in flight: the CPU prepares one while the GPU runs another.
const PIPELINE_DEPTH: usize = 2;
/// Left free of KV cache for what is taken later: graphs, kernels' code, samplers with penalties.
const RESERVED_BYTES: u64 = 512 << 20;

/// One rank on a GPU.
pub struct CudaBackend {
    // fields drop in this order: what was recorded before what it reads, the device last
    graphs: HashMap<GraphSize, Recording>,
    /// Where there are several ranks.
    communicator: Option<Communicator>,
    /// Where the ranks are GPUs of one host that reach each other.
    peers: Option<Peers>,
    /// Nothing is exchanged with the other ranks: only while a step is timed.
    alone: bool,
    kernels: Kernels,
    matmul: Matmul,
    wide: Wide,
    inputs: StepInputs,
    sampler: Sampler,
    /// Before the cache that it copies from and to.
    host: Option<HostBlocks>,
    cache: Option<Cache>,
    buffers: Option<Buffers>,
    rope: RopeTable,
    frequencies: Buffer,
    widths: Widths,
    gemms: Vec<KnownGemm>,
    setup: RankSetup,
    options: CudaOptions,
    device: Device,
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

/// Activations. Each step uses them over again: a linear's input, its GEMM, the queries, the residual.
struct Buffers {
    residual: Buffer,
    input: Buffer,
    gemm_output: Buffer,
    /// What SwiGLU leaves of few rows, while their input is still read.
    gated: Buffer,
    query: Buffer,
    logits: Buffer,
    /// [ranks][rows][columns of a rank]: the logits of all ranks, where there are several.
    gathered: Buffer,
    partial_attention: Buffer,
    log_sum_exp: Buffer,
    finished: Buffer,
    /// Values of a pass of prompts for `hopper_attention` over an e4m3 cache.
    transposed_values: Buffer,
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
    pub fn new(mut setup: RankSetup, options: CudaOptions) -> Result<Self> {
        let head_dim = setup.config.head_dim;
        if ![32, 64, 128].contains(&head_dim) {
            return Err(BackendError::Unsupported {
                tensor: "head_dim".to_owned(),
                reason: format!("{head_dim}: the kernels know 32, 64 and 128"),
            });
        }
        let options = CudaOptions { kv: options.kv.or(KvDtype::Bf16), ..options };
        if options.kv == KvDtype::F32 {
            return Err(BackendError::Unsupported {
                tensor: "the KV cache".to_owned(),
                reason: "f32 is for the CPU, a GPU takes bf16 or fp8".to_owned(),
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
        let wide = Wide::new(&device)?;
        let rope = setup.config.rope.table(head_dim);
        let frequencies = Buffer::new(rope.frequencies.len() * 4, "the rotary frequencies")?;
        let bytes: Vec<u8> = rope.frequencies.iter().flat_map(|frequency| frequency.to_le_bytes()).collect();
        // SAFETY: the buffer was made as long as `bytes`.
        unsafe { device.upload(frequencies.address, &bytes, "the rotary frequencies") }?;
        let parts = DecodeParts::new(head_dim, options.kv, device.multiprocessors, setup.plan.kv_heads.len());
        let room = attention::transposes_values(head_dim, options.kv, device.hopper)
            .then(|| setup.limits.model_len.div_ceil(tiles::ROUND_TOKENS));
        let inputs = StepInputs::new(&setup.limits, group, parts, room)?;
        let sampler = Sampler::new(&device, &setup.limits, setup.config.vocab_size)?;
        tracing::info!(gpu = device.name, multiprocessors = device.multiprocessors, "opened a GPU");
        let communicator = match setup.plan.ranks {
            1 => None,
            _ => Some(Communicator::connect(&mut *setup.collective)?),
        };
        let peers = match options.all_reduce {
            _ if communicator.is_none() => None,
            AllReduceKind::Nccl => None,
            AllReduceKind::Measured | AllReduceKind::Peers => {
                Peers::connect(&device, &mut *setup.collective, setup.config.hidden_size)?
            }
        };
        Ok(Self {
            graphs: HashMap::new(),
            communicator,
            peers,
            alone: false,
            kernels,
            matmul,
            wide,
            inputs,
            sampler,
            cache: None,
            host: None,
            buffers: None,
            rope,
            frequencies,
            widths: Widths::default(),
            gemms: Vec::new(),
            setup,
            options,
            device,
        })
    }

    /// Refuses weights that leave no room on this GPU, before they are read, and says what would fit.
    pub fn check_room(&self, weight_bytes: u64) -> Result<()> {
        let (free, total) = self.device.memory()?;
        let needed = weight_bytes + RESERVED_BYTES;
        if needed <= free as u64 {
            return Ok(());
        }
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        let ranks = self.setup.plan.ranks as u64;
        // most of what a rank holds is cut by the number of ranks
        let enough = [2, 4, 8].into_iter().find(|more| *more > ranks && needed * ranks / more <= free as u64 * 9 / 10);
        let advice = enough.map_or("no number of such GPUs up to 8 would do".to_owned(), |ranks| {
            format!("{ranks} GPUs would do (--tensor-parallel-size {ranks})")
        });
        Err(BackendError::OutOfMemory(format!(
            "the weights of rank {} take {:.1} GiB, {} has {:.1} of {:.1} GiB free; {advice}",
            self.setup.plan.rank,
            gib(weight_bytes),
            self.device.name,
            gib(free as u64),
            gib(total as u64),
        )))
    }

    /// Logits as numbers [rows, vocabulary], for checks.
    fn read_logits(&self, logits: &Logits) -> Result<Vec<f32>> {
        let mut bytes = vec![0u8; logits.rows * self.setup.config.vocab_size * 4];
        // SAFETY: the buffer holds `limits.logit_rows` rows, and `logits` has no more.
        unsafe { self.device.download(&mut bytes, self.buffers()?.logits.address, "reading logits") }?;
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
        // a part of the keys leaves the rows of two tiles: an item's that began before it, and one's that continues behind it
        let partials = self.inputs.parts.max() * 2 * plan.kv_heads.len() * ITEM_ROWS;
        let transposed = self.inputs.room.unwrap_or(0) * tiles::ROUND_TOKENS * plan.kv_heads.len() * config.head_dim;
        self.buffers = Some(Buffers {
            residual: Buffer::new(rows * config.hidden_size * 4, "the residual stream")?,
            input: Buffer::new(rows * self.widths.input_bytes.max(config.hidden_size * 2), "the inputs of linears")?,
            gemm_output: Buffer::new(
                Linear::output_bytes(self.widths.outputs, rows).max(rows * config.hidden_size * 4),
                "the GEMM outputs",
            )?,
            gated: Buffer::new(rows.min(skinny_gemm::MAX_ROWS) * self.widths.outputs / 2, "the gated inputs")?,
            query: Buffer::new(rows * heads * config.head_dim * 2, "the queries")?,
            logits: Buffer::new(logit_rows * config.vocab_size.max(plan.vocabulary_per_rank) * 4, "the logits")?,
            gathered: match plan.ranks {
                1 => Buffer::new(0, "nothing")?,
                ranks => Buffer::new(logit_rows * ranks * plan.vocabulary_per_rank * 4, "the logits of all ranks")?,
            },
            partial_attention: Buffer::new(partials * config.head_dim * 4, "the partial sums of attention")?,
            log_sum_exp: Buffer::new(partials * 4, "the partial sums of attention")?,
            finished: Buffer::new(rows * plan.kv_heads.len() * 4, "the counters of attention")?,
            transposed_values: Buffer::new(transposed, "the transposed values")?,
            angles: Buffer::new(rows * config.head_dim * 4, "the rotary angles")?,
            query_scale: Buffer::new(rows * 4, "the query scales")?,
            kv_place: Buffer::new(rows * 4, "the places in the cache")?,
        });
        // counters are zero between steps
        self.device.fill(&self.buffers()?.finished, 0)?;
        self.warm_up_all_reduce()
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
        self.register_gemm(&linear, false);
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
        let shard = LinearShard { weight: rows.rows.clone(), scales: None };
        let linear = Linear::load(&self.device, &mut self.kernels, &[shard])?;
        self.register_gemm(&linear, true);
        Ok(linear)
    }

    fn kv_capacity(&mut self, shape: &KvShape, budget: KvBudget) -> Result<usize> {
        self.device.make_current()?;
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
        // a rank is loaded by one thread and run by another
        self.device.make_current()?;
        self.take_buffers()?;
        let plane_bytes = (blocks + 1) * shape.kv_heads * BLOCK_TOKENS * shape.head_dim * self.options.kv.size();
        let buffer = Buffer::new(2 * shape.layers * plane_bytes, "the KV cache")?;
        self.device.fill(&buffer, 0)?;
        self.cache = Some(Cache { buffer, plane_bytes: plane_bytes as u64, shape: *shape });
        self.inputs.set_spare_block(blocks as u32);
        self.device.synchronize()
    }

    fn warm_up(&mut self, forward: impl Fn(&mut Self) -> Result<Logits>) -> Result<()> {
        self.device.make_current()?;
        self.tune_gemms()?;
        self.record_graphs(&forward)?;
        self.time_communication(&forward)
    }

    fn block_bytes(&self, shape: &KvShape) -> usize {
        shape.block_bytes(self.options.kv.size())
    }

    fn allocate_host(&mut self, shape: &KvShape, blocks: usize) -> Result<f64> {
        self.take_host_memory(shape, blocks)
    }

    fn copy_blocks(&mut self, first: &[BlockCopy], beside: &[BlockCopy]) -> Result<()> {
        self.submit_copies(first, beside)
    }

    fn execute(&mut self, batch: &Batch, forward: impl FnOnce(&mut Self) -> Result<Logits>) -> Result<Logits> {
        self.run_batch(batch, forward)
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
            .address(self.sampler.last_sampled.address)
            .u32(table.first_id)
            .u32(table.count)
            .u32(hidden as u32);
        self.launch("embed", Shape { grid, block: 256, shared: 0 }, embed)?;
        let residual =
            Tensor { address: residual, rows, columns: hidden, format: TensorFormat::F32, part_scales: Vec::new() };
        self.all_reduce(residual)
    }

    fn norm(&mut self, residual: &mut Tensor, partial: Option<Tensor>, gain: &Gain, next: &Linear) -> Result<Tensor> {
        self.submit_norm(residual, partial, &gain.buffer, next.input_format, None)
    }

    fn linear(&mut self, input: &Tensor, weights: &Linear) -> Result<Tensor> {
        let (target, overlap) = (self.buffers()?.gemm_output.address, self.options.overlap);
        if self.wide.multiplies(weights, input.rows) {
            return self.wide.multiply((&self.device, &mut self.kernels), input, weights, target, overlap);
        }
        weights.apply((&self.device, &mut self.kernels, &mut self.matmul), input, target, false, overlap)
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
        let name = format!("rope_{}_kv_{}", qkv.output_name(), self.options.kv.name());
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
        self.submit_attention(&q, layer, next.input_format)
    }

    fn gated_linear(&mut self, input: &Tensor, gate_up: &Linear, next: &Linear) -> Result<Tensor> {
        if self.wide.gates(gate_up, next, input.rows) {
            let target = self.buffers()?.gated.address;
            let tools = (&self.device, &mut self.kernels);
            return self.wide.gate(tools, input, (gate_up, next), target, self.options.overlap);
        }
        let gate_up = self.linear(input, gate_up)?;
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
        self.launch(&format!("gate_{}_to_{suffix}", gate_up.output_name()), shape, arguments)?;
        Ok(Tensor { address: target, rows: gate_up.rows, columns: width, format, part_scales: Vec::new() })
    }

    fn head(&mut self, residual: Tensor, partial: Option<Tensor>, gain: &Gain, head: &Linear) -> Result<Logits> {
        let rows = self.inputs.shape.logit_rows;
        if rows == 0 {
            // every rank sees the same batch, so none of them enters a collective here
            return Ok(Logits { rows: 0 });
        }
        let listed = (self.inputs.addresses().logit_rows, rows);
        let normed = self.submit_norm(&residual, partial, &gain.buffer, head.input_format, Some(listed))?;
        let target = self.buffers()?.logits.address;
        head.apply((&self.device, &mut self.kernels, &mut self.matmul), &normed, target, true, self.options.overlap)?;
        self.gather_vocabulary(rows)?;
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
            SampleRequest::Next { row, ref drafts, .. } => row as usize + drafts.len(),
            SampleRequest::Score { row, .. } => row as usize,
        };
        if requests.iter().any(|request| wanted(request) >= logits.rows) {
            return Err(BackendError::Device("a row of logits is wanted that was not computed".to_owned()));
        }
        let address = self.buffers()?.logits.address;
        self.sampler.sample(&self.device, &mut self.kernels, address, requests)
    }

    fn collect(&mut self) -> Result<SampleResults> {
        let results = self.sampler.collect()?;
        // what a sum brought that was cut short is not to be used
        self.communicator.as_ref().map_or(Ok(()), Communicator::check)?;
        self.peers.as_ref().map_or(Ok(()), Peers::check)?;
        Ok(results)
    }

    fn aborters(&self) -> Vec<Arc<dyn Abort>> {
        let communicator = self.communicator.as_ref().map(Communicator::aborter);
        communicator.into_iter().chain(self.peers.as_ref().map(Peers::aborter)).collect()
    }

    fn pipeline_depth(&self) -> usize {
        PIPELINE_DEPTH
    }

    /// As many as give each multiprocessor a block of prefill attention. A block walks over all keys before its tile, and
    /// takes as long whether the others have work or not.
    fn least_chunk(&self) -> usize {
        let tiles = self.device.multiprocessors as usize / self.setup.plan.kv_heads.len();
        tiles * step::TILE_ROWS / self.setup.plan.query_group()
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
