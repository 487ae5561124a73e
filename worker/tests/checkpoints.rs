//! Checkpoints in all spellings, and invalid checkpoints.

mod support;

use std::path::Path;

use bora_common::model::ModelConfig;
use bora_worker::backend::cpu::CpuOptions;
use bora_worker::weights::{ShardPlan, Weights};
use support::{Goldens, Stored, blocks, difference, fixture, read_tensors, single, write_tensors};

fn code_logits(folder: &Path) -> Vec<Vec<f32>> {
    let ids = Goldens::of("tiny_text").ids("code.input_ids");
    single(folder, CpuOptions::default()).run_in_chunks(&ids, &blocks(0, ids.len()), ids.len())
}

/// Orders rows as in Mistral's files: pairs (i, i + d/2) side by side.
fn interleave(tensor: &mut Stored, head_dim: usize) {
    let row_bytes = tensor.bytes.len() / tensor.shape[0];
    let mut rows = Vec::with_capacity(tensor.bytes.len());
    for row in 0..tensor.shape[0] {
        let (head, within) = (row / head_dim, row % head_dim);
        let from = head * head_dim + within / 2 + (within % 2) * (head_dim / 2);
        rows.extend_from_slice(&tensor.bytes[from * row_bytes..(from + 1) * row_bytes]);
    }
    tensor.bytes = rows;
}

fn mistral_name(name: &str) -> String {
    let mut name = name.trim_start_matches("model.").to_owned();
    for (from, to) in [
        ("embed_tokens.weight", "tok_embeddings.weight"),
        ("lm_head.weight", "output.weight"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attention.wq"),
        ("self_attn.k_proj", "attention.wk"),
        ("self_attn.v_proj", "attention.wv"),
        ("self_attn.o_proj", "attention.wo"),
        ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.down_proj", "feed_forward.w2"),
        ("mlp.up_proj", "feed_forward.w3"),
        ("weight_scale_inv", "qscale_weight"),
        ("activation_scale", "qscale_act"),
    ] {
        name = name.replace(from, to);
    }
    name
}

#[test]
fn computes_the_same_logits_from_mistral_files() {
    for checkpoint in ["tiny_text", "tiny_text_fp8"] {
        let folder = tempfile::tempdir().unwrap();
        let mut tensors = read_tensors(&fixture(checkpoint).join("model.safetensors"));
        for tensor in &mut tensors {
            if tensor.name.ends_with("q_proj.weight") || tensor.name.ends_with("k_proj.weight") {
                interleave(tensor, 32);
            }
            tensor.name = mistral_name(&tensor.name);
        }
        // two files without an index
        let (first, second) = tensors.split_at(tensors.len() / 2);
        write_tensors(&folder.path().join("consolidated-00001-of-00002.safetensors"), first);
        write_tensors(&folder.path().join("consolidated-00002-of-00002.safetensors"), second);
        let mut params = serde_json::json!({
            "dim": 64, "n_layers": 3, "head_dim": 32, "hidden_dim": 192, "n_heads": 8, "n_kv_heads": 4,
            "norm_eps": 1e-5, "vocab_size": 9192, "rope_theta": 10000.0, "max_position_embeddings": 2048,
            "tied_embeddings": false,
            "yarn": {"beta": 4, "alpha": 1, "factor": 32, "original_max_position_embeddings": 64, "apply_scale": true}
        });
        if checkpoint == "tiny_text_fp8" {
            params["quantization"] = serde_json::json!({"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"});
        }
        std::fs::write(folder.path().join("params.json"), params.to_string()).unwrap();
        let off = difference(&code_logits(folder.path()), &code_logits(&fixture(checkpoint)));
        assert_eq!(off, 0.0, "{checkpoint}");
    }
}

/// A copy of a tiny checkpoint with changed tensors.
fn changed(checkpoint: &str, change: impl FnOnce(&mut Vec<Stored>)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut tensors = read_tensors(&fixture(checkpoint).join("model.safetensors"));
    change(&mut tensors);
    write_tensors(&folder.path().join("model.safetensors"), &tensors);
    std::fs::copy(fixture(checkpoint).join("config.json"), folder.path().join("config.json")).unwrap();
    folder
}

fn find<'a>(tensors: &'a mut [Stored], name: &str) -> &'a mut Stored {
    tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
}

