//! The paged KV cache in host memory.

use bora_common::blocks::BLOCK_TOKENS;
use half::bf16;

use crate::backend::KvDtype;
use crate::engine::step::BlockId;
use crate::model::KvShape;
use crate::weights::e4m3;

/// K and V of every layer: each [blocks, kv_heads, 64, head_dim].
pub(super) struct KvCache {
    shape: KvShape,
    layers: Vec<Layer>,
}

struct Layer {
    keys: Numbers,
    values: Numbers,
}

enum Numbers {
    F32(Vec<f32>),
    /// As bits: fresh zeros of integers take no memory until they are written.
    Bf16(Vec<u16>),
    /// As codes.
    Fp8(Vec<u8>),
}

impl Numbers {
    fn zeros(count: usize, dtype: KvDtype) -> Self {
        match dtype {
            KvDtype::Auto | KvDtype::F32 => Numbers::F32(vec![0.0; count]),
            KvDtype::Bf16 => Numbers::Bf16(vec![0; count]),
            KvDtype::Fp8 => Numbers::Fp8(vec![0; count]),
        }
    }

    fn write(&mut self, start: usize, elements: &[f32]) {
        match self {
            Numbers::F32(all) => all[start..start + elements.len()].copy_from_slice(elements),
            Numbers::Bf16(all) => {
                for (to, from) in all[start..].iter_mut().zip(elements) {
                    *to = bf16::from_f32(*from).to_bits();
                }
            }
            Numbers::Fp8(all) => {
                for (to, from) in all[start..].iter_mut().zip(elements) {
                    *to = e4m3::encode(*from);
                }
            }
        }
    }

    fn copy(&mut self, start: usize, from: &Self, from_start: usize, count: usize) {
        match (self, from) {
            (Numbers::F32(to), Numbers::F32(from)) => {
                to[start..start + count].copy_from_slice(&from[from_start..from_start + count]);
            }
            (Numbers::Bf16(to), Numbers::Bf16(from)) => {
                to[start..start + count].copy_from_slice(&from[from_start..from_start + count]);
            }
            (Numbers::Fp8(to), Numbers::Fp8(from)) => {
                to[start..start + count].copy_from_slice(&from[from_start..from_start + count]);
            }
            _ => {
                debug_assert!(false, "both caches are of one type");
            }
        }
    }

    fn append_to(&self, start: usize, count: usize, out: &mut Vec<f32>) {
        match self {
            Numbers::F32(all) => out.extend_from_slice(&all[start..start + count]),
            Numbers::Bf16(all) => {
                out.extend(all[start..start + count].iter().map(|bits| bf16::from_bits(*bits).to_f32()))
            }
            Numbers::Fp8(all) => out.extend(all[start..start + count].iter().map(|code| e4m3::decode(*code))),
        }
    }
}

impl KvCache {
    pub(super) fn new(shape: KvShape, blocks: usize, dtype: KvDtype) -> Self {
        let elements = blocks * shape.kv_heads * BLOCK_TOKENS * shape.head_dim;
        let layer = |_| Layer { keys: Numbers::zeros(elements, dtype), values: Numbers::zeros(elements, dtype) };
        Self { shape, layers: (0..shape.layers).map(layer).collect() }
    }

    pub(super) fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// Stores the keys and values [kv_heads, head_dim] of one position.
    pub(super) fn store(&mut self, layer: usize, block: usize, offset: usize, keys: &[f32], values: &[f32]) {
        for head in 0..self.shape.kv_heads {
            let start = self.start(block, head) + offset * self.shape.head_dim;
            let range = head * self.shape.head_dim..(head + 1) * self.shape.head_dim;
            self.layers[layer].keys.write(start, &keys[range.clone()]);
            self.layers[layer].values.write(start, &values[range]);
        }
    }

    /// The first `context` keys and values of one head, each [context, head_dim].
    pub(super) fn gather(&self, layer: usize, head: usize, blocks: &[BlockId], context: usize) -> (Vec<f32>, Vec<f32>) {
        let head_dim = self.shape.head_dim;
        let mut keys = Vec::with_capacity(context * head_dim);
        let mut values = Vec::with_capacity(context * head_dim);
        for (index, block) in blocks.iter().enumerate() {
            let tokens = BLOCK_TOKENS.min(context.saturating_sub(index * BLOCK_TOKENS));
            let start = self.start(*block as usize, head);
            self.layers[layer].keys.append_to(start, tokens * head_dim, &mut keys);
            self.layers[layer].values.append_to(start, tokens * head_dim, &mut values);
        }
        (keys, values)
    }

    /// Copies a whole block from another cache of the same shape.
    pub(super) fn copy_block(&mut self, block: usize, from: &KvCache, from_block: usize) {
        let (to, from_start) = (self.start(block, 0), from.start(from_block, 0));
        let count = self.start(block + 1, 0) - to;
        for (layer, from) in self.layers.iter_mut().zip(&from.layers) {
            layer.keys.copy(to, &from.keys, from_start, count);
            layer.values.copy(to, &from.values, from_start, count);
        }
    }

    fn start(&self, block: usize, head: usize) -> usize {
        (block * self.shape.kv_heads + head) * BLOCK_TOKENS * self.shape.head_dim
    }
}

/// Bytes that could be used without swapping.
pub(super) fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}
