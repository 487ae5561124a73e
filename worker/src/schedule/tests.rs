//! Tests of the scheduler, one guarantee per test.

use bora_common::secret::ClusterKeys;
use bora_proto::v1::{self, FinishReason};

use super::harness::{Harness, Received, config, expected, request};
use crate::backend::fake::FakeMode;
use crate::cache::Found;
use crate::engine::step::Tokens;
use crate::engine::{EngineConfig, EngineError, EngineOptions, EventStream};
use crate::speculate::SpeculativeOptions;

fn ids(seed: u32, count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| 3 + (seed.wrapping_mul(7_919) + i * 31) % 900).collect()
}

fn receive(stream: &mut EventStream) -> Received {
    let mut received = Received::default();
    received.read(stream);
    received
}

#[test]
fn generates_a_sequence_alone() {
    for depth in [1, 2] {
        let mut harness = Harness::new(config(64), depth);
        let mut stream = harness.generate(request(ids(1, 150), 100));
        harness.settle();
        let received = receive(&mut stream);
        let (generated, reason) = expected(&ids(1, 150), 150, 0, 100, &harness.config);
        assert_eq!(received.ids, generated);
        let finished = received.finished();
        assert_eq!(finished.reason(), reason);
        assert_eq!((finished.prompt_tokens, finished.completion_tokens), (150, generated.len() as u32));
        harness.assert_empty();
    }
}

#[test]
fn reuses_prompt_and_generated_blocks() {
    let mut harness = Harness::new(config(64), 2);
    let prompt = ids(1, 300);
    let mut first = harness.generate(request(prompt.clone(), 60));
    harness.settle();
    let first = receive(&mut first);
    assert_eq!(harness.prefilled(), 300);
    assert_eq!(first.started.unwrap().cached_tokens, 0);

    let mut again = harness.generate(request(prompt[..256].to_vec(), 1));
    harness.settle();
    assert_eq!(receive(&mut again).started.unwrap().cached_tokens, 192, "the last token is always computed");

    // the next turn of the conversation: prompt, completion, and a new question
    let mut turn = prompt;
    turn.extend(&first.ids);
    let computed = turn.len() - 1;
    turn.extend(ids(2, 20));
    let before = harness.prefilled();
    let mut next = harness.generate(request(turn.clone(), 1));
    harness.settle();
    let cached = computed / 64 * 64;
    assert_eq!(receive(&mut next).started.unwrap().cached_tokens as usize, cached);
    assert_eq!(harness.prefilled() - before, turn.len() - cached);
}

#[test]
fn computes_a_common_prefix_of_siblings_once() {
    for depth in [1, 2] {
        let mut harness = Harness::new(config(256), depth);
        let common = ids(1, 1_280);
        let mut streams: Vec<EventStream> = (0..6)
            .map(|sibling| {
                let mut prompt = common.clone();
                prompt.extend(ids(100 + sibling, 10));
                harness.generate(request(prompt, 5))
            })
            .collect();
        harness.settle();
        assert_eq!(harness.prefilled(), 1_290 + 5 * 10);
        let cached: Vec<u32> = streams.iter_mut().map(|s| receive(s).finished().cached_tokens).collect();
        assert_eq!(cached, [0, 1_280, 1_280, 1_280, 1_280, 1_280]);
        harness.assert_empty();
    }
}

#[test]
fn continues_siblings_after_the_computing_one_aborts() {
    let mut harness = Harness::new(config(256), 2);
    let prompt = ids(1, 3_000);
    let first = harness.generate(request(prompt.clone(), 5));
    let mut second = harness.generate(request(prompt.clone(), 5));
    harness.advance();
    assert_eq!(harness.scheduler.load().waiting, 1);
    drop(first);
    harness.settle();
    let received = receive(&mut second);
    assert_eq!(received.ids, expected(&prompt, 3_000, 0, 5, &harness.config).0);
    assert!(received.finished().cached_tokens > 0, "the blocks of the first one are cached");
    harness.assert_empty();
}

