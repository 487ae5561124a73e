//! `bora router`: a router of a cluster.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bora_common::config::{LogFormat, ModelOptions, with_location};
use bora_common::model::ModelConfig;
use bora_common::peer::Role;
use bora_common::registry::{Registry, RouterRecord};
use bora_common::secret::ClusterKeys;
use bora_common::telemetry::{self, Identity, MetricsSource};
use bora_common::tls::Acceptor;
use bora_router::fleet::validate::record::ModelLimits;
use bora_router::{HttpOptions, ModelSpec, Router, RouterOptions};
use clap::Args;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::{logging, reach, signals, tokenize};

/// Longest wait for etcd to take this router off its list.
const LEAVE_WITHIN: Duration = Duration::from_secs(2);

/// What to start.
#[derive(Args, Debug)]
pub(crate) struct RouterArgs {
    /// the configuration file
    #[arg(long)]
    config: PathBuf,
    /// address to listen on (http.host)
    #[arg(long)]
    host: Option<String>,
    /// port to listen on; 0 = any free one (http.port)
    #[arg(long)]
    port: Option<u16>,
    /// file of the secret that all processes of the cluster share (cluster_secret_file)
    #[arg(long)]
    cluster_secret_file: Option<PathBuf>,
}

/// Serves until SIGTERM or SIGINT.
pub(crate) fn run(args: RouterArgs) -> anyhow::Result<()> {
    let mut config = Config::read(&args.config)?;
    config.http.host = args.host.unwrap_or(config.http.host);
    config.http.port = args.port.unwrap_or(config.http.port);
    config
        .check()
        .and_then(|()| config.check_registry())
        .and_then(|()| reach::check_router(&config))
        .map_err(|error| with_location(&args.config, error))?;
    config.cluster_secret_file = args.cluster_secret_file.or(config.cluster_secret_file);
    logging::start(&config.log)?;
    let keys = config.cluster_keys().map_err(|error| with_location(&args.config, error))?;
    reach::warn_if_insecure(&config);
    crate::run_server(async {
        let connector = config.grpc.connector(&config.cluster, &[Role::Router]);
        config.router.grpc = connector.context("grpc.tls")?;
        config.router.loopback_only = config.grpc.tls.is_none() && !config.grpc.insecure;
        let registry = config.registry.open(&config.cluster, config.router.grpc.clone())?;
        let stop = signals::stop_token()?;
        serve(&config, Some(args.config), "bora-router", keys, None, registry.as_ref(), stop).await
    })
}

