//! A request from its head on: whose it is, under which policy, and what it takes of the tenant's limits.
//!
//! [`RequestContext::enter`] is the only way to one, so every operation passes the tenant's policy and limits. It
//! is called before the body is read.

use std::sync::Arc;

use axum::{
    body::Bytes,
    http::{HeaderMap, HeaderName, header, request::Parts},
};
use bora_common::telemetry::TraceContext;
use tokio::time::Instant;

use super::{declare::Operation, error::ApiError, fields::Name, params::Client, trace};
use crate::{
    access::{
        Caller,
        audit::Audit,
        limits::Slot,
        policy::Policy,
        quota::{Permit, QuotaRequest},
    },
    metrics::OpenRequest,
    request_id::RequestId,
    service::Service,
};

/// Name the conversation of which a request is a turn.
const SESSION_HEADERS: [HeaderName; 2] =
    [HeaderName::from_static("x-session-id"), HeaderName::from_static("x-affinity")];

/// What is known of a request besides its body.
pub struct RequestContext {
    /// Its id: the client's own or a new one.
    pub request_id: String,
    /// Whom the response is for.
    pub client: Client,
    /// W3C trace context that its work is done under: its own span's, or the client's.
    pub trace: Option<TraceContext>,
    /// What the client's tracing system adds to it.
    pub tracestate: Option<tonic::metadata::AsciiMetadataValue>,
    /// Who sends it, as a hash of the key that came with it; 0 without one.
    pub tenant: u64,
    /// The name of the conversation that it belongs to, as a hash, where a header gives one.
    pub session: Option<u64>,
    /// When it came.
    pub arrived: Instant,
    /// Its line in the audit log.
    pub audit: Audit,
    /// Counts it.
    pub open: OpenRequest,
    policy: Policy,
    hold: Hold,
}

/// What a request holds of its tenant's limits.
enum Hold {
    /// Nothing: keys are not asked for.
    Nothing,
    /// It has begun.
    Slot(Slot),
    /// It generates.
    Permit(Permit),
}

impl RequestContext {
    /// Lets a request in, or says why not. A refusal is counted.
    pub fn enter(service: &Service, operation: Operation, parts: &Parts) -> Result<Self, ApiError> {
        let arrived = Instant::now();
        let request_id = parts.extensions.get::<RequestId>().cloned().unwrap_or_else(RequestId::random);
        let mut open = service.metrics().request(operation.name());
        let begun = caller(service, parts).and_then(|caller| {
            let slot = caller.as_ref().map(Caller::begin).transpose()?;
            Ok((caller, slot))
        });
        let (caller, slot) = begun.inspect_err(|error| open.responded(error.status.as_u16()))?;
        let headers = &parts.headers;
        Ok(Self {
            trace: operation.generates().then(|| trace::arrive(headers, &parts.uri, &request_id, &mut open)).flatten(),
            request_id: request_id.shown().to_owned(),
            client: client(headers),
            tracestate: headers.get("tracestate").and_then(|value| value.to_str().ok()?.parse().ok()),
            tenant: tenant(caller.as_ref(), headers),
            session: session(headers),
            arrived,
            audit: parts.extensions.get::<Audit>().cloned().unwrap_or_default(),
            open,
            policy: Policy::of(caller),
            hold: slot.map_or(Hold::Nothing, Hold::Slot),
        })
    }

    /// Its tenant's policy.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Runs `work` on a body in its tenant's turn, where it keeps no stream waiting.
    pub async fn prepare<T: Send + 'static>(
        &self,
        service: &Arc<Service>,
        body: &Bytes,
        work: impl FnOnce(&Service, &Policy, &Bytes) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let (for_work, policy, bytes) = (Arc::clone(service), self.policy.clone(), body.clone());
        let work = move || {
            let begun = std::time::Instant::now();
            let outcome = work(&for_work, &policy, &bytes);
            for_work.metrics().prepared(begun.elapsed().as_secs_f64());
            outcome
        };
        service.pool().run(self.tenant, body.len(), work).await?
    }

    /// Asks the tenant's limits, now that the request's tokens are counted.
    pub fn admit(&mut self, model: &str, wish: QuotaRequest) -> Result<(), ApiError> {
        self.audit.asks(model, wish.prompt_tokens);
        self.hold = match (std::mem::replace(&mut self.hold, Hold::Nothing), self.policy.caller()) {
            (Hold::Slot(slot), Some(caller)) => Hold::Permit(caller.admit(wish, slot)?),
            (hold, _) => hold,
        };
        Ok(())
    }

    /// A group generated tokens for it.
    pub fn generated(&mut self, tokens: u64) {
        self.audit.generated(tokens);
        if let Hold::Permit(permit) = &mut self.hold {
            permit.generated(tokens);
        }
    }

    /// It took tokens to be encoded, decoded or counted, and nothing else.
    pub fn encoded(&mut self, tokens: u64) {
        if let Some(caller) = self.policy.caller() {
            caller.charge_encoded(tokens);
        }
    }

    /// It ends in an error.
    pub fn refused(&mut self, error: &ApiError) {
        self.open.responded(error.status.as_u16());
    }
}

/// Whose request it is, as the layer that checks keys said. Without that layer nobody is let in who would need a key.
fn caller(service: &Service, parts: &Parts) -> Result<Option<Caller>, ApiError> {
    match parts.extensions.get::<Option<Caller>>() {
        Some(caller) => Ok(caller.clone()),
        None if service.access().is_open() => Ok(None),
        None => Err(ApiError::internal("The request's API key was not checked.")),
    }
}

fn client(headers: &HeaderMap) -> Client {
    let user_agent = headers.get(header::USER_AGENT).and_then(|value| value.to_str().ok());
    // LangChain's client for Mistral gives the name of its HTTP library and no other sign. Whoever else does so gets
    // nothing that is wrong: whole tool calls, and usage that was not asked for.
    let mistral = |agent: &str| agent.contains("mistral-client-") || agent.starts_with("python-httpx/");
    Client { mistral: user_agent.is_some_and(mistral) }
}

/// Who sends a request: the tenant of its key, or whoever holds the key where keys are not asked for.
fn tenant(caller: Option<&Caller>, headers: &HeaderMap) -> u64 {
    if let Some(caller) = caller {
        return xxhash_rust::xxh3::xxh3_64(caller.tenant.name.as_bytes());
    }
    headers.get(header::AUTHORIZATION).map_or(0, |value| xxhash_rust::xxh3::xxh3_64(value.as_bytes()))
}

/// The conversation of which this is a turn, where the client names it.
fn session(headers: &HeaderMap) -> Option<u64> {
    SESSION_HEADERS.iter().filter_map(|header| headers.get(header)).find_map(|name| Name::of(name.as_bytes()).0)
}