#[test]
fn decodes_streams_between_chunks_of_a_long_prompt() {
    let mut harness = Harness::new(config(512), 1);
    let mut streaming = harness.generate(request(ids(1, 10), 1_000));
    harness.advance();
    let mut long = harness.generate(request(ids(2, 5_000), 1));
    let first = harness.steps.len();
    let mut received = Received::default();
    while received.end.is_none() {
        assert!(harness.advance());
        received.read(&mut long);
    }
    let chunks = &harness.steps[first..];
    assert!(chunks.len() > 5);
    let streams_go_on = chunks.iter().all(|step| step.work.first().is_some_and(|work| work.tokens == Tokens::Sampled));
    assert!(streams_go_on, "decode first, in every step");
    assert_eq!(receive(&mut streaming).ids.len(), harness.steps.len(), "a token a step");
}

#[test]
fn keeps_queue_order_and_runs_batch_last() {
    let mut harness = Harness::new(config(10), 1);
    let mut running = harness.generate(request(ids(1, 65), 128)); // 3 blocks
    harness.advance();
    let mut batch =
        harness.generate(v1::GenerateRequest { priority: v1::Priority::Batch.into(), ..request(ids(2, 10), 5) });
    let mut big = harness.generate(request(ids(3, 500), 50)); // 9 blocks
    let mut small = harness.generate(request(ids(4, 10), 5));
    harness.advance();
    assert_eq!(harness.scheduler.load().waiting, 3, "no sequence overtakes the big one");
    let mut received: [Received; 4] = Default::default();
    let mut order = Vec::new();
    while harness.advance() {
        for (index, stream) in [&mut running, &mut big, &mut small, &mut batch].into_iter().enumerate() {
            let waited = received[index].started.is_none();
            received[index].read(stream);
            if waited && received[index].started.is_some() {
                order.push(index);
            }
        }
    }
    assert_eq!(order, [0, 1, 2, 3]);
    assert!(received.iter().all(|received| matches!(received.end, Some(Ok(_)))));
    harness.assert_empty();
}

#[test]
fn generates_the_same_after_a_resume() {
    let prompt = ids(5, 200);
    for depth in [1, 2] {
        let mut harness = Harness::new(config(64), depth);
        let (whole, reason) = expected(&prompt, 200, 9, 80, &harness.config);
        for cut in [1, 30, whole.len() - 1, whole.len()] {
            let mut token_ids = prompt.clone();
            token_ids.extend(&whole[..cut]);
            let resumed = v1::GenerateRequest {
                generated_len: cut as u32,
                sampling: Some(v1::Sampling { seed: 9, ..Default::default() }),
                ..request(token_ids, 80)
            };
            if cut == whole.len() {
                let checked = crate::engine::request::Request::check(resumed.clone(), &harness.config).unwrap();
                assert_eq!(checked.prompt_len, 200);
                continue; // ended without the scheduler: see the engine's tests
            }
            let mut stream = harness.generate(resumed);
            harness.settle();
            let received = receive(&mut stream);
            assert_eq!(received.ids, whole[cut..], "cut at {cut}");
            let finished = received.finished();
            assert_eq!(finished.reason(), reason);
            assert_eq!(finished.completion_tokens as usize, whole.len());
            assert_eq!(finished.prompt_tokens, 200);
        }
        harness.assert_empty();
    }
}

#[test]
fn applies_stop_ids_min_tokens_and_the_window() {
    let mut harness = Harness::new(config(4), 2);
    let prompt = ids(5, 100);
    let (whole, _) = expected(&prompt, 100, 0, 1_000, &harness.config);
    let stopping = |stop_token_ids, min_tokens, max_tokens| v1::GenerateRequest {
        stopping: Some(v1::Stopping { stop_token_ids, min_tokens, max_tokens, ignore_eos: false }),
        ..request(prompt.clone(), 0)
    };
    let mut run = |request| {
        let mut stream = harness.generate(request);
        harness.settle();
        receive(&mut stream)
    };
    let stopped = run(stopping(vec![whole[4], whole[9]], 0, 50));
    assert_eq!(stopped.ids, whole[..5], "the stop id is the last one sent");
    assert_eq!(stopped.finished().reason(), FinishReason::Stop);
    let later = run(stopping(vec![whole[4], whole[9]], 6, 50));
    assert_eq!(later.ids, whole[..10]);
    let window = run(stopping(vec![], 0, 100_000));
    assert_eq!(window.ids.len(), 156.min(whole.len()));
    let window = window.finished();
    assert_eq!(window.reason(), if whole.len() < 156 { FinishReason::Stop } else { FinishReason::Length });
    harness.assert_empty();
}

