//! Who may ask for what: API keys, the tenants they belong to, and the tenants' limits.
//!
//! A key travels in `authorization: Bearer ...` or `x-api-key` and is looked up by its SHA-256 ([`keys`]); the file holds
//! no secret, and how long a look-up takes says nothing about other keys. A request is admitted twice: when its head
//! has come (the key), and when it is encoded and its real number of tokens is known ([`limits`]). Limits hold for this
//! router alone: n replicas let n times as much through.
//!
//! Without a key file everybody may do everything, as befits a router that listens on loopback.

pub mod keys;
pub mod limits;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use axum::http::{HeaderMap, header};
use serde::{Deserialize, Serialize};

use crate::api::error::ApiError;
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

type Callers = HashMap<Digest, Caller>;

/// Knows the keys.
pub struct Access {
    options: AccessOptions,
    /// `None`: everybody may do everything.
    callers: Option<RwLock<Arc<Callers>>>,
    routers: LiveRouters,
}

impl Access {
    /// Reads the key file.
    pub fn open(options: AccessOptions) -> Result<Self, KeyFileError> {
        if options.keys.is_none() && options.api_keys.is_empty() {
            return Ok(Self { options, callers: None, routers: LiveRouters::default() });
        }
        let routers = LiveRouters::default();
        let callers = read_callers(&options, &HashMap::new(), &routers)?;
        Ok(Self { options, callers: Some(RwLock::new(Arc::new(callers))), routers })
    }

    /// Whether requests need no key.
    pub fn is_open(&self) -> bool {
        self.callers.is_none()
    }

    /// Among how many routers every limit is divided.
    pub fn routers(&self) -> &LiveRouters {
        &self.routers
    }

    /// Whose request this is; `None` where keys are not asked for.
    pub fn caller(&self, headers: &HeaderMap) -> Result<Option<Caller>, ApiError> {
        let Some(callers) = &self.callers else { return Ok(None) };
        let key = bearer(headers).ok_or_else(|| {
            ApiError::unauthorized("An API key is needed: send it as `Authorization: Bearer KEY`.", "missing_api_key")
        })?;
        let callers = Arc::clone(&callers.read().unwrap_or_else(PoisonError::into_inner));
        match callers.get(&Digest::of(key.as_bytes())) {
            Some(caller) => Ok(Some(caller.clone())),
            None => Err(ApiError::unauthorized("The API key is not known.", "invalid_api_key")),
        }
    }

    /// Reads the key file again whenever it changes, for ever. A file that can't be read leaves what was.
    pub async fn keep_fresh(self: Arc<Self>) {
        let (Some(callers), Some(path)) = (&self.callers, &self.options.keys) else { return };
        let mut seen = tokio::fs::read(path).await.ok();
        loop {
            tokio::time::sleep(RELOAD_EVERY).await;
            let now = tokio::fs::read(path).await.ok();
            if now == seen {
                continue;
            }
            seen = now;
            let old = Arc::clone(&callers.read().unwrap_or_else(PoisonError::into_inner));
            let tenants = old.values().map(|caller| (caller.tenant.name.clone(), Arc::clone(&caller.tenant))).collect();
            match read_callers(&self.options, &tenants, &self.routers) {
                Ok(fresh) => {
                    tracing::info!(keys = fresh.len(), "api keys were read again");
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
    let mut callers = HashMap::new();
    if let Some(path) = &options.keys {
        for tenant in KeyFile::read(path)?.tenants {
            let state = match old.get(&tenant.name) {
                Some(state) if state.limits == tenant.limits => Arc::clone(state),
                _ => Arc::new(Tenant::new(tenant.name, tenant.limits, routers)),
            };
            for key in tenant.keys {
                let name = key.name.unwrap_or_else(|| key.sha256.short());
                callers.insert(key.sha256, Caller { tenant: Arc::clone(&state), key: name.into() });
            }
        }
    }
    if !options.api_keys.is_empty() {
        let everything = Arc::new(Tenant::new("default".to_owned(), limits::Limits::default(), routers));
        for key in &options.api_keys {
            callers.insert(*key, Caller { tenant: Arc::clone(&everything), key: key.short().into() });
        }
    }
    Ok(callers)
}

/// The key that a request carries.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let authorization = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let key = match authorization.and_then(|value| value.split_once(' ')) {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => Some(key.trim()),
        _ => headers.get("x-api-key").and_then(|value| value.to_str().ok()),
    };
    key.filter(|key| !key.is_empty())
}

#[cfg(test)]
mod tests;
