//! The gRPC services of a fake group over loopback connections.

use std::time::{Duration, Instant};

use bora_common::peer::{Expected, ServerIdentity};
use bora_common::registry::{Device, GroupRecord, GroupState, RankRecord};
use bora_common::secret::ClusterKeys;
use bora_proto::v1::{self, admin_client::AdminClient, generate_event::Event, inference_client::InferenceClient};
use bora_worker::backend::fake::{FakeOptions, FakeRunner, echo};
use bora_worker::engine::{EngineConfig, EngineHandle, EngineHealth, EngineOptions};
use bora_worker::service::{Host, serve};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_stream::StreamExt as _;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Request, Streaming};

struct Server {
    address: String,
    engine: EngineHandle,
    stop: oneshot::Sender<()>,
    served: tokio::task::JoinHandle<()>,
}

fn keys() -> ClusterKeys {
    ClusterKeys::derive(&[1; 32])
}

fn record(fake: &FakeOptions, endpoint: String) -> GroupRecord {
    GroupRecord {
        group: "fake-0".into(),
        epoch: 5,
        endpoint,
        model: "echo".into(),
        aliases: Vec::new(),
        device: Device::Fake,
        cache_key_id: keys().cache_key_id().into(),
        weight_fingerprint: "none".into(),
        ranks: vec![RankRecord { rank: 0, host: "here".into(), pid: 1 }],
        block_tokens: 64,
        kv_blocks: fake.kv_blocks,
        host_blocks: fake.host_blocks,
        max_model_len: fake.max_model_len,
        vocabulary_size: fake.vocabulary_size,
        max_sequences: 256,
        images: false,
        speed: fake.speed(),
        state: GroupState::Ready,
        version: "0".into(),
        contract: bora_common::version::CONTRACT,
    }
}

async fn start(fake: FakeOptions) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let record = record(&fake, address.clone());
    let config = EngineConfig::of_group(&record, vec![fake.eos_id], EngineOptions::default(), keys());
    let (engine, _) = EngineHandle::start(config, Box::new(FakeRunner::new(fake))).unwrap();
    let host = Host::of(CLUSTER, engine.clone(), record);
    let (stop, stopped) = oneshot::channel::<()>();
    let served = tokio::spawn(async move {
        let stopped = async {
            let _ = stopped.await;
        };
        serve(listener, host, Default::default(), stopped).await.unwrap();
    });
    Server { address, engine, stop, served }
}

/// A client that expects the group of these tests.
type Caller = InterceptedService<Channel, Expected>;

const CLUSTER: &str = "test";

fn expected() -> Expected {
    Expected::of_record(CLUSTER, &record(&fake(), String::new()))
}

async fn connect(server: &Server) -> InferenceClient<Caller> {
    let endpoint = Channel::from_shared(format!("http://{}", server.address)).unwrap();
    let channel =
        endpoint.initial_stream_window_size(1 << 20).initial_connection_window_size(64 << 20).connect().await.unwrap();
    InferenceClient::with_interceptor(channel, expected())
}

fn fake() -> FakeOptions {
    FakeOptions { kv_blocks: 8_192, time_scale: 0.0, ..Default::default() }
}

fn request(prompt: &[u32], max_tokens: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        token_ids: prompt.to_vec(),
        stopping: Some(v1::Stopping { max_tokens, ignore_eos: true, ..Default::default() }),
        ..Default::default()
    }
}

