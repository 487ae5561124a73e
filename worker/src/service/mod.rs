//! The gRPC border of a group's leader: `bora.v1.Inference`, `bora.v1.Admin`, `grpc.health.v1` and
//! reflection. Messages in, messages out; every decision is the engine's.
//!
//! The port opens at once: until the engine is there, [`Host`] responses `UNAVAILABLE` and health says "not
//! serving". Other services (the group's `Peers`) can share the port through [`ServiceOptions::routes`].

mod admin;
mod health;
mod inference;
mod watch_stream;

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bora_common::peer::local::LocalListener;
use bora_common::peer::{Admission, Guard, ServerIdentity};
use bora_common::registry::{GroupRecord, GroupState};
use bora_common::tls::Acceptor;
use bora_proto::v1::{self, admin_server::AdminServer, inference_server::InferenceServer};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use crate::engine::{EngineError, EngineHandle, EngineHealth};

/// A prompt of 262,144 token IDs takes at most 1.3 MB; the rest is for images.
const MAX_MESSAGE_BYTES: usize = 64 * 1024 * 1024;
/// What a stream may send before it waits for the reader: a long prompt arrives without a pause.
const STREAM_WINDOW_BYTES: u32 = 2 * 1024 * 1024;
/// The same for all streams of a connection together.
const CONNECTION_WINDOW_BYTES: u32 = 64 * 1024 * 1024;
/// A long prompt comes in few chunks: each costs the router a system call and this side a wake-up. What else the
/// connection carries waits for one of them at most, a fifth of a millisecond at 10 Gbit/s.
const FRAME_BYTES: u32 = 256 * 1024;
/// Streams of one connection (a router has one, and every request of it is a stream).
const MAX_STREAMS: u32 = 16_384;
/// A connection that does not answer a ping for this long is dead, and its sequences are aborted.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// How often that is tried.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// How long open streams may continue after the server was asked to stop.
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// Says how the ranks are, for [`Admin::Status`](v1::admin_server::Admin::status).
pub type RankSource = Arc<dyn Fn() -> Vec<v1::RankStatus> + Send + Sync>;

/// The group behind the port, once it is there.
#[derive(Clone)]
pub struct Host {
    identity: Arc<ServerIdentity>,
    group: Arc<OnceLock<Group>>,
}

pub(crate) struct Group {
    pub(crate) engine: EngineHandle,
    record: GroupRecord,
    pub(crate) ranks: RankSource,
}

impl Host {
    /// A group that still loads.
    pub fn loading(identity: ServerIdentity) -> Self {
        Self { identity: Arc::new(identity), group: Arc::default() }
    }

    /// A group of this cluster that is ready.
    pub fn of(cluster: &str, engine: EngineHandle, record: GroupRecord) -> Self {
        let host = Self::loading(ServerIdentity::of_record(cluster, &record));
        host.ready(engine, record, Arc::new(Vec::new));
        host
    }

    /// The group is ready from now on. Only the first call counts.
    pub fn ready(&self, engine: EngineHandle, record: GroupRecord, ranks: RankSource) {
        self.identity.set_weights(&record.weight_fingerprint);
        // a second group behind one port is a bug of the caller, and the first one continues serving
        if self.group.set(Group { engine, record, ranks }).is_err() {
            tracing::error!("a second group was offered to one port; ignored");
        }
    }

    /// Name of the cluster.
    pub(crate) fn cluster(&self) -> &str {
        &self.identity.cluster
    }

    pub(crate) fn group(&self) -> Result<&Group, Status> {
        self.group.get().ok_or_else(|| Status::unavailable("the group is loading; retry elsewhere"))
    }
}

impl Group {
    /// The record, with the state as it is now.
    pub(crate) fn record(&self) -> GroupRecord {
        let state = match self.engine.health() {
            EngineHealth::Ready | EngineHealth::Stalled { .. } => GroupState::Ready,
            EngineHealth::Draining | EngineHealth::Failed { .. } => GroupState::Draining,
        };
        GroupRecord { state, ..self.record.clone() }
    }
}

/// What else the port serves.
#[derive(Default)]
pub struct ServiceOptions {
    /// Further services.
    pub routes: Routes,
    /// Mutual TLS; plain text where it is absent.
    pub tls: Option<Acceptor>,
    /// Where `grpc.health.v1` is served as well, alone and without TLS.
    pub health: Option<TcpListener>,
}

/// The port can't be served any more.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// gRPC failed.
    #[error("grpc: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// Another server has the connections of this process.
    #[error("the group of this process is served already")]
    Taken,
    /// The contracts' own descriptors are wrong.
    #[error("grpc reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Where callers come from.
pub enum Listener {
    /// The network.
    Tcp(TcpListener),
    /// The same process.
    Local(LocalListener),
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self::Tcp(listener)
    }
}

/// Serves until `stop` completes, then lets open streams end for a few seconds. Drain the engine first
/// where running sequences should finish.
pub async fn serve(
    listener: impl Into<Listener>,
    host: Host,
    options: ServiceOptions,
    stop: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let stopping = CancellationToken::new();
    let (reporter, health_service) = tonic_health::server::health_reporter();
    let health_reports = tokio::spawn(health::report(reporter, host.clone(), stopping.clone()));
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(bora_proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let admission = if options.tls.is_some() { Admission::ByRole } else { Admission::Anybody };
    let guard = Guard::new(Arc::clone(&host.identity), admission);
    let inference = inference::InferenceService { host: host.clone(), stopping: stopping.clone() };
    let routes = options
        .routes
        .add_service(InferenceServer::new(inference).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(AdminServer::new(admin::AdminService { host }))
        .add_service(health_service.clone())
        .add_service(reflection);
    let health = options.health.map(|listener| {
        let server = Server::builder().add_service(health_service.clone());
        tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)))
    });
    let server = Server::builder()
        .layer(guard)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .max_concurrent_streams(MAX_STREAMS)
        .add_routes(routes);
    let stopped = stopping.clone().cancelled_owned();
    let mut server: Pin<Box<dyn Future<Output = Result<(), tonic::transport::Error>> + Send>> =
        match (listener.into(), options.tls) {
            (Listener::Tcp(listener), None) => {
                let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
                Box::pin(server.serve_with_incoming_shutdown(incoming, stopped))
            }
            (Listener::Tcp(listener), Some(tls)) => {
                Box::pin(server.serve_with_incoming_shutdown(tls.incoming(listener), stopped))
            }
            (Listener::Local(listener), _) => {
                let incoming = listener.incoming().ok_or(ServeError::Taken)?;
                Box::pin(server.serve_with_incoming_shutdown(incoming, stopped))
            }
        };
    tokio::pin!(stop);
    let outcome = tokio::select! {
        outcome = &mut server => outcome,
        () = &mut stop => {
            stopping.cancel();
            // streams that are still open then are cut
            tokio::time::timeout(STOP_WITHIN, &mut server).await.unwrap_or(Ok(()))
        }
    };
    stopping.cancel();
    health_reports.abort();
    if let Some(health) = health {
        health.abort();
    }
    Ok(outcome?)
}

impl From<EngineError> for Status {
    fn from(error: EngineError) -> Self {
        let message = error.to_string();
        match error {
            EngineError::Invalid { .. } => Status::invalid_argument(message),
            EngineError::Exhausted { .. } => Status::resource_exhausted(message),
            EngineError::Unavailable { .. } => Status::unavailable(message),
            EngineError::Internal { .. } => Status::internal(message),
        }
    }
}
