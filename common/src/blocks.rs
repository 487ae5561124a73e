//! The hash chain of a prompt's blocks: the only one. Router and worker call the same function, so a
//! block has the same name everywhere.
//!
//! A block is [`BLOCK_TOKENS`] token IDs. Only full blocks have a digest. With keys that are derived from the cluster secret
//! ([`crate::secret`]),
//!
//! - the *content* of a block is keyed BLAKE3 over its token IDs as little-endian u32;
//! - its *digest* is keyed BLAKE3 over the digest of the block before it (for block 0: keyed BLAKE3 over the salt), its content,
//!   and each image of which it holds at least one placeholder, in order: hash, offset and length;
//! - its *name*, [`BlockHash`], is the first half of the digest.
//!
//! Names are what groups report and routers look up, and 128 bits suffice for that: who has no key can't compute a name, so
//! two blocks of one name can't be searched for, only met by chance, and after 2^40 blocks the chance of one such pair is
//! 2^-49. And nothing rests on names alone: before a worker uses a cached block it compares the whole digest, which binds
//! everything before the block, and the token IDs.
//!
//! The content is apart from the digest for speed: contents do not depend on each other, so BLAKE3 computes several at once, and
//! the chain itself is one compression a block.

use blake3::platform::{Platform, words_from_le_bytes_32};
use blake3::{IncrementCounter, keyed_hash};
use serde::{Deserialize, Serialize};
use zeroize::Zeroize as _;

use crate::secret::ClusterKeys;

/// Tokens in a block of the KV cache.
pub const BLOCK_TOKENS: usize = 64;

/// Bytes of a block's token IDs.
const BLOCK_BYTES: usize = BLOCK_TOKENS * 4;
/// Contents that are computed at once: as many as the widest registers hold.
const CONTENTS_AT_ONCE: usize = 16;

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

/// What a full block is: binds its token IDs, its images and everything before it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct BlockDigest(pub [u8; 32]);

impl BlockDigest {
    /// The block's name: the digest's first half.
    pub fn hash(&self) -> BlockHash {
        let mut half = [0; 16];
        half.copy_from_slice(&self.0[..16]);
        BlockHash(u128::from_le_bytes(half))
    }
}

impl std::fmt::Debug for BlockDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The keys that blocks are named under.
pub(crate) struct BlockKeys {
    pub(crate) contents: [u8; 32],
    pub(crate) digests: [u8; 32],
    pub(crate) roots: [u8; 32],
}

impl Drop for BlockKeys {
    fn drop(&mut self) {
        for key in [&mut self.contents, &mut self.digests, &mut self.roots] {
            key.zeroize();
        }
    }
}

impl BlockKeys {
    /// The content of one block.
    fn content(&self, block: &[u32; BLOCK_TOKENS]) -> [u8; 32] {
        *keyed_hash(&self.contents, &to_bytes(block)).as_bytes()
    }

    /// The same of as many blocks as there are, up to [`CONTENTS_AT_ONCE`].
    fn contents(&self, blocks: &[[u32; BLOCK_TOKENS]]) -> [[u8; 32]; CONTENTS_AT_ONCE] {
        // BLAKE3's flags of a keyed message that is one chunk
        const CHUNK_START: u8 = 1;
        const CHUNK_END: u8 = 2;
        const ROOT: u8 = 8;
        const KEYED_HASH: u8 = 16;
        let count = blocks.len().min(CONTENTS_AT_ONCE);
        let mut bytes = [[0; BLOCK_BYTES]; CONTENTS_AT_ONCE];
        for (bytes, block) in bytes.iter_mut().zip(blocks) {
            *bytes = to_bytes(block);
        }
        let mut contents = [[0; 32]; CONTENTS_AT_ONCE];
        Platform::detect().hash_many(
            &bytes.each_ref()[..count],
            &words_from_le_bytes_32(&self.contents),
            0,
            IncrementCounter::No,
            KEYED_HASH,
            CHUNK_START,
            CHUNK_END | ROOT,
            contents[..count].as_flattened_mut(),
        );
        contents
    }
}

fn to_bytes(block: &[u32; BLOCK_TOKENS]) -> [u8; BLOCK_BYTES] {
    let mut bytes = [0; BLOCK_BYTES];
    for (place, token_id) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(block) {
        *place = token_id.to_le_bytes();
    }
    bytes
}

/// An image's placeholder IDs within a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageSpan {
    /// [`ClusterKeys::image_hash`] of the encoded image.
    pub hash: u128,
    /// Index of its first placeholder ID.
    pub offset: usize,
    /// Number of its placeholder IDs.
    pub length: usize,
}

