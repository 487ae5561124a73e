//! Rooflines: the time that the bytes and the arithmetic of a workload take at the datasheet's rates. Measured figures
//! are reported beside them.

use bora_common::model::ModelConfig;

use super::engine::StepShape;

/// Rates of one GPU by its datasheet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Memory bandwidth, bytes per second.
    pub bytes: f64,
    /// FP8 operations per second.
    pub fp8: f64,
    /// bf16 operations per second.
    pub bf16: f64,
}

/// Rates by words of a GPU's name, more specific names first.
const RATES: [(&[&str], Rates); 5] = [
    (&["H100", "PCIe"], Rates { bytes: 2.0e12, fp8: 1.513e15, bf16: 7.56e14 }),
    (&["H100", "NVL"], Rates { bytes: 3.9e12, fp8: 1.671e15, bf16: 8.35e14 }),
    (&["H100"], Rates { bytes: 3.35e12, fp8: 1.979e15, bf16: 9.89e14 }),
    (&["H200", "NVL"], Rates { bytes: 4.8e12, fp8: 1.671e15, bf16: 8.35e14 }),
    (&["H200"], Rates { bytes: 4.8e12, fp8: 1.979e15, bf16: 9.89e14 }),
];

/// Rates of a GPU by its name, if they are known.
pub fn rates(gpu: &str) -> Option<Rates> {
    let has = |word: &&str| gpu.split_whitespace().any(|part| part == *word);
    RATES.into_iter().find(|(words, _)| words.iter().all(has)).map(|(_, rates)| rates)
}

/// Memory bandwidth of a GPU by its datasheet in bytes per second, if it is known.
pub fn memory_rate(gpu: &str) -> Option<f64> {
    rates(gpu).map(|rates| rates.bytes)
}

/// Rooflines of one model on one group.
#[derive(Clone, Copy, Debug)]
pub struct Rooflines {
    bytes_per_second: f64,
    fp8: f64,
    /// Operations per second of attention, which computes in the format of the cache.
    attention: f64,
    linear_weights: f64,
    head_bytes: f64,
    kv_bytes_per_token: f64,
    /// Operations of attention for one pair of tokens, over all layers and heads.
    pair_operations: f64,
}

impl Rooflines {
    /// Rooflines on `ranks` GPUs of this name; `None` if the GPU's rates are unknown.
    pub fn of(model: &ModelConfig, ranks: usize, gpu: &str, kv_bytes: f64) -> Option<Self> {
        let Rates { bytes, fp8, bf16 } = rates(gpu)?;
        let ranks = ranks as f64;
        let layers = model.num_hidden_layers as f64;
        let hidden = model.hidden_size as f64;
        let heads = (model.num_attention_heads * model.head_dim) as f64;
        let kv_heads = (model.num_key_value_heads * model.head_dim) as f64;
        let layer_weights = hidden * (2.0 * heads + 2.0 * kv_heads) + 3.0 * hidden * model.intermediate_size as f64;
        Some(Self {
            bytes_per_second: bytes * ranks,
            fp8: fp8 * ranks,
            attention: if kv_bytes < 2.0 { fp8 } else { bf16 } * ranks,
            linear_weights: layers * layer_weights,
            head_bytes: 2.0 * hidden * model.vocab_size as f64,
            kv_bytes_per_token: 2.0 * layers * kv_heads * kv_bytes,
            pair_operations: 4.0 * layers * heads,
        })
    }

    /// Lower bound in seconds of a step that decodes `batch` sequences at `context`, by its bytes.
    pub fn decode(&self, batch: usize, context: usize) -> f64 {
        let cache = (batch * context) as f64 * self.kv_bytes_per_token;
        (self.linear_weights + self.head_bytes + cache) / self.bytes_per_second
    }

    /// Lower bound in seconds of `tokens` tokens after `context` tokens, by its arithmetic.
    pub fn prefill(&self, context: usize, tokens: usize) -> f64 {
        let (context, tokens) = (context as f64, tokens as f64);
        let pairs = tokens * context + tokens * (tokens + 1.0) / 2.0;
        2.0 * self.linear_weights * tokens / self.fp8 + pairs * self.pair_operations / self.attention
    }

    /// Lower bound in seconds of a step: the larger of the times of its bytes and its arithmetic.
    pub(crate) fn step(&self, shape: &StepShape) -> f64 {
        let tokens = (shape.decoded_tokens + shape.prefilled_tokens) as f64;
        let cache = shape.context_tokens as f64 * self.kv_bytes_per_token;
        let bytes = (self.linear_weights + self.head_bytes + cache) / self.bytes_per_second;
        let pairs = shape.pairs as f64 * self.pair_operations;
        bytes.max(2.0 * self.linear_weights * tokens / self.fp8 + pairs / self.attention)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_rates_by_the_name_of_the_card() {
        let bytes = |gpu| memory_rate(gpu).map(|bytes| bytes / 1e12);
        assert_eq!(bytes("NVIDIA H100 80GB HBM3"), Some(3.35));
        assert_eq!(bytes("NVIDIA H100 PCIe"), Some(2.0));
        assert_eq!(bytes("NVIDIA H100 NVL"), Some(3.9));
        assert_eq!(bytes("NVIDIA H200"), Some(4.8));
        // a superchip whose name contains that of a card, with other memory
        assert_eq!(bytes("NVIDIA GH200 480GB"), None);
        assert_eq!(bytes("NVIDIA A100-SXM4-80GB"), None);
    }

    #[test]
    fn bounds_a_decode_step_of_the_24b_by_its_bytes() {
        let config = include_str!("../../../tests/fixtures/configs/devstral-small-2-24b.config.reconstructed.json");
        let model = ModelConfig::from_huggingface(config).unwrap();
        let rooflines = Rooflines::of(&model, 1, "NVIDIA H100 80GB HBM3", 2.0).unwrap();
        assert!((rooflines.decode(1, 0) - 7.04e-3).abs() < 5e-5);
        assert!((rooflines.prefill(0, 131_072) - 8.6).abs() < 0.2);
        let narrow = Rooflines::of(&model, 1, "NVIDIA H100 80GB HBM3", 1.0).unwrap();
        assert!((narrow.prefill(0, 131_072) - 5.8).abs() < 0.2);
        let decode = StepShape { decoded_tokens: 1, sequences: 1, ..StepShape::default() };
        assert_eq!(rooflines.step(&decode), rooflines.decode(1, 0));
        let chunk = StepShape { prefilled_tokens: 8192, sequences: 1, pairs: 8192 * 8193 / 2, ..StepShape::default() };
        assert!((rooflines.step(&chunk) - rooflines.prefill(0, 8192)).abs() < 1e-9);
        assert!(Rooflines::of(&model, 1, "another", 2.0).is_none());
    }
}
