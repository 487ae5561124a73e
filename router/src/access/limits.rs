//! What a tenant may do, and how much of it is done.
//!
//! Requests and tokens per minute are buckets that hold a minute's worth and fill steadily. Tokens are reserved when a
//! request is admitted (its prompt, and `max_tokens` where it was given) and settled when it ends: what was not used
//! goes back, what was used beyond is owed. A request larger than a minute's worth passes when the bucket is full.
//!
//! Limits are of the whole cluster. Routers do not ask each other: each of them grants its equal share
//! ([`LiveRouters`]), so together they never grant more, and none of them is needed by the others.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Instant,
};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use bora_common::secret::CacheScope;
use serde::Deserialize;

use super::Caller;
use crate::{api::error::ApiError, options::ConversationRules};

/// Limits of a tenant; absent = none.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Limits {
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

impl Limits {
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
    pub limits: Limits,
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    running: AtomicU32,
    routers: LiveRouters,
}

/// A request as far as limits go.
#[derive(Clone, Copy, Debug)]
pub struct Wish<'a> {
    /// The model's configured name.
    pub model: &'a str,
    /// Of all its prompts.
    pub prompt_tokens: u64,
    /// Of the longest prompt.
    pub longest_prompt: u64,
    /// Completion tokens that were asked for; 0 where the request leaves it open.
    pub max_tokens: u64,
}

impl Tenant {
    /// A tenant that has done nothing yet.
    pub fn new(name: String, limits: Limits, routers: &LiveRouters) -> Self {
        let bucket = |limit: f64| Bucket::new(limit, routers.clone());
        Self {
            requests: limits.requests_per_minute.map(|limit| bucket(f64::from(limit))),
            tokens: limits.tokens_per_minute.map(|limit| bucket(limit as f64)),
            running: AtomicU32::new(0),
            routers: routers.clone(),
            name,
            limits,
        }
    }

    /// Who shares cached prefixes with it.
    pub fn cache_scope(&self) -> CacheScope<'_> {
        self.limits.cache_salt.as_deref().map_or(CacheScope::Tenant(&self.name), CacheScope::Shared)
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
    /// Lets a request in, or says why not (403, 429). What it takes is given back when the permit is dropped.
    pub fn admit(&self, wish: Wish<'_>) -> Result<Permit, ApiError> {
        let tenant = &self.tenant;
        let limits = &tenant.limits;
        if limits.models.as_ref().is_some_and(|models| !models.iter().any(|model| model == wish.model)) {
            return Err(ApiError::forbidden(format!("This API key may not use the model `{}`.", wish.model)));
        }
        if let Some(most) = limits.max_context
            && wish.longest_prompt > u64::from(most)
        {
            let message =
                format!("This API key's prompts may have {most} tokens; this one has {}.", wish.longest_prompt);
            return Err(ApiError::forbidden(message));
        }
        let mut permit =
            Permit { caller: self.clone(), reserved: 0.0, prompt_tokens: wish.prompt_tokens, completion_tokens: 0 };
        let running = tenant.running.fetch_add(1, Ordering::Relaxed) + 1;
        // from here on the permit gives back what it took
        // rounded up: a limit below the number of routers lets one request a router through
        if limits.parallel_requests.is_some_and(|most| running > most.div_ceil(tenant.routers.count())) {
            let most = limits.parallel_requests.unwrap_or(0);
            let message = format!("This API key's tenant may run {most} requests at once.");
            return Err(permit.refused(ApiError::rate_limited(message, 1), None));
        }
        if let Some(bucket) = &tenant.requests
            && let Err(seconds) = bucket.take(1.0)
        {
            let message = format!("The limit of {} requests a minute is reached.", bucket.limit);
            return Err(permit.refused(ApiError::rate_limited(message, seconds), None));
        }
        if let Some(bucket) = &tenant.tokens {
            let wanted = (wish.prompt_tokens + wish.max_tokens) as f64;
            if let Err(seconds) = bucket.take(wanted) {
                let message = format!("The limit of {} tokens a minute is reached.", bucket.limit);
                return Err(permit.refused(ApiError::rate_limited(message, seconds), tenant.requests.as_ref()));
            }
            permit.reserved = wanted;
        }
        Ok(permit)
    }
}

/// A request that was let in.
#[derive(Debug)]
pub struct Permit {
    caller: Caller,
    reserved: f64,
    prompt_tokens: u64,
    /// Generated so far.
    pub completion_tokens: u64,
}

impl Permit {
    /// Not let in after all: nothing was used, and a request that was counted is not.
    fn refused(&mut self, error: ApiError, counted: Option<&Bucket>) -> ApiError {
        self.prompt_tokens = 0;
        if let Some(bucket) = counted {
            bucket.give_back(1.0);
        }
        error
    }

    /// The class that its requests have at most, and what separates its cache.
    pub fn limits(&self) -> &Limits {
        &self.caller.tenant.limits
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let tenant = &self.caller.tenant;
        tenant.running.fetch_sub(1, Ordering::Relaxed);
        if let Some(bucket) = &tenant.tokens {
            bucket.give_back(self.reserved - (self.prompt_tokens + self.completion_tokens) as f64);
        }
    }
}

/// Holds this router's share of a minute's worth of something and fills steadily.
#[derive(Debug)]
struct Bucket {
    /// Of all routers.
    limit: f64,
    routers: LiveRouters,
    state: Mutex<(f64, Instant)>,
}

impl Bucket {
    fn new(limit: f64, routers: LiveRouters) -> Self {
        let full = (limit / f64::from(routers.count())).max(1.0);
        Self { limit, routers, state: Mutex::new((full, Instant::now())) }
    }

    /// This router's part; at least one, or a small limit would let nothing through.
    fn share(&self) -> f64 {
        (self.limit / f64::from(self.routers.count())).max(1.0)
    }

    /// Takes an amount, or says in how many seconds it will be there.
    fn take(&self, amount: f64) -> Result<(), u32> {
        let mut state = self.filled();
        let needed = amount.min(self.share());
        if state.0 + 1e-9 < needed {
            let seconds = (needed - state.0) * 60.0 / self.rate();
            return Err(seconds.ceil().clamp(1.0, 3_600.0) as u32);
        }
        state.0 -= amount;
        Ok(())
    }

    /// A negative amount is owed.
    fn give_back(&self, amount: f64) {
        let mut state = self.filled();
        state.0 = (state.0 + amount).min(self.share());
    }

    fn level(&self) -> f64 {
        self.filled().0
    }

    /// A minute's worth, as this router grants it: no more than its part, however small.
    fn rate(&self) -> f64 {
        self.limit / f64::from(self.routers.count())
    }

    fn filled(&self) -> std::sync::MutexGuard<'_, (f64, Instant)> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        state.0 = (state.0 + (now - state.1).as_secs_f64() * self.rate() / 60.0).min(self.share());
        state.1 = now;
        state
    }
}
