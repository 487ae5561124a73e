//! What a process of the cluster may call, by its certificate.
//!
//! A certificate bears its role as a DNS name, `ROLE.CLUSTER.bora.internal`: every authority can issue one, and a
//! caller checks a worker's certificate for `worker.CLUSTER.bora.internal` as TLS checks any name. A certificate may bear several
//! roles. Names of other clusters give none, and neither does a wildcard.

use std::net::SocketAddr;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;

/// What a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Sends requests to groups and watches them.
    Router,
    /// Serves a group (rank 0), or holds other ranks of it.
    Worker,
    /// Holds other ranks of a group, and never serves one.
    Follower,
    /// Drains, resumes and flushes groups.
    Operator,
}

impl Role {
    /// All of them.
    pub const ALL: [Role; 4] = [Role::Router, Role::Worker, Role::Follower, Role::Operator];

    /// As a certificate bears it.
    pub fn name(self) -> &'static str {
        match self {
            Role::Router => "router",
            Role::Worker => "worker",
            Role::Follower => "follower",
            Role::Operator => "operator",
        }
    }

    /// The DNS name that gives it in a cluster.
    pub fn dns_name(self, cluster: &str) -> String {
        format!("{}.{cluster}.bora.internal", self.name())
    }

    const fn bit(self) -> u8 {
        match self {
            Role::Router => 1,
            Role::Worker => 2,
            Role::Follower => 4,
            Role::Operator => 8,
        }
    }
}

/// A set of roles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Roles(u8);

impl Roles {
    /// None at all.
    pub const NONE: Roles = Roles(0);

    /// These.
    pub const fn of(roles: &[Role]) -> Self {
        let (mut bits, mut next) = (0, 0);
        while next < roles.len() {
            bits |= roles[next].bit();
            next += 1;
        }
        Self(bits)
    }

    /// Whether both have one in common.
    pub fn intersects(self, other: Roles) -> bool {
        self.0 & other.0 != 0
    }

    /// Their names.
    pub fn names(self) -> String {
        let names = Role::ALL.iter().filter(|role| self.0 & role.bit() != 0).map(|role| role.name());
        names.collect::<Vec<_>>().join(", ")
    }
}

/// Whether a cluster's name can stand in the DNS names of roles: labels of lower-case letters, digits and hyphens.
pub fn is_dns_name(cluster: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    cluster.len() <= 200 && cluster.split('.').all(is_label)
}

/// Who is at the other end of a connection.
#[derive(Clone, Debug, Default)]
pub struct Peer {
    /// Where it is.
    pub address: Option<SocketAddr>,
    /// Its certificate; none without TLS.
    pub certificate: Option<PeerCertificate>,
}

/// What is known of a peer from a certificate that was checked.
#[derive(Clone, Debug)]
pub struct PeerCertificate {
    /// What it may call.
    pub roles: Roles,
    /// All its DNS names, for logs.
    pub names: Arc<str>,
}

impl PeerCertificate {
    /// Reads a certificate whose chain was checked. One that can't be read gives no role.
    pub fn read(certificate: &CertificateDer<'_>, cluster: &str) -> Self {
        let Ok(parsed) = webpki::EndEntityCert::try_from(certificate) else {
            return Self { roles: Roles::NONE, names: "".into() };
        };
        let names: Vec<&str> = parsed.valid_dns_names().collect();
        let borne = Role::ALL.into_iter().filter(|role| {
            let wanted = role.dns_name(cluster);
            names.iter().any(|name| name.eq_ignore_ascii_case(&wanted))
        });
        let roles = Roles::of(&borne.collect::<Vec<_>>());
        Self { roles, names: names.join(",").into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_that_is_no_dns_name_is_told_apart() {
        for good in ["bora", "team-a", "a.b", "1"] {
            assert!(is_dns_name(good), "{good}");
        }
        for wrong in ["", "Team", "a_b", "a/b", "-a", "a-", "a..b", ".a", "ä", "*", &"a".repeat(64)] {
            assert!(!is_dns_name(wrong), "{wrong}");
        }
    }

    #[test]
    fn roles_are_a_set() {
        let both = Roles::of(&[Role::Router, Role::Operator]);
        assert!(both.intersects(Roles::of(&[Role::Operator])) && !both.intersects(Roles::of(&[Role::Worker])));
        assert_eq!(both.names(), "router, operator");
        assert!(!Roles::NONE.intersects(both));
    }
}
