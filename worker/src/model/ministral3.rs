//! The decoder of Devstral 2 (Ministral 3 architecture), said once for every backend.
//!
//! ```text
//! x0 = E[token IDs]
//! for each layer:  x <- x + Wo attn(rms(x, g1));   x <- x + Wdown(silu(Wgate n) . (Wup n)),  n = rms(x, g2)
//! logits = Wlm rms(xL, gf)
//! ```
//!
//! With several ranks `Wo` and `Wdown` give partial sums. They travel as `partial` to the next norm, which
//! adds them up over the ranks and onto the residual in one go.

use bora_common::model::ModelConfig;

use crate::backend::{Backend, BackendError};
use crate::weights::{Projection, ShardPlan, Weights};

/// A decoder whose weights are on the device of one rank.
pub struct Ministral3<B: Backend> {
    embedding: B::Embedding,
    layers: Vec<Layer<B>>,
    final_norm: B::Gain,
    head: B::Linear,
}

struct Layer<B: Backend> {
    attention_norm: B::Gain,
    qkv: B::Linear,
    output: B::Linear,
    mlp_norm: B::Gain,
    gate_up: B::Linear,
    down: B::Linear,
}

impl<B: Backend> Ministral3<B> {
    /// Loads this rank's part. `progress` is called with the layers loaded so far.
    pub fn load(
        backend: &mut B,
        weights: &Weights,
        plan: &ShardPlan,
        mut progress: impl FnMut(usize),
    ) -> Result<Self, BackendError> {
        let config: &ModelConfig = weights.config();
        let embedding = backend.load_embedding(&weights.embedding(plan))?;
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for layer in 0..config.num_hidden_layers {
            let shard = |projection| weights.projection(layer, projection, plan);
            layers.push(Layer {
                attention_norm: backend.load_gain(&weights.attention_norm(layer))?,
                qkv: backend.load_linear(&[shard(Projection::Q)?, shard(Projection::K)?, shard(Projection::V)?])?,
                output: backend.load_linear(&[shard(Projection::O)?])?,
                mlp_norm: backend.load_gain(&weights.mlp_norm(layer))?,
                gate_up: backend.load_linear(&[shard(Projection::Gate)?, shard(Projection::Up)?])?,
                down: backend.load_linear(&[shard(Projection::Down)?])?,
            });
            progress(layer + 1);
        }
        let final_norm = backend.load_gain(&weights.final_norm())?;
        let head = backend.load_head(&weights.head(plan))?;
        Ok(Self { embedding, layers, final_norm, head })
    }

    /// Computes the batch that `backend` executes: the logits of its wanted rows.
    pub fn forward(&self, backend: &mut B) -> Result<B::Logits, BackendError> {
        let mut residual = backend.embed(&self.embedding)?;
        let mut partial = None;
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = backend.norm(&mut residual, partial, &layer.attention_norm, &layer.qkv)?;
            let qkv = backend.linear(&normed, &layer.qkv)?;
            let query = backend.rotate_and_store(qkv, index)?;
            let attended = backend.attend(query, index, &layer.output)?;
            let attention = backend.linear(&attended, &layer.output)?;

            let normed = backend.norm(&mut residual, Some(attention), &layer.mlp_norm, &layer.gate_up)?;
            let gated = backend.gated_linear(&normed, &layer.gate_up, &layer.down)?;
            partial = Some(backend.linear(&gated, &layer.down)?);
        }
        backend.head(residual, partial, &self.final_norm, &self.head)
    }
}
