//! Measures what the router costs: CPU time and latency of requests over a group that answers at once.
//!
//! `measure-router [--tokenizer tekken.json] [--seconds 5]` starts a scripted group, a router on one thread
//! and a client as processes of their own, and prints a table and one JSON line a case. CPU time is the
//! router process's own (user and system, from /proc), so neighbours on the machine hardly matter.

use std::{
    collections::HashMap,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    pin::Pin,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use bora_common::{
    registry::{Device, GroupChange, GroupRecord, GroupState, RankRecord, Speed},
    tokenizer::Tokenizer,
};
use bora_proto::v1::{
    DescribeRequest, DescribeResponse, FinishReason, Finished, GenerateEvent, GenerateRequest, GroupEvent, Load,
    Snapshot, Started, State, Tokens, WatchRequest,
    generate_event::Event,
    group_event::Event as Told,
    inference_server::{Inference, InferenceServer},
};
use bora_router::{ModelSpec, Router, RouterOptions};
use futures::{Stream, StreamExt as _};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tonic::{Request, Response, Status};

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let mut arguments: HashMap<String, String> = HashMap::new();
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let name = word.strip_prefix("--").ok_or_else(|| format!("unexpected argument {word}"))?;
        arguments.insert(name.into(), words.next().ok_or_else(|| format!("--{name} needs a value"))?);
    }
    let one_thread = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match arguments.get("role").map(String::as_str) {
        Some("group") => one_thread.block_on(group()),
        Some("router") => one_thread.block_on(router(&arguments)),
        Some(other) => Err(format!("unknown role {other}").into()),
        None => one_thread.block_on(measure(&arguments)),
    }
}

/// Answers every request at once with `max_tokens` ids, an event each.
struct Group;

type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Inference for Group {
    type GenerateStream = Events<GenerateEvent>;
    type WatchStream = Events<GroupEvent>;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let request = request.into_inner();
        let prompt_tokens = request.token_ids.len() as u32;
        let count = request.stopping.map_or(1, |stopping| stopping.max_tokens).min(1024);
        let started = Event::Started(Started { prompt_tokens, cached_tokens: 0, queued_seconds: 0.0 });
        let tokens = (0..count).map(|at| Event::Tokens(Tokens { token_ids: vec![2000 + at], logprobs: Vec::new() }));
        let finished = Event::Finished(Finished {
            reason: FinishReason::Length as i32,
            prompt_tokens,
            cached_tokens: 0,
            completion_tokens: count,
            timing: None,
        });
        let events = std::iter::once(started).chain(tokens).chain(std::iter::once(finished));
        let events: Vec<_> = events.map(|event| Ok(GenerateEvent { event: Some(event) })).collect();
        Ok(Response::new(Box::pin(futures::stream::iter(events))))
    }

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let told = [
            Told::Snapshot(Snapshot { block_hashes: Default::default(), last: true }),
            Told::State(State::Ready as i32),
            Told::Load(Load::default()),
        ];
        let events = futures::stream::iter(told)
            .enumerate()
            .map(|(number, told)| Ok(GroupEvent { epoch: 1, sequence: number as u64, event: Some(told) }))
            .chain(heartbeats());
        Ok(Response::new(Box::pin(events)))
    }

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        Err(Status::unimplemented("a scripted group"))
    }
}

/// A sign of life each second.
fn heartbeats() -> impl Stream<Item = Result<GroupEvent, Status>> {
    futures::stream::unfold(3, |sequence| async move {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let event = GroupEvent { epoch: 1, sequence, event: Some(Told::Load(Load::default())) };
        Some((Ok(event), sequence + 1))
    })
}

async fn group() -> Result<(), Failure> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", listener.local_addr()?);
    let service = InferenceServer::new(Group).max_decoding_message_size(64 << 20);
    tonic::transport::Server::builder()
        .tcp_nodelay(true)
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(64 << 20)
        .add_service(service)
        .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener))
        .await?;
    Ok(())
}