#[test]
fn returns_prompt_logprobs_without_output() {
    for max_tokens in [0, 3] {
        let mut harness = Harness::new(config(64), 2);
        let prompt = ids(5, 700);
        let mut warm = harness.generate(request(prompt.clone(), 1));
        harness.settle();
        drop(receive(&mut warm));
        let logprobs = v1::Logprobs { prompt_top: Some(2), top: Some(1) };
        let mut stream =
            harness.generate(v1::GenerateRequest { logprobs: Some(logprobs), ..request(prompt.clone(), max_tokens) });
        harness.settle();
        let received = receive(&mut stream);
        let mut next = 1;
        let mut targets = Vec::new();
        for part in &received.prompt_logprobs {
            assert_eq!(part.start, next, "without a hole");
            next += part.positions.len() as u32;
            assert!(part.positions.iter().all(|at| at.top.len() == 2));
            targets.extend(part.positions.iter().map(|at| at.chosen.unwrap().token_id));
        }
        assert_eq!(targets, prompt[1..]);
        assert_eq!(received.started.unwrap().cached_tokens, 0, "computed whole");
        assert_eq!(received.ids.len(), max_tokens as usize);
        assert_eq!(received.logprobs.len(), max_tokens as usize);
        assert_eq!(received.finished().reason(), FinishReason::Length);
        harness.assert_empty();
    }
}

#[test]
fn fails_a_faulty_sequence_alone_and_caches_nothing_of_it() {
    let mut harness = Harness::new(config(64), 2);
    let mut faulty_prompt = ids(5, 200);
    faulty_prompt[100] = 999;
    let mut faulty = harness.generate(request(faulty_prompt.clone(), 10));
    let mut healthy = harness.generate(request(ids(6, 200), 10));
    harness.settle();
    assert!(matches!(receive(&mut faulty).end, Some(Err(EngineError::Internal { .. }))));
    assert_eq!(receive(&mut healthy).ids, expected(&ids(6, 200), 200, 0, 10, &harness.config).0);
    assert_eq!(harness.scheduler.cache.find(&harness.blocks_of(&faulty_prompt)), Found::default());
    harness.assert_empty();
}

#[test]
fn shares_no_blocks_between_salts() {
    let mut harness = Harness::new(config(64), 2);
    for salt in ["", "a", "b", "a"] {
        let salted = v1::GenerateRequest { cache_salt: salt.into(), ..request(ids(1, 200), 2) };
        let mut stream = harness.generate(salted);
        harness.settle();
        let before = receive(&mut stream).started.unwrap().cached_tokens;
        assert_eq!(before, if salt == "a" && harness.prefilled() > 600 { 192 } else { 0 });
    }
}

/// A cached block with the name of a prompt's block and another content is not used: the prompt is computed and counted
/// as if the forged block were not there.
#[test]
fn recomputes_a_forged_cached_block() {
    for forge_first in [true, false] {
        let mut harness = Harness::new(config(64), 2);
        let prompt = ids(1, 200);
        let blocks = harness.blocks_of(&prompt);
        let mut first = harness.generate(request(prompt.clone(), 2));
        harness.settle();
        let response = receive(&mut first).ids;
        assert_eq!(harness.scheduler.drain_mismatches(), 0);
        let target = if forge_first { 0 } else { 1 };
        harness.scheduler.cache.forge(blocks[target].forged(&[7; 64]));

        let mut again = harness.generate(request(prompt.clone(), 2));
        harness.settle();
        let received = receive(&mut again);
        assert_eq!(received.started.unwrap().cached_tokens, 64 * target as u32, "only what is before it");
        assert_eq!(received.finished().cached_tokens, 64 * target as u32);
        assert_eq!(received.ids, response);
        assert_eq!(harness.scheduler.drain_mismatches(), 1);
        assert_eq!(harness.scheduler.drain_mismatches(), 0, "reported once");
        harness.assert_empty();
    }
}

/// With another cluster secret no block of before is found.
#[test]
fn names_blocks_differently_under_other_keys() {
    let mut harness = Harness::new(config(64), 2);
    let before = harness.blocks_of(&ids(1, 200));
    harness.config.keys = ClusterKeys::derive(&[2; 32]);
    let after = harness.blocks_of(&ids(1, 200));
    assert!(before.iter().zip(&after).all(|(one, other)| one.hash() != other.hash()));
}

