//! Token token IDs as they go to a group: packed varints, as protobuf has them. Through a general encoder, one call each,
//! the token IDs of a long conversation cost more than everything else that the router does with it. They are packed
//! here in one pass, branch-free for token IDs that real vocabularies have, and kept with the turns that they are of, so
//! that a conversation that grew is put together from bytes: of long turns nothing is copied before it is written
//! to the group's connection. Two bytes and a half an id, where a list of token IDs takes four.

use std::ops::Range;

use bytes::Bytes;
use serde::{Serialize, Serializer};

/// Segments of at least so many bytes are shared, smaller ones copied: that is about what counting one owner more costs.
const SHARED_FROM: usize = 4 << 10;
/// Ids that are packed in one go.
const AT_ONCE: usize = 64;
/// More than their varints take: a power of two, for a cheap remainder.
const BLOCK_BYTES: usize = 4 * AT_ONCE;

/// Varints one after the other.
pub fn pack(ids: &[u32]) -> Vec<u8> {
    let mut packed = Vec::with_capacity(packed_length(ids));
    pack_into(ids, &mut packed);
    packed
}

/// Bytes that token IDs take.
pub(super) fn packed_length(ids: &[u32]) -> usize {
    let is_from = |id: u32, bits: u32| u32::from(id >= 1 << bits);
    // sums of 32 bits are done for several token IDs at once
    let of_some = |some: &[u32]| -> u32 {
        let most: u32 = some.iter().map(|id| 1 + is_from(*id, 7) + is_from(*id, 14)).sum();
        if are_usual(some) {
            return most;
        }
        most + some.iter().map(|id| is_from(*id, 21) + is_from(*id, 28)).sum::<u32>()
    };
    ids.chunks(1024).map(|some| of_some(some) as usize).sum()
}

/// Whether three bytes hold each of these. Without an early end, so that it is done for several token IDs at once.
fn are_usual(ids: &[u32]) -> bool {
    ids.iter().fold(0, |all, id| all | id) < 1 << 21
}

/// Appends varints.
pub(super) fn pack_into(ids: &[u32], packed: &mut Vec<u8>) {
    let (blocks, rest) = ids.as_chunks::<AT_ONCE>();
    for block in blocks {
        pack_block(block, AT_ONCE, packed);
    }
    if !rest.is_empty() {
        let mut block = [0; AT_ONCE];
        block[..rest.len()].copy_from_slice(rest);
        pack_block(&block, rest.len(), packed);
    }
}

/// Appends the varints of the first `count` of a block's token IDs.
#[inline(always)]
fn pack_block(block: &[u32; AT_ONCE], count: usize, packed: &mut Vec<u8>) {
    if !are_usual(block) {
        return block[..count].iter().for_each(|id| prost::encoding::encode_varint(u64::from(*id), packed));
    }
    // first all of them, which has no branches and no order, then one behind the other
    let mut words = [0; AT_ONCE];
    let mut lengths = [0; AT_ONCE];
    for ((id, word), length) in block.iter().zip(&mut words).zip(&mut lengths) {
        let (two, three) = (u32::from(*id >= 1 << 7), u32::from(*id >= 1 << 14));
        *word = (id & 0x7f) | ((id << 1) & 0x7f00) | ((id << 2) & 0x7f_0000) | (two << 7) | (three << 15);
        *length = 1 + two + three;
    }
    // each is written as four bytes, of which the next one covers what is too much
    let mut bytes = [0; BLOCK_BYTES + 4];
    let mut end = 0;
    for (word, length) in words[..count].iter().zip(&lengths) {
        // the end is never beyond a block's bytes: that the remainder says so spares a look at the bound
        let begin = end % BLOCK_BYTES;
        bytes[begin..begin + 4].copy_from_slice(&word.to_le_bytes());
        end += *length as usize;
    }
    packed.extend_from_slice(&bytes[..end]);
}

/// The token IDs of varints that [`pack`] wrote.
pub(super) fn unpack(packed: &[u8]) -> impl Iterator<Item = u32> + '_ {
    let mut bytes = packed.iter();
    std::iter::from_fn(move || {
        let first = *bytes.next()?;
        let mut id = u32::from(first & 0x7f);
        let (mut last, mut shift) = (first, 7);
        while last >= 0x80 {
            last = *bytes.next()?;
            id |= u32::from(last & 0x7f) << shift;
            shift += 7;
        }
        Some(id)
    })
}

/// The token IDs of a prompt, packed, in segments that may be parts of what is kept of a conversation.
#[derive(Clone, Debug, Default)]
pub struct PackedIds {
    segments: Vec<Bytes>,
    count: usize,
    size: usize,
}

impl PackedIds {
    /// Packs token IDs.
    pub fn of(ids: &[u32]) -> Self {
        let packed = Bytes::from(pack(ids));
        Self { count: ids.len(), size: packed.len(), segments: vec![packed] }
    }

    /// Number of token IDs.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Bytes of all segments.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The bytes, one segment behind the other.
    pub fn segments(&self) -> &[Bytes] {
        &self.segments
    }

    /// The token IDs.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.segments.iter().flat_map(|segment| unpack(segment))
    }
}

impl PartialEq for PackedIds {
    /// The same token IDs, whatever the segments.
    fn eq(&self, other: &Self) -> bool {
        self.count == other.count && self.iter().eq(other.iter())
    }
}

/// As a list of numbers.
impl Serialize for PackedIds {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.iter())
    }
}

