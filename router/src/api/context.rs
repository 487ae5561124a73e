//! The context of a request from its head on: its caller, its policy, and its use of the tenant's limits.
//!
//! [`RequestContext::enter`] is the only constructor, so that every operation passes the tenant's policy and limits. It
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

/// Headers that name the session of a request.
const SESSION_HEADERS: [HeaderName; 2] =
    [HeaderName::from_static("x-session-id"), HeaderName::from_static("x-affinity")];

/// The context of a request besides its body.
pub struct RequestContext {
    /// The identifiers of the request.
    pub request_id: String,
    /// The audience of the response.
    pub client: Client,
    /// The W3C trace context of the request's work: that of the router's own span, or the client's.
    pub trace: Option<TraceContext>,
    /// The `tracestate` of the client's tracing system.
    pub tracestate: Option<tonic::metadata::AsciiMetadataValue>,
    /// A hash of the sender: of its tenant, or of the key if no key is needed; 0 without a key.
    pub tenant: u64,
    /// A hash of the session's name, if a header gives one.
    pub session: Option<u64>,
    /// Time of arrival.
    pub arrived: Instant,
    /// The request's record in the audit log.
    pub audit: Audit,
    /// The metrics that count the request.
    pub open: OpenRequest,
    policy: Policy,
    hold: Hold,
}

/// The request's share of its tenant's limits.
enum Hold {
    /// None: no key is needed.
    Nothing,
    /// The request was admitted and has no charge yet.
    Slot(Slot),
    /// The request generates, with a reservation of tokens.
    Permit(Permit),
}

impl RequestContext {
    /// Admits a request or refuses it. A refusal is counted.
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

    /// The policy of the request's tenant.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Runs `work` on a body in the thread pool, in the order that is fair to tenants.
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

    /// Checks the tenant's limits when the request's tokens are counted.
    pub fn admit(&mut self, model: &str, wish: QuotaRequest) -> Result<(), ApiError> {
        self.audit.asks(model, wish.prompt_tokens);
        self.hold = match (std::mem::replace(&mut self.hold, Hold::Nothing), self.policy.caller()) {
            (Hold::Slot(slot), Some(caller)) => Hold::Permit(caller.admit(wish, slot)?),
            (hold, _) => hold,
        };
        Ok(())
    }

    /// Charges tokens that a group generated for the request.
    pub fn generated(&mut self, tokens: u64) {
        self.audit.generated(tokens);
        if let Hold::Permit(permit) = &mut self.hold {
            permit.generated(tokens);
        }
    }

    /// Charges tokens that were only encoded, decoded or counted.
    pub fn encoded(&mut self, tokens: u64) {
        if let Some(caller) = self.policy.caller() {
            caller.charge_encoded(tokens);
        }
    }

    /// Records that the request ends with an error.
    pub fn refused(&mut self, error: &ApiError) {
        self.open.responded(error.status.as_u16());
    }
}

/// The caller that the authentication layer found. Without that layer, a router that requires keys refuses the request.
fn caller(service: &Service, parts: &Parts) -> Result<Option<Caller>, ApiError> {
    match parts.extensions.get::<Option<Caller>>() {
        Some(caller) => Ok(caller.clone()),
        None if service.access().is_open() => Ok(None),
        None => Err(ApiError::internal("The request was not authenticated.")),
    }
}

fn client(headers: &HeaderMap) -> Client {
    let user_agent = headers.get(header::USER_AGENT).and_then(|value| value.to_str().ok());
    // LangChain's client for Mistral sends the name of its HTTP library and no other sign. Another client with that
    // name gets a valid response too: complete tool calls, and usage that it did not request.
    let mistral = |agent: &str| agent.contains("mistral-client-") || agent.starts_with("python-httpx/");
    Client { mistral: user_agent.is_some_and(mistral) }
}

/// The sender of a request: the tenant of its key, or the hash of the key if no key is needed.
fn tenant(caller: Option<&Caller>, headers: &HeaderMap) -> u64 {
    if let Some(caller) = caller {
        return xxhash_rust::xxh3::xxh3_64(caller.tenant.name.as_bytes());
    }
    headers.get(header::AUTHORIZATION).map_or(0, |value| xxhash_rust::xxh3::xxh3_64(value.as_bytes()))
}

/// The session of the request, if the client names it.
fn session(headers: &HeaderMap) -> Option<u64> {
    SESSION_HEADERS.iter().filter_map(|header| headers.get(header)).find_map(|name| Name::of(name.as_bytes()).0)
}
