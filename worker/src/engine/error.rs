//! Errors of a sequence, in the terms of the gRPC contract.

/// Why a sequence was refused or failed; [`service`](crate::service) maps it to a gRPC code.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The request can never run on this group.
    #[error("{field}: {reason}")]
    Invalid {
        /// Field of the request.
        field: &'static str,
        /// What is wrong with the field, and the limit.
        reason: String,
    },
    /// The queue is full.
    #[error("{waiting} sequences of this priority are waiting already; try another group or later")]
    Exhausted {
        /// Sequences in the queue.
        waiting: u32,
    },
    /// The group is loading, draining or dead; another group may accept the request.
    #[error("{reason}; retry elsewhere")]
    Unavailable {
        /// Why.
        reason: String,
    },
    /// Only this sequence failed.
    #[error("{reason}")]
    Internal {
        /// Why.
        reason: String,
    },
}

impl EngineError {
    pub(crate) fn invalid(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { field, reason: reason.into() }
    }

    pub(crate) fn unavailable(reason: impl Into<String>) -> Self {
        Self::Unavailable { reason: reason.into() }
    }
}
