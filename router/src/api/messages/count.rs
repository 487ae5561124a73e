//! `POST /v1/messages/count_tokens`: counts the tokens of a prompt.

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

/// The response.
#[derive(Serialize, JsonSchema)]
pub struct TokenCount {
    /// Tokens of the whole prompt: system, tools, messages.
    pub input_tokens: usize,
}

/// `POST /v1/messages/count_tokens`
pub async fn count_tokens(State(service): State<Arc<Service>>, request: Request<Body>) -> Response<Body> {
    tokenize::run(service, Operation::CountTokens, request, count).await
}

/// Counts the tokens of a request's prompt.
pub fn count(service: &Service, policy: &Policy, bytes: &[u8]) -> Result<Metered<TokenCount>, ApiError> {
    let (conversion, fields) = read(bytes, Operation::CountTokens, service.options())?;
    if fields.unknown > 0 {
        service.metrics().unknown_fields(fields.unknown);
    }
    let model = AllowedModel::resolve(service, policy, fields.model.as_deref())?;
    let rules = Rules::of(service, policy, Operation::CountTokens);
    let prompt = chat_prompt(service, &model, &conversion.body(fields), true, rules)
        .map_err(|error| conversion.in_words_of_client(error))?;
    let tokens = prompt.ids.len();
    Ok(Metered { value: TokenCount { input_tokens: tokens }, tokens })
}