/// Opens the tokenizers, listens and serves until `stop`. `beside` makes the metrics of a group in the same process.
/// `file` is where SIGHUP reads the configuration again.
pub(crate) async fn serve(
    config: &Config,
    file: Option<PathBuf>,
    service: &'static str,
    keys: ClusterKeys,
    beside: Option<MetricsSource>,
    registry: &dyn Registry,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut models = HashMap::new();
    for model in &config.models {
        models.insert(model.name.clone(), open_model(model)?);
    }
    let address = (config.http.host.as_str(), config.http.port);
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("http.host, http.port: listening on {}:{}", address.0, address.1))?;
    let tls = config.http.tls.as_ref().map(Acceptor::for_http).transpose().context("http.tls")?;
    let admin = match &config.http.admin {
        Some(at) => Some(
            TcpListener::bind((at.host.as_str(), at.port))
                .await
                .with_context(|| format!("http.admin: listening on {at}"))?,
        ),
        None => None,
    };
    let loopback = listener.local_addr()?.ip().is_loopback();
    let metrics = config.http.metrics.unwrap_or(loopback && admin.is_none());
    let http = HttpOptions { metrics: Some(metrics), ..config.http.clone() };
    let options = RouterOptions { http, cluster: config.cluster.clone(), ..config.router.clone() };
    let mut router = Router::new(options, keys, models, registry.watch())?;
    let presence = registry.join(record(&listener.local_addr()?));
    router.share_limits(presence.live());
    router.service().metrics().set_vllm_names(config.telemetry.vllm_names);
    if let Some(beside) = beside {
        router.service().metrics().add_source(beside);
    }
    let identity = Identity {
        service,
        version: env!("CARGO_PKG_VERSION"),
        cluster: config.cluster.clone(),
        attributes: Vec::new(),
    };
    // the service owns the metrics: it must not be kept alive by their export
    let metrics = Arc::downgrade(router.service());
    let source: MetricsSource = Arc::new(move || metrics.upgrade().map(|one| one.metrics_text()).unwrap_or_default());
    let telemetry = telemetry::start(config.telemetry.clone(), &identity, Some(source))?;
    tracing::info!(address = %listener.local_addr()?, tls = tls.is_some(), "router listens");
    if !loopback && router.service().access().is_open() {
        warn_of_open_door(config.log.format, listener.local_addr()?);
    }
    // ends with the router: probes and scrapes are served while open requests finish
    let admin = admin.map(|listener| tokio::spawn(router.serve_admin(listener)));
    let service = Arc::downgrade(router.service());
    let reload_access = move || {
        if let Some(service) = service.upgrade() {
            service.access().reload();
        }
    };
    let reloading = tokio::spawn(signals::reload_at(signals::hangups()?, file, reload_access));
    let stopping = stop.clone();
    let leaving = tokio::spawn(async move {
        stopping.cancelled().await;
        // takes nothing new from now on: the others may grant its share
        presence.leave().await;
    });
    let served = router.serve(listener, tls, stop.cancelled_owned()).await.context("serving HTTP");
    if served.is_ok() {
        // without etcd the lease ends by itself
        let _ = tokio::time::timeout(LEAVE_WITHIN, leaving).await;
    }
    reloading.abort();
    if let Some(admin) = admin {
        admin.abort();
    }
    telemetry.stop().await;
    served
}

/// Says that anybody may come in: in the log, and beside it on standard error, whatever the log's filter hides.
fn warn_of_open_door(format: LogFormat, address: SocketAddr) {
    const WORDS: &str = "ANYBODY WHO REACHES THIS PORT MAY USE THE MODELS: the router listens beyond loopback and no API keys are \
                         set (router.access.keys, --api-key, --api-key-file)";
    tracing::error!(%address, "{WORDS}");
    match format {
        LogFormat::Text => {
            let line = "!".repeat(80);
            logging::print(&format!("{line}\n!! {WORDS}\n!! {address}\n{line}"));
        }
        // what reads the log as JSON reads this too
        LogFormat::Json => {
            logging::print(&serde_json::json!({"level": "ERROR", "message": WORDS, "address": address}).to_string());
        }
    }
}

/// What others see of this router: its pod's name where there is one, and a part that no other has.
fn record(address: &std::net::SocketAddr) -> RouterRecord {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    RouterRecord {
        router: format!("{}-{:08x}", host.trim(), rand::random::<u32>()),
        address: address.to_string(),
        version: env!("CARGO_PKG_VERSION").into(),
    }
}

fn open_model(model: &ModelOptions) -> anyhow::Result<ModelSpec> {
    let mut spec = match model.tokenizer_path() {
        Some(path) => ModelSpec::new(Arc::new(tokenize::open(path)?)),
        None => ModelSpec::default(),
    };
    spec.aliases = model.aliases.clone();
    // a router may have no more than the tokenizer
    let checkpoint = ModelConfig::from_dir(&model.path).ok();
    spec.limits = ModelLimits {
        max_model_len: model.max_model_len.or(checkpoint.as_ref().map(|model| model.max_position_embeddings as u32)),
        vocabulary_size: checkpoint.as_ref().map(|model| model.vocab_size as u32),
        weight_fingerprint: model.weight_fingerprint.clone(),
    };
    // both say which token IDs end a sequence; the checkpoint of another model format has neither
    for name in ["config.json", "generation_config.json"] {
        let path = model.path.join(name);
        if path.is_file() {
            let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            let value = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
            spec = spec.with_generation_config(&value);
        }
    }
    Ok(spec)
}
