//! `GET /v1/models` and `/v1/models/{id}`, in a form that OpenAI's, vLLM's and Mistral's clients read.

use std::sync::Arc;

use axum::{
    extract::{Path, State},
    http::Response,
    response::IntoResponse as _,
};
use bora_common::registry::Device;
use serde::Serialize;

use super::{error::ApiError, status::json};
use crate::{fleet::view::ModelGroups, service::Service};

#[derive(Serialize)]
struct List {
    object: &'static str,
    data: Vec<ModelObject>,
}

#[derive(Serialize)]
struct ModelObject {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// The model behind an alias.
    root: String,
    parent: Option<String>,
    /// Of its groups, as `device` is: unknown while it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    max_model_len: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<Device>,
    groups: usize,
    ready_groups: usize,
    // what Mistral's client asks for
    r#type: &'static str,
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_context_length: Option<u32>,
    aliases: Vec<String>,
    capabilities: Capabilities,
}

#[derive(Serialize)]
struct Capabilities {
    completion_chat: bool,
    completion_fim: bool,
    function_calling: bool,
    fine_tuning: bool,
    vision: bool,
}

/// `GET /v1/models`
pub async fn list(State(service): State<Arc<Service>>) -> Response<axum::body::Body> {
    let view = service.fleet().view();
    let served = view.names().map(|(name, model)| describe(&service, name, model));
    // a model whose groups are all scaled away is still offered: a request for it brings them back
    let idle = service.configured_names().filter(|(_, model)| view.model(model).is_none());
    let mut data: Vec<ModelObject> =
        served.chain(idle.map(|(name, model)| describe_idle(&service, name, model))).collect();
    data.sort_by(|one, other| one.id.cmp(&other.id));
    json(&List { object: "list", data })
}

/// `GET /v1/models/{id}`; ids may contain slashes.
pub async fn one(State(service): State<Arc<Service>>, Path(id): Path<String>) -> Response<axum::body::Body> {
    let view = service.fleet().view();
    match (view.model(&id), service.configured(&id)) {
        (Some(model), _) => json(&describe(&service, &id, model)),
        (None, Some(configured)) => match view.model(configured) {
            Some(model) => json(&describe(&service, &id, model)),
            None => json(&describe_idle(&service, &id, configured)),
        },
        (None, None) => ApiError::model_not_found(&id).into_response(),
    }
}

fn describe(service: &Service, name: &str, model: &ModelGroups) -> ModelObject {
    let has_text = service.spec(&model.name).tokenizer.is_some();
    let mut aliases: Vec<String> = model.groups.iter().flat_map(|group| group.record.aliases.iter().cloned()).collect();
    aliases.sort_unstable();
    aliases.dedup();
    ModelObject {
        id: name.to_string(),
        object: "model",
        created: service.started_at(),
        owned_by: if model.device == Device::Fake { "bora-fake" } else { "bora" },
        root: model.name.clone(),
        parent: None,
        max_model_len: Some(model.max_model_len),
        device: Some(model.device),
        groups: model.groups.len(),
        ready_groups: model.groups.iter().filter(|group| group.is_ready()).count(),
        r#type: "base",
        name: model.name.clone(),
        max_context_length: Some(model.max_model_len),
        aliases,
        capabilities: Capabilities {
            completion_chat: has_text,
            completion_fim: false,
            function_calling: has_text,
            fine_tuning: false,
            vision: model.images,
        },
    }
}

/// A configured model that no group serves now.
fn describe_idle(service: &Service, name: &str, model: &str) -> ModelObject {
    let spec = service.spec(model);
    let has_text = spec.tokenizer.is_some();
    let mut aliases = spec.aliases.clone();
    aliases.sort_unstable();
    ModelObject {
        id: name.to_string(),
        object: "model",
        created: service.started_at(),
        owned_by: "bora",
        root: model.to_string(),
        parent: None,
        max_model_len: None,
        device: None,
        groups: 0,
        ready_groups: 0,
        r#type: "base",
        name: model.to_string(),
        max_context_length: None,
        aliases,
        capabilities: Capabilities {
            completion_chat: has_text,
            completion_fim: false,
            function_calling: has_text,
            fine_tuning: false,
            vision: false,
        },
    }
}
