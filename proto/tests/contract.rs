//! The messages of release 0.1 between router and worker, as bytes on the disk: whatever is changed, today's code must
//! read them as they were meant, and a peer that is one release ahead may say more than is understood here.
//!
//! `BORA_WRITE_CONTRACT=1` writes the bytes of a message that has none yet, once for each release; those of a release
//! that is out are never written again.

#![allow(missing_docs)] // of a test

use std::path::PathBuf;

use bora_proto::v1::{
    BlocksChanged, FinishReason, Finished, GenerateEvent, GenerateRequest, Grammar, GroupEvent, Image, Load, Logprobs,
    PositionLogprobs, Priority, PromptLogprobs, Sampling, Snapshot, Started, State, Stopping, Timing, TokenLogprob,
    Tokens, WatchRequest, generate_event, grammar, group_event,
};
use prost::Message;

fn folder() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/contract-0.1"))
}

fn request() -> GenerateRequest {
    GenerateRequest {
        request_id: "request-1".into(),
        token_ids: vec![1, 5, 131_071, 7],
        generated_len: 1,
        images: vec![Image { data: b"png".as_slice().into(), hash: vec![7; 16], offset: 1, length: 2 }],
        sampling: Some(Sampling {
            temperature: Some(0.5),
            top_p: Some(0.9),
            top_k: Some(40),
            min_p: Some(0.1),
            presence_penalty: Some(0.25),
            frequency_penalty: Some(-0.25),
            repetition_penalty: Some(1.5),
            logit_bias: [(3, -1.0)].into(),
            seed: u64::MAX,
        }),
        stopping: Some(Stopping { max_tokens: 100, min_tokens: 2, stop_token_ids: vec![2, 9], ignore_eos: true }),
        logprobs: Some(Logprobs { top: Some(0), prompt_top: Some(5) }),
        cache_salt: b"tenant".to_vec(),
        priority: Priority::Batch as i32,
        grammar: Some(Grammar { kind: grammar::Kind::Regex as i32, source: "a|b".into() }),
    }
}

fn position() -> PositionLogprobs {
    let token = |token_id, rank| TokenLogprob { token_id, logprob: -0.5, rank };
    PositionLogprobs { chosen: Some(token(9, 2)), top: vec![token(8, 1)] }
}

fn events() -> [(&'static str, GenerateEvent); 4] {
    let event = |event| GenerateEvent { event: Some(event) };
    [
        (
            "started",
            event(generate_event::Event::Started(Started { prompt_tokens: 3, cached_tokens: 2, queued_seconds: 0.25 })),
        ),
        (
            "prompt_logprobs",
            event(generate_event::Event::PromptLogprobs(PromptLogprobs { start: 1, positions: vec![position()] })),
        ),
        ("tokens", event(generate_event::Event::Tokens(Tokens { token_ids: vec![9, 10], logprobs: vec![position()] }))),
        (
            "finished",
            event(generate_event::Event::Finished(Finished {
                reason: FinishReason::Length as i32,
                prompt_tokens: 3,
                cached_tokens: 2,
                completion_tokens: 2,
                timing: Some(Timing { queued_seconds: 0.25, prefill_seconds: 0.5, decode_seconds: 1.5, steps: 3 }),
            })),
        ),
    ]
}

fn group_events() -> [(&'static str, GroupEvent); 4] {
    let event = |sequence, event| GroupEvent { epoch: 17, sequence, event: Some(event) };
    [
        ("snapshot", event(1, group_event::Event::Snapshot(Snapshot { block_hashes: vec![1; 32].into(), last: true }))),
        (
            "blocks",
            event(
                2,
                group_event::Event::Blocks(BlocksChanged { stored: vec![2; 16].into(), evicted: vec![3; 16].into() }),
            ),
        ),
        (
            "load",
            event(
                3,
                group_event::Event::Load(Load {
                    running: 1,
                    waiting: 2,
                    queued_prefill_tokens: 3,
                    blocks_total: 4,
                    blocks_used: 5,
                    blocks_cached: 6,
                    steps: 7,
                    prefill_seconds: 0.0, // 0.1 does not report it
                    draft_tokens: 8,
                    accepted_draft_tokens: 9,
                    // came later: what is not said is 0
                    host_blocks_total: 0,
                    host_blocks_cached: 0,
                }),
            ),
        ),
        ("state", event(4, group_event::Event::State(State::Draining as i32))),
    ]
}

/// Field 1000, as a string: something that only a later release knows.
const UNKNOWN: &[u8] = &[0xc2, 0x3e, 0x03, b'n', b'e', b'w'];

fn check<M: Message + Default + PartialEq + std::fmt::Debug>(name: &str, meant: &M) {
    let path = folder().join(format!("{name}.bin"));
    if std::env::var_os("BORA_WRITE_CONTRACT").is_some() && !path.exists() {
        std::fs::write(&path, meant.encode_to_vec()).unwrap();
    }
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(&M::decode(&bytes[..]).unwrap(), meant, "{name}: what 0.1 says is read otherwise");
    // a release behind reads what today's says: every byte of it is one that 0.1 wrote
    assert_eq!(meant.encode_to_vec(), bytes, "{name}: what is said to 0.1 is written otherwise");
    let newer = [&bytes[..], UNKNOWN].concat();
    assert_eq!(&M::decode(&newer[..]).unwrap(), meant, "{name}: what is not known is passed over");
}

#[test]
fn requests_of_release_0_1() {
    check("generate_request", &request());
    check("watch_request", &WatchRequest { watcher: "router-1".into() });
}

#[test]
fn events_of_release_0_1() {
    for (name, event) in events() {
        check(&format!("event_{name}"), &event);
    }
    for (name, event) in group_events() {
        check(&format!("group_event_{name}"), &event);
    }
}

#[test]
fn an_event_of_a_kind_that_only_a_later_release_knows_is_no_event() {
    let generate = GenerateEvent::decode(UNKNOWN).unwrap();
    assert_eq!(generate, GenerateEvent { event: None });
    let group = [&GroupEvent { epoch: 3, sequence: 9, event: None }.encode_to_vec()[..], UNKNOWN].concat();
    assert_eq!(GroupEvent::decode(&group[..]).unwrap(), GroupEvent { epoch: 3, sequence: 9, event: None });
}

#[test]
fn an_empty_request_is_neutral() {
    let request = GenerateRequest::decode(&[][..]).unwrap();
    assert!(request.sampling.is_none() && request.grammar.is_none());
    assert_eq!(request.priority(), Priority::Unspecified);
}
