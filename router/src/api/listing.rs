//! `GET /v1/models` and `/v1/models/{id}`, in a form that the clients of OpenAI, vLLM and Mistral parse, and in
//! Anthropic's form for clients that send its version header.

use std::sync::Arc;

use axum::{
    Extension,
    extract::{Path, State},
    http::{HeaderMap, Response},
    response::IntoResponse as _,
};
use bora_common::registry::Device;
use serde::Serialize;

use super::{error::ApiError, status::json};
use crate::{access::Caller, fleet::view::ModelGroups, service::Service};

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
    /// The context window of its groups, like `device`: unknown if it has no group.
    #[serde(skip_serializing_if = "Option::is_none")]
    max_model_len: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<Device>,
    groups: usize,
    ready_groups: usize,
    // fields that Mistral's client reads
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

/// Anthropic's list, complete on one page.
#[derive(Serialize)]
struct AnthropicList {
    first_id: Option<String>,
    has_more: bool,
    last_id: Option<String>,
    data: Vec<AnthropicModel>,
}

#[derive(Serialize)]
struct AnthropicModel {
    r#type: &'static str,
    id: String,
    display_name: String,
    created_at: String,
}

impl From<ModelObject> for AnthropicModel {
    fn from(model: ModelObject) -> Self {
        let created_at = rfc3339(model.created);
        Self { r#type: "model", display_name: model.id.clone(), id: model.id, created_at }
    }
}

/// Formats seconds since 1970 as a date and time in UTC.
fn rfc3339(seconds: u64) -> String {
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    // years begin in March, so that a leap day is the last day of its year
    let day = days + 719_468;
    let (era, of_era) = (day / 146_097, day % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day_of_month = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3_600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day_of_month:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Whether a client uses Anthropic's API.
fn is_anthropics(headers: &HeaderMap) -> bool {
    headers.contains_key("anthropic-version")
}

/// Lists the models that the caller may use.
pub async fn list(
    State(service): State<Arc<Service>>,
    Extension(caller): Extension<Option<Caller>>,
    headers: HeaderMap,
) -> Response<axum::body::Body> {
    let view = service.fleet().view();
    let served = |model: &str| view.model(model).filter(|model| !model.groups.is_empty());
    // a model without groups (scaled to zero) is still listed: a request for it scales it up
    let configured = service.configured_names().map(|(name, model)| describe(&service, name, model, served(model)));
    let others = view.models().filter(|model| service.configured(&model.name).is_none());
    let mut data: Vec<ModelObject> =
        configured.chain(others.map(|model| describe(&service, &model.name, &model.name, Some(model)))).collect();
    data.retain(|model| caller.as_ref().is_none_or(|caller| caller.may_use(&model.root)));
    data.sort_by(|one, other| one.id.cmp(&other.id));
    if is_anthropics(&headers) {
        let id = |model: Option<&ModelObject>| model.map(|model| model.id.clone());
        let (first_id, last_id) = (id(data.first()), id(data.last()));
        let data = data.into_iter().map(AnthropicModel::from).collect();
        return json(&AnthropicList { first_id, has_more: false, last_id, data });
    }
    json(&List { object: "list", data })
}

/// Describes one model; its ID may contain slashes.
pub async fn one(
    State(service): State<Arc<Service>>,
    Extension(caller): Extension<Option<Caller>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Response<axum::body::Body> {
    let view = service.fleet().view();
    let configured = service.configured(&id);
    let served = view.model(configured.unwrap_or(&id)).filter(|model| !model.groups.is_empty());
    let name = served.map(|served| served.name.as_str()).or(configured);
    if name.is_some_and(|name| caller.as_ref().is_some_and(|caller| !caller.may_use(name))) {
        return ApiError::model_not_found(&id).into_response();
    }
    let model = match (served, configured) {
        (Some(served), _) => describe(&service, &id, &served.name, Some(served)),
        (None, Some(configured)) => describe(&service, &id, configured, None),
        (None, None) => return ApiError::model_not_found(&id).into_response(),
    };
    if is_anthropics(&headers) { json(&AnthropicModel::from(model)) } else { json(&model) }
}

/// Describes a model by one of its names; `served` are its groups, if any.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_dates_of_leap_and_common_years() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_796_074_538, "2026-11-30T21:35:38Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(seconds), expected);
        }
    }
}
