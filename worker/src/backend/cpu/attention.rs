//! Causal attention over the paged cache: for each sequence and KV head, gather the keys and values once,
//! then two GEMMs for each tile of queries, with the softmax between them in float32.

use candle_core::{Device, Tensor};

use super::Activations;
use super::kv::KvCache;
use super::linear::device;
use crate::backend::{Batch, Result};

/// Queries of a tile: bounds the memory of the scores.
const TILE_ROWS: usize = 64;

/// q [T, H d] to [T, H d]; `group` query heads share a KV head.
pub(super) fn attend(
    cache: &KvCache,
    batch: &Batch,
    query: &Activations,
    layer: usize,
    group: usize,
) -> Result<Activations> {
    let head_dim = cache.shape().head_dim;
    let mut out = vec![0.0; query.elements.len()];
    for sequence in &batch.sequences {
        let first = sequence.first_row as usize;
        let rows = sequence.rows as usize;
        for kv_head in 0..cache.shape().kv_heads {
            let context = sequence.context as usize;
            let (keys, values) = cache.gather(layer, kv_head, &sequence.blocks, context);
            let keys = Tensor::from_vec(keys, (context, head_dim), &Device::Cpu).map_err(device)?;
            let values = Tensor::from_vec(values, (context, head_dim), &Device::Cpu).map_err(device)?;
            for tile_start in (0..rows).step_by(TILE_ROWS) {
                let tile = first + tile_start..first + rows.min(tile_start + TILE_ROWS);
                // the heads of the group stand below each other: row = token * group + head
                let column = kv_head * group * head_dim;
                let width = group * head_dim;
                let mut tile_query = Vec::with_capacity(tile.len() * width);
                for row in tile.clone() {
                    let start = row * query.columns + column;
                    tile_query.extend_from_slice(&query.elements[start..start + width]);
                }
                let visible: Vec<usize> =
                    batch.positions[tile.clone()].iter().map(|position| *position as usize + 1).collect();
                let attended = attend_tile(tile_query, &visible, &keys, &values, group).map_err(device)?;
                for (elements, row) in attended.chunks_exact(width).zip(tile) {
                    let start = row * query.columns + column;
                    out[start..start + width].copy_from_slice(elements);
                }
            }
        }
    }
    Ok(Activations { elements: out, columns: query.columns })
}

/// `visible[t]`: how many positions token t of the tile sees.
fn attend_tile(
    query: Vec<f32>,
    visible: &[usize],
    keys: &Tensor,
    values: &Tensor,
    group: usize,
) -> candle_core::Result<Vec<f32>> {
    let head_dim = keys.dim(1)?;
    let context = visible.iter().copied().max().unwrap_or(0).min(keys.dim(0)?);
    let rows = visible.len() * group;
    let query = Tensor::from_vec(query, (rows, head_dim), &Device::Cpu)?;
    let scores = query.matmul(&keys.narrow(0, 0, context)?.t()?)?;
    let mut scores: Vec<f32> = scores.flatten_all()?.to_vec1()?;
    let scale = 1.0 / (head_dim as f32).sqrt();
    for (row, row_scores) in scores.chunks_exact_mut(context).enumerate() {
        let (seen, future) = row_scores.split_at_mut(visible[row / group]);
        softmax(seen, scale);
        future.fill(0.0);
    }
    let weights = Tensor::from_vec(scores, (rows, context), &Device::Cpu)?;
    weights.matmul(&values.narrow(0, 0, context)?)?.flatten_all()?.to_vec1()
}

fn softmax(scores: &mut [f32], scale: f32) {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for score in scores.iter_mut() {
        *score = ((*score - largest) * scale).exp();
        sum += *score;
    }
    for score in scores.iter_mut() {
        *score /= sum;
    }
}
