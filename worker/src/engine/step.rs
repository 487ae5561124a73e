//! A step: the only message from the leader's scheduler to the ranks.
//!
//! The leader makes a [`Step`], every rank runs it, and rank 0 returns a [`StepOutput`]. All ranks sample: their
//! gathered logits are equal bit for bit. A step therefore never waits for the tokens of the previous step;
//! [`Tokens::Sampled`] names the token that is still on the device.

use bora_common::telemetry::TraceContext;
use serde::{Deserialize, Serialize};

/// The place of a running sequence in the tables of every rank. It is reused after the sequence is released.
pub type Slot = u32;

/// A block of the KV cache, with the same number on every rank.
pub type BlockId = u32;

/// A block of host memory, with the same number on every rank.
pub type HostBlock = u32;

/// A copy of a block's content between device and host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BlockCopy {
    /// From the KV cache to host memory.
    ToHost {
        /// Source.
        block: BlockId,
        /// Target.
        host: HostBlock,
    },
    /// From host memory to the KV cache.
    FromHost {
        /// Source.
        host: HostBlock,
        /// Target.
        block: BlockId,
    },
}

/// Host memory of the ranks for offloaded blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct HostMemory {
    /// Capacity in blocks.
    pub blocks: u32,
    /// Seconds to copy one block.
    pub seconds_per_block: f64,
}

/// One forward pass of the model over a batch of sequences.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Consecutive number from 1; a rank that sees a gap stops.
    pub id: u64,
    /// Sequences that ended. `admit` of the same step may reuse their slots and device state.
    pub release: Vec<Slot>,
    /// Sequences that run for the first time.
    pub admit: Vec<Admission>,
    /// Copies that run before the work, in order.
    pub copies: Vec<BlockCopy>,
    /// Copies that may run beside the work, in order, after `copies`. No work of this step writes what they read or
    /// reads what they write. They complete before the next step begins.
    pub beside: Vec<BlockCopy>,
    /// The work, at most one entry per slot.
    pub work: Vec<Work>,
    /// Trace contexts of the traced sequences in `admit`.
    pub traces: Vec<(Slot, TraceContext)>,
}

/// A sequence that begins to run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Admission {
    /// Slot of the sequence until it is released.
    pub slot: Slot,
    /// Sampling parameters.
    pub sampling: crate::sample::SamplingParams,
    /// Prompt tokens, if the sampler needs them (repetition penalty); empty otherwise.
    pub prompt_ids: Vec<u32>,
    /// Tokens that another group generated (failover); penalties and the grammar include them.
    pub generated_ids: Vec<u32>,
}

/// Work of one sequence in a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Work {
    /// Slot of the sequence.
    pub slot: Slot,
    /// Position of the first computed token; the KV cache holds all positions before it.
    pub start: u32,
    /// Tokens to compute.
    pub tokens: Tokens,
    /// Blocks that this step appends to the sequence's block table; the first time they include the blocks found in the
    /// prefix cache. Block `p / 64` of the table holds position `p`.
    pub new_blocks: Vec<BlockId>,
    /// Whether to sample the token after the last token of this work.
    pub sample: bool,
    /// Number of trailing draft tokens. The token after the last token before them is sampled, and as long as each
    /// draft token equals the sampled token, the token after it too. Requires `sample` and known tokens.
    pub drafts: u32,
    /// Requests logprobs of the token after each token of this work (a prompt with `prompt_logprobs`).
    pub prompt_logprobs: Option<PromptLogprobs>,
}

/// The tokens of a sequence's work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Tokens {
    /// Known tokens: a chunk of a prompt, or a resumed token.
    Ids(Vec<u32>),
    /// The token that the previous step sampled for this slot.
    Sampled,
}

impl Tokens {
    /// Number of positions that the work computes.
    pub fn count(&self) -> usize {
        match self {
            Tokens::Ids(ids) => ids.len(),
            Tokens::Sampled => 1,
        }
    }
}

/// Requested logprobs of a chunk of a prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PromptLogprobs {
    /// Alternatives per position.
    pub top: u32,
    /// `targets[i]` is the token after token `i` of the work. There is one target less than tokens if the prompt ends
    /// with this chunk.
    pub targets: Vec<u32>,
}

