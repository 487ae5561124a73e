//! Plain-text gRPC stays on this host: whoever reaches such a port may use and drain the group.

use bora_common::config::{ConfigError, HostPort, RegistryKind};
use bora_common::telemetry::process;

use crate::config::Config;

/// What a router reaches: the groups of a static list, or those that an etcd elsewhere lists.
pub(crate) fn check_router(config: &Config) -> Result<(), ConfigError> {
    let reached = match config.registry.kind {
        RegistryKind::Memory => Vec::new(),
        RegistryKind::Static | RegistryKind::Etcd => config.registry.endpoints.iter().collect(),
    };
    check(config, reached.into_iter().map(|address| ("registry.endpoints", address)))
}

/// Where a worker listens, how it is reached and whom it reaches.
pub(crate) fn check_worker(config: &Config) -> Result<(), ConfigError> {
    let worker = &config.worker;
    let is_spread = worker.local_ranks().len() < worker.tensor_parallel_size as usize;
    let leads = worker.local_ranks().first() == Some(&0);
    let own_host = worker.host.as_ref().map(|host| HostPort { host: host.clone(), port: 0 });
    let addresses = [
        ("worker.listen", leads.then_some(&worker.listen)),
        ("worker.advertise", worker.advertise.as_ref().filter(|_| leads)),
        ("worker.peers", (leads && is_spread).then_some(&worker.peers)),
        ("worker.leader", worker.leader.as_ref().filter(|_| is_spread)),
        ("worker.host", own_host.as_ref().filter(|_| is_spread)),
    ];
    check(config, addresses.into_iter().filter_map(|(key, address)| Some((key, address?))))
}

fn check<'a>(
    config: &Config,
    addresses: impl Iterator<Item = (&'static str, &'a HostPort)>,
) -> Result<(), ConfigError> {
    if config.grpc.tls.is_some() {
        return Ok(());
    }
    let beyond = addresses.into_iter().find(|(_, address)| !address.is_loopback());
    match beyond {
        Some((key, address)) if !config.grpc.insecure => Err(ConfigError::Conflict(format!(
            "{key}: `{address}` is beyond loopback, and gRPC is plain text: expected grpc.tls (or grpc.insecure: true, \
             where nobody else reaches these ports)"
        ))),
        _ => Ok(()),
    }
}

/// Says that gRPC is plain text beyond this host, in the log and as `bora_grpc_insecure`.
pub(crate) fn warn_if_insecure(config: &Config) {
    let is_insecure = config.grpc.tls.is_none() && config.grpc.insecure;
    process::set_grpc_insecure(is_insecure);
    if is_insecure {
        tracing::warn!(
            "grpc.insecure: whoever reaches a worker's ports may use its model, read its cache, drain it and join its group"
        );
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn config(mut document: Value, insecure: bool) -> Config {
        document["grpc"] = json!({"insecure": insecure});
        serde_json::from_value(document).expect("a configuration")
    }

    #[test]
    fn plain_text_beyond_loopback_is_refused_and_the_key_is_named() {
        for (worker, key) in [
            (json!({"listen": "0.0.0.0:9000"}), "worker.listen"),
            (json!({"listen": "[::]:9000"}), "worker.listen"),
            (json!({"listen": "10.0.0.1:9000"}), "worker.listen"),
            (json!({"listen": "node-1:9000"}), "worker.listen"),
            (json!({"advertise": "10.0.0.1:9000"}), "worker.advertise"),
            (json!({"tensor_parallel_size": 2, "ranks": [0], "peers": "0.0.0.0:9001"}), "worker.peers"),
            (json!({"tensor_parallel_size": 2, "ranks": [1], "leader": "10.0.0.1:9001"}), "worker.leader"),
            (json!({"tensor_parallel_size": 2, "ranks": [1], "host": "10.0.0.1"}), "worker.host"),
        ] {
            let document = json!({"worker": worker});
            let refused = check_worker(&config(document.clone(), false)).unwrap_err().to_string();
            assert!(refused.contains(key) && refused.contains("grpc.tls"), "{document}: {refused}");
            assert!(check_worker(&config(document.clone(), true)).is_ok(), "{document}");
        }
        for kind in ["static", "etcd"] {
            let document = json!({"registry": {"kind": kind, "endpoints": ["10.0.0.1:9000"]}});
            let refused = check_router(&config(document.clone(), false)).unwrap_err().to_string();
            assert!(refused.contains("registry.endpoints"), "{refused}");
            assert!(check_router(&config(document, true)).is_ok());
        }
    }

    #[test]
    fn loopback_needs_nothing() {
        for worker in [
            json!({"listen": "127.0.0.1:9000", "advertise": "localhost:9000"}),
            json!({"listen": "[::1]:9000"}),
            json!({"tensor_parallel_size": 2, "ranks": [1], "leader": "127.0.0.1:9001"}),
        ] {
            assert!(check_worker(&config(json!({"worker": worker}), false)).is_ok(), "{worker}");
        }
        let document = json!({"registry": {"kind": "etcd", "endpoints": ["127.0.0.1:2379"]}});
        assert!(check_router(&config(document, false)).is_ok());
    }
}
