//! gRPC within one process: connections are pipes in memory, and no port is opened.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use hyper_util::rt::TokioIo;
use tokio::io::{DuplexStream, duplex};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::{Channel, Endpoint};

/// Bytes that one side may be ahead of the other.
const BUFFER_BYTES: usize = 256 << 10;
/// Connections that may wait to be accepted.
const BACKLOG: usize = 16;
/// What the server's record says as its endpoint: nobody dials it.
pub const ENDPOINT: &str = "in-process:1";

/// The caller's end.
#[derive(Clone, Debug)]
pub struct LocalConnector {
    connections: mpsc::Sender<DuplexStream>,
}

/// The server's end; the first who takes it serves it.
#[derive(Clone, Debug)]
pub struct LocalListener {
    connections: Arc<Mutex<Option<mpsc::Receiver<DuplexStream>>>>,
}

/// Both ends.
pub fn pair() -> (LocalConnector, LocalListener) {
    let (sender, receiver) = mpsc::channel(BACKLOG);
    let listener = LocalListener { connections: Arc::new(Mutex::new(Some(receiver))) };
    (LocalConnector { connections: sender }, listener)
}

impl LocalListener {
    /// The connections, for a gRPC server; none if another server has them.
    pub fn incoming(&self) -> Option<impl Stream<Item = io::Result<DuplexStream>> + Send + use<>> {
        let receiver = self.connections.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        Some(ReceiverStream::new(receiver).map(Ok))
    }
}

impl LocalConnector {
    /// A gRPC channel that connects when it is first used; the address of its endpoint is not looked at.
    pub fn channel(&self, endpoint: &Endpoint) -> Channel {
        let connections = self.connections.clone();
        endpoint.connect_with_connector_lazy(tower::service_fn(move |_| {
            let connections = connections.clone();
            async move {
                let (near, far) = duplex(BUFFER_BYTES);
                connections.send(far).await.map_err(|_| io::Error::from(io::ErrorKind::ConnectionRefused))?;
                Ok::<_, io::Error>(TokioIo::new(near))
            }
        }))
    }
}

impl PartialEq for LocalConnector {
    fn eq(&self, other: &Self) -> bool {
        self.connections.same_channel(&other.connections)
    }
}
