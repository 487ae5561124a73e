//! A router over scripted groups: real gRPC over loopback, token IDs as the test writes them, failures on
//! command. A group lives on a runtime of its own, so that it can die like a process does.

#![allow(missing_docs, unreachable_pub)] // of tests

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::body::Body;
use bora_common::{
    blocks::hash_blocks,
    peer::{Admission, Guard, ServerIdentity},
    registry::{Device, GroupChange, GroupRecord, GroupState, RankRecord, Speed},
    secret::{CacheSalt, CacheScope, ClusterKeys},
    tokenizer::Tokenizer,
};
use bora_proto::v1::{
    BlocksChanged, DescribeRequest, DescribeResponse, FinishReason, Finished, GenerateEvent, GenerateRequest,
    GrammarCompiled, GroupEvent, Load, PositionLogprobs, PromptLogprobs, Snapshot, Started, State, TokenLogprob,
    Tokens, WatchRequest,
    generate_event::Event,
    group_event::Event as Update,
    inference_server::{Inference, InferenceServer},
};
use bora_router::{ConversationRules, ModelSpec, Router, RouterOptions};
use futures::{Stream, StreamExt as _};
use http_body_util::BodyExt as _;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::{Semaphore, broadcast, mpsc};
use tonic::{Request, Response, Status};
use tower::ServiceExt as _;

pub const MODEL: &str = "devstral-test";
pub const ALIAS: &str = "devstral";
pub const WINDOW: u32 = 4096;

/// The small tokenizer of the fixtures, read once.
pub fn tokenizer() -> Arc<Tokenizer> {
    static TOKENIZER: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    Arc::clone(TOKENIZER.get_or_init(|| {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/tokenizers/tekken-v13-8k.json");
        Arc::new(Tokenizer::from_file(path).expect("the fixture is a tokenizer"))
    }))
}

pub const EOS: u32 = 2;

/// One thing that a scripted group does.
#[derive(Clone, Debug)]
pub enum Act {
    Start {
        cached: u32,
    },
    /// The grammar has compiled.
    Compile,
    PromptLogprobs,
    Ids(Vec<u32>),
    /// Like `Ids`, each with a logprob of -0.5 and one alternative (id 1500 at -1.5).
    IdsWithLogprobs(Vec<u32>),
    Pause(Duration),
    /// Continues when the test opens the gate for one more.
    Hold(Gate),
    Finish(FinishReason),
    /// An event as it is, whatever the request allows.
    Raw(Event),
    Fail(Status),
    /// Never says anything again.
    Hang,
    /// The group dies: every connection is reset.
    Die,
}

/// Holds sequences until the test lets them continue.
#[derive(Clone, Debug)]
pub struct Gate(Arc<Semaphore>);

impl Gate {
    pub fn closed() -> Self {
        Self(Arc::new(Semaphore::new(0)))
    }

    /// Lets as many more continue, whenever they come.
    pub fn open(&self, count: usize) {
        self.0.add_permits(count);
    }

    async fn pass(&self) {
        if let Ok(permit) = self.0.acquire().await {
            permit.forget();
        }
    }
}

/// Text and then the end of the sequence, a token at a time.
pub fn say(text: &str) -> Vec<Act> {
    let mut acts = vec![Act::Start { cached: 0 }];
    acts.extend(tokenizer().encode(text).into_iter().map(|id| Act::Ids(vec![id])));
    acts.push(Act::Ids(vec![EOS]));
    acts.push(Act::Finish(FinishReason::Stop));
    acts
}

/// These token IDs one at a time, then the end.
pub fn say_ids(ids: &[u32], reason: FinishReason) -> Vec<Act> {
    let mut acts = vec![Act::Start { cached: 0 }];
    acts.extend(ids.iter().map(|id| Act::Ids(vec![*id])));
    acts.push(Act::Finish(reason));
    acts
}

type Script = Arc<dyn Fn(&GenerateRequest) -> Result<Vec<Act>, Status> + Send + Sync>;

#[derive(Clone)]
struct Scripted {
    epoch: u64,
    script: Arc<Mutex<Script>>,
    seen: Arc<Mutex<Vec<GenerateRequest>>>,
    /// Streams dropped before their script was over.
    cancelled: Arc<AtomicUsize>,
    running: Arc<AtomicUsize>,
    died: mpsc::UnboundedSender<()>,
    /// What is given, and how many numbers are left out before it.
    events: broadcast::Sender<(u64, Update)>,
    watches: Arc<AtomicUsize>,
    /// The load as it was last reported.
    reported: Arc<Mutex<Load>>,
}

