//! The configuration file, put together: one schema for router and worker.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use bora_common::config::{ConfigError, HostPort, LogOptions, ModelOptions, RegistryKind, RegistryOptions, read_file};
use bora_common::peer::Role;
use bora_common::secret::{ClusterKeys, HOW_TO_MAKE};
use bora_common::telemetry::TelemetryOptions;
use bora_common::tls::{Connector, GrpcTls, TlsError};
use bora_router::{HttpOptions, RouterOptions};
use bora_worker::WorkerOptions;
use serde::Deserialize;

use crate::logging;

/// A whole file. Every section may be absent; which ones a command needs, it checks itself.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    /// Name of the cluster: several may share one etcd.
    pub(crate) cluster: String,
    /// File of the secret that all routers and workers of the cluster share: what cached blocks are named under.
    pub(crate) cluster_secret_file: Option<PathBuf>,
    /// Where groups are announced and found.
    pub(crate) registry: RegistryOptions,
    /// The models that are served.
    pub(crate) models: Vec<ModelOptions>,
    /// Where the router listens, and the limits of connections and bodies.
    pub(crate) http: HttpOptions,
    /// How routers, leaders and followers speak with each other.
    pub(crate) grpc: GrpcOptions,
    /// Limits and habits of the router.
    pub(crate) router: RouterOptions,
    /// One worker process and its group.
    pub(crate) worker: WorkerOptions,
    /// Log output.
    pub(crate) log: LogOptions,
    /// Traces and metrics to a collector.
    pub(crate) telemetry: TelemetryOptions,
}

/// How routers, leaders and followers speak with each other.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct GrpcOptions {
    /// Mutual TLS; plain text where it is absent. The same authority in all processes of a cluster.
    pub(crate) tls: Option<GrpcTls>,
    /// Plain text beyond this host, where nobody else reaches the ports.
    pub(crate) insecure: bool,
}

impl GrpcOptions {
    /// What opens connections, of a process that has one of these roles.
    pub(crate) fn connector(&self, cluster: &str, roles: &[Role]) -> Result<Option<Connector>, TlsError> {
        self.tls.as_ref().map(|files| Connector::new(files, cluster, roles)).transpose()
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            cluster: "bora".into(),
            cluster_secret_file: None,
            registry: RegistryOptions::default(),
            models: Vec::new(),
            http: HttpOptions::default(),
            grpc: GrpcOptions::default(),
            router: RouterOptions::default(),
            worker: WorkerOptions::default(),
            log: LogOptions::default(),
            telemetry: TelemetryOptions::default(),
        }
    }
}

fn is_wildcard(host: &str) -> bool {
    host.parse::<IpAddr>().is_ok_and(|address| address.is_unspecified())
}

/// Whether two listeners would take the same port.
fn overlap(one: &HostPort, other: &HostPort) -> bool {
    let same_host = one.host == other.host || is_wildcard(&one.host) || is_wildcard(&other.host);
    one.port != 0 && one.port == other.port && same_host
}

impl Config {
    /// Reads a file and checks what holds for every command.
    pub(crate) fn read(path: &Path) -> Result<Self, ConfigError> {
        read_file(path, Self::check)
    }

