//! The registry, how far away it is and whether its clock agrees with this one; and the ports that are to be opened.

use std::time::{Duration, Instant, SystemTime};

use bora_common::config::{HostPort, RegistryKind};
use bora_common::peer::Role;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};

use super::Check;
use crate::config::Config;

const TIMEOUT: Duration = Duration::from_secs(3);
/// Reads that are timed.
const READS: usize = 5;
/// etcd on the same network responses within this.
const SLOW: Duration = Duration::from_millis(50);
/// Clocks may be apart by this much; HTTP dates are whole seconds.
const SKEW: Duration = Duration::from_secs(3);

pub(super) async fn check(config: &Config) -> Vec<Check> {
    let mut checks = Vec::new();
    match config.registry.kind {
        RegistryKind::Memory => checks.push(Check::skipped("registry", "in memory: one process for all")),
        RegistryKind::Static => {
            for endpoint in &config.registry.endpoints {
                checks.push(reached("group", endpoint, "start the group, or take its endpoint out of the list").await);
            }
        }
        RegistryKind::Etcd => checks.extend(etcd(config).await),
    }
    checks.extend(ports(config).await);
    checks
}

async fn reached(name: &'static str, address: &HostPort, fix: &str) -> Check {
    let begun = Instant::now();
    match tokio::time::timeout(TIMEOUT, TcpStream::connect((address.host.as_str(), address.port))).await {
        Ok(Ok(_)) => {
            Check::good(name, format!("{address} answers after {:.1} ms", begun.elapsed().as_secs_f64() * 1e3))
        }
        Ok(Err(error)) => Check::failure(name, format!("{address}: {error}"), fix),
        Err(_) => Check::failure(name, format!("{address} does not answer within {} s", TIMEOUT.as_secs()), fix),
    }
}

async fn etcd(config: &Config) -> Vec<Check> {
    const NAME: &str = "etcd";
    let fix = "start it, mend the address, or open the way to it (NetworkPolicies, firewalls)";
    let mut checks = Vec::new();
    for endpoint in &config.registry.endpoints {
        checks.push(reached("etcd member", endpoint, fix).await);
    }
    if checks.iter().all(|check| check.outcome == super::Outcome::Failure) {
        return checks;
    }
    checks.push(read_registry(config).await.unwrap_or_else(|reason| {
        let fix = "look at registry.username, password_file and tls, and whether a majority of members lives";
        Check::failure(NAME, reason, fix)
    }));
    if config.registry.tls.is_none() {
        for endpoint in &config.registry.endpoints {
            checks.extend(clock(endpoint).await);
        }
    }
    checks
}

/// Reads through a quorum, as workers do when they look for their leader.
async fn read_registry(config: &Config) -> Result<Check, String> {
    let registry = {
        let grpc = config.grpc.connector(&config.cluster, &Role::ALL).map_err(|error| error.to_string())?;
        config.registry.open(&config.cluster, grpc).map_err(|error| error.to_string())?
    };
    let mut times = Vec::new();
    for _ in 0..READS {
        let begun = Instant::now();
        let read = tokio::time::timeout(TIMEOUT, registry.find_rendezvous("bora-doctor")).await;
        read.map_err(|_| format!("a read takes more than {} s", TIMEOUT.as_secs()))?
            .map_err(|error| error.to_string())?;
        times.push(begun.elapsed());
    }
    times.sort();
    let median = times[READS / 2];
    let found = format!("a read takes {:.1} ms (median of {READS})", median.as_secs_f64() * 1e3);
    if median > SLOW {
        let fix = "etcd wants a disk of its own and a short way; requests do not wait for it, new groups do";
        return Ok(Check::warning("etcd", found, fix));
    }
    Ok(Check::good("etcd", found))
}

/// etcd says the time with every response.
async fn clock(endpoint: &HostPort) -> Option<Check> {
    const NAME: &str = "clock of etcd";
    let date = tokio::time::timeout(TIMEOUT, date_of(endpoint)).await.ok()?.ok()??;
    let now = SystemTime::now();
    let apart = now.duration_since(date).or_else(|_| date.duration_since(now)).unwrap_or_default();
    let found = format!("{endpoint} is within {:.0} s of this node", apart.as_secs_f64().ceil());
    if apart > SKEW {
        let fix = "keep the clocks right (chrony, systemd-timesyncd): epochs of groups are times, and so are traces";
        return Some(Check::warning(
            NAME,
            format!("{endpoint} is {:.0} s away from this node", apart.as_secs_f64()),
            fix,
        ));
    }
    Some(Check::good(NAME, found))
}

async fn date_of(endpoint: &HostPort) -> anyhow::Result<Option<SystemTime>> {
    let stream = TcpStream::connect((endpoint.host.as_str(), endpoint.port)).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driving = tokio::spawn(connection);
    let request = hyper::Request::get("/version").header("host", endpoint.to_string()).body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let date = response.headers().get("date").and_then(|value| httpdate::parse_http_date(value.to_str().ok()?).ok());
    let _ = response.into_body().collect().await;
    driving.abort();
    Ok(date)
}

async fn ports(config: &Config) -> Vec<Check> {
    let http = HostPort { host: config.http.host.clone(), port: config.http.port };
    let mut wanted = vec![("http", http)];
    wanted.extend(config.http.admin.clone().map(|address| ("http.admin", address)));
    let worker = &config.worker;
    wanted.push(("worker.listen", worker.listen.clone()));
    wanted.push(("worker.peers", worker.peers.clone()));
    wanted.extend(worker.admin.clone().map(|address| ("worker.admin", address)));
    let mut checks = Vec::new();
    for (name, address) in wanted.into_iter().filter(|(_, address)| address.port != 0) {
        checks.push(match TcpListener::bind((address.host.as_str(), address.port)).await {
            Ok(_) => Check::good("port", format!("{name}: {address} is free")),
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => Check::warning(
                "port",
                format!("{name}: {address} is in use"),
                "fine where it is Bora itself that runs; `ss -ltnp` says who it is",
            ),
            Err(error) => Check::failure(
                "port",
                format!("{name}: {address}: {error}"),
                "an address of this node, a port above 1023",
            ),
        });
    }
    checks
}