async fn ids(mut stream: Streaming<v1::GenerateEvent>) -> Result<(Vec<u32>, v1::Finished), tonic::Status> {
    let mut ids = Vec::new();
    while let Some(event) = stream.next().await {
        match event?.event.unwrap() {
            Event::Tokens(tokens) => ids.extend(tokens.token_ids),
            Event::Finished(finished) => return Ok((ids, finished)),
            Event::Compiled(_) | Event::Started(_) | Event::PromptLogprobs(_) => {}
        }
    }
    panic!("a stream without an end")
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn serves_two_hundred_concurrent_streams() {
    let options = fake();
    let server = start(options.clone()).await;
    let client = connect(&server).await;
    let began = Instant::now();
    let streams: Vec<_> = (0..200u32)
        .map(|index| {
            let mut client = client.clone();
            let options = options.clone();
            tokio::spawn(async move {
                let prompt: Vec<u32> = (0..50 + index * 7).map(|i| (index * 1_000 + i * 13) % 131_072).collect();
                let stream = client.generate(request(&prompt, 300)).await.unwrap().into_inner();
                let (ids, finished) = ids(stream).await.unwrap();
                let expected: Vec<u32> = (0..300).map(|i| echo(&prompt, i, &options)).collect();
                assert_eq!(ids, expected);
                assert_eq!(finished.reason(), v1::FinishReason::Length);
                assert_eq!(finished.prompt_tokens as usize, prompt.len());
            })
        })
        .collect();
    for stream in streams {
        stream.await.unwrap();
    }
    println!("200 streams of 300 tokens: {:.0} tokens/s", 60_000.0 / began.elapsed().as_secs_f64());
    until("all blocks are free", || server.engine.load().blocks_used == 0).await;
}

#[tokio::test]
async fn frees_the_blocks_of_a_disconnected_caller() {
    let server = start(FakeOptions { time_scale: 1.0, ..fake() }).await;
    let mut client = connect(&server).await;
    let prompt: Vec<u32> = (10..5_000).collect();
    let mut stream = client.generate(request(&prompt, 100_000)).await.unwrap().into_inner();
    stream.next().await.unwrap().unwrap();
    until("running", || server.engine.load().running == 1).await;
    drop(stream);
    until("aborted", || server.engine.load().running == 0).await;
    assert_eq!(server.engine.load().blocks_used, 0, "its blocks are free");
}

#[tokio::test]
async fn ends_stream_and_sequence_at_the_deadline() {
    let server = start(FakeOptions { time_scale: 1.0, ..fake() }).await;
    let mut client = connect(&server).await;
    let mut timed = Request::new(request(&[5, 6, 7], 100_000));
    timed.metadata_mut().insert("grpc-timeout", "200m".parse().unwrap());
    let began = Instant::now();
    let error = ids(client.generate(timed).await.unwrap().into_inner()).await.unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded);
    assert!(began.elapsed() < Duration::from_secs(2));
    until("aborted", || server.engine.load().running == 0).await;
}

#[tokio::test]
async fn accepts_the_maximum_prompt_and_maps_errors_to_codes() {
    let server = start(fake()).await;
    let mut client = connect(&server).await;
    let prompt: Vec<u32> = (0..262_143).map(|i| 131_071 - i % 100_000).collect();
    let (echoed, finished) = ids(client.generate(request(&prompt, 1)).await.unwrap().into_inner()).await.unwrap();
    assert_eq!((echoed, finished.prompt_tokens), (vec![131_071], 262_143));
    let again = ids(client.generate(request(&prompt, 1)).await.unwrap().into_inner()).await.unwrap();
    assert_eq!(again.1.cached_tokens, 4_095 * 64);

    let error = client.generate(request(&[], 1)).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("token_ids"), "{error}");

    let mut bad = Request::new(request(&[1], 1));
    bad.metadata_mut().insert("grpc-timeout", "soon".parse().unwrap());
    let error = client.generate(bad).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn reports_the_group_by_describe_watch_admin_and_health() {
    let server = start(fake()).await;
    let mut client = connect(&server).await;
    let description = client.describe(v1::DescribeRequest {}).await.unwrap().into_inner();
    let described: GroupRecord = serde_json::from_str(&description.record_json).unwrap();
    assert_eq!(described, record(&fake(), server.address.clone()));

    let mut watched = client.watch(v1::WatchRequest { watcher: "test".into() }).await.unwrap().into_inner();
    let prompt: Vec<u32> = (10..210).collect();
    ids(client.generate(request(&prompt, 1)).await.unwrap().into_inner()).await.unwrap();
    let mut stored = 0;
    while stored < 3 {
        let event = watched.next().await.unwrap().unwrap();
        assert_eq!(event.epoch, 5);
        if let Some(v1::group_event::Event::Blocks(blocks)) = event.event {
            stored += blocks.stored.len() / 16;
        }
    }

    let channel = Channel::from_shared(format!("http://{}", server.address)).unwrap().connect().await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    let asked = tonic_health::pb::HealthCheckRequest { service: "bora.v1.Inference".into() };
    let mut statuses = health.watch(asked).await.unwrap().into_inner();
    let serving = i32::from(tonic_health::pb::health_check_response::ServingStatus::Serving);
    while statuses.next().await.unwrap().unwrap().status != serving {}

    let mut admin = AdminClient::with_interceptor(channel, expected());
    assert_eq!(admin.flush_cache(v1::FlushCacheRequest {}).await.unwrap().into_inner().blocks, 3);
    let status = admin.status(v1::StatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.device.as_str(), status.state.as_str()), ("fake", "ready"));
    for wrong in [-1.0, 1.8e19, 86_401.0, f64::NAN, f64::INFINITY, f64::MAX] {
        let error = admin.drain(v1::DrainRequest { timeout_seconds: wrong }).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{wrong}");
    }
    admin.drain(v1::DrainRequest { timeout_seconds: 1.0 }).await.unwrap();
    assert_eq!(client.generate(request(&[5], 1)).await.unwrap_err().code(), Code::Unavailable);
    while statuses.next().await.unwrap().unwrap().status == serving {}
    let status = admin.status(v1::StatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.state, "draining");
    admin.resume(v1::ResumeRequest {}).await.unwrap();
    while statuses.next().await.unwrap().unwrap().status != serving {}
    let (echoed, _) = ids(client.generate(request(&[5, 6], 1)).await.unwrap().into_inner()).await.unwrap();
    assert_eq!(echoed.len(), 1);
    let status = admin.status(v1::StatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.state, "ready");

    // endless streams do not delay the end of the server
    server.stop.send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(3), server.served).await.unwrap().unwrap();
}

