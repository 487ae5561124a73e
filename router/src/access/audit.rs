//! The audit log: one record per request, at the log target `bora::audit`, with the caller, the model and the outcome.
//! The record is written when the last byte of the response was produced or when the client disconnected. It holds no
//! key, and no prompt unless `router.access.audit_bodies` is set.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering},
    },
    time::Instant,
};

use axum::{
    body::Body,
    http::{Method, Response, StatusCode},
};
use parking_lot::Mutex;

use super::{Caller, open_requests::OpenRequest};
use crate::{api::error::ApiError, request_id::RequestId};

/// The status of a request whose client disconnected before there was a response (as in nginx).
const CLIENT_GONE: u16 = 499;
/// Maximum bytes of a body in a record.
const MAX_BODY_BYTES: usize = 64 << 10;

/// Maximum characters of a method and of a path in a record.
const MAX_TARGET_CHARS: usize = 512;

/// The head of a request.
pub struct Arrival {
    /// Its identifiers.
    pub id: RequestId,
    /// Its method.
    pub method: Method,
    /// Its path, without the query.
    pub path: String,
    /// The other end of the request's connection.
    pub peer: Option<SocketAddr>,
    /// The client: the peer, or the address that trusted proxies report.
    pub client: Option<IpAddr>,
    /// Whether the record holds the body.
    pub with_body: bool,
}

/// A request's record, filled in while the request runs. It is written when the last clone is dropped.
#[derive(Clone)]
pub struct Audit(pub(super) Arc<AuditLine>);

pub(super) struct AuditLine {
    arrival: Option<Arrival>,
    began: Instant,
    /// Whether the request reached a route of the API. Other requests leave a record only if they are refused.
    is_api: AtomicBool,
    /// When the first token was sent to the client.
    first_token: OnceLock<Instant>,
    caller: OnceLock<Caller>,
    model: OnceLock<String>,
    /// The group that serves the request now.
    group: Mutex<Option<String>>,
    body: Option<OnceLock<String>>,
    refusal: OnceLock<ApiError>,
    prompt_tokens: AtomicU64,
    completion_tokens: AtomicU64,
    status: AtomicU16,
    generates: AtomicBool,
    finished: AtomicBool,
}

impl Audit {
    /// Starts the record of a request.
    pub fn begin(arrival: Arrival) -> Self {
        Self(Arc::new(AuditLine::new(Some(arrival))))
    }

    /// Marks the request as one that reached a route of the API.
    pub fn mark_api_request(&self) {
        self.0.is_api.store(true, Ordering::Relaxed);
    }

    /// Records the caller.
    pub fn of(&self, caller: &Caller) {
        let _ = self.0.caller.set(caller.clone());
    }

    /// Records the body, if bodies are logged.
    pub fn body(&self, bytes: &[u8]) {
        if let Some(body) = &self.0.body {
            let _ = body.set(String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_BODY_BYTES)]).into_owned());
        }
    }

    /// Records the operation and the model.
    pub fn asks(&self, model: &str, prompt_tokens: u64) {
        let _ = self.0.model.set(model.to_owned());
        self.0.prompt_tokens.store(prompt_tokens, Ordering::Relaxed);
        self.0.generates.store(true, Ordering::Relaxed);
    }

    /// Records the group that serves the request now.
    pub fn runs_on(&self, group: &str) {
        let mut known = self.0.group.lock();
        if known.as_deref() != Some(group) {
            *known = Some(group.to_owned());
        }
    }

    /// Counts generated tokens.
    pub fn generated(&self, tokens: u64) {
        if tokens > 0 {
            self.0.first_token.get_or_init(Instant::now);
        }
        self.0.completion_tokens.fetch_add(tokens, Ordering::Relaxed);
    }

    /// Records that the response is complete.
    pub fn finished(&self) {
        self.0.finished.store(true, Ordering::Relaxed);
    }

    /// Records the status of the response.
    pub fn responded(&self, response: &Response<Body>) {
        self.0.status.store(response.status().as_u16(), Ordering::Relaxed);
        if let Some(error) = response.extensions().get::<ApiError>() {
            let _ = self.0.refusal.set(error.clone());
        }
    }
}

