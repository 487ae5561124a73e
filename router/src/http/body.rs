//! Request bodies, read within a deadline and within the memory limits of all bodies and of one tenant.
//!
//! Memory is reserved as the body arrives, so that a client that announces a large body and sends little uses little.
//! It is released when the last reference to the body is dropped.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    body::{Body, Bytes},
    http::{HeaderMap, header},
};
use http_body_util::BodyExt as _;
use tokio::time::{Instant, timeout_at};

use super::{
    metrics::{HttpMetrics, Refusal},
    options::HttpOptions,
    shutdown::Shutdown,
};
use crate::{
    access::{Caller, limits::Tenant},
    api::error::ApiError,
};

/// Bytes reserved for a body before its first byte arrives.
const FIRST_BYTES: usize = 256 << 10;

/// Reads bodies.
pub struct BodyReader {
    options: HttpOptions,
    max_body_bytes: usize,
    budget: Arc<Budget>,
    shutdown: Shutdown,
}

impl BodyReader {
    /// Creates a reader with these limits.
    pub fn new(options: HttpOptions, max_body_bytes: usize, metrics: HttpMetrics, shutdown: Shutdown) -> Self {
        let budget = Arc::new(Budget {
            limit: options.max_body_memory.0,
            tenant_limit: options.max_tenant_body_memory.0,
            used: AtomicU64::new(0),
            metrics,
        });
        Self { options, max_body_bytes, budget, shutdown }
    }

    /// Reads a complete JSON body, or refuses it (400, 408, 413, 415, 429, 503).
    pub async fn read(&self, caller: Option<&Caller>, headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
        check_content_type(headers)?;
        let announced = headers
            .get(header::CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.parse::<usize>().ok());
        if announced.is_some_and(|length| length > self.max_body_bytes) {
            return Err(ApiError::body_too_large(self.max_body_bytes));
        }
        let mut cut = self.shutdown.wait_cut();
        let reading = self.collect(caller, announced, body);
        tokio::select! {
            biased;
            read = reading => read,
            () = std::future::poll_fn(|cx| cut.poll(cx)) => Err(ApiError::shutting_down()),
        }
    }

    async fn collect(
        &self,
        caller: Option<&Caller>,
        announced: Option<usize>,
        mut body: Body,
    ) -> Result<Bytes, ApiError> {
        let mut memory = Reservation::new(&self.budget, caller);
        memory.grow_to(announced.unwrap_or(0).min(FIRST_BYTES))?;
        let mut pace = Pace::new(&self.options);
        let mut bytes = Vec::new();
        loop {
            let Ok(frame) = timeout_at(pace.due(), body.frame()).await else {
                self.budget.metrics.refused(Refusal::BodyTimeout);
                return Err(ApiError::body_timeout(pace.received));
            };
            let Some(frame) = frame else { break };
            let frame = frame.map_err(|error| match is_disconnect(&error) {
                true => ApiError::client_gone(),
                false => ApiError::malformed("The request body is incomplete."),
            })?;
            let Ok(data) = frame.into_data() else { continue };
            pace.receive(data.len());
            let length = bytes.len() + data.len();
            if length > self.max_body_bytes {
                return Err(ApiError::body_too_large(self.max_body_bytes));
            }
            if bytes.is_empty() && announced == Some(data.len()) {
                memory.grow_to(data.len())?;
                return Ok(memory.hold(data));
            }
            if length > bytes.capacity() {
                let most = announced.unwrap_or(self.max_body_bytes);
                let capacity = (bytes.capacity() * 2).max(FIRST_BYTES).min(most).max(length);
                memory.grow_to(capacity)?;
                bytes.reserve_exact(capacity - bytes.len());
            }
            bytes.extend_from_slice(&data);
        }
        Ok(memory.hold(bytes))
    }
}

/// Whether the client disconnected, as opposed to sending a malformed body.
fn is_disconnect(error: &(dyn std::error::Error + 'static)) -> bool {
    use std::io::ErrorKind;
    let gone =
        [ErrorKind::UnexpectedEof, ErrorKind::ConnectionReset, ErrorKind::BrokenPipe, ErrorKind::ConnectionAborted];
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.filter_map(|cause| cause.downcast_ref::<std::io::Error>()).any(|cause| gone.contains(&cause.kind()))
}

/// The deadlines of a body while it arrives.
struct Pace<'o> {
    options: &'o HttpOptions,
    began: Instant,
    last: Instant,
    received: u64,
}

