//! Hugging Face's `config.json`: `ministral3` (text), or `mistral3` with `text_config` and `vision_config`.
//!
//! Two traps are handled here: newer files say `rope_parameters` where older ones say `rope_scaling` with
//! `rope_theta` beside it, and `tie_word_embeddings` may stand at the top, in the text part, or nowhere.

use super::fields::{Fields, parse};
use super::{ModelConfig, ModelConfigError, Quantization, QueryScale, RopeConfig, VisionConfig, Yarn};

const FILE: &str = "config.json";

/// Model types whose decoder is the one of `ministral3`; plain Mistral and Llama files describe a special case of it.
const TEXT_TYPES: &[&str] = &["ministral3", "mistral", "llama"];

pub(super) fn read(text: &str) -> Result<ModelConfig, ModelConfigError> {
    let value = parse(FILE, text)?;
    let root = Fields::root(FILE, &value)?;
    let model_type = root.text("model_type")?.ok_or_else(|| root.missing("model_type"))?;
    let nested = root.object("text_config")?;
    if model_type == "mistral3" {
        let decoder = nested.as_ref().ok_or_else(|| root.missing("text_config"))?;
        if let Some(inner) = decoder.text("model_type")?
            && !TEXT_TYPES.contains(&inner)
        {
            return Err(decoder.refuse("model_type", "\"ministral3\" or \"mistral\""));
        }
        let vision = root.object("vision_config")?.map(|fields| read_vision(&root, &fields)).transpose()?;
        return read_decoder(&root, decoder, vision);
    }
    if !TEXT_TYPES.contains(&model_type) {
        return Err(root.refuse("model_type", "\"ministral3\" or \"mistral3\""));
    }
    read_decoder(&root, &root, None)
}

/// The end token IDs of `generation_config.json`.
pub(super) fn generation_end_ids(text: &str) -> Result<Vec<u32>, ModelConfigError> {
    const GENERATION_FILE: &str = "generation_config.json";
    let value = parse(GENERATION_FILE, text)?;
    Fields::root(GENERATION_FILE, &value)?.token_ids("eos_token_id")
}

fn read_decoder(
    root: &Fields<'_>,
    decoder: &Fields<'_>,
    vision: Option<VisionConfig>,
) -> Result<ModelConfig, ModelConfigError> {
    refuse_what_is_not_computed(decoder)?;
    let hidden_size = decoder.require_size("hidden_size")?;
    let num_attention_heads = decoder.require_size("num_attention_heads")?;
    let max_position_embeddings = decoder.require_size("max_position_embeddings")?;
    let mut eos_token_ids = decoder.token_ids("eos_token_id")?;
    if eos_token_ids.is_empty() {
        eos_token_ids = root.token_ids("eos_token_id")?;
    }
    ModelConfig {
        hidden_size,
        num_hidden_layers: decoder.require_size("num_hidden_layers")?,
        num_attention_heads,
        num_key_value_heads: decoder.size("num_key_value_heads")?.unwrap_or(num_attention_heads),
        head_dim: match decoder.size("head_dim")? {
            Some(size) => size,
            None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
            None => return Err(decoder.missing("head_dim")),
        },
        intermediate_size: decoder.require_size("intermediate_size")?,
        vocab_size: decoder.require_size("vocab_size")?,
        rms_norm_eps: decoder.require_positive("rms_norm_eps")? as f32,
        rope: read_rope(decoder, max_position_embeddings)?,
        max_position_embeddings,
        tie_word_embeddings: match root.boolean("tie_word_embeddings")? {
            Some(tied) => Some(tied),
            None => decoder.boolean("tie_word_embeddings")?,
        },
        quantization: read_quantization(root)?,
        bos_token_id: match decoder.token_id("bos_token_id")? {
            Some(id) => Some(id),
            None => root.token_id("bos_token_id")?,
        },
        eos_token_ids,
        vision,
    }
    .check(FILE)
}

/// Features of neighbouring architectures that would change the numbers silently.
fn refuse_what_is_not_computed(decoder: &Fields<'_>) -> Result<(), ModelConfigError> {
    if let Some(activation) = decoder.text("hidden_act")?
        && activation != "silu"
    {
        return Err(decoder.refuse("hidden_act", "\"silu\""));
    }
    for name in ["attention_bias", "mlp_bias"] {
        if decoder.boolean(name)? == Some(true) {
            return Err(decoder.refuse(name, "false (biases are not supported)"));
        }
    }
    if decoder.value("sliding_window").is_some() {
        return Err(decoder.refuse("sliding_window", "null (every layer attends to everything before it)"));
    }
    Ok(())
}

