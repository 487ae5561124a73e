//! What a device must be able to do to run the models: the border between `model/` (what is computed)
//! and `backend/{cpu,cuda}` (how).
//!
//! A backend belongs to one rank and one thread. It is given this rank's shard of every weight, the
//! group's [`Collective`](crate::parallel::Collective) where there are several ranks, and then runs
//! batches. The operations are as coarse as the fused kernels of a GPU: `norm` takes the all-reduce and
//! the residual addition before it, and whatever feeds a linear is given which linear, so that it can
//! write its output in the form that this linear reads (FP8 with its static activation scale).
//!
//! Shapes: T = tokens of the batch, h = hidden size, d = head_dim, H and K = query and KV heads **of this
//! rank**. All activations are row-major [T, ...].

//!
//! Images enter with a later issue: `embed` will then be given the rows that features replace.

use std::sync::Arc;

use bora_common::model::ModelConfig;

use crate::engine::step::{BlockCopy, BlockId, SampledToken, SequenceFault, Slot};
use crate::grammar::Mask;
use crate::parallel::{Abort, Collective};
use crate::weights::ShardPlan;

pub mod cpu;
pub mod cuda;
mod dtype;
pub mod fake;

pub use dtype::{Fp8Mode, KvDtype};

/// What a backend is built from; the constructor itself is each backend's own.
pub struct RankSetup {
    /// The model.
    pub config: ModelConfig,
    /// This rank's part of it.
    pub plan: ShardPlan,
    /// The largest step that will come.
    pub limits: Limits,
    /// Ties the ranks together in host memory. A backend with a transport of its own (NCCL, peer memory)
    /// sets it up through [`Collective::exchange`] and keeps this one for what is small.
    pub collective: Box<dyn Collective>,
}

/// Bounds that buffers can be sized by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tokens of a step (T).
    pub step_tokens: usize,
    /// Sequences of a step, and slots: a slot is below it.
    pub sequences: usize,
    /// Positions of a sequence.
    pub model_len: usize,
    /// Rows of a step whose logits are wanted.
    pub logit_rows: usize,
}

/// How much KV cache to make.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum KvBudget {
    /// So many blocks.
    Blocks(usize),
    /// What fits in so many bytes of this rank's device.
    Bytes(u64),
    /// What fits when the whole process uses this share of the device's memory.
    DeviceShare(f32),
}

/// One step's work, flattened over its sequences in the order of `Step::work`.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// [T] token IDs; `None` where the id is the one sampled last for that slot.
    pub token_ids: Vec<Option<u32>>,
    /// [T] absolute positions.
    pub positions: Vec<u32>,
    /// One entry a sequence.
    pub sequences: Vec<BatchSequence>,
    /// Rows (indices into T) whose logits are wanted, ascending.
    pub logit_rows: Vec<u32>,
}

/// One sequence of a batch.
#[derive(Clone, Debug)]
pub struct BatchSequence {
    /// Its slot.
    pub slot: Slot,
    /// First row and number of rows in [T].
    pub first_row: u32,
    /// Number of rows.
    pub rows: u32,
    /// Tokens in the KV cache once this step has stored its own: attention for row r (position p) reads
    /// positions 0..=p.
    pub context: u32,
    /// Its whole block table.
    pub blocks: Vec<BlockId>,
}

