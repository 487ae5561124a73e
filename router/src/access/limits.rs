//! The limits of a tenant, and the tenant's current use of them.
//!
//! Requests and tokens per minute are token buckets that hold a minute's worth. A request is counted when it begins;
//! [`quota`](super::quota) charges its tokens.
//!
//! Limits apply to the whole cluster. Each router grants an equal share ([`LiveRouters`]) without asking the others, so
//! that all routers together never grant more than the limit and none depends on another.

use std::sync::{
    Arc,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use bora_common::secret::CacheScope;
use serde::Deserialize;

use super::{Caller, bucket::Bucket, quota::ExpectedOutput};
use crate::{api::error::ApiError, options::ConversationRules};

/// The limits of a tenant; absent = none.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct TenantLimits {
    /// Names of the models (not aliases) that the tenant may use.
    pub models: Option<Vec<String>>,
    /// Generation requests per minute.
    pub requests_per_minute: Option<u32>,
    /// Prompt and completion tokens per minute.
    pub tokens_per_minute: Option<u64>,
    /// Generation requests that may run in parallel.
    pub parallel_requests: Option<u32>,
    /// Maximum tokens of a prompt.
    pub max_context: Option<u32>,
    /// The most urgent class of its requests.
    pub class: TenantClass,
    /// The name of its prefix cache: tenants with the same name share cached prefixes. Absent: a cache of its own.
    pub cache_salt: Option<String>,
    /// Whether its faulty conversations are refused or repaired; absent: the router's setting.
    pub conversation: Option<ConversationRules>,
    /// Whether it may send a grammar of its own (`guided_grammar`); absent: it may.
    pub allow_grammar: Option<bool>,
    /// Whether it may send a regular expression (`guided_regex`); absent: it may.
    pub allow_regex: Option<bool>,
}

/// The classes that a tenant's requests may have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TenantClass {
    /// Any class.
    #[default]
    Interactive,
    /// Only batch.
    Batch,
}

impl TenantLimits {
    /// The name of a limit that is zero and would block every request.
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

/// The number of live routers: each grants that share of every limit and of the retry budget.
#[derive(Clone, Debug)]
pub struct LiveRouters(Arc<AtomicU32>);

impl Default for LiveRouters {
    fn default() -> Self {
        Self(Arc::new(AtomicU32::new(1)))
    }
}

impl LiveRouters {
    /// Sets the number of live routers, this one included.
    pub fn set(&self, count: u32) {
        self.0.store(count.max(1), Ordering::Relaxed);
    }

    /// The number of live routers.
    pub fn count(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A tenant and its current use of its limits.
#[derive(Debug)]
pub struct Tenant {
    /// The unique name of the tenant.
    pub name: String,
    /// The tenant's limits.
    pub limits: TenantLimits,
    requests: Option<Bucket>,
    pub(super) tokens: Option<Bucket>,
    /// The expected output length of its requests.
    pub(super) output: ExpectedOutput,
    running: AtomicU32,
    /// The memory that bodies of its requests use.
    pub(crate) body_bytes: AtomicU64,
    routers: LiveRouters,
}

impl Tenant {
    /// Creates a tenant without any use.
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

    /// The salt of its prefix cache.
    pub fn cache_scope(&self) -> CacheScope<'_> {
        self.limits.cache_salt.as_deref().map_or(CacheScope::Tenant(&self.name), CacheScope::Shared)
    }

    /// Gives back the charge of a request that was refused for its tokens, so that it does not count.
    pub(super) fn forget_request(&self) {
        if let Some(bucket) = &self.requests {
            bucket.give_back(1.0);
        }
    }

    /// The headers `x-ratelimit-*`, in OpenAI's form.
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
    /// Admits a request before its body is read, or refuses it with a 429. The tenant needs a free parallel request,
    /// and neither of its buckets may be empty. The request counts from now on, whatever its outcome.
    pub fn begin(&self) -> Result<Slot, ApiError> {
        let tenant = &self.tenant;
        let running = tenant.running.fetch_add(1, Ordering::Relaxed) + 1;
        let slot = Slot(Arc::clone(tenant));
        // rounded up: a limit below the number of routers admits one request per router
        if let Some(most) = tenant.limits.parallel_requests
            && running > most.div_ceil(tenant.routers.count())
        {
            let message = format!("This API key's tenant may run {most} requests in parallel.");
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

/// A permit for one of the requests that a tenant may run in parallel.
#[derive(Debug)]
pub struct Slot(Arc<Tenant>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}