impl<'o> Pace<'o> {
    fn new(options: &'o HttpOptions) -> Self {
        let now = Instant::now();
        Self { options, began: now, last: now, received: 0 }
    }

    fn receive(&mut self, bytes: usize) {
        self.last = Instant::now();
        self.received += bytes as u64;
    }

    /// When the next bytes are due.
    fn due(&self) -> Instant {
        let pause = self.options.read_timeout();
        let mut due = (self.last + pause).min(self.began + Duration::from_secs_f64(self.options.body_timeout_seconds));
        if self.options.min_body_bytes_per_second > 0 {
            let seconds = self.received as f64 / self.options.min_body_bytes_per_second as f64;
            due = due.min(self.began + pause + Duration::from_secs_f64(seconds.min(1e7)));
        }
        due
    }
}

/// The memory of all bodies.
#[derive(Debug)]
struct Budget {
    limit: u64,
    tenant_limit: u64,
    used: AtomicU64,
    metrics: HttpMetrics,
}

/// The memory of one body.
#[derive(Debug)]
struct Reservation {
    budget: Arc<Budget>,
    tenant: Option<Arc<Tenant>>,
    bytes: u64,
}

impl Reservation {
    fn new(budget: &Arc<Budget>, caller: Option<&Caller>) -> Self {
        Self { budget: Arc::clone(budget), tenant: caller.map(|caller| Arc::clone(&caller.tenant)), bytes: 0 }
    }

    fn grow_to(&mut self, bytes: usize) -> Result<(), ApiError> {
        let more = (bytes as u64).saturating_sub(self.bytes);
        if more == 0 {
            return Ok(());
        }
        if let Some(tenant) = &self.tenant
            && !take(&tenant.body_bytes, more, self.budget.tenant_limit)
        {
            self.budget.metrics.refused(Refusal::BodyMemory);
            let message = "This API key's tenant sends too many large requests at once. Please retry.";
            return Err(ApiError::rate_limited(message, 1));
        }
        if !take(&self.budget.used, more, self.budget.limit) {
            if let Some(tenant) = &self.tenant {
                tenant.body_bytes.fetch_sub(more, Ordering::Relaxed);
            }
            self.budget.metrics.refused(Refusal::BodyMemory);
            return Err(ApiError::unavailable("Too many large requests arrive at once. Please retry.", 1));
        }
        self.bytes += more;
        self.budget.metrics.body_bytes.inc_by(more as i64);
        Ok(())
    }

    /// Bytes that release their memory when the last reference is dropped.
    fn hold(self, bytes: impl AsRef<[u8]> + Send + 'static) -> Bytes {
        Bytes::from_owner(Held { bytes, _memory: self })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
        self.budget.metrics.body_bytes.dec_by(self.bytes as i64);
        if let Some(tenant) = &self.tenant {
            tenant.body_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }
}

struct Held<T> {
    // dropped before its memory is released
    bytes: T,
    _memory: Reservation,
}

impl<T: AsRef<[u8]>> AsRef<[u8]> for Held<T> {
    fn as_ref(&self) -> &[u8] {
        self.bytes.as_ref()
    }
}

fn take(used: &AtomicU64, more: u64, limit: u64) -> bool {
    let add = |used: u64| used.checked_add(more).filter(|sum| *sum <= limit);
    used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).is_ok()
}

/// Checks that the content type is JSON: a web page cannot send it without the server's consent (CORS).
fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    if let Some(encoding) =
        headers.get(header::CONTENT_ENCODING).filter(|value| !value.as_bytes().eq_ignore_ascii_case(b"identity"))
    {
        let shown = String::from_utf8_lossy(encoding.as_bytes());
        return Err(ApiError::unsupported_media_type("Content-Encoding", &shown, "no encoding"));
    }
    let value = headers.get(header::CONTENT_TYPE).map(|value| String::from_utf8_lossy(value.as_bytes()));
    let value = value.as_deref().unwrap_or_default();
    if is_json(value) {
        Ok(())
    } else {
        Err(ApiError::unsupported_media_type("Content-Type", value, "application/json"))
    }
}

fn is_json(content_type: &str) -> bool {
    let mut parts = content_type.split(';').map(str::trim);
    let media_type = parts.next().unwrap_or_default().to_ascii_lowercase();
    let subtype = media_type.strip_prefix("application/").unwrap_or_default();
    let is_suffixed =
        subtype.strip_suffix("+json").is_some_and(|name| !name.is_empty() && !name.contains([' ', '/', ',']));
    let is_utf8 = |parameter: &str| match parameter.split_once('=') {
        Some((name, value)) if name.trim().eq_ignore_ascii_case("charset") => {
            matches!(value.trim().trim_matches('"').to_ascii_lowercase().as_str(), "utf-8" | "utf8" | "us-ascii")
        }
        _ => true,
    };
    (subtype == "json" || is_suffixed) && parts.all(is_utf8)
}

