//! `bora bench load`: a closed loop of requests against an OpenAI endpoint, or straight against a group's gRPC
//! service, so that the difference is what the router adds. Bounded in requests and in concurrency.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bora_common::peer::Expected;
use bora_common::registry::GroupRecord;
use bora_proto::v1::{
    DescribeRequest, GenerateRequest, Grammar, Sampling, Stopping, generate_event, grammar::Kind,
    inference_client::InferenceClient,
};
use clap::Args;
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::net::TcpStream;
use tokio::sync::Barrier;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

/// What to send and how often.
#[derive(Args, Debug)]
pub(crate) struct LoadArgs {
    /// host:port of an OpenAI endpoint
    #[arg(long, required_unless_present = "grpc")]
    http: Option<String>,
    /// host:port of a group's gRPC service: no router on the way
    #[arg(long, conflicts_with = "http")]
    grpc: Option<String>,
    /// name of the model
    #[arg(long, default_value = "fake-devstral")]
    model: String,
    /// bytes of text in the conversation (with --grpc: four bytes stand for one token)
    #[arg(long, default_value_t = 1024)]
    bytes: usize,
    /// requests in all
    #[arg(long, default_value_t = 1000)]
    requests: usize,
    /// requests in flight at once
    #[arg(long, default_value_t = 1)]
    concurrency: usize,
    /// tokens of each response
    #[arg(long, default_value_t = 16)]
    max_tokens: u32,
    /// ask for streams
    #[arg(long)]
    stream: bool,
    /// how the conversations of successive requests relate
    #[arg(long, value_enum, default_value_t = Conversation::Same)]
    conversation: Conversation,
    /// file of a JSON schema that every response keeps; one that is longer than the response
    #[arg(long, value_name = "FILE", value_parser = read_file)]
    json_schema: Option<String>,
    /// requests of every connection that are not counted, before all others: the first turns of growing conversations
    #[arg(long, default_value_t = 0)]
    warm_up: usize,
    /// process whose CPU time is counted (the router)
    #[arg(long)]
    pid: Option<u32>,
}

fn read_file(path: &str) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| error.to_string())
}

/// How the conversations of successive requests relate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Conversation {
    /// One conversation again and again.
    Same,
    /// Every one is new from its first byte.
    Fresh,
    /// Each connection's conversation grows by a message of about 1 KB with every request.
    Growing,
}

/// What one request took.
struct Sample {
    first: Duration,
    total: Duration,
}

/// Sends the load and prints one JSON line.
pub(crate) async fn run(args: LoadArgs) -> anyhow::Result<()> {
    if args.requests == 0 || args.concurrency == 0 {
        bail!("--requests and --concurrency: expected at least 1");
    }
    let args = Arc::new(args);
    let next = Arc::new(AtomicUsize::new(0));
    let warm = Arc::new(Barrier::new(args.concurrency + 1));
    let mut tasks = tokio::task::JoinSet::new();
    for connection in 0..args.concurrency {
        tasks.spawn(drive(args.clone(), next.clone(), warm.clone(), connection));
    }
    warm.wait().await;
    let cpu_before = args.pid.map(cpu_seconds).transpose()?;
    let started = Instant::now();
    warm.wait().await;
    let (mut samples, mut errors) = (Vec::new(), 0usize);
    while let Some(done) = tasks.join_next().await {
        let (some, failed) = done.context("a connection's task failed")?;
        samples.extend(some);
        errors += failed;
    }
    let seconds = started.elapsed().as_secs_f64();
    let cpu = match (args.pid, cpu_before) {
        (Some(pid), Some(before)) => Some((cpu_seconds(pid)? - before) / samples.len().max(1) as f64 * 1e6),
        _ => None,
    };
    let totals = sorted(samples.iter().map(|sample| sample.total));
    let firsts = sorted(samples.iter().map(|sample| sample.first));
    println!(
        "{}",
        json!({
            "kind": "load",
            "path": if args.http.is_some() { "http" } else { "grpc" },
            "bytes": args.bytes,
            "conversation": format!("{:?}", args.conversation).to_lowercase(),
            "stream": args.stream,
            "max_tokens": args.max_tokens,
            "grammar": args.json_schema.is_some(),
            "concurrency": args.concurrency,
            "warm_up": args.warm_up,
            "requests": samples.len(),
            "errors": errors,
            "seconds": round(seconds),
            "requests_per_second": round(samples.len() as f64 / seconds),
            "cpu_us_per_request": cpu.map(round),
            "p50_us": at(&totals, 0.5),
            "p99_us": at(&totals, 0.99),
            "first_p50_us": at(&firsts, 0.5),
            "first_p99_us": at(&firsts, 0.99),
        })
    );
    Ok(())
}

