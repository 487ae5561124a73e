//! `POST /tokenize` and `/detokenize`, as in vLLM: encode a conversation or a text, and decode token IDs.

use std::sync::Arc;

use axum::{
    body::{Body, Bytes},
    extract::State,
    http::{Request, Response},
    response::IntoResponse as _,
};
use serde::Serialize;

use super::{
    context::RequestContext,
    declare::Operation,
    error::ApiError,
    fields::Prompt,
    params::{self, TokenizeTarget},
    prepare::{AllowedModel, Rules, chat_prompt, text_ids},
    request::Body as Fields,
    response::TokenNames,
    status::json,
    surrogates,
};
use crate::{access::policy::Policy, service::Service};

/// The response of `/tokenize`.
#[derive(Serialize)]
pub struct Tokenized {
    count: usize,
    max_model_len: u32,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

/// The response of `/detokenize`.
#[derive(Serialize)]
pub struct Detokenized {
    prompt: String,
}

/// `POST /tokenize`
pub async fn tokenize(State(service): State<Arc<Service>>, request: Request<Body>) -> Response<Body> {
    run(service, Operation::Tokenize, request, tokenize_body).await
}

/// `POST /detokenize`
pub async fn detokenize(State(service): State<Arc<Service>>, request: Request<Body>) -> Response<Body> {
    run(service, Operation::Detokenize, request, detokenize_body).await
}

/// The result of an operation, and the number of its tokens.
pub struct Metered<T> {
    /// The response.
    pub value: T,
    /// Number of tokens that were encoded, decoded or counted.
    pub tokens: usize,
}

/// Computes a response from the bytes of a body.
type Work<T> = fn(&Service, &Policy, &[u8]) -> Result<Metered<T>, ApiError>;

/// Reads a body, runs the operation in the thread pool, and returns its response.
pub async fn run<T: Serialize + Send + 'static>(
    service: Arc<Service>,
    operation: Operation,
    request: Request<Body>,
    work: Work<T>,
) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let mut context = match RequestContext::enter(&service, operation, &parts) {
        Ok(context) => context,
        Err(error) => return error.into_response(),
    };
    let outcome = async {
        let bytes = service.bodies().read(context.policy().caller(), &parts.headers, body).await?;
        let work = move |service: &Service, policy: &Policy, bytes: &Bytes| {
            work(service, policy, &surrogates::replace_halves(bytes))
        };
        context.prepare(&service, &bytes, work).await
    };
    let response = match outcome.await {
        Ok(Metered { value, tokens }) => {
            context.encoded(tokens as u64);
            json(&value)
        }
        Err(error) => ApiError::into_response(error),
    };
    context.open.responded(response.status().as_u16());
    response
}

/// Encodes a conversation or a text.
pub fn tokenize_body(service: &Service, policy: &Policy, bytes: &[u8]) -> Result<Metered<Tokenized>, ApiError> {
    let body = Fields::parse(bytes, Operation::Tokenize)?;
    params::refuse_unserved(&body)?;
    let model = AllowedModel::resolve(service, policy, body.model.as_deref())?;
    let spec = &model.spec;
    let with_strings = body.return_token_strs.unwrap_or(false);
    let tokens = match params::tokenize_target(&body)? {
        TokenizeTarget::Messages => {
            let rules = Rules::of(service, policy, Operation::Tokenize);
            // images have token IDs, whether or not the model's groups support images
            let prompt = chat_prompt(service, &model, &body, true, rules)?;
            let mut ids: Vec<u32> = prompt.ids.iter().collect();
            if body.add_special_tokens == Some(true)
                && let Some(bos) = spec.tokenizer.as_ref().and_then(|tokenizer| tokenizer.bos_id())
                && ids.first() != Some(&bos)
            {
                ids.insert(0, bos);
            }
            ids
        }
        TokenizeTarget::Prompt => {
            let special = body.add_special_tokens.unwrap_or(true);
            let Some(Prompt::Text(text)) = body.prompt else {
                return Err(ApiError::invalid("prompt", "`prompt` must be a string here."));
            };
            match &spec.tokenizer {
                // an empty text has an empty list of token IDs
                Some(_) if text.is_empty() && !special => Vec::new(),
                _ => text_ids(&text, &model, special)?,
            }
        }
    };
    let names = TokenNames { tokenizer: spec.tokenizer.as_deref(), as_ids: false };
    let tokenized = Tokenized {
        count: tokens.len(),
        max_model_len: model.groups.max_model_len,
        token_strs: with_strings.then(|| tokens.iter().map(|id| names.name(*id).into_owned()).collect()),
        tokens,
    };
    Ok(Metered { tokens: tokenized.count, value: tokenized })
}

/// Decodes token IDs.
pub fn detokenize_body(service: &Service, policy: &Policy, bytes: &[u8]) -> Result<Metered<Detokenized>, ApiError> {
    let body = Fields::parse(bytes, Operation::Detokenize)?;
    let model = AllowedModel::resolve(service, policy, body.model.as_deref())?;
    let spec = &model.spec;
    let tokens = body.tokens.ok_or_else(|| ApiError::invalid("tokens", "`tokens` is required."))?;
    let Some(tokenizer) = &spec.tokenizer else {
        return Err(ApiError::invalid("model", "This model is served without a tokenizer."));
    };
    params::check_ids("tokens", &tokens, model.groups.vocabulary_size)?;
    let value = Detokenized { prompt: tokenizer.decode(&tokens, false) };
    Ok(Metered { value, tokens: tokens.len() })
}
