use super::*;
use serde_json::{Value, json};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures");

fn reconstructed(name: &str) -> String {
    std::fs::read_to_string(format!("{FIXTURES}/configs/{name}.config.reconstructed.json")).unwrap()
}

#[test]
fn reads_devstral_small_2() {
    let config = ModelConfig::from_huggingface(&reconstructed("devstral-small-2-24b")).unwrap();
    assert_eq!((config.hidden_size, config.num_hidden_layers, config.head_dim), (5120, 40, 128));
    assert_eq!((config.num_attention_heads, config.num_key_value_heads), (32, 8));
    assert_eq!((config.intermediate_size, config.vocab_size), (32768, 131072));
    assert_eq!(config.rope.theta, 1e8);
    assert_eq!(config.rope.query_scale, Some(QueryScale { beta: 0.1, original_max_position_embeddings: 8192 }));
    assert_eq!(config.tie_word_embeddings, Some(false));
    assert_eq!(config.quantization, Quantization::Fp8Static);
    assert_eq!(config.eos_token_ids, [2]);
    assert_eq!(config.kv_bytes_per_token(2), 160 * 1024);
    let vision = config.vision.unwrap();
    assert_eq!((vision.hidden_size, vision.num_hidden_layers, vision.head_dim), (1024, 24, 64));
    assert_eq!(vision.image_token_id, 10);
}

#[test]
fn reads_devstral_2() {
    let config = ModelConfig::from_huggingface(&reconstructed("devstral-2-123b")).unwrap();
    assert_eq!((config.hidden_size, config.num_hidden_layers, config.head_dim), (12288, 88, 128));
    assert_eq!(config.rope.query_scale, None);
    assert_eq!(config.vision, None);
    assert_eq!(config.kv_bytes_per_token(2), 352 * 1024);
}

#[test]
fn rope_equals_the_reference() {
    let text = std::fs::read_to_string(format!("{FIXTURES}/golden_rope_real.json")).unwrap();
    let goldens: Value = serde_json::from_str(&text).unwrap();
    for (name, file) in [("devstral-small-2-24b", "devstral-small-2-24b"), ("devstral-2-123b", "devstral-2-123b")] {
        let golden = &goldens[name];
        let config = ModelConfig::from_huggingface(&reconstructed(file)).unwrap();
        let yarn = config.rope.yarn.as_ref().unwrap();
        let (low, high) = yarn.correction_range(config.rope.theta, config.head_dim);
        assert_eq!(golden["correction_range"], json!([low as u32, high as u32]), "{name}");
        let factor = golden["attention_factor"].as_f64().unwrap();
        assert!((yarn.attention_factor() - factor).abs() < 1e-12, "{name}");

        let table = config.rope.table(config.head_dim);
        for (i, expected) in numbers(&golden["inv_freq"]).into_iter().enumerate() {
            let ours = table.frequencies[i];
            assert!((ours / expected - 1.0).abs() < 2.4e-7, "{name}: frequency {i} is {ours}, not {expected}");
        }
        for (row, position) in numbers(&golden["positions"]).into_iter().enumerate() {
            let ours: Vec<(f32, f32)> = table.cos_sin(position as u32).collect();
            let cosines = numbers(&golden["cos_first8_last8_of_64"][row]);
            let sines = numbers(&golden["sin_first8_last8_of_64"][row]);
            // an ulp or two of a frequency, times the position
            let tolerance = 2e-6 + 1.2e-7 * position;
            for (column, pair) in (0..8).chain(56..64).enumerate() {
                let off = (ours[pair].0 - cosines[column]).abs().max((ours[pair].1 - sines[column]).abs());
                assert!(off <= tolerance, "{name}: position {position}, pair {pair} is off by {off}");
            }
            let scale = numbers(&golden["llama4_query_scale"])[row];
            assert!((table.query_scale_at(position as u32) - scale).abs() < 1e-6, "{name}: s({position})");
        }
    }
}

#[test]
fn mistral_params_describe_the_same_model() {
    let params = json!({
        "dim": 5120, "n_layers": 40, "head_dim": 128, "hidden_dim": 32768, "n_heads": 32, "n_kv_heads": 8,
        "norm_eps": 1e-5, "vocab_size": 131072, "rope_theta": 1e8, "tied_embeddings": false,
        "max_position_embeddings": 393216,
        "yarn": {"beta": 32, "alpha": 1, "factor": 48, "original_max_position_embeddings": 8192, "apply_scale": false},
        "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 8192},
        "quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"},
        "vision_encoder": {
            "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
            "patch_size": 14, "image_size": 1540, "max_image_size": 1540, "num_channels": 3, "rope_theta": 10000,
            "spatial_merge_size": 2, "image_token_id": 10, "adapter_bias": false
        }
    });
    let from_params = ModelConfig::from_mistral(&params.to_string()).unwrap();
    let from_config = ModelConfig::from_huggingface(&reconstructed("devstral-small-2-24b")).unwrap();
    assert_eq!(from_params, from_config);
}

