//! The provider's public keys (a JSON Web Key Set), read from a file or fetched from a URL at regular intervals.
//!
//! Keys stay in use while the provider is unreachable. A token with an unknown key triggers a fetch, at most once in
//! ten seconds for all such tokens together.

use std::{
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use axum::http::{Request, Uri, header};
use bora_common::tls::HttpsConnector;
use bytes::Bytes;
use futures::FutureExt as _;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::{Notify, watch},
    time::{Instant, timeout},
};

use super::{JwtAlgorithm, JwtError, JwtOptions, verify::PublicKey};

/// Maximum bytes of a key set and of a discovery document.
const MAX_BODY_BYTES: usize = 1 << 20;
/// Maximum number of keys in a set.
const MAX_KEYS: usize = 256;
/// Timeout of a fetch.
const FETCH_WITHIN: Duration = Duration::from_secs(5);
/// Minimum interval between two fetches.
const FETCH_EVERY: Duration = Duration::from_secs(10);
/// How long a request waits for a fetch that it triggered.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(6);
/// How often a file is checked for changes.
const POLL_INTERVAL: Duration = Duration::from_secs(2);

/// The source of keys.
pub enum KeySource {
    /// A file.
    File(PathBuf),
    /// A URL of the keys, or of a discovery document that names it.
    Url {
        /// The URL.
        url: Uri,
        /// The expected issuer, if the URL is that of a discovery document.
        discover: Option<String>,
        /// The TLS configuration that checks the server's certificate.
        tls: HttpsConnector,
    },
}

impl KeySource {
    /// Determines the source from the options.
    pub fn of(options: &JwtOptions) -> Result<Self, JwtError> {
        let wrong = |field, reason: String| JwtError { field, reason };
        if let Some(path) = &options.jwks_file {
            return match options.jwks_url {
                None => Ok(Self::File(path.clone())),
                Some(_) => Err(wrong("jwks_url", "set this or jwks_file".into())),
            };
        }
        let (field, text, discover) = match &options.jwks_url {
            Some(url) => ("jwks_url", url.clone(), None),
            None => {
                let base = options.issuer.trim_end_matches('/');
                ("issuer", format!("{base}/.well-known/openid-configuration"), Some(options.issuer.clone()))
            }
        };
        let url = parse_url(&text).map_err(|reason| wrong(field, reason))?;
        check_scheme(&options.issuer, &url).map_err(|reason| wrong(field, reason))?;
        if url.scheme_str() == Some("http") && !is_loopback(&url) {
            tracing::warn!(%url, "keys for tokens are fetched without TLS: a man in the middle can forge tokens");
        }
        let tls = HttpsConnector::new(options.jwks_ca_file.as_deref())
            .map_err(|error| wrong("jwks_ca_file", error.to_string()))?;
        Ok(Self::Url { url, discover, tls })
    }

    async fn read(&self) -> Result<Vec<u8>, String> {
        match self {
            Self::File(path) => tokio::fs::read(path).await.map_err(|error| format!("{}: {error}", path.display())),
            Self::Url { url, discover: None, tls } => fetch(url, tls).await,
            Self::Url { url, discover: Some(issuer), tls } => {
                #[derive(Deserialize)]
                struct Discovery {
                    issuer: String,
                    jwks_uri: String,
                }
                let document: Discovery = serde_json::from_slice(&fetch(url, tls).await?)
                    .map_err(|error| format!("{url}: not a discovery document: {error}"))?;
                if document.issuer != *issuer {
                    return Err(format!("{url}: the document is that of another issuer, `{}`", document.issuer));
                }
                let keys = parse_url(&document.jwks_uri)?;
                check_scheme(issuer, &keys)?;
                fetch(&keys, tls).await
            }
        }
    }
}

