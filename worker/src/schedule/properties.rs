//! Property test: for any arrivals in any order, every sequence generates what it would generate alone, none starves
//! and nothing leaks, with a pipeline of one and of two, in pools that are far too small.

use std::collections::HashSet;

use bora_common::blocks::BlockHash;
use bora_common::registry::Speed;
use bora_proto::v1;
use proptest::prelude::*;

use super::harness::{Harness, Received, config, expected, request};
use crate::engine::step::HostMemory;
use crate::engine::{EngineConfig, EngineOptions, EventStream};
use crate::speculate::SpeculativeOptions;

#[derive(Clone, Debug)]
struct Arrival {
    /// Iterations before the sequence arrives.
    after: usize,
    /// Prompts of a family share a prefix.
    family: u32,
    common: usize,
    own: usize,
    max_tokens: u32,
    seed: u64,
    batch: bool,
    scored: bool,
    /// Iterations after which the caller disconnects.
    leaves_after: Option<usize>,
    /// The caller does not read before the end.
    slow_reader: bool,
}

fn arrival() -> impl Strategy<Value = Arrival> {
    (
        (0usize..4, 0u32..3, 0usize..260, 1usize..40, 1u32..60, 0u64..2),
        (any::<bool>(), prop::bool::weighted(0.15), prop::option::weighted(0.2, 0usize..30), any::<bool>()),
    )
        .prop_map(
            |((after, family, common, own, max_tokens, seed), (batch, scored, leaves_after, slow_reader))| Arrival {
                after,
                family,
                common,
                own,
                max_tokens,
                seed,
                batch,
                scored,
                leaves_after,
                slow_reader,
            },
        )
}

fn prompt(arrival: &Arrival, index: usize, vocabulary_size: u32) -> Vec<u32> {
    let common = (0..arrival.common as u32).map(|i| 3 + (arrival.family * 101 + i * 17) % 900);
    // some prompts of a family are equal
    let own = (0..arrival.own as u32).map(|i| 3 + (index as u32 / 2 * 211 + i * 13) % 900);
    common.chain(own).map(|id| id % vocabulary_size).collect()
}

struct Caller {
    arrival: Arrival,
    prompt: Vec<u32>,
    arrived_in: usize,
    stream: Option<EventStream>,
    received: Received,
}

fn run(config: &EngineConfig, depth: usize, arrivals: &[Arrival]) -> Result<(), TestCaseError> {
    let mut harness = Harness::new(config.clone(), depth);
    let mut callers: Vec<Caller> = Vec::new();
    let mut watched: HashSet<BlockHash> = HashSet::new();
    let mut coming = arrivals.iter().enumerate().peekable();
    let mut wait = coming.peek().map_or(0, |(_, arrival)| arrival.after);
    for iteration in 0.. {
        prop_assert!(iteration < 20_000, "a sequence starves");
        while wait == 0 && coming.peek().is_some() {
            let Some((index, arrival)) = coming.next() else { break };
            let prompt = prompt(arrival, index, config.vocabulary_size);
            let mut asked = request(prompt.clone(), arrival.max_tokens);
            asked.sampling = Some(v1::Sampling { seed: arrival.seed, ..Default::default() });
            asked.set_priority(if arrival.batch { v1::Priority::Batch } else { v1::Priority::Interactive });
            asked.logprobs = arrival.scored.then_some(v1::Logprobs { prompt_top: Some(0), top: None });
            let stream = harness.generate(asked);
            callers.push(Caller {
                arrival: arrival.clone(),
                prompt,
                arrived_in: iteration,
                stream: Some(stream),
                received: Received::default(),
            });
            wait = coming.peek().map_or(0, |(_, next)| next.after);
        }
        wait = wait.saturating_sub(1);
        let busy = harness.advance();
        for caller in &mut callers {
            if caller.arrival.leaves_after.is_some_and(|count| iteration >= caller.arrived_in + count) {
                caller.stream = None;
            }
            if let Some(stream) = caller.stream.as_mut().filter(|_| !caller.arrival.slow_reader) {
                caller.received.read(stream);
            }
        }
        let delta = harness.scheduler.drain_changes();
        for hash in delta.evicted {
            prop_assert!(watched.remove(&hash), "evicted before it was stored");
        }
        for hash in delta.stored {
            prop_assert!(watched.insert(hash), "stored twice");
        }
        if !busy && coming.peek().is_none() {
            break;
        }
    }
    let held: HashSet<BlockHash> = harness.scheduler.snapshot().into_iter().collect();
    prop_assert_eq!(watched, held);
    for caller in &mut callers {
        let Some(stream) = caller.stream.as_mut() else { continue };
        caller.received.read(stream);
        let arrival = &caller.arrival;
        let (ids, reason) =
            expected(&caller.prompt, caller.prompt.len(), arrival.seed, arrival.max_tokens as usize, config);
        prop_assert_eq!(&caller.received.ids, &ids, "{:?}", arrival);
        let finished = caller.received.finished();
        prop_assert_eq!(finished.reason(), reason);
        prop_assert_eq!(finished.completion_tokens as usize, ids.len());
        let scored: usize = caller.received.prompt_logprobs.iter().map(|part| part.positions.len()).sum();
        prop_assert_eq!(scored, if arrival.scored { caller.prompt.len() - 1 } else { 0 });
    }
    drop(callers);
    harness.settle();
    harness.assert_empty();
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..Default::default() })]

    #[test]
    fn generates_the_same_as_alone(
        arrivals in proptest::collection::vec(arrival(), 1..24),
        kv_blocks in 6u32..24,
        max_num_seqs in 1u32..6,
        max_num_batched_tokens in 6u32..300,
        // with a small vocabulary draft tokens are proposed and sometimes accepted
        vocabulary_size in prop_oneof![Just(1_000u32), Just(950), Just(3)],
        draft_tokens in prop::option::of(1u32..7),
        host_blocks in prop_oneof![Just(0u32), 1u32..40],
        prefix_cache in prop::bool::weighted(0.9),
        tokens_per_second in prop_oneof![Just(1e9), Just(1_000.0), Just(100.0)],
    ) {
        let plain = config(kv_blocks);
        let config = EngineConfig {
            options: EngineOptions {
                max_num_seqs,
                max_num_batched_tokens,
                prefix_cache,
                speculative: draft_tokens.map(|num_speculative_tokens| SpeculativeOptions {
                    num_speculative_tokens,
                    prompt_lookup_min: 1,
                    ..Default::default()
                }),
                ..plain.options
            },
            vocabulary_size,
            host: HostMemory { blocks: host_blocks, seconds_per_block: 0.005 },
            max_model_len: plain.max_model_len.min(350),
            // about every fortieth token ends a sequence
            eos_ids: (0..vocabulary_size).step_by(40).skip(1).map(|id| id + 1).collect(),
            speed: Speed { prefill_tokens_per_second: tokens_per_second, ..plain.speed },
            ..plain
        };
        for depth in [1, 2] {
            run(&config, depth, &arrivals)?;
        }
    }
}
