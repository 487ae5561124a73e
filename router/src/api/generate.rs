//! The generation endpoints: their shared path from the first byte of the body to the response.

use std::{sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    extract::State,
    http::{HeaderName, HeaderValue, Request, Response, header},
    response::IntoResponse as _,
};
use bora_common::telemetry::Span;

use super::{
    chat::{self, ChatWriter},
    completion::Completion,
    completions::{self, CompletionWriter},
    context::RequestContext,
    error::ApiError,
    messages::{self, stream::MessagesWriter},
    params::Endpoint,
    prepare::{Form, Prepared, prepare},
    responses::{self, stream::ResponsesWriter},
    sse, trace,
};
use crate::{
    access::{policy::Policy, quota::QuotaRequest},
    encode::pool::PoolError,
    service::Service,
};

/// Header with the names of the groups that serve the request.
pub const GROUP_HEADER: HeaderName = HeaderName::from_static("x-bora-group");
/// Header with the reasons of the placement, in debug mode.
pub const DECISION_HEADER: HeaderName = HeaderName::from_static("x-bora-decision");

/// How long the headers of a stream wait for a group to accept the request, so that a refusal can still set the status.
const ACCEPT_TIMEOUT: Duration = Duration::from_millis(500);

/// `POST /v1/chat/completions`
pub async fn chat(State(service): State<Arc<Service>>, request: Request<Body>) -> Response<Body> {
    respond(service, Endpoint::Chat, request).await
}

/// `POST /v1/completions`
pub async fn completions(State(service): State<Arc<Service>>, request: Request<Body>) -> Response<Body> {
    respond(service, Endpoint::Completions, request).await
}

/// `POST /v1/responses`
pub async fn responses(State(service): State<Arc<Service>>, request: Request<Body>) -> Response<Body> {
    respond(service, Endpoint::Responses, request).await
}

/// `POST /v1/messages`
pub async fn messages(State(service): State<Arc<Service>>, request: Request<Body>) -> Response<Body> {
    respond(service, Endpoint::Messages, request).await
}

async fn respond(service: Arc<Service>, endpoint: Endpoint, request: Request<Body>) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let mut context = match RequestContext::enter(&service, endpoint.into(), &parts) {
        Ok(context) => context,
        Err(error) => return error.into_response(),
    };
    let body = match service.bodies().read(context.policy().caller(), &parts.headers, body).await {
        Ok(body) => body,
        Err(error) => {
            context.refused(&error);
            return error.into_response();
        }
    };
    context.audit.body(&body);
    let encoding = Span::below(context.trace.as_ref(), "encode");
    let length = body.len();
    let client = context.client;
    let work =
        move |service: &Service, policy: &Policy, bytes: &Bytes| prepare(service, policy, endpoint, client, bytes);
    let prepared = context.prepare(&service, &body, work).await;
    drop(body);
    let operation = if endpoint == Endpoint::Completions { "text_completion" } else { "chat" };
    trace::prepared(&prepared, operation, length, encoding, &mut context);
    let outcome = match prepared.and_then(|prepared| admit(prepared, &mut context)) {
        Ok(prepared) => completion(service, endpoint, prepared, context).await,
        Err(error) => {
            context.refused(&error);
            Err(error)
        }
    };
    outcome.unwrap_or_else(ApiError::into_response)
}

/// Checks the tenant's limits when the request's tokens are counted.
fn admit(prepared: Prepared, context: &mut RequestContext) -> Result<Prepared, ApiError> {
    let choices = u64::from(prepared.params.n);
    let lengths = prepared.prompts.iter().map(|prompt| prompt.encoded.ids.len() as u64);
    let bounds = prepared.prompts.iter().map(|prompt| u64::from(prompt.output_bound));
    let wish = QuotaRequest {
        prompt_tokens: lengths.clone().sum(),
        longest_prompt: lengths.max().unwrap_or(0),
        prompt_logprobs: prepared.params.logprobs.is_some_and(|logprobs| logprobs.prompt_top.is_some()),
        sequences: prepared.prompts.len() as u64 * choices,
        max_tokens: bounds.sum::<u64>() * choices,
        names_max_tokens: prepared.params.max_tokens.is_some(),
    };
    context.admit(&prepared.served_model, wish)?;
    Ok(prepared)
}

/// Places the request and writes its response, plain or streamed.
async fn completion(
    service: Arc<Service>,
    endpoint: Endpoint,
    mut prepared: Prepared,
    context: RequestContext,
) -> Result<Response<Body>, ApiError> {
    let stream = prepared.params.stream;
    let form = std::mem::take(&mut prepared.form);
    let mut completion = Completion::start(service, prepared, context, endpoint.id_prefix())?;
    let accepted = tokio::time::timeout(ACCEPT_TIMEOUT, std::future::poll_fn(|cx| completion.poll_accepted(cx)));
    if let Ok(Err(error)) = accepted.await {
        return Err(completion.refused(error));
    }
    let explanation = completion.explanation();
    let mut response = if stream {
        let groups = completion.served_by();
        let mut response = match form {
            Form::Chat => sse::respond(completion, ChatWriter::default()),
            Form::Completions => sse::respond(completion, CompletionWriter::default()),
            Form::Responses(echo) => sse::respond(completion, ResponsesWriter::new(echo)),
            Form::Messages => sse::respond(completion, MessagesWriter::new()),
        };
        name_groups(&mut response, &groups);
        response
    } else {
        let json = match &form {
            Form::Responses(echo) => {
                let collected = responses::output::collect(&mut completion, echo).await;
                collected.map(|items| responses::output::object(&completion, echo, &items))
            }
            other => completion.finish().await.map(|()| match other {
                Form::Completions => completions::object(&mut completion),
                Form::Messages => messages::output::object(&completion),
                Form::Chat | Form::Responses(_) => chat::object(&completion),
            }),
        };
        let json = match json {
            Ok(json) => json,
            Err(error) => return Err(completion.refused(error)),
        };
        let json = json.map_err(|error| ApiError::internal(error.to_string()))?;
        completion.context().open.responded(200);
        let mut response = Response::new(Body::from(json));
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        name_groups(&mut response, &completion.served_by());
        response
    };
    if let Some(explanation) = explanation.and_then(|text| HeaderValue::from_str(&text).ok()) {
        response.headers_mut().insert(DECISION_HEADER, explanation);
    }
    Ok(response)
}

fn name_groups(response: &mut Response<Body>, groups: &str) {
    if let Ok(value) = HeaderValue::from_str(groups) {
        response.headers_mut().insert(GROUP_HEADER, value);
    }
}

impl From<PoolError> for ApiError {
    fn from(error: PoolError) -> Self {
        match error {
            PoolError::Full | PoolError::Displaced => {
                ApiError::unavailable("Too many requests wait to be encoded. Please retry.", 1)
            }
            PoolError::Broken => ApiError::internal("The request could not be encoded."),
        }
    }
}