    /// Values that don't go together.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        self.registry.check()?;
        self.router.validate().map_err(|error| ConfigError::Conflict(error.to_string()))?;
        self.http.validate(self.router.max_body_bytes).map_err(|error| ConfigError::Conflict(error.to_string()))?;
        self.worker.check()?;
        self.telemetry.check()?;
        if self.cluster.is_empty() {
            return Err(ConfigError::Conflict("cluster: expected a name".into()));
        }
        if let Some(level) = &self.log.level {
            logging::parse_filter(level).map_err(|reason| ConfigError::Conflict(format!("log.level: {reason}")))?;
        }
        let mut names = std::collections::BTreeSet::new();
        for (index, model) in self.models.iter().enumerate() {
            for name in std::iter::once(&model.name).chain(&model.aliases) {
                if name.is_empty() || !names.insert(name) {
                    return Err(ConfigError::Conflict(format!(
                        "models[{index}].name: the name `{name}` is empty or used twice"
                    )));
                }
            }
        }
        self.check_ports()
    }

    /// No two listeners of one process may share a port.
    fn check_ports(&self) -> Result<(), ConfigError> {
        let http = HostPort { host: self.http.host.clone(), port: self.http.port };
        let worker = &self.worker;
        let router = [("http.port", Some(&http)), ("http.admin", self.http.admin.as_ref())];
        let group = [
            ("worker.listen", Some(&worker.listen)),
            ("worker.peers", Some(&worker.peers)),
            ("worker.admin", worker.admin.as_ref()),
            ("worker.health", worker.health.as_ref()),
        ];
        for listeners in [&router[..], &group[..]] {
            let listeners: Vec<_> = listeners.iter().filter_map(|(key, at)| Some((key, (*at)?))).collect();
            for (index, (key, at)) in listeners.iter().enumerate() {
                if let Some((other, _)) = listeners[..index].iter().find(|(_, earlier)| overlap(earlier, at)) {
                    return Err(ConfigError::Conflict(format!(
                        "{key}: `{at}` is the port of {other}: expected another one"
                    )));
                }
            }
        }
        Ok(())
    }

    /// What a cluster's processes need: routers and workers find each other through a registry.
    pub(crate) fn check_registry(&self) -> Result<(), ConfigError> {
        if self.registry.kind == RegistryKind::Memory {
            return Err(ConfigError::Conflict(
                "registry.kind: a router or worker of a cluster needs etcd or static (`bora serve` is one process for all)".into(),
            ));
        }
        Ok(())
    }

    /// A leader that listens on every address must announce one that others can reach.
    pub(crate) fn check_advertised(&self) -> Result<(), ConfigError> {
        let worker = &self.worker;
        let leads = worker.local_ranks().first() == Some(&0);
        if leads && is_wildcard(&worker.listen.host) && worker.advertise.is_none() {
            return Err(ConfigError::Conflict(format!(
                "worker.listen: `{}` is no address that routers can reach: expected worker.advertise (--advertise) beside it",
                worker.listen
            )));
        }
        match &worker.advertise {
            Some(address) if is_wildcard(&address.host) || address.port == 0 => Err(ConfigError::Conflict(format!(
                "worker.advertise: `{address}` is no address that routers can reach: expected a name or an address, and a port"
            ))),
            _ => Ok(()),
        }
    }

    /// The keys of a cluster of several processes. They can't agree on a secret by themselves, so one must be given.
    pub(crate) fn cluster_keys(&self) -> Result<ClusterKeys, ConfigError> {
        let Some(path) = &self.cluster_secret_file else {
            return Err(ConfigError::Conflict(format!(
                "cluster_secret_file: expected a file that holds a secret, the same for every router and worker of the \
                 cluster; make one with `{HOW_TO_MAKE}`"
            )));
        };
        ClusterKeys::read(path).map_err(|error| ConfigError::Conflict(error.to_string()))
    }

    /// The model that this worker runs.
    pub(crate) fn worker_model(&self) -> Result<&ModelOptions, ConfigError> {
        let listed = || self.models.iter().map(|model| model.name.as_str()).collect::<Vec<_>>().join(", ");
        match (&self.worker.model, self.models.as_slice()) {
            (_, []) => Err(ConfigError::Conflict("models: expected at least one".into())),
            (Some(name), models) => models.iter().find(|model| model.name == *name).ok_or_else(|| {
                ConfigError::Conflict(format!("worker.model: `{name}` is not among models: {}", listed()))
            }),
            (None, [only]) => Ok(only),
            (None, _) => {
                Err(ConfigError::Conflict(format!("worker.model: expected one of the configured models: {}", listed())))
            }
        }
    }
}