/// Output of a step on rank 0.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// Number of the step.
    pub id: u64,
    /// One entry per work with `sample`, in the order of the works.
    pub sampled: Vec<Sampled>,
    /// One entry per work with `prompt_logprobs`, in the order of the works.
    pub prompt_logprobs: Vec<PromptOutput>,
    /// Device time of the step, seconds.
    pub seconds: f64,
}

/// Tokens sampled for a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// Slot of the sequence.
    pub slot: Slot,
    /// One token, and one more for each accepted draft token; or the fault of this sequence alone (a NaN in its
    /// logits). A fault after a draft token only ends the tokens, because the next step meets the fault again.
    pub result: Result<Vec<SampledToken>, SequenceFault>,
}

/// A sampled token and, if requested, its logprobs.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    /// The token ID.
    pub token_id: u32,
    /// `Some` if the sequence requested logprobs.
    pub logprobs: Option<PositionLogprobs>,
}

/// Logprobs at one position: natural logarithm of the softmax of the raw logits, before any penalty, temperature or
/// filter, as in vLLM.
#[derive(Clone, Debug, PartialEq)]
pub struct PositionLogprobs {
    /// The token at the position.
    pub chosen: TokenLogprob,
    /// The most likely tokens, best first; as many as requested.
    pub top: Vec<TokenLogprob>,
}

/// Logprob of a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token ID.
    pub token_id: u32,
    /// Natural logarithm of the token's probability.
    pub logprob: f32,
    /// Rank of the token at its position; 1 is the most likely token.
    pub rank: u32,
}

/// Logprobs of a chunk of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptOutput {
    /// Slot of the sequence.
    pub slot: Slot,
    /// Position in the sequence of the first entry (position of the first token of the work + 1).
    pub start: u32,
    /// One entry per target.
    pub positions: Vec<PositionLogprobs>,
}

/// Why one sequence of a step failed while the others continue.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SequenceFault {
    /// The logits hold a NaN or an infinity.
    #[error("the model produced logits that are not numbers at position {position}")]
    NotANumber {
        /// Position.
        position: u32,
    },
    /// The grammar failed.
    #[error("the grammar failed at position {position}: {reason}")]
    Grammar {
        /// Position.
        position: u32,
        /// Reason, as llguidance reports it.
        reason: String,
    },
}

/// Runs steps on one rank, or on a whole group from its leader.
///
/// Steps run in the order of their submission. Up to [`pipeline_depth`](Self::pipeline_depth) steps may be submitted
/// before the first is collected, so that the CPU prepares one step while the device runs another.
pub trait StepRunner: Send {
    /// Maximum steps in flight; 1 means submit, collect, submit, ...
    fn pipeline_depth(&self) -> usize;

    /// Submits a step. May return before the step ran.
    fn submit(&mut self, step: Step) -> Result<(), RunError>;

    /// Waits for the oldest submitted step and returns its output.
    fn collect(&mut self) -> Result<StepOutput, RunError>;

    /// Host memory that steps may copy blocks to.
    fn host_memory(&self) -> HostMemory {
        HostMemory::default()
    }
    /// Prompt tokens that a step computes in nearly the time of one; fewer tokens leave the device idle.
    fn least_chunk(&self) -> usize {
        1
    }
    /// Reports that no sequence runs or waits.
    fn idle(&mut self) {}
}

/// The group failed: every sequence must be placed on another group.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RunError {
    /// A device error, on this rank.
    #[error("rank {rank}, step {step}: {reason}")]
    Device {
        /// The rank that failed.
        rank: u32,
        /// Step that the rank ran.
        step: u64,
        /// Reason, as the device reports it.
        reason: String,
    },
    /// A rank died, stopped or is unreachable.
    #[error("rank {rank} ({host}) is gone: {reason}")]
    RankLost {
        /// The rank.
        rank: u32,
        /// Host of the rank.
        host: String,
        /// How the leader detected the loss.
        reason: String,
    },
    /// The steps are invalid, which is a bug.
    #[error("step {step} is not valid: {reason}")]
    Invalid {
        /// The step.
        step: u64,
        /// What is wrong with the step.
        reason: String,
    },
}
