//! Mistral's own `params.json`, which stands beside `consolidated*.safetensors`.
//!
//! The file says less than `config.json`: the begin and end token IDs are those of every tekken vocabulary (1 and
//! 2), positions end where YaRN's stretched range ends, and whether YaRN's attention factor applies follows
//! `yarn.apply_scale` or, where that is absent, the rule of the authors' conversion script: it applies to
//! models without a vision part.

use super::fields::{Fields, parse};
use super::{ModelConfig, ModelConfigError, Quantization, QueryScale, RopeConfig, VisionConfig, Yarn};

const FILE: &str = "params.json";

pub(super) fn read(text: &str) -> Result<ModelConfig, ModelConfigError> {
    let value = parse(FILE, text)?;
    let root = Fields::root(FILE, &value)?;
    if root.value("moe").is_some() {
        return Err(root.refuse("moe", "nothing (mixtures of experts are not supported)"));
    }
    if root.value("sliding_window").is_some() {
        return Err(root.refuse("sliding_window", "null (every layer attends to everything before it)"));
    }
    let vision = root.object("vision_encoder")?.map(|fields| read_vision(&fields)).transpose()?;
    let rope = read_rope(&root, vision.is_some())?;
    let stretched =
        rope.yarn.as_ref().map(|yarn| (yarn.factor * yarn.original_max_position_embeddings as f64) as usize);
    let stated = match root.size("max_position_embeddings")? {
        Some(positions) => Some(positions),
        None => root.size("max_seq_len")?,
    };
    let num_attention_heads = root.require_size("n_heads")?;
    ModelConfig {
        hidden_size: root.require_size("dim")?,
        num_hidden_layers: root.require_size("n_layers")?,
        num_attention_heads,
        num_key_value_heads: root.size("n_kv_heads")?.unwrap_or(num_attention_heads),
        head_dim: root.require_size("head_dim")?,
        intermediate_size: root.require_size("hidden_dim")?,
        vocab_size: root.require_size("vocab_size")?,
        rms_norm_eps: root.require_positive("norm_eps")? as f32,
        rope,
        max_position_embeddings: stated.or(stretched).unwrap_or(32_768),
        tie_word_embeddings: root.boolean("tied_embeddings")?,
        quantization: read_quantization(&root)?,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
        vision,
    }
    .check(FILE)
}

fn read_rope(root: &Fields<'_>, sees: bool) -> Result<RopeConfig, ModelConfigError> {
    let yarn = match root.object("yarn")? {
        None => None,
        Some(yarn) => {
            let scaled = yarn.boolean("apply_scale")?.unwrap_or(!sees);
            Some(Yarn {
                factor: yarn.require_positive("factor")?,
                original_max_position_embeddings: yarn.require_size("original_max_position_embeddings")?,
                beta_fast: yarn.positive("beta")?.unwrap_or(32.0),
                beta_slow: yarn.positive("alpha")?.unwrap_or(1.0),
                mscale: 1.0,
                mscale_all_dim: if scaled { 0.0 } else { 1.0 },
                attention_factor: None,
            })
        }
    };
    let query_scale = match root.object("llama_4_scaling")? {
        None => None,
        Some(scaling) => match scaling.number("beta")? {
            None | Some(0.0) => None,
            Some(beta) => Some(QueryScale {
                beta,
                original_max_position_embeddings: scaling
                    .size("original_max_position_embeddings")?
                    .or(yarn.as_ref().map(|yarn| yarn.original_max_position_embeddings))
                    .ok_or_else(|| scaling.missing("original_max_position_embeddings"))?,
            }),
        },
    };
    let theta = root.positive("rope_theta")?.unwrap_or(1_000_000.0);
    Ok(RopeConfig { theta, yarn, query_scale })
}

fn read_quantization(root: &Fields<'_>) -> Result<Quantization, ModelConfigError> {
    let Some(quantization) = root.object("quantization")? else { return Ok(Quantization::None) };
    match quantization.text("qformat_weight")? {
        Some("fp8_e4m3") => {}
        Some(_) => return Err(quantization.refuse("qformat_weight", "\"fp8_e4m3\"")),
        None => return Err(quantization.missing("qformat_weight")),
    }
    if quantization.text("qscheme_act")?.is_some_and(|scheme| !scheme.eq_ignore_ascii_case("TENSOR")) {
        return Err(quantization.refuse("qscheme_act", "\"TENSOR\" (one static scale for each input)"));
    }
    Ok(Quantization::Fp8Static)
}

fn read_vision(vision: &Fields<'_>) -> Result<VisionConfig, ModelConfigError> {
    let hidden_size = vision.require_size("hidden_size")?;
    let num_attention_heads = vision.require_size("num_attention_heads")?;
    let image_size = match vision.size("image_size")? {
        Some(size) => size,
        None => vision.require_size("max_image_size")?,
    };
    Ok(VisionConfig {
        hidden_size,
        num_hidden_layers: vision.require_size("num_hidden_layers")?,
        num_attention_heads,
        head_dim: vision.size("head_dim")?.unwrap_or(hidden_size / num_attention_heads),
        intermediate_size: vision.require_size("intermediate_size")?,
        patch_size: vision.require_size("patch_size")?,
        image_size,
        num_channels: vision.size("num_channels")?.unwrap_or(3),
        rope_theta: vision.positive("rope_theta")?.unwrap_or(10_000.0),
        spatial_merge_size: vision.size("spatial_merge_size")?.unwrap_or(2),
        projector_bias: vision.boolean("adapter_bias")?.unwrap_or(false),
        image_token_id: vision.token_id("image_token_id")?.unwrap_or(10),
    })
}
