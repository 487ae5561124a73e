//! What the router knows of a model besides the groups that serve it: its tokenizer and its defaults.

use std::sync::Arc;

use bora_common::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::fleet::validate::record::ModelLimits;

/// Sampling values that a request takes where it names none (`generation_config.json`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DefaultSampling {
    /// 1 where absent.
    pub temperature: Option<f32>,
    /// 1 where absent.
    pub top_p: Option<f32>,
    /// 0 (off) where absent.
    pub top_k: Option<u32>,
    /// 0 (off) where absent.
    pub min_p: Option<f32>,
    /// 1 (off) where absent.
    pub repetition_penalty: Option<f32>,
}

impl DefaultSampling {
    /// Takes over what a `generation_config.json` says, as vLLM does. Values out of range are left out.
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

/// The token IDs that `generation_config.json` (or `config.json`) names as ends of a sequence.
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
    /// None: token IDs in, token IDs out (`--skip-tokenizer-init`).
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Other names that requests may use.
    pub aliases: Vec<String>,
    /// What its groups may say of it: they can narrow these limits.
    pub limits: ModelLimits,
    /// Defaults of sampling.
    pub defaults: DefaultSampling,
    /// Ids that end a sequence.
    pub end_ids: Vec<u32>,
}

impl ModelSpec {
    /// A model with a tokenizer: its end-of-sequence id is known.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        let end_ids = vec![tokenizer.eos_id()];
        Self { tokenizer: Some(tokenizer), end_ids, ..Self::default() }
    }

    /// Adds what the checkpoint's `generation_config.json` says.
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