#[test]
fn frees_everything_of_an_aborted_sequence_within_a_step() {
    let mut harness = Harness::new(config(64), 2);
    let streams: Vec<EventStream> = (0..12).map(|i| harness.generate(request(ids(i, 300), 100))).collect();
    harness.advance();
    harness.advance();
    assert!(harness.scheduler.cache.usage().used > 0);
    drop(streams);
    assert!(harness.scheduler.plan(std::time::Instant::now()).is_none(), "nothing is left to compute");
    harness.assert_empty();
    harness.settle();
    let mut after = harness.generate(request(ids(1, 300), 3));
    harness.settle();
    assert_eq!(receive(&mut after).ids.len(), 3, "slots and blocks are used again");
}

#[test]
fn raises_batch_prefill_that_an_interactive_sequence_needs() {
    let mut harness = Harness::new(config(512), 1);
    let shared = ids(1, 4_000);
    let batch = v1::GenerateRequest { priority: v1::Priority::Batch.into(), ..request(shared.clone(), 1) };
    let mut batch = harness.generate(batch);
    harness.advance();
    let mut urgent = harness.generate(request(shared, 1));
    // these sequences would always precede a batch sequence
    let mut others: Vec<EventStream> = (0..4).map(|i| harness.generate(request(ids(50 + i, 4_000), 1))).collect();
    let mut received = Received::default();
    while received.end.is_none() {
        assert!(harness.advance());
        received.read(&mut urgent);
    }
    assert!(others.iter_mut().any(|other| receive(other).end.is_none()), "it did not come last");
    harness.settle();
    assert_eq!(receive(&mut batch).ids.len(), 1);
    harness.assert_empty();
}

fn speculating(kv_blocks: u32) -> EngineConfig {
    let plain = config(kv_blocks);
    let speculative = Some(SpeculativeOptions::default());
    EngineConfig { options: EngineOptions { speculative, ..plain.options }, ..plain }
}

#[test]
fn drafts_repeated_text_in_few_steps() {
    for depth in [1, 2] {
        let mut harness = Harness::with_mode(FakeMode::Echo, speculating(64), depth);
        let mut streams: Vec<_> = (0..3).map(|i| harness.generate(request(ids(i, 150), 150))).collect();
        harness.settle();
        for (i, stream) in streams.iter_mut().enumerate() {
            let received = receive(stream);
            assert_eq!(received.ids, ids(i as u32, 150));
            assert_eq!(received.finished().reason(), FinishReason::Length);
        }
        let load = harness.scheduler.load();
        assert!(load.accepted_draft_tokens > 3 * 120, "{load:?}");
        assert!(harness.steps.len() < 40, "{} steps", harness.steps.len());
        harness.assert_empty();
    }
}

#[test]
fn drops_tokens_after_the_end_with_their_blocks() {
    for depth in [1, 2] {
        // the echo reaches an end token among the draft tokens
        let mut harness = Harness::with_mode(FakeMode::Echo, speculating(64), depth);
        let mut prompt = ids(1, 200);
        prompt[100] = 2;
        let mut stream = harness.generate(request(prompt.clone(), 190));
        harness.settle();
        let received = receive(&mut stream);
        assert_eq!(received.ids, prompt[..101]);
        assert_eq!(received.finished().reason(), FinishReason::Stop);
        assert!(harness.scheduler.load().accepted_draft_tokens > 50);
        harness.assert_empty();
        // what was computed after the end is not found
        let mut again = harness.generate(request([&prompt[..], &prompt[..150]].concat(), 1));
        harness.settle();
        assert_eq!(receive(&mut again).started.unwrap().cached_tokens, 256, "200 of the prompt and 101 of the output");
    }
}

#[test]
fn leaves_room_for_prompts_beside_drafts() {
    let plain = speculating(256);
    let options = EngineOptions { max_num_seqs: 4, max_num_batched_tokens: 70, ..plain.options };
    let mut harness = Harness::with_mode(FakeMode::Echo, EngineConfig { options, ..plain }, 2);
    let mut streams: Vec<_> = (0..3).map(|i| harness.generate(request(ids(i, 150), 400))).collect();
    let wanted = v1::Logprobs { prompt_top: Some(1), top: Some(1) };
    let mut scored = harness.generate(v1::GenerateRequest { logprobs: Some(wanted), ..request(ids(9, 700), 5) });
    harness.settle();
    assert_eq!(receive(&mut scored).ids.len(), 5);
    for stream in &mut streams {
        assert_eq!(receive(stream).ids.len(), 400);
    }
    assert!(harness.scheduler.load().accepted_draft_tokens > 0);
}
