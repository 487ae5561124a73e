//! Token ids as they go to a group: packed varints, as protobuf has them. Through a general encoder, one call each,
//! the ids of a long conversation cost more than everything else that the router does with it. They are packed
//! here in one pass, branch-free for ids that real vocabularies have, and kept with the turns that they are of, so
//! that a conversation that grew is put together from bytes.

/// Varints one after the other.
pub fn pack(ids: &[u32]) -> Vec<u8> {
    // three bytes hold any id below two million
    let mut packed = vec![0; ids.len() * 3 + 8];
    let mut end = 0;
    for (number, id) in ids.iter().enumerate() {
        let id = *id;
        let Some(place) = packed.get_mut(end..end + 4).filter(|_| id < 1 << 21) else {
            return pack_large(ids, packed, number, end);
        };
        let more = (u32::from(id >= 1 << 7) << 7) | (u32::from(id >= 1 << 14) << 15);
        let word = (id & 0x7f) | ((id << 1) & 0x7f00) | ((id << 2) & 0x7f_0000) | more;
        place.copy_from_slice(&word.to_le_bytes());
        end += 1 + usize::from(id >= 1 << 7) + usize::from(id >= 1 << 14);
    }
    packed.truncate(end);
    packed
}

/// Goes on from number `from` with ids of any size.
fn pack_large(ids: &[u32], mut packed: Vec<u8>, from: usize, end: usize) -> Vec<u8> {
    packed.truncate(end);
    for id in &ids[from..] {
        prost::encoding::encode_varint(u64::from(*id), &mut packed);
    }
    packed
}

#[cfg(test)]
mod tests {
    use bora_proto::v1::GenerateRequest;
    use prost::Message as _;

    use super::*;

    /// The general encoder's bytes, whatever the ids.
    #[test]
    fn packed_ids_are_protobufs() {
        let edges = [0, 1, 127, 128, 16_383, 16_384, 131_071, (1 << 21) - 1];
        let many: Vec<u32> = (0..10_000).map(|at| edges[at % edges.len()] ^ (at as u32 & 1)).collect();
        let large = [vec![5, 200], vec![1 << 21, u32::MAX], vec![7; 100]].concat();
        for ids in [Vec::new(), vec![3], edges.to_vec(), many, large, vec![u32::MAX; 50]] {
            let request = GenerateRequest { token_ids: ids.clone(), ..GenerateRequest::default() };
            let packed = pack(&ids);
            let mut bytes = Vec::new();
            if !packed.is_empty() {
                bytes.push(2 << 3 | 2); // field 2, length-delimited
                prost::encoding::encode_varint(packed.len() as u64, &mut bytes);
                bytes.extend_from_slice(&packed);
            }
            assert_eq!(bytes, request.encode_to_vec());
        }
    }
}
