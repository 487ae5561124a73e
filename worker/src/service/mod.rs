//! The gRPC services of a group's leader: `bora.v1.Inference`, `bora.v1.Admin`, `grpc.health.v1` and reflection. This
//! module converts messages; the engine makes all decisions.
//!
//! The port opens immediately. Until the engine has started, [`Host`] responds with `UNAVAILABLE`, and the health
//! service with "not serving". Other services (the group's `Peers`) can share the port through
//! [`ServiceOptions::routes`].

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

/// Maximum bytes of a message. A prompt of 262,144 tokens takes at most 1.3 MB; the rest is for images.
const MAX_MESSAGE_BYTES: usize = 64 * 1024 * 1024;
/// Flow-control window of a stream: a long prompt arrives without a pause.
const STREAM_WINDOW_BYTES: u32 = 2 * 1024 * 1024;
/// Flow-control window of a connection, for all its streams together.
const CONNECTION_WINDOW_BYTES: u32 = 64 * 1024 * 1024;
/// Maximum frame size. A long prompt takes few frames, each of which costs the router a system call and the worker a
/// wake-up. Other data of the connection waits for at most one frame, a fifth of a millisecond at 10 Gbit/s.
const FRAME_BYTES: u32 = 256 * 1024;
/// Maximum streams of one connection. A router has one connection, and every request is a stream.
const MAX_STREAMS: u32 = 16_384;
/// A connection without a response to a ping for this long is dead, and its sequences are aborted.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Interval between pings.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// How long open streams may continue after the server begins to stop.
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// Returns the state of the ranks, for [`Admin::Status`](v1::admin_server::Admin::status).
pub type RankSource = Arc<dyn Fn() -> Vec<v1::RankStatus> + Send + Sync>;

/// The group behind the port, set when the group is ready.
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
    /// A host whose group is still loading.
    pub fn loading(identity: ServerIdentity) -> Self {
        Self { identity: Arc::new(identity), group: Arc::default() }
    }

    /// A host whose group is ready.
    pub fn of(cluster: &str, engine: EngineHandle, record: GroupRecord) -> Self {
        let host = Self::loading(ServerIdentity::of_record(cluster, &record));
        host.ready(engine, record, Arc::new(Vec::new));
        host
    }

    /// Sets the group, which is ready from now on. Only the first call has an effect.
    pub fn ready(&self, engine: EngineHandle, record: GroupRecord, ranks: RankSource) {
        self.identity.set_weights(&record.weight_fingerprint);
        // a second group behind one port is a bug of the caller; the first one stays
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
    /// The group's record with its current state.
    pub(crate) fn record(&self) -> GroupRecord {
        let state = match self.engine.health() {
            EngineHealth::Ready | EngineHealth::Stalled { .. } => GroupState::Ready,
            EngineHealth::Draining | EngineHealth::Failed { .. } => GroupState::Draining,
        };
        GroupRecord { state, ..self.record.clone() }
    }
}

/// Further options of the server.
#[derive(Default)]
pub struct ServiceOptions {
    /// Further services on the same port.
    pub routes: Routes,
    /// Mutual TLS. `None` means plain text.
    pub tls: Option<Acceptor>,
    /// Further listener that serves only `grpc.health.v1`, without TLS.
    pub health: Option<TcpListener>,
}

/// Why the server failed.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// gRPC failed.
    #[error("grpc: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// Another server already accepts the connections of this process.
    #[error("the group of this process is served already")]
    Taken,
    /// The descriptors of the contract are invalid.
    #[error("grpc reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Source of connections.
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

/// Serves until `stop` completes, then lets open streams end for a few seconds. The caller should drain the engine
/// first if running sequences should finish.
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
            // streams that are still open are closed
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
