//! The engine with a tiny real model on the CPU backend: its output equals the reference for any chunks, any batch and
//! any cache.

mod support;

use std::sync::Arc;

use bora_common::blocks::{BlockHash, hash_blocks};
use bora_common::registry::Speed;
use bora_common::secret::ClusterKeys;
use bora_proto::v1::{self, generate_event::Event};
use bora_worker::SpeculativeOptions;
use bora_worker::backend::Backend as _;
use bora_worker::backend::cpu::CpuOptions;
use bora_worker::engine::runner::{Bounds, ModelRunner};
use bora_worker::engine::step::HostMemory;
use bora_worker::engine::{EngineConfig, EngineHandle, EngineOptions, EventStream};
use bora_worker::grammar::Grammars;
use bora_worker::model::KvShape;
use bora_worker::weights::ShardPlan;
use support::{Goldens, KV_BLOCKS, LIMITS, fixture, single};
use tokio_stream::StreamExt as _;

const CASES: [&str; 4] = ["card_small_talk", "short", "long", "code"];

/// An engine with `tiny_text` and at most `max_num_batched_tokens` tokens per step.
fn start(max_num_batched_tokens: u32) -> EngineHandle {
    start_with(EngineOptions { max_num_seqs: 8, max_num_batched_tokens, ..Default::default() }, None)
}

fn start_with(options: EngineOptions, grammars: Option<Arc<Grammars>>) -> EngineHandle {
    start_in(KV_BLOCKS as u32, 0, options, grammars)
}

/// An engine with a cache of `kv_blocks` blocks and `host_blocks` blocks of host memory.
fn start_in(kv_blocks: u32, host_blocks: u32, options: EngineOptions, grammars: Option<Arc<Grammars>>) -> EngineHandle {
    let mut rank = single(&fixture("tiny_text"), CpuOptions::default());
    let mut host = HostMemory::default();
    if host_blocks > 0 {
        let shape = KvShape::new(&rank.config, &ShardPlan::new(&rank.config, 0, 1).unwrap());
        let seconds_per_block = rank.backend.allocate_host(&shape, host_blocks as usize).unwrap();
        assert!(seconds_per_block < 0.01, "{seconds_per_block}");
        host = HostMemory { blocks: host_blocks, seconds_per_block };
    }
    let vocabulary_size = rank.config.vocab_size;
    let bounds = Bounds { limits: LIMITS, kv_blocks: KV_BLOCKS, vocabulary_size };
    let runner =
        ModelRunner::new(rank.backend, rank.model, 0, bounds).with_grammars(grammars.clone()).with_host_memory(host);
    assert!(options.max_logit_rows() <= LIMITS.logit_rows);
    let config = EngineConfig {
        options,
        epoch: 1,
        kv_blocks,
        host,
        max_model_len: (LIMITS.model_len as u32).min(kv_blocks * 64),
        vocabulary_size: vocabulary_size as u32,
        eos_ids: vec![2],
        images: false,
        least_chunk: 1,
        speed: Speed {
            prefill_tokens_per_second: 1e4,
            prefill_seconds_per_token_pair: 1e-7,
            decode_step_seconds: 1e-3,
        },
        steps_run: 0,
        grammars,
        keys: keys(),
    };
    EngineHandle::start(config, Box::new(runner)).unwrap().0
}

fn keys() -> ClusterKeys {
    ClusterKeys::derive(&[1; 32])
}

fn greedy(token_ids: Vec<u32>, max_tokens: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        token_ids,
        sampling: Some(v1::Sampling { temperature: Some(0.0), ..Default::default() }),
        stopping: Some(v1::Stopping { max_tokens, ignore_eos: true, ..Default::default() }),
        ..Default::default()
    }
}

#[derive(Default)]
struct Received {
    ids: Vec<u32>,
    logprobs: Vec<v1::PositionLogprobs>,
    prompt_logprobs: Vec<v1::PositionLogprobs>,
    cached_tokens: u32,
    finished: v1::Finished,
}

