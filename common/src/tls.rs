//! TLS at both borders: certificates for the HTTP side, mutual TLS between routers, leaders and followers.
//!
//! Files are looked at again every two seconds while connections come, so a renewed certificate is used by the next
//! connection and needs no restart. Files that can't be used leave what was in force, and say so in the log.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::peer::role::{Peer, PeerCertificate, Role, Roles, is_dns_name};

/// How often files are looked at.
const POLL_INTERVAL: Duration = Duration::from_secs(2);
/// A peer that has not finished its handshake by then is not served.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(10);
/// gRPC connections that may be in their handshake at once; one more ends the oldest.
const MAX_HANDSHAKES: usize = 256;

/// The HTTP side's certificate.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpTls {
    /// PEM file of the certificate, followed by those of its issuers.
    pub certificate_file: PathBuf,
    /// PEM file of its key.
    pub key_file: PathBuf,
}

/// Mutual TLS between the processes of a cluster: each shows its certificate and checks the other's.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrpcTls {
    /// PEM file of the authorities that both sides' certificates are checked against: an authority of the cluster's
    /// own. What a certificate of theirs may be used for is said by the roles that it bears.
    pub ca_file: PathBuf,
    /// PEM file of this process's certificate (good for server and client), followed by those of its issuers. It bears
    /// the process's role as a DNS name, `ROLE.CLUSTER.bora.internal` ([`crate::peer::role`]).
    pub certificate_file: PathBuf,
    /// PEM file of its key.
    pub key_file: PathBuf,
}

/// Files that TLS can't be spoken with.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// One can't be read.
    #[error("{path}: {error}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// One holds something else than it should.
    #[error("{path}: {reason}", path = path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What was expected.
        reason: String,
    },
    /// The cluster's name can't stand in the names of roles.
    #[error("cluster: `{0}`: with grpc.tls, expected lower-case letters, digits, hyphens and dots")]
    Cluster(String),
    /// The certificate of this process gives it no role that it needs.
    #[error("{path}: the certificate bears none of the DNS names {names}", path = path.display())]
    Role {
        /// Its file.
        path: PathBuf,
        /// Of which it needs one.
        names: String,
    },
}

/// What is made of files, made again when they change.
struct Fresh<T> {
    paths: Vec<PathBuf>,
    build: Build<T>,
    state: Mutex<State<T>>,
}

/// Makes it of the files' contents.
type Build<T> = Box<dyn Fn(&[Vec<u8>]) -> Result<T, TlsError> + Send + Sync>;

struct State<T> {
    /// Of the files' contents.
    digest: u128,
    looked_at: Instant,
    current: Arc<T>,
}

impl<T> Fresh<T> {
    fn open(
        paths: Vec<PathBuf>,
        build: impl Fn(&[Vec<u8>]) -> Result<T, TlsError> + Send + Sync + 'static,
    ) -> Result<Self, TlsError> {
        let contents = read_all(&paths)?;
        let state =
            State { digest: digest(&contents), looked_at: Instant::now(), current: Arc::new(build(&contents)?) };
        Ok(Self { paths, build: Box::new(build), state: Mutex::new(state) })
    }

    /// As the files say. Reads a few small files, at most every two seconds.
    fn current(&self) -> Arc<T> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.looked_at.elapsed() < POLL_INTERVAL {
            return Arc::clone(&state.current);
        }
        state.looked_at = Instant::now();
        let files = self.paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
        let outcome = read_all(&self.paths).and_then(|contents| {
            let digest = digest(&contents);
            if digest == state.digest { Ok(None) } else { (self.build)(&contents).map(|built| Some((digest, built))) }
        });
        match outcome {
            Ok(None) => {}
            Ok(Some((digest, built))) => {
                (state.digest, state.current) = (digest, Arc::new(built));
                tracing::info!(files, "tls certificates were read again");
            }
            Err(error) => tracing::error!(%error, "tls certificates stay as they were"),
        }
        Arc::clone(&state.current)
    }
}

/// Takes TLS connections.
#[derive(Clone)]
pub struct Acceptor {
    config: Arc<Fresh<ServerConfig>>,
    /// Whose roles the clients' certificates bear.
    cluster: Arc<str>,
}

