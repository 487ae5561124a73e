//! Comparable content of a full block: an equal name is not enough to use another sequence's block.

use std::sync::Arc;

use bora_common::blocks::{BLOCK_TOKENS, BlockDigest, BlockHash};

/// Digest of a full block, which binds the salt, the images and all tokens before it, and the block's tokens.
///
/// A running sequence holds one for each of its full blocks, the cache one for each cached block. It takes 304 bytes on
/// the heap with the reference counts, and equal ones are shared. The KV of such a block takes 5 to 10 MiB.
#[derive(Debug, PartialEq, Eq)]
pub struct BlockContent {
    digest: BlockDigest,
    token_ids: [u32; BLOCK_TOKENS],
}

impl BlockContent {
    /// A block with this digest and these tokens.
    pub fn new(digest: BlockDigest, token_ids: &[u32; BLOCK_TOKENS]) -> Arc<Self> {
        Arc::new(Self { digest, token_ids: *token_ids })
    }

    /// The block's name.
    pub fn hash(&self) -> BlockHash {
        self.digest.hash()
    }

    /// Tokens of the block.
    #[cfg(test)]
    pub(crate) fn token_ids(&self) -> &[u32; BLOCK_TOKENS] {
        &self.token_ids
    }

    /// A block with the same digest and other tokens, as an attacker would need it.
    #[cfg(test)]
    pub(crate) fn forged(&self, token_ids: &[u32; BLOCK_TOKENS]) -> Arc<Self> {
        Self::new(self.digest, token_ids)
    }

    /// A block with the same name and the same tokens after another prefix.
    #[cfg(test)]
    pub(crate) fn behind_another_prefix(&self) -> Arc<Self> {
        let mut digest = self.digest;
        digest.0[31] ^= 1;
        Self::new(digest, &self.token_ids)
    }
}
