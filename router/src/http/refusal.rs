//! Responses to heads that reached no route. Their path is unknown, so the body has the form of OpenAI's errors and of
//! Anthropic's errors in one object.

use axum::http::StatusCode;
use serde_json::json;

use crate::{api::error::ApiError, request_id::RequestId};

/// A complete response in bytes, after which the connection closes.
pub(super) fn response(status: StatusCode, id: &RequestId) -> Vec<u8> {
    let error = ApiError::unreadable_head(status);
    let id = id.own();
    let body = json!({
        "type": "error",
        "error": {"message": error.message, "type": error.kind, "param": null, "code": error.code},
        "request_id": id,
    })
    .to_string();
    let reason = status.canonical_reason().unwrap_or_default();
    let head = format!(
        "HTTP/1.1 {} {reason}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\
         x-request-id: {id}\r\nx-bora-request-id: {id}\r\n\r\n",
        status.as_u16(),
        body.len(),
    );
    (head + &body).into_bytes()
}

/// The status of the response without a body that hyper writes for a head that it cannot parse.
pub(super) fn of_hyper(bytes: &[u8]) -> Option<StatusCode> {
    if bytes.len() > 256 || !bytes.starts_with(b"HTTP/1.1 4") {
        return None;
    }
    let text = std::str::from_utf8(bytes).ok()?;
    // every response of a route has a request ID
    let is_bare = text.contains("\r\ncontent-length: 0\r\n") && !text.contains("\r\nx-request-id: ");
    (is_bare && text.ends_with("\r\n\r\n")).then(|| text.get(9..12)?.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recognizes_only_bare_responses_of_hyper() {
        let bare = "HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\
                    date: Mon, 30 Nov 2026 23:00:00 GMT\r\n\r\n";
        assert_eq!(of_hyper(bare.as_bytes()), Some(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE));
        for other in [
            "HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\n{}",
            "HTTP/1.1 404 Not Found\r\nx-request-id: a\r\ncontent-length: 0\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
            "",
        ] {
            assert_eq!(of_hyper(other.as_bytes()), None, "{other}");
        }
    }
}
