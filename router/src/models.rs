//! The router's configuration of a model, independent of its groups: tokenizer, limits and defaults.

use std::sync::Arc;

use bora_common::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::fleet::validate::record::ModelLimits;

/// Default sampling parameters of requests that set none (`generation_config.json`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DefaultSampling {
    /// 1 if absent.
    pub temperature: Option<f32>,
    /// 1 if absent.
    pub top_p: Option<f32>,
    /// 0 (off) if absent.
    pub top_k: Option<u32>,
    /// 0 (off) if absent.
    pub min_p: Option<f32>,
    /// 1 (off) if absent.
    pub repetition_penalty: Option<f32>,
}

impl DefaultSampling {
    /// Reads the defaults of a `generation_config.json`, as vLLM does. Values out of range are ignored.
    pub fn from_generation_config(config: &Value) -> Self {
        let number = |name: &str, least: f64, most: f64| {
            let value = config.get(name)?.as_f64()?;
            (least..=most).contains(&value).then_some(value as f32)
        };
        Self {
            temperature: number("temperature", 0.0, 2.0),
            top_p: number("top_p", f64::MIN_POSITIVE, 1.0),
            top_k: config.get("top_k").and_then(Value::as_u64).and_then(|top_k| u32::try_from(top_k).ok()),
            min_p: number("min_p", 0.0, 1.0),
            repetition_penalty: number("repetition_penalty", f64::MIN_POSITIVE, 10.0),
        }
    }
}

/// The end-of-sequence token IDs of `generation_config.json` or `config.json`.
pub fn end_ids_of_config(config: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match config.get("eos_token_id") {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// A model that this router may serve.
#[derive(Clone, Default)]
pub struct ModelSpec {
    /// The tokenizer. If `None`, requests and responses contain token IDs (`--skip-tokenizer-init`).
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Aliases of the model.
    pub aliases: Vec<String>,
    /// Limits of the model. Groups may narrow them.
    pub limits: ModelLimits,
    /// Default sampling parameters.
    pub defaults: DefaultSampling,
    /// Token IDs that end a sequence.
    pub end_ids: Vec<u32>,
}

impl ModelSpec {
    /// Creates a model with a tokenizer, which defines the end-of-sequence token.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        let end_ids = vec![tokenizer.eos_id()];
        Self { tokenizer: Some(tokenizer), end_ids, ..Self::default() }
    }

    /// Adds the defaults of the checkpoint's `generation_config.json`.
    pub fn with_generation_config(mut self, config: &Value) -> Self {
        self.defaults = DefaultSampling::from_generation_config(config);
        for id in end_ids_of_config(config) {
            if !self.end_ids.contains(&id) {
                self.end_ids.push(id);
            }
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_config_gives_defaults_and_ends() {
        let config = serde_json::json!({"temperature": 0.15, "top_p": 7, "eos_token_id": [2, 5], "max_length": 9});
        let spec = ModelSpec::default().with_generation_config(&config);
        assert_eq!(spec.defaults, DefaultSampling { temperature: Some(0.15), ..DefaultSampling::default() });
        assert_eq!(spec.end_ids, [2, 5]);
        assert_eq!(end_ids_of_config(&serde_json::json!({"eos_token_id": 2})), [2]);
    }
}
