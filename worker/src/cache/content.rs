//! What a full block holds, as far as it can be compared: a name alone is not enough to use another sequence's block.

use std::sync::Arc;

use bora_common::blocks::{BLOCK_TOKENS, BlockDigest, BlockHash};

/// A full block's digest, which binds the salt, the images and all token IDs before it, and its token IDs.
///
/// A running sequence has one for each of its full blocks, the cache one for each block that can be found: 304 bytes on the heap
/// with the reference counts, which are shared by whoever holds the same one. The KV of such a block takes 5 to 10 MiB.
#[derive(Debug, PartialEq, Eq)]
pub struct BlockContent {
    digest: BlockDigest,
    token_ids: [u32; BLOCK_TOKENS],
}

impl BlockContent {
    /// The block that has this digest and holds these token IDs.
    pub fn new(digest: BlockDigest, token_ids: &[u32; BLOCK_TOKENS]) -> Arc<Self> {
        Arc::new(Self { digest, token_ids: *token_ids })
    }

    /// The block's name.
    pub fn hash(&self) -> BlockHash {
        self.digest.hash()
    }

    /// Its token IDs.
    #[cfg(test)]
    pub(crate) fn token_ids(&self) -> &[u32; BLOCK_TOKENS] {
        &self.token_ids
    }

    /// A block of the same digest that holds something else: what an attacker would need.
    #[cfg(test)]
    pub(crate) fn forged(&self, token_ids: &[u32; BLOCK_TOKENS]) -> Arc<Self> {
        Self::new(self.digest, token_ids)
    }

    /// A block of the same name and the same token IDs behind another prefix.
    #[cfg(test)]
    pub(crate) fn behind_another_prefix(&self) -> Arc<Self> {
        let mut digest = self.digest;
        digest.0[31] ^= 1;
        Self::new(digest, &self.token_ids)
    }
}
