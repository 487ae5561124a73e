//! `bora check`: validates a configuration without starting anything.

use std::path::PathBuf;

use anyhow::Context as _;
use bora_common::config::ModelOptions;
use bora_common::model::ModelConfig;
use bora_common::tls::{Acceptor, Connector};
use clap::Args;

use crate::config::Config;

/// What to validate.
#[derive(Args, Debug)]
pub(crate) struct CheckArgs {
    /// the configuration file
    #[arg(long)]
    config: PathBuf,
}

/// Reads the file and everything it names; says what it means.
pub(crate) fn run(args: CheckArgs) -> anyhow::Result<()> {
    let config = Config::read(&args.config)?;
    for model in &config.models {
        let description = open_model(model)?;
        println!(
            "model {}: {} layers, {} heads ({} KV), {} positions{}",
            model.name,
            description.num_hidden_layers,
            description.num_attention_heads,
            description.num_key_value_heads,
            description.max_position_embeddings,
            if model.skip_tokenizer_init { ", token ids only" } else { "" }
        );
    }
    let ranks = config.worker.tensor_parallel_size;
    if !config.models.is_empty() {
        let description = open_model(config.worker_model()?)?;
        for rank in config.worker.local_ranks() {
            bora_worker::weights::ShardPlan::new(&description, rank as usize, ranks as usize)?;
        }
    }
    println!(
        "registry: {:?} at {} endpoint(s), cluster {}",
        config.registry.kind,
        config.registry.endpoints.len(),
        config.cluster
    );
    if let Some(files) = &config.http.tls {
        Acceptor::for_http(files).context("http.tls")?;
        println!("http: TLS with {}", files.certificate_file.display());
    }
    if let Some(files) = &config.grpc.tls {
        Acceptor::for_grpc(files).and_then(|_| Connector::new(files)).context("grpc.tls")?;
        println!("grpc: mutual TLS with {}", files.certificate_file.display());
    }
    println!("worker: {:?}, {} rank(s), {:?} of them here", config.worker.device, ranks, config.worker.local_ranks());
    println!("{} is valid", args.config.display());
    Ok(())
}

fn open_model(model: &ModelOptions) -> anyhow::Result<ModelConfig> {
    let description = ModelConfig::from_dir(&model.path)?;
    if let Some(path) = model.tokenizer_path() {
        crate::tokenize::open(path)?;
    }
    Ok(description)
}
