//! One worker process from its start to its end: brings its ranks up, and, where it holds rank 0, serves the
//! group and keeps it announced.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bora_common::blocks::BLOCK_TOKENS;
use bora_common::config::{HostPort, ModelOptions};
use bora_common::model::ModelConfig;
use bora_common::registry::{
    Device, GroupRecord, GroupState, MemoryRegistry, RankRecord, Registry, RegistryError, RendezvousOffer,
    RendezvousRecord, Speed,
};
use bora_common::tls::{Acceptor, TlsError};
use bora_proto::v1;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::backend::Limits;
use crate::backend::fake::FakeRunner;
use crate::device;
use crate::engine::step::{RunError, StepRunner};
use crate::engine::{EngineConfig, EngineHandle, EngineStartError, calibrate};
use crate::grammar::PendingGrammars;
use crate::options::WorkerOptions;
use crate::parallel::{
    FollowError, FollowerOptions, GroupProgress, LeaderOptions, MemberOptions, StartError, Timeouts, follow,
    start_group,
};
use crate::service::{self, Host, RankSource, ServeError, ServiceOptions};
use crate::telemetry::{self, WorkerMetrics};

/// Longest window where nothing is said: what the models are advertised for.
const LONGEST_WINDOW: u32 = 262_144;
/// How often a follower looks for its leader.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// How long a follower tries an address from the registry before it looks there again.
const LOOK_UP_AGAIN_AFTER: Duration = Duration::from_secs(5);
/// How long the registry may take to forget a group that failed.
const WITHDRAW_WITHIN: Duration = Duration::from_secs(1);

/// What a process is told.
#[derive(Clone)]
pub struct WorkerSettings {
    /// The `worker` section.
    pub options: WorkerOptions,
    /// The model it runs.
    pub model: ModelOptions,
    /// What it tells of itself.
    pub metrics: Arc<WorkerMetrics>,
}

