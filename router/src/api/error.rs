//! Errors in the form of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`. Errors of all layers are
//! converted to responses here.

use axum::{
    body::Body,
    http::{HeaderName, HeaderValue, Response, StatusCode, header},
    response::IntoResponse,
};
use bora_common::cpu_budget::Stopped;
use serde::Serialize;

/// A request that exceeded its CPU time in the router.
impl From<Stopped> for ApiError {
    fn from(stopped: Stopped) -> Self {
        match stopped {
            Stopped::Exceeded { stage, limit } => {
                let mut error = Self::malformed(format!(
                    "The request is too expensive to process: its stage `{stage}` used up the limit of {} s of CPU time.",
                    limit.as_secs_f64()
                ));
                error.code = Some("cpu_budget_exceeded");
                error
            }
            // the client has disconnected
            Stopped::Cancelled(_) => Self::internal("The client disconnected."),
        }
    }
}

/// An error that is sent to a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status, if the headers were not sent yet.
    pub status: StatusCode,
    /// OpenAI's `type`.
    pub kind: &'static str,
    /// OpenAI's `code`.
    pub code: Option<&'static str>,
    /// The invalid field of the request.
    pub param: Option<String>,
    /// The message for people.
    pub message: String,
    /// Seconds after which a retry may succeed.
    pub retry_after: Option<u32>,
    /// Whether a retry of the same request fails again, regardless of the status.
    pub is_final: bool,
}

/// Header that tells the clients of OpenAI and Anthropic whether to retry.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

#[derive(Serialize)]
struct Envelope<'a> {
    error: Fields<'a>,
}

