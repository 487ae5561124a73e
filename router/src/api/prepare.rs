//! From a body's bytes to prompts that can be placed: read, check, encode, hash. Runs where the body's size
//! says (see `encode::pool`), so nothing here waits.

use std::sync::Arc;

use bytes::Bytes;

use super::{
    error::ApiError,
    params::{self, Client, Endpoint, Params},
    request::{Body, Prompt},
};
use crate::{
    access::{Caller, limits::TenantClass},
    encode::{self, EncodeError, EncodedPrompt, cache::Written},
    fleet::view::ModelGroups,
    models::ModelSpec,
    place::admission::Class,
    service::Service,
};

/// A request that is ready to be placed.
pub struct Prepared {
    /// The name that the client used; it comes back in the answer.
    pub model: String,
    /// The groups' name of it.
    pub served_model: String,
    /// Parameters, checked.
    pub params: Params,
    /// At least one.
    pub prompts: Vec<PreparedPrompt>,
}

/// One prompt.
pub struct PreparedPrompt {
    /// Ids, images and blocks.
    pub encoded: EncodedPrompt,
    /// Most ids that it generates.
    pub output_bound: u32,
    /// Its text, where it is to be echoed.
    pub text: Option<String>,
}

/// A model by the name that a request gives, or the only one there is.
pub fn resolve(service: &Service, name: Option<&str>) -> Result<(String, Arc<ModelGroups>, Arc<ModelSpec>), ApiError> {
    let view = service.fleet().view();
    let Some(name) = name else {
        let mut models = view.models();
        return match (models.next(), models.next()) {
            (Some(only), None) => Ok((only.name.clone(), Arc::clone(only), service.spec(&only.name))),
            _ => Err(ApiError::invalid("model", "`model` is required.")),
        };
    };
    if let Some(model) = view.model(name) {
        return Ok((name.to_string(), Arc::clone(model), service.spec(&model.name)));
    }
    let Some(configured) = service.configured(name) else {
        return Err(ApiError::model_not_found(name));
    };
    match view.model(configured) {
        Some(model) => Ok((name.to_string(), Arc::clone(model), service.spec(&model.name))),
        None => {
            service.metrics().unserved(configured);
            Err(ApiError::unavailable(format!("No group serves the model `{name}` now."), 5))
        }
    }
}

/// Reads, checks, encodes and hashes a generation request.
pub fn prepare(
    service: &Service,
    endpoint: Endpoint,
    client: Client,
    caller: Option<&Caller>,
    bytes: &Bytes,
) -> Result<Prepared, ApiError> {
    let mut body = Body::parse(bytes)?;
    if body.unknown > 0 {
        service.metrics().unknown_fields(body.unknown);
    }
    let (name, model, spec) = resolve(service, body.model.as_deref())?;
    let mut params = params::check(&body, endpoint, client, &model, &spec, service.options())?;
    if let Some(caller) = caller {
        let limits = &caller.tenant.limits;
        if limits.class == TenantClass::Batch {
            params.class = Class::Batch;
        }
        if let Some(salt) = &limits.cache_salt {
            // whatever the request adds, it stays within the tenant's own cache
            let both = xxhash_rust::xxh3::xxh3_128(format!("{salt}\0{}", params.cache_salt).as_bytes());
            params.cache_salt = format!("{both:032x}");
            body.cache_salt = Some(params.cache_salt.clone());
        }
    }
    let prompts = match endpoint {
        Endpoint::Chat => {
            let encoded = chat_prompt(service, &body, &model.name, &spec, model.images)?;
            vec![(encoded, None)]
        }
        Endpoint::Completions => completion_prompts(body, &model, &spec, &params, service)?,
    };
    let prompts = prompts
        .into_iter()
        .map(|(encoded, text)| {
            let output_bound = params::output_bound(&params, endpoint, encoded.token_ids.len(), model.max_model_len)?;
            Ok(PreparedPrompt { encoded, output_bound, text })
        })
        .collect::<Result<_, ApiError>>()?;
    Ok(Prepared { model: name, served_model: model.name.clone(), params, prompts })
}

