//! What the ranks of a group say to each other within a step, in host memory.
//!
//! Sums are made in the order of the ranks, on every rank: all ranks end with the same bits, whatever
//! arrives first. Every call is entered by all ranks in the same order; one that does not come is an
//! error on the others within the time-out, never a hang.

use std::sync::Arc;
use std::time::Duration;

/// Ties one rank to the others.
pub trait Collective: Send {
    /// This rank.
    fn rank(&self) -> usize;

    /// Ranks of the group.
    fn ranks(&self) -> usize;

    /// Replaces `values` by the sum over the ranks; equally long on all of them.
    fn all_reduce(&mut self, values: &mut [f32]) -> Result<(), CollectiveError>;

    /// Puts the `own` numbers of each rank one after the other into `all` (ranks times as long).
    fn all_gather(&mut self, own: &[f32], all: &mut [f32]) -> Result<(), CollectiveError>;

    /// Hands each rank's bytes (of any length) to all ranks, in the order of the ranks. For what is small
    /// and rare: addresses, token IDs of communicators, memory handles.
    fn exchange(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError>;

    /// Waits until all ranks are here.
    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.exchange(&[]).map(|_| ())
    }

    /// A handle that ends this rank's present and later calls with an error, from any thread.
    fn aborter(&self) -> Arc<dyn Abort>;
}

/// Ends a rank's collective calls from outside.
pub trait Abort: Send + Sync {
    /// Every present and later call of the rank fails with [`CollectiveError::Aborted`] and this reason.
    fn abort(&self, reason: &str);
}

/// The ranks are no longer together; the group can't continue.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    /// A rank's end of the line is closed, or it said that it failed.
    #[error("rank {rank} is gone: {reason}")]
    Lost {
        /// Which one.
        rank: usize,
        /// How it was noticed.
        reason: String,
    },
    /// A rank did not come in time.
    #[error("rank {rank} did not answer within {waited:?}")]
    Timeout {
        /// Which one.
        rank: usize,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The group was ended.
    #[error("the group was ended: {0}")]
    Aborted(String),
    /// Ranks are at different calls or brought different lengths: a bug.
    #[error("rank {rank} is out of step: {reason}")]
    OutOfStep {
        /// Which one.
        rank: usize,
        /// What does not fit.
        reason: String,
    },
}

impl CollectiveError {
    /// The rank that caused it, where it was one.
    pub fn rank(&self) -> Option<usize> {
        match self {
            CollectiveError::Lost { rank, .. }
            | CollectiveError::Timeout { rank, .. }
            | CollectiveError::OutOfStep { rank, .. } => Some(*rank),
            CollectiveError::Aborted(_) => None,
        }
    }
}
