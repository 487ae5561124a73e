//! A port: it accepts up to `max_connections` connections until the server stops.
//!
//! A connection above the limit gets a 503 (probes are served as usual), and idle connections are closed to make room.
//! Some open files are reserved for the admin port and for the groups, so that a flood of clients does not look like a
//! broken server.

use std::{
    future::Future,
    io,
    net::{Ipv4Addr, SocketAddr},
    os::fd::AsRawFd as _,
    sync::Arc,
    time::Duration,
};

use axum::Router;
use bora_common::tls::Acceptor;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    time::Instant,
};

use super::{
    ConnectionInfo,
    connection::{Connection, Signal},
    metrics::{HttpMetrics, Refusal},
    options::Timeouts,
    shutdown::Shutdown,
};

/// Deadline of a connection above the limit, in each of its states.
const SHED_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum connections of the admin port.
const MAX_ADMIN_CONNECTIONS: usize = 256;
/// How long responses have to end after the grace period.
const CUT_TIMEOUT: Duration = Duration::from_secs(2);
/// Time for the connections of the backlog when the server stops.
const LAST_ACCEPT_TIMEOUT: Duration = Duration::from_secs(2);
/// Backoff after a connection could not be accepted: the first and the longest one.
const ACCEPT_BACKOFF: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(1)];
/// How often a shortage is logged, and idle connections are closed because of it.
const SHORTAGE_LOG_INTERVAL: Duration = Duration::from_secs(10);
const SHORTAGE_INTERVAL: Duration = Duration::from_secs(1);

/// The configuration of a port.
pub struct Port {
    /// Its name in the log.
    pub name: &'static str,
    /// TLS, if it has any.
    pub tls: Option<Acceptor>,
    /// The routes.
    pub routes: Router,
    /// The routes of connections above the limit; without them such connections wait to be accepted.
    pub shed_routes: Option<Router>,
    /// How long a connection may stay in each of its states.
    pub timeouts: Timeouts,
    /// Maximum number of parallel connections.
    pub max_connections: usize,
    /// The metrics of the port.
    pub metrics: HttpMetrics,
}

impl Port {
    /// The port for probes and operators, which has reserved open files.
    pub fn admin(routes: Router, timeouts: Timeouts) -> Self {
        let max_connections = (OpenFiles::now().reserved as usize / 2).min(MAX_ADMIN_CONNECTIONS);
        Self {
            name: "admin",
            tls: None,
            routes,
            shed_routes: None,
            timeouts,
            max_connections,
            metrics: HttpMetrics::default(),
        }
    }

    /// Serves connections until `stopped` is ready. Then open requests get `grace` to finish, and the remaining ones
    /// end with an error.
    pub async fn serve(
        self,
        listener: TcpListener,
        grace: Duration,
        shutdown: Shutdown,
        stopped: impl Future<Output = ()>,
    ) -> io::Result<()> {
        let (signal, _) = watch::channel(Signal::default());
        let mut accepting = Accepting::new(self, signal);
        tokio::select! {
            () = accepting.run(&listener) => {}
            () = stopped => {}
        }
        shutdown.stop();
        // Connections of the backlog would be reset. A flood of clients, or a lack of open files, must not delay the
        // end.
        let last_accept = Instant::now() + LAST_ACCEPT_TIMEOUT;
        while Instant::now() < last_accept {
            match tokio::time::timeout(Duration::ZERO, listener.accept()).await {
                Ok(Ok((stream, peer))) => accepting.take(stream, peer).await,
                Ok(Err(_)) => tokio::time::sleep(ACCEPT_BACKOFF[0]).await,
                Err(_) => break,
            }
        }
        drop(listener);
        let (signal, connections) = (accepting.signal, accepting.port.metrics.connections);
        signal.send_modify(|signal| signal.stopping = true);
        tracing::info!(connections = connections.get(), "no new connections, finishing open requests");
        if tokio::time::timeout(grace, signal.closed()).await.is_err() {
            tracing::warn!(connections = connections.get(), "the grace period is over, aborting open responses");
            shutdown.cut();
            let _ = tokio::time::timeout(CUT_TIMEOUT, signal.closed()).await;
        }
        Ok(())
    }
}

/// The state of a port that accepts connections.
struct Accepting {
    port: Port,
    signal: watch::Sender<Signal>,
    files: OpenFiles,
    slots: Arc<Semaphore>,
    shed_slots: Arc<Semaphore>,
    shortage: Shortage,
}

impl Accepting {
    fn new(port: Port, signal: watch::Sender<Signal>) -> Self {
        let files = OpenFiles::now();
        let slots = Arc::new(Semaphore::new(port.max_connections.min(Semaphore::MAX_PERMITS)));
        let shed_slots = Arc::new(Semaphore::new((files.reserved as usize / 4).max(1)));
        Self { port, signal, files, slots, shed_slots, shortage: Shortage::default() }
    }