/// Names a sequence's blocks as its token IDs become known.
#[derive(Clone, Debug)]
pub struct BlockChain {
    keys: ClusterKeys,
    images: Vec<ImageSpan>,
    next_image: usize,
    parent: [u8; 32],
    position: usize,
    pending: Vec<u32>,
}

impl BlockChain {
    /// `salt` separates tenants; `images` in the order of their offsets.
    pub fn new(keys: &ClusterKeys, salt: &[u8], images: Vec<ImageSpan>) -> Self {
        let parent = *keyed_hash(&keys.blocks().roots, salt).as_bytes();
        Self { keys: keys.clone(), images, next_image: 0, parent, position: 0, pending: Vec::new() }
    }

    /// Token IDs added so far.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Announces images that stand behind everything added and announced so far, in the order of their offsets.
    pub fn expect_images(&mut self, images: impl IntoIterator<Item = ImageSpan>) {
        self.images.drain(..self.next_image);
        self.next_image = 0;
        self.images.extend(images);
    }

    /// Adds one token ID; returns the digest of the block that it completed, if it did.
    pub fn push(&mut self, token_id: u32) -> Option<BlockDigest> {
        self.pending.push(token_id);
        self.position += 1;
        let block: [u32; BLOCK_TOKENS] = self.pending.as_slice().try_into().ok()?;
        self.pending.clear();
        let content = self.keys.blocks().content(&block);
        Some(self.complete(&content))
    }

    /// The digest of the block that ends at `position`.
    fn complete(&mut self, content: &[u8; 32]) -> BlockDigest {
        let mut bytes = [0; 64];
        bytes[..32].copy_from_slice(&self.parent);
        bytes[32..].copy_from_slice(content);
        let touches = self.images.get(self.next_image).is_some_and(|image| image.offset < self.position);
        self.parent = if touches {
            self.digest_with_images(&bytes)
        } else {
            *keyed_hash(&self.keys.blocks().digests, &bytes).as_bytes()
        };
        BlockDigest(self.parent)
    }

    fn digest_with_images(&mut self, bytes: &[u8; 64]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_keyed(&self.keys.blocks().digests);
        hasher.update(bytes);
        let start = self.position - BLOCK_TOKENS;
        while let Some(image) = self.images.get(self.next_image) {
            if image.offset >= self.position {
                break;
            }
            if image.offset + image.length > start {
                hasher.update(&image.hash.to_le_bytes());
                hasher.update(&(image.offset as u64).to_le_bytes());
                hasher.update(&(image.length as u64).to_le_bytes());
            }
            if image.offset + image.length > self.position {
                break; // continues in the next block
            }
            self.next_image += 1;
        }
        *hasher.finalize().as_bytes()
    }

    /// Adds many token IDs and returns the digests of the blocks completed by them.
    pub fn extend(&mut self, token_ids: &[u32]) -> Vec<BlockDigest> {
        let mut digests = Vec::with_capacity((self.pending.len() + token_ids.len()) / BLOCK_TOKENS);
        let missing = if self.pending.is_empty() { 0 } else { BLOCK_TOKENS - self.pending.len() };
        let (first, rest) = token_ids.split_at(missing.min(token_ids.len()));
        digests.extend(first.iter().filter_map(|id| self.push(*id)));
        let (blocks, last) = rest.as_chunks::<BLOCK_TOKENS>();
        for some in blocks.chunks(CONTENTS_AT_ONCE) {
            let contents = self.keys.blocks().contents(some);
            for content in &contents[..some.len()] {
                self.position += BLOCK_TOKENS;
                digests.push(self.complete(content));
            }
        }
        digests.extend(last.iter().filter_map(|id| self.push(*id)));
        digests
    }
}

/// The names of all full blocks of a prompt.
pub fn hash_blocks(keys: &ClusterKeys, salt: &[u8], images: &[ImageSpan], token_ids: &[u32]) -> Vec<BlockHash> {
    BlockChain::new(keys, salt, images.to_vec()).extend(token_ids).iter().map(BlockDigest::hash).collect()
}

#[cfg(test)]
mod tests {
    use xxhash_rust::xxh3::xxh3_128;

    use super::*;

    fn keys() -> ClusterKeys {
        ClusterKeys::derive(&[1; 32])
    }

    fn ids(n: usize) -> Vec<u32> {
        (0..n as u32).collect()
    }