#[derive(Serialize)]
struct Fields<'a> {
    message: &'a str,
    r#type: &'static str,
    param: Option<&'a str>,
    code: Option<&'static str>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, code: None, param: None, message: message.into(), retry_after: None, is_final: false }
    }

    /// 400 for one field of the request.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message);
        error.param = Some(param.into());
        error
    }

    /// 400 for a body that cannot be parsed.
    pub fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// 400 for a prompt that leaves no room in the context window.
    pub fn context_length(param: &'static str, message: impl Into<String>) -> Self {
        let mut error = Self::invalid(param, message);
        error.code = Some("context_length_exceeded");
        error
    }

    /// 401 for a request without a valid key.
    pub fn unauthorized(message: &str, code: &'static str) -> Self {
        let mut error = Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message);
        error.code = Some(code);
        error
    }

    /// 403 for an operation that this key does not permit.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", message)
    }

    /// 429 for a tenant above one of its limits.
    pub fn rate_limited(message: impl Into<String>, retry_after: u32) -> Self {
        let mut error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        error.code = Some("rate_limit_exceeded");
        error.retry_after = Some(retry_after);
        error
    }

    /// 404 for an unknown model.
    pub fn model_not_found(model: &str) -> Self {
        let shown: String = model.chars().take(200).collect();
        let mut error =
            Self::new(StatusCode::NOT_FOUND, "invalid_request_error", format!("The model `{shown}` does not exist."));
        error.param = Some("model".into());
        error.code = Some("model_not_found");
        error
    }

    /// 404 for a path that has no route.
    pub fn no_route(method: &str, path: &str) -> Self {
        let shown: String = path.chars().take(200).collect();
        let mut error = Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            format!("Unknown request URL: {method} {shown}."),
        );
        error.code = Some("unknown_url");
        error
    }

    /// 405 for a path that supports other methods.
    pub fn no_method(method: &str, path: &str) -> Self {
        let mut error = Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "invalid_request_error",
            format!("Not allowed to {method} on {path}."),
        );
        error.code = Some("method_not_allowed");
        error
    }

    /// 426 for a WebSocket handshake.
    pub fn no_websocket(path: &str) -> Self {
        let message = format!("{path} does not support WebSockets: send the request with POST.");
        let mut error = Self::new(StatusCode::UPGRADE_REQUIRED, "invalid_request_error", message);
        error.code = Some("no_websocket");
        error
    }

    /// 413 for a body above the limit.
    pub fn body_too_large(limit: usize) -> Self {
        let mut error = Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "invalid_request_error",
            format!("The request body is larger than the limit of {limit} bytes."),
        );
        error.code = Some("request_too_large");
        error
    }

    /// 408 for a body that arrived too slowly.
    pub fn body_timeout(received: u64) -> Self {
        let message = format!("The request body did not arrive in time: {received} bytes were received.");
        let mut error = Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", message);
        error.code = Some("request_timeout");
        error
    }

    /// 499, only for metrics and logs: the client disconnected before its body was complete.
    pub fn client_gone() -> Self {
        let status = StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST);
        Self::new(status, "invalid_request_error", "The client disconnected before its request was complete.")
    }

    /// The error of a head that cannot be parsed: 408, 414, 431 or 400.
    pub fn unreadable_head(status: StatusCode) -> Self {
        let (code, message) = match status {
            StatusCode::REQUEST_TIMEOUT => ("request_timeout", "The request's head did not arrive in time."),
            StatusCode::URI_TOO_LONG => ("uri_too_long", "The request's URL is too long."),
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => (
                "headers_too_large",
                "The request has too many headers or too large ones: at most 100 headers and 64 KiB.",
            ),
            _ => ("malformed_request", "The request is not valid HTTP/1.1."),
        };
        let mut error = Self::new(status, "invalid_request_error", message);
        error.code = Some(code);
        error
    }

    /// 415 for an unsupported content type or encoding.
    pub fn unsupported_media_type(header: &str, value: &str, expected: &str) -> Self {
        let shown: String = value.chars().take(100).collect();
        let message = format!("`{header}` must be {expected}, got `{shown}`.");
        let mut error = Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", message);
        error.code = Some("unsupported_media_type");
        error
    }

    /// 403 for a host name that is not allowed on a server without keys.
    pub fn host_not_allowed(host: &str) -> Self {
        let shown: String = host.chars().take(200).collect();
        let mut error = Self::forbidden(format!(
            "The host `{shown}` is not served here. A server without API keys is served under loopback names and its \
             listen address; `http.allowed_hosts` adds others."
        ));
        error.code = Some("host_not_allowed");
        error
    }

    /// 403 for a request of a foreign web page to a server without keys.
    pub fn foreign_origin() -> Self {
        let mut error = Self::forbidden(
            "Requests of web pages of other origins are refused; `http.allowed_origins` allows those of an origin.",
        );
        error.code = Some("origin_not_allowed");
        error
    }

    /// 503 for a request that is aborted because the server stops.
    pub fn shutting_down() -> Self {
        Self::unavailable("The server is shutting down. Please retry.", 1)
    }

    /// 429: every group that could serve it is full.
    pub fn overloaded(message: impl Into<String>, retry_after: u32) -> Self {
        let mut error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        error.code = Some("overloaded");
        error.retry_after = Some(retry_after);
        error
    }

    /// 503: no group of the model accepts requests now, or the router itself is overloaded.
    pub fn unavailable(message: impl Into<String>, retry_after: u32) -> Self {
        let mut error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message);
        error.code = Some("unavailable");
        error.retry_after = Some(retry_after);
        error
    }

    /// 504: the request's deadline passed.
    pub fn timed_out() -> Self {
        let mut error =
            Self::new(StatusCode::GATEWAY_TIMEOUT, "server_error", "The request did not finish within its time limit.");
        error.code = Some("timeout");
        error
    }

    /// 500: an internal error.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// Whether a retry may succeed.
    fn may_be_retried(&self) -> bool {
        let may_pass = [StatusCode::REQUEST_TIMEOUT, StatusCode::CONFLICT, StatusCode::TOO_MANY_REQUESTS];
        !self.is_final && (self.status.is_server_error() || may_pass.contains(&self.status))
    }

    /// The JSON body, also sent as the event that ends a broken stream.
    pub fn to_json(&self) -> Vec<u8> {
        let envelope = Envelope {
            error: Fields { message: &self.message, r#type: self.kind, param: self.param.as_deref(), code: self.code },
        };
        serde_json::to_vec(&envelope).unwrap_or_else(|_| br#"{"error":{"message":"unprintable error"}}"#.to_vec())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::from(self.to_json()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if !self.may_be_retried() {
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        // for the audit log, and for APIs with another form of errors
        response.extensions_mut().insert(self);
        response
    }
}
