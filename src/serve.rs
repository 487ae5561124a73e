//! `bora serve`: router and one group in one process. Flags are named as vLLM's.

use std::path::PathBuf;

use anyhow::{Context, bail};
use bora_common::config::{HostPort, ModelOptions};
use bora_common::peer::local;
use bora_common::secret::ClusterKeys;
use bora_common::tls::HttpTls;
use bora_router::{ConversationRules, Digest};
use bora_worker::{WorkerMetrics, WorkerSettings};
use clap::Args;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::flags::EngineFlags;
use crate::{logging, router, signals, state, tokenize};

/// What to serve, and how.
#[derive(Args, Debug)]
pub(crate) struct ServeArgs {
    /// directory of the checkpoint: config.json or params.json, *.safetensors and the tokenizer
    #[arg(long)]
    model: PathBuf,
    /// tokenizer file or directory, where it is not in --model
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// serve token IDs only: the checkpoint has no tokenizer
    #[arg(long)]
    skip_tokenizer_init: bool,
    /// names to serve it under; --model as given where absent
    #[arg(long, num_args = 1.., value_delimiter = ',')]
    served_model_name: Vec<String>,
    #[command(flatten)]
    engine: EngineFlags,
    /// longest prompt plus output, tokens; the model's own limit where absent
    #[arg(long)]
    max_model_len: Option<u32>,
    /// address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// port to listen on; 0 = any free one
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// key that requests must carry (several may be given); none is needed where absent
    #[arg(long, env = "BORA_API_KEY", hide_env_values = true, num_args = 1..)]
    api_key: Vec<String>,
    /// file of tenants and hashed keys (router.access.keys)
    #[arg(long)]
    api_key_file: Option<PathBuf>,
    /// repairs conversations that the reference encoder refuses (router.conversation: lenient); the default
    #[arg(long)]
    lenient_conversations: bool,
    /// refuses conversations that the reference encoder refuses (router.conversation: strict)
    #[arg(long, conflicts_with = "lenient_conversations")]
    strict_conversations: bool,
    /// PEM file of the certificate that the API is served with (http.tls)
    #[arg(long, visible_alias = "ssl-certfile", requires = "tls_key_file")]
    tls_certificate_file: Option<PathBuf>,
    /// PEM file of that certificate's key
    #[arg(long, visible_alias = "ssl-keyfile", requires = "tls_certificate_file")]
    tls_key_file: Option<PathBuf>,
    /// file of the secret that cached blocks are named under (cluster_secret_file); one is kept in --state-dir where absent
    #[arg(long)]
    cluster_secret_file: Option<PathBuf>,
    /// directory that is kept from run to run; $XDG_STATE_HOME/bora or ~/.local/state/bora where absent
    #[arg(long, conflicts_with = "cluster_secret_file")]
    state_dir: Option<PathBuf>,
    /// names the reasons of each placement in the header x-bora-decision
    #[arg(long)]
    debug: bool,
    /// host:port on loopback where the group's gRPC services listen as plain text, for `bora top` and `bora admin`; no
    /// port is opened where absent
    #[arg(long)]
    grpc_listen: Option<HostPort>,
}

/// Serves until SIGTERM or SIGINT.
pub(crate) fn run(args: ServeArgs) -> anyhow::Result<()> {
    let state_directory = args.state_dir.clone();
    let config = configure(args)?;
    logging::start(&config.log)?;
    let keys = match &config.cluster_secret_file {
        Some(path) => ClusterKeys::read(path)?,
        None => state::cluster_keys(state_directory)?,
    };
    let model = config.worker_model()?.clone();
    if let Some(path) = model.tokenizer_path() {
        tokenize::open(path)
            .context("no tokenizer: --tokenizer names one, --skip-tokenizer-init serves token ids only")?;
    }
    crate::run_server(async {
        let signalled = signals::stop_token()?;
        let group_stop = CancellationToken::new();
        let registry = config.registry.open(&config.cluster, None)?;
        let metrics = WorkerMetrics::new();
        metrics.set_vllm_names(config.telemetry.vllm_names);
        let settings = WorkerSettings {
            cluster: config.cluster.clone(),
            options: config.worker.clone(),
            model,
            metrics: metrics.clone(),
            keys: keys.clone(),
        };
        let mut group = tokio::spawn(bora_worker::run(settings, registry.clone(), group_stop.clone()));
        tokio::select! {
            routed = router::serve(&config, None, "bora-serve", keys, Some(metrics.source()), registry.as_ref(), signalled) => {
                // open requests have ended; now the group may
                group_stop.cancel();
                group.await.context("the group's task failed")??;
                routed
            }
            ended = &mut group => {
                ended.context("the group's task failed")??;
                bail!("the group ended")
            }
        }
    })
}

/// The configuration that the flags stand for.
fn configure(args: ServeArgs) -> anyhow::Result<Config> {
    let mut names = args.served_model_name.into_iter();
    let name = names.next().unwrap_or_else(|| args.model.display().to_string());
    let mut config = Config::default();
    config.models.push(ModelOptions {
        name,
        aliases: names.collect(),
        path: args.model,
        tokenizer: args.tokenizer,
        skip_tokenizer_init: args.skip_tokenizer_init,
        max_model_len: None,
        weight_fingerprint: None,
    });
    config.http.host = args.host;
    config.http.port = args.port;
    config.http.tls = args
        .tls_certificate_file
        .zip(args.tls_key_file)
        .map(|(certificate_file, key_file)| HttpTls { certificate_file, key_file });
    config.cluster_secret_file = args.cluster_secret_file;
    config.router.debug = args.debug;
    if args.strict_conversations {
        config.router.conversation = ConversationRules::Strict;
    }
    config.router.access.keys = args.api_key_file;
    config.router.access.api_keys = args.api_key.iter().map(|key| Digest::of(key.as_bytes())).collect();
    let worker = &mut config.worker;
    worker.group = Some("local".into());
    worker.max_model_len = args.max_model_len;
    match args.grpc_listen {
        Some(address) if !address.is_loopback() => {
            bail!("--grpc-listen: expected an address on loopback, found `{address}`")
        }
        Some(address) => worker.listen = address,
        None => {
            let (connector, listener) = local::pair();
            worker.in_process = Some(listener);
            config.router.in_process = Some(connector);
        }
    }
    args.engine.apply(worker);
    config.check()?;
    Ok(config)
}