/// Refuses keys over plain HTTP if the issuer uses https: a man in the middle could replace them.
fn check_scheme(issuer: &str, url: &Uri) -> Result<(), String> {
    if issuer.starts_with("https://") && url.scheme_str() == Some("http") && !is_loopback(url) {
        return Err(format!("`{url}`: the issuer is an https URL: expected https for its keys too"));
    }
    Ok(())
}

/// The keys of one fetch.
pub struct KeySet {
    keys: Vec<PublicKey>,
    /// Increases whenever the keys change.
    pub generation: u64,
}

impl KeySet {
    /// The candidate keys for a signature: those with that ID or, for a token without an ID, all keys of its algorithm.
    pub(super) fn matching(&self, id: Option<&str>, algorithm: JwtAlgorithm) -> impl Iterator<Item = &PublicKey> {
        let of_id = move |key: &&PublicKey| id.is_none() || key.id.as_deref() == id;
        self.keys.iter().filter(of_id).filter(move |key| key.fits(algorithm))
    }
}

/// The keys, kept up to date.
pub struct KeyStore {
    source: KeySource,
    refresh: Duration,
    current: RwLock<Option<Arc<KeySet>>>,
    wanted: Notify,
    /// The end of the last fetch; `None` before the first.
    fetched: watch::Sender<Option<Instant>>,
}

impl KeyStore {
    /// Creates the store. It reads a file immediately; a file that cannot be read is a configuration error.
    pub fn open(source: KeySource, refresh_seconds: f64) -> Result<Self, JwtError> {
        let store = Self {
            refresh: Duration::from_secs_f64(refresh_seconds),
            current: RwLock::default(),
            wanted: Notify::new(),
            fetched: watch::Sender::new(None),
            source,
        };
        if let KeySource::File(path) = &store.source {
            let wrong = |reason: String| JwtError { field: "jwks_file", reason };
            let bytes = std::fs::read(path).map_err(|error| wrong(format!("{}: {error}", path.display())))?;
            store.put(&bytes).map_err(|reason| wrong(format!("{}: {reason}", path.display())))?;
        }
        Ok(store)
    }

    /// The keys; `None` before the first fetch.
    pub fn current(&self) -> Option<Arc<KeySet>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The version of the keys; 0 before the first fetch.
    pub fn generation(&self) -> u64 {
        self.current.read().unwrap_or_else(PoisonError::into_inner).as_ref().map_or(0, |keys| keys.generation)
    }

    /// Triggers a fetch and waits for it; returns `false` immediately if the last fetch is too recent.
    pub async fn refreshed(&self) -> bool {
        let mut fetched = self.fetched.subscribe();
        let last = *fetched.borrow_and_update();
        if last.is_some_and(|at| at.elapsed() < FETCH_EVERY) {
            return false;
        }
        self.wanted.notify_one();
        matches!(timeout(REQUEST_TIMEOUT, fetched.changed()).await, Ok(Ok(())))
    }

    /// Fetches keys at regular intervals, soon after a failure, and on request; never returns.
    pub async fn keep_fresh(&self) {
        let mut seen = None;
        loop {
            let outcome = self.source.read().await;
            let failed = outcome.is_err();
            if seen.as_ref() != Some(&outcome) {
                match &outcome {
                    Ok(bytes) => match self.put(bytes) {
                        Ok(keys) => tracing::info!(keys, "loaded keys for tokens"),
                        Err(reason) => {
                            tracing::error!(reason, "cannot use new keys for tokens, keeping the previous ones")
                        }
                    },
                    Err(reason) => tracing::error!(reason, "cannot read keys for tokens"),
                }
                seen = Some(outcome);
            }
            self.fetched.send_replace(Some(Instant::now()));
            // this fetch also serves the requests that arrived while it ran
            let _ = self.wanted.notified().now_or_never();
            if matches!(self.source, KeySource::File(_)) {
                tokio::time::sleep(POLL_INTERVAL).await;
                continue;
            }
            let pause = if failed { FETCH_EVERY.min(self.refresh) } else { self.refresh };
            let began = Instant::now();
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.wanted.notified() => {
                    // if a waiter read the time of the last fetch just before this fetch ended
                    tokio::time::sleep_until(began + FETCH_EVERY.min(pause)).await;
                }
            }
        }
    }

    /// Replaces the keys with the usable keys of a set; returns their number.
    fn put(&self, bytes: &[u8]) -> Result<usize, String> {
        #[derive(Deserialize)]
        struct Set {
            keys: Vec<Value>,
        }
        let set: Set = serde_json::from_slice(bytes).map_err(|error| format!("not a JSON Web Key Set: {error}"))?;
        let keys: Vec<PublicKey> = set.keys.into_iter().take(MAX_KEYS).filter_map(PublicKey::of_jwk).collect();
        if keys.is_empty() {
            return Err("none of its keys is supported: expected RSA, EC (P-256, P-384) or Ed25519".into());
        }
        let count = keys.len();
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        let generation = current.as_ref().map_or(0, |keys| keys.generation) + 1;
        *current = Some(Arc::new(KeySet { keys, generation }));
        Ok(count)
    }
}

