//! The identifiers of a request.

use axum::http::{HeaderMap, HeaderName, HeaderValue};

/// Header for a client's identifier of its request. Every response repeats it, or has the router's own identifier.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Header for the router's own identifier of the request, in every response.
pub const OWN_REQUEST_ID: HeaderName = HeaderName::from_static("x-bora-request-id");

/// The identifiers of a request, stored in its extensions. A client may repeat its identifier; the router's own
/// identifier is unique.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestId {
    own: String,
    client: Option<String>,
}

impl RequestId {
    /// Creates the identifiers of a request without a client's identifier.
    pub fn random() -> Self {
        Self { own: format!("{:032x}", rand::random::<u128>()), client: None }
    }

    /// Reads the identifiers from a request's headers. A client's identifier is used if it has 1 to 128 visible ASCII
    /// characters.
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

    /// The identifier by which the client finds the request: the client's own, or else the router's.
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
