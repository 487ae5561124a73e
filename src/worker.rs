//! `bora worker`: one process of a group.

use std::path::PathBuf;

use bora_common::config::{ConfigError, HostPort, RegistryKind};
use bora_worker::{DeviceChoice, WorkerSettings};
use clap::Args;

use crate::config::Config;
use crate::{logging, shutdown};

/// What to start.
#[derive(Args, Debug)]
pub(crate) struct WorkerArgs {
    /// the configuration file
    #[arg(long)]
    config: PathBuf,
    /// name of the group (worker.group)
    #[arg(long)]
    group: Option<String>,
    /// ranks that this process holds, for example 0,1 (worker.ranks)
    #[arg(long, value_delimiter = ',')]
    ranks: Option<Vec<u32>>,
    /// host:port of the gRPC services (worker.listen)
    #[arg(long)]
    listen: Option<HostPort>,
    /// host:port by which others reach it (worker.advertise)
    #[arg(long)]
    advertise: Option<HostPort>,
    /// host:port of the process that holds rank 0 (worker.leader)
    #[arg(long)]
    leader: Option<HostPort>,
    /// what to run on (worker.device)
    #[arg(long, value_enum)]
    device: Option<DeviceChoice>,
    /// ranks that one copy of the model is split over (worker.tensor_parallel_size)
    #[arg(long)]
    tensor_parallel_size: Option<u32>,
}

/// Runs until SIGTERM or SIGINT, or until the group fails.
pub(crate) fn run(args: WorkerArgs) -> anyhow::Result<()> {
    let mut config = Config::read(&args.config)?;
    let worker = &mut config.worker;
    worker.group = args.group.or(worker.group.take());
    worker.ranks = args.ranks.or(worker.ranks.take());
    worker.listen = args.listen.unwrap_or(worker.listen.clone());
    worker.advertise = args.advertise.or(worker.advertise.take());
    worker.leader = args.leader.or(worker.leader.take());
    worker.device = args.device.unwrap_or(worker.device);
    worker.tensor_parallel_size = args.tensor_parallel_size.unwrap_or(worker.tensor_parallel_size);
    worker.check()?;
    if config.registry.kind == RegistryKind::Memory {
        return Err(ConfigError::Conflict(
            "registry.kind: a worker of its own needs etcd or static (one process for all is `bora serve`)".into(),
        )
        .into());
    }
    let model = config.worker_model()?.clone();
    logging::start(&config.log)?;
    crate::runtime()?.block_on(async {
        let registry = config.registry.open(&config.cluster)?;
        let settings = WorkerSettings { options: config.worker, model };
        bora_worker::run(settings, registry, shutdown::token()?).await?;
        Ok(())
    })
}