impl Acceptor {
    /// For the HTTP side: clients show no certificate.
    pub fn for_http(files: &HttpTls) -> Result<Self, TlsError> {
        let HttpTls { certificate_file, key_file } = files.clone();
        let config = Fresh::open(vec![certificate_file.clone(), key_file.clone()], move |contents| {
            let (chain, key) = identity(&certificate_file, &contents[0], &key_file, &contents[1])?;
            let wrong = |error: rustls::Error| content(&certificate_file, error);
            let mut config = ServerConfig::builder_with_provider(provider())
                .with_safe_default_protocol_versions()
                .map_err(wrong)?
                .with_no_client_auth()
                .with_single_cert(chain, key)
                .map_err(wrong)?;
            config.alpn_protocols = vec![b"http/1.1".to_vec()];
            Ok(config)
        })?;
        Ok(Self { config: Arc::new(config), cluster: "".into() })
    }

    /// For gRPC: a client shows a certificate of the cluster's authority, or is not served.
    pub fn for_grpc(files: &GrpcTls, cluster: &str) -> Result<Self, TlsError> {
        files.require(cluster, &[Role::Worker])?;
        let (paths, GrpcTls { ca_file, certificate_file, key_file }) = (files.paths(), files.clone());
        let config = Fresh::open(paths, move |contents| {
            let roots = roots(&ca_file, &contents[0])?;
            let (chain, key) = identity(&certificate_file, &contents[1], &key_file, &contents[2])?;
            let wrong = |error: rustls::Error| content(&certificate_file, error);
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
                .build()
                .map_err(|error| content(&ca_file, error))?;
            let mut config = ServerConfig::builder_with_provider(provider())
                .with_protocol_versions(&[&rustls::version::TLS13])
                .map_err(wrong)?
                .with_client_cert_verifier(verifier)
                .with_single_cert(chain, key)
                .map_err(wrong)?;
            config.alpn_protocols = vec![b"h2".to_vec()];
            Ok(config)
        })?;
        Ok(Self { config: Arc::new(config), cluster: cluster.into() })
    }

    /// The handshake with a client, within its time.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<server::TlsStream<TcpStream>> {
        let acceptor = TlsAcceptor::from(self.config.current());
        tokio::time::timeout(HANDSHAKE_WITHIN, acceptor.accept(stream)).await?
    }

    /// Connections whose handshake succeeded, for a gRPC server. Handshakes run beside each other: one that is slow
    /// holds nobody up, and when there are too many the oldest one is given up.
    pub fn incoming(self, listener: TcpListener) -> ReceiverStream<io::Result<GrpcStream>> {
        let (sender, receiver) = mpsc::channel(MAX_HANDSHAKES);
        tokio::spawn(async move {
            let mut handshakes: VecDeque<AbortHandle> = VecDeque::new();
            loop {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    () = sender.closed() => return,
                };
                let stream = match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        tracing::warn!(%error, "a connection could not be accepted");
                        tokio::time::sleep(Duration::from_millis(20)).await;
                        continue;
                    }
                };
                if handshakes.len() >= MAX_HANDSHAKES {
                    handshakes.retain(|handshake| !handshake.is_finished());
                }
                if handshakes.len() >= MAX_HANDSHAKES
                    && let Some(oldest) = handshakes.pop_front()
                {
                    oldest.abort();
                }
                let (acceptor, sender) = (self.clone(), sender.clone());
                let handshake = tokio::spawn(async move {
                    let address = stream.peer_addr().ok();
                    let _ = stream.set_nodelay(true);
                    match acceptor.accept(stream).await {
                        // an error means that the server has stopped
                        Ok(stream) => drop(sender.send(Ok(acceptor.known(stream, address))).await),
                        // anybody can make these: no line of their own in an ordinary log
                        Err(error) => tracing::debug!(?address, %error, "tls: a connection was refused"),
                    }
                });
                handshakes.push_back(handshake.abort_handle());
            }
        });
        ReceiverStream::new(receiver)
    }

    /// A connection whose client's certificate was checked.
    fn known(&self, stream: server::TlsStream<TcpStream>, address: Option<SocketAddr>) -> GrpcStream {
        let certificates = stream.get_ref().1.peer_certificates();
        let certificate = certificates.and_then(<[_]>::first).map(|one| PeerCertificate::read(one, &self.cluster));
        GrpcStream { stream, peer: Peer { address, certificate } }
    }
}

