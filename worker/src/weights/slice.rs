//! A rectangle of a weight tensor, which a backend loads.

use half::{bf16, f16};

use super::e4m3;

/// Number formats of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// e4m3fn: 4 exponent bits, 3 mantissa bits, maximum 448, no infinities.
    F8E4M3,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// IEEE single.
    F32,
}

impl Dtype {
    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F8E4M3 => 1,
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::F32 => 4,
        }
    }
}

/// Rows and columns of a tensor that one rank holds. A vector is one row.
#[derive(Clone, Debug)]
pub struct Slice<'a> {
    /// Name of the tensor, for messages.
    pub name: &'a str,
    /// Format of the elements.
    pub dtype: Dtype,
    /// Rows of the slice (outputs of a linear layer, token IDs of an embedding).
    pub rows: usize,
    /// Columns of the slice (inputs of a linear layer, width of an embedding).
    pub columns: usize,
    /// Source of the elements.
    pub source: Source<'a>,
}

/// Source of the elements of a [`Slice`].
#[derive(Clone, Debug)]
pub enum Source<'a> {
    /// A mapped file.
    Stored {
        /// Bytes from the slice's first row and column on.
        bytes: &'a [u8],
        /// Bytes from one stored row to the next (at least columns * size).
        row_stride: usize,
        /// Mapping of the slice's rows to stored rows.
        order: RowOrder,
    },
    /// Every element has this value.
    Constant(f32),
    /// Random elements (`--load-format dummy`); a device may generate them itself.
    Random(RandomFill),
}

/// Mapping of a slice's rows to stored rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    /// The same order.
    Plain,
    /// Mistral's files store the rows of a rotary head as pairs (0, d/2, 1, d/2 + 1, ...); the slice has them as
    /// halves. The slice begins at a head boundary.
    InterleavedPairs {
        /// Head dimension d.
        head_dim: usize,
    },
}

impl RowOrder {
    /// The stored row of row `row` of the slice, counted from the slice's first stored row.
    pub fn stored_row(self, row: usize) -> usize {
        match self {
            RowOrder::Plain => row,
            RowOrder::InterleavedPairs { head_dim } => {
                let (head, within) = (row / head_dim, row % head_dim);
                let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
                head * head_dim + 2 * pair + half
            }
        }
    }
}

/// Counter-based random numbers: element (row, column) of the **whole** tensor depends only on the key and its
/// position, so every split over ranks and every device generates the same weights.
///
/// `z = splitmix64(key + row * tensor_columns + column)`. The element is the sum of the four 16-bit parts of z, shifted
/// and scaled to mean 0 and standard deviation `deviation`, then rounded to the slice's type. A sum of four uniform
/// numbers is close to normal and at most 3.46 deviations from the mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RandomFill {
    /// Hash of the seed and the tensor's name.
    pub key: u64,
    /// Columns of the whole tensor.
    pub tensor_columns: usize,
    /// First row of the slice in the whole tensor.
    pub first_row: usize,
    /// First column of the slice in the whole tensor.
    pub first_column: usize,
    /// Standard deviation.
    pub deviation: f32,
}

impl RandomFill {
    /// The element at a row and column of the slice, before rounding to the slice's type.
    pub fn value(&self, row: usize, column: usize) -> f32 {
        let index = (self.first_row + row) as u64 * self.tensor_columns as u64 + (self.first_column + column) as u64;
        let bits = splitmix64(self.key.wrapping_add(index));
        let sum = (bits & 0xffff) + ((bits >> 16) & 0xffff) + ((bits >> 32) & 0xffff) + (bits >> 48);
        // the mean of the sum is 2 * 65535; its deviation is sqrt(4 / 12) * 65536
        (sum as f32 - 131_070.0) * (self.deviation / 37_837.23)
    }
}

/// The finaliser of SplitMix64 over one step of its sequence.
pub(super) fn splitmix64(counter: u64) -> u64 {
    let mut z = counter.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl<'a> Slice<'a> {
    /// Bytes of the whole slice without padding.
    pub fn byte_len(&self) -> usize {
        self.rows * self.columns * self.dtype.size()
    }

    /// The stored bytes if they are already packed and in order, so that one copy suffices.
    pub fn contiguous(&self) -> Option<&'a [u8]> {
        match self.source {
            Source::Stored { bytes, row_stride, order: RowOrder::Plain }
                if row_stride == self.columns * self.dtype.size() || self.rows <= 1 =>
            {
                Some(&bytes[..self.byte_len()])
            }
            _ => None,
        }
    }

    /// Writes one packed row in the slice's type (`columns * size` bytes).
    pub fn copy_row(&self, row: usize, out: &mut [u8]) {
        match self.source {
            Source::Stored { bytes, row_stride, order } => {
                let start = order.stored_row(row) * row_stride;
                out.copy_from_slice(&bytes[start..start + self.columns * self.dtype.size()]);
            }
            Source::Constant(value) => {
                for number in out.chunks_exact_mut(self.dtype.size()) {
                    write_number(self.dtype, value, number);
                }
            }
            Source::Random(fill) => {
                for (column, number) in out.chunks_exact_mut(self.dtype.size()).enumerate() {
                    write_number(self.dtype, fill.value(row, column), number);
                }
            }
        }
    }

    /// All elements as float32, row by row, multiplied by `scale`.
    pub fn to_f32(&self, scale: f32) -> Vec<f32> {
        let mut elements = Vec::with_capacity(self.rows * self.columns);
        let mut row_bytes = vec![0; self.columns * self.dtype.size()];
        for row in 0..self.rows {
            self.copy_row(row, &mut row_bytes);
            append_as_f32(self.dtype, &row_bytes, scale, &mut elements);
        }
        elements
    }
}

