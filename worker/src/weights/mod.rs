//! Weights: from the files of a checkpoint (or random values, for benchmarks) to the slices of one rank.
//!
//! [`Weights`] is the interface: it is opened once per process and returns each tensor as a rank needs it
//! ([`ShardPlan`]). The results are views ([`Slice`]) into the memory map. Nothing is copied, and only the pages of the
//! rank's slices are read.

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

/// Why a checkpoint is not usable.
#[derive(Debug, thiserror::Error)]
pub enum WeightError {
    /// The folder holds no weights.
    #[error("{} has no model.safetensors, no index of shards and no consolidated.safetensors", folder.display())]
    NoWeights {
        /// Folder that was searched.
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
    /// The checkpoint has a tensor that the model does not have.
    #[error("{} holds tensor `{name}`, which this model does not have", path.display())]
    Unknown {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// Two tensors have the same meaning.
    #[error("tensors `{first}` and `{second}` are the same part of the model")]
    Twice {
        /// One of the names.
        first: String,
        /// The other name.
        second: String,
    },
    /// The model needs a tensor that no file holds.
    #[error("the checkpoint has no tensor for `{name}`")]
    Missing {
        /// Canonical name.
        name: String,
    },
    /// The shape of a tensor differs from the configuration.
    #[error("tensor `{name}` has shape {found:?}, the configuration gives {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape by the configuration.
        expected: Vec<usize>,
    },
    /// The type of a tensor is not supported in its place.
    #[error("tensor `{name}` is of type {found}, expected {expected}")]
    Type {
        /// The tensor.
        name: String,
        /// Type in the file.
        found: String,
        /// Supported types.
        expected: String,
    },
    /// A scale is zero, negative or not a number.
    #[error("scale `{name}` is {value}, expected a number above 0")]
    Scale {
        /// The tensor.
        name: String,
        /// Value of the scale.
        value: f32,
    },
}

/// Source of the weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LoadFormat {
    /// The checkpoint's safetensors files.
    #[default]
    Auto,
    /// Seeded random values with the model's shapes, for benchmarks without a checkpoint.
    Dummy,
}
