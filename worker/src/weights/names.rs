//! Tensor names: maps the spellings of checkpoints to the parts of the model.
//!
//! Hugging Face files have the decoder under `model.`, `model.language_model.` or `language_model.model.` and the head
//! under `lm_head` or `language_model.lm_head`. Mistral's files use other names for the parts. Scales of FP8 weights
//! have three spellings.

use std::fmt;

/// A linear layer of a decoder layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Projection {
    /// Query.
    Q,
    /// Key.
    K,
    /// Value.
    V,
    /// Output of attention.
    O,
    /// Gate of the MLP.
    Gate,
    /// Up projection of the MLP.
    Up,
    /// Down projection of the MLP.
    Down,
}

impl Projection {
    pub(super) const ALL: [Projection; 7] = [
        Projection::Q,
        Projection::K,
        Projection::V,
        Projection::O,
        Projection::Gate,
        Projection::Up,
        Projection::Down,
    ];
}

/// A tensor of the decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Part {
    Embedding,
    Head,
    FinalNorm,
    AttentionNorm(usize),
    MlpNorm(usize),
    Weight(usize, Projection),
    WeightScale(usize, Projection),
    InputScale(usize, Projection),
}

/// Meaning of a tensor's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// Part of the decoder.
    Decoder(Part),
    /// Part of the vision tower or the projector.
    Vision,
    /// A constant that old exporters stored and that is computed instead.
    Derived,
}

/// Order of the rows of q and k in a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CheckpointFormat {
    /// Rotary halves.
    HuggingFace,
    /// Rotary pairs.
    Mistral,
}

/// Parses a tensor's name; `None` if no model of this family has the tensor.
pub(super) fn meaning(name: &str) -> Option<(Meaning, CheckpointFormat)> {
    if let Some(meaning) = mistral(name) {
        return Some((meaning, CheckpointFormat::Mistral));
    }
    hugging_face(name).map(|meaning| (meaning, CheckpointFormat::HuggingFace))
}

fn hugging_face(name: &str) -> Option<Meaning> {
    const VISION: [&str; 4] =
        ["vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."];
    if VISION.iter().any(|prefix| name.starts_with(prefix)) {
        return Some(Meaning::Vision);
    }
    if name.ends_with("rotary_emb.inv_freq") {
        return Some(Meaning::Derived);
    }
    if matches!(name, "lm_head.weight" | "language_model.lm_head.weight") {
        return Some(Meaning::Decoder(Part::Head));
    }
    let rest = ["language_model.model.", "model.language_model.", "model."]
        .iter()
        .find_map(|prefix| name.strip_prefix(prefix))?;
    match rest {
        "embed_tokens.weight" => return Some(Meaning::Decoder(Part::Embedding)),
        "norm.weight" => return Some(Meaning::Decoder(Part::FinalNorm)),
        _ => {}
    }
    let (layer, rest) = layer(rest)?;
    let part = match rest {
        "input_layernorm.weight" => Part::AttentionNorm(layer),
        "post_attention_layernorm.weight" => Part::MlpNorm(layer),
        _ => {
            let (linear, role) = rest.rsplit_once('.')?;
            let projection = match linear {
                "self_attn.q_proj" => Projection::Q,
                "self_attn.k_proj" => Projection::K,
                "self_attn.v_proj" => Projection::V,
                "self_attn.o_proj" => Projection::O,
                "mlp.gate_proj" => Projection::Gate,
                "mlp.up_proj" => Projection::Up,
                "mlp.down_proj" => Projection::Down,
                _ => return None,
            };
            match role {
                "weight" => Part::Weight(layer, projection),
                "weight_scale_inv" | "weight_scale" => Part::WeightScale(layer, projection),
                "activation_scale" | "input_scale" => Part::InputScale(layer, projection),
                _ => return None,
            }
        }
    };
    Some(Meaning::Decoder(part))
}

