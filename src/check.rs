//! `bora check`: validates a configuration without starting anything. It finds what `bora router` and `bora worker` would
//! refuse, and what they would find only later.

use std::io::Write as _;
use std::path::PathBuf;

use bora_common::config::{ConfigError, HostPort, ModelOptions, with_location};
use bora_common::model::ModelConfig;
use bora_common::peer::Role;
use bora_common::tls::{Acceptor, Connector};
use clap::Args;

use crate::config::Config;
use crate::reach;

/// What to validate.
#[derive(Args, Debug)]
pub(crate) struct CheckArgs {
    /// the configuration file
    #[arg(long)]
    config: PathBuf,
    /// host:port that `bora worker --advertise` will get
    #[arg(long)]
    advertise: Option<HostPort>,
    /// file of the secret that all processes of the cluster share (cluster_secret_file)
    #[arg(long)]
    cluster_secret_file: Option<PathBuf>,
}

/// Reads the file and everything that it names, and prints what it means.
pub(crate) fn run(args: CheckArgs) -> anyhow::Result<()> {
    let mut config = Config::read(&args.config)?;
    config.cluster_secret_file = args.cluster_secret_file.or(config.cluster_secret_file);
    config.worker.advertise = args.advertise.or(config.worker.advertise.take());
    let report = check(&config).map_err(|error| with_location(&args.config, error))?;
    // a reader that has gone, such as `head`, is no failure
    let _ = writeln!(std::io::stdout(), "{report}{} is valid", args.config.display());
    Ok(())
}

/// Checks beyond [`Config::check`]; returns a line about each part. Errors begin with the key that is wrong.
fn check(config: &Config) -> Result<String, ConfigError> {
    use std::fmt::Write as _;

    let mut report = String::new();
    config.check_registry()?;
    config.check_advertised()?;
    reach::check_worker(config)?;
    reach::check_router(config)?;
    config.registry.read_password()?;
    bora_router::Access::open(config.router.access.clone())
        .map_err(|error| ConfigError::Conflict(error.to_string()))?;
    let worker_model = config.worker_model()?;
    for (index, model) in config.models.iter().enumerate() {
        let description = open_model(index, model)?;
        let _ = writeln!(
            report,
            "model {}: {} layers, {} heads ({} KV), {} positions{}",
            model.name,
            description.num_hidden_layers,
            description.num_attention_heads,
            description.num_key_value_heads,
            description.max_position_embeddings,
            if model.skip_tokenizer_init { ", token IDs only" } else { "" }
        );
        if model.name == worker_model.name {
            let ranks = config.worker.tensor_parallel_size as usize;
            for rank in config.worker.local_ranks() {
                bora_worker::weights::ShardPlan::new(&description, rank as usize, ranks)
                    .map_err(|error| ConfigError::Conflict(format!("worker.tensor_parallel_size: {error}")))?;
            }
        }
    }
    let endpoints = config.registry.endpoints.len();
    let _ =
        writeln!(report, "registry: {:?} at {endpoints} endpoint(s), cluster {}", config.registry.kind, config.cluster);
    let _ = writeln!(report, "cluster secret: its cache key has the id {}", config.cluster_keys()?.cache_key_id());
    if let Some(files) = &config.http.tls {
        Acceptor::for_http(files).map_err(|error| ConfigError::Conflict(format!("http.tls: {error}")))?;
        let _ = writeln!(report, "http: TLS with {}", files.certificate_file.display());
    }
    if let Some(files) = &config.grpc.tls {
        Connector::new(files, &config.cluster, &Role::ALL)
            .map_err(|error| ConfigError::Conflict(format!("grpc.tls: {error}")))?;
        let _ = writeln!(report, "grpc: mutual TLS with {}", files.certificate_file.display());
    }
    let worker = &config.worker;
    let ranks = worker.tensor_parallel_size;
    let _ = writeln!(report, "worker: {:?}, {ranks} rank(s), {:?} of them here", worker.device, worker.local_ranks());
    Ok(report)
}

fn open_model(index: usize, model: &ModelOptions) -> Result<ModelConfig, ConfigError> {
    let wrong =
        |key: &str, error: &dyn std::fmt::Display| ConfigError::Conflict(format!("models[{index}].{key}: {error}"));
    let description = ModelConfig::from_dir(&model.path).map_err(|error| wrong("path", &error))?;
    if let Some(path) = model.tokenizer_path() {
        let key = if model.tokenizer.is_some() { "tokenizer" } else { "path" };
        crate::tokenize::open(path).map_err(|error| wrong(key, &format!("{error:#}")))?;
    }
    Ok(description)
}
