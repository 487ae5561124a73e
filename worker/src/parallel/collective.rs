//! Collectives over the ranks of a group, in host memory.
//!
//! An all-reduce adds in the order of the ranks, on every rank, so all ranks compute the same bits regardless of
//! arrival order. All ranks make the same calls in the same order. If a rank does not make a call, the others fail
//! within the timeout; they never hang.

use std::sync::Arc;
use std::time::Duration;

/// One rank's connection to the other ranks.
pub trait Collective: Send {
    /// Number of this rank.
    fn rank(&self) -> usize;

    /// Number of ranks of the group.
    fn ranks(&self) -> usize;

    /// Replaces `values` by the sum over the ranks. The length must be equal on all ranks.
    fn all_reduce(&mut self, values: &mut [f32]) -> Result<(), CollectiveError>;

    /// Concatenates the elements `own` of all ranks, in the order of the ranks, into `all` (as long as all `own`
    /// together).
    fn all_gather(&mut self, own: &[f32], all: &mut [f32]) -> Result<(), CollectiveError>;

    /// Returns the bytes of all ranks, in the order of the ranks; the lengths may differ. For small and rare data:
    /// addresses, communicator IDs, memory handles.
    fn exchange(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError>;

    /// Waits until all ranks have made this call.
    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.exchange(&[]).map(|_| ())
    }

    /// A handle that fails current and later calls of this rank, from any thread.
    fn aborter(&self) -> Arc<dyn Abort>;
}

/// Aborts a rank's collective calls from another thread.
pub trait Abort: Send + Sync {
    /// Fails every current and later call of the rank with [`CollectiveError::Aborted`] and this reason.
    fn abort(&self, reason: &str);
}

/// Why a collective call failed. The group can't continue.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    /// The connection to a rank is closed, or the rank reported a failure.
    #[error("rank {rank} is gone: {reason}")]
    Lost {
        /// The rank.
        rank: usize,
        /// How the loss was detected.
        reason: String,
    },
    /// A rank did not make the call in time.
    #[error("rank {rank} did not respond within {waited:?}")]
    Timeout {
        /// The rank.
        rank: usize,
        /// Time waited.
        waited: Duration,
    },
    /// The group was ended.
    #[error("the group was ended: {0}")]
    Aborted(String),
    /// Ranks made different calls or passed different lengths, which is a bug.
    #[error("rank {rank} is out of step: {reason}")]
    OutOfStep {
        /// The rank.
        rank: usize,
        /// The mismatch.
        reason: String,
    },
}

impl CollectiveError {
    /// The rank that caused the error, if there is one.
    pub fn rank(&self) -> Option<usize> {
        match self {
            CollectiveError::Lost { rank, .. }
            | CollectiveError::Timeout { rank, .. }
            | CollectiveError::OutOfStep { rank, .. } => Some(*rank),
            CollectiveError::Aborted(_) => None,
        }
    }
}
