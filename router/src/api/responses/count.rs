//! `POST /v1/responses/input_tokens`: how long a prompt would be.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::State,
    http::{Request, Response},
};
use schemars::JsonSchema;
use serde::Serialize;

use super::request::read;
use crate::{
    access::Caller,
    api::{
        declare::Operation,
        error::ApiError,
        prepare::{Rules, chat_prompt, resolve},
        tokenize,
    },
    service::Service,
};

/// The number of tokens of a prompt.
#[derive(Serialize, JsonSchema)]
pub struct InputTokens {
    /// `response.input_tokens`
    object: &'static str,
    /// Of the whole prompt: instructions, tools, input.
    input_tokens: usize,
}

/// `POST /v1/responses/input_tokens`
pub async fn input_tokens(State(service): State<Arc<Service>>, request: Request<Body>) -> Response<Body> {
    tokenize::run(service, "input_tokens", request, count).await
}

fn count(service: &Service, caller: Option<&Caller>, bytes: &[u8]) -> Result<InputTokens, ApiError> {
    let (conversion, fields, _) = read(bytes, service.options())?;
    if fields.unknown > 0 {
        service.metrics().unknown_fields(fields.unknown);
    }
    let (_, model, spec) = resolve(service, fields.model.as_deref())?;
    let rules = Rules::of(service, caller, Operation::Responses);
    let prompt = chat_prompt(service, caller, &conversion.body(fields), &model.name, &spec, true, rules)
        .map_err(|error| conversion.in_words_of_client(error))?;
    Ok(InputTokens { object: "response.input_tokens", input_tokens: prompt.ids.len() })
}
