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
    max_model_len: u32,
    device: Device,
    groups: usize,
    ready_groups: usize,
    // what Mistral's client asks for
    r#type: &'static str,
    name: String,
    max_context_length: u32,
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
    let mut names: Vec<(&str, &Arc<ModelGroups>)> = view.names().collect();
    names.sort_by_key(|(name, _)| *name);
    let data = names.into_iter().map(|(name, model)| describe(&service, name, model)).collect();
    json(&List { object: "list", data })
}

/// `GET /v1/models/{id}`; ids may contain slashes.
pub async fn one(State(service): State<Arc<Service>>, Path(id): Path<String>) -> Response<axum::body::Body> {
    match super::prepare::resolve(&service, Some(&id)) {
        Ok((name, model, _)) => json(&describe(&service, &name, &model)),
        Err(error) => ApiError::into_response(error),
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
        max_model_len: model.max_model_len,
        device: model.device,
        groups: model.groups.len(),
        ready_groups: model.groups.iter().filter(|group| group.is_ready()).count(),
        r#type: "base",
        name: model.name.clone(),
        max_context_length: model.max_model_len,
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