fn mistral(name: &str) -> Option<Meaning> {
    const VISION: [&str; 4] =
        ["vision_encoder.", "vision_language_adapter.", "patch_merger.", "pre_mm_projector_norm."];
    if VISION.iter().any(|prefix| name.starts_with(prefix)) {
        return Some(Meaning::Vision);
    }
    match name {
        "tok_embeddings.weight" => return Some(Meaning::Decoder(Part::Embedding)),
        "output.weight" => return Some(Meaning::Decoder(Part::Head)),
        "norm.weight" => return Some(Meaning::Decoder(Part::FinalNorm)),
        _ => {}
    }
    let (layer, rest) = layer(name)?;
    let part = match rest {
        "attention_norm.weight" => Part::AttentionNorm(layer),
        "ffn_norm.weight" => Part::MlpNorm(layer),
        _ => {
            let (linear, role) = rest.rsplit_once('.')?;
            let projection = match linear {
                "attention.wq" => Projection::Q,
                "attention.wk" => Projection::K,
                "attention.wv" => Projection::V,
                "attention.wo" => Projection::O,
                "feed_forward.w1" => Projection::Gate,
                "feed_forward.w2" => Projection::Down,
                "feed_forward.w3" => Projection::Up,
                _ => return None,
            };
            match role {
                "weight" => Part::Weight(layer, projection),
                "qscale_weight" => Part::WeightScale(layer, projection),
                "qscale_act" => Part::InputScale(layer, projection),
                _ => return None,
            }
        }
    };
    Some(Meaning::Decoder(part))
}

fn layer(name: &str) -> Option<(usize, &str)> {
    let (number, rest) = name.strip_prefix("layers.")?.split_once('.')?;
    Some((number.parse().ok()?, rest))
}

/// The newest Hugging Face spelling, used in messages and as the key of random weights.
impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Embedding => write!(f, "model.embed_tokens.weight"),
            Part::Head => write!(f, "lm_head.weight"),
            Part::FinalNorm => write!(f, "model.norm.weight"),
            Part::AttentionNorm(layer) => write!(f, "model.layers.{layer}.input_layernorm.weight"),
            Part::MlpNorm(layer) => write!(f, "model.layers.{layer}.post_attention_layernorm.weight"),
            Part::Weight(layer, projection) => write!(f, "model.layers.{layer}.{projection}.weight"),
            Part::WeightScale(layer, projection) => write!(f, "model.layers.{layer}.{projection}.weight_scale_inv"),
            Part::InputScale(layer, projection) => write!(f, "model.layers.{layer}.{projection}.activation_scale"),
        }
    }
}

impl fmt::Display for Projection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Projection::Q => "self_attn.q_proj",
            Projection::K => "self_attn.k_proj",
            Projection::V => "self_attn.v_proj",
            Projection::O => "self_attn.o_proj",
            Projection::Gate => "mlp.gate_proj",
            Projection::Up => "mlp.up_proj",
            Projection::Down => "mlp.down_proj",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_all_spellings_to_the_same_part() {
        let q = Meaning::Decoder(Part::Weight(3, Projection::Q));
        for prefix in ["model", "model.language_model", "language_model.model"] {
            let name = format!("{prefix}.layers.3.self_attn.q_proj.weight");
            assert_eq!(meaning(&name), Some((q, CheckpointFormat::HuggingFace)));
        }
        assert_eq!(meaning("layers.3.attention.wq.weight"), Some((q, CheckpointFormat::Mistral)));
        let scale = Meaning::Decoder(Part::WeightScale(0, Projection::Down));
        for name in [
            "model.layers.0.mlp.down_proj.weight_scale_inv",
            "model.layers.0.mlp.down_proj.weight_scale",
            "layers.0.feed_forward.w2.qscale_weight",
        ] {
            assert_eq!(meaning(name).unwrap().0, scale, "{name}");
        }
        assert_eq!(meaning("language_model.lm_head.weight").unwrap().0, Meaning::Decoder(Part::Head));
        assert_eq!(meaning("vision_tower.ln_pre.weight").unwrap().0, Meaning::Vision);
    }

    #[test]
    fn rejects_unknown_names() {
        for name in [
            "model.layers.0.self_attn.q_proj.bias",
            "model.layers.0.self_attn.q_norm.weight",
            "model.layers.x.mlp.up_proj.weight",
            "layers.0.attention.wq",
            "model.embed_positions.weight",
        ] {
            assert_eq!(meaning(name), None, "{name}");
        }
    }

    #[test]
    fn parses_the_tensor_lists_of_real_checkpoints() {
        for file in ["devstral-2-123b", "devstral-small-2-24b"] {
            let path = format!("{}/../tests/fixtures/configs/{file}.tensors.json", env!("CARGO_MANIFEST_DIR"));
            let list: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
            let names = list["tensors_layer0_and_outside"].as_object().unwrap();
            assert!(names.len() > 20);
            for name in names.keys() {
                assert!(meaning(name).is_some(), "{name}");
            }
        }
    }
}
