//! `--load-format dummy`: random weights with the real shapes, to measure speed without a checkpoint. Their deviation
//! is that of real weights, so that matmuls neither vanish nor overflow and a GPU draws realistic power. The weights
//! are equal on every device and for every number of ranks.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::names::{Part, Projection};
use super::slice::{Fp8Scales, RandomFill};

/// Standard deviation of the scaled weights.
const DEVIATION: f32 = 0.02;

/// Standard deviation of FP8 codes; the weight's scale restores [`DEVIATION`].
const FP8_DEVIATION: f32 = 80.0;

/// Random elements of a whole tensor; a shard adjusts its first row and column.
pub(super) fn fill(seed: u64, part: Part, fp8: bool, tensor_columns: usize) -> RandomFill {
    RandomFill {
        key: xxh3_64_with_seed(part.to_string().as_bytes(), seed),
        tensor_columns,
        first_row: 0,
        first_column: 0,
        deviation: if fp8 { FP8_DEVIATION } else { DEVIATION },
    }
}

/// The scales of an FP8 linear layer. The down projection has a wider input distribution than the others.
pub(super) fn scales(projection: Projection) -> Fp8Scales {
    Fp8Scales { weight: DEVIATION / FP8_DEVIATION, input: if projection == Projection::Down { 0.05 } else { 0.02 } }
}