struct Running {
    scripted: Scripted,
    over: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.scripted.running.fetch_sub(1, Ordering::SeqCst);
        if !self.over {
            self.scripted.cancelled.fetch_add(1, Ordering::SeqCst);
        }
    }
}

fn event(event: Event) -> Option<Result<GenerateEvent, Status>> {
    Some(Ok(GenerateEvent { event: Some(event) }))
}

fn logprob(token_id: u32, logprob: f32, rank: u32) -> TokenLogprob {
    TokenLogprob { token_id, logprob, rank }
}

/// The token itself and then 1500 and those behind it, as many as are asked for.
fn position(id: u32, top: u32) -> PositionLogprobs {
    let others = (0..).map(|at| logprob(1500 + at, -1.5 - at as f32, 2 + at));
    let top = std::iter::once(logprob(id, -0.5, 1)).chain(others).take(top as usize).collect();
    PositionLogprobs { chosen: Some(logprob(id, -0.5, 1)), top }
}

type Boxed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Inference for Scripted {
    type GenerateStream = Boxed<GenerateEvent>;
    type WatchStream = Boxed<GroupEvent>;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let request = request.into_inner();
        self.seen.lock().push(request.clone());
        let script = Arc::clone(&self.script.lock());
        let acts = script(&request)?;
        self.running.fetch_add(1, Ordering::SeqCst);
        let running = Running { scripted: self.clone(), over: false };
        let prompt_tokens = request.token_ids.len() as u32 - request.generated_len;
        let state = (acts.into_iter(), running, request, prompt_tokens, 0u32);
        let stream =
            futures::stream::unfold(state, move |(mut acts, mut running, request, prompt, generated)| async move {
                let mut generated = generated;
                let asked = request.logprobs.unwrap_or_default();
                let most = request.stopping.as_ref().map_or(0, |stopping| stopping.max_tokens) - request.generated_len;
                // no more than were asked for, with logprobs if they were
                let room = |generated: u32| most.saturating_sub(generated) as usize;
                let tokens = |token_ids: Vec<u32>| {
                    let scored = token_ids.iter().filter(|_| asked.top.is_some());
                    let logprobs = scored.map(|id| position(*id, asked.top.unwrap_or(0))).collect();
                    Tokens { token_ids, logprobs }
                };
                loop {
                    let item = match acts.next() {
                        None => return None,
                        Some(Act::Pause(time)) => {
                            tokio::time::sleep(time).await;
                            continue;
                        }
                        Some(Act::Hold(gate)) => {
                            gate.pass().await;
                            continue;
                        }
                        Some(Act::Hang) => {
                            futures::future::pending::<()>().await;
                            continue;
                        }
                        Some(Act::Die) => {
                            let _ = running.scripted.died.send(());
                            futures::future::pending::<()>().await;
                            continue;
                        }
                        Some(Act::Start { cached }) => event(Event::Started(Started {
                            prompt_tokens: prompt,
                            cached_tokens: cached,
                            queued_seconds: 0.0,
                        })),
                        Some(Act::Compile) => event(Event::Compiled(GrammarCompiled {})),
                        Some(Act::PromptLogprobs) => event(Event::PromptLogprobs(PromptLogprobs {
                            start: 1,
                            positions: request.token_ids[1..]
                                .iter()
                                .map(|id| position(*id, asked.prompt_top.unwrap_or(0)))
                                .collect(),
                        })),
                        Some(Act::Ids(token_ids) | Act::IdsWithLogprobs(token_ids))
                            if room(generated) < token_ids.len() =>
                        {
                            let fits = token_ids[..room(generated)].to_vec();
                            acts = vec![Act::Finish(FinishReason::Length)].into_iter();
                            if fits.is_empty() {
                                continue;
                            }
                            generated += fits.len() as u32;
                            event(Event::Tokens(tokens(fits)))
                        }
                        Some(Act::Ids(token_ids) | Act::IdsWithLogprobs(token_ids)) => {
                            generated += token_ids.len() as u32;
                            event(Event::Tokens(tokens(token_ids)))
                        }
                        Some(Act::Raw(raw)) => event(raw),
                        Some(Act::Finish(reason)) => {
                            running.over = true;
                            event(Event::Finished(Finished {
                                reason: reason as i32,
                                prompt_tokens: prompt,
                                cached_tokens: 0,
                                completion_tokens: generated + request.generated_len,
                                timing: None,
                            }))
                        }
                        Some(Act::Fail(status)) => {
                            running.over = true;
                            Some(Err(status))
                        }
                    };
                    return item.map(|item| (item, (acts, running, request, prompt, generated)));
                }
            });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        self.watches.fetch_add(1, Ordering::SeqCst);
        let first = [
            Update::Snapshot(Snapshot { block_hashes: Default::default(), last: true }),
            Update::State(State::Ready as i32),
            Update::Load(Load { blocks_total: 1000, ..Load::default() }),
        ]
        .map(|update| (0, update));
        let reported = Arc::clone(&self.reported);
        let update = tokio_stream::wrappers::BroadcastStream::new(self.events.subscribe())
            .filter_map(|update| async move { update.ok() });
        let every_second = tokio::time::interval(Duration::from_secs(1));
        let signs_of_life =
            tokio_stream::wrappers::IntervalStream::new(every_second).map(move |_| (0, Update::Load(*reported.lock())));
        let later = futures::stream::select(update, signs_of_life);
        let (mut sequence, epoch) = (0, self.epoch);
        let events = futures::stream::iter(first).chain(later).map(move |(gap, update)| {
            sequence += 1 + gap;
            Ok(GroupEvent { epoch, sequence, event: Some(update) })
        });
        Ok(Response::new(Box::pin(events)))
    }

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        Err(Status::unimplemented("not needed here"))
    }
}

