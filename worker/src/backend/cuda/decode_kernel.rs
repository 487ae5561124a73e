//! Which kernel of attention_decode.cu computes the decoded rows of a step, and how it is launched.

use crate::backend::KvDtype;

/// Most tile rows (pairs of a row and a query head) of an item that the kernel for few rows takes.
const FEW_TILE_ROWS: usize = 8;

/// The kernel for decoded rows, and its launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DecodeKernel {
    head_dim: usize,
    kv: KvDtype,
    few: bool,
}

impl DecodeKernel {
    /// The kernel for items of at most `tile_rows` tile rows.
    pub(super) fn of(head_dim: usize, kv: KvDtype, tile_rows: usize) -> Self {
        Self { head_dim, kv, few: head_dim == 128 && kv == KvDtype::Fp8 && tile_rows <= FEW_TILE_ROWS }
    }

    /// Its name, for an output in this format.
    pub(super) fn name(self, suffix: &str) -> String {
        let few = if self.few { "_few" } else { "" };
        format!("decode_attention_{}_{}{few}_to_{suffix}", self.head_dim, self.kv.name())
    }

    /// Parts that the keys of all decoded rows are cut into: all of them run at once, for each KV head.
    pub(super) fn parts(self, multiprocessors: u32, kv_heads: usize) -> usize {
        let blocks_per_multiprocessor = if self.few { 3 } else { 2 };
        // rounded down: none is left for a second round
        (multiprocessors as usize * blocks_per_multiprocessor / kv_heads.max(1)).max(1)
    }

    /// `decode_shared_bytes` of attention_decode.cu.
    pub(super) fn shared_bytes(self) -> u32 {
        let (warps, tokens) = (4, 16);
        // rows of 128 elements are copied as they lie in the cache
        let padding = if self.head_dim == 128 { 0 } else { 16 };
        let (stages, row) = match self.kv {
            KvDtype::Fp8 => (if self.few { 4 } else { 6 }, self.head_dim),
            _ => (3, self.head_dim * 2 + padding),
        };
        let ring = warps * stages * 2 * tokens * row;
        let merge = warps * 16 * (self.head_dim + 2) * 4;
        ring.max(merge) as u32
    }
}

/// Parts that the keys of a step's decoded rows are cut into.
#[derive(Clone, Copy, Debug)]
pub(super) struct DecodeParts {
    few: usize,
    many: usize,
}

impl DecodeParts {
    /// Of both kernels for such a cache.
    pub(super) fn new(head_dim: usize, kv: KvDtype, multiprocessors: u32, kv_heads: usize) -> Self {
        let of = |tile_rows| DecodeKernel::of(head_dim, kv, tile_rows).parts(multiprocessors, kv_heads);
        Self { few: of(1), many: of(FEW_TILE_ROWS + 1) }
    }

    /// For a step whose largest item has so many tile rows.
    pub(super) fn of(self, tile_rows: usize) -> usize {
        if tile_rows <= FEW_TILE_ROWS { self.few } else { self.many }
    }

    /// The most that a step may have.
    pub(super) fn max(self) -> usize {
        self.few.max(self.many)
    }
}
