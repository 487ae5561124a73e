//! Protection of servers without keys from web pages. A browser on the same machine or network can reach such a
//! server, so any page could use it: by a name of the page's own that resolves to the server (DNS rebinding, seen by
//! the `Host`), or by a request across origins (seen by `Origin` and `Sec-Fetch-Site`). Pages that are meant to use the
//! API are allowed by `http.allowed_origins`.

use std::{net::IpAddr, sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, HeaderName, HeaderValue, Method, Response, header},
    middleware::Next,
    response::IntoResponse as _,
};
use serde::Deserialize;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::{ConnectionInfo, options::HttpOptions};
use crate::api::error::ApiError;

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
const SEC_FETCH_MODE: HeaderName = HeaderName::from_static("sec-fetch-mode");
const SEC_FETCH_DEST: HeaderName = HeaderName::from_static("sec-fetch-dest");
/// How long browsers may cache the response to a preflight.
const PREFLIGHT_AGE: Duration = Duration::from_secs(600);

/// A rule for host names: one name, all names below a domain (`*.example`), or all (`*`).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct HostPattern(String);

impl TryFrom<String> for HostPattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let name = text.strip_prefix("*.").unwrap_or(&text);
        let is_name = !name.is_empty() && !name.contains(['/', '*', '@', ' ']);
        let has_port = name.parse::<IpAddr>().is_err() && name.contains(':');
        if text != "*" && (!is_name || has_port) {
            return Err(format!("`{text}` is not a host: expected a name without a port, `*.example` or `*`"));
        }
        Ok(Self(text.to_ascii_lowercase()))
    }
}

impl HostPattern {
    fn matches(&self, host: &str) -> bool {
        match self.0.strip_prefix('*') {
            Some(suffix) => host.len() > suffix.len() && host.ends_with(suffix),
            None => self.0 == host,
        }
    }
}

/// Middleware that rejects requests which a foreign web page may have caused.
#[derive(Clone)]
pub struct BrowserGuard(Option<Arc<Allowed>>);

struct Allowed {
    hosts: Vec<HostPattern>,
    listen_hosts: Vec<String>,
    origins: Vec<String>,
}

impl BrowserGuard {
    /// Creates a guard that accepts every request, for a port that requires a key.
    pub fn off() -> Self {
        Self(None)
    }

    /// Creates the guard of a port that requires no key.
    pub fn new(options: &HttpOptions) -> Self {
        let admin_host = options.admin.as_ref().map(|admin| admin.host.to_ascii_lowercase());
        Self(Some(Arc::new(Allowed {
            hosts: options.allowed_hosts.clone(),
            listen_hosts: [options.host.to_ascii_lowercase()].into_iter().chain(admin_host).collect(),
            origins: options.allowed_origins.clone(),
        })))
    }

    /// The middleware.
    pub async fn check(self, request: Request, next: Next) -> Response<Body> {
        match self.0.as_ref().map_or(Ok(()), |allowed| allowed.check(&request)) {
            Ok(()) => next.run(request).await,
            Err(error) => error.into_response(),
        }
    }
}

impl Allowed {
    fn check(&self, request: &Request) -> Result<(), ApiError> {
        let headers = request.headers();
        let local = request.extensions().get::<ConnectionInfo>().map(|connection| connection.local.ip());
        let mut named = headers.get_all(header::HOST).iter();
        let host = match (request.uri().authority(), named.next()) {
            (Some(authority), _) => Some(authority.as_str()),
            (None, Some(value)) => Some(value.to_str().map_err(|_| ApiError::host_not_allowed("?"))?),
            (None, None) => None,
        };
        if named.next().is_some() {
            return Err(ApiError::malformed("The request has more than one `Host` header."));
        }
        if let Some(host) = host
            && !self.allows_host(host, local)
        {
            return Err(ApiError::host_not_allowed(host));
        }
        self.check_origin(request.method(), headers, host)
    }

    /// The owner of a name can make it resolve to any address; an IP address in `Host` cannot be forged this way.
    fn allows_host(&self, authority: &str, local: Option<IpAddr>) -> bool {
        let host = host_of(authority).to_ascii_lowercase();
        let host = host.strip_suffix('.').unwrap_or(&host);
        let is_known_address = |address: IpAddr| {
            let local = local.map(|local| local.to_canonical());
            address.is_loopback() || local == Some(address) || local.is_some_and(|local| !local.is_loopback())
        };
        host == "localhost"
            || host.ends_with(".localhost")
            || self.listen_hosts.iter().any(|listen| listen == host)
            || host.parse::<IpAddr>().is_ok_and(|address| is_known_address(address.to_canonical()))
            || self.hosts.iter().any(|pattern| pattern.matches(host))
    }

    fn check_origin(&self, method: &Method, headers: &HeaderMap, host: Option<&str>) -> Result<(), ApiError> {
        if let Some(origin) = headers.get(header::ORIGIN) {
            let allowed = origin.to_str().is_ok_and(|origin| self.allows_origin(origin, host));
            return if allowed { Ok(()) } else { Err(ApiError::foreign_origin()) };
        }
        let is = |name: &HeaderName, text: &str| headers.get(name).is_some_and(|value| value == text);
        // a link to the console
        let is_navigation =
            *method == Method::GET && is(&SEC_FETCH_MODE, "navigate") && is(&SEC_FETCH_DEST, "document");
        if is(&SEC_FETCH_SITE, "cross-site") && !is_navigation {
            return Err(ApiError::foreign_origin());
        }
        Ok(())
    }