async fn receive(mut stream: EventStream) -> Received {
    let mut received = Received::default();
    while let Some(event) = stream.next().await {
        match event.unwrap().event.unwrap() {
            Event::Compiled(_) => {}
            Event::Started(started) => received.cached_tokens = started.cached_tokens,
            Event::PromptLogprobs(part) => {
                assert_eq!(part.start as usize, received.prompt_logprobs.len() + 1);
                received.prompt_logprobs.extend(part.positions);
            }
            Event::Tokens(tokens) => {
                received.ids.extend(tokens.token_ids);
                received.logprobs.extend(tokens.logprobs);
            }
            Event::Finished(finished) => received.finished = finished,
        }
    }
    received
}

#[tokio::test]
async fn matches_the_reference_with_any_chunks_and_a_warm_cache() {
    let goldens = Goldens::of("tiny_text");
    for max_num_batched_tokens in [8, 100, 4_096] {
        let engine = start(max_num_batched_tokens);
        for warm in [false, true] {
            let streams: Vec<_> = CASES
                .iter()
                .map(|case| {
                    let expected = goldens.ids(&format!("{case}.greedy_ids"));
                    let prompt = goldens.ids(&format!("{case}.input_ids"));
                    let cacheable = (prompt.len() - 1) / 64 * 64;
                    let stream = engine.generate(greedy(prompt, expected.len() as u32)).unwrap();
                    (case, expected, cacheable, stream)
                })
                .collect();
            for (case, expected, cacheable, stream) in streams {
                let received = receive(stream).await;
                assert_eq!(received.ids, expected, "{case}, {max_num_batched_tokens} tokens a step, warm: {warm}");
                assert_eq!(received.cached_tokens as usize, if warm { cacheable } else { 0 });
            }
        }
    }
}

#[tokio::test]
async fn matches_the_prompt_logprobs_of_the_reference() {
    let goldens = Goldens::of("tiny_text");
    let engine = start(150);
    for case in CASES {
        let prompt = goldens.ids(&format!("{case}.input_ids"));
        let logprobs = v1::Logprobs { top: Some(1), prompt_top: Some(3) };
        let request = v1::GenerateRequest { logprobs: Some(logprobs), ..greedy(prompt.clone(), 4) };
        let received = receive(engine.generate(request).unwrap()).await;
        assert_eq!(received.prompt_logprobs.len(), prompt.len() - 1);
        assert!(received.logprobs.iter().all(|at| at.chosen.unwrap().rank == 1 && at.chosen == Some(at.top[0])));
        let log_sum_exp = goldens.floats(&format!("{case}.logsumexp"));
        let logits = goldens.floats(&format!("{case}.logits"));
        let positions = goldens.ids(&format!("{case}.positions"));
        let columns = logits.len() / positions.len();
        for (row, position) in logits.chunks(columns).zip(positions) {
            let position = position as usize;
            let Some(target) = prompt.get(position + 1) else { continue };
            let expected = row[*target as usize] - log_sum_exp[position];
            let chosen = received.prompt_logprobs[position].chosen.unwrap();
            assert_eq!(chosen.token_id, *target);
            assert!((chosen.logprob - expected).abs() < 2e-3, "{case} {position}: {} {expected}", chosen.logprob);
            let better = row.iter().filter(|logit| **logit > row[*target as usize]).count();
            assert_eq!(chosen.rank as usize, better + 1);
        }
    }
}

#[tokio::test]
async fn resumes_a_sampled_sequence_identically() {
    let goldens = Goldens::of("tiny_text");
    let prompt = goldens.ids("code.input_ids");
    let sampling = v1::Sampling {
        temperature: Some(0.8),
        top_p: Some(0.95),
        presence_penalty: Some(0.5),
        frequency_penalty: Some(0.2),
        repetition_penalty: Some(1.1),
        seed: 1234,
        ..Default::default()
    };
    let request = |token_ids| v1::GenerateRequest { sampling: Some(sampling.clone()), ..greedy(token_ids, 90) };
    let whole = receive(start(4_096).generate(request(prompt.clone())).unwrap()).await.ids;
    assert_eq!(whole.len(), 90);
    for cut in [1usize, 40, 89] {
        let mut token_ids = prompt.clone();
        token_ids.extend(&whole[..cut]);
        let resumed = v1::GenerateRequest { generated_len: cut as u32, ..request(token_ids) };
        let rest = receive(start(50).generate(resumed).unwrap()).await.ids;
        assert_eq!(rest, whole[cut..], "cut at {cut}");
    }
}

