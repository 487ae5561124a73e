//! Tests of the engine's interface, with its thread and a fake group.

use std::time::{Duration, Instant};

use bora_common::secret::ClusterKeys;
use bora_proto::v1::{self, generate_event::Event, group_event};
use futures::StreamExt as _;

use super::step::RunError;
use super::{EngineConfig, EngineError, EngineHandle, EngineHealth, EngineOptions, EventStream, ResumeError};
use crate::backend::fake::{FakeOptions, FakeRunner, echo};

fn fake() -> FakeOptions {
    FakeOptions { kv_blocks: 512, max_model_len: 4_096, time_scale: 0.0, ..Default::default() }
}

fn config(fake: &FakeOptions) -> EngineConfig {
    EngineConfig {
        options: EngineOptions { max_num_seqs: 16, max_waiting: 32, ..Default::default() },
        epoch: 77,
        kv_blocks: fake.kv_blocks,
        host: Default::default(),
        max_model_len: fake.max_model_len,
        vocabulary_size: fake.vocabulary_size,
        eos_ids: vec![fake.eos_id],
        images: false,
        speed: fake.speed(),
        least_chunk: 1,
        steps_run: 0,
        grammars: None,
        keys: ClusterKeys::derive(&[1; 32]),
    }
}

fn start(fake: FakeOptions) -> (EngineHandle, std::thread::JoinHandle<Result<(), RunError>>) {
    EngineHandle::start(config(&fake), Box::new(FakeRunner::new(fake))).unwrap()
}

fn request(prompt: &[u32], max_tokens: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        token_ids: prompt.to_vec(),
        stopping: Some(v1::Stopping { max_tokens, ..Default::default() }),
        ..Default::default()
    }
}

async fn all(mut stream: EventStream) -> (Vec<u32>, Result<v1::Finished, EngineError>) {
    let mut ids = Vec::new();
    while let Some(event) = stream.next().await {
        match event.map(|event| event.event.unwrap()) {
            Ok(Event::Tokens(tokens)) => ids.extend(tokens.token_ids),
            Ok(Event::Finished(finished)) => return (ids, Ok(finished)),
            Ok(Event::Compiled(_) | Event::Started(_) | Event::PromptLogprobs(_)) => {}
            Err(error) => return (ids, Err(error)),
        }
    }
    panic!("a stream without an end");
}

fn echoed(prompt: &[u32], count: usize, fake: &FakeOptions) -> Vec<u32> {
    (0..count).map(|index| echo(prompt, index, fake)).collect()
}

#[tokio::test]
async fn runs_echo_and_scripted_fakes() {
    let mut options = fake();
    options.echo_offset = 2;
    options.echo_ids_from = 1_000;
    options.script = vec![
        crate::backend::fake::ScriptRule { contains: vec![60, 61], ends_with: vec![4], emit: vec![900, 901] },
        crate::backend::fake::ScriptRule { contains: vec![], ends_with: vec![8, 9], emit: vec![7] },
    ];
    let (engine, _) = start(options.clone());
    let (ids, _) = all(engine.generate(request(&[10, 11, 5_000], 5)).unwrap()).await;
    assert_eq!(ids, [5_000, 1_010, 1_011, 5_000, 1_010]);
    assert_eq!(ids, echoed(&[10, 11, 5_000], 5, &options));
    let (ids, finished) = all(engine.generate(request(&[1, 60, 61, 4], 50)).unwrap()).await;
    assert_eq!(ids, [900, 901, 2]);
    assert_eq!(finished.unwrap().reason(), v1::FinishReason::Stop);
    let (ids, _) = all(engine.generate(request(&[8, 9], 50)).unwrap()).await;
    assert_eq!(ids, [7, 2]);
    // resumes in the middle of a script
    let resumed = v1::GenerateRequest { generated_len: 1, ..request(&[1, 60, 61, 4, 900], 50) };
    let (ids, finished) = all(engine.generate(resumed).unwrap()).await;
    assert_eq!(ids, [901, 2]);
    assert_eq!(finished.unwrap().completion_tokens, 3);
}