#[tokio::test]
async fn reports_loading_and_dead_groups() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let host = Host::loading(ServerIdentity::new(CLUSTER, "echo", "fake-0", 5));
    tokio::spawn(serve(listener, host.clone(), Default::default(), std::future::pending()));
    let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
    let mut client = InferenceClient::with_interceptor(channel, expected());
    let error = client.generate(request(&[5], 1)).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains("loading"));

    let options = FakeOptions { die_at_step: Some(4), time_scale: 1.0, ..fake() };
    let record = record(&options, address);
    let config = EngineConfig::of_group(&record, vec![2], EngineOptions::default(), keys());
    let (engine, _) = EngineHandle::start(config, Box::new(FakeRunner::new(options))).unwrap();
    host.ready(engine, record, std::sync::Arc::new(Vec::new));
    let error = ids(client.generate(request(&[5, 6], 50)).await.unwrap().into_inner()).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains("rank 0, step 4"), "{error}");
}

#[tokio::test]
async fn reports_a_group_without_progress_as_not_ready() {
    let server = start(FakeOptions { stall_at_step: Some(3), ..fake() }).await;
    let mut client = connect(&server).await;
    let channel = Channel::from_shared(format!("http://{}", server.address)).unwrap().connect().await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    let mut statuses = health.watch(tonic_health::pb::HealthCheckRequest::default()).await.unwrap().into_inner();
    let serving = i32::from(tonic_health::pb::health_check_response::ServingStatus::Serving);
    while statuses.next().await.unwrap().unwrap().status != serving {}
    let began = Instant::now();
    let _stream = client.generate(request(&[5, 6], 50)).await.unwrap();
    let status = tokio::time::timeout(Duration::from_secs(10), statuses.next()).await.unwrap();
    assert_ne!(status.unwrap().unwrap().status, serving);
    assert!(began.elapsed() >= Duration::from_secs(5), "not before its time");
    assert!(matches!(server.engine.health(), EngineHealth::Stalled { step: 3, .. }));
}

/// CPU seconds of this process so far.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: f64 = fields[11..13].iter().map(|field| field.parse::<f64>().unwrap()).sum();
    ticks / 100.0
}

/// A measurement, with client and server in one process:
/// `cargo test --release -p bora-worker --test service -- --ignored --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn measures_tokens_per_second_with_one_message_per_token() {
    for (streams, step_seconds) in [(1, 0.0005), (200, 0.02), (200, 0.004), (200, 0.001)] {
        let options = FakeOptions {
            kv_blocks: 16_384,
            time_scale: 1.0,
            decode_step_seconds: step_seconds,
            decode_seconds_per_sequence: 0.0,
            ..Default::default()
        };
        let server = start(options).await;
        let client = connect(&server).await;
        let (began, cpu) = (Instant::now(), cpu_seconds());
        let tasks: Vec<_> = (0..streams)
            .map(|index| {
                let mut client = client.clone();
                tokio::spawn(async move {
                    let prompt: Vec<u32> = (index * 100..index * 100 + 100).collect();
                    let mut stream = client.generate(request(&prompt, 1_000)).await.unwrap().into_inner();
                    let mut messages = 0u32;
                    while let Some(event) = stream.next().await {
                        event.unwrap();
                        messages += 1;
                    }
                    messages
                })
            })
            .collect();
        let mut messages = 0;
        for task in tasks {
            messages += task.await.unwrap();
        }
        let (seconds, cpu) = (began.elapsed().as_secs_f64(), cpu_seconds() - cpu);
        let tokens = f64::from(streams) * 1_000.0;
        println!(
            "{streams} streams, step {step_seconds} s: {:.0} tokens/s in {messages} messages, \
             {:.0} tokens per CPU second",
            tokens / seconds,
            tokens / cpu
        );
    }
}