fn parse_url(text: &str) -> Result<Uri, String> {
    let url: Uri = text.parse().map_err(|error| format!("`{text}` is not a URL: {error}"))?;
    match (url.scheme_str(), url.host()) {
        (Some("http" | "https"), Some(_)) => Ok(url),
        _ => Err(format!("`{text}`: expected https://host/path")),
    }
}

fn is_loopback(url: &Uri) -> bool {
    let host = host_of(url);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn host_of(url: &Uri) -> &str {
    let host = url.host().unwrap_or_default();
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

/// Fetches a small document.
async fn fetch(url: &Uri, tls: &HttpsConnector) -> Result<Vec<u8>, String> {
    let fetching = async {
        let host = host_of(url);
        let secure = url.scheme_str() == Some("https");
        let port = url.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let stream = TcpStream::connect((host, port)).await.map_err(|error| error.to_string())?;
        if !secure {
            return get(url, stream).await;
        }
        get(url, tls.handshake(host, stream).await.map_err(|error| error.to_string())?).await
    };
    match timeout(FETCH_WITHIN, fetching).await {
        Ok(outcome) => outcome.map_err(|reason| format!("{url}: {reason}")),
        Err(_) => Err(format!("{url}: no response within {FETCH_WITHIN:?}")),
    }
}

async fn get(url: &Uri, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Result<Vec<u8>, String> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    // the task ends with the sender
    let connection = tokio::spawn(connection);
    let authority = url.authority().map_or("", |authority| authority.as_str());
    let path = url.path_and_query().map_or("/", |path| path.as_str());
    let request = Request::get(path)
        .header(header::HOST, authority)
        .header(header::ACCEPT, "application/json")
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
    if !response.status().is_success() {
        return Err(format!("unexpected status {}", response.status()));
    }
    let body = Limited::new(response.into_body(), MAX_BODY_BYTES).collect().await.map_err(|error| error.to_string())?;
    connection.abort();
    Ok(body.to_bytes().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_keys_without_tls_for_an_https_issuer() {
        let options = |issuer: &str, jwks_url: &str| -> JwtOptions {
            let options = serde_json::json!({"issuer": issuer, "audience": ["bora"], "jwks_url": jwks_url});
            serde_json::from_value(options).expect("options")
        };
        let refused = KeySource::of(&options("https://idp.example", "http://idp.example/keys")).err().expect("refused");
        assert!(refused.field == "jwks_url" && refused.reason.contains("expected https"), "{}", refused.reason);
        assert!(KeySource::of(&options("https://idp.example", "https://idp.example/keys")).is_ok());
        assert!(
            KeySource::of(&options("https://idp.example", "http://127.0.0.1:1/keys")).is_ok(),
            "nobody is on that way"
        );
        assert!(KeySource::of(&options("http://idp.example", "http://idp.example/keys")).is_ok());
    }
}
