//! What a tenant may do, and how much of it is done.
//!
//! Requests and tokens per minute are buckets that hold a minute's worth and fill steadily. A request is counted when it
//! begins; what it takes of the tokens is in [`quota`](super::quota).
//!
//! TenantLimits are of the whole cluster. Routers do not ask each other: each of them grants its equal share
//! ([`LiveRouters`]), so together they never grant more, and none of them is needed by the others.

use std::sync::{
    Arc,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use bora_common::secret::CacheScope;
use serde::Deserialize;

use super::{Caller, bucket::Bucket, quota::ExpectedOutput};
use crate::{api::error::ApiError, options::ConversationRules};

/// TenantLimits of a tenant; absent = none.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct TenantLimits {
    /// Names of models (not aliases).
    pub models: Option<Vec<String>>,
    /// Generation requests.
    pub requests_per_minute: Option<u32>,
    /// Prompt and completion tokens.
    pub tokens_per_minute: Option<u64>,
    /// Generation requests that run at once.
    pub parallel_requests: Option<u32>,
    /// Tokens of a prompt.
    pub max_context: Option<u32>,
    /// The most urgent class of its requests.
    pub class: TenantClass,
    /// Names the cache that its requests use: tenants that name the same one share cached prefixes. Absent: a cache of its own.
    pub cache_salt: Option<String>,
    /// Whether its faulty conversations are refused or repaired; absent: as the router does.
    pub conversation: Option<ConversationRules>,
    /// Whether it may ask for responses of a grammar of its own (`guided_grammar`); absent: it may.
    pub allow_grammar: Option<bool>,
    /// Whether it may ask for responses of a regular expression (`guided_regex`); absent: it may.
    pub allow_regex: Option<bool>,
}

/// Classes that a tenant's requests may have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TenantClass {
    /// Any.
    #[default]
    Interactive,
    /// Only batch.
    Batch,
}

impl TenantLimits {
    /// A limit of zero, which would let nothing through.
    pub fn wrong(&self) -> Option<&'static str> {
        let zeros = [
            ("requests_per_minute", self.requests_per_minute == Some(0)),
            ("tokens_per_minute", self.tokens_per_minute == Some(0)),
            ("parallel_requests", self.parallel_requests == Some(0)),
            ("max_context", self.max_context == Some(0)),
        ];
        zeros.into_iter().find(|(_, zero)| *zero).map(|(field, _)| field)
    }
}

/// How many routers live: each grants that share of every limit, and of the retries.
#[derive(Clone, Debug)]
pub struct LiveRouters(Arc<AtomicU32>);

impl Default for LiveRouters {
    fn default() -> Self {
        Self(Arc::new(AtomicU32::new(1)))
    }
}

impl LiveRouters {
    /// There are that many now, this one included.
    pub fn set(&self, count: u32) {
        self.0.store(count.max(1), Ordering::Relaxed);
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A tenant and what it is doing.
#[derive(Debug)]
pub struct Tenant {
    /// Unique.
    pub name: String,
    /// What it may do.
    pub limits: TenantLimits,
    requests: Option<Bucket>,
    pub(super) tokens: Option<Bucket>,
    /// What its requests generate.
    pub(super) output: ExpectedOutput,
    running: AtomicU32,
    /// Memory that bodies of its requests take.
    pub(crate) body_bytes: AtomicU64,
    routers: LiveRouters,
}

impl Tenant {
    /// A tenant that has done nothing yet.
    pub fn new(name: String, limits: TenantLimits, routers: &LiveRouters) -> Self {
        let bucket = |limit: f64| Bucket::new(limit, routers.clone());
        Self {
            requests: limits.requests_per_minute.map(|limit| bucket(f64::from(limit))),
            tokens: limits.tokens_per_minute.map(|limit| bucket(limit as f64)),
            output: ExpectedOutput::default(),
            running: AtomicU32::new(0),
            body_bytes: AtomicU64::new(0),
            routers: routers.clone(),
            name,
            limits,
        }
    }

    /// Who shares cached prefixes with it.
    pub fn cache_scope(&self) -> CacheScope<'_> {
        self.limits.cache_salt.as_deref().map_or(CacheScope::Tenant(&self.name), CacheScope::Shared)
    }

    /// A request is refused for its tokens: it does not count as a request.
    pub(super) fn forget_request(&self) {
        if let Some(bucket) = &self.requests {
            bucket.give_back(1.0);
        }
    }

    /// `x-ratelimit-*` as OpenAI sends them.
    pub fn write_headers(&self, headers: &mut HeaderMap) {
        const NAMES: [[HeaderName; 3]; 2] = [
            [
                HeaderName::from_static("x-ratelimit-limit-requests"),
                HeaderName::from_static("x-ratelimit-remaining-requests"),
                HeaderName::from_static("x-ratelimit-reset-requests"),
            ],
            [
                HeaderName::from_static("x-ratelimit-limit-tokens"),
                HeaderName::from_static("x-ratelimit-remaining-tokens"),
                HeaderName::from_static("x-ratelimit-reset-tokens"),
            ],
        ];
        for (bucket, [limit, remaining, reset]) in [&self.requests, &self.tokens].into_iter().zip(NAMES) {
            let Some(bucket) = bucket else { continue };
            let (level, share) = (bucket.level(), bucket.share());
            headers.insert(limit, HeaderValue::from(share as u64));
            headers.insert(remaining, HeaderValue::from(level.max(0.0) as u64));
            let seconds = (share - level).max(0.0) * 60.0 / share;
            if let Ok(value) = HeaderValue::from_str(&format!("{seconds:.3}s")) {
                headers.insert(reset, value);
            }
        }
    }
}

impl Caller {
    /// Lets a request begin before its body is read, or says why not (429): its tenant has a slot for it, and neither
    /// of its buckets is empty. It counts as a request from now on, whatever becomes of it.
    pub fn begin(&self) -> Result<Slot, ApiError> {
        let tenant = &self.tenant;
        let running = tenant.running.fetch_add(1, Ordering::Relaxed) + 1;
        let slot = Slot(Arc::clone(tenant));
        // rounded up: a limit below the number of routers lets one request a router through
        if let Some(most) = tenant.limits.parallel_requests
            && running > most.div_ceil(tenant.routers.count())
        {
            let message = format!("This API key's tenant may run {most} requests at once.");
            return Err(ApiError::rate_limited(message, 1));
        }
        if let Some(bucket) = &tenant.requests
            && let Err(seconds) = bucket.take(1.0)
        {
            return Err(ApiError::rate_limited(bucket.exhausted("requests"), seconds));
        }
        if let Some(bucket) = &tenant.tokens
            && let Err(seconds) = bucket.has(1.0)
        {
            tenant.forget_request();
            return Err(ApiError::rate_limited(bucket.exhausted("tokens"), seconds));
        }
        Ok(slot)
    }
}

/// One of the requests that a tenant may run at once.
#[derive(Debug)]
pub struct Slot(Arc<Tenant>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}
