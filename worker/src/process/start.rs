//! Start of a group: starts and measures its ranks, and starts the engine on them.

use std::sync::Arc;
use std::time::Instant;

use bora_common::blocks::BLOCK_TOKENS;
use bora_common::config::HostPort;
use bora_common::model::ModelConfig;
use bora_common::registry::{
    Device, GroupRecord, GroupState, MemoryRegistry, RankRecord, Registry, RegistryError, RendezvousOffer,
    RendezvousRecord, Speed,
};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::{WorkerError, WorkerSettings, host_name, listen, load_grammars, member_options, own_host};
use crate::backend::Limits;
use crate::backend::fake::FakeRunner;
use crate::device;
use crate::engine::step::{RunError, StepRunner};
use crate::engine::{EngineConfig, EngineHandle, calibrate};
use crate::grammar::PendingGrammars;
use crate::options::WorkerOptions;
use crate::parallel::{GroupProgress, LeaderOptions, start_group};

/// Default limit of the context window: the window that the models are advertised with.
const MAX_WINDOW: u32 = 262_144;

/// The ranks of a group, ready to run steps.
struct Ranks {
    runner: Box<dyn StepRunner>,
    facts: Facts,
    records: Vec<RankRecord>,
    progress: Option<Arc<GroupProgress>>,
    /// First failure of the group, even while no step runs.
    failed: Option<watch::Receiver<Option<RunError>>>,
    speed: Speed,
    /// Steps run so far.
    steps: u64,
    /// The model; `None` for a fake group.
    model: Option<ModelConfig>,
}

/// Model-dependent fields of the group's record.
struct Facts {
    kv_blocks: u32,
    vocabulary_size: u32,
    max_position: u32,
    fingerprint: String,
    eos_ids: Vec<u32>,
}

/// A group with started ranks and a running engine.
pub(super) struct OpenGroup {
    pub(super) engine: EngineHandle,
    pub(super) record: GroupRecord,
    pub(super) progress: Option<Arc<GroupProgress>>,
    pub(super) failed: Option<watch::Receiver<Option<RunError>>>,
}

/// Starts a group of one process and its engine without serving it, for benchmarks of the engine. The engine ends when
/// the handle is dropped.
pub async fn open_engine(settings: WorkerSettings) -> Result<(EngineHandle, GroupRecord), WorkerError> {
    let device = device::choose(&settings.options)?;
    let registry = MemoryRegistry::new();
    settings.metrics.of_group(&settings.model.name, "engine", device, &settings.options.local_ranks());
    let opened = open(&settings, device, "engine", 1, String::new(), &registry).await?;
    settings.metrics.of_leader(opened.engine.observer(), &opened.record, None);
    Ok((opened.engine, opened.record))
}

/// Record of a group that is about to load, from its configuration and its checkpoint. Speed, cache and weights are not
/// known yet.
pub(super) fn loading_record(
    settings: &WorkerSettings,
    device: Device,
    group: &str,
    epoch: u64,
    endpoint: String,
) -> GroupRecord {
    let options = &settings.options;
    let (vocabulary_size, max_position) = match device {
        Device::Fake => (options.fake.vocabulary_size, options.fake.max_model_len),
        // an unreadable checkpoint is reported when it is opened
        Device::Cpu | Device::Cuda => ModelConfig::from_dir(&settings.model.path)
            .map_or((0, 0), |model| (model.vocab_size as u32, model.max_position_embeddings as u32)),
    };
    GroupRecord {
        group: group.into(),
        epoch,
        endpoint,
        model: settings.model.name.clone(),
        aliases: settings.model.aliases.clone(),
        device,
        weight_fingerprint: String::new(),
        cache_key_id: settings.keys.cache_key_id().into(),
        ranks: Vec::new(),
        block_tokens: BLOCK_TOKENS as u32,
        kv_blocks: 0,
        host_blocks: 0,
        max_model_len: options.max_model_len.unwrap_or(max_position.min(MAX_WINDOW)),
        vocabulary_size,
        max_sequences: options.schedule.max_num_seqs,
        images: device == Device::Fake && options.fake.images,
        speed: Speed { prefill_tokens_per_second: 1.0, prefill_seconds_per_token_pair: 0.0, decode_step_seconds: 1.0 },
        state: GroupState::Loading,
        version: env!("CARGO_PKG_VERSION").into(),
        contract: bora_common::version::CONTRACT,
    }
}

/// Starts the ranks, measures them and starts the engine on them.
pub(super) async fn open(
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
        tracing::warn!(group, "this group is fake: it has no model and generates scripted tokens");
    }
    tracing::info!(
        group, epoch, endpoint = record.endpoint, model = record.model, device = ?device, ranks = record.ranks.len(),
        kv_blocks = record.kv_blocks, max_model_len = record.max_model_len,
        prefill_tokens_per_second = record.speed.prefill_tokens_per_second.round(),
        decode_step_seconds = record.speed.decode_step_seconds,
        seconds = started.elapsed().as_secs_f64(), "group is ready"
    );
    let mut config =
        EngineConfig::of_group(&record, ranks.facts.eos_ids, settings.options.schedule.clone(), settings.keys.clone());
    // speculation is opt-in on GPUs until it is measured there; a fake keeps its configured pace
    if device == Device::Cpu {
        config.options.speculative.get_or_insert_default();
    }
    config.steps_run = ranks.steps;
    config.host = ranks.runner.host_memory();
    config.least_chunk = ranks.runner.least_chunk();
    // the ranks have already waited for the grammars
    config.grammars = grammars.wait().map_err(WorkerError::Options)?;
    if let Some(grammars) = &config.grammars {
        settings.metrics.of_grammars(grammars);
    }
    let (engine, _thread) = EngineHandle::start(config, ranks.runner)?;
    if let Some(rooflines) = ranks.model.as_ref().and_then(|model| device::rooflines(device, &settings.options, model))
    {
        engine.metrics().set_rooflines(rooflines);
    }
    Ok(OpenGroup { engine, record, progress: ranks.progress, failed: ranks.failed })
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
        let record = RendezvousRecord {
            group: group.into(),
            epoch,
            leader,
            world_size: size,
            revision: options.revision.clone(),
            contract: bora_common::version::CONTRACT,
        };
        match registry.offer_rendezvous(record).await {
            Ok(offer) => _offer = Some(offer),
            // followers get the address from their configuration
            Err(RegistryError::Unsupported { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        peers = Some(listener);
    }
    let model_len = options.max_model_len.unwrap_or(MAX_WINDOW) as usize;
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

/// The group's record, with the window that fits into its cache.
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
            let window = facts.max_position.min(MAX_WINDOW);
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
        cache_key_id: settings.keys.cache_key_id().into(),
        weight_fingerprint: facts.fingerprint.clone(),
        ranks: ranks.records.clone(),
        block_tokens: BLOCK_TOKENS as u32,
        kv_blocks: facts.kv_blocks,
        host_blocks: ranks.runner.host_memory().blocks,
        max_model_len: window,
        vocabulary_size: facts.vocabulary_size,
        max_sequences: settings.options.schedule.max_num_seqs,
        images: device == Device::Fake && settings.options.fake.images,
        speed: ranks.speed,
        state: GroupState::Ready,
        version: env!("CARGO_PKG_VERSION").into(),
        contract: bora_common::version::CONTRACT,
    })
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let handle: JoinHandle<T> = tokio::task::spawn_blocking(work);
    match handle.await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
