//! Access control: API keys, the tenants that own them, and the tenants' limits.
//!
//! A key travels in `authorization: Bearer ...` or `x-api-key` and is looked up by its SHA-256 in constant time (see
//! [`keys::Digest`]), so the key file holds no secret. Instead of a key, a request may carry a token of an OIDC
//! provider ([`jwt`]), whose claim names a tenant of the key file.
//!
//! A request is admitted twice: by its key when its head has arrived, and by its number of tokens when it is encoded
//! ([`limits`], [`quota`]). A tenant's [`policy`] applies to all its requests. Limits apply to the whole cluster: each
//! live router grants its share. Each request leaves one record in the audit log ([`audit`]).
//!
//! Without a key file every caller has full access, for a router that listens on loopback.

pub mod audit;
mod bucket;
pub mod jwt;
pub mod keys;
pub mod limits;
pub mod open_requests;
pub mod policy;
pub mod quota;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use axum::http::{HeaderMap, HeaderValue, header};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::api::error::ApiError;
use jwt::{JwtError, JwtOptions, Tokens};
use keys::{Digest, KeyFile, KeyFileError};
use limits::{LiveRouters, Tenant};

/// How often the key file is checked for changes.
const RELOAD_EVERY: Duration = Duration::from_secs(2);

/// The `router.access` section.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AccessOptions {
    /// File of tenants and hashed keys, read again if it changes; absent: no key is needed.
    pub keys: Option<PathBuf>,
    /// Tokens of an OIDC provider, which name tenants of that file; absent: no token is accepted.
    pub jwt: Option<JwtOptions>,
    /// Whether the audit log holds the requests' bodies, including prompts.
    pub audit_bodies: bool,
    /// Keys given on the command line, which have full access.
    #[serde(skip)]
    pub api_keys: Vec<Digest>,
}

/// The caller of a request.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The tenant that owns the key.
    pub tenant: Arc<Tenant>,
    /// The key's name, for the audit log.
    pub key: Arc<str>,
}

impl Caller {
    /// Whether the caller may use the model with that configured name.
    pub fn may_use(&self, model: &str) -> bool {
        self.tenant.limits.models.as_ref().is_none_or(|models| models.iter().any(|name| name == model))
    }
}

/// The contents of the key file: callers by the digest of their key, tenants by name.
#[derive(Default)]
struct Callers {
    keys: HashMap<Digest, Caller>,
    tenants: HashMap<String, Arc<Tenant>>,
}

