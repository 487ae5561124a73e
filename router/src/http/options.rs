//! The `http` section of the configuration: the listeners, and the limits of connections and bodies.

use std::time::Duration;

use axum::http::HeaderValue;
use bora_common::{
    config::{ByteSize, HostPort},
    tls::HttpTls,
};
use ipnet::IpNet;
use serde::Deserialize;

use super::browser::HostPattern;
use crate::options::OptionsError;

/// The `http` section.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpOptions {
    /// Host name or address to listen on; default loopback.
    pub host: String,
    /// 0 = any free port.
    pub port: u16,
    /// Address of the admin port, which serves `/health`, `/ready`, `/metrics`, `/groups` and `/version` for probes and
    /// Prometheus; absent: no admin port.
    pub admin: Option<HostPort>,
    /// TLS of the API's port; plain text if it is absent. The admin port is always plain.
    pub tls: Option<HttpTls>,
    /// Whether `/metrics` is served on the API's port. Absent: only if there is no admin port and the server listens
    /// on loopback.
    pub metrics: Option<bool>,
    /// Host names under which a server without keys, and the admin port, may be addressed, besides loopback names and
    /// the listen address: `bora.example`, `*.example`, or `*` for any.
    pub allowed_hosts: Vec<HostPattern>,
    /// Origins whose web pages may use the API (CORS), such as `https://chat.example`; `*` is any. Empty: none.
    pub allowed_origins: Vec<String>,
    /// Networks of the proxies whose `Forwarded` and `X-Forwarded-For` are trusted for the client address in the audit
    /// log.
    pub trusted_proxies: Vec<IpNet>,
    /// Maximum connections of the API port; further ones get a 503.
    pub max_connections: usize,
    /// Seconds that an idle connection is kept open. It should exceed the idle timeout of a load balancer.
    pub keep_alive_seconds: f64,
    /// Seconds that a request's head may take, and that a request's body may pause.
    pub read_timeout_seconds: f64,
    /// Seconds after which a client that does not read its response is disconnected.
    pub write_timeout_seconds: f64,
    /// Seconds that a request's body may take.
    pub body_timeout_seconds: f64,
    /// Minimum average rate of a request's body in bytes per second, after the first `read_timeout_seconds`; 0 = none.
    pub min_body_bytes_per_second: u64,
    /// Memory in bytes for the bodies of all requests that are read or wait to be encoded; above it requests get a 503.
    pub max_body_memory: ByteSize,
    /// The same for one tenant; above it requests get a 429.
    pub max_tenant_body_memory: ByteSize,
}

impl Default for HttpOptions {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".into(),
            port: 8000,
            admin: None,
            tls: None,
            metrics: None,
            allowed_hosts: Vec::new(),
            allowed_origins: Vec::new(),
            trusted_proxies: Vec::new(),
            max_connections: 16_384,
            keep_alive_seconds: 620.0,
            read_timeout_seconds: 30.0,
            write_timeout_seconds: 60.0,
            body_timeout_seconds: 300.0,
            min_body_bytes_per_second: 4096,
            max_body_memory: ByteSize(512 << 20),
            max_tenant_body_memory: ByteSize(128 << 20),
        }
    }
}

/// How long a connection may stay in each of its states.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// Idle.
    pub idle: Duration,
    /// With an incomplete head.
    pub head: Duration,
    /// With a client that does not read.
    pub write: Duration,
}