/// A gRPC connection with mutual TLS. Its calls have the [`Peer`] in their extensions.
#[derive(Debug)]
pub struct GrpcStream {
    stream: server::TlsStream<TcpStream>,
    peer: Peer,
}

impl Connected for GrpcStream {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for GrpcStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for GrpcStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Opens gRPC connections with mutual TLS, to workers alone: a server whose certificate does not bear the worker's name
/// of the cluster is not called.
#[derive(Clone)]
pub struct Connector {
    config: Arc<Fresh<ClientConfig>>,
    server_name: ServerName<'static>,
}

impl Connector {
    /// Of a process that has one of these roles.
    pub fn new(files: &GrpcTls, cluster: &str, roles: &[Role]) -> Result<Self, TlsError> {
        files.require(cluster, roles)?;
        let server_name =
            ServerName::try_from(Role::Worker.dns_name(cluster)).map_err(|_| TlsError::Cluster(cluster.to_owned()))?;
        let (paths, GrpcTls { ca_file, certificate_file, key_file }) = (files.paths(), files.clone());
        let config = Fresh::open(paths, move |contents| {
            let roots = roots(&ca_file, &contents[0])?;
            let (chain, key) = identity(&certificate_file, &contents[1], &key_file, &contents[2])?;
            let wrong = |error: rustls::Error| content(&certificate_file, error);
            let mut config = ClientConfig::builder_with_provider(provider())
                .with_protocol_versions(&[&rustls::version::TLS13])
                .map_err(wrong)?
                .with_root_certificates(roots)
                .with_client_auth_cert(chain, key)
                .map_err(wrong)?;
            config.alpn_protocols = vec![b"h2".to_vec()];
            Ok(config)
        })?;
        Ok(Self { config: Arc::new(config), server_name })
    }

    async fn connect(self, uri: Uri) -> io::Result<TokioIo<client::TlsStream<TcpStream>>> {
        let host = uri.host().unwrap_or_default();
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let stream = TcpStream::connect((host, uri.port_u16().unwrap_or(80))).await?;
        stream.set_nodelay(true)?;
        let connector = TlsConnector::from(self.config.current());
        let connecting = connector.connect(self.server_name.clone(), stream);
        let stream = tokio::time::timeout(HANDSHAKE_WITHIN, connecting).await??;
        Ok(TokioIo::new(stream))
    }
}

impl std::fmt::Debug for Connector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connector").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}

impl PartialEq for Connector {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.config, &other.config)
    }
}

/// Opens HTTPS connections: shows no certificate, and checks the server's.
#[derive(Clone, Debug)]
pub struct HttpsConnector {
    config: Arc<ClientConfig>,
}

impl HttpsConnector {
    /// For HTTP/1.1. Trusts the authorities of a PEM file; without one, those of the system.
    pub fn new(ca_file: Option<&Path>) -> Result<Self, TlsError> {
        Self::speaking(&[], ca_file)
    }

    /// For gRPC; trusts likewise.
    pub fn for_grpc(ca_file: Option<&Path>) -> Result<Self, TlsError> {
        Self::speaking(&[b"h2"], ca_file)
    }