/// Variants of a request with the same prompt.
fn variants() -> Vec<(&'static str, v1::GenerateRequest)> {
    let greedy = || v1::Sampling { temperature: Some(0.0), ..Default::default() };
    let sampled = || v1::Sampling { temperature: Some(0.7), top_p: Some(0.9), seed: 77, ..Default::default() };
    let request = |sampling| v1::GenerateRequest { sampling: Some(sampling), ..Default::default() };
    // biases a few tokens that are likely everywhere, so that the output repeats
    let few = |weight: f32| (300..304).map(|id| (id, weight)).collect();
    let schema = r#"{"type": "array", "items": {"enum": ["alpha", "beta"]}, "minItems": 12, "maxItems": 20}"#;
    let grammar = v1::Grammar { kind: v1::grammar::Kind::JsonSchema.into(), source: schema.into() };
    vec![
        ("greedy", request(greedy())),
        ("greedy with logprobs", {
            let logprobs = v1::Logprobs { top: Some(3), prompt_top: None };
            let sampling = v1::Sampling { logit_bias: few(30.0), ..greedy() };
            v1::GenerateRequest { logprobs: Some(logprobs), ..request(sampling) }
        }),
        ("sampled", request(sampled())),
        ("sampled from few", request(v1::Sampling { logit_bias: few(30.0), ..sampled() })),
        (
            "sampled from few with penalties",
            request(v1::Sampling {
                logit_bias: few(25.0),
                presence_penalty: Some(0.4),
                frequency_penalty: Some(0.1),
                repetition_penalty: Some(1.05),
                ..sampled()
            }),
        ),
        ("greedy with penalties", {
            let sampling = v1::Sampling {
                logit_bias: few(30.0),
                frequency_penalty: Some(0.7),
                repetition_penalty: Some(1.2),
                ..greedy()
            };
            request(sampling)
        }),
        ("a grammar", v1::GenerateRequest { grammar: Some(grammar.clone()), ..request(greedy()) }),
        ("a grammar, sampled", v1::GenerateRequest { grammar: Some(grammar), ..request(sampled()) }),
    ]
}

#[tokio::test]
async fn generates_the_same_with_speculation() {
    let goldens = Goldens::of("tiny_text");
    let tokenizer = fixture("tokenizers/tekken-v13-8k.json");
    let grammars = Arc::new(Grammars::load(&tokenizer).unwrap());
    let options = |speculative| EngineOptions {
        max_num_seqs: 8,
        max_num_batched_tokens: 300,
        speculative: Some(speculative),
        ..Default::default()
    };
    let plain = start_with(options(SpeculativeOptions::off()), Some(grammars.clone()));
    let speculating =
        start_with(options(SpeculativeOptions { prompt_lookup_min: 1, ..Default::default() }), Some(grammars));
    let mut without_effect = Vec::new();
    for (name, mut request) in variants() {
        request.token_ids = goldens.ids("code.input_ids");
        request.stopping = Some(v1::Stopping { max_tokens: 90, ..Default::default() });
        let expected = receive(plain.generate(request.clone()).unwrap()).await;
        let found = receive(speculating.generate(request.clone()).unwrap()).await;
        assert_eq!(found.ids, expected.ids, "{name}");
        assert_eq!(found.finished.reason, expected.finished.reason, "{name}");
        assert_eq!(found.logprobs.len(), expected.logprobs.len(), "{name}");
        for (found, expected) in found.logprobs.iter().zip(&expected.logprobs) {
            let (found, expected) = (found.chosen.unwrap(), expected.chosen.unwrap());
            assert!(found.token_id == expected.token_id && (found.logprob - expected.logprob).abs() < 1e-3, "{name}");
        }
        let steps = |received: &Received| received.finished.timing.unwrap().steps;
        assert!(steps(&found) <= steps(&expected), "{name}");
        if steps(&found) == steps(&expected) {
            without_effect.push(name);
        }
        // in one batch with siblings of other seeds, and resumed by another group in the middle
        let siblings: Vec<_> = (0..2u64)
            .map(|number| {
                let mut sibling = request.clone();
                sibling.sampling.as_mut().unwrap().seed += number;
                speculating.generate(sibling).unwrap()
            })
            .collect();
        for (number, sibling) in siblings.into_iter().enumerate() {
            let mut alone = request.clone();
            alone.sampling.as_mut().unwrap().seed += number as u64;
            let alone = receive(plain.generate(alone).unwrap()).await;
            assert_eq!(receive(sibling).await.ids, alone.ids, "{name}, sibling {number}");
        }
        let cut = expected.ids.len() / 2;
        let mut resumed = request.clone();
        resumed.token_ids.extend(&expected.ids[..cut]);
        resumed.generated_len = cut as u32;
        assert_eq!(receive(speculating.generate(resumed).unwrap()).await.ids, expected.ids[cut..], "{name}, resumed");
    }
    // the output of these variants does not repeat
    assert_eq!(without_effect, ["greedy", "sampled"], "nothing was drafted");
    assert_eq!(plain.load().draft_tokens, 0);
    let load = speculating.load();
    assert!(load.accepted_draft_tokens > 0 && load.accepted_draft_tokens <= load.draft_tokens);
}

