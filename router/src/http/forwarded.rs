//! The address of a client behind trusted proxies, from `Forwarded` (RFC 7239) or `X-Forwarded-For`.

use std::net::{IpAddr, SocketAddr};

use axum::http::{HeaderMap, HeaderName, header};
use ipnet::IpNet;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// Maximum number of hops that are read, from the nearest one on.
const MAX_HOPS: usize = 32;

/// Returns the address of the client. `peer` is the other end of the connection; the headers count only if it is in
/// `trusted`. Each hop names the one before it, so the chain is followed from its end until it leaves `trusted`.
pub fn client_address(peer: IpAddr, headers: &HeaderMap, trusted: &[IpNet]) -> IpAddr {
    let peer = peer.to_canonical();
    let mut client = peer;
    if !is_trusted(peer, trusted) {
        return peer;
    }
    let (name, read): (_, fn(&str) -> Option<IpAddr>) = if headers.contains_key(header::FORWARDED) {
        (header::FORWARDED, forwarded_for)
    } else {
        (X_FORWARDED_FOR, address)
    };
    let lines: Vec<&str> = headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).collect();
    let hops = lines.iter().rev().flat_map(|line| line.rsplit(','));
    for hop in hops.take(MAX_HOPS) {
        let Some(address) = read(hop) else { break };
        client = address;
        if !is_trusted(client, trusted) {
            break;
        }
    }
    client
}

fn is_trusted(address: IpAddr, trusted: &[IpNet]) -> bool {
    trusted.iter().any(|net| net.contains(&address))
}

/// The `for` parameter of one element of `Forwarded`.
fn forwarded_for(element: &str) -> Option<IpAddr> {
    element.split(';').find_map(|pair| {
        let (name, value) = pair.split_once('=')?;
        name.trim().eq_ignore_ascii_case("for").then(|| address(value.trim().trim_matches('"'))).flatten()
    })
}

/// `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]` or `[2001:db8::1]:80`.
fn address(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let address = bare.parse::<IpAddr>().or_else(|_| text.parse::<SocketAddr>().map(|address| address.ip()));
    address.ok().map(|address| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(peer: &str, headers: &[(HeaderName, &str)]) -> String {
        let trusted: Vec<IpNet> = ["10.0.0.0/8", "fd00::/8"].map(|net| net.parse().unwrap()).into();
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(name, value.parse().unwrap());
        }
        client_address(peer.parse().unwrap(), &map, &trusted).to_string()
    }

    #[test]
    fn follows_trusted_proxies_and_ignores_headers_of_others() {
        let forwarded = header::FORWARDED;
        for (peer, headers, expected) in [
            ("192.0.2.1", vec![(X_FORWARDED_FOR, "198.51.100.1")], "192.0.2.1"),
            ("192.0.2.1", vec![(forwarded.clone(), "for=198.51.100.1")], "192.0.2.1"),
            ("10.0.0.1", vec![], "10.0.0.1"),
            ("::ffff:10.0.0.1", vec![(X_FORWARDED_FOR, "198.51.100.1")], "198.51.100.1"),
            ("10.0.0.1", vec![(X_FORWARDED_FOR, "198.51.100.1")], "198.51.100.1"),
            // entries of the client itself precede the entry that the proxy added
            ("10.0.0.1", vec![(X_FORWARDED_FOR, "1.1.1.1, 198.51.100.1")], "198.51.100.1"),
            ("10.0.0.1", vec![(X_FORWARDED_FOR, "1.1.1.1, 198.51.100.1, 10.0.0.2")], "198.51.100.1"),
            ("10.0.0.1", vec![(X_FORWARDED_FOR, "1.1.1.1"), (X_FORWARDED_FOR, "198.51.100.1:80")], "198.51.100.1"),
            ("10.0.0.1", vec![(X_FORWARDED_FOR, "198.51.100.1, unknown")], "10.0.0.1"),
            ("10.0.0.1", vec![(X_FORWARDED_FOR, "10.0.0.3, 10.0.0.2")], "10.0.0.3"),
            ("fd00::1", vec![(forwarded.clone(), "proto=https;For=\"[2001:db8::1]:4711\"")], "2001:db8::1"),
            ("10.0.0.1", vec![(forwarded.clone(), "for=1.1.1.1, for=198.51.100.1;by=10.0.0.1")], "198.51.100.1"),
            ("10.0.0.1", vec![(forwarded, "for=_hidden"), (X_FORWARDED_FOR, "198.51.100.1")], "10.0.0.1"),
        ] {
            assert_eq!(client(peer, &headers), expected, "{peer} {headers:?}");
        }
    }
}