    fn speaking(protocols: &[&[u8]], ca_file: Option<&Path>) -> Result<Self, TlsError> {
        let (path, roots) = match ca_file {
            Some(path) => (path, roots(path, &read_all(&[path.to_owned()])?.concat())?),
            None => {
                let mut roots = RootCertStore::empty();
                // where the system has none, nobody is trusted, and the handshake says so
                roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
                (Path::new("the system's authorities"), roots)
            }
        };
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| content(path, error))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(Self { config: Arc::new(config) })
    }

    /// The handshake with a server whose certificate must bear that name or address.
    pub async fn handshake(&self, host: &str, stream: TcpStream) -> io::Result<client::TlsStream<TcpStream>> {
        let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        TlsConnector::from(Arc::clone(&self.config)).connect(name, stream).await
    }

    /// A gRPC channel that connects when it is first used; its endpoint's address is `http://host:port` all the same.
    pub fn channel(self, endpoint: &Endpoint) -> Channel {
        endpoint.connect_with_connector_lazy(tower::service_fn(move |uri: Uri| {
            let connector = self.clone();
            async move {
                let host = uri.host().unwrap_or_default();
                let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
                let stream = TcpStream::connect((host, uri.port_u16().unwrap_or(443))).await?;
                stream.set_nodelay(true)?;
                let stream = tokio::time::timeout(HANDSHAKE_WITHIN, connector.handshake(host, stream)).await??;
                Ok::<_, io::Error>(TokioIo::new(stream))
            }
        }))
    }
}

/// A gRPC channel that connects when it is first used; its endpoint's address is `http://host:port`, with TLS or not.
pub fn channel(endpoint: &Endpoint, tls: Option<&Connector>) -> Channel {
    match tls.cloned() {
        None => endpoint.connect_lazy(),
        Some(connector) => {
            endpoint.connect_with_connector_lazy(tower::service_fn(move |uri| connector.clone().connect(uri)))
        }
    }
}

/// A gRPC channel that is connected.
pub async fn connect(endpoint: &Endpoint, tls: Option<&Connector>) -> Result<Channel, tonic::transport::Error> {
    match tls.cloned() {
        None => endpoint.connect().await,
        Some(connector) => {
            let connecting = tower::service_fn(move |uri| connector.clone().connect(uri));
            endpoint.connect_with_connector(connecting).await
        }
    }
}

impl GrpcTls {
    /// Whether this process's certificate bears one of the roles that it needs. Said at the start: its peers would
    /// refuse every call.
    pub fn require(&self, cluster: &str, roles: &[Role]) -> Result<(), TlsError> {
        if !is_dns_name(cluster) {
            return Err(TlsError::Cluster(cluster.to_owned()));
        }
        let pem = read_all(std::slice::from_ref(&self.certificate_file))?.concat();
        let chain = certificates(&self.certificate_file, &pem)?;
        let own = chain.first().map(|own| PeerCertificate::read(own, cluster).roles).unwrap_or_default();
        if own.intersects(Roles::of(roles)) {
            return Ok(());
        }
        let names = roles.iter().map(|role| role.dns_name(cluster)).collect::<Vec<_>>().join(", ");
        Err(TlsError::Role { path: self.certificate_file.clone(), names })
    }

    fn paths(&self) -> Vec<PathBuf> {
        vec![self.ca_file.clone(), self.certificate_file.clone(), self.key_file.clone()]
    }
}

/// The cryptography that all of Bora uses.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn read_all(paths: &[PathBuf]) -> Result<Vec<Vec<u8>>, TlsError> {
    let read = |path: &PathBuf| std::fs::read(path).map_err(|error| TlsError::Read { path: path.clone(), error });
    paths.iter().map(read).collect()
}

fn digest(contents: &[Vec<u8>]) -> u128 {
    let mut digest = xxhash_rust::xxh3::Xxh3::new();
    for content in contents {
        digest.update(&(content.len() as u64).to_le_bytes());
        digest.update(content);
    }
    digest.digest128()
}

/// The certificates of a PEM file as authorities.
fn roots(path: &Path, pem: &[u8]) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(path, pem)? {
        store.add(certificate).map_err(|error| content(path, error))?;
    }
    Ok(store)
}

fn identity(
    certificate_file: &Path,
    certificate: &[u8],
    key_file: &Path,
    key: &[u8],
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
    let chain = certificates(certificate_file, certificate)?;
    let key = PrivateKeyDer::from_pem_slice(key)
        .map_err(|error| content(key_file, format!("a private key in PEM is expected: {error}")))?;
    Ok((chain, key))
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(content(path, "a certificate in PEM is expected, none is there")),
        Err(error) => Err(content(path, format!("certificates in PEM are expected: {error}"))),
    }
}

fn content(path: &Path, reason: impl ToString) -> TlsError {
    TlsError::Content { path: path.into(), reason: reason.to_string() }
}
