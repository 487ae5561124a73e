//! The console: a page, embedded in the binary, that shows the fleet and chats with a model.
//!
//! The page sends requests only to this router. It has no build step and no external resources, and its content
//! security policy forbids external resources. The page itself needs no API key. Its requests do, and it asks the user
//! for one.

use axum::{
    Router,
    body::Body,
    http::{HeaderName, HeaderValue, Response, header},
    routing::get,
};

const POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; \
     form-action 'none'; frame-ancestors 'none'",
);

/// Routes of the page and its assets.
pub fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new()
        .route("/", get(async || file("text/html; charset=utf-8", include_str!("index.html"))))
        .route("/console.css", get(async || file("text/css; charset=utf-8", include_str!("console.css"))))
        .route("/console.js", get(async || file("text/javascript; charset=utf-8", include_str!("console.js"))))
}

fn file(kind: &'static str, text: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CONTENT_SECURITY_POLICY, POLICY);
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(HeaderName::from_static("cross-origin-opener-policy"), HeaderValue::from_static("same-origin"));
    // a new release may change the page
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}
