//! Which releases may work together: router and workers are replaced one after the other, so for a while two
//! releases stand side by side. One minor version apart is promised (and tested) both ways; what lies further
//! apart is refused with words, before it fails in some other way.

/// gRPC metadata in which a router says its release.
pub const METADATA: &str = "bora-version";

/// The other side is too old or too new.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "version {peer} can't work with version {own}: releases that differ by more than one minor version are not made for each other ({advice})"
)]
pub struct Skew {
    own: String,
    peer: String,
    advice: &'static str,
}

/// Whether `own` may work with `peer`. A release that does not say what it is (a tool, a build from nowhere) is
/// taken at its word that it speaks the contract.
pub fn check(own: &str, peer: &str) -> Result<(), Skew> {
    let (Some((own_major, own_minor)), Some((major, minor))) = (parse(own), parse(peer)) else { return Ok(()) };
    if own_major == major && own_minor.abs_diff(minor) <= 1 {
        return Ok(());
    }
    let peer_is_older = (major, minor) < (own_major, own_minor);
    let advice = if peer_is_older { "upgrade the other side first" } else { "upgrade this side first" };
    Err(Skew { own: own.to_owned(), peer: peer.to_owned(), advice })
}

fn parse(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split(['.', '-', '+']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_minor_apart_both_ways_and_no_more() {
        for (own, peer) in [("0.1.0", "0.1.9"), ("0.1.0", "0.2.0"), ("0.2.3", "0.1.0"), ("1.4.0", "1.5.0-rc.1")] {
            assert_eq!(check(own, peer), Ok(()), "{own} {peer}");
        }
        for unknown in ["", "test", "7"] {
            assert_eq!(check("0.1.0", unknown), Ok(()), "{unknown}");
        }
        let too_new = check("0.1.0", "0.3.0").unwrap_err().to_string();
        assert!(
            too_new.contains("0.3.0") && too_new.contains("0.1.0") && too_new.contains("upgrade this side"),
            "{too_new}"
        );
        let too_old = check("1.0.0", "0.9.0").unwrap_err().to_string();
        assert!(too_old.contains("upgrade the other side"), "{too_old}");
        assert!(check("0.3.0", "0.1.5").is_err() && check("0.9.0", "1.0.0").is_err());
    }
}