/// Why access control cannot be configured.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The file of tenants and keys is invalid.
    #[error(transparent)]
    Keys(#[from] KeyFileError),
    /// The configuration of OIDC tokens is invalid.
    #[error(transparent)]
    Jwt(#[from] JwtError),
}

/// Authenticates requests.
pub struct Access {
    options: AccessOptions,
    /// `None`: every caller has full access.
    callers: Option<RwLock<Arc<Callers>>>,
    tokens: Option<Tokens>,
    routers: LiveRouters,
    reload_requested: Notify,
}

impl Access {
    /// Reads the key file and the configuration of tokens.
    pub fn open(options: AccessOptions) -> Result<Self, AccessError> {
        let routers = LiveRouters::default();
        let tokens = options.jwt.clone().map(Tokens::open).transpose()?;
        if options.keys.is_none() && options.api_keys.is_empty() && tokens.is_none() {
            return Ok(Self { options, callers: None, tokens, routers, reload_requested: Notify::new() });
        }
        let callers = read_callers(&options, &HashMap::new(), &routers)?;
        if let Some(jwt) = &options.jwt {
            let wrong = |field, reason: String| Err(JwtError { field, reason }.into());
            if options.keys.is_none() {
                return wrong(
                    "tenant_claim",
                    "it names tenants of the file router.access.keys, which is not set".into(),
                );
            }
            if let Some(name) = jwt.default_tenant.as_ref().filter(|name| !callers.tenants.contains_key(*name)) {
                return wrong("default_tenant", format!("`{name}` is not a tenant of the file router.access.keys"));
            }
        }
        let callers = Some(RwLock::new(Arc::new(callers)));
        Ok(Self { options, callers, tokens, routers, reload_requested: Notify::new() })
    }

    /// Whether the audit log holds the requests' bodies.
    pub fn audits_bodies(&self) -> bool {
        self.options.audit_bodies
    }

    /// Reads the key file now instead of at the next check.
    pub fn reload(&self) {
        self.reload_requested.notify_one();
    }

    /// Whether requests need no key.
    pub fn is_open(&self) -> bool {
        self.callers.is_none()
    }

    /// The number of live routers, which divides every limit and the retry budget.
    pub fn routers(&self) -> &LiveRouters {
        &self.routers
    }

    /// Authenticates a request; `None` if no key is needed. Of two credentials one must be valid; two valid ones must
    /// belong to the same tenant.
    pub async fn caller(&self, headers: &HeaderMap) -> Result<Option<Caller>, ApiError> {
        let Some(callers) = &self.callers else { return Ok(None) };
        let callers = Arc::clone(&callers.read().unwrap_or_else(PoisonError::into_inner));
        let mut outcome: Option<Result<Caller, ApiError>> = None;
        for credential in credentials(headers).into_iter().flatten() {
            let next = self.caller_of(credential, &callers).await;
            outcome = match (outcome, next) {
                (Some(Ok(first)), Ok(second)) if first.tenant.name != second.tenant.name => {
                    let message = "The request carries valid credentials of two tenants: send one of them.";
                    return Err(ApiError::unauthorized(message, "ambiguous_credentials"));
                }
                (None | Some(Err(_)), Ok(caller)) => Some(Ok(caller)),
                (None, refused) => Some(refused),
                (first, _) => first,
            };
        }
        let missing = || {
            ApiError::unauthorized("An API key is needed: send it as `Authorization: Bearer KEY`.", "missing_api_key")
        };
        outcome.unwrap_or_else(|| Err(missing())).map(Some)
    }

    async fn caller_of(&self, key: &str, callers: &Callers) -> Result<Caller, ApiError> {
        if let Some(caller) = callers.keys.get(&Digest::of(key.as_bytes())) {
            return Ok(caller.clone());
        }
        match &self.tokens {
            Some(tokens) if Tokens::looks_like(key) => {
                let identity = tokens.check(key).await?;
                let named = identity.tenants.iter().find_map(|name| callers.tenants.get(name));
                let tenant = match (named, &tokens.options().default_tenant) {
                    (None, Some(name)) => callers.tenants.get(name),
                    (named, _) => named,
                };
                let unknown = || ApiError::forbidden("The token is valid, but it names no known tenant.");
                let tenant = Arc::clone(tenant.ok_or_else(unknown)?);
                Ok(Caller { tenant, key: identity.subject })
            }
            _ => Err(ApiError::unauthorized("The API key is unknown.", "invalid_api_key")),
        }
    }

    /// Keeps keys, tenants and the provider's public keys up to date; never returns.
    pub async fn keep_fresh(self: Arc<Self>) {
        let tokens = async {
            if let Some(tokens) = &self.tokens {
                tokens.keep_fresh().await;
            }
        };
        tokio::join!(self.keep_keys_fresh(), tokens);
    }

    /// Reads the key file again if it changes; never returns. If the file cannot be read, the previous keys stay.
    async fn keep_keys_fresh(&self) {
        let (Some(callers), Some(path)) = (&self.callers, &self.options.keys) else { return };
        let mut seen = tokio::fs::read(path).await.ok();
        loop {
            let requested = tokio::time::timeout(RELOAD_EVERY, self.reload_requested.notified()).await.is_ok();
            let now = tokio::fs::read(path).await.ok();
            if now == seen && !requested {
                continue;
            }
            seen = now;
            let old = Arc::clone(&callers.read().unwrap_or_else(PoisonError::into_inner));
            match read_callers(&self.options, &old.tenants, &self.routers) {
                Ok(fresh) => {
                    tracing::info!(keys = fresh.keys.len(), tenants = fresh.tenants.len(), "reloaded api keys");
                    *callers.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(fresh);
                }
                Err(error) => tracing::error!(%error, "cannot reload api keys, keeping the previous ones"),
            }
        }
    }
}

/// Tenants whose limits did not change keep their state.
fn read_callers(
    options: &AccessOptions,
    old: &HashMap<String, Arc<Tenant>>,
    routers: &LiveRouters,
) -> Result<Callers, KeyFileError> {
    let mut callers = Callers::default();
    if let Some(path) = &options.keys {
        for tenant in KeyFile::read(path)?.tenants {
            let state = match old.get(&tenant.name) {
                Some(state) if state.limits == tenant.limits => Arc::clone(state),
                _ => Arc::new(Tenant::new(tenant.name, tenant.limits, routers)),
            };
            callers.tenants.insert(state.name.clone(), Arc::clone(&state));
            for key in tenant.keys {
                let name = key.name.unwrap_or_else(|| key.sha256.short());
                callers.keys.insert(key.sha256, Caller { tenant: Arc::clone(&state), key: name.into() });
            }
        }
    }
    if !options.api_keys.is_empty() {
        let everything = Arc::new(Tenant::new("default".to_owned(), limits::TenantLimits::default(), routers));
        for key in &options.api_keys {
            callers.keys.insert(*key, Caller { tenant: Arc::clone(&everything), key: key.short().into() });
        }
    }
    Ok(callers)
}

/// The credentials that a request carries: a bearer token and an API key.
fn credentials(headers: &HeaderMap) -> [Option<&str>; 2] {
    let bearer = text(headers.get(header::AUTHORIZATION)).and_then(|value| {
        let (scheme, token) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
    });
    [bearer, text(headers.get("x-api-key"))].map(|credential| credential.filter(|credential| !credential.is_empty()))
}

fn text(value: Option<&HeaderValue>) -> Option<&str> {
    value.and_then(|value| value.to_str().ok())
}

#[cfg(test)]
mod tests;
