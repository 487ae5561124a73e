//! The cluster secret, and every key that is derived from it.
//!
//! All routers and workers of a cluster are given one secret. It is never used itself: each use has a key of its own, which BLAKE3
//! derives from it under a context string ([`ClusterKeys`]). Names of cached blocks that are computed under such a key can't be
//! predicted, forged or confirmed by whoever does not have the secret. [`ClusterKeys::cache_key_id`] says in public which key a
//! process has, so that processes with different secrets find out instead of missing each other's caches in silence.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use zeroize::{Zeroize as _, Zeroizing};

use crate::blocks::BlockKeys;

/// How an operator makes a secret; in error messages.
pub const HOW_TO_MAKE: &str = "head -c 32 /dev/urandom | base64 > FILE && chmod 600 FILE";

/// Bytes that a secret must have, white space at its ends not counted.
const MIN_SECRET_BYTES: usize = 32;
/// A file that is longer holds something else.
const MAX_FILE_BYTES: u64 = 4096;
/// A secret with fewer distinct bytes is a placeholder. 32 random bytes in hexadecimal digits have 12 or more.
const MIN_DISTINCT_BYTES: usize = 8;

const BLOCK_CONTENTS: &str = "bora 2026-11-30 prefix cache: block contents";
const BLOCK_DIGESTS: &str = "bora 2026-11-30 prefix cache: block digests";
const BLOCK_ROOTS: &str = "bora 2026-11-30 prefix cache: salts of requests";
const IMAGES: &str = "bora 2026-11-30 prefix cache: images";
const TENANT_SALTS: &str = "bora 2026-11-30 prefix cache: salts of tenants";
const CACHE_KEY_ID: &str = "bora 2026-11-30 prefix cache: public id of the keys";

/// The cluster secret can't be used.
#[derive(Debug, thiserror::Error)]
#[error("cluster_secret_file: {}: {reason}", path.display())]
pub struct SecretError {
    /// The file.
    pub path: PathBuf,
    /// Why not.
    pub reason: SecretProblem,
}

/// What is wrong with a cluster secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretProblem {
    /// The file can't be read or made.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It is no regular file.
    #[error("this is not a regular file")]
    NotAFile,
    /// It is too large.
    #[error("a secret has at most {MAX_FILE_BYTES} bytes; this file holds something else")]
    TooLong,
    /// It is too short.
    #[error("a secret must have at least {MIN_SECRET_BYTES} bytes, this one has {0}; make one with `{HOW_TO_MAKE}`")]
    TooShort(usize),
    /// It is no random number.
    #[error("this is a placeholder, not a secret; make one with `{HOW_TO_MAKE}`")]
    Placeholder,
    /// Others may change it.
    #[error("mode {0:04o} lets every user of this machine change the secret; use `chmod 600`")]
    Exposed(u32),
}

/// The keys of a cluster. Clones share them; they are erased when the last one is dropped, and never printed.
#[derive(Clone)]
pub struct ClusterKeys(Arc<Keys>);

struct Keys {
    blocks: BlockKeys,
    images: [u8; 32],
    tenant_salts: [u8; 32],
    cache_key_id: String,
}

impl Drop for Keys {
    fn drop(&mut self) {
        self.images.zeroize();
        self.tenant_salts.zeroize();
    }
}

impl fmt::Debug for ClusterKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterKeys").field("cache_key_id", &self.0.cache_key_id).finish_non_exhaustive()
    }
}