#[test]
fn attention_factor_follows_the_vision_part_where_params_do_not_say() {
    let mut params = json!({
        "dim": 64, "n_layers": 3, "head_dim": 32, "hidden_dim": 192, "n_heads": 8, "n_kv_heads": 4,
        "norm_eps": 1e-5, "vocab_size": 9192,
        "yarn": {"beta": 4, "alpha": 1, "factor": 64, "original_max_position_embeddings": 4096}
    });
    let config = ModelConfig::from_mistral(&params.to_string()).unwrap();
    assert!((config.rope.yarn.unwrap().attention_factor() - 1.4158883).abs() < 1e-6);
    assert_eq!(config.max_position_embeddings, 262_144);
    assert_eq!(config.rope.query_scale, None);
    params["yarn"]["apply_scale"] = json!(false);
    let config = ModelConfig::from_mistral(&params.to_string()).unwrap();
    assert_eq!(config.rope.yarn.unwrap().attention_factor(), 1.0);
}

fn plain() -> Value {
    json!({
        "model_type": "ministral3", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "rope_theta": 1e5, "eos_token_id": [2, 3]
    })
}

#[test]
fn plain_rope_and_defaults() {
    let config = ModelConfig::from_huggingface(&plain().to_string()).unwrap();
    assert_eq!(config.head_dim, 64);
    assert_eq!(config.rope, RopeConfig { theta: 1e5, yarn: None, query_scale: None });
    assert_eq!(config.tie_word_embeddings, None);
    assert_eq!(config.eos_token_ids, [2, 3]);
    let table = config.rope.table(64);
    assert_eq!(table.frequencies[0], 1.0);
    assert_eq!(table.attention_factor, 1.0);
    assert_eq!(table.query_scale_at(8191), 1.0);
}

#[test]
fn legacy_rope_scaling_is_read() {
    let mut value = plain();
    value["rope_scaling"] = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048});
    let config = ModelConfig::from_huggingface(&value.to_string()).unwrap();
    let yarn = config.rope.yarn.unwrap();
    assert_eq!((config.rope.theta, yarn.factor, yarn.original_max_position_embeddings), (1e5, 4.0, 2048));
    assert!((yarn.attention_factor() - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-12);
}

#[test]
fn errors_name_the_field() {
    let cases = [
        ("hidden_size", json!(null), "config.json: `hidden_size` is missing"),
        ("hidden_size", json!("big"), "config.json: `hidden_size` is \"big\", expected a whole number above 0"),
        ("hidden_size", json!(0), "config.json: `hidden_size` is 0, expected a whole number above 0"),
        ("num_key_value_heads", json!(2), "`num_key_value_heads` is 2, expected a divisor of the 9 query heads"),
        ("model_type", json!("gpt2"), "`model_type` is \"gpt2\", expected \"ministral3\" or \"mistral3\""),
        ("hidden_act", json!("gelu"), "`hidden_act` is \"gelu\""),
        ("sliding_window", json!(4096), "`sliding_window` is 4096"),
        ("attention_bias", json!(true), "`attention_bias` is true"),
        ("rope_parameters", json!({"rope_theta": 1e4, "rope_type": "yarn"}), "`rope_parameters.factor` is missing"),
        ("rope_parameters", json!({"rope_type": "linear"}), "`rope_parameters.rope_type` is \"linear\""),
        ("quantization_config", json!({"quant_method": "awq"}), "`quantization_config.quant_method` is \"awq\""),
        ("eos_token_id", json!(49152), "`eos_token_id` is 49152, expected an id below 49152"),
    ];
    for (field, value, expected) in cases {
        let mut config = plain();
        config[field] = value;
        let message = ModelConfig::from_huggingface(&config.to_string()).unwrap_err().to_string();
        assert!(message.contains(expected), "{field}: {message}");
    }
    let message = ModelConfig::from_huggingface("{").unwrap_err().to_string();
    assert!(message.starts_with("config.json is not valid JSON"), "{message}");
    let message = ModelConfig::from_mistral("{}").unwrap_err().to_string();
    assert_eq!(message, "params.json: `n_heads` is missing");
    let folder = tempfile::tempdir().unwrap();
    let error = ModelConfig::from_dir(folder.path()).unwrap_err();
    assert!(matches!(error, ModelConfigError::NoConfig { .. }), "{error}");
}

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
}