fn read_rope(decoder: &Fields<'_>, max_position_embeddings: usize) -> Result<RopeConfig, ModelConfigError> {
    let parameters = match decoder.object("rope_parameters")? {
        Some(fields) => Some(fields),
        None => decoder.object("rope_scaling")?,
    };
    let outer_theta = decoder.positive("rope_theta")?;
    let Some(parameters) = parameters else {
        let theta = outer_theta.ok_or_else(|| decoder.missing("rope_parameters"))?;
        return Ok(RopeConfig { theta, yarn: None, query_scale: None });
    };
    let theta = match parameters.positive("rope_theta")? {
        Some(theta) => theta,
        None => outer_theta.ok_or_else(|| parameters.missing("rope_theta"))?,
    };
    let type_name = if parameters.value("rope_type").is_some() { "rope_type" } else { "type" };
    let yarn = match parameters.text(type_name)? {
        Some("yarn") => Some(Yarn {
            factor: parameters.require_positive("factor")?,
            original_max_position_embeddings: parameters
                .size("original_max_position_embeddings")?
                .unwrap_or(max_position_embeddings),
            beta_fast: parameters.positive("beta_fast")?.unwrap_or(32.0),
            beta_slow: parameters.positive("beta_slow")?.unwrap_or(1.0),
            mscale: parameters.number("mscale")?.unwrap_or(0.0),
            mscale_all_dim: parameters.number("mscale_all_dim")?.unwrap_or(0.0),
            attention_factor: parameters.positive("attention_factor")?,
        }),
        Some("default") | None => None,
        Some(_) => return Err(parameters.refuse(type_name, "\"yarn\" or \"default\"")),
    };
    let query_scale = match parameters.number("llama_4_scaling_beta")? {
        None | Some(0.0) => None,
        Some(beta) => Some(QueryScale {
            beta,
            original_max_position_embeddings: parameters
                .size("original_max_position_embeddings")?
                .ok_or_else(|| parameters.missing("original_max_position_embeddings"))?,
        }),
    };
    Ok(RopeConfig { theta, yarn, query_scale })
}

fn read_quantization(root: &Fields<'_>) -> Result<Quantization, ModelConfigError> {
    let Some(quantization) = root.object("quantization_config")? else { return Ok(Quantization::None) };
    let method = quantization.text("quant_method")?.ok_or_else(|| quantization.missing("quant_method"))?;
    if method != "fp8" {
        return Err(quantization.refuse("quant_method", "\"fp8\""));
    }
    if quantization.text("activation_scheme")?.unwrap_or("static") != "static" {
        return Err(quantization.refuse("activation_scheme", "\"static\""));
    }
    if quantization.value("weight_block_size").is_some() {
        return Err(quantization.refuse("weight_block_size", "null (one scale for each weight)"));
    }
    Ok(Quantization::Fp8Static)
}

fn read_vision(root: &Fields<'_>, vision: &Fields<'_>) -> Result<VisionConfig, ModelConfigError> {
    if vision.text("hidden_act")?.unwrap_or("silu") != "silu" {
        return Err(vision.refuse("hidden_act", "\"silu\""));
    }
    let hidden_size = vision.require_size("hidden_size")?;
    let num_attention_heads = vision.require_size("num_attention_heads")?;
    let rope_theta = match vision.positive("rope_theta")? {
        Some(theta) => Some(theta),
        None => vision.object("rope_parameters")?.map(|fields| fields.positive("rope_theta")).transpose()?.flatten(),
    };
    let image_token_id = match root.token_id("image_token_index")? {
        Some(id) => Some(id),
        None => root.token_id("image_token_id")?,
    };
    Ok(VisionConfig {
        hidden_size,
        num_hidden_layers: vision.require_size("num_hidden_layers")?,
        num_attention_heads,
        head_dim: vision.size("head_dim")?.unwrap_or(hidden_size / num_attention_heads),
        intermediate_size: vision.require_size("intermediate_size")?,
        patch_size: vision.require_size("patch_size")?,
        image_size: vision.require_size("image_size")?,
        num_channels: vision.size("num_channels")?.unwrap_or(3),
        rope_theta: rope_theta.unwrap_or(10_000.0),
        spatial_merge_size: root.size("spatial_merge_size")?.unwrap_or(2),
        projector_bias: root.boolean("multimodal_projector_bias")?.unwrap_or(false),
        image_token_id: image_token_id.unwrap_or(10),
    })
}
