//! Errors as Anthropic's clients expect them: `{"type": "error", "error": {"type", "message"}, "request_id"}`.

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderName, HeaderValue, Response, StatusCode, header},
    middleware::Next,
};
use schemars::JsonSchema;
use serde::Serialize;

use crate::{api::error::ApiError, request_id::RequestId};

/// The header in which Anthropic's clients read a request's ID.
const REQUEST_ID: HeaderName = HeaderName::from_static("request-id");

/// Anthropic's form of an error.
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "MessagesError")]
pub struct Envelope<'a> {
    r#type: &'static str,
    error: Fields<'a>,
    request_id: &'a str,
}

/// Type and message of an error.
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "MessagesErrorFields")]
struct Fields<'a> {
    r#type: &'static str,
    message: &'a str,
}

fn kind(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::FORBIDDEN => "permission_error",
        StatusCode::NOT_FOUND => "not_found_error",
        StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
        StatusCode::REQUEST_TIMEOUT | StatusCode::GATEWAY_TIMEOUT => "timeout_error",
        status if status.is_server_error() => "api_error",
        _ => "invalid_request_error",
    }
}

/// The JSON body, also sent as the event that ends a broken stream. The message names the field.
pub fn error_json(error: &ApiError, request_id: &str) -> Vec<u8> {
    let named;
    let message = match &error.param {
        Some(param) if !error.message.contains(param.as_str()) => {
            named = format!("{param}: {}", error.message);
            &named
        }
        _ => &error.message,
    };
    let envelope = Envelope { r#type: "error", error: Fields { r#type: kind(error.status), message }, request_id };
    serde_json::to_vec(&envelope).unwrap_or_else(|_| br#"{"type":"error"}"#.to_vec())
}

/// Converts every error response below `/v1/messages` to Anthropic's form, whichever layer refused the request.
pub async fn in_anthropics_form(request: Request, next: Next) -> Response<Body> {
    if !is_below(request.uri().path()) {
        return next.run(request).await;
    }
    let id = request.extensions().get::<RequestId>().map(|id| id.shown().to_owned()).unwrap_or_default();
    let mut response = next.run(request).await;
    if let Some(error) = response.extensions().get::<ApiError>().cloned() {
        *response.body_mut() = Body::from(error_json(&error, &id));
        response.headers_mut().remove(header::CONTENT_LENGTH);
    }
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

fn is_below(path: &str) -> bool {
    path.strip_prefix("/v1/messages").is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_field_in_the_message() {
        let error = ApiError::invalid("messages[1].role", "it can not be");
        let json: serde_json::Value = serde_json::from_slice(&error_json(&error, "r")).unwrap();
        let expected = serde_json::json!({"type": "error", "request_id": "r",
            "error": {"type": "invalid_request_error", "message": "messages[1].role: it can not be"}});
        assert_eq!(json, expected);
        let error = ApiError::invalid("top_p", "`top_p` is wrong");
        let json: serde_json::Value = serde_json::from_slice(&error_json(&error, "r")).unwrap();
        assert_eq!(json["error"]["message"], "`top_p` is wrong");
        assert!(is_below("/v1/messages/count_tokens") && !is_below("/v1/messagesx"));
    }
}