/// A backend failed; the rank can't continue.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The device said no.
    #[error("{0}")]
    Device(String),
    /// Not enough memory; says what was asked for and what would fit.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// Another rank failed or is gone.
    #[error("collective: {0}")]
    Collective(#[from] crate::parallel::CollectiveError),
    /// The checkpoint is wrong.
    #[error(transparent)]
    Weights(#[from] crate::weights::WeightError),
    /// Weights that this backend can't hold, with the tensor's name and the reason.
    #[error("tensor `{tensor}`: {reason}")]
    Unsupported {
        /// The tensor.
        tensor: String,
        /// Why not.
        reason: String,
    },
}

/// Shorthand of this module.
pub type Result<T, E = BackendError> = std::result::Result<T, E>;

/// A device that runs a model's operations, for one rank.
pub trait Backend: Send + Sized + 'static {
    /// Activations on the device.
    type Tensor;
    /// The weights of one or several linears that read the same input (q/k/v; gate/up), stacked along the
    /// output, each part with its own scales.
    type Linear: Send;
    /// A norm's gain.
    type Gain: Send;
    /// Token embedding (this rank's vocabulary rows).
    type Embedding: Send;
    /// Logits of the wanted rows, over the whole vocabulary, on every rank.
    type Logits;

    // ---- loading -------------------------------------------------------------------------------------

    /// Takes this rank's slices of linears that share an input. FP8 parts keep their own weight scales; their
    /// input scales are equal in every known checkpoint, but need not be.
    fn load_linear(&mut self, parts: &[crate::weights::LinearShard<'_>]) -> Result<Self::Linear>;
    /// Takes a gain vector, one row of h numbers.
    fn load_gain(&mut self, gain: &crate::weights::Slice<'_>) -> Result<Self::Gain>;
    /// Takes this rank's rows of the embedding.
    fn load_embedding(&mut self, rows: &crate::weights::VocabularyShard<'_>) -> Result<Self::Embedding>;
    /// Takes this rank's rows of the language-model head.
    fn load_head(&mut self, rows: &crate::weights::VocabularyShard<'_>) -> Result<Self::Linear>;
    /// Blocks of KV cache that the budget gives, once the weights are loaded.
    fn kv_capacity(&mut self, shape: &crate::model::KvShape, budget: KvBudget) -> Result<usize>;
    /// Allocates the KV cache: `blocks` blocks of 64 tokens for every layer. Called once, after the weights
    /// and before the first step.
    fn allocate_kv(&mut self, shape: &crate::model::KvShape, blocks: usize) -> Result<()>;

    /// Bytes of one block of this rank's KV cache.
    fn block_bytes(&self, shape: &crate::model::KvShape) -> usize;
    /// Takes room for `blocks` blocks in host memory, so that [`copy_blocks`](Self::copy_blocks) can be used; returns the seconds
    /// that a block takes on its way. Called once, after `allocate_kv`.
    fn allocate_host(&mut self, shape: &crate::model::KvShape, blocks: usize) -> Result<f64>;

    /// Called once, after `allocate_kv`: the moment to time kernels and to record graphs of `forward`.
    fn warm_up(&mut self, _forward: impl Fn(&mut Self) -> Result<Self::Logits>) -> Result<()> {
        Ok(())
    }

    // ---- one step ------------------------------------------------------------------------------------

    /// Copies blocks between the cache and host memory: `first` before anything that is submitted later, `beside` after those and
    /// before anything that is submitted from the next call on. Each list in its order. Where there is host memory, this is called
    /// once a step, before `execute`.
    fn copy_blocks(&mut self, first: &[BlockCopy], beside: &[BlockCopy]) -> Result<()>;

    /// Runs `forward` over the batch. A backend may record what `forward` does and replay it the next time
    /// for a batch of the same shape (CUDA graphs): everything that varies is read from the batch's
    /// buffers on the device, never from host values inside `forward`.
    fn execute(
        &mut self,
        batch: &Batch,
        forward: impl FnOnce(&mut Self) -> Result<Self::Logits>,
    ) -> Result<Self::Logits>;

    /// Rows of the embedding for the batch's token IDs: the residual stream [T, h]. With vocabulary-parallel
    /// rows the ranks' parts are summed.
    fn embed(&mut self, table: &Self::Embedding) -> Result<Self::Tensor>;

    /// `residual += all_reduce(partial)` (where there is a partial sum), then `rms(residual) * gain` in the
    /// form that `next` reads. `rms` as in models.md: mean and division in float32.
    fn norm(
        &mut self,
        residual: &mut Self::Tensor,
        partial: Option<Self::Tensor>,
        gain: &Self::Gain,
        next: &Self::Linear,
    ) -> Result<Self::Tensor>;

    /// `x W^T` with the scales of each part: [T, sum of the parts' outputs].
    fn linear(&mut self, input: &Self::Tensor, weights: &Self::Linear) -> Result<Self::Tensor>;

    /// Splits [T, (H + 2K) d] into q, k, v; rotates q and k by the positions (q also times s(p)); stores k
    /// and v in the cache blocks of `layer`; returns q [T, H d].
    fn rotate_and_store(&mut self, qkv: Self::Tensor, layer: usize) -> Result<Self::Tensor>;

    /// Causal attention of q over the cache of `layer`: [T, H d], in the form that `next` reads.
    fn attend(&mut self, q: Self::Tensor, layer: usize, next: &Self::Linear) -> Result<Self::Tensor>;

    /// `silu(x G^T) * (x U^T)` with `gate_up` the weights of G and U (i rows each) and their scales: [T, i], in the form
    /// that `next` reads.
    fn gated_linear(
        &mut self,
        input: &Self::Tensor,
        gate_up: &Self::Linear,
        next: &Self::Linear,
    ) -> Result<Self::Tensor>;

    /// The wanted rows only (`Batch::logit_rows`): adds the partial sums, final norm, head, and gathers the
    /// ranks' vocabulary shards. Every rank gets the same numbers bit for bit, since every rank samples.
    fn head(
        &mut self,
        residual: Self::Tensor,
        partial: Option<Self::Tensor>,
        gain: &Self::Gain,
        head: &Self::Linear,
    ) -> Result<Self::Logits>;

    /// What frees this rank, from any thread, where it waits for the others on its device.
    fn aborters(&self) -> Vec<Arc<dyn Abort>> {
        Vec::new()
    }

    // ---- sampling ------------------------------------------------------------------------------------

    /// A sequence begins in `slot`: the sampler's state for it.
    fn admit(&mut self, admission: &crate::engine::step::Admission) -> Result<()>;
    /// The sequence in `slot` ended.
    fn release(&mut self, slot: Slot);
    /// Samples the next token IDs of each request and remembers the last one as the slot's. May return before the
    /// device is done; results come from [`collect`](Self::collect), in order.
    fn sample(&mut self, logits: Self::Logits, requests: &[SampleRequest]) -> Result<()>;
    /// Waits for the oldest `sample`.
    fn collect(&mut self) -> Result<SampleResults>;
    /// `sample` calls that may be outstanding.
    fn pipeline_depth(&self) -> usize {
        1
    }
    /// Tokens of prompts that a step computes in the time of one of them, or nearly: fewer leave the device idle.
    fn least_chunk(&self) -> usize {
        1
    }
}

/// What to read from one row of the logits.
#[derive(Clone, Debug)]
pub enum SampleRequest {
    /// Sample the next id of a sequence, and, as long as the token IDs sampled are those of `drafts`, the id after it from the next
    /// row.
    Next {
        /// Index of the first row among the wanted rows; those of the drafts follow it.
        row: u32,
        /// The sequence.
        slot: Slot,
        /// The position that the first id sampled will have (counts the random stream).
        position: u32,
        /// Draft tokens at what is sampled: `drafts[i]` is the token of row `row + 1 + i`.
        drafts: Vec<u32>,
        /// `masks[i]` holds the token IDs that may be sampled from row `row + i`: one for each row, or none (all token IDs).
        masks: Vec<Mask>,
    },
    /// Report the logprob of a known id (a prompt position).
    Score {
        /// Index among the wanted rows.
        row: u32,
        /// The sequence.
        slot: Slot,
        /// The id that follows.
        target: u32,
        /// Alternatives listed.
        top: u32,
    },
}

/// Responses to the requests of one `sample` call, each kind in the order of its requests.
#[derive(Debug, Default)]
pub struct SampleResults {
    /// For each `Next`: one id at least, or the fault of its first row.
    pub sampled: Vec<(Slot, std::result::Result<Vec<SampledToken>, SequenceFault>)>,
    /// For each `Score`.
    pub scored: Vec<crate::engine::step::PositionLogprobs>,
    /// From the start of the step's `execute` to the end of its `sample`, on the device.
    pub seconds: f64,
}
