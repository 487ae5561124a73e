//! One worker process from its start to its end. It starts its ranks ([`start`]). With rank 0 it serves and announces
//! the group ([`lead`]); otherwise it follows the leader ([`follow`]).

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

/// Settings of a worker process.
#[derive(Clone)]
pub struct WorkerSettings {
    /// Name of the cluster.
    pub cluster: String,
    /// The `worker` section.
    pub options: WorkerOptions,
    /// Model that the group runs.
    pub model: ModelOptions,
    /// Metrics of the process.
    pub metrics: Arc<WorkerMetrics>,
    /// Cluster keys, from which blocks and images are named.
    pub keys: ClusterKeys,
}

/// Why a worker could not start, or why it ended.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// A port can't be opened.
    #[error("{field}: listening on {address}: {error}")]
    Listen {
        /// Configuration key.
        field: &'static str,
        /// Address.
        address: HostPort,
        /// Error of the system.
        error: std::io::Error,
    },
    /// The device is not usable.
    #[error("worker.device: {0}")]
    Device(String),
    /// The options do not fit the model.
    #[error("{0}")]
    Options(String),
    /// The ranks could not be started.
    #[error(transparent)]
    Start(#[from] StartError),
    /// This process could not find or follow the leader of its group.
    #[error(transparent)]
    Follow(#[from] FollowError),
    /// No leader was found.
    #[error("group `{group}`: no process with rank 0 was found within {seconds} s")]
    NoLeader {
        /// The group.
        group: String,
        /// Seconds of the search.
        seconds: u64,
    },
    /// Only leaders of another revision were found.
    #[error(
        "group `{group}`: its leader has revision `{theirs}`, this process has `{own}`, and no other leader was found within {seconds} s"
    )]
    OtherRevision {
        /// The group.
        group: String,
        /// Revision of the leader.
        theirs: String,
        /// Revision of this process.
        own: String,
        /// Seconds of the search.
        seconds: u64,
    },
    /// The registry refused the group.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The engine could not start.
    #[error(transparent)]
    Engine(#[from] EngineStartError),
    /// A step failed during calibration.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The certificates are not usable.
    #[error("grpc.tls: {0}")]
    Tls(#[from] TlsError),
    /// The server failed.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The group failed.
    #[error("group `{group}` failed: {reason}")]
    GroupFailed {
        /// The group.
        group: String,
        /// The rank, and the reason.
        reason: String,
    },
}

/// Runs one worker process until `stop` is cancelled (it then drains and returns `Ok`) or the group fails.
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

/// Starts to load the compiler of grammars, if the model has a tokenizer.
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

/// Host at which the other processes of the group reach this one.
fn own_host(options: &WorkerOptions) -> String {
    options.host.clone().unwrap_or_else(|| options.listen.host.clone())
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .unwrap_or_else(|_| "localhost".into())
}