#[cfg(test)]
mod tests {
    use bora_common::config::ByteSize;
    use futures::StreamExt as _;

    use super::*;

    fn reader(options: HttpOptions) -> BodyReader {
        BodyReader::new(options, 1 << 20, HttpMetrics::default(), Shutdown::default())
    }

    fn json_headers() -> HeaderMap {
        HeaderMap::from_iter([(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"))])
    }

    /// Chunks of a body, each after a pause.
    fn slow(chunks: usize, bytes: usize, pause: Duration) -> Body {
        let chunks = futures::stream::iter(0..chunks).then(move |_| async move {
            tokio::time::sleep(pause).await;
            Ok::<_, std::io::Error>(vec![b' '; bytes])
        });
        Body::from_stream(chunks)
    }

    #[test]
    fn accepts_json_content_types() {
        for json in [
            "application/json",
            "application/json; charset=utf-8",
            "Application/JSON;charset=\"UTF-8\"",
            "application/json;",
            "application/vnd.api+json",
            "application/problem+json; profile=x",
        ] {
            assert!(is_json(json), "{json}");
        }
        for other in [
            "",
            "text/plain",
            "text/json",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=application/json",
            "text/plain; application/json",
            "application/jsonp",
            "application/+json",
            "application/json, text/plain",
            "application/json; charset=utf-16",
            "application",
            ";;;",
        ] {
            assert!(!is_json(other), "{other}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn times_out_slow_bodies_and_long_pauses() {
        let options = HttpOptions {
            read_timeout_seconds: 10.0,
            body_timeout_seconds: 60.0,
            min_body_bytes_per_second: 100,
            ..HttpOptions::default()
        };
        let reader = reader(options);
        let headers = json_headers();
        let status = async |body| reader.read(None, &headers, body).await.map_err(|error| error.status.as_u16());
        let second = Duration::from_secs(1);
        assert_eq!(status(slow(50, 200, second)).await.map(|bytes| bytes.len()), Ok(10_000));
        assert_eq!(status(slow(100, 200, second)).await, Err(408), "too long as a whole");
        assert_eq!(status(slow(3, 50_000, 11 * second)).await, Err(408), "too long a pause");
        assert_eq!(status(slow(50, 10, second)).await, Err(408), "too slow");
        assert_eq!(status(Body::from_stream(futures::stream::pending::<std::io::Result<Bytes>>())).await, Err(408));
        assert_eq!(reader.budget.used.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn bounds_and_releases_memory() {
        let options = HttpOptions { max_body_memory: ByteSize(1 << 20), ..HttpOptions::default() };
        let reader = reader(options);
        let headers = json_headers();
        let body = || slow(6, 100_000, Duration::ZERO);
        let first = reader.read(None, &headers, body()).await.expect("there is room");
        assert!(reader.budget.used.load(Ordering::Relaxed) >= 600_000);
        assert_eq!(reader.read(None, &headers, body()).await.map_err(|error| error.status.as_u16()), Err(503));
        let copy = first.clone();
        drop(first);
        assert_eq!(copy.len(), 600_000);
        assert!(reader.read(None, &headers, body()).await.is_err());
        drop(copy);
        assert_eq!(reader.budget.used.load(Ordering::Relaxed), 0);
        let whole = reader.read(None, &headers, body()).await.expect("there is room again");
        drop(whole);
        // a reader that is dropped halfway
        {
            let stuck = slow(3, 100_000, Duration::from_millis(20));
            let _ = tokio::time::timeout(Duration::from_millis(30), reader.read(None, &headers, stuck)).await;
        }
        assert_eq!(reader.budget.used.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn stops_reading_after_the_grace_period() {
        let reader = reader(HttpOptions::default());
        let shutdown = reader.shutdown.clone();
        let never = Body::from_stream(futures::stream::pending::<std::io::Result<Bytes>>());
        let headers = json_headers();
        let read = async { reader.read(None, &headers, never).await.map_err(|error| error.status.as_u16()) };
        let (read, ()) = tokio::join!(read, async { shutdown.cut() });
        assert_eq!(read, Err(503));
    }
}