async fn router(arguments: &HashMap<String, String>) -> Result<(), Failure> {
    let tokenizer = Tokenizer::from_file(arguments.get("tokenizer").ok_or("--tokenizer")?)?;
    let vocabulary_size = tokenizer.vocabulary_size() as u32;
    let (changes, receiver) = tokio::sync::mpsc::channel(16);
    let models = HashMap::from([("m".to_string(), ModelSpec::new(Arc::new(tokenizer)))]);
    let router = Router::new(RouterOptions::default(), models, receiver)?;
    for (number, endpoint) in arguments.get("groups").ok_or("--groups")?.split(',').enumerate() {
        let record = GroupRecord {
            group: format!("g{number}"),
            epoch: 1,
            endpoint: endpoint.into(),
            model: "m".into(),
            aliases: Vec::new(),
            device: Device::Fake,
            weight_fingerprint: String::new(),
            ranks: vec![RankRecord { rank: 0, host: "localhost".into(), pid: 0 }],
            block_tokens: 64,
            kv_blocks: 1 << 20,
            max_model_len: 1 << 20,
            vocabulary_size,
            max_sequences: 4096,
            images: false,
            speed: Speed {
                prefill_tokens_per_second: 1e6,
                prefill_seconds_per_token_pair: 0.0,
                decode_step_seconds: 1e-3,
            },
            state: GroupState::Ready,
            version: String::new(),
        };
        changes.send(GroupChange::Put(Box::new(record))).await?;
    }
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", listener.local_addr()?);
    router.serve(listener, std::future::pending()).await?;
    Ok(())
}

/// A process of this program, killed when dropped.
struct Role {
    child: Child,
    address: SocketAddr,
}