#[tokio::test]
async fn ends_a_resumed_sequence_that_is_complete() {
    let (engine, _) = start(fake());
    let prompt: Vec<u32> = (10..20).collect();
    for (generated, max_tokens, reason) in
        [(vec![10, 11, 2], 50, v1::FinishReason::Stop), (vec![10, 11, 12], 3, v1::FinishReason::Length)]
    {
        let mut resumed = request(&prompt, max_tokens);
        resumed.token_ids.extend(&generated);
        resumed.generated_len = 3;
        let (ids, finished) = all(engine.generate(resumed).unwrap()).await;
        let finished = finished.unwrap();
        assert_eq!((ids.len(), finished.reason(), finished.completion_tokens), (0, reason, 3));
    }
    assert_eq!(engine.load().steps, 0);
}

#[tokio::test]
async fn names_the_field_of_an_invalid_request() {
    let (engine, _) = start(fake());
    let good = || request(&[1, 2, 3], 5);
    let sampling = |change: fn(&mut v1::Sampling)| {
        let mut sampling = v1::Sampling::default();
        change(&mut sampling);
        v1::GenerateRequest { sampling: Some(sampling), ..good() }
    };
    let stopping = |change: fn(&mut v1::Stopping)| {
        let mut request = good();
        change(request.stopping.as_mut().unwrap());
        request
    };
    let cases: Vec<(&str, v1::GenerateRequest)> = vec![
        ("token_ids", request(&[], 5)),
        ("token_ids", request(&[131_072], 5)),
        ("token_ids", request(&vec![5; 4_096], 5)),
        ("token_ids", v1::GenerateRequest { generated_len: 3, ..good() }),
        ("token_ids", v1::GenerateRequest { generated_len: u32::MAX, ..good() }),
        ("request_id", v1::GenerateRequest { request_id: "x".repeat(257), ..good() }),
        ("cache_salt", v1::GenerateRequest { cache_salt: vec![0; 257], ..good() }),
        ("images", v1::GenerateRequest { images: vec![v1::Image::default()], ..good() }),
        ("sampling.temperature", sampling(|s| s.temperature = Some(-0.1))),
        ("sampling.temperature", sampling(|s| s.temperature = Some(f32::NAN))),
        ("sampling.top_p", sampling(|s| s.top_p = Some(0.0))),
        ("sampling.top_p", sampling(|s| s.top_p = Some(1.1))),
        ("sampling.min_p", sampling(|s| s.min_p = Some(-1.0))),
        ("sampling.presence_penalty", sampling(|s| s.presence_penalty = Some(2.1))),
        ("sampling.frequency_penalty", sampling(|s| s.frequency_penalty = Some(f32::INFINITY))),
        ("sampling.repetition_penalty", sampling(|s| s.repetition_penalty = Some(0.0))),
        ("sampling.logit_bias", sampling(|s| s.logit_bias = [(131_072, 1.0)].into())),
        ("sampling.logit_bias", sampling(|s| s.logit_bias = [(1, f32::NAN)].into())),
        ("sampling.logit_bias", sampling(|s| s.logit_bias = (0..1_025).map(|id| (id, 1.0)).collect())),
        ("stopping.max_tokens", stopping(|s| s.max_tokens = 0)),
        ("stopping.min_tokens", stopping(|s| s.min_tokens = 6)),
        ("stopping.stop_token_ids", stopping(|s| s.stop_token_ids = vec![131_072])),
        ("stopping.stop_token_ids", stopping(|s| s.stop_token_ids = vec![1; 257])),
        (
            "logprobs.top",
            v1::GenerateRequest { logprobs: Some(v1::Logprobs { top: Some(21), prompt_top: None }), ..good() },
        ),
    ];
    for (expected, request) in cases {
        match engine.generate(request).map(|_| ()) {
            Err(EngineError::Invalid { field, reason }) => {
                assert_eq!(field, expected, "{reason}");
            }
            other => panic!("{expected}: {other:?}"),
        }
    }
    // refused requests leave nothing in the queue
    assert_eq!(all(engine.generate(good()).unwrap()).await.0.len(), 2, "1, then the end of sequence");
}

