//! The spans of a request and of its encoding, with OpenTelemetry's attributes for generative AI. A request that is not
//! traced, like most requests, costs one header look-up.

use axum::http::{HeaderMap, Uri};
use bora_common::telemetry::{Span, TraceContext, trace};

use super::{context::RequestContext, error::ApiError, prepare::Prepared};
use crate::{metrics::OpenRequest, request_id::RequestId};

/// Starts the span of a request that is traced. Returns the trace context of the request's work.
pub(super) fn arrive(headers: &HeaderMap, uri: &Uri, id: &RequestId, open: &mut OpenRequest) -> Option<TraceContext> {
    let traceparent = headers.get("traceparent").and_then(|value| value.to_str().ok());
    let trace::Arrival { context, mut span } = trace::arrive(traceparent, "request");
    if let Some(span) = &mut span {
        span.set("http.request.method", "POST");
        span.set("url.path", uri.path().to_owned());
        span.set("bora.request_id", id.own().to_owned());
        if let Some(client) = id.client() {
            span.set("bora.client_request_id", client.to_owned());
        }
    }
    open.span = span;
    context
}

/// Ends the span of the encoding, after success or a refusal.
pub(super) fn prepared(
    prepared: &Result<Prepared, ApiError>,
    operation: &'static str,
    bytes: usize,
    encoding: Option<Span>,
    context: &mut RequestContext,
) {
    let (Some(span), Some(mut encoding)) = (&mut context.open.span, encoding) else { return };
    encoding.set("http.request.body.size", bytes as i64);
    match prepared {
        Err(error) => {
            encoding.fail(error.message.clone());
            span.rename(operation.to_owned());
            span.set("gen_ai.operation.name", operation);
        }
        Ok(prepared) => {
            let tokens: usize = prepared.prompts.iter().map(|prompt| prompt.encoded.ids.len()).sum();
            encoding.set("bora.prompt_tokens", tokens as i64);
            let params = &prepared.params;
            span.rename(format!("{operation} {}", prepared.model));
            span.set("gen_ai.operation.name", operation);
            span.set("gen_ai.provider.name", "bora");
            span.set("gen_ai.request.model", prepared.model.clone());
            span.set("gen_ai.response.model", prepared.served_model.clone());
            span.set("gen_ai.request.choice.count", i64::from(params.n));
            span.set("gen_ai.request.stream", params.stream);
            if let Some(max_tokens) = params.max_tokens {
                span.set("gen_ai.request.max_tokens", i64::from(max_tokens));
            }
            if let Some(temperature) = params.sampling.temperature {
                span.set("gen_ai.request.temperature", f64::from(temperature));
            }
            if let Some(top_p) = params.sampling.top_p {
                span.set("gen_ai.request.top_p", f64::from(top_p));
            }
            span.set("bora.priority", params.class.name());
        }
    }
    encoding.end();
}
