//! `bora worker`: one process of a group.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use bora_common::config::{HostPort, with_location};
use bora_common::peer::Role;
use bora_common::telemetry::{self, Identity, MetricsSource};
use bora_worker::{DeviceChoice, WorkerMetrics, WorkerSettings};
use clap::Args;

use crate::config::Config;
use crate::{logging, reach, signals};

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
    #[arg(long, value_delimiter = ',', conflicts_with = "process_index")]
    ranks: Option<Vec<u32>>,
    /// which process of the group this is, counted from 0 (a pod's index): with --ranks-per-process R it holds
    /// the ranks from index * R on
    #[arg(long, requires = "ranks_per_process")]
    process_index: Option<u32>,
    /// ranks that each process of the group holds
    #[arg(long, requires = "process_index", value_parser = clap::value_parser!(u32).range(1..=1024))]
    ranks_per_process: Option<u32>,
    /// host:port of the gRPC services (worker.listen)
    #[arg(long)]
    listen: Option<HostPort>,
    /// host:port by which others reach it (worker.advertise)
    #[arg(long)]
    advertise: Option<HostPort>,
    /// name or address by which the group's other processes reach this one (worker.host)
    #[arg(long)]
    host: Option<String>,
    /// host:port of the process that holds rank 0 (worker.leader)
    #[arg(long)]
    leader: Option<HostPort>,
    /// which state of its deployment it is of: a group's processes are all of one (worker.revision)
    #[arg(long, env = "BORA_REVISION")]
    revision: Option<String>,
    /// sum over the ranks by NCCL alone (worker.disable_custom_all_reduce)
    #[arg(long)]
    disable_custom_all_reduce: bool,
    /// what to run on (worker.device)
    #[arg(long, value_enum)]
    device: Option<DeviceChoice>,
    /// host:port of /metrics and /health (worker.admin)
    #[arg(long)]
    admin: Option<HostPort>,
    /// ranks that one copy of the model is split over (worker.tensor_parallel_size)
    #[arg(long)]
    tensor_parallel_size: Option<u32>,
    /// file of the secret that all processes of the cluster share (cluster_secret_file)
    #[arg(long)]
    cluster_secret_file: Option<PathBuf>,
}

/// Runs until SIGTERM or SIGINT, or until the group fails.
pub(crate) fn run(args: WorkerArgs) -> anyhow::Result<()> {
    let mut config = Config::read(&args.config)?;
    let worker = &mut config.worker;
    worker.group = args.group.or(worker.group.take());
    let of_process = args.process_index.zip(args.ranks_per_process).map(ranks_of_process);
    worker.ranks = args.ranks.or(of_process).or(worker.ranks.take());
    worker.listen = args.listen.unwrap_or(worker.listen.clone());
    worker.admin = args.admin.or(worker.admin.take());
    worker.advertise = args.advertise.or(worker.advertise.take());
    worker.host = args.host.or(worker.host.take());
    worker.leader = args.leader.or(worker.leader.take());
    worker.revision = args.revision.unwrap_or(std::mem::take(&mut worker.revision));
    worker.disable_custom_all_reduce |= args.disable_custom_all_reduce;
    worker.device = args.device.unwrap_or(worker.device);
    worker.tensor_parallel_size = args.tensor_parallel_size.unwrap_or(worker.tensor_parallel_size);
    config
        .check()
        .and_then(|()| config.check_registry())
        .and_then(|()| config.check_advertised())
        .and_then(|()| reach::check_worker(&config))
        .map_err(|error| with_location(&args.config, error))?;
    let model = config.worker_model()?.clone();
    config.cluster_secret_file = args.cluster_secret_file.or(config.cluster_secret_file);
    logging::start(&config.log)?;
    let keys = config.cluster_keys().map_err(|error| with_location(&args.config, error))?;
    reach::warn_if_insecure(&config);
    crate::run_server(async {
        config.worker.tls = config.grpc.tls.clone();
        let registry = {
            let roles = [Role::Worker, Role::Follower];
            let connector = config.grpc.connector(&config.cluster, &roles).context("grpc.tls")?;
            config.registry.open(&config.cluster, connector)?
        };
        let metrics = WorkerMetrics::new();
        metrics.set_vllm_names(config.telemetry.vllm_names);
        let identity = Identity {
            service: "bora-worker",
            version: env!("CARGO_PKG_VERSION"),
            cluster: config.cluster.clone(),
            attributes: config.worker.group.iter().map(|group| ("bora.group", group.clone())).collect(),
        };
        let reported = Arc::clone(&metrics);
        let source: MetricsSource = Arc::new(move || reported.text());
        let telemetry = telemetry::start(config.telemetry, &identity, Some(source))?;
        let settings = WorkerSettings { cluster: config.cluster, options: config.worker, model, metrics, keys };
        let reloading = tokio::spawn(signals::reload_at(signals::hangups()?, Some(args.config), || {}));
        let ended = bora_worker::run(settings, registry, signals::stop_token()?).await;
        reloading.abort();
        telemetry.stop().await;
        Ok(ended?)
    })
}

/// The ranks of the process with this index, where each holds `ranks_per_process` of them.
fn ranks_of_process((index, ranks_per_process): (u32, u32)) -> Vec<u32> {
    let first = index.saturating_mul(ranks_per_process);
    (first..first.saturating_add(ranks_per_process)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_holds_its_share_of_the_ranks() {
        assert_eq!(ranks_of_process((0, 4)), [0, 1, 2, 3]);
        assert_eq!(ranks_of_process((1, 4)), [4, 5, 6, 7]);
        assert_eq!(ranks_of_process((7, 1)), [7]);
        assert_eq!(ranks_of_process((0, 1)), [0]);
    }
}
