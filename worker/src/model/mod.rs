//! The models: what is computed, in terms of what a [`Backend`](crate::backend::Backend) can do.

mod ministral3;

pub use ministral3::Ministral3;

use crate::weights::ShardPlan;
use bora_common::model::ModelConfig;

/// What one rank's KV cache holds for each block of 64 tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Decoder layers.
    pub layers: usize,
    /// KV heads of this rank.
    pub kv_heads: usize,
    /// Numbers in a head.
    pub head_dim: usize,
}

impl KvShape {
    /// The cache of one rank.
    pub fn new(config: &ModelConfig, plan: &ShardPlan) -> Self {
        Self { layers: config.num_hidden_layers, kv_heads: plan.kv_heads.len(), head_dim: config.head_dim }
    }

    /// Bytes of a block over all layers, K and V.
    pub fn block_bytes(&self, bytes_per_number: usize) -> usize {
        2 * self.layers * self.kv_heads * self.head_dim * bora_common::blocks::BLOCK_TOKENS * bytes_per_number
    }
}
