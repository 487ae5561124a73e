//! `POST /tokenize` and `/detokenize`, as in vLLM: the ids of a conversation or a text, and back.

use std::sync::Arc;

use axum::{
    body::{Body, Bytes},
    extract::State,
    http::{Request, Response},
    response::IntoResponse as _,
};
use serde::Serialize;

use super::{
    declare::Operation,
    error::ApiError,
    fields::Prompt,
    generate::read_body,
    params::{self, TokenizeTarget},
    prepare::{Rules, chat_prompt, resolve, text_ids},
    request::Body as Fields,
    response::TokenNames,
    status::json,
    surrogates,
};
use crate::{access::Caller, service::Service};

#[derive(Serialize)]
struct Tokenized {
    count: usize,
    max_model_len: u32,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

#[derive(Serialize)]
struct Detokenized {
    prompt: String,
}

/// `POST /tokenize`
pub async fn tokenize(State(service): State<Arc<Service>>, request: Request<Body>) -> Response<Body> {
    run(service, "tokenize", request, tokenize_body).await
}

/// `POST /detokenize`
pub async fn detokenize(State(service): State<Arc<Service>>, request: Request<Body>) -> Response<Body> {
    run(service, "detokenize", request, detokenize_body).await
}

/// Makes an answer of a body's bytes.
type Work<T> = fn(&Service, Option<&Caller>, &[u8]) -> Result<T, ApiError>;

/// Reads a body, does the work where it keeps nobody waiting, and answers with what comes of it.
pub async fn run<T: Serialize + Send + 'static>(
    service: Arc<Service>,
    endpoint: &'static str,
    request: Request<Body>,
    work: Work<T>,
) -> Response<Body> {
    let mut open = service.metrics().request(endpoint);
    let (parts, body) = request.into_parts();
    let caller = parts.extensions.get::<Option<Caller>>().cloned().flatten();
    let outcome = async {
        let bytes: Bytes = read_body(body, &parts.headers, service.options().max_body_bytes).await?;
        let size = bytes.len();
        let for_work = Arc::clone(&service);
        let work = move || work(&for_work, caller.as_ref(), &surrogates::replace_halves(&bytes));
        service.pool().run(size, work).await?
    };
    let response = match outcome.await {
        Ok(value) => json(&value),
        Err(error) => ApiError::into_response(error),
    };
    open.answered(response.status().as_u16());
    response
}

fn tokenize_body(service: &Service, caller: Option<&Caller>, bytes: &[u8]) -> Result<Tokenized, ApiError> {
    let body = Fields::parse(bytes, Operation::Tokenize)?;
    params::refuse_unserved(&body)?;
    let (_, model, spec) = resolve(service, body.model.as_deref())?;
    let with_strings = body.return_token_strs.unwrap_or(false);
    let tokens = match params::tokenize_target(&body)? {
        TokenizeTarget::Messages => {
            let rules = Rules::of(service, caller, Operation::Tokenize);
            // images have ids whether or not the model's groups can look at them
            let prompt = chat_prompt(service, caller, &body, &model.name, &spec, true, rules)?;
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
                // an empty text has ids, even if they are none
                Some(_) if text.is_empty() && !special => Vec::new(),
                _ => text_ids(&text, &spec, special)?,
            }
        }
    };
    let names = TokenNames { tokenizer: spec.tokenizer.as_deref(), as_ids: false };
    Ok(Tokenized {
        count: tokens.len(),
        max_model_len: model.max_model_len,
        token_strs: with_strings.then(|| tokens.iter().map(|id| names.name(*id).into_owned()).collect()),
        tokens,
    })
}

fn detokenize_body(service: &Service, _: Option<&Caller>, bytes: &[u8]) -> Result<Detokenized, ApiError> {
    let body = Fields::parse(bytes, Operation::Detokenize)?;
    let (_, model, spec) = resolve(service, body.model.as_deref())?;
    let tokens = body.tokens.ok_or_else(|| ApiError::invalid("tokens", "`tokens` is required."))?;
    let Some(tokenizer) = &spec.tokenizer else {
        return Err(ApiError::invalid("model", "This model is served without a tokenizer."));
    };
    params::check_ids("tokens", &tokens, model.vocabulary_size)?;
    Ok(Detokenized { prompt: tokenizer.decode(&tokens, false) })
}
