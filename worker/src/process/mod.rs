//! One worker process from its start to its end: brings its ranks up ([`start`]), and, where it holds rank 0, serves the
//! group and keeps it announced ([`lead`]); elsewhere it follows the process that does ([`follow`]).

mod follow;
mod lead;
mod start;

use std::path::Path;
use std::sync::Arc;

use bora_common::config::{HostPort, ModelOptions};
use bora_common::registry::{Device, Registry, RegistryError};
use bora_common::secret::ClusterKeys;
use bora_common::tls::TlsError;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::device;
use crate::engine::EngineStartError;
use crate::engine::step::RunError;
use crate::grammar::PendingGrammars;
use crate::options::WorkerOptions;
use crate::parallel::{FollowError, MemberOptions, StartError, Timeouts};
use crate::service::ServeError;
use crate::telemetry::{self, WorkerMetrics};
pub use start::open_engine;

/// What a process is given.
#[derive(Clone)]
pub struct WorkerSettings {
    /// Name of the cluster.
    pub cluster: String,
    /// The `worker` section.
    pub options: WorkerOptions,
    /// The model it runs.
    pub model: ModelOptions,
    /// What it reports itself.
    pub metrics: Arc<WorkerMetrics>,
    /// Of the cluster: what blocks and images are named under.
    pub keys: ClusterKeys,
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
    /// There is a leader, but of another state of the deployment.
    #[error(
        "group `{group}`: its leader is of revision `{theirs}`, this process of `{own}`, and no other came within {seconds} s"
    )]
    OtherRevision {
        /// The group.
        group: String,
        /// The leader's.
        theirs: String,
        /// This process's.
        own: String,
        /// How long another one was looked for.
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
    /// The group can't continue.
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
        lead::lead(settings, device, registry, stop).await
    } else {
        follow::follow_leader(settings, device, registry, stop).await
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
        cluster: settings.cluster.clone(),
        model: settings.model.name.clone(),
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
        revision: options.revision.clone(),
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