impl ClusterKeys {
    /// Derives the keys from a secret. The secret is not judged: [`ClusterKeys::read`] does that.
    pub fn derive(secret: &[u8]) -> Self {
        let id = blake3::derive_key(CACHE_KEY_ID, secret);
        let cache_key_id = id[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        let blocks = BlockKeys {
            contents: blake3::derive_key(BLOCK_CONTENTS, secret),
            digests: blake3::derive_key(BLOCK_DIGESTS, secret),
            roots: blake3::derive_key(BLOCK_ROOTS, secret),
        };
        Self(Arc::new(Keys {
            blocks,
            images: blake3::derive_key(IMAGES, secret),
            tenant_salts: blake3::derive_key(TENANT_SALTS, secret),
            cache_key_id,
        }))
    }

    /// Keys that only this process knows: for a cluster of one process.
    pub fn random() -> Self {
        Self::derive(Zeroizing::new(rand::random::<[u8; 32]>()).as_slice())
    }

    /// Reads and judges the file of `cluster_secret_file`. A link is followed: that is how Kubernetes mounts secrets. A file that
    /// every user can read is used with a warning: in a pod without a group of its own a mounted secret has no other mode.
    pub fn read(path: &Path) -> Result<Self, SecretError> {
        let read = || {
            let file = File::open(path)?;
            let mode = mode_of(&file)?;
            let keys = Self::read_open(file)?;
            if mode & 0o004 != 0 {
                tracing::warn!(
                    path = %path.display(),
                    mode = format_args!("{mode:04o}"),
                    "cluster_secret_file: every user of this machine can read the secret; use `chmod 600`"
                );
            }
            Ok(keys)
        };
        read().map_err(|reason| SecretError { path: path.into(), reason })
    }

    /// Reads and judges the secret of an open file.
    pub fn read_open(file: File) -> Result<Self, SecretProblem> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(SecretProblem::NotAFile);
        }
        let mode = mode_of(&file)?;
        if mode & 0o002 != 0 {
            return Err(SecretProblem::Exposed(mode));
        }
        let mut text = Zeroizing::new(Vec::with_capacity(MAX_FILE_BYTES as usize + 1));
        file.take(MAX_FILE_BYTES + 1).read_to_end(&mut text)?;
        if text.len() as u64 > MAX_FILE_BYTES {
            return Err(SecretProblem::TooLong);
        }
        let secret = text.trim_ascii();
        if secret.len() < MIN_SECRET_BYTES {
            return Err(SecretProblem::TooShort(secret.len()));
        }
        let distinct = (0..=u8::MAX).filter(|byte| secret.contains(byte)).count();
        if distinct < MIN_DISTINCT_BYTES {
            return Err(SecretProblem::Placeholder);
        }
        Ok(Self::derive(secret))
    }

    /// A new secret, as text for a file.
    pub fn new_secret() -> Zeroizing<String> {
        let secret = Zeroizing::new(rand::random::<[u8; 32]>());
        Zeroizing::new(format!("{}\n", BASE64.encode(secret.as_slice())))
    }

    /// Public and short: equal where the keys are equal. Says nothing of a secret that is random.
    pub fn cache_key_id(&self) -> &str {
        &self.0.cache_key_id
    }

    /// Identifies an encoded image.
    pub fn image_hash(&self, data: &[u8]) -> u128 {
        let hash = blake3::keyed_hash(&self.0.images, data);
        let mut half = [0; 16];
        half.copy_from_slice(&hash.as_bytes()[..16]);
        u128::from_le_bytes(half)
    }

    /// The salt of a request: of whoever shares its cached prefixes, and of the salt that the request itself names (empty: none).
    pub fn cache_salt(&self, scope: CacheScope<'_>, requested: &str) -> CacheSalt {
        let (kind, name) = match scope {
            CacheScope::Anonymous => (0, ""),
            CacheScope::Tenant(name) => (1, name),
            CacheScope::Shared(name) => (2, name),
        };
        let mut hasher = blake3::Hasher::new_keyed(&self.0.tenant_salts);
        hasher.update(&[kind]);
        // with its length: no other name and salt write the same bytes
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
        hasher.update(requested.as_bytes());
        CacheSalt(*hasher.finalize().as_bytes())
    }

    /// What names blocks.
    pub(crate) fn blocks(&self) -> &BlockKeys {
        &self.0.blocks
    }
}

fn mode_of(file: &File) -> io::Result<u32> {
    use std::os::unix::fs::PermissionsExt as _;
    Ok(file.metadata()?.permissions().mode() & 0o7777)
}

