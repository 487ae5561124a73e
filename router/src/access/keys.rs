//! The key file: tenants, their limits, and the SHA-256 of each of their keys.
//!
//! ```yaml
//! tenants:
//!   - name: acme
//!     models: [devstral-small]     # absent: all
//!     requests_per_minute: 600     # each limit: absent = none
//!     tokens_per_minute: 2000000
//!     parallel_requests: 64
//!     max_context: 131072
//!     class: batch                 # its requests are never interactive
//!     cache_salt: tools            # shares the prefix cache with tenants of the same salt; absent: a cache of its own
//!     allow_grammar: false         # no `guided_grammar`
//!     allow_regex: false           # no `guided_regex`
//!     conversation: strict         # faulty conversations are refused; absent: router.conversation
//!     keys:
//!       - name: ci
//!         sha256: 2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683  # printf %s KEY | sha256sum
//! ```

use std::{
    collections::HashSet,
    fmt,
    hash::{Hash, Hasher},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Deserializer};
use subtle::ConstantTimeEq as _;

use super::limits::TenantLimits;

/// The SHA-256 of a key.
///
/// Digests are compared in constant time, also by the maps that use them as keys. Such a map finds its bucket by a
/// SipHash of the digest under a secret that each process draws at random, so the time of a look-up reveals nothing
/// about stored digests. A leaked digest is of no use either: a client must send the key itself.
#[derive(Clone, Copy)]
pub struct Digest([u8; 32]);

impl PartialEq for Digest {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for Digest {}

impl Hash for Digest {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl Digest {
    /// Hashes the bytes of a key.
    pub fn of(key: &[u8]) -> Self {
        let digest = ring::digest::digest(&ring::digest::SHA256, key);
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest.as_ref());
        Self(bytes)
    }

    /// The first hexadecimal digits, as the name of a key without a name.
    pub fn short(&self) -> String {
        self.0[..4].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn parse(text: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        if text.len() != 64 || !text.is_ascii() {
            return None;
        }
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
        }
        Some(Self(bytes))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}...", self.short())
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(text.trim()).ok_or_else(|| serde::de::Error::custom("sha256: expected 64 hexadecimal digits"))
    }
}

/// The key file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyFile {
    /// All tenants; their names are unique.
    pub tenants: Vec<TenantEntry>,
}

/// One tenant.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantEntry {
    /// The tenant's name in logs and metrics.
    pub name: String,
    /// The tenant's limits.
    #[serde(flatten)]
    pub limits: TenantLimits,
    /// Its keys.
    #[serde(default)]
    pub keys: Vec<KeyEntry>,
}

/// One key.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyEntry {
    /// The key's name in the audit log.
    pub name: Option<String>,
    /// The SHA-256 of the key.
    pub sha256: Digest,
}

/// Why the key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// The file cannot be read.
    #[error("router.access.keys: cannot read {path}: {error}")]
    Read {
        /// The path of the file.
        path: PathBuf,
        /// The error of the operating system.
        error: std::io::Error,
    },
    /// The contents are invalid.
    #[error("router.access.keys: {path}: {reason}")]
    Invalid {
        /// The path of the file.
        path: PathBuf,
        /// What is wrong, and where.
        reason: String,
    },
}

impl KeyFile {
    /// Reads and validates a file.
    pub fn read(path: &Path) -> Result<Self, KeyFileError> {
        let text = std::fs::read_to_string(path).map_err(|error| KeyFileError::Read { path: path.into(), error })?;
        Self::parse(&text).map_err(|reason| KeyFileError::Invalid { path: path.into(), reason })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let file: Self = serde_yaml::from_str(text).map_err(|error| error.to_string())?;
        let (mut names, mut keys) = (HashSet::new(), HashSet::new());
        for tenant in &file.tenants {
            if tenant.name.is_empty() || !names.insert(&tenant.name) {
                return Err(format!("tenant `{}`: names must be unique and not empty", tenant.name));
            }
            if let Some(field) = tenant.limits.wrong() {
                return Err(format!("tenant `{}`: {field} must be above 0", tenant.name));
            }
            for key in &tenant.keys {
                if !keys.insert(key.sha256) {
                    return Err(format!("tenant `{}`: the key {:?} occurs twice", tenant.name, key.sha256));
                }
            }
        }
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejects_invalid_key_files() {
        let key = "2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683";
        let digest = Digest::of(b"key");
        assert_eq!(digest, Digest::parse(key).unwrap());
        for at in [0, 31, 63] {
            let mut other = key.to_owned().into_bytes();
            other[at] = if other[at] == b'0' { b'1' } else { b'0' };
            assert_ne!(digest, Digest::parse(std::str::from_utf8(&other).unwrap()).unwrap(), "digit {at}");
        }
        let good = format!("tenants:\n- name: a\n  max_context: 10\n  keys: [{{sha256: {key}}}]\n");
        assert_eq!(KeyFile::parse(&good).unwrap().tenants[0].limits.max_context, Some(10));
        for (bad, word) in [
            ("tenants:\n- name: ''\n".to_owned(), "not empty"),
            ("tenants:\n- name: a\n- name: a\n".to_owned(), "unique"),
            ("tenants:\n- name: a\n  requests_per_minute: 0\n".to_owned(), "requests_per_minute"),
            ("tenants:\n- name: a\n  keys: [{sha256: abc}]\n".to_owned(), "64 hexadecimal"),
            // a misspelled limit must not be ignored: it would be no limit
            ("tenants:\n- name: a\n  request_per_minute: 5\n".to_owned(), "request_per_minute"),
            ("tenants:\n- name: a\n  keys: [{key: abc}]\n".to_owned(), "key"),
            (format!("tenants:\n- name: a\n  keys: [{{sha256: {key}}}, {{sha256: {key}}}]\n"), "twice"),
            ("keys: []\n".to_owned(), "keys"),
        ] {
            let reason = KeyFile::parse(&bad).expect_err(&bad);
            assert!(reason.contains(word), "{bad}: {reason}");
        }
    }
}
