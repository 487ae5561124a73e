//! `POST /v1/responses/input_tokens`: counts the tokens of a prompt.

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
    access::policy::Policy,
    api::{
        declare::Operation,
        error::ApiError,
        prepare::{AllowedModel, Rules, chat_prompt},
        tokenize::{self, Metered},
    },
    service::Service,
};

/// The number of tokens of a prompt.
#[derive(Serialize, JsonSchema)]
pub struct InputTokens {
    /// `response.input_tokens`
    object: &'static str,
    /// Tokens of the whole prompt: instructions, tools, input.
    input_tokens: usize,
}

/// `POST /v1/responses/input_tokens`
pub async fn input_tokens(State(service): State<Arc<Service>>, request: Request<Body>) -> Response<Body> {
    tokenize::run(service, Operation::InputTokens, request, count).await
}

fn count(service: &Service, policy: &Policy, bytes: &[u8]) -> Result<Metered<InputTokens>, ApiError> {
    let (conversion, fields, _) = read(bytes, service.options())?;
    if fields.unknown > 0 {
        service.metrics().unknown_fields(fields.unknown);
    }
    let model = AllowedModel::resolve(service, policy, fields.model.as_deref())?;
    let rules = Rules::of(service, policy, Operation::Responses);
    let prompt = chat_prompt(service, &model, &conversion.body(fields), true, rules)
        .map_err(|error| conversion.in_words_of_client(error))?;
    let tokens = prompt.ids.len();
    Ok(Metered { value: InputTokens { object: "response.input_tokens", input_tokens: tokens }, tokens })
}