    async fn run(&mut self, listener: &TcpListener) {
        let mut backoff = ACCEPT_BACKOFF[0];
        loop {
            if self.port.shed_routes.is_none() {
                // never closed; the permit belongs to the connection
                let _ = self.slots.acquire().await;
            }
            match listener.accept().await {
                Ok((stream, peer)) => {
                    backoff = ACCEPT_BACKOFF[0];
                    self.take(stream, peer).await;
                }
                Err(error) => {
                    // no open files are left, or the client has already disconnected
                    self.short_of(&error.to_string());
                    tokio::time::sleep(backoff).await;
                    backoff = (backoff * 2).min(ACCEPT_BACKOFF[1]);
                }
            }
        }
    }

    /// Serves a connection, or sheds it. Waits if too many are being shed.
    async fn take(&mut self, stream: TcpStream, peer: SocketAddr) {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "no TCP_NODELAY on a connection");
        }
        let has_file = self.port.shed_routes.is_none() || !self.files.is_reserved(&stream);
        let slot = if has_file { Arc::clone(&self.slots).try_acquire_owned().ok() } else { None };
        let is_shed = slot.is_none() && self.port.shed_routes.is_some();
        let slot = match slot {
            Some(slot) => Ok(slot),
            None => {
                self.short_of(if has_file { "connections" } else { "open files" });
                Arc::clone(&self.shed_slots).acquire_owned().await
            }
        };
        let shed = Timeouts { idle: SHED_TIMEOUT, head: SHED_TIMEOUT, write: SHED_TIMEOUT };
        let unknown = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let connection = Connection {
            info: ConnectionInfo { peer, local: stream.local_addr().unwrap_or(unknown) },
            routes: match &self.port.shed_routes {
                Some(routes) if is_shed => routes.clone(),
                _ => self.port.routes.clone(),
            },
            timeouts: if is_shed { shed } else { self.port.timeouts },
            only_once: is_shed,
            signal: self.signal.subscribe(),
            metrics: self.port.metrics.clone(),
        };
        let (tls, metrics) = (self.port.tls.clone(), self.port.metrics.clone());
        metrics.connections.inc();
        tokio::spawn(async move {
            match tls {
                None => connection.serve(stream).await,
                Some(tls) => match tls.accept(stream).await {
                    Ok(stream) => connection.serve(stream).await,
                    // any client can cause these errors, so they are logged at debug level only
                    Err(error) => tracing::debug!(%error, "tls: a connection was refused"),
                },
            }
            metrics.connections.dec();
            drop(slot);
        });
    }

    /// Counts a shortage, closes idle connections and logs the shortage; the last two are rate-limited.
    fn short_of(&mut self, what: &str) {
        self.port.metrics.refused(Refusal::Connections);
        let now = Instant::now();
        if Shortage::is_due(&mut self.shortage.signalled, now, SHORTAGE_INTERVAL) {
            self.signal.send_modify(|signal| signal.shortages += 1);
        }
        self.shortage.refused += 1;
        if Shortage::is_due(&mut self.shortage.logged, now, SHORTAGE_LOG_INTERVAL) {
            let (port, refused) = (self.port.name, std::mem::take(&mut self.shortage.refused));
            let (connections, max_open_files) = (self.port.metrics.connections.get(), self.files.limit);
            tracing::warn!(port, reason = what, refused, connections, max_open_files, "connections are refused");
        }
    }
}

/// When connections last ran out.
#[derive(Default)]
struct Shortage {
    signalled: Option<Instant>,
    logged: Option<Instant>,
    /// Refused since the last log record.
    refused: u64,
}

impl Shortage {
    fn is_due(last: &mut Option<Instant>, now: Instant, interval: Duration) -> bool {
        let due = last.is_none_or(|last| now - last >= interval);
        if due {
            *last = Some(now);
        }
        due
    }
}

/// Maximum open files of this process, and the number above which connections of the API are refused.
#[derive(Clone, Copy, Debug)]
struct OpenFiles {
    limit: u64,
    reserved: u64,
}

impl OpenFiles {
    fn now() -> Self {
        let limit = rlimit::Resource::NOFILE.get_soft().unwrap_or(1024);
        Self { limit, reserved: (limit / 8).clamp(32, 1024) }
    }

    /// The system assigns the lowest free descriptor, so the descriptor is a lower bound of the number of open files.
    fn is_reserved(&self, stream: &TcpStream) -> bool {
        stream.as_raw_fd() as u64 >= self.limit.saturating_sub(self.reserved)
    }
}
