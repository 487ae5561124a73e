//! What a tenant may do, applied in one place.
//!
//! Every operation that reads a body gets a `RequestContext` (`api::context`), and with it the [`Policy`] of its tenant. The
//! types leave no way around it: a conversation is encoded for an [`AllowedModel`](crate::api::prepare::AllowedModel),
//! which only [`Policy::allow`] lets come into being, with a salt that only [`Policy::cache_salt`] makes.

use bora_common::secret::{CacheSalt, CacheScope};

use super::{Caller, limits::TenantClass};
use crate::{api::error::ApiError, options::ConversationRules, place::admission::Class, service::Service};

/// The policy that a request is under. It is made from what the layer that checks keys found.
#[derive(Clone, Debug)]
pub struct Policy {
    /// `None`: keys are not asked for.
    caller: Option<Caller>,
}

impl Policy {
    /// The policy of a caller as the layer that checks keys found it.
    pub(crate) fn of(caller: Option<Caller>) -> Self {
        Self { caller }
    }

    /// The policy of everybody; `None` if the router asks for keys.
    pub fn without_keys(service: &Service) -> Option<Self> {
        service.access().is_open().then_some(Self { caller: None })
    }

    /// Whose request it is; `None` if keys are not asked for.
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

    /// What separates the request's cached prefixes; `requested` is its own salt. Whatever that is, the request stays
    /// within its tenant's cache.
    pub fn cache_salt(&self, service: &Service, requested: Option<&str>) -> CacheSalt {
        let scope = self.caller.as_ref().map_or(CacheScope::Anonymous, |caller| caller.tenant.cache_scope());
        service.keys().cache_salt(scope, requested.unwrap_or_default())
    }

    /// The class of a request that asks for `requested`.
    pub fn class(&self, requested: Class) -> Class {
        match &self.caller {
            Some(caller) if caller.tenant.limits.class == TenantClass::Batch => Class::Batch,
            _ => requested,
        }
    }

    /// What becomes of faulty conversations.
    pub fn conversation_rules(&self, service: &Service) -> ConversationRules {
        let of_tenant = self.caller.as_ref().and_then(|caller| caller.tenant.limits.conversation);
        of_tenant.unwrap_or(service.options().conversation)
    }
}