impl HttpOptions {
    /// Checks every value; `max_body_bytes` is the maximum body.
    pub fn validate(&self, max_body_bytes: usize) -> Result<(), OptionsError> {
        let wrong = |field, expected| Err(OptionsError { section: "http", field, expected });
        let seconds = [
            ("keep_alive_seconds", self.keep_alive_seconds),
            ("read_timeout_seconds", self.read_timeout_seconds),
            ("write_timeout_seconds", self.write_timeout_seconds),
            ("body_timeout_seconds", self.body_timeout_seconds),
        ];
        for (field, value) in seconds {
            if !(0.001..=1e7).contains(&value) {
                return wrong(field, "a number of seconds between 0.001 and 10000000");
            }
        }
        if self.max_connections == 0 {
            return wrong("max_connections", "at least 1");
        }
        let budgets =
            [("max_body_memory", self.max_body_memory), ("max_tenant_body_memory", self.max_tenant_body_memory)];
        for (field, ByteSize(bytes)) in budgets {
            if bytes < max_body_bytes as u64 {
                return wrong(field, "at least router.max_body_bytes");
            }
        }
        if self.max_tenant_body_memory > self.max_body_memory {
            return wrong("max_tenant_body_memory", "at most http.max_body_memory");
        }
        if !self.allowed_origins.iter().all(|origin| is_origin(origin)) {
            return wrong("allowed_origins", "origins such as https://chat.example or http://localhost:3000, or `*`");
        }
        if self.allowed_origins.len() > 1 && self.allows_any_origin() {
            return wrong("allowed_origins", "`*` alone, or origins without it");
        }
        Ok(())
    }

    /// Whether pages of every origin may use the API.
    pub fn allows_any_origin(&self) -> bool {
        self.allowed_origins.iter().any(|origin| origin == "*")
    }

    /// Whether `/metrics` is served on the API port.
    pub fn has_metrics(&self) -> bool {
        self.metrics.unwrap_or(self.admin.is_none())
    }

    /// The timeouts of a connection.
    pub fn timeouts(&self) -> Timeouts {
        Timeouts {
            idle: Duration::from_secs_f64(self.keep_alive_seconds),
            head: self.read_timeout(),
            write: Duration::from_secs_f64(self.write_timeout_seconds),
        }
    }

    /// Maximum pause of a body.
    pub fn read_timeout(&self) -> Duration {
        Duration::from_secs_f64(self.read_timeout_seconds)
    }
}

/// `scheme://host[:port]` as browsers write it, or `*`.
fn is_origin(text: &str) -> bool {
    let host = text.split_once("://").map(|(_, host)| host);
    let is_plain = |host: &str| {
        !host.is_empty() && !host.contains(['/', '?', '#', '@', '*', ' ']) && host == host.to_ascii_lowercase()
    };
    text == "*" || (host.is_some_and(is_plain) && HeaderValue::from_str(text).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(options: HttpOptions) -> Option<&'static str> {
        options.validate(32 << 20).err().map(|error| error.field)
    }

    #[test]
    fn names_the_value_out_of_range() {
        let default = HttpOptions::default;
        assert_eq!(wrong(default()), None);
        assert_eq!(wrong(HttpOptions { keep_alive_seconds: 0.0, ..default() }), Some("keep_alive_seconds"));
        assert_eq!(wrong(HttpOptions { read_timeout_seconds: f64::NAN, ..default() }), Some("read_timeout_seconds"));
        assert_eq!(wrong(HttpOptions { max_connections: 0, ..default() }), Some("max_connections"));
        assert_eq!(wrong(HttpOptions { max_body_memory: ByteSize(1 << 20), ..default() }), Some("max_body_memory"));
        let tenant = HttpOptions { max_tenant_body_memory: ByteSize(1 << 30), ..default() };
        assert_eq!(wrong(tenant), Some("max_tenant_body_memory"));
        for origin in ["chat.example", "https://chat.example/", "https://*.example", "https://Chat.example", ""] {
            let options = HttpOptions { allowed_origins: vec![origin.into()], ..default() };
            assert_eq!(wrong(options), Some("allowed_origins"), "{origin}");
        }
        for origin in ["https://chat.example", "http://localhost:3000", "app://obsidian.md", "*"] {
            let options = HttpOptions { allowed_origins: vec![origin.into()], ..default() };
            assert_eq!(wrong(options), None, "{origin}");
        }
    }
}
