//! The console: a page that shows the fleet and talks to a model, embedded in the binary. It asks this router for
//! everything and nobody else for anything: no build step, no outside resource, and a policy that forbids both.
//! The page itself needs no key; what it asks for does, and it asks its user for one.

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

/// The page and what it is made of.
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
    // a new release brings a new page
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}