/// Who shares cached prefixes with each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheScope<'a> {
    /// Everybody, where no keys are asked for.
    Anonymous,
    /// The requests of one tenant.
    Tenant(&'a str),
    /// The requests of all tenants that name this cache.
    Shared(&'a str),
}

/// Separates cached prefixes: requests with different salts share none. Can't be computed without the cluster secret.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct CacheSalt([u8; 32]);

impl AsRef<[u8]> for CacheSalt {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for CacheSalt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // whoever has it can put blocks into this cache
        f.write_str("CacheSalt(..)")
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn read(text: &[u8], mode: u32) -> Result<ClusterKeys, SecretError> {
        use std::os::unix::fs::PermissionsExt as _;
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text).unwrap();
        file.as_file().set_permissions(std::fs::Permissions::from_mode(mode)).unwrap();
        ClusterKeys::read(file.path())
    }

    #[test]
    fn accepts_a_secret_and_rejects_what_is_none_by_file_and_reason() {
        let secret = ClusterKeys::new_secret();
        let keys = read(secret.as_bytes(), 0o600).unwrap();
        let same = read(format!("  {}\n\n", secret.trim()).as_bytes(), 0o440).unwrap();
        assert_eq!(keys.cache_key_id(), same.cache_key_id(), "white space at the ends does not count");
        let random: Vec<u8> = (0..64).map(|byte: u8| byte.wrapping_mul(37) | 0x80).collect();
        read(&random, 0o400).unwrap();
        read(secret.as_bytes(), 0o444).expect("a warning only");
        for (text, mode, word) in [
            (&b"c2hvcnQ="[..], 0o600, "has 8; make one with `head -c 32 /dev/urandom | base64"),
            (b"", 0o600, "has 0"),
            (&[b' '; 100], 0o600, "has 0"),
            (&[b'x'; 64], 0o600, "placeholder"),
            (&[b'x'; 4097], 0o600, "at most 4096"),
            (secret.as_bytes(), 0o602, "mode 0602"),
        ] {
            let error = read(text, mode).expect_err(word).to_string();
            assert!(error.starts_with("cluster_secret_file: /") && error.contains(word), "{error}");
            assert!(!error.contains(secret.trim()), "{error}");
        }
        let missing = ClusterKeys::read(Path::new("/no/such/file")).unwrap_err().to_string();
        assert!(missing.starts_with("cluster_secret_file: /no/such/file: "), "{missing}");
        let directory = ClusterKeys::read(Path::new("/tmp")).unwrap_err().to_string();
        assert!(directory.contains("not a regular file"), "{directory}");
    }

    #[test]
    fn every_use_has_its_own_key_and_another_secret_changes_all() {
        let (one, other) = (ClusterKeys::derive(&[1; 32]), ClusterKeys::derive(&[2; 32]));
        assert_eq!(one.cache_key_id(), ClusterKeys::derive(&[1; 32]).cache_key_id(), "the same in every process");
        assert_eq!(one.cache_key_id().len(), 16);
        assert_ne!(one.cache_key_id(), other.cache_key_id());
        assert_ne!(one.image_hash(b"png"), other.image_hash(b"png"));
        assert_ne!(one.image_hash(b"png"), one.image_hash(b"gif"));
        let salt = |keys: &ClusterKeys| keys.cache_salt(CacheScope::Tenant("acme"), "");
        assert_eq!(salt(&one), salt(&ClusterKeys::derive(&[1; 32])));
        assert_ne!(salt(&one), salt(&other));
        let keys =
            [&one.0.images, &one.0.tenant_salts, &one.0.blocks.contents, &one.0.blocks.digests, &one.0.blocks.roots];
        let distinct: std::collections::HashSet<_> = keys.into_iter().collect();
        assert_eq!(distinct.len(), keys.len());
    }

    #[test]
    fn salts_of_tenants_names_and_requests_differ() {
        let keys = ClusterKeys::derive(&[1; 32]);
        let salts = [
            (CacheScope::Anonymous, ""),
            (CacheScope::Anonymous, "a"),
            (CacheScope::Tenant("a"), ""),
            (CacheScope::Tenant("a"), "a"),
            (CacheScope::Tenant("aa"), ""),
            (CacheScope::Tenant(""), "aa"),
            (CacheScope::Shared("a"), ""),
            (CacheScope::Shared("a"), "a"),
            (CacheScope::Shared(""), "a"),
        ]
        .map(|(scope, requested)| keys.cache_salt(scope, requested));
        let distinct: std::collections::HashSet<_> = salts.iter().collect();
        assert_eq!(distinct.len(), salts.len());
    }

    #[test]
    fn keys_and_salts_are_never_printed() {
        let keys = ClusterKeys::derive(&[0xab; 32]);
        let printed = format!("{keys:?} {:?}", keys.cache_salt(CacheScope::Anonymous, ""));
        assert_eq!(printed, format!("ClusterKeys {{ cache_key_id: \"{}\", .. }} CacheSalt(..)", keys.cache_key_id()));
    }
}
