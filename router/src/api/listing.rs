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
    let served = |model: &str| view.model(model).filter(|model| !model.groups.is_empty());
    // a model whose groups are all scaled away is still offered: a request for it brings them back
    let configured = service.configured_names().map(|(name, model)| describe(&service, name, model, served(model)));
    let others = view.models().filter(|model| service.configured(&model.name).is_none());
    let mut data: Vec<ModelObject> =
        configured.chain(others.map(|model| describe(&service, &model.name, &model.name, Some(model)))).collect();
    data.sort_by(|one, other| one.id.cmp(&other.id));
    json(&List { object: "list", data })
}

/// `GET /v1/models/{id}`; ids may contain slashes.
pub async fn one(State(service): State<Arc<Service>>, Path(id): Path<String>) -> Response<axum::body::Body> {
    let view = service.fleet().view();
    let configured = service.configured(&id);
    let served = view.model(configured.unwrap_or(&id)).filter(|model| !model.groups.is_empty());
    match (served, configured) {
        (Some(served), _) => json(&describe(&service, &id, &served.name, Some(served))),
        (None, Some(configured)) => json(&describe(&service, &id, configured, None)),
        (None, None) => ApiError::model_not_found(&id).into_response(),
    }
}

/// A model by one of its names; `served` are its groups, if it has any now.
fn describe(service: &Service, name: &str, model: &str, served: Option<&Arc<ModelGroups>>) -> ModelObject {
    let spec = service.spec(model);
    let has_text = spec.tokenizer.is_some();
    let mut aliases = spec.aliases.clone();
    aliases.sort_unstable();
    aliases.dedup();
    let max_model_len = served.map(|served| served.max_model_len);
    let device = served.map(|served| served.device);
    let groups = served.map_or(&[][..], |served| &served.groups);
    ModelObject {
        id: name.to_string(),
        object: "model",
        created: service.started_at(),
        owned_by: if device == Some(Device::Fake) { "bora-fake" } else { "bora" },
        root: model.to_string(),
        parent: None,
        max_model_len,
        device,
        groups: groups.len(),
        ready_groups: groups.iter().filter(|group| group.is_ready()).count(),
        r#type: "base",
        name: model.to_string(),
        max_context_length: max_model_len,
        aliases,
        capabilities: Capabilities {
            completion_chat: has_text,
            completion_fim: false,
            function_calling: has_text,
            fine_tuning: false,
            vision: served.is_some_and(|served| served.images),
        },
    }
}
