//! The hash chain of a prompt's blocks: the only one. Router and worker call the same function, so a
//! block has the same name everywhere.
//!
//! A block is [`BLOCK_TOKENS`] token ids. Its hash is xxh3-128 over the hash of the block before it (or
//! the salt, for block 0), its token ids as little-endian u32, and the hash of every image of which it
//! holds at least one placeholder, in order. Only full blocks have a hash.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

/// Tokens in a block of the KV cache.
pub const BLOCK_TOKENS: usize = 64;

/// The name of a full block and of everything before it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BlockHash(pub u128);

impl BlockHash {
    /// The 16 bytes that go over the wire (little endian).
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.to_le_bytes()
    }

    /// Reads hashes that stand one after the other, as in `bora.v1.BlocksChanged`; a rest of fewer than
    /// 16 bytes is ignored.
    pub fn parse_many(bytes: &[u8]) -> impl Iterator<Item = BlockHash> + '_ {
        bytes.as_chunks::<16>().0.iter().map(|chunk| BlockHash(u128::from_le_bytes(*chunk)))
    }
}

impl std::fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// An image's placeholder ids within a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageSpan {
    /// xxh3-128 of the encoded image.
    pub hash: u128,
    /// Index of its first placeholder id.
    pub offset: usize,
    /// Number of its placeholder ids.
    pub length: usize,
}

/// Hashes a sequence block by block as its ids become known.
#[derive(Clone, Debug)]
pub struct BlockChain {
    images: Vec<ImageSpan>,
    next_image: usize,
    parent: [u8; 16],
    position: usize,
    pending: Vec<u32>,
}

impl BlockChain {
    /// `salt` separates tenants; `images` in the order of their offsets.
    pub fn new(salt: &[u8], images: Vec<ImageSpan>) -> Self {
        Self { images, next_image: 0, parent: xxh3_128(salt).to_le_bytes(), position: 0, pending: Vec::new() }
    }

    /// Ids added so far.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Announces images that stand behind everything added and announced so far, in the order of their offsets.
    pub fn expect_images(&mut self, images: impl IntoIterator<Item = ImageSpan>) {
        self.images.drain(..self.next_image);
        self.next_image = 0;
        self.images.extend(images);
    }

    /// Adds one id; returns the hash of the block that it completed, if it did.
    pub fn push(&mut self, token_id: u32) -> Option<BlockHash> {
        self.pending.push(token_id);
        self.position += 1;
        if self.pending.len() < BLOCK_TOKENS {
            return None;
        }
        let mut block = [0; BLOCK_TOKENS];
        block.copy_from_slice(&self.pending);
        self.pending.clear();
        Some(self.complete(&block))
    }

    /// The hash of the block that ends at `position`.
    fn complete(&mut self, block: &[u32; BLOCK_TOKENS]) -> BlockHash {
        let mut bytes = [0; 16 + BLOCK_TOKENS * 4];
        bytes[..16].copy_from_slice(&self.parent);
        for (place, token_id) in bytes[16..].as_chunks_mut::<4>().0.iter_mut().zip(block) {
            *place = token_id.to_le_bytes();
        }
        let touches = self.images.get(self.next_image).is_some_and(|image| image.offset < self.position);
        // one call over the whole is several times faster than a hasher that is fed piece by piece
        let hash = if touches { self.hash_with_images(&bytes) } else { xxh3_128(&bytes) };
        self.parent = hash.to_le_bytes();
        BlockHash(hash)
    }

    fn hash_with_images(&mut self, bytes: &[u8]) -> u128 {
        let mut hasher = Xxh3::new();
        hasher.update(bytes);
        let start = self.position - BLOCK_TOKENS;
        while let Some(image) = self.images.get(self.next_image) {
            if image.offset >= self.position {
                break;
            }
            if image.offset + image.length > start {
                hasher.update(&image.hash.to_le_bytes());
            }
            if image.offset + image.length > self.position {
                break; // goes on in the next block
            }
            self.next_image += 1;
        }
        hasher.digest128()
    }

    /// Adds many ids and returns the hashes of the blocks completed by them.
    pub fn extend(&mut self, token_ids: &[u32]) -> Vec<BlockHash> {
        let mut hashes = Vec::with_capacity((self.pending.len() + token_ids.len()) / BLOCK_TOKENS);
        let missing = if self.pending.is_empty() { 0 } else { BLOCK_TOKENS - self.pending.len() };
        let (first, rest) = token_ids.split_at(missing.min(token_ids.len()));
        hashes.extend(first.iter().filter_map(|id| self.push(*id)));
        let (blocks, last) = rest.as_chunks::<BLOCK_TOKENS>();
        for block in blocks {
            self.position += BLOCK_TOKENS;
            hashes.push(self.complete(block));
        }
        hashes.extend(last.iter().filter_map(|id| self.push(*id)));
        hashes
    }
}

/// The hashes of all full blocks of a prompt.
pub fn hash_blocks(salt: &[u8], images: &[ImageSpan], token_ids: &[u32]) -> Vec<BlockHash> {
    BlockChain::new(salt, images.to_vec()).extend(token_ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(n: usize) -> Vec<u32> {
        (0..n as u32).collect()
    }

    #[test]
    fn only_full_blocks_have_a_hash_and_prefixes_share_theirs() {
        let long = hash_blocks(b"", &[], &ids(64 * 3 + 5));
        assert_eq!(long.len(), 3);
        let short = hash_blocks(b"", &[], &ids(64 * 2));
        assert_eq!(long[..2], short[..]);
        let mut other = ids(64 * 3);
        other[0] = 99;
        let other = hash_blocks(b"", &[], &other);
        assert!(long.iter().zip(&other).all(|(a, b)| a != b), "a change at the start changes every hash");
    }

    #[test]
    fn salt_and_images_separate() {
        let plain = hash_blocks(b"", &[], &ids(256));
        assert_ne!(plain[0], hash_blocks(b"tenant", &[], &ids(256))[0]);
        let image = ImageSpan { hash: 7, offset: 100, length: 100 };
        let with = hash_blocks(b"", &[image], &ids(256));
        assert_eq!(plain[0], with[0], "blocks before the image are shared");
        assert_ne!(plain[1], with[1]);
        let other = hash_blocks(b"", &[ImageSpan { hash: 8, ..image }], &ids(256));
        assert_ne!(with[1], other[1]);
        assert_ne!(with[3], other[3], "and so everything after it");
    }

    #[test]
    fn one_by_one_equals_at_once_and_survives_the_wire() {
        let all = hash_blocks(b"s", &[], &ids(200));
        let mut chain = BlockChain::new(b"s", vec![]);
        let single: Vec<_> = ids(200).iter().filter_map(|id| chain.push(*id)).collect();
        assert_eq!(all, single);
        let bytes: Vec<u8> = all.iter().flat_map(|hash| hash.to_bytes()).collect();
        assert_eq!(BlockHash::parse_many(&bytes).collect::<Vec<_>>(), all);
    }
}
