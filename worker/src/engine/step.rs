//! What one step is: the only thing that the leader's scheduler says to the ranks.
//!
//! The leader makes a [`Step`]; every rank runs it and rank 0 reads a [`StepOutput`]. All ranks sample
//! (their gathered logits are equal bit for bit), so a step never waits for the token IDs of the one before it:
//! [`Tokens::Sampled`] names the id that is still on the device.

use bora_common::telemetry::TraceContext;
use serde::{Deserialize, Serialize};

/// A running sequence's place in every rank's tables. Reused once the sequence is released.
pub type Slot = u32;

/// A block of the KV cache, numbered the same on every rank.
pub type BlockId = u32;

/// A block of host memory, numbered the same on every rank.
pub type HostBlock = u32;

/// A block's content goes from one place to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BlockCopy {
    /// From the KV cache to host memory.
    ToHost {
        /// From.
        block: BlockId,
        /// To.
        host: HostBlock,
    },
    /// From host memory to the KV cache.
    FromHost {
        /// From.
        host: HostBlock,
        /// To.
        block: BlockId,
    },
}

/// The host memory that ranks keep blocks in.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct HostMemory {
    /// How many blocks it has room for.
    pub blocks: u32,
    /// What it takes to copy one.
    pub seconds_per_block: f64,
}

/// One pass through the model over a batch of sequences.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Counts up from 1; a rank that sees a gap stops.
    pub id: u64,
    /// Sequences that ended: their slots and device state may be reused by `admit` of this very step.
    pub release: Vec<Slot>,
    /// Sequences that run for the first time.
    pub admit: Vec<Admission>,
    /// Copies that are done before the work, in order.
    pub copies: Vec<BlockCopy>,
    /// Copies that may run beside the work, in order, after `copies`: nothing of this step writes where they read or reads where
    /// they write. They are done before the next step begins.
    pub beside: Vec<BlockCopy>,
    /// What to compute, at most one entry a slot.
    pub work: Vec<Work>,
    /// Of those in `admit`, the ones that are traced.
    pub traces: Vec<(Slot, TraceContext)>,
}

/// A sequence that begins to run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Admission {
    /// Its slot until it is released.
    pub slot: Slot,
    /// How its token IDs are sampled.
    pub sampling: crate::sample::SamplingParams,
    /// Prompt token IDs, as far as the sampler needs them (repetition penalty); empty otherwise.
    pub prompt_ids: Vec<u32>,
    /// Ids generated before by another group (failover): penalties and the grammar count them.
    pub generated_ids: Vec<u32>,
}

/// What one sequence does in a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Work {
    /// Which sequence.
    pub slot: Slot,
    /// Position of the first token computed; everything before it is in the KV cache.
    pub start: u32,
    /// The tokens computed.
    pub tokens: Tokens,
    /// Blocks appended to the sequence's block table by this step (the first time: those found in the
    /// prefix cache as well). Block `p / 64` of the table holds position `p`.
    pub new_blocks: Vec<BlockId>,
    /// Sample the id that follows the last token of this work.
    pub sample: bool,
    /// How many of the last tokens are only drafted. The id that follows the last token before them is sampled, and as
    /// long as the next token is what was sampled, the id behind that one too. Only with `sample` and known token IDs.
    pub drafts: u32,
    /// Report logprobs of what follows each token of this work (a prompt with `prompt_logprobs`).
    pub prompt_logprobs: Option<PromptLogprobs>,
}

/// The tokens of a chunk of work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Tokens {
    /// Known token IDs: a chunk of a prompt, or a resumed id.
    Ids(Vec<u32>),
    /// The one id that the step before sampled for this slot.
    Sampled,
}

impl Tokens {
    /// How many positions the work computes.
    pub fn count(&self) -> usize {
        match self {
            Tokens::Ids(ids) => ids.len(),
            Tokens::Sampled => 1,
        }
    }
}

/// Logprobs wanted over a chunk of a prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PromptLogprobs {
    /// Alternatives listed for each position.
    pub top: u32,
    /// `targets[i]` is the id that follows token `i` of the work; one fewer than the tokens where the
    /// prompt ends with this chunk.
    pub targets: Vec<u32>,
}