async fn drive(
    args: Arc<LoadArgs>,
    next: Arc<AtomicUsize>,
    warm: Arc<Barrier>,
    connection: usize,
) -> (Vec<Sample>, usize) {
    let (mut samples, mut errors) = (Vec::new(), 0);
    let mut client = None;
    let mut turn = 0;
    loop {
        if turn == args.warm_up {
            // what goes wrong before counts as an error, what goes well does not count
            samples.clear();
            warm.wait().await;
            warm.wait().await;
        }
        let number = match turn < args.warm_up {
            true => args.requests + connection * args.warm_up + turn,
            false => next.fetch_add(1, Ordering::Relaxed),
        };
        if turn >= args.warm_up && number >= args.requests {
            return (samples, errors);
        }
        let request = Request { args: &args, number, connection, turn };
        turn += 1;
        if client.is_none() {
            client = Client::connect(&args).await.inspect_err(|error| eprintln!("{error:#}")).ok();
        }
        let outcome = match &mut client {
            Some(client) => client.send(request).await,
            None => Err(anyhow::anyhow!("no connection")),
        };
        match outcome {
            Ok(sample) => samples.push(sample),
            Err(error) => {
                if errors == 0 {
                    eprintln!("request {number}: {error:#}");
                }
                errors += 1;
                client = None;
            }
        }
    }
}

/// One request, described.
struct Request<'a> {
    args: &'a LoadArgs,
    number: usize,
    connection: usize,
    turn: usize,
}

impl Request<'_> {
    fn body(&self) -> Vec<u8> {
        let args = self.args;
        let salt = if args.conversation == Conversation::Fresh { self.number } else { self.connection };
        let salt = if args.conversation == Conversation::Same { 0 } else { salt };
        let mut messages = vec![json!({"role": "user", "content": code_text(salt, args.bytes)})];
        if args.conversation == Conversation::Growing {
            for turn in 0..self.turn {
                messages.push(json!({"role": "assistant", "content": "I see."}));
                messages.push(json!({"role": "user", "content": code_text(salt + 7919 * (turn + 1), 1024)}));
            }
        }
        let mut body = json!({
            "model": args.model, "messages": messages, "max_tokens": args.max_tokens, "stream": args.stream,
            "ignore_eos": true, "temperature": 0,
        });
        if let Some(schema) = &args.json_schema {
            body["guided_json"] = json!(schema);
        }
        body.to_string().into_bytes()
    }
}

/// Lines that look like source code; `salt` makes them differ from the first byte on.
fn code_text(salt: usize, bytes: usize) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(bytes + 80);
    let mut state = salt as u64 ^ 0x9e37_79b9_7f4a_7c15;
    while text.len() < bytes {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let (a, b) = (state >> 40, (state >> 20) & 0xfff);
        // writing to a string can't fail
        let _ = writeln!(text, "    let value_{a:x} = compute_{b:x}(index + {b}, \"name {a}\")?; // step {}", a % 97);
    }
    text.truncate(bytes);
    text
}

/// A caller that expects the group which it found at its address.
type Group = InferenceClient<InterceptedService<Channel, Expected>>;

enum Client {
    Http { sender: hyper::client::conn::http1::SendRequest<Full<Bytes>>, host: String },
    Grpc(Group),
}