fn append_as_f32(dtype: Dtype, bytes: &[u8], scale: f32, elements: &mut Vec<f32>) {
    match dtype {
        Dtype::F8E4M3 => elements.extend(bytes.iter().map(|code| e4m3::decode(*code) * scale)),
        Dtype::Bf16 => {
            elements.extend(bytes.as_chunks::<2>().0.iter().map(|two| bf16::from_le_bytes(*two).to_f32() * scale));
        }
        Dtype::F16 => {
            elements.extend(bytes.as_chunks::<2>().0.iter().map(|two| f16::from_le_bytes(*two).to_f32() * scale));
        }
        Dtype::F32 => elements.extend(bytes.as_chunks::<4>().0.iter().map(|four| f32::from_le_bytes(*four) * scale)),
    }
}

fn write_number(dtype: Dtype, value: f32, out: &mut [u8]) {
    match dtype {
        Dtype::F8E4M3 => out[0] = e4m3::encode(value),
        Dtype::Bf16 => out.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
        Dtype::F16 => out.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
        Dtype::F32 => out.copy_from_slice(&value.to_le_bytes()),
    }
}

/// This rank's shard of a linear layer, `y = x W^T`.
#[derive(Clone, Debug)]
pub struct LinearShard<'a> {
    /// W of this rank: [outputs, inputs].
    pub weight: Slice<'a>,
    /// Scales if the weight is FP8.
    pub scales: Option<Fp8Scales>,
}

/// Static scales of an FP8 linear layer: `y = (e4m3(clamp(x / input, -448, 448)) Wq^T) * (input * weight)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fp8Scales {
    /// Factor of the stored weight.
    pub weight: f32,
    /// Divisor of the input before rounding.
    pub input: f32,
}

/// This rank's rows of a table over the vocabulary (embedding or head). Every rank but the last ones holds
/// `rows_per_rank` rows; if the vocabulary does not divide evenly, the last ranks hold fewer or none.
#[derive(Clone, Debug)]
pub struct VocabularyShard<'a> {
    /// [rows of this rank, hidden size].
    pub rows: Slice<'a>,
    /// Token ID of the first row.
    pub first_id: usize,
    /// Rows of a full rank: `ceil(vocabulary / ranks)`.
    pub rows_per_rank: usize,
    /// Size of the vocabulary over all ranks.
    pub vocabulary_size: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_interleaved_rows_as_halves() {
        let order = RowOrder::InterleavedPairs { head_dim: 4 };
        let rows: Vec<usize> = (0..8).map(|row| order.stored_row(row)).collect();
        assert_eq!(rows, [0, 2, 1, 3, 4, 6, 5, 7]);
    }

    #[test]
    fn reads_only_the_columns_of_a_strided_slice() {
        let stored: Vec<u8> = (0..12u16).flat_map(|n| bf16::from_f32(f32::from(n)).to_le_bytes()).collect();
        // rows 1..3, columns 1..3 of a 3 x 4 tensor
        let slice = Slice {
            name: "w",
            dtype: Dtype::Bf16,
            rows: 2,
            columns: 2,
            source: Source::Stored { bytes: &stored[(4 + 1) * 2..], row_stride: 8, order: RowOrder::Plain },
        };
        assert_eq!(slice.to_f32(1.0), [5.0, 6.0, 9.0, 10.0]);
        assert_eq!(slice.to_f32(0.5), [2.5, 3.0, 4.5, 5.0]);
        assert!(slice.contiguous().is_none());
    }

    #[test]
    fn generates_random_elements_by_position_only() {
        let whole = RandomFill { key: 7, tensor_columns: 300, first_row: 0, first_column: 0, deviation: 2.0 };
        let part = RandomFill { first_row: 10, first_column: 20, ..whole };
        assert_eq!(whole.value(13, 25), part.value(3, 5));
        let elements: Vec<f32> =
            (0..200).flat_map(|row| (0..300).map(move |column| whole.value(row, column))).collect();
        let mean = elements.iter().sum::<f32>() / elements.len() as f32;
        let variance = elements.iter().map(|n| n * n).sum::<f32>() / elements.len() as f32;
        assert!(mean.abs() < 0.05, "{mean}");
        assert!((variance.sqrt() - 2.0).abs() < 0.05, "{variance}");
    }
}
