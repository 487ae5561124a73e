//! `--load-format dummy`: random weights of the real shapes, so that speed can be measured without a
//! checkpoint. Their spread is that of real weights (products neither vanish nor overflow, and a GPU samples
//! the power that it would sample), equal on every device and for every number of ranks.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::names::{Part, Projection};
use super::slice::{Fp8Scales, RandomFill};

/// Deviation of the weights as the model sees them.
const DEVIATION: f32 = 0.02;

/// FP8 codes have this deviation; the weight's scale brings it back to [`DEVIATION`].
const FP8_DEVIATION: f32 = 80.0;

/// A whole tensor of random numbers; a shard moves its first row and column.
pub(super) fn fill(seed: u64, part: Part, fp8: bool, tensor_columns: usize) -> RandomFill {
    RandomFill {
        key: xxh3_64_with_seed(part.to_string().as_bytes(), seed),
        tensor_columns,
        first_row: 0,
        first_column: 0,
        deviation: if fp8 { FP8_DEVIATION } else { DEVIATION },
    }
}

/// The scales of an FP8 linear. The input of the down projection is wider than the others.
pub(super) fn scales(projection: Projection) -> Fp8Scales {
    Fp8Scales { weight: DEVIATION / FP8_DEVIATION, input: if projection == Projection::Down { 0.05 } else { 0.02 } }
}
