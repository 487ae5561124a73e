//! Which processes may work together: those of one contract, of releases at most one minor version apart.
//!
//! The contract is the meaning of what processes say to each other. It changes seldom, and a peer of another contract
//! is refused by name. Releases of one contract that are one minor version apart work together both ways (tested), so
//! that routers and workers can be replaced one after the other.

/// Contract that this build speaks. Contract 1 is that of release 0.1, which knew no contracts.
pub const CONTRACT: u32 = 2;

/// gRPC metadata in which a router says its release.
pub const METADATA: &str = "bora-version";

/// The other side can't be worked with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Skew {
    /// It speaks another contract.
    #[error(
        "peer speaks contract {peer}{}, this process speaks contract {CONTRACT}: upgrade routers and workers together",
        release(*peer)
    )]
    Contract {
        /// Its contract.
        peer: u32,
    },
    /// It is too old or too new.
    #[error(
        "version {peer} can't work with version {own}: releases that differ by more than one minor version are not made for each other ({advice})"
    )]
    Release {
        /// The version of this process.
        own: String,
        /// The version of the other one.
        peer: String,
        /// Which side to upgrade.
        advice: &'static str,
    },
}

/// Which release a contract is of, for people.
fn release(contract: u32) -> &'static str {
    if contract <= 1 { " (bora 0.1)" } else { "" }
}

/// Whether a peer of this contract may be worked with. 0 is a peer that names none: contract 1.
pub fn check_contract(peer: u32) -> Result<(), Skew> {
    if peer == CONTRACT { Ok(()) } else { Err(Skew::Contract { peer: peer.max(1) }) }
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
    Err(Skew::Release { own: own.to_owned(), peer: peer.to_owned(), advice })
}

fn parse(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split(['.', '-', '+']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_another_contract_by_name() {
        assert_eq!(check_contract(CONTRACT), Ok(()));
        for first in [0, 1] {
            let refused = check_contract(first).unwrap_err().to_string();
            assert!(
                refused.starts_with("peer speaks contract 1 (bora 0.1), this process speaks contract 2"),
                "{refused}"
            );
        }
        let refused = check_contract(CONTRACT + 1).unwrap_err().to_string();
        assert!(refused.starts_with("peer speaks contract 3, this process"), "{refused}");
    }

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