/// The prompt of messages and tools.
pub fn chat_prompt(
    service: &Service,
    body: &Body<'_>,
    model: &str,
    spec: &ModelSpec,
    takes_images: bool,
) -> Result<EncodedPrompt, ApiError> {
    let messages = body.messages.as_ref().ok_or_else(|| ApiError::invalid("messages", "`messages` is required."))?;
    let continue_final_message = body.continue_final_message.unwrap_or(false);
    if continue_final_message && body.add_generation_prompt == Some(true) {
        return Err(ApiError::invalid(
            "continue_final_message",
            "`continue_final_message` and `add_generation_prompt` can't both be true.",
        ));
    }
    let Some(tokenizer) = &spec.tokenizer else {
        return Err(ApiError::invalid(
            "messages",
            "This model is served without a tokenizer: use /v1/completions with token ids.",
        ));
    };
    // `tool_choice` does not change the prompt: the reference declares the tools whatever it says
    let written = Written {
        model,
        messages: messages.list(),
        tools: body.tools,
        salt: body.cache_salt.as_deref().unwrap_or_default(),
        continue_final_message,
        takes_images,
    };
    if let Some(encoded) = service.conversations().encode(tokenizer, &written) {
        service.metrics().encoded(encoded.token_ids.len(), encoded.reused_tokens);
        return Ok(encoded);
    }
    let messages = messages.to_json().map_err(|error| EncodeError::Json { field: "messages", error })?;
    Ok(encode::conversation(tokenizer, &messages, &written)?)
}

fn completion_prompts(
    body: Body<'_>,
    model: &ModelGroups,
    spec: &ModelSpec,
    params: &Params,
    service: &Service,
) -> Result<Vec<(EncodedPrompt, Option<String>)>, ApiError> {
    let special = body.add_special_tokens.unwrap_or(true);
    let prompt = body.prompt.ok_or_else(|| ApiError::invalid("prompt", "`prompt` is required."))?;
    let count = match &prompt {
        Prompt::Text(_) | Prompt::Ids(_) => 1,
        Prompt::Texts(texts) => texts.len(),
        Prompt::IdLists(lists) => lists.len(),
    };
    let most = service.options().max_sequences_per_request as usize;
    if count * params.n as usize > most {
        return Err(ApiError::invalid(
            "prompt",
            format!("{count} prompts with `n` = {} are more than the limit of {most} sequences.", params.n),
        ));
    }
    match prompt {
        Prompt::Text(text) => Ok(vec![text_prompt(text, spec, special, params)?]),
        Prompt::Texts(texts) => texts.into_iter().map(|text| text_prompt(text, spec, special, params)).collect(),
        Prompt::Ids(ids) => Ok(vec![id_prompt(ids, model, spec, params)?]),
        Prompt::IdLists(lists) => lists.into_iter().map(|ids| id_prompt(ids, model, spec, params)).collect(),
    }
}

/// The ids of a plain text.
pub fn text_ids(text: &str, spec: &ModelSpec, special: bool) -> Result<Vec<u32>, ApiError> {
    let Some(tokenizer) = &spec.tokenizer else {
        return Err(ApiError::invalid("prompt", "This model is served without a tokenizer: give token ids."));
    };
    let token_ids = encode::text(tokenizer, text, special);
    if token_ids.is_empty() {
        return Err(ApiError::invalid("prompt", "`prompt` must not be empty."));
    }
    Ok(token_ids)
}

/// A prompt, and its text if it is to be echoed.
fn text_prompt(
    text: String,
    spec: &ModelSpec,
    special: bool,
    params: &Params,
) -> Result<(EncodedPrompt, Option<String>), ApiError> {
    let encoded = EncodedPrompt::new(text_ids(&text, spec, special)?, Vec::new(), &params.cache_salt);
    Ok((encoded, params.echo.then_some(text)))
}

fn id_prompt(
    token_ids: Vec<u32>,
    model: &ModelGroups,
    spec: &ModelSpec,
    params: &Params,
) -> Result<(EncodedPrompt, Option<String>), ApiError> {
    if token_ids.is_empty() {
        return Err(ApiError::invalid("prompt", "`prompt` must not be empty."));
    }
    params::check_ids("prompt", &token_ids, model.vocabulary_size)?;
    let text = match &spec.tokenizer {
        Some(tokenizer) if params.echo => Some(tokenizer.decode(&token_ids, true)),
        _ => None,
    };
    Ok((EncodedPrompt::new(token_ids, Vec::new(), &params.cache_salt), text))
}

impl From<EncodeError> for ApiError {
    fn from(error: EncodeError) -> Self {
        match error {
            EncodeError::Json { field, .. } => ApiError::invalid(field, error.to_string()),
            EncodeError::NoImages { param } => ApiError::invalid(param, "This model does not take images."),
            EncodeError::Conversation(error) => {
                let code = error.code();
                let mut answer = ApiError::invalid(error.param, error.message);
                answer.code = Some(code);
                answer
            }
        }
    }
}
