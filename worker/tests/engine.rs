//! The engine over a real (tiny) model on the CPU backend: what it streams is what the reference says,
//! whatever the chunks, the batch and the cache.

mod support;

use bora_common::registry::Speed;
use bora_proto::v1::{self, generate_event::Event};
use bora_worker::backend::cpu::CpuOptions;
use bora_worker::engine::runner::{Bounds, ModelRunner};
use bora_worker::engine::{EngineConfig, EngineHandle, EngineOptions, EventStream};
use support::{Goldens, KV_BLOCKS, LIMITS, fixture, single};
use tokio_stream::StreamExt as _;

const CASES: [&str; 4] = ["card_small_talk", "short", "long", "code"];

/// An engine over `tiny_text` whose steps have at most `max_num_batched_tokens` tokens.
fn start(max_num_batched_tokens: u32) -> EngineHandle {
    let rank = single(&fixture("tiny_text"), CpuOptions::default());
    let vocabulary_size = rank.config.vocab_size;
    let bounds = Bounds { limits: LIMITS, kv_blocks: KV_BLOCKS, vocabulary_size };
    let runner = ModelRunner::new(rank.backend, rank.model, 0, bounds);
    let options = EngineOptions { max_num_seqs: 8, max_num_batched_tokens, ..Default::default() };
    assert!(options.max_logit_rows() <= LIMITS.logit_rows);
    let config = EngineConfig {
        options,
        epoch: 1,
        kv_blocks: KV_BLOCKS as u32,
        max_model_len: LIMITS.model_len as u32,
        vocabulary_size: vocabulary_size as u32,
        eos_ids: vec![2],
        images: false,
        speed: Speed {
            prefill_tokens_per_second: 1e4,
            prefill_seconds_per_token_pair: 1e-7,
            decode_step_seconds: 1e-3,
        },
        steps_run: 0,
        grammars: None,
    };
    EngineHandle::start(config, Box::new(runner)).unwrap().0
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
struct Heard {
    ids: Vec<u32>,
    logprobs: Vec<v1::PositionLogprobs>,
    prompt_logprobs: Vec<v1::PositionLogprobs>,
    cached_tokens: u32,
}

async fn hear(mut stream: EventStream) -> Heard {
    let mut heard = Heard::default();
    while let Some(event) = stream.next().await {
        match event.unwrap().event.unwrap() {
            Event::Started(started) => heard.cached_tokens = started.cached_tokens,
            Event::PromptLogprobs(part) => {
                assert_eq!(part.start as usize, heard.prompt_logprobs.len() + 1);
                heard.prompt_logprobs.extend(part.positions);
            }
            Event::Tokens(tokens) => {
                heard.ids.extend(tokens.token_ids);
                heard.logprobs.extend(tokens.logprobs);
            }
            Event::Finished(_) => {}
        }
    }
    heard
}

#[tokio::test]
async fn greedy_ids_equal_the_reference_with_any_chunks_and_with_a_warm_cache() {
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
                let heard = hear(stream).await;
                assert_eq!(heard.ids, expected, "{case}, {max_num_batched_tokens} tokens a step, warm: {warm}");
                assert_eq!(heard.cached_tokens as usize, if warm { cacheable } else { 0 });
            }
        }
    }
}

#[tokio::test]
async fn prompt_logprobs_equal_the_reference() {
    let goldens = Goldens::of("tiny_text");
    let engine = start(150);
    for case in CASES {
        let prompt = goldens.ids(&format!("{case}.input_ids"));
        let logprobs = v1::Logprobs { top: Some(1), prompt_top: Some(3) };
        let request = v1::GenerateRequest { logprobs: Some(logprobs), ..greedy(prompt.clone(), 4) };
        let heard = hear(engine.generate(request).unwrap()).await;
        assert_eq!(heard.prompt_logprobs.len(), prompt.len() - 1);
        assert!(heard.logprobs.iter().all(|at| at.chosen.unwrap().rank == 1 && at.chosen == Some(at.top[0])));
        let log_sums = goldens.floats(&format!("{case}.logsumexp"));
        let logits = goldens.floats(&format!("{case}.logits"));
        let positions = goldens.ids(&format!("{case}.positions"));
        let columns = logits.len() / positions.len();
        for (row, position) in logits.chunks(columns).zip(positions) {
            let position = position as usize;
            let Some(target) = prompt.get(position + 1) else { continue };
            let expected = row[*target as usize] - log_sums[position];
            let chosen = heard.prompt_logprobs[position].chosen.unwrap();
            assert_eq!(chosen.token_id, *target);
            assert!((chosen.logprob - expected).abs() < 2e-3, "{case} {position}: {} {expected}", chosen.logprob);
            let better = row.iter().filter(|logit| **logit > row[*target as usize]).count();
            assert_eq!(chosen.rank as usize, better + 1);
        }
    }
}

#[tokio::test]
async fn a_sampled_sequence_goes_on_elsewhere_as_if_nothing_had_happened() {
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
    let whole = hear(start(4_096).generate(request(prompt.clone())).unwrap()).await.ids;
    assert_eq!(whole.len(), 90);
    for cut in [1usize, 40, 89] {
        let mut token_ids = prompt.clone();
        token_ids.extend(&whole[..cut]);
        let resumed = v1::GenerateRequest { generated_len: cut as u32, ..request(token_ids) };
        let rest = hear(start(50).generate(resumed).unwrap()).await.ids;
        assert_eq!(rest, whole[cut..], "cut at {cut}");
    }
}
