//! The policy of a tenant, applied in one place.
//!
//! Every operation that reads a body gets a `RequestContext` (`api::context`), and with it the [`Policy`] of its
//! tenant. The types enforce it: encoding a conversation takes an [`AllowedModel`](crate::api::prepare::AllowedModel),
//! which only [`Policy::allow`] permits, and a salt, which only [`Policy::cache_salt`] creates.

use bora_common::secret::{CacheSalt, CacheScope};

use super::{Caller, limits::TenantClass};
use crate::{api::error::ApiError, options::ConversationRules, place::admission::Class, service::Service};

/// The policy of a request, made from the caller that the authentication layer found.
#[derive(Clone, Debug)]
pub struct Policy {
    /// `None`: no key is needed.
    caller: Option<Caller>,
}

impl Policy {
    /// The policy of an authenticated caller.
    pub(crate) fn of(caller: Option<Caller>) -> Self {
        Self { caller }
    }

    /// The policy without authentication; `None` if the router requires keys.
    pub fn without_keys(service: &Service) -> Option<Self> {
        service.access().is_open().then_some(Self { caller: None })
    }

    /// The caller; `None` if no key is needed.
    pub fn caller(&self) -> Option<&Caller> {
        self.caller.as_ref()
    }

    /// Refuses a model, by its configured name, that the tenant may not use (403).
    pub fn allow(&self, model: &str) -> Result<(), ApiError> {
        match &self.caller {
            Some(caller) if !caller.may_use(model) => {
                Err(ApiError::forbidden(format!("This API key may not use the model `{model}`.")))
            }
            _ => Ok(()),
        }
    }

    /// The salt of the request's prefix cache. `requested` is the request's own salt; it cannot reach another tenant's
    /// cache.
    pub fn cache_salt(&self, service: &Service, requested: Option<&str>) -> CacheSalt {
        let scope = self.caller.as_ref().map_or(CacheScope::Anonymous, |caller| caller.tenant.cache_scope());
        service.keys().cache_salt(scope, requested.unwrap_or_default())
    }

    /// The class of a request that asks for `requested`, limited to the tenant's class.
    pub fn class(&self, requested: Class) -> Class {
        match &self.caller {
            Some(caller) if caller.tenant.limits.class == TenantClass::Batch => Class::Batch,
            _ => requested,
        }
    }

    /// Whether faulty conversations are refused or repaired.
    pub fn conversation_rules(&self, service: &Service) -> ConversationRules {
        let of_tenant = self.caller.as_ref().and_then(|caller| caller.tenant.limits.conversation);
        of_tenant.unwrap_or(service.options().conversation)
    }
}