#[test]
fn computes_the_same_logits_from_other_spellings_and_types() {
    let plain = code_logits(&fixture("tiny_text_fp8"));
    // the prefix of newer exporters, the other scale names, scales as float32 of shape [1]
    let folder = changed("tiny_text_fp8", |tensors| {
        for tensor in tensors {
            tensor.name = tensor.name.replace("model.", "model.language_model.");
            let scale = tensor.name.ends_with("_scale") || tensor.name.ends_with("_scale_inv");
            tensor.name = tensor.name.replace("weight_scale_inv", "weight_scale");
            tensor.name = tensor.name.replace("activation_scale", "input_scale");
            if scale {
                let value = half::bf16::from_le_bytes([tensor.bytes[0], tensor.bytes[1]]).to_f32();
                tensor.bytes = value.to_le_bytes().to_vec();
                tensor.dtype = safetensors::Dtype::F32;
                tensor.shape = vec![1];
            }
        }
    });
    assert_eq!(difference(&code_logits(folder.path()), &plain), 0.0);
    // everything in float32
    let folder = changed("tiny_text", |tensors| {
        for tensor in tensors {
            let numbers = tensor.bytes.as_chunks::<2>().0.iter().map(|two| half::bf16::from_le_bytes(*two).to_f32());
            tensor.bytes = numbers.flat_map(f32::to_le_bytes).collect();
            tensor.dtype = safetensors::Dtype::F32;
        }
    });
    assert_eq!(difference(&code_logits(folder.path()), &code_logits(&fixture("tiny_text"))), 0.0);
}

#[test]
fn ties_an_absent_head_if_the_configuration_allows_it() {
    let folder = changed("tiny_text", |tensors| tensors.retain(|tensor| tensor.name != "lm_head.weight"));
    let path = folder.path().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let config = ModelConfig::from_dir(folder.path()).unwrap();
    let message = Weights::open(folder.path(), &config).err().unwrap().to_string();
    assert_eq!(message, "the checkpoint has no tensor for `lm_head.weight`");

    let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
    value.as_object_mut().unwrap().remove("tie_word_embeddings");
    std::fs::write(&path, value.to_string()).unwrap();
    let tied = code_logits(folder.path());
    let folder = changed("tiny_text", |tensors| {
        let embedding = find(tensors, "model.embed_tokens.weight").bytes.clone();
        find(tensors, "lm_head.weight").bytes = embedding;
    });
    assert_eq!(difference(&tied, &code_logits(folder.path())), 0.0);
}