#[tokio::test]
async fn checks_images_and_includes_them_in_the_hash() {
    let options = fake();
    let mut config = config(&options);
    config.images = true;
    let keys = config.keys.clone();
    let (engine, _) = EngineHandle::start(config, Box::new(FakeRunner::new(options))).unwrap();
    let prompt: Vec<u32> = (100..300).collect();
    let image = |byte: u8, offset, length| {
        let hash = keys.image_hash(&[byte]).to_le_bytes().to_vec();
        v1::Image { data: vec![byte].into(), hash, offset, length }
    };
    let with = |images| v1::GenerateRequest { images, ..request(&prompt, 1) };
    for wrong in [
        vec![v1::Image { hash: vec![1; 15], ..image(1, 0, 5) }],
        // the hash of another image, under which this image would be cached
        vec![v1::Image { hash: image(2, 0, 5).hash, ..image(1, 0, 5) }],
        vec![image(1, 0, 0)],
        vec![image(1, 190, 11)],
        vec![image(1, u32::MAX, u32::MAX)],
        vec![image(1, 50, 10), image(2, 55, 10)],
    ] {
        assert!(matches!(engine.generate(with(wrong)), Err(EngineError::Invalid { .. })));
    }
    let mut cached = Vec::new();
    for images in [vec![image(1, 70, 10)], vec![image(1, 70, 10)], vec![image(2, 70, 10)]] {
        cached.push(all(engine.generate(with(images)).unwrap()).await.1.unwrap().cached_tokens);
    }
    assert_eq!(cached, [0, 192, 64], "another image at the same place: only what is before it");
}