/// What rank 0 learned from a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// The step's id.
    pub id: u64,
    /// One entry for each work with `sample`, in the order of the works.
    pub sampled: Vec<Sampled>,
    /// One entry for each work with `prompt_logprobs`, in the order of the works.
    pub prompt_logprobs: Vec<PromptOutput>,
    /// From the step's start to its end on the device.
    pub seconds: f64,
}

/// The token IDs sampled for a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// Which sequence.
    pub slot: Slot,
    /// One id, and one more for each draft token that came true; or what went wrong with this sequence alone (a NaN in its
    /// logits). A fault behind a draft token only ends the token IDs: the next step meets it again.
    pub result: Result<Vec<SampledToken>, SequenceFault>,
}

/// An id and, where asked for, how likely it was.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    /// The id.
    pub token_id: u32,
    /// Present where the sequence asked for logprobs.
    pub logprobs: Option<PositionLogprobs>,
}

/// Logprobs at one position (natural logarithm of the softmax of the raw logits, before any penalty,
/// temperature or filter, as in vLLM).
#[derive(Clone, Debug, PartialEq)]
pub struct PositionLogprobs {
    /// The token that stands there.
    pub chosen: TokenLogprob,
    /// The most likely ones, best first; as many as were asked for.
    pub top: Vec<TokenLogprob>,
}

/// A token's probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token_id: u32,
    /// Its natural logarithm.
    pub logprob: f32,
    /// 1 = the most likely token of its position.
    pub rank: u32,
}

/// Logprobs over a chunk of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptOutput {
    /// Which sequence.
    pub slot: Slot,
    /// Position in the sequence of the first entry (the first work position + 1).
    pub start: u32,
    /// One entry for each target.
    pub positions: Vec<PositionLogprobs>,
}

/// Why one sequence of a step failed while the others live.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SequenceFault {
    /// Its logits hold a NaN or an infinity where a number is needed.
    #[error("the model produced logits that are not numbers at position {position}")]
    NotANumber {
        /// Where.
        position: u32,
    },
    /// Its grammar can't continue.
    #[error("the grammar failed at position {position}: {reason}")]
    Grammar {
        /// Where.
        position: u32,
        /// In llguidance's words.
        reason: String,
    },
}

/// Runs steps on one rank, or on a whole group as seen from its leader.
///
/// Steps run in the order they were submitted. Up to [`pipeline_depth`](Self::pipeline_depth) of them may
/// be submitted before the first is collected, so that the CPU prepares one while the device runs another.
pub trait StepRunner: Send {
    /// Steps that may be in flight at once; 1 = submit, collect, submit, ...
    fn pipeline_depth(&self) -> usize;

    /// Hands in a step. May return before it ran.
    fn submit(&mut self, step: Step) -> Result<(), RunError>;

    /// Waits for the oldest submitted step.
    fn collect(&mut self) -> Result<StepOutput, RunError>;

    /// What steps may copy blocks to.
    fn host_memory(&self) -> HostMemory {
        HostMemory::default()
    }
    /// Tokens of prompts that a step computes in the time of one of them, or nearly: fewer leave a device idle.
    fn least_chunk(&self) -> usize {
        1
    }
    /// No sequence runs and none waits.
    fn idle(&mut self) {}
}

/// The group can't continue: every sequence of it has to be placed elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RunError {
    /// A device error, on this rank.
    #[error("rank {rank}, step {step}: {reason}")]
    Device {
        /// The rank that failed.
        rank: u32,
        /// The step that it ran.
        step: u64,
        /// In the device's words.
        reason: String,
    },
    /// A rank died, stopped or can't be reached.
    #[error("rank {rank} ({host}) is gone: {reason}")]
    RankLost {
        /// The rank.
        rank: u32,
        /// Where it ran.
        host: String,
        /// How the leader noticed.
        reason: String,
    },
    /// The steps themselves are wrong: a bug.
    #[error("step {step} is not valid: {reason}")]
    Invalid {
        /// The step.
        step: u64,
        /// What is wrong with it.
        reason: String,
    },
}
