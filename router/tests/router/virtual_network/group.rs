//! A group that computes nothing: what it says to a prompt is drawn from the prompt and the seed. It speaks real gRPC,
//! has a prefix cache of which it reports, and goes wrong on command.

use std::{
    collections::{BTreeSet, VecDeque},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use bora_common::{
    blocks::{BlockHash, hash_blocks},
    peer::{
        Mismatch, ServerIdentity,
        identity::{self, Named},
    },
    registry::GroupRecord,
};
use bora_proto::v1::{
    BlocksChanged, DescribeRequest, DescribeResponse, FinishReason, Finished, GenerateEvent, GenerateRequest,
    GroupEvent, Load, Snapshot, Started, State, Tokens, WatchRequest,
    generate_event::Event as Said,
    group_event::Event as Update,
    inference_server::{Inference, InferenceServer},
};
use bora_router::RouterOptions;
use parking_lot::Mutex;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::{sync::mpsc, time::sleep};
use tokio_stream::{
    Stream,
    wrappers::{ReceiverStream, UnboundedReceiverStream},
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, metadata::MetadataMap};

use super::wire::{Network, Path, Setting};
use crate::{
    support::keys,
    virtual_time::{MAX_SEQUENCES, record},
};

pub(super) const END: u32 = 2;
const KEPT_BLOCKS: usize = 60;
const SIGN_OF_LIFE: Duration = Duration::from_millis(500);
const STEP: Duration = Duration::from_millis(120);

/// The whole response to a prompt, and why it ends there.
pub(super) fn response(prompt: &[u32], seed: u64) -> (Vec<u32>, FinishReason) {
    let mut hasher = DefaultHasher::new();
    (prompt, seed).hash(&mut hasher);
    let mut random = StdRng::seed_from_u64(hasher.finish());
    let length = random.random_range(1..120);
    let mut ids: Vec<u32> = (0..length).map(|_| random.random_range(100..100_000)).collect();
    if random.random_bool(0.3) {
        return (ids, FinishReason::Length);
    }
    ids.push(END);
    (ids, FinishReason::Stop)
}

pub(super) fn bytes<'a>(hashes: impl IntoIterator<Item = &'a BlockHash>) -> Vec<u8> {
    hashes.into_iter().flat_map(|hash| hash.to_bytes()).collect()
}

struct Watcher {
    events: mpsc::UnboundedSender<Result<GroupEvent, Status>>,
    sequence: u64,
}

impl Watcher {
    /// False where nobody listens any more.
    fn report(&mut self, epoch: u64, event: Update) -> bool {
        self.sequence += 1;
        let event = GroupEvent { epoch, sequence: self.sequence, event: Some(event) };
        self.events.send(Ok(event)).is_ok()
    }
}

#[derive(Default)]
struct Inside {
    /// The oldest first.
    kept: VecDeque<BlockHash>,
    watchers: Vec<Watcher>,
    running: u32,
    /// Sequences of other routers.
    of_others: u32,
    /// Requests that reached it.
    asked: u32,
    /// Requests that it had no room for.
    refused: u32,
    loses_next: bool,
}

/// One process.
pub(super) struct Group {
    pub(super) record: GroupRecord,
    life: CancellationToken,
    /// Changes where its engine begins anew within the process.
    epoch: Setting<u64>,
    is_frozen: Setting<bool>,
    is_draining: Setting<bool>,
    is_closed: Setting<bool>,
    inside: Mutex<Inside>,
}