#[test]
fn names_the_tensor_of_an_invalid_checkpoint() {
    type Change = Box<dyn FnOnce(&mut Vec<Stored>)>;
    let rename = |from: &'static str, to: &'static str| -> Change {
        Box::new(move |tensors| find(tensors, from).name = to.to_owned())
    };
    let cases: Vec<(Change, &str)> = vec![
        (
            rename("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.bias"),
            "holds tensor `model.layers.1.mlp.up_proj.bias`, which this model does not have",
        ),
        (
            rename("model.layers.1.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
            "no tensor for `model.layers.1.mlp.up_proj.weight`",
        ),
        (
            Box::new(|tensors| {
                let mut extra = find(tensors, "model.layers.1.mlp.up_proj.weight").clone();
                extra.name = "model.layers.3.mlp.up_proj.weight".to_owned();
                tensors.push(extra);
            }),
            "holds tensor `model.layers.3.mlp.up_proj.weight`, which this model does not have",
        ),
        (
            Box::new(|tensors| find(tensors, "model.layers.0.self_attn.k_proj.weight").shape = vec![64, 128]),
            "tensor `model.layers.0.self_attn.k_proj.weight` has shape [64, 128], the configuration gives [128, 64]",
        ),
        (
            Box::new(|tensors| {
                let mut twin = find(tensors, "model.norm.weight").clone();
                twin.name = "language_model.model.norm.weight".to_owned();
                tensors.push(twin);
            }),
            "are the same part of the model",
        ),
        (
            Box::new(|tensors| find(tensors, "model.layers.2.mlp.down_proj.weight_scale_inv").bytes = vec![0, 0]),
            "scale `model.layers.2.mlp.down_proj.weight_scale_inv` is 0, expected a number above 0",
        ),
        (
            Box::new(|tensors| {
                tensors.retain(|tensor| tensor.name != "model.layers.2.self_attn.o_proj.activation_scale");
            }),
            "no tensor for `model.layers.2.self_attn.o_proj.activation_scale`",
        ),
        (
            Box::new(|tensors| {
                let name = "vision_tower.ln_pre.weight".to_owned();
                let (dtype, shape, bytes) = (safetensors::Dtype::BF16, vec![2], vec![0; 4]);
                tensors.push(Stored { name, dtype, shape, bytes });
            }),
            "holds tensor `vision_tower.ln_pre.weight`, which this model does not have",
        ),
    ];
    for (change, expected) in cases {
        let folder = changed("tiny_text_fp8", change);
        let config = ModelConfig::from_dir(folder.path()).unwrap();
        let plan = ShardPlan::new(&config, 0, 1).unwrap();
        let message = match Weights::open(folder.path(), &config) {
            Err(error) => error.to_string(),
            // scales are read with their linear layer
            Ok(weights) => (0..3)
                .find_map(|layer| weights.projection(layer, bora_worker::weights::Projection::Down, &plan).err())
                .expect(expected)
                .to_string(),
        };
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn rejects_folders_without_weights_and_broken_files() {
    let config = ModelConfig::from_dir(&fixture("tiny_text")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let message = Weights::open(folder.path(), &config).err().unwrap().to_string();
    assert!(message.contains("no model.safetensors"), "{message}");
    // truncated
    let bytes = std::fs::read(fixture("tiny_text").join("model.safetensors")).unwrap();
    std::fs::write(folder.path().join("model.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    let message = Weights::open(folder.path(), &config).err().unwrap().to_string();
    assert!(message.contains("model.safetensors"), "{message}");
    // an index that refers to another folder
    let index = serde_json::json!({"weight_map": {"model.norm.weight": "../model.safetensors"}});
    std::fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    let message = Weights::open(folder.path(), &config).err().unwrap().to_string();
    assert!(message.contains("`weight_map.model.norm.weight` is not the name of a file beside it"), "{message}");
}

#[test]
fn distinguishes_checkpoints_by_fingerprint() {
    let fingerprint = |folder: &Path| {
        let config = ModelConfig::from_dir(folder).unwrap();
        Weights::open(folder, &config).unwrap().fingerprint().to_owned()
    };
    let plain = fingerprint(&fixture("tiny_text"));
    assert_eq!(plain, fingerprint(&fixture("tiny_text")));
    assert_ne!(plain, fingerprint(&fixture("tiny_text_fp8")));
    let folder = changed("tiny_text", |tensors| find(tensors, "lm_head.weight").bytes.fill(1));
    assert_ne!(plain, fingerprint(folder.path()));
}

#[test]
fn generates_equal_dummy_weights_for_every_split() {
    let config = ModelConfig::from_dir(&fixture("tiny_vlm_fp8")).unwrap();
    let weights = Weights::dummy(&config, 5);
    let whole = ShardPlan::new(&config, 0, 1).unwrap();
    for projection in [bora_worker::weights::Projection::O, bora_worker::weights::Projection::Gate] {
        let all = weights.projection(2, projection, &whole).unwrap();
        assert!(all.scales.is_some());
        let numbers = all.weight.to_f32(1.0);
        let deviation = (numbers.iter().map(|x| x * x).sum::<f32>() / numbers.len() as f32).sqrt();
        assert!((deviation - 80.0).abs() < 4.0, "{deviation}");
        for rank in 0..2 {
            let part = weights.projection(2, projection, &ShardPlan::new(&config, rank, 2).unwrap()).unwrap().weight;
            let own = part.to_f32(1.0);
            let by_rows = part.rows < all.weight.rows;
            for row in 0..part.rows {
                for column in 0..part.columns {
                    let (row_in_all, column_in_all) =
                        if by_rows { (row + rank * part.rows, column) } else { (row, column + rank * part.columns) };
                    let expected = numbers[row_in_all * all.weight.columns + column_in_all];
                    assert_eq!(own[row * part.columns + column], expected);
                }
            }
        }
    }
}