impl Client {
    async fn connect(args: &LoadArgs) -> anyhow::Result<Self> {
        if let Some(address) = &args.grpc {
            let channel = Channel::from_shared(format!("http://{address}"))?.connect().await?;
            let found = InferenceClient::new(channel.clone()).describe(DescribeRequest {}).await?.into_inner();
            let record: GroupRecord = serde_json::from_str(&found.record_json)?;
            let expected = Expected::of_record(&found.cluster, &record);
            return Ok(Self::Grpc(InferenceClient::with_interceptor(channel, expected)));
        }
        let host = args.http.clone().context("neither --http nor --grpc")?;
        let stream = TcpStream::connect(&host).await.with_context(|| format!("connecting to {host}"))?;
        stream.set_nodelay(true)?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(Self::Http { sender, host })
    }

    async fn send(&mut self, request: Request<'_>) -> anyhow::Result<Sample> {
        match self {
            Self::Http { sender, host } => send_http(sender, host, request).await,
            Self::Grpc(client) => send_grpc(client, request).await,
        }
    }
}

async fn send_http(
    sender: &mut hyper::client::conn::http1::SendRequest<Full<Bytes>>,
    host: &str,
    request: Request<'_>,
) -> anyhow::Result<Sample> {
    let body = request.body();
    let message = hyper::Request::post("/v1/chat/completions")
        .header("host", host)
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body)))?;
    let started = Instant::now();
    sender.ready().await?;
    let response = sender.send_request(message).await?;
    let status = response.status();
    let mut body = response.into_body();
    let mut first = None;
    let mut tail = Vec::new();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            first.get_or_insert_with(|| started.elapsed());
            tail = data.to_vec();
        }
    }
    let total = started.elapsed();
    if !status.is_success() {
        bail!("status {status}: {}", String::from_utf8_lossy(&tail));
    }
    if request.args.stream && !tail.ends_with(b"data: [DONE]\n\n") {
        bail!("the stream ended without [DONE]");
    }
    Ok(Sample { first: first.unwrap_or(total), total })
}

async fn send_grpc(client: &mut Group, request: Request<'_>) -> anyhow::Result<Sample> {
    let args = request.args;
    let salt = if args.conversation == Conversation::Fresh { request.number as u32 } else { 0 };
    let message = GenerateRequest {
        request_id: format!("load-{}", request.number),
        token_ids: (0..args.bytes.div_ceil(4) as u32).map(|i| 1000 + (i * 31 + salt) % 8000).collect(),
        sampling: Some(Sampling { temperature: Some(0.0), ..Default::default() }),
        grammar: args
            .json_schema
            .as_ref()
            .map(|schema| Grammar { kind: Kind::JsonSchema.into(), source: schema.clone() }),
        stopping: Some(Stopping { max_tokens: args.max_tokens, ignore_eos: true, ..Default::default() }),
        ..Default::default()
    };
    let started = Instant::now();
    let mut stream = client.generate(message).await?.into_inner();
    let (mut first, mut finished) = (None, false);
    while let Some(event) = stream.message().await? {
        match event.event {
            Some(generate_event::Event::Tokens(_)) => {
                first.get_or_insert_with(|| started.elapsed());
            }
            Some(generate_event::Event::Finished(_)) => finished = true,
            _ => {}
        }
    }
    let total = started.elapsed();
    if !finished {
        bail!("the stream ended without Finished");
    }
    Ok(Sample { first: first.unwrap_or(total), total })
}

/// User and system time of a process so far.
fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid}"))?;
    // fields after the command's name, which may hold spaces: the 12th and 13th are utime and stime in ticks
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    let tick = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    const TICKS_PER_SECOND: f64 = 100.0; // USER_HZ on every Linux that Bora runs on
    Ok((tick(11) + tick(12)) / TICKS_PER_SECOND)
}

fn sorted(durations: impl Iterator<Item = Duration>) -> Vec<f64> {
    let mut micros: Vec<f64> = durations.map(|duration| duration.as_secs_f64() * 1e6).collect();
    micros.sort_by(f64::total_cmp);
    micros
}

fn at(sorted: &[f64], share: f64) -> Option<f64> {
    let index = ((sorted.len() as f64 - 1.0) * share).round();
    sorted.get(index as usize).map(|value| round(*value))
}

fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}
