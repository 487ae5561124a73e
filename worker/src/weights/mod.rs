//! Weights: from the files of a checkpoint (or from nothing, for benchmarks) to the slices that one rank holds.
//!
//! [`Weights`] is the front: open once a process, then ask for each chunk as seen by a rank
//! ([`ShardPlan`]). What comes back are views ([`Slice`]) into the memory map; nothing is copied and only
//! the pages of this rank's slices are read.

mod checkpoint;
mod dummy;
pub mod e4m3;
mod names;
mod shard;
mod slice;

pub use checkpoint::Weights;
pub use names::Projection;
pub use shard::{ShardError, ShardPlan};
pub use slice::{Dtype, Fp8Scales, LinearShard, RandomFill, RowOrder, Slice, Source, VocabularyShard};

use std::path::PathBuf;

/// Why a checkpoint can't be used.
#[derive(Debug, thiserror::Error)]
pub enum WeightError {
    /// The folder holds no weights.
    #[error("{} has no model.safetensors, no index of shards and no consolidated.safetensors", folder.display())]
    NoWeights {
        /// Where they were looked for.
        folder: PathBuf,
    },
    /// A file can't be read.
    #[error("can't read {}: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The checkpoint has a tensor that this model has no use for.
    #[error("{} holds tensor `{name}`, which this model does not have", path.display())]
    Unknown {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// Two tensors are the same part of the model.
    #[error("tensors `{first}` and `{second}` are the same part of the model")]
    Twice {
        /// One of them.
        first: String,
        /// The other.
        second: String,
    },
    /// The model needs a tensor that no file holds.
    #[error("the checkpoint has no tensor for `{name}`")]
    Missing {
        /// Its canonical name.
        name: String,
    },
    /// A tensor's shape is not the one that the configuration gives.
    #[error("tensor `{name}` has shape {found:?}, the configuration gives {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// What the file says.
        found: Vec<usize>,
        /// What the configuration says.
        expected: Vec<usize>,
    },
    /// A tensor's type is not one that is read there.
    #[error("tensor `{name}` is of type {found}, expected {expected}")]
    Type {
        /// The tensor.
        name: String,
        /// What the file says.
        found: String,
        /// What is read.
        expected: String,
    },
    /// A scale is zero, negative or not a number.
    #[error("scale `{name}` is {value}, expected a number above 0")]
    Scale {
        /// The tensor.
        name: String,
        /// What it holds.
        value: f32,
    },
}

/// Where weights come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LoadFormat {
    /// The checkpoint's safetensors.
    #[default]
    Auto,
    /// Seeded random values of the model's shapes: for benchmarks where there is no checkpoint.
    Dummy,
}
