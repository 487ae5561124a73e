//! `POST /v1/messages/count_tokens`: how long a prompt would be.

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

/// The answer.
#[derive(Serialize, JsonSchema)]
pub struct TokenCount {
    /// Ids of the whole prompt: system, tools, messages.
    pub input_tokens: usize,
}

/// `POST /v1/messages/count_tokens`
pub async fn count_tokens(State(service): State<Arc<Service>>, request: Request<Body>) -> Response<Body> {
    tokenize::run(service, "count_tokens", request, count).await
}

fn count(service: &Service, caller: Option<&Caller>, bytes: &[u8]) -> Result<TokenCount, ApiError> {
    let (conversion, fields) = read(bytes, Operation::CountTokens, service.options())?;
    if fields.unknown > 0 {
        service.metrics().unknown_fields(fields.unknown);
    }
    let (_, model, spec) = resolve(service, fields.model.as_deref())?;
    let rules = Rules::of(service, caller, Operation::CountTokens);
    let prompt = chat_prompt(service, caller, &conversion.body(fields), &model.name, &spec, true, rules)
        .map_err(|error| conversion.in_words_of_client(error))?;
    Ok(TokenCount { input_tokens: prompt.ids.len() })
}