impl Role {
    fn start(arguments: &[&str]) -> Result<Self, Failure> {
        let mut child = Command::new(std::env::current_exe()?).args(arguments).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().ok_or("no output")?).read_line(&mut line)?;
        let address = line.trim().parse()?;
        Ok(Self { child, address })
    }

    /// User and system time so far, in seconds.
    fn cpu_seconds(&self) -> Result<f64, Failure> {
        const TICKS_PER_SECOND: f64 = 100.0;
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let after_name = stat.rsplit(')').next().ok_or("stat")?;
        let fields: Vec<&str> = after_name.split_whitespace().collect();
        let ticks: f64 =
            fields.get(11).ok_or("utime")?.parse::<f64>()? + fields.get(12).ok_or("stime")?.parse::<f64>()?;
        Ok(ticks / TICKS_PER_SECOND)
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Case {
    name: &'static str,
    body: String,
    concurrency: usize,
}

async fn measure(arguments: &HashMap<String, String>) -> Result<(), Failure> {
    let seconds: f64 = arguments.get("seconds").map_or(Ok(5.0), |text| text.parse())?;
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/tokenizers/tekken-v13.json");
    let tokenizer = arguments.get("tokenizer").map_or(default, String::as_str);
    let groups: Vec<Role> = (0..4).map(|_| Role::start(&["--role", "group"])).collect::<Result<_, _>>()?;
    let endpoints: Vec<String> = groups.iter().map(|group| group.address.to_string()).collect();
    let router = Role::start(&["--role", "router", "--tokenizer", tokenizer, "--groups", &endpoints.join(",")])?;
    tokio::time::sleep(Duration::from_millis(500)).await;

    let source = include_str!("measure-router.rs");
    let body = |bytes: usize, stream: bool, tokens: u32| {
        let text: String = source.chars().cycle().take(bytes).collect();
        let messages = [serde_json::json!({"role": "user", "content": text})];
        serde_json::json!({"model": "m", "messages": messages, "stream": stream, "max_tokens": tokens}).to_string()
    };
    let ids: Vec<u32> = (0..200).map(|id| 1000 + id).collect();
    let cases = [
        Case {
            name: "200 ids",
            body: serde_json::json!({"model": "m", "prompt": ids, "max_tokens": 1}).to_string(),
            concurrency: 64,
        },
        Case { name: "1 KB", body: body(1000, false, 1), concurrency: 64 },
        Case { name: "1 KB, alone", body: body(1000, false, 1), concurrency: 1 },
        Case { name: "1 KB, 17 chunks", body: body(1000, true, 16), concurrency: 64 },
        Case { name: "128 KB", body: body(128_000, false, 1), concurrency: 8 },
        Case { name: "220 KB streamed", body: body(220_000, true, 1), concurrency: 150 },
        Case { name: "1 MB", body: body(1_000_000, false, 1), concurrency: 4 },
    ];
    println!(
        "{:<18} {:>10} {:>12} {:>9} {:>9} {:>7}",
        "case", "requests/s", "cpu us/req", "p50 us", "p99 us", "errors"
    );
    for case in cases {
        load(router.address, &case, Duration::from_millis(500)).await?; // warm
        let (cpu, begun) = (router.cpu_seconds()?, Instant::now());
        let (mut latencies, errors) = load(router.address, &case, Duration::from_secs_f64(seconds)).await?;
        let (cpu, wall) = (router.cpu_seconds()? - cpu, begun.elapsed().as_secs_f64());
        latencies.sort_unstable();
        let count = latencies.len().max(1);
        let at = |share: f64| latencies.get(((count as f64 * share) as usize).min(count - 1)).copied().unwrap_or(0);
        let (rate, each) = (count as f64 / wall, cpu / count as f64 * 1e6);
        println!("{:<18} {rate:>10.0} {each:>12.1} {:>9} {:>9} {errors:>7}", case.name, at(0.5), at(0.99));
        let line = serde_json::json!({"case": case.name, "concurrency": case.concurrency, "requests_per_second": rate,
            "cpu_us_per_request": each, "p50_us": at(0.5), "p99_us": at(0.99), "errors": errors});
        println!("{line}");
    }
    Ok(())
}

/// Keeps `concurrency` connections busy; microseconds of each request, and how many failed.
async fn load(address: SocketAddr, case: &Case, time: Duration) -> Result<(Vec<u64>, usize), Failure> {
    let path = if case.body.contains("\"messages\"") { "/v1/chat/completions" } else { "/v1/completions" };
    let request: Arc<[u8]> = format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{}",
        case.body.len(),
        case.body
    )
    .into_bytes()
    .into();
    let until = Instant::now() + time;
    let clients = (0..case.concurrency).map(|_| tokio::spawn(client(address, Arc::clone(&request), until)));
    let (mut latencies, mut errors) = (Vec::new(), 0);
    for outcome in futures::future::join_all(clients).await {
        let (some, failed) = outcome??;
        latencies.extend(some);
        errors += failed;
    }
    Ok((latencies, errors))
}

async fn client(address: SocketAddr, request: Arc<[u8]>, until: Instant) -> Result<(Vec<u64>, usize), Failure> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (mut latencies, mut errors, mut received) = (Vec::new(), 0, Vec::with_capacity(16 << 10));
    while Instant::now() < until {
        let begun = Instant::now();
        stream.write_all(&request).await?;
        received.clear();
        while !is_complete(&received) {
            if stream.read_buf(&mut received).await? == 0 {
                return Err("the router closed a connection".into());
            }
        }
        latencies.push(begun.elapsed().as_micros() as u64);
        errors += usize::from(!received.starts_with(b"HTTP/1.1 200"));
    }
    Ok((latencies, errors))
}

/// Whether a whole response was received.
fn is_complete(received: &[u8]) -> bool {
    let Some(head) = received.windows(4).position(|window| window == b"\r\n\r\n") else {
        return false;
    };
    let text = String::from_utf8_lossy(&received[..head]).to_ascii_lowercase();
    match text.lines().find_map(|line| line.strip_prefix("content-length: ")) {
        Some(length) => received.len() - head - 4 >= length.trim().parse().unwrap_or(usize::MAX),
        None => received.ends_with(b"\r\n0\r\n\r\n"),
    }
}