    #[test]
    fn only_full_blocks_have_a_hash_and_prefixes_share_theirs() {
        let long = hash_blocks(&keys(), b"", &[], &ids(64 * 3 + 5));
        assert_eq!(long.len(), 3);
        let short = hash_blocks(&keys(), b"", &[], &ids(64 * 2));
        assert_eq!(long[..2], short[..]);
        let mut other = ids(64 * 3);
        other[0] = 99;
        let other = hash_blocks(&keys(), b"", &[], &other);
        assert!(long.iter().zip(&other).all(|(a, b)| a != b), "a change at the start changes every hash");
    }

    #[test]
    fn salt_images_and_keys_separate() {
        let keys = keys();
        let plain = hash_blocks(&keys, b"", &[], &ids(256));
        assert_ne!(plain[0], hash_blocks(&keys, b"tenant", &[], &ids(256))[0]);
        assert_ne!(plain[0], hash_blocks(&ClusterKeys::derive(&[2; 32]), b"", &[], &ids(256))[0]);
        let image = ImageSpan { hash: 7, offset: 100, length: 100 };
        let with = hash_blocks(&keys, b"", &[image], &ids(256));
        assert_eq!(plain[0], with[0], "blocks before the image are shared");
        assert_ne!(plain[1], with[1]);
        for other in [ImageSpan { hash: 8, ..image }, ImageSpan { length: 90, ..image }] {
            let other = hash_blocks(&keys, b"", &[other], &ids(256));
            assert_ne!(with[1], other[1]);
            assert_ne!(with[3], other[3], "and so everything after it");
        }
    }

    #[test]
    fn one_by_one_equals_at_once_and_survives_the_wire() {
        for count in [200, 64 * 40 + 3] {
            let all = BlockChain::new(&keys(), b"s", vec![]).extend(&ids(count));
            let mut chain = BlockChain::new(&keys(), b"s", vec![]);
            let single: Vec<_> = ids(count).iter().filter_map(|id| chain.push(*id)).collect();
            assert_eq!(all, single);
            let mut chain = BlockChain::new(&keys(), b"s", vec![]);
            let (first, rest) = (chain.extend(&ids(count)[..70]), chain.extend(&ids(count)[70..]));
            assert_eq!(all, [first, rest].concat());
            let names: Vec<BlockHash> = all.iter().map(BlockDigest::hash).collect();
            let bytes: Vec<u8> = names.iter().flat_map(|hash| hash.to_bytes()).collect();
            assert_eq!(BlockHash::parse_many(&bytes).collect::<Vec<_>>(), names);
        }
    }

    /// The definition in the public functions of BLAKE3 alone: what is computed at once is the same.
    #[test]
    fn digests_are_keyed_blake3_of_parent_content_and_images() {
        let keys = keys();
        let mut parent = *keyed_hash(&keys.blocks().roots, b"salt").as_bytes();
        let token_ids = ids(64 * 37);
        let image = ImageSpan { hash: 5, offset: 130, length: 3 };
        let digests = BlockChain::new(&keys, b"salt", vec![image]).extend(&token_ids);
        assert_eq!(digests.len(), 37);
        for (index, (block, digest)) in token_ids.chunks(64).zip(&digests).enumerate() {
            let bytes: Vec<u8> = block.iter().flat_map(|id| id.to_le_bytes()).collect();
            let content = *keyed_hash(&keys.blocks().contents, &bytes).as_bytes();
            let mut message = [parent, content].concat();
            if index == 2 {
                message.extend(5u128.to_le_bytes());
                message.extend(130u64.to_le_bytes());
                message.extend(3u64.to_le_bytes());
            }
            parent = *keyed_hash(&keys.blocks().digests, &message).as_bytes();
            assert_eq!(*digest, BlockDigest(parent), "block {index}");
        }
    }

    /// Two blocks that XXH3-128, which once named blocks, gave one name under every parent: in two of its stripes a lane holds the
    /// low half of the public secret's word, so what stands in its high half counts only in a sum.
    #[test]
    fn blocks_that_were_forged_for_an_unkeyed_hash_have_different_names() {
        let mut honest = ids(64);
        (honest[12], honest[28]) = (0x2c81_017c, 0xe96d_d4de);
        let mut forged = honest.clone();
        (forged[13], forged[29]) = (honest[13] + 9, honest[29] - 9);
        for parent in [[0; 16], [7; 16], *b"any parent at all"[..16].as_chunks().0.first().unwrap()] {
            let name = |block: &[u32]| {
                let mut bytes = parent.to_vec();
                bytes.extend(block.iter().flat_map(|id| id.to_le_bytes()));
                xxh3_128(&bytes)
            };
            assert_eq!(name(&honest), name(&forged), "the attack works on the unkeyed hash");
        }
        assert_ne!(hash_blocks(&keys(), b"", &[], &honest), hash_blocks(&keys(), b"", &[], &forged));
    }
}
