//! The router: an HTTP server for the OpenAI and Anthropic APIs in front of groups of workers.
//!
//! The router is stateless. If a replica dies, any other replica serves the same requests the same way.
//!
//! The path of a request through the modules, from top to bottom:
//!
//! | module | what it does |
//! |---|---|
//! | [`http`] | connections, deadlines, limits of bytes and open files |
//! | [`server`] | routes and middleware; [`request_id`] identifies a request |
//! | [`access`] | API keys and tokens, tenants, quotas, the audit log |
//! | [`api`] | one file or folder per protocol: parses, validates, writes responses; [`openapi`] describes them |
//! | [`encode`] | conversations to token IDs and block hashes, with a cache of known conversations |
//! | [`relay`] | one sequence over changing groups: failover, retry budget, text and tool calls from tokens |
//! | [`place`] | policy: which group gets a sequence, admission, the prefix index |
//! | [`fleet`] | state: the groups, their event streams, validation of what they send |
//!
//! The modules beside that path:
//!
//! | module | what it does |
//! |---|---|
//! | [`service`] | the state that all requests share |
//! | [`options`] | the `router` section of the configuration |
//! | [`models`] | the configured models: tokenizer, aliases, limits, default sampling |
//! | `fairness` | equal shares of a full queue for all tenants, in [`encode`] and [`place`] |
//! | [`metrics`] | metrics of this process, exported at `/metrics` |
//! | [`console`] | a web page for people |
#![forbid(unsafe_code)]

pub mod access;
pub mod api;
pub mod console;
pub mod encode;
mod fairness;
pub mod fleet;
pub mod http;
pub mod metrics;
pub mod models;
pub mod openapi;
pub mod options;
pub mod place;
pub mod relay;
pub mod request_id;
pub mod server;
pub mod service;

use std::{collections::HashMap, future::Future, sync::Arc, time::Duration};

use bora_common::{registry::GroupChange, secret::ClusterKeys, tls::Acceptor};
use prometheus_client::metrics::gauge::Gauge;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};

use crate::http::{listen::Port, shutdown::Shutdown};
pub use crate::{
    access::{Access, AccessError, AccessOptions, keys::Digest},
    http::options::HttpOptions,
    models::{DefaultSampling, ModelSpec},
    options::{ConversationRules, OptionsError, RouterOptions},
    service::Service,
};

/// A router that follows a registry.
pub struct Router {
    service: Arc<Service>,
    following: tokio::task::JoinHandle<()>,
    admitting: tokio::task::JoinHandle<()>,
    refreshing: tokio::task::JoinHandle<()>,
    sharing: Option<tokio::task::JoinHandle<()>>,
}

/// Why a router cannot start.
#[derive(Debug, thiserror::Error)]
pub enum RouterError {
    /// An option has an invalid value.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The API keys or the OIDC configuration are invalid.
    #[error(transparent)]
    Access(#[from] AccessError),
}

impl Router {
    /// Creates a router for `models` in the cluster of `keys`, and starts to follow `changes`, a registry's watch. It
    /// must be called within a tokio runtime. It fails if the options, the key file or the OIDC configuration are
    /// invalid.
    pub fn new(
        options: RouterOptions,
        keys: ClusterKeys,
        models: HashMap<String, ModelSpec>,
        changes: mpsc::Receiver<GroupChange>,
    ) -> Result<Self, RouterError> {
        options.validate()?;
        options.http.validate(options.max_body_bytes)?;
        let access = Arc::new(Access::open(options.access.clone())?);
        let refreshing = tokio::spawn(Arc::clone(&access).keep_fresh());
        let service = Arc::new(Service::new(options, keys, models, access));
        let following = tokio::spawn(Arc::clone(service.fleet()).follow(changes));
        let admission = Arc::clone(&service.relay().admission);
        let admitting = tokio::spawn(admission.serve(Arc::clone(service.fleet())));
        Ok(Self { service, following, admitting, refreshing, sharing: None })
    }

    /// Divides the limits of tenants and the retry budget by the number of live routers, and follows that number.
    pub fn share_limits(&mut self, mut live: watch::Receiver<u32>) {
        let gauge = Gauge::<i64>::default();
        let counted = gauge.clone();
        let help = "Live routers, which share the limits of tenants and the retry budget";
        self.service.metrics().register(|registry| registry.register("live_routers", help, counted));
        let service = Arc::clone(&self.service);
        let sharing = tokio::spawn(async move {
            loop {
                let routers = *live.borrow_and_update();
                service.access().routers().set(routers);
                gauge.set(i64::from(routers));
                if live.changed().await.is_err() {
                    return;
                }
            }
        });
        if let Some(before) = self.sharing.replace(sharing) {
            before.abort();
        }
    }

    /// The state that all requests share.
    pub fn service(&self) -> &Arc<Service> {
        &self.service
    }

    /// The routes of the API without a listener, for tests and for embedding in another server.
    pub fn routes(&self) -> axum::Router {
        server::routes(Arc::clone(&self.service))
    }

    /// Serves the admin routes (probes, metrics, operators) on `listener` until the future is dropped.
    pub fn serve_admin(&self, listener: TcpListener) -> impl Future<Output = std::io::Result<()>> + Send + 'static {
        let routes = server::admin_routes(Arc::clone(&self.service));
        let port = Port::admin(routes, self.service.options().http.timeouts());
        port.serve(listener, Duration::ZERO, Shutdown::default(), std::future::pending())
    }

    /// Serves the API until `shutdown` is ready and all open requests or the grace period have ended.
    pub async fn serve(
        self,
        listener: TcpListener,
        tls: Option<Acceptor>,
        shutdown: impl Future<Output = ()>,
    ) -> std::io::Result<()> {
        let options = self.service.options();
        let port = Port {
            name: "api",
            tls,
            routes: self.routes(),
            shed_routes: Some(server::shed_routes(Arc::clone(&self.service))),
            timeouts: options.http.timeouts(),
            max_connections: options.http.max_connections,
            metrics: self.service.http_metrics().clone(),
        };
        port.serve(listener, options.shutdown_grace(), self.service.shutdown().clone(), shutdown).await
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.following.abort();
        self.admitting.abort();
        self.refreshing.abort();
        if let Some(sharing) = &self.sharing {
            sharing.abort();
        }
    }
}