#[tokio::test]
async fn refuses_at_a_full_queue_of_each_class() {
    let mut options = fake();
    options.time_scale = 1.0;
    options.decode_step_seconds = 0.05;
    let (engine, _) = start(options);
    let mut streams = Vec::new();
    let refused = loop {
        match engine.generate(request(&[5, 6, 7], 4_000)) {
            Ok(stream) => streams.push(stream),
            Err(error) => break error,
        }
        assert!(streams.len() <= 16 + 32 + 1);
    };
    assert!(matches!(refused, EngineError::Exhausted { waiting: 32 }), "{refused:?}");
    let batch = v1::GenerateRequest { priority: v1::Priority::Batch.into(), ..request(&[5], 1) };
    assert!(engine.generate(batch).is_ok());
    drop(streams);
    // the permits are free within a step
    let deadline = Instant::now() + Duration::from_secs(5);
    while engine.generate(request(&[5], 1)).is_err() {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn reports_why_a_group_died_to_every_stream() {
    for die_at_step in [1, 5] {
        let mut options = fake();
        options.die_at_step = Some(die_at_step);
        options.time_scale = 1.0;
        let (engine, thread) = start(options.clone());
        let prompt: Vec<u32> = (10..30).collect();
        let streams: Vec<_> = (0..20).map(|_| engine.generate(request(&prompt, 100)).unwrap()).collect();
        let mut watched = engine.watch("test".into()).await.ok();
        for stream in streams {
            let (ids, end) = all(stream).await;
            assert_eq!(ids, echoed(&prompt, ids.len(), &options));
            let Err(EngineError::Unavailable { reason }) = end else { panic!("{end:?}") };
            assert!(reason.contains("rank 0") && reason.contains(&format!("step {die_at_step}")), "{reason}");
        }
        let reason = engine.failed().await;
        assert!(reason.contains("told to die"), "{reason}");
        assert_eq!(engine.health(), EngineHealth::Failed { reason });
        assert!(matches!(engine.generate(request(&prompt, 1)), Err(EngineError::Unavailable { .. })));
        assert!(engine.watch("again".into()).await.is_err());
        assert!(engine.drain(Duration::from_secs(1)).await.is_err());
        if let Some(watched) = watched.as_mut() {
            while watched.recv().await.is_some() {}
        }
        assert!(matches!(thread.join().unwrap(), Err(RunError::Device { rank: 0, .. })));
    }
}

#[tokio::test]
async fn sends_watchers_a_snapshot_and_then_every_change() {
    let (engine, thread) = start(fake());
    let prompt: Vec<u32> = (10..210).collect();
    all(engine.generate(request(&prompt, 10)).unwrap()).await.1.unwrap();
    let mut watched = engine.watch("test".into()).await.unwrap();
    let mut held = std::collections::HashSet::new();
    let mut sequence = 0;
    let mut states = Vec::new();
    let mut loads = 0;
    let mut others = false;
    let mut flushed = false;
    while !flushed {
        let event = tokio::time::timeout(Duration::from_secs(5), watched.recv()).await.unwrap().unwrap();
        sequence += 1;
        assert_eq!((event.epoch, event.sequence), (77, sequence));
        match event.event.unwrap() {
            group_event::Event::Snapshot(snapshot) => {
                assert!(snapshot.last && sequence == 1);
                held.extend(bora_common::blocks::BlockHash::parse_many(&snapshot.block_hashes));
                assert_eq!(held.len(), 3);
            }
            group_event::Event::Blocks(blocks) => {
                for hash in bora_common::blocks::BlockHash::parse_many(&blocks.evicted) {
                    assert!(held.remove(&hash));
                }
                for hash in bora_common::blocks::BlockHash::parse_many(&blocks.stored) {
                    assert!(held.insert(hash));
                }
            }
            group_event::Event::Load(load) => {
                assert_eq!(load.blocks_total, 512);
                loads += 1;
            }
            group_event::Event::State(state) => states.push(state),
        }
        if loads == 1 && !others {
            others = true;
            let other: Vec<u32> = (500..700).collect();
            all(engine.generate(request(&other, 1)).unwrap()).await.1.unwrap();
        }
        if others && held.len() == 6 {
            assert_eq!(engine.flush().await.unwrap(), 6);
        }
        flushed = others && held.is_empty();
    }
    assert_eq!(states, [i32::from(v1::State::Ready)]);
    drop(engine);
    assert_eq!(thread.join().unwrap(), Ok(()), "the loop ends with its last handle");
}

#[tokio::test]
async fn finishes_running_sequences_on_drain_and_refuses_others() {
    let mut options = fake();
    options.time_scale = 1.0;
    options.decode_step_seconds = 0.002;
    let (engine, _) = start(options);
    let prompt: Vec<u32> = (10..20).collect();
    let mut short = engine.generate(request(&prompt, 50)).unwrap();
    short.next().await.unwrap().unwrap();
    let drained = tokio::spawn({
        let engine = engine.clone();
        async move { engine.drain(Duration::from_secs(20)).await }
    });
    while engine.health() == EngineHealth::Ready {
        tokio::task::yield_now().await;
    }
    assert!(matches!(engine.generate(request(&prompt, 1)), Err(EngineError::Unavailable { .. })));
    assert_eq!(all(short).await.0.len(), 50);
    assert_eq!(drained.await.unwrap(), Ok((1, 0)));

    let mut options = fake();
    options.time_scale = 1.0;
    let (engine, _) = start(options);
    let mut long: Vec<_> = (0..20).map(|_| engine.generate(request(&prompt, 1_500)).unwrap()).collect();
    long[15].next().await.unwrap().unwrap();
    assert_eq!(engine.drain(Duration::from_millis(100)).await, Ok((0, 16)));
    for stream in long {
        assert!(matches!(all(stream).await.1, Err(EngineError::Unavailable { .. })));
    }
}

#[tokio::test]
async fn resumes_after_a_drain_but_not_after_a_close() {
    let mut options = fake();
    options.time_scale = 1.0;
    let (engine, _) = start(options);
    let mut watched = engine.watch("test".into()).await.unwrap();
    let prompt: Vec<u32> = (10..20).collect();
    assert_eq!(engine.drain(Duration::from_secs(5)).await, Ok((0, 0)));
    assert_eq!(engine.health(), EngineHealth::Draining);
    assert!(engine.generate(request(&prompt, 1)).is_err());
    engine.resume().await.unwrap();
    assert_eq!(engine.health(), EngineHealth::Ready);
    assert_eq!(all(engine.generate(request(&prompt, 3)).unwrap()).await.0.len(), 3);
    let mut states = Vec::new();
    while states.len() < 3 {
        if let Some(v1::group_event::Event::State(state)) = watched.recv().await.unwrap().event {
            states.push(v1::State::try_from(state).unwrap());
        }
    }
    assert_eq!(states, [v1::State::Ready, v1::State::Draining, v1::State::Ready]);

    // a drain that still waits ends with the resume, and running sequences continue
    let mut long = engine.generate(request(&prompt, 1_500)).unwrap();
    long.next().await.unwrap().unwrap();
    let draining = tokio::spawn({
        let engine = engine.clone();
        async move { engine.drain(Duration::from_secs(60)).await }
    });
    while engine.health() == EngineHealth::Ready {
        tokio::task::yield_now().await;
    }
    engine.resume().await.unwrap();
    assert_eq!(draining.await.unwrap(), Ok((1, 0)));
    drop(long);

    engine.close(Duration::from_secs(5)).await.unwrap();
    assert_eq!(engine.resume().await, Err(ResumeError::Ending));
    assert_eq!(engine.drain(Duration::from_secs(5)).await, Ok((0, 0)));
    assert_eq!(engine.resume().await, Err(ResumeError::Ending), "a drain does not undo the end");
}

#[tokio::test]
async fn delivers_everything_to_a_slow_reader_without_blocking() {
    let options = fake();
    let (engine, _) = start(options.clone());
    let prompt: Vec<u32> = (10..60).collect();
    let slow = engine.generate(request(&prompt, 4_000)).unwrap();
    for _ in 0..5 {
        let (ids, _) = all(engine.generate(request(&prompt, 2_000)).unwrap()).await;
        assert_eq!(ids.len(), 2_000);
    }
    // the blocks are free when generation ends, not when the caller reads
    let deadline = Instant::now() + Duration::from_secs(5);
    while engine.load().blocks_used > 0 {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(all(slow).await.0, echoed(&prompt, 4_000, &options));
}

#[tokio::test]
async fn detects_a_stalled_step() {
    let progress = super::progress::Progress::new();
    assert_eq!(progress.overdue(), None, "idle");
    progress.record(3, 1, 60.0);
    assert_eq!(progress.overdue(), Some((3, Duration::ZERO)), "a long step has its time");
    progress.record(4, 1, 0.0);
    #[allow(clippy::disallowed_methods)]
    std::thread::sleep(Duration::from_millis(20));
    let (step, late) = progress.overdue().unwrap();
    assert!(step == 4 && late >= Duration::from_millis(19), "{late:?}");
    progress.record(5, 0, 0.0);
    assert_eq!(progress.overdue(), None);
}

#[test]
fn rejects_invalid_configurations() {
    let good = config(&fake());
    assert_eq!(good.check(), Ok(()));
    let with = |change: fn(&mut EngineConfig)| {
        let mut config = config(&fake());
        change(&mut config);
        config.check().unwrap_err().to_string()
    };
    assert!(with(|c| c.options.max_num_seqs = 0).contains("max_num_seqs"));
    assert!(with(|c| c.options.max_num_batched_tokens = 15).contains("max_num_batched_tokens"));
    assert!(with(|c| c.options.max_waiting = 0).contains("max_waiting"));
    assert!(with(|c| c.max_model_len = 512 * 64 + 1).contains("does not fit"));
    assert!(with(|c| c.eos_ids = vec![131_072]).contains("vocabulary"));
}