impl Group {
    pub(super) fn start(network: &Network, host: &str, name: &str, epoch: u64, path: Arc<Setting<Path>>) -> Arc<Self> {
        let life = CancellationToken::new();
        let group = Arc::new(Self {
            record: GroupRecord { endpoint: format!("{host}:80"), ..record(name, epoch) },
            life: life.clone(),
            epoch: Setting::new(epoch),
            is_frozen: Setting::new(false),
            is_draining: Setting::new(false),
            is_closed: Setting::new(false),
            inside: Mutex::default(),
        });
        let incoming = network.listen(host, path, life.clone());
        let service = InferenceServer::new(Leader(Arc::clone(&group)));
        let server = tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming);
        tokio::spawn(life.clone().run_until_cancelled_owned(server));
        tokio::spawn(life.run_until_cancelled_owned(Arc::clone(&group).tells_that_it_lives()));
        group
    }

    async fn tells_that_it_lives(self: Arc<Self>) {
        loop {
            self.take(SIGN_OF_LIFE).await;
            self.report(Update::Load(Load { running: self.running(), ..Load::default() }));
        }
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch.get()
    }

    /// As the guard of a real server does, but that its epoch changes.
    fn check_identity(&self, metadata: &MetadataMap) -> Result<(), Status> {
        let expected =
            metadata.get_bin(identity::METADATA).and_then(|value| identity::decode(value.as_encoded_bytes()));
        let record = GroupRecord { epoch: self.epoch(), ..self.record.clone() };
        let own = ServerIdentity::of_record(RouterOptions::default().cluster, &record);
        let named = Named { epoch: true, weights: true };
        Ok(own.check(&expected.ok_or(Mismatch::Malformed)?, named)?)
    }

    pub(super) fn running(&self) -> u32 {
        let inside = self.inside.lock();
        inside.running + inside.of_others
    }

    /// So many sequences are of other routers from now on.
    pub(super) fn run_of_others(&self, count: u32) {
        self.inside.lock().of_others = count;
    }

    pub(super) fn asked(&self) -> u32 {
        self.inside.lock().asked
    }

    pub(super) fn refused(&self) -> u32 {
        self.inside.lock().refused
    }

    pub(super) fn holds(&self) -> BTreeSet<u128> {
        self.inside.lock().kept.iter().map(|hash| hash.0).collect()
    }

    pub(super) fn kill(&self) {
        self.life.cancel();
    }

    /// It makes no progress, and its connections live.
    pub(super) fn freeze(&self, is_frozen: bool) {
        self.is_frozen.set(is_frozen);
    }

    pub(super) fn drain(&self, is_draining: bool) {
        self.is_draining.set(is_draining);
        self.report(self.state());
    }

    /// It has no room for anything new, whatever it reports its load.
    pub(super) fn close(&self, is_closed: bool) {
        self.is_closed.set(is_closed);
    }

    /// The next event gets its number, and no further.
    pub(super) fn lose_next_event(&self) {
        self.inside.lock().loses_next = true;
    }

    /// The engine begins anew: an empty cache, and nothing runs.
    pub(super) fn begin_anew(&self, epoch: u64) {
        self.inside.lock().kept.clear();
        self.epoch.set(epoch);
        self.report(self.state());
    }

    fn state(&self) -> Update {
        Update::State(if self.is_draining.get() { State::Draining } else { State::Ready } as i32)
    }

    /// Time in which it does something.
    async fn take(&self, time: Duration) {
        sleep(time).await;
        self.is_frozen.until(|is_frozen| !is_frozen).await;
    }

    fn report(&self, reported: Update) {
        let mut inside = self.inside.lock();
        let is_lost = std::mem::take(&mut inside.loses_next);
        let epoch = self.epoch();
        if is_lost {
            return inside.watchers.iter_mut().for_each(|watcher| watcher.sequence += 1);
        }
        inside.watchers.retain_mut(|watcher| watcher.report(epoch, reported.clone()));
    }

    /// Keeps blocks and reports them, and of those that had to go.
    fn store(&self, hashes: &[BlockHash]) {
        let mut inside = self.inside.lock();
        let new: Vec<BlockHash> = hashes.iter().copied().filter(|hash| !inside.kept.contains(hash)).collect();
        inside.kept.extend(&new);
        let too_many = inside.kept.len().saturating_sub(KEPT_BLOCKS);
        let evicted: Vec<BlockHash> = inside.kept.drain(..too_many).collect();
        drop(inside);
        let (stored, evicted) = (bytes(&new).into(), bytes(&evicted).into());
        self.report(Update::Blocks(BlocksChanged { stored, evicted }));
    }

    /// Says the rest of a response, for as long as somebody listens.
    async fn say(&self, request: &GenerateRequest, said: &mpsc::Sender<Result<GenerateEvent, Status>>) -> Option<()> {
        let say = async |event| said.send(Ok(GenerateEvent { event: Some(event) })).await.ok();
        let begun = request.generated_len as usize;
        let prompt = &request.token_ids[..request.token_ids.len() - begun];
        let seed = request.sampling.as_ref().map_or(0, |sampling| sampling.seed);
        let (ids, reason) = response(prompt, seed);
        if !ids.starts_with(&request.token_ids[prompt.len()..]) {
            said.send(Err(Status::internal("what was generated before is not what a group says here"))).await.ok()?;
        }
        let hashes = hash_blocks(&keys(), b"", &[], &request.token_ids);
        let kept = self.holds();
        let cached_tokens = 64 * hashes.iter().take_while(|hash| kept.contains(&hash.0)).count() as u32;
        let prompt_tokens = prompt.len() as u32;
        self.take(STEP).await;
        say(Said::Started(Started { prompt_tokens, cached_tokens, queued_seconds: 0.0 })).await?;
        self.take(STEP).await;
        self.store(&hashes);
        let mut at = begun;
        while at < ids.len() {
            let next = (at + 1 + ids[at] as usize % 4).min(ids.len());
            say(Said::Tokens(Tokens { token_ids: ids[at..next].to_vec(), logprobs: Vec::new() })).await?;
            at = next;
            self.take(STEP).await;
        }
        self.store(&hash_blocks(&keys(), b"", &[], &[prompt, &ids].concat()));
        let (reason, completion_tokens) = (reason as i32, ids.len() as u32);
        say(Said::Finished(Finished { reason, prompt_tokens, cached_tokens, completion_tokens, timing: None })).await
    }
}