/// Why a worker could not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// A port.
    #[error("{field}: listening on {address}: {error}")]
    Listen {
        /// Of the configuration.
        field: &'static str,
        /// Where.
        address: HostPort,
        /// Why not.
        error: std::io::Error,
    },
    /// The device is not there.
    #[error("worker.device: {0}")]
    Device(String),
    /// The values can't work with this model.
    #[error("{0}")]
    Options(String),
    /// The ranks could not be brought up.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A group of several processes, and this one can't find or follow its leader.
    #[error(transparent)]
    Follow(#[from] FollowError),
    /// The leader is not to be found.
    #[error("group `{group}`: no process with rank 0 was found within {seconds} s")]
    NoLeader {
        /// The group.
        group: String,
        /// How long it was looked for.
        seconds: u64,
    },
    /// The registry refused.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The engine could not start.
    #[error(transparent)]
    Engine(#[from] EngineStartError),
    /// A step failed while the group was measured.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The certificates can't be used.
    #[error("grpc.tls: {0}")]
    Tls(#[from] TlsError),
    /// The port can't be served any more.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The group can't go on.
    #[error("group `{group}` failed: {reason}")]
    GroupFailed {
        /// The group.
        group: String,
        /// Which rank, and why.
        reason: String,
    },
}

/// Runs one worker process until `stop` is cancelled (then it drains and returns `Ok`) or the group fails.
pub async fn run(
    settings: WorkerSettings,
    registry: Arc<dyn Registry>,
    stop: CancellationToken,
) -> Result<(), WorkerError> {
    let closing = CancellationToken::new();
    let _close_on_exit = closing.clone().drop_guard();
    if let Some(address) = &settings.options.admin {
        let listener = listen("worker.admin", address).await?;
        tracing::info!(address = %address, "metrics are served");
        tokio::spawn(telemetry::serve(listener, Arc::clone(&settings.metrics), closing));
    }
    let device = device::choose(&settings.options)?;
    if settings.options.local_ranks().first() == Some(&0) {
        lead(settings, device, registry, stop).await
    } else {
        follow_leader(settings, device, registry, stop).await
    }
}

/// The ranks of a group, ready to run steps.
struct Ranks {
    runner: Box<dyn StepRunner>,
    facts: Facts,
    records: Vec<RankRecord>,
    progress: Option<Arc<GroupProgress>>,
    /// The group's first failure, also while no step runs.
    failed: Option<tokio::sync::watch::Receiver<Option<RunError>>>,
    speed: Speed,
    /// Steps run so far.
    steps: u64,
    /// The model, where there is one.
    model: Option<ModelConfig>,
}

/// What the group's record says of the model.
struct Facts {
    kv_blocks: u32,
    vocabulary_size: u32,
    max_position: u32,
    fingerprint: String,
    eos_ids: Vec<u32>,
}

async fn lead(
    settings: WorkerSettings,
    device: Device,
    registry: Arc<dyn Registry>,
    stop: CancellationToken,
) -> Result<(), WorkerError> {
    let options = &settings.options;
    let listener = listen("worker.listen", &options.listen).await?;
    let port = listener.local_addr().map_or(options.listen.port, |address| address.port());
    let endpoint = match &options.advertise {
        Some(address) => address.clone(),
        None => HostPort { host: options.listen.host.clone(), port },
    };
    let health = match &options.health {
        Some(address) => Some(listen("worker.health", address).await?),
        None => None,
    };
    let tls = options.tls.as_ref().map(Acceptor::for_grpc).transpose()?;
    let group = options.group.clone().unwrap_or_else(|| format!("{}-{port}", host_name()));
    let epoch = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);

    let host = Host::loading();
    let closing = CancellationToken::new();
    let _close_on_exit = closing.clone().drop_guard();
    let serving = tokio::spawn(service::serve(
        listener,
        host.clone(),
        ServiceOptions { tls, health, ..ServiceOptions::default() },
        closing.clone().cancelled_owned(),
    ));

    settings.metrics.of_group(&settings.model.name, &group, device, &options.local_ranks());
    let opened = tokio::select! {
        opened = open(&settings, device, &group, epoch, endpoint.to_string(), registry.as_ref()) => opened?,
        () = stop.cancelled() => return Ok(()),
    };
    let OpenGroup { engine, record, progress, failed } = opened;
    settings.metrics.of_leader(engine.observer(), &record, progress.clone());
    host.ready(engine.clone(), record.clone(), rank_source(&record, progress));
    let announcement = registry.announce(record).await?;

    let reason = tokio::select! {
        () = stop.cancelled() => None,
        reason = engine.failed() => Some(reason),
        reason = idle_failure(failed) => Some(reason),
        ended = serving => {
            ended.unwrap_or(Ok(()))?;
            Some("its port was closed".into())
        }
    };
    if let Some(reason) = reason {
        tracing::error!(group, reason, "the group failed, ending so that it can be started again");
        // streams are told "retry elsewhere" by the engine; give the words a moment to leave
        let _ = timeout(WITHDRAW_WITHIN, announcement.withdraw()).await;
        return Err(WorkerError::GroupFailed { group, reason });
    }
    announcement.update(|record| record.state = GroupState::Draining);
    match engine.drain(options.drain_seconds).await {
        Ok((finished, unfinished)) => tracing::info!(group, finished, unfinished, "drained"),
        Err(error) => tracing::warn!(group, %error, "not drained"),
    }
    announcement.withdraw().await;
    Ok(())
}

/// A group whose ranks are up and whose engine runs.
struct OpenGroup {
    engine: EngineHandle,
    record: GroupRecord,
    progress: Option<Arc<GroupProgress>>,
    failed: Option<tokio::sync::watch::Receiver<Option<RunError>>>,
}

/// Starts a group of one process and its engine, without serving it: for benchmarks of the engine itself. The engine
/// ends when the handle is dropped.
pub async fn open_engine(settings: WorkerSettings) -> Result<(EngineHandle, GroupRecord), WorkerError> {
    let device = device::choose(&settings.options)?;
    let registry = MemoryRegistry::new();
    let opened = open(&settings, device, "engine", 1, String::new(), &registry).await?;
    Ok((opened.engine, opened.record))
}

/// Brings the ranks up, measures them and starts the engine on them.
async fn open(
    settings: &WorkerSettings,
    device: Device,
    group: &str,
    epoch: u64,
    endpoint: String,
    registry: &dyn Registry,
) -> Result<OpenGroup, WorkerError> {
    let started = Instant::now();
    let grammars = load_grammars(settings)?;
    let ranks = bring_up(settings, device, group, epoch, grammars.clone(), registry).await?;
    let record = describe(settings, device, group, epoch, endpoint, &ranks)?;
    if device == Device::Fake {
        tracing::warn!(group, "this group is fake: it has no model and only pretends to answer");
    }
    tracing::info!(
        group, epoch, endpoint = record.endpoint, model = record.model, device = ?device, ranks = record.ranks.len(),
        kv_blocks = record.kv_blocks, max_model_len = record.max_model_len,
        prefill_tokens_per_second = record.speed.prefill_tokens_per_second.round(),
        decode_step_seconds = record.speed.decode_step_seconds,
        seconds = started.elapsed().as_secs_f64(), "group is ready"
    );
    let mut config = EngineConfig::of_group(&record, ranks.facts.eos_ids, settings.options.schedule.clone());
    // on GPUs by request, until it was measured there; a fake keeps the pace that it was told
    if device == Device::Cpu {
        config.options.speculative.get_or_insert_default();
    }
    config.steps_run = ranks.steps;
    config.host = ranks.runner.host_memory();
    // the ranks have waited for them
    config.grammars = grammars.wait().map_err(WorkerError::Options)?;
    if let Some(grammars) = &config.grammars {
        settings.metrics.of_grammars(grammars);
    }
    let (engine, _thread) = EngineHandle::start(config, ranks.runner)?;
    if let Some(floors) = ranks.model.as_ref().and_then(|model| device::floors(device, &settings.options, model)) {
        engine.metrics().know_floors(floors);
    }
    Ok(OpenGroup { engine, record, progress: ranks.progress, failed: ranks.failed })
}

/// Completes when a rank failed while no step ran.
async fn idle_failure(failed: Option<tokio::sync::watch::Receiver<Option<RunError>>>) -> String {
    if let Some(mut failed) = failed {
        // an error means that the runner was dropped: then the engine says why
        let reason = match failed.wait_for(Option::is_some).await {
            Ok(error) => error.as_ref().map(ToString::to_string),
            Err(_) => None,
        };
        if let Some(reason) = reason {
            return reason;
        }
    }
    std::future::pending().await
}

async fn bring_up(
    settings: &WorkerSettings,
    device: Device,
    group: &str,
    epoch: u64,
    grammars: PendingGrammars,
    registry: &dyn Registry,
) -> Result<Ranks, WorkerError> {
    let options = &settings.options;
    if device == Device::Fake {
        return Ok(fake_ranks(options));
    }
    let size = options.tensor_parallel_size;
    let (mut peers, mut _offer): (_, Option<RendezvousOffer>) = (None, None);
    if options.local_ranks().len() < size as usize {
        let listener = listen("worker.peers", &options.peers).await?;
        let port = listener.local_addr().map_or(options.peers.port, |address| address.port());
        let leader = HostPort { host: own_host(options), port }.to_string();
        let record = RendezvousRecord { group: group.into(), epoch, leader, world_size: size };
        match registry.offer_rendezvous(record).await {
            Ok(offer) => _offer = Some(offer),
            // followers are told the address by their configuration
            Err(RegistryError::Unsupported { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        peers = Some(listener);
    }
    let model_len = options.max_model_len.unwrap_or(LONGEST_WINDOW) as usize;
    let leader = LeaderOptions {
        member: member_options(settings, device, group, grammars)?,
        epoch,
        limits: Limits {
            step_tokens: options.schedule.max_num_batched_tokens as usize,
            sequences: options.schedule.max_num_seqs as usize,
            model_len,
            logit_rows: options.schedule.max_logit_rows(),
        },
        peers,
    };
    let mut started = start_group(leader).await?;
    let kv_blocks = started.kv_blocks;
    let positions = (kv_blocks * BLOCK_TOKENS).min(model_len);
    let chunk = device::calibration_tokens(device).min(options.schedule.max_num_batched_tokens as usize);
    let (runner, measured) = blocking(move || {
        let measured = calibrate(&mut started.runner, chunk, positions);
        (started, measured)
    })
    .await;
    let started = runner;
    let (speed, steps) = measured?;
    Ok(Ranks {
        facts: Facts {
            kv_blocks: kv_blocks as u32,
            vocabulary_size: started.model.vocab_size as u32,
            max_position: started.model.max_position_embeddings as u32,
            fingerprint: started.fingerprint,
            eos_ids: started.model.eos_token_ids.clone(),
        },
        model: Some(started.model),
        runner: Box::new(started.runner),
        records: started.ranks,
        progress: Some(started.progress),
        failed: Some(started.failed),
        speed,
        steps,
    })
}

fn fake_ranks(options: &WorkerOptions) -> Ranks {
    let mut fake = options.fake.clone();
    fake.kv_blocks = options.kv_cache.blocks.unwrap_or(fake.kv_blocks);
    fake.max_model_len = options.max_model_len.unwrap_or(fake.max_model_len);
    let records = (0..options.tensor_parallel_size)
        .map(|rank| RankRecord { rank, host: host_name(), pid: std::process::id() })
        .collect();
    Ranks {
        facts: Facts {
            kv_blocks: fake.kv_blocks,
            vocabulary_size: fake.vocabulary_size,
            max_position: fake.max_model_len,
            fingerprint: "fake".into(),
            eos_ids: vec![fake.eos_id],
        },
        records,
        progress: None,
        failed: None,
        speed: fake.speed(),
        steps: 0,
        model: None,
        runner: Box::new(FakeRunner::new(fake)),
    }
}

fn member_options(
    settings: &WorkerSettings,
    device: Device,
    group: &str,
    grammars: PendingGrammars,
) -> Result<MemberOptions, WorkerError> {
    let options = &settings.options;
    let ranks = options.local_ranks();
    let (first, last) = (ranks.first().copied().unwrap_or(0), ranks.last().copied().unwrap_or(0));
    Ok(MemberOptions {
        group: group.into(),
        model_dir: settings.model.path.clone(),
        load_format: options.load_format,
        seed: 0,
        device: device::options_of(device, options)?,
        ranks: options.tensor_parallel_size as usize,
        local_ranks: first as usize..last as usize + 1,
        kv: device::kv_budget(device, options),
        host_bytes: options.kv_cache.host_memory.map_or(0, |memory| memory.0),
        host: own_host(options),
        timeouts: Timeouts {
            join: options.rendezvous_seconds,
            heartbeat: options.heartbeat_seconds,
            collective: options.collective_seconds,
        },
        grammars,
        tls: options.tls.clone(),
    })
}

/// Begins to make what compiles grammars, where the model has a tokenizer.
fn load_grammars(settings: &WorkerSettings) -> Result<PendingGrammars, WorkerError> {
    let Some(path) = settings.model.tokenizer_path().map(Path::to_owned) else { return Ok(PendingGrammars::none()) };
    PendingGrammars::load(path)
        .map_err(|error| WorkerError::Options(format!("no thread to read the tokenizer: {error}")))
}

/// The group's record, with the window that its cache has room for.
fn describe(
    settings: &WorkerSettings,
    device: Device,
    group: &str,
    epoch: u64,
    endpoint: String,
    ranks: &Ranks,
) -> Result<GroupRecord, WorkerError> {
    let facts = &ranks.facts;
    let room = facts.kv_blocks.saturating_mul(BLOCK_TOKENS as u32);
    let window = match settings.options.max_model_len {
        Some(asked) if asked > facts.max_position => {
            return Err(WorkerError::Options(format!(
                "worker.max_model_len: {asked} is beyond the model's {} positions",
                facts.max_position
            )));
        }
        Some(asked) if asked > room => {
            return Err(WorkerError::Options(format!(
                "worker.max_model_len: {asked} tokens do not fit into a KV cache of {} blocks ({room} tokens)",
                facts.kv_blocks
            )));
        }
        Some(asked) => asked,
        None => {
            let window = facts.max_position.min(LONGEST_WINDOW);
            if window > room {
                tracing::warn!(window, room, "the KV cache holds less than the model's window: serving what fits");
            }
            window.min(room)
        }
    };
    Ok(GroupRecord {
        group: group.into(),
        epoch,
        endpoint,
        model: settings.model.name.clone(),
        aliases: settings.model.aliases.clone(),
        device,
        weight_fingerprint: facts.fingerprint.clone(),
        ranks: ranks.records.clone(),
        block_tokens: BLOCK_TOKENS as u32,
        kv_blocks: facts.kv_blocks,
        max_model_len: window,
        vocabulary_size: facts.vocabulary_size,
        max_sequences: settings.options.schedule.max_num_seqs,
        images: device == Device::Fake && settings.options.fake.images,
        speed: ranks.speed,
        state: GroupState::Ready,
        version: env!("CARGO_PKG_VERSION").into(),
    })
}

/// How the ranks are, for `Admin.Status`.
fn rank_source(record: &GroupRecord, progress: Option<Arc<GroupProgress>>) -> RankSource {
    let ranks = record.ranks.clone();
    Arc::new(move || {
        let steps = progress.as_ref().map(|progress| progress.steps()).unwrap_or_default();
        ranks
            .iter()
            .map(|rank| v1::RankStatus {
                rank: rank.rank,
                host: rank.host.clone(),
                pid: rank.pid,
                steps: steps.get(rank.rank as usize).copied().unwrap_or(0),
                ..Default::default()
            })
            .collect()
    })
}

async fn follow_leader(
    settings: WorkerSettings,
    device: Device,
    registry: Arc<dyn Registry>,
    stop: CancellationToken,
) -> Result<(), WorkerError> {
    let options = &settings.options;
    if device == Device::Fake {
        return Err(WorkerError::Options("worker.ranks: a fake group is one process".into()));
    }
    let Some(group) = options.group.clone() else {
        return Err(WorkerError::Options("worker.group: a group of several processes needs a name".into()));
    };
    let deadline = Instant::now() + options.rendezvous_seconds;
    settings.metrics.of_group(&settings.model.name, &group, device, &options.local_ranks());
    let grammars = load_grammars(&settings)?;
    let (pending, metrics) = (grammars.clone(), settings.metrics.clone());
    tokio::task::spawn_blocking(move || {
        if let Ok(Some(grammars)) = pending.wait() {
            metrics.of_grammars(&grammars);
        }
    });
    loop {
        let (leader, epoch) = tokio::select! {
            found = find_leader(options, &group, registry.as_ref()) => found?,
            () = stop.cancelled() => return Ok(()),
        };
        tracing::info!(group, leader, epoch, ranks = ?options.local_ranks(), "joining the group");
        // an address from the registry may be that of a leader that has just died: it is looked up again
        let looked_up = options.leader.is_none();
        let connect_within = if looked_up { LOOK_UP_AGAIN_AFTER } else { options.rendezvous_seconds };
        let member = member_options(&settings, device, &group, grammars.clone())?;
        let following = FollowerOptions { member, leader, epoch, connect_within };
        let ended = tokio::select! {
            ended = follow(following) => ended,
            () = drained(&stop, options.drain_seconds) => return Ok(()),
        };
        match ended {
            Ok(reason) => {
                tracing::info!(group, reason, "the group ended");
                return Ok(());
            }
            Err(error) if stop.is_cancelled() => {
                // the leader's goodbye may be lost when its process ends right after it
                tracing::info!(group, %error, "the group ended");
                return Ok(());
            }
            Err(FollowError::Unreachable { .. } | FollowError::OtherEpoch { .. })
                if looked_up && Instant::now() < deadline =>
            {
                sleep(LOOK_AGAIN).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Completes when a follower that was told to stop may go. All processes of a group are told so at the same
/// time, and the leader lets running sequences finish before it says goodbye: until then it needs its ranks.
async fn drained(stop: &CancellationToken, drain: Duration) {
    stop.cancelled().await;
    tracing::info!(seconds = drain.as_secs(), "staying until the leader has drained");
    sleep(drain).await;
}

async fn find_leader(
    options: &WorkerOptions,
    group: &str,
    registry: &dyn Registry,
) -> Result<(String, Option<u64>), WorkerError> {
    if let Some(leader) = &options.leader {
        return Ok((leader.to_string(), None));
    }
    let deadline = Instant::now() + options.rendezvous_seconds;
    loop {
        match registry.find_rendezvous(group).await {
            Ok(Some(record)) => return Ok((record.leader, Some(record.epoch))),
            Ok(None) => {}
            Err(error @ RegistryError::Unsupported { .. }) => return Err(error.into()),
            Err(error) => tracing::debug!(group, %error, "looking for the leader"),
        }
        if Instant::now() >= deadline {
            return Err(WorkerError::NoLeader { group: group.into(), seconds: options.rendezvous_seconds.as_secs() });
        }
        sleep(LOOK_AGAIN).await;
    }
}

async fn listen(field: &'static str, address: &HostPort) -> Result<TcpListener, WorkerError> {
    TcpListener::bind((address.host.as_str(), address.port)).await.map_err(|error| WorkerError::Listen {
        field,
        address: address.clone(),
        error,
    })
}

/// Under what the group's other processes reach this one.
fn own_host(options: &WorkerOptions) -> String {
    options.host.clone().unwrap_or_else(|| options.listen.host.clone())
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .unwrap_or_else(|_| "localhost".into())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let handle: JoinHandle<T> = tokio::task::spawn_blocking(work);
    match handle.await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