    fn allows_origin(&self, origin: &str, host: Option<&str>) -> bool {
        let own = origin.split_once("://").is_some_and(|(scheme, authority)| {
            let port = match scheme {
                "http" => ":80",
                "https" => ":443",
                _ => return false,
            };
            let plain = |authority: &str| authority.strip_suffix(port).unwrap_or(authority).to_ascii_lowercase();
            host.is_some_and(|host| plain(host) == plain(authority))
        });
        own || self.origins.iter().any(|allowed| allowed == "*" || allowed == origin)
    }
}

/// The host without its port and brackets.
fn host_of(authority: &str) -> &str {
    let authority = authority.rsplit_once('@').map_or(authority, |(_, authority)| authority);
    if let Some((address, _)) = authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return address;
    }
    authority.rsplit_once(':').map_or(authority, |(host, _)| host)
}

/// The CORS layer for the allowed origins; none if no origin is allowed.
pub fn cors(options: &HttpOptions) -> Option<CorsLayer> {
    if options.allowed_origins.is_empty() {
        return None;
    }
    let origins = match options.allows_any_origin() {
        true => AllowOrigin::any(),
        false => {
            AllowOrigin::list(options.allowed_origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()))
        }
    };
    let exposed = [
        "x-request-id",
        "x-bora-request-id",
        "request-id",
        "x-bora-group",
        "x-bora-decision",
        "retry-after",
        "x-ratelimit-limit-requests",
        "x-ratelimit-remaining-requests",
        "x-ratelimit-reset-requests",
        "x-ratelimit-limit-tokens",
        "x-ratelimit-remaining-tokens",
        "x-ratelimit-reset-tokens",
    ];
    let layer = CorsLayer::new()
        .allow_origin(origins)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(exposed.map(HeaderName::from_static))
        .allow_private_network(true)
        .max_age(PREFLIGHT_AGE);
    Some(layer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(hosts: &[&str], origins: &[&str]) -> Allowed {
        let options = HttpOptions {
            allowed_hosts: hosts
                .iter()
                .map(|host| HostPattern::try_from((*host).to_owned()).expect("a host"))
                .collect(),
            allowed_origins: origins.iter().map(|origin| (*origin).to_owned()).collect(),
            host: "bora.lan".into(),
            ..HttpOptions::default()
        };
        let BrowserGuard(Some(allowed)) = BrowserGuard::new(&options) else { panic!("it is on") };
        Arc::into_inner(allowed).expect("one")
    }

    #[test]
    fn allows_listed_names_and_own_addresses() {
        let local: IpAddr = "127.0.0.1".parse().expect("an address");
        let outer: IpAddr = "10.0.0.7".parse().expect("an address");
        let rules = allowed(&["api.example", "*.bora.svc"], &[]);
        for (host, on_loopback, beyond) in [
            ("localhost:8000", true, true),
            ("LOCALHOST", true, true),
            ("localhost.", true, true),
            ("app.localhost", true, true),
            ("127.0.0.1:8000", true, true),
            ("127.1.2.3", true, true),
            ("[::1]:8000", true, true),
            ("::ffff:127.0.0.1", false, true),
            ("[::ffff:127.0.0.1]", true, true),
            ("10.0.0.7:80", false, true),
            ("192.168.0.1", false, true),
            ("0.0.0.0:8000", false, true),
            ("bora.lan", true, true),
            ("api.example:443", true, true),
            ("x.bora.svc", true, true),
            ("bora.svc", false, false),
            ("xbora.svc", false, false),
            ("evil.example", false, false),
            ("localhost.evil.example", false, false),
            ("127.0.0.1.evil.example", false, false),
            ("evil.example:127.0.0.1", false, false),
            ("localhost@evil.example", false, false),
            ("evil.example#localhost", false, false),
            ("evil.example/localhost", false, false),
            ("", false, false),
        ] {
            assert_eq!(rules.allows_host(host, Some(local)), on_loopback, "{host} on loopback");
            assert_eq!(rules.allows_host(host, Some(outer)), beyond, "{host} beyond");
        }
        assert!(allowed(&["*"], &[]).allows_host("evil.example", Some(local)));
        for wrong in ["", "a:80", "*.", "a*", "http://a", "a b"] {
            assert!(HostPattern::try_from(wrong.to_owned()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn rejects_foreign_origins_unless_allowed() {
        let rules = allowed(&[], &["https://chat.example", "app://obsidian.md"]);
        for (origin, host, expected) in [
            ("http://localhost:8000", "localhost:8000", true),
            ("http://localhost", "localhost:80", true),
            ("https://bora.example", "bora.example", true),
            ("https://bora.example", "bora.example:443", true),
            ("http://localhost:3000", "localhost:8000", false),
            ("https://evil.example", "localhost:8000", false),
            ("null", "localhost:8000", false),
            ("", "", false),
            ("https://chat.example", "localhost:8000", true),
            ("https://chat.example.evil", "localhost:8000", false),
            ("app://obsidian.md", "localhost:8000", true),
            ("chrome-extension://localhost:8000", "localhost:8000", false),
        ] {
            assert_eq!(rules.allows_origin(origin, Some(host)), expected, "{origin} at {host}");
        }
        assert!(allowed(&[], &["*"]).allows_origin("https://evil.example", Some("localhost")));
    }
}