#[tokio::test]
async fn fetches_conversations_of_three_times_the_cache_from_host_memory() {
    let golden = Goldens::of("tiny_text").ids("long.input_ids");
    // three conversations of ten blocks in a cache of twelve
    let prompts: Vec<Vec<u32>> =
        (0..3).map(|i| golden.iter().cycle().skip(7 * i).take(640).copied().collect()).collect();
    let asked = |prompt: &[u32]| {
        let logprobs = v1::Logprobs { top: Some(0), prompt_top: None };
        v1::GenerateRequest { logprobs: Some(logprobs), ..greedy(prompt.to_vec(), 20) }
    };
    let options = EngineOptions { max_num_seqs: 4, max_num_batched_tokens: 128, ..Default::default() };
    let spilling = start_in(12, 32, options.clone(), None);
    let dropping = start_in(12, 0, options, None);
    let mut watched = spilling.watch("a router".into()).await.unwrap();
    let mut first = Vec::new();
    for prompt in &prompts {
        let received = receive(spilling.generate(asked(prompt)).unwrap()).await;
        assert_eq!(received.cached_tokens, 0);
        first.push(received);
    }
    for round in 0..2 {
        for (prompt, before) in prompts.iter().zip(&first) {
            let longer = [prompt.as_slice(), &before.ids].concat();
            let cold = receive(dropping.generate(asked(&longer)).unwrap()).await;
            let received = receive(spilling.generate(asked(&longer)).unwrap()).await;
            assert_eq!(received.cached_tokens, 640, "all that was full, round {round}");
            assert_eq!(received.ids, cold.ids);
            for (found, expected) in received.logprobs.iter().zip(&cold.logprobs) {
                let (found, expected) = (found.chosen.unwrap(), expected.chosen.unwrap());
                assert!((found.logprob - expected.logprob).abs() < 1e-4, "{found:?} {expected:?}");
            }
        }
    }
    // the blocks reported to a router are the cached blocks
    let mut held = std::collections::HashSet::new();
    while let Ok(event) = watched.try_recv() {
        match event.event.unwrap() {
            v1::group_event::Event::Snapshot(part) => held.extend(BlockHash::parse_many(&part.block_hashes)),
            v1::group_event::Event::Blocks(changed) => {
                for hash in BlockHash::parse_many(&changed.evicted) {
                    assert!(held.remove(&hash));
                }
                held.extend(BlockHash::parse_many(&changed.stored));
            }
            _ => {}
        }
    }
    for (prompt, before) in prompts.iter().zip(&first) {
        let hashes = hash_blocks(&keys(), &[], &[], &[prompt.as_slice(), &before.ids].concat());
        assert!(hashes.iter().all(|hash| held.contains(hash)));
    }
    let flushed = spilling.flush().await.unwrap();
    assert!(flushed >= 30, "{flushed}");
    let received = receive(spilling.generate(asked(&prompts[0])).unwrap()).await;
    assert_eq!((received.cached_tokens, &received.ids), (0, &first[0].ids));
}
