//! Why a sequence can't be run or came to a bad end, in the terms of the gRPC contract.

/// What a caller is given; [`service`](crate::service) makes gRPC codes of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// It can never run here.
    #[error("{field}: {reason}")]
    Invalid {
        /// The field of the request.
        field: &'static str,
        /// What is wrong with it, and the limit.
        reason: String,
    },
    /// The queue is full.
    #[error("{waiting} sequences of this priority are waiting already; try another group or later")]
    Exhausted {
        /// How many wait.
        waiting: u32,
    },
    /// The group is loading, draining or dead: another one may take it.
    #[error("{reason}; retry elsewhere")]
    Unavailable {
        /// Why.
        reason: String,
    },
    /// This sequence alone failed.
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