/// Waits until an address can be listened on: the runtime of a group that was killed may still close its port.
#[allow(clippy::disallowed_methods)] // of a test, before anything runs
fn listen(address: &str) -> std::net::TcpListener {
    let address: std::net::SocketAddr = address.parse().expect("an address");
    for _ in 0..1_000 {
        // as a listener of tokio does: connections of the last group may still be closing
        let bound = std::net::TcpListener::bind(address);
        if let Ok(listener) = bound {
            listener.set_nonblocking(true).expect("nonblocking");
            return listener;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{address} is taken");
}

/// A scripted group.
pub struct Group {
    pub name: String,
    pub model: String,
    epoch: u64,
    /// Fingerprint of its weights.
    weights: String,
    pub endpoint: String,
    /// Of its record.
    pub max_sequences: u32,
    scripted: Scripted,
    runtime: Arc<Mutex<Option<tokio::runtime::Runtime>>>,
}

impl Group {
    pub fn start(
        name: &str,
        script: impl Fn(&GenerateRequest) -> Result<Vec<Act>, Status> + Send + Sync + 'static,
    ) -> Self {
        Self::start_at("127.0.0.1:0", name, MODEL, script)
    }

    /// A group of any model at an address, which may have been that of another group.
    pub fn start_at(
        address: &str,
        name: &str,
        model: &str,
        script: impl Fn(&GenerateRequest) -> Result<Vec<Act>, Status> + Send + Sync + 'static,
    ) -> Self {
        Self::start_as(address, name, model, 1, "none", script)
    }

    /// A group of this epoch, with the weights of this fingerprint.
    pub fn start_as(
        address: &str,
        name: &str,
        model: &str,
        epoch: u64,
        weights: &str,
        script: impl Fn(&GenerateRequest) -> Result<Vec<Act>, Status> + Send + Sync + 'static,
    ) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let (died, mut deaths) = mpsc::unbounded_channel();
        let scripted = Scripted {
            epoch,
            script: Arc::new(Mutex::new(Arc::new(script))),
            seen: Arc::default(),
            cancelled: Arc::default(),
            running: Arc::default(),
            died,
            events: broadcast::channel(64).0,
            watches: Arc::default(),
            reported: Arc::default(),
        };
        let listener = listen(address);
        let endpoint = listener.local_addr().expect("bound").to_string();
        let service = InferenceServer::new(scripted.clone()).max_decoding_message_size(64 << 20);
        let identity = ServerIdentity::new(options().cluster, model, name, epoch);
        identity.set_weights(weights);
        let guard = Guard::new(Arc::new(identity), Admission::Anybody);
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
            let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
            let _ = tonic::transport::Server::builder()
                .layer(guard)
                .tcp_nodelay(true)
                .add_service(service)
                .serve_with_incoming(incoming)
                .await;
        });
        let runtime = Arc::new(Mutex::new(Some(runtime)));
        let to_kill = Arc::clone(&runtime);
        std::thread::spawn(move || {
            if deaths.blocking_recv().is_some()
                && let Some(runtime) = to_kill.lock().take()
            {
                runtime.shutdown_background();
            }
        });
        let (name, model, weights) = (name.into(), model.into(), weights.into());
        Self { name, model, epoch, weights, endpoint, max_sequences: 64, scripted, runtime }
    }

    pub fn kill(&self) {
        if let Some(runtime) = self.runtime.lock().take() {
            runtime.shutdown_background();
        }
    }

    pub fn seen(&self) -> Vec<GenerateRequest> {
        self.scripted.seen.lock().clone()
    }

    pub fn cancelled(&self) -> usize {
        self.scripted.cancelled.load(Ordering::SeqCst)
    }

    pub fn running(&self) -> usize {
        self.scripted.running.load(Ordering::SeqCst)
    }

    /// Notifies its watchers.
    pub fn report(&self, update: Update) {
        if let Update::Load(load) = &update {
            *self.scripted.reported.lock() = *load;
        }
        let _ = self.scripted.events.send((0, update));
    }

    /// Notifies its watchers as if an event had been lost on the way.
    pub fn report_after_a_gap(&self, update: Update) {
        let _ = self.scripted.events.send((1, update));
    }

    /// Reports to its watchers that it holds blocks of these hashes.
    pub fn tell_hashes(&self, hashes: impl Iterator<Item = u128>) {
        let stored: Vec<u8> = hashes.flat_map(u128::to_le_bytes).collect();
        self.report(Update::Blocks(BlocksChanged { stored: stored.into(), evicted: Default::default() }));
    }

    /// How often it was asked for its events.
    pub fn watches(&self) -> usize {
        self.scripted.watches.load(Ordering::SeqCst)
    }

    /// Notifies its watchers that it holds the blocks of a prompt.
    pub fn report_stored(&self, token_ids: &[u32]) {
        let stored: Vec<u8> =
            hash_blocks(&keys(), salt().as_ref(), &[], token_ids).iter().flat_map(|hash| hash.to_bytes()).collect();
        self.report(Update::Blocks(BlocksChanged { stored: stored.into(), evicted: Default::default() }));
    }

    pub fn record(&self) -> GroupRecord {
        GroupRecord {
            group: self.name.clone(),
            epoch: self.epoch,
            endpoint: self.endpoint.clone(),
            model: self.model.clone(),
            aliases: if self.model == MODEL { vec![ALIAS.into()] } else { Vec::new() },
            device: Device::Fake,
            cache_key_id: keys().cache_key_id().into(),
            weight_fingerprint: self.weights.clone(),
            ranks: vec![RankRecord { rank: 0, host: "test".into(), pid: 1 }],
            block_tokens: 64,
            kv_blocks: 1000,
            host_blocks: 0,
            max_model_len: WINDOW,
            vocabulary_size: 9192,
            max_sequences: self.max_sequences,
            images: true,
            speed: Speed {
                prefill_tokens_per_second: 10_000.0,
                prefill_seconds_per_token_pair: 1e-9,
                decode_step_seconds: 0.01,
            },
            state: GroupState::Ready,
            version: "test".into(),
            contract: bora_common::version::CONTRACT,
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A router over groups.
pub struct Harness {
    pub router: Router,
    pub changes: mpsc::Sender<GroupChange>,
    pub groups: Vec<Group>,
}

/// A response, read to its end.
#[derive(Debug)]
pub struct Answered {
    pub status: u16,
    pub headers: axum::http::HeaderMap,
    pub text: String,
}

impl Answered {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// The JSON of every `data:` line but `[DONE]`.
    pub fn chunks(&self) -> Vec<Value> {
        self.text
            .split("\n\n")
            .filter_map(|event| event.strip_prefix("data: "))
            .filter(|data| *data != "[DONE]")
            .map(|data| serde_json::from_str(data).unwrap_or_else(|error| panic!("{error}: {data}")))
            .collect()
    }

    /// Name and JSON of every event that has a name.
    pub fn events(&self) -> Vec<(String, Value)> {
        let event = |text: &str| {
            let (name, data) = text.strip_prefix("event: ")?.split_once("\ndata: ")?;
            let json = serde_json::from_str(data).unwrap_or_else(|error| panic!("{error}: {data}"));
            Some((name.to_owned(), json))
        };
        self.text.split("\n\n").filter_map(event).collect()
    }

    pub fn is_done(&self) -> bool {
        self.text.ends_with("data: [DONE]\n\n")
    }

    /// All content (chat) or text (completions) of one choice.
    pub fn content(&self, index: u64) -> String {
        let mut content = String::new();
        for chunk in self.chunks() {
            for choice in chunk["choices"].as_array().into_iter().flatten() {
                if choice["index"] == index {
                    content.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
                    content.push_str(choice["text"].as_str().unwrap_or_default());
                }
            }
        }
        content
    }
}

/// The token IDs of calls, as the model writes them.
pub fn call_ids(calls: &[(&str, &str)]) -> Vec<u32> {
    let tokenizer = tokenizer();
    let mut ids = Vec::new();
    for (name, arguments) in calls {
        ids.push(9);
        ids.extend(tokenizer.encode(name));
        ids.push(32);
        ids.extend(tokenizer.encode(arguments));
    }
    ids
}

/// Those of the cluster under test.
pub fn keys() -> ClusterKeys {
    ClusterKeys::derive(&[1; 32])
}

/// Of a request without a key and without a salt of its own.
pub fn salt() -> CacheSalt {
    keys().cache_salt(CacheScope::Anonymous, "")
}

pub fn options() -> RouterOptions {
    RouterOptions { failover_wait_seconds: 0.5, wait_for_group_seconds: 0.0, ..RouterOptions::default() }
}

/// As the reference has it: conversations that it refuses are refused.
pub fn strict() -> RouterOptions {
    RouterOptions { conversation: ConversationRules::Strict, ..options() }
}

impl Harness {
    pub async fn start(groups: Vec<Group>) -> Self {
        Self::with(options(), ModelSpec::new(tokenizer()), groups).await
    }

    pub async fn with(options: RouterOptions, spec: ModelSpec, groups: Vec<Group>) -> Self {
        let (changes, receiver) = mpsc::channel(16);
        let spec = ModelSpec { aliases: vec![ALIAS.into()], ..spec };
        let router =
            Router::new(options, keys(), HashMap::from([(MODEL.to_string(), spec)]), receiver).expect("valid options");
        for group in &groups {
            changes.send(GroupChange::Put(Box::new(group.record()))).await.expect("followed");
        }
        let harness = Self { router, changes, groups };
        let count = harness.groups.len();
        harness
            .until("every group is watched", |harness| {
                let view = harness.router.service().fleet().view();
                view.groups().filter(|group| group.link.is_watched()).count() == count
            })
            .await;
        harness
    }

    /// One group that follows a script.
    pub async fn scripted(
        script: impl Fn(&GenerateRequest) -> Result<Vec<Act>, Status> + Send + Sync + 'static,
    ) -> Self {
        Self::start(vec![Group::start("only", script)]).await
    }

    /// One group that says this to everything.
    pub async fn saying(text: &'static str) -> Self {
        Self::scripted(move |_| Ok(say(text))).await
    }

    /// The same, with the reference's rules.
    pub async fn strict(text: &'static str) -> Self {
        Self::with(strict(), ModelSpec::new(tokenizer()), vec![Group::start("only", move |_| Ok(say(text)))]).await
    }

    pub async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        // long enough for a machine that stands still for seconds
        for _ in 0..3_000 {
            if holds(self) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("it did not come true that {what}");
    }

    pub async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Body>,
    ) -> axum::http::Response<Body> {
        let mut request = axum::http::Request::builder().method(method).uri(path);
        if !headers.iter().any(|(name, _)| *name == "content-type") {
            request = request.header("content-type", "application/json");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(body.into()).expect("a request");
        self.router.routes().oneshot(request).await.expect("infallible")
    }

    pub async fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: impl Into<Body>) -> Answered {
        let response = self.send(method, path, headers, body).await;
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.expect("a body").to_bytes();
        Answered {
            status: parts.status.as_u16(),
            headers: parts.headers,
            text: String::from_utf8(bytes.to_vec()).expect("text"),
        }
    }

    pub async fn post(&self, path: &str, body: Value) -> Answered {
        self.request("POST", path, &[], body.to_string()).await
    }

    pub async fn get(&self, path: &str) -> Answered {
        self.request("GET", path, &[], Body::empty()).await
    }
}