/// Writes the record of a request whose head cannot be parsed and that therefore reached no route.
pub fn unreadable_head(id: &RequestId, peer: SocketAddr, status: StatusCode) {
    let (request_id, status) = (id.own(), status.as_u16());
    tracing::info!(target: "bora::audit", request_id, %peer, status, outcome = "refused", "request");
}

impl Default for Audit {
    /// Creates an audit that writes no record.
    fn default() -> Self {
        Self(Arc::new(AuditLine::new(None)))
    }
}

impl Arrival {
    /// Method and path, truncated.
    fn target(&self) -> String {
        format!("{} {}", self.method, self.path).chars().take(MAX_TARGET_CHARS).collect()
    }
}

impl AuditLine {
    fn new(arrival: Option<Arrival>) -> Self {
        Self {
            body: arrival.as_ref().is_some_and(|arrival| arrival.with_body).then(OnceLock::new),
            arrival,
            began: Instant::now(),
            is_api: AtomicBool::new(false),
            first_token: OnceLock::new(),
            caller: OnceLock::new(),
            model: OnceLock::new(),
            group: Mutex::default(),
            refusal: OnceLock::new(),
            prompt_tokens: AtomicU64::new(0),
            completion_tokens: AtomicU64::new(0),
            // until there is a response, the client may disconnect
            status: AtomicU16::new(CLIENT_GONE),
            generates: AtomicBool::new(false),
            finished: AtomicBool::new(false),
        }
    }

    /// The request's current state; none if the request leaves no record.
    pub(super) fn describe(&self, now: Instant) -> Option<OpenRequest> {
        let arrival = self.arrival.as_ref()?;
        Some(OpenRequest {
            request_id: arrival.id.own().to_owned(),
            client_request_id: arrival.id.client().map(str::to_owned),
            client: arrival.client,
            tenant: self.caller.get().map(|caller| caller.tenant.name.clone()),
            request: arrival.target(),
            model: self.model.get().cloned(),
            group: self.group.lock().clone(),
            age_seconds: now.saturating_duration_since(self.began).as_secs_f64(),
            prompt_tokens: self.prompt_tokens.load(Ordering::Relaxed),
            completion_tokens: self.completion_tokens.load(Ordering::Relaxed),
        })
    }

    fn outcome(&self, status: u16) -> &'static str {
        match status {
            CLIENT_GONE => "cut off",
            500.. => "failed",
            400.. => "refused",
            _ if !self.generates.load(Ordering::Relaxed) || self.finished.load(Ordering::Relaxed) => "finished",
            // the client disconnected, or a stream broke and failover did not succeed
            _ => "cut off",
        }
    }
}

impl Drop for AuditLine {
    fn drop(&mut self) {
        let Some(arrival) = self.arrival.take() else { return };
        let status = *self.status.get_mut();
        if !*self.is_api.get_mut() && !(400..500).contains(&status) {
            return;
        }
        let outcome = self.outcome(status);
        let caller = self.caller.get();
        let refusal = self.refusal.get();
        let first_token = self.first_token.get().map(|at| at.duration_since(self.began));
        // messages about keys and limits are the router's own; other messages may repeat contents of the request
        let reason = refusal.filter(|error| matches!(error.status.as_u16(), 401 | 403 | 429));
        tracing::info!(
            target: "bora::audit",
            request_id = arrival.id.own(),
            client_request_id = arrival.id.client(),
            peer = arrival.peer.map(tracing::field::display),
            client = arrival.client.map(tracing::field::display),
            tenant = caller.map(|caller| caller.tenant.name.as_str()),
            key = caller.map(|caller| &*caller.key),
            request = arrival.target(),
            model = self.model.get(),
            group = self.group.get_mut().as_deref(),
            prompt_tokens = *self.prompt_tokens.get_mut(),
            completion_tokens = *self.completion_tokens.get_mut(),
            status,
            outcome,
            code = refusal.and_then(|error| error.code),
            param = refusal.and_then(|error| error.param.as_deref()),
            reason = reason.map(|error| error.message.as_str()),
            first_token_milliseconds = first_token.map(|time| time.as_millis() as u64),
            milliseconds = self.began.elapsed().as_millis() as u64,
            body = self.body.as_ref().and_then(OnceLock::get),
            "request"
        );
    }
}