/// As it is called.
struct Leader(Arc<Group>);

type Boxed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Inference for Leader {
    type GenerateStream = Boxed<GenerateEvent>;
    type WatchStream = Boxed<GroupEvent>;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let group = Arc::clone(&self.0);
        group.inside.lock().asked += 1;
        group.check_identity(request.metadata())?;
        group.take(Duration::ZERO).await;
        if group.is_draining.get() {
            return Err(Status::unavailable("draining"));
        }
        if group.is_closed.get() || group.running() >= MAX_SEQUENCES {
            group.inside.lock().refused += 1;
            return Err(Status::resource_exhausted("full"));
        }
        group.inside.lock().running += 1;
        let (said, heard) = mpsc::channel(16);
        let epoch = group.epoch();
        tokio::spawn(async move {
            let request = request.into_inner();
            let last_word = tokio::select! {
                biased;
                () = said.closed() => None,
                () = group.epoch.until(|now| now != epoch) => Some(Err(Status::unavailable("the engine began anew"))),
                () = group.is_draining.until(|is_draining| is_draining) => {
                    let finished = Finished { reason: FinishReason::Aborted as i32, ..Finished::default() };
                    Some(Ok(GenerateEvent { event: Some(Said::Finished(finished)) }))
                }
                _ = group.say(&request, &said) => None,
            };
            group.inside.lock().running -= 1;
            if let Some(last_word) = last_word {
                let _ = said.send(last_word).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(heard))))
    }

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let group = &self.0;
        group.check_identity(request.metadata())?;
        group.take(Duration::ZERO).await;
        let (events, reported) = mpsc::unbounded_channel();
        let mut inside = group.inside.lock();
        let kept: Vec<BlockHash> = inside.kept.iter().copied().collect();
        let (first, rest) = kept.split_at(kept.len() / 2);
        let snapshot = |part, last| Update::Snapshot(Snapshot { block_hashes: bytes(part).into(), last });
        let load = Load { running: inside.running + inside.of_others, ..Load::default() };
        let mut watcher = Watcher { events, sequence: 0 };
        for event in [snapshot(first, false), snapshot(rest, true), group.state(), Update::Load(load)] {
            watcher.report(group.epoch(), event);
        }
        inside.watchers.push(watcher);
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(reported))))
    }

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        Err(Status::unimplemented("not needed here"))
    }
}