/// Puts a prompt together from packed turns.
#[derive(Default)]
pub(super) struct Packer {
    ids: PackedIds,
    /// Small segments, copied.
    small: Vec<u8>,
}

impl Packer {
    /// Appends `count` token IDs.
    pub(super) fn push(&mut self, packed: &Bytes, count: usize) {
        self.ids.count += count;
        self.ids.size += packed.len();
        if packed.len() < SHARED_FROM {
            self.small.extend_from_slice(packed);
            return;
        }
        self.end_small();
        self.ids.segments.push(packed.clone());
    }

    /// Ids so far.
    pub(super) fn len(&self) -> usize {
        self.ids.count
    }

    /// All of it.
    pub(super) fn finish(mut self) -> PackedIds {
        self.end_small();
        self.ids
    }

    fn end_small(&mut self) {
        if !self.small.is_empty() {
            self.ids.segments.push(std::mem::take(&mut self.small).into());
        }
    }
}

/// Ids packed as one, with the bytes of each of some parts of them. Parts stand in their order and do not overlap.
pub(super) fn pack_with_parts(ids: &[u32], parts: impl Iterator<Item = Range<usize>>) -> (Bytes, Vec<Range<usize>>) {
    let mut packed = Vec::with_capacity(packed_length(ids));
    let mut ranges = Vec::new();
    let mut done = 0;
    for part in parts {
        pack_into(&ids[done..part.start], &mut packed);
        let begin = packed.len();
        pack_into(&ids[part.clone()], &mut packed);
        ranges.push(begin..packed.len());
        done = part.end;
    }
    pack_into(&ids[done..], &mut packed);
    (packed.into(), ranges)
}

#[cfg(test)]
mod tests {
    use bora_proto::v1::GenerateRequest;
    use prost::Message as _;

    use super::*;

    /// Ids at the edges of every length of a varint, alone, among others and many.
    fn samples() -> Vec<Vec<u32>> {
        let edges = [0, 1, 127, 128, 16_383, 16_384, 131_071, (1 << 21) - 1];
        let many: Vec<u32> = (0..10_000).map(|at| edges[at % edges.len()] ^ (at as u32 & 1)).collect();
        let large = [vec![5, 200], vec![1 << 21, u32::MAX], vec![7; 100]].concat();
        let longest = vec![(1 << 21) - 1; AT_ONCE];
        let five = vec![(1 << 28) - 1, 1 << 28];
        let blocks = [AT_ONCE - 1, AT_ONCE, AT_ONCE + 1, 2 * AT_ONCE + 3].map(|length| many[..length].to_vec());
        let single = vec![Vec::new(), vec![3], edges.to_vec(), many, large, longest, five, vec![u32::MAX; 50]];
        single.into_iter().chain(blocks).collect()
    }

    /// The general encoder's bytes, whatever the token IDs.
    #[test]
    fn packed_ids_are_protobufs() {
        for ids in samples() {
            let request = GenerateRequest { token_ids: ids.clone(), ..GenerateRequest::default() };
            let packed = pack(&ids);
            assert_eq!(packed.len(), packed_length(&ids));
            let mut bytes = Vec::new();
            if !packed.is_empty() {
                bytes.push(2 << 3 | 2); // field 2, length-delimited
                prost::encoding::encode_varint(packed.len() as u64, &mut bytes);
                bytes.extend_from_slice(&packed);
            }
            assert_eq!(bytes, request.encode_to_vec());
        }
    }

    #[test]
    fn what_was_packed_comes_out_again() {
        for ids in samples() {
            let packed = PackedIds::of(&ids);
            assert_eq!((packed.len(), packed.size()), (ids.len(), pack(&ids).len()));
            assert!(packed.iter().eq(ids.iter().copied()));
            assert_eq!(serde_json::to_string(&packed).expect("JSON"), serde_json::to_string(&ids).expect("JSON"));
        }
    }

    /// Long turns are shared and short ones copied; the token IDs are those of all of them.
    #[test]
    fn turns_are_put_together() {
        let turns: Vec<Vec<u32>> = [10, 20, 5_000, 1, 6_000, 7_000, 3, 4].map(|length| (0..length).collect()).to_vec();
        let mut packer = Packer::default();
        let turns_packed: Vec<Bytes> = turns.iter().map(|turn| pack(turn).into()).collect();
        turns.iter().zip(&turns_packed).for_each(|(turn, packed)| packer.push(packed, turn.len()));
        assert_eq!(packer.len(), turns.concat().len());
        let ids = packer.finish();
        assert_eq!(ids, PackedIds::of(&turns.concat()));
        assert_eq!(ids.segments().concat(), pack(&turns.concat()));
        assert_eq!(ids.size(), pack(&turns.concat()).len());
        let shared =
            ids.segments().iter().filter(|segment| turns_packed.iter().any(|turn| turn.as_ptr() == segment.as_ptr()));
        assert_eq!((ids.segments().len(), shared.count()), (6, 3));
    }

    #[test]
    fn parts_are_found_among_the_rest() {
        for ids in samples() {
            let third = ids.len() / 3;
            let parts = [0..third, third..third, third + third / 2..ids.len()];
            let (packed, ranges) = pack_with_parts(&ids, parts.iter().cloned());
            assert_eq!(packed, pack(&ids));
            for (part, range) in parts.into_iter().zip(ranges) {
                assert_eq!(packed[range], pack(&ids[part]));
            }
        }
    }
}
