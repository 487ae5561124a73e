//! Who may ask for what: API keys, the tenants they belong to, and the tenants' limits.
//!
//! A key travels in `authorization: Bearer ...` or `x-api-key` and is looked up by its SHA-256, in constant time
//! ([`keys::Digest`] says what that means); the file holds no secret. In its place stands a token of an OIDC provider
//! ([`jwt`]), whose tenant is one of the same file. Each request leaves one line ([`audit`]). A request is admitted twice: when its head
//! has come (the key), and when it is encoded and its real number of tokens is known ([`limits`], [`quota`]). What a
//! tenant may do is applied to all its requests by its [`policy`]. TenantLimits are the cluster's: each router that lives grants its share.
//!
//! Without a key file everybody may do everything, as befits a router that listens on loopback.

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

/// How often the key file is looked at.
const RELOAD_EVERY: Duration = Duration::from_secs(2);

/// The `router.access` section.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AccessOptions {
    /// File of tenants and hashed keys, read again when it changes; absent: no key is needed.
    pub keys: Option<PathBuf>,
    /// Tokens of an OIDC provider, which name tenants of that file; absent: none is taken.
    pub jwt: Option<JwtOptions>,
    /// Whether lines of the audit log hold the requests' bodies, prompts and all.
    pub audit_bodies: bool,
    /// Keys given on the command line, which may do everything.
    #[serde(skip)]
    pub api_keys: Vec<Digest>,
}

/// Whose request it is.
#[derive(Clone, Debug)]
pub struct Caller {
    /// To whom the key belongs.
    pub tenant: Arc<Tenant>,
    /// The key's name, for the audit log.
    pub key: Arc<str>,
}

impl Caller {
    /// Whether it may use the model of that configured name.
    pub fn may_use(&self, model: &str) -> bool {
        self.tenant.limits.models.as_ref().is_none_or(|models| models.iter().any(|name| name == model))
    }
}

/// What the key file says.
#[derive(Default)]
struct Callers {
    keys: HashMap<Digest, Caller>,
    tenants: HashMap<String, Arc<Tenant>>,
}

/// Nobody can be let in like this.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The file of tenants and keys.
    #[error(transparent)]
    Keys(#[from] KeyFileError),
    /// The tokens.
    #[error(transparent)]
    Jwt(#[from] JwtError),
}

/// Knows the keys.
pub struct Access {
    options: AccessOptions,
    /// `None`: everybody may do everything.
    callers: Option<RwLock<Arc<Callers>>>,
    tokens: Option<Tokens>,
    routers: LiveRouters,
    reload_requested: Notify,
}

impl Access {
    /// Reads the key file.
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
                return wrong("default_tenant", format!("`{name}` is no tenant of the file router.access.keys"));
            }
        }
        let callers = Some(RwLock::new(Arc::new(callers)));
        Ok(Self { options, callers, tokens, routers, reload_requested: Notify::new() })
    }

    /// Whether lines of the audit log hold the requests' bodies.
    pub fn audits_bodies(&self) -> bool {
        self.options.audit_bodies
    }

    /// Reads the key file now, rather than within the next seconds.
    pub fn reload(&self) {
        self.reload_requested.notify_one();
    }

    /// Whether requests need no key.
    pub fn is_open(&self) -> bool {
        self.callers.is_none()
    }

    /// Among how many routers every limit is divided, and what may be placed again.
    pub fn routers(&self) -> &LiveRouters {
        &self.routers
    }

    /// Whose request this is; `None` where keys are not asked for. Of two credentials one has to be valid; two that are valid
    /// must be those of one tenant.
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
                let unknown = || ApiError::forbidden("The token is good, but it names no tenant that is known here.");
                let tenant = Arc::clone(tenant.ok_or_else(unknown)?);
                Ok(Caller { tenant, key: identity.subject })
            }
            _ => Err(ApiError::unauthorized("The API key is not known.", "invalid_api_key")),
        }
    }

    /// Keeps keys, tenants and the keys of tokens as their sources say, for ever.
    pub async fn keep_fresh(self: Arc<Self>) {
        let tokens = async {
            if let Some(tokens) = &self.tokens {
                tokens.keep_fresh().await;
            }
        };
        tokio::join!(self.keep_keys_fresh(), tokens);
    }

    /// Reads the key file again whenever it changes, for ever. A file that can't be read leaves what was.
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
                    tracing::info!(keys = fresh.keys.len(), tenants = fresh.tenants.len(), "api keys were read again");
                    *callers.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(fresh);
                }
                Err(error) => tracing::error!(%error, "api keys stay as they were"),
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
