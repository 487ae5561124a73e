//! The identifiers of a request.

use axum::http::{HeaderMap, HeaderName, HeaderValue};

/// Carries a client's identifier of its request, and of every response the identifier that the client knows it by.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Carries the router's own identifier of the request in every response.
pub const OWN_REQUEST_ID: HeaderName = HeaderName::from_static("x-bora-request-id");

/// The identifiers of a request; in its extensions. A client may send the same identifier as often as it likes, the
/// router's own is unique.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestId {
    own: String,
    client: Option<String>,
}

impl RequestId {
    /// A request for which the client sent no identifier.
    pub fn random() -> Self {
        Self { own: format!("{:032x}", rand::random::<u128>()), client: None }
    }

    /// A request with these headers. A client's identifier is used if it has 1 to 128 visible ASCII characters.
    pub fn of(headers: &HeaderMap) -> Self {
        let fits = |text: &str| (1..=128).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
        let client = headers.get(&REQUEST_ID).and_then(|value| value.to_str().ok()).filter(|text| fits(text));
        Self { client: client.map(str::to_owned), ..Self::random() }
    }

    /// The router's own identifier.
    pub fn own(&self) -> &str {
        &self.own
    }

    /// The identifier that the client sent.
    pub fn client(&self) -> Option<&str> {
        self.client.as_deref()
    }

    /// The identifier that the client knows the request by: its own one or the router's.
    pub fn shown(&self) -> &str {
        self.client.as_deref().unwrap_or(&self.own)
    }

    /// Writes both identifiers into the headers of a response.
    pub fn write_headers(&self, headers: &mut HeaderMap) {
        for (name, id) in [(REQUEST_ID, self.shown()), (OWN_REQUEST_ID, self.own())] {
            if let Ok(id) = HeaderValue::from_str(id) {
                headers.insert(name, id);
            }
        }
    }
}
