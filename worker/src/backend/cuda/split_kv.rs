//! How the keys of a step's decoded rows are shared out over the GPU: all items' blocks, one after the other, are cut into as many
//! equal parts as thread blocks run at once. A long context among short ones takes as many parts as it has keys for.

/// Some rows of one sequence and the blocks of keys that they read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share {
    pub(super) first_row: u32,
    /// 0: nothing to do, and no blocks.
    pub(super) rows: u32,
    pub(super) blocks: u32,
}

/// Words of an item (`DecodeItem` of attention_decode.cu) and of a part (`DecodePart`).
pub(super) const ITEM_WORDS: usize = 5;
pub(super) const PART_WORDS: usize = 2;

/// Writes the items to `item_words` and `parts` + 1 parts to `part_words`.
pub(super) fn share_out(items: &[Share], parts: usize, item_words: &mut [u32], part_words: &mut [u32]) {
    let total: u64 = items.iter().map(|item| u64::from(item.blocks)).sum();
    let used = used_parts(total, items.iter().filter(|item| item.blocks > 0).count(), parts);
    let begin_of = |part: u64| total * part.min(used) / used;
    // the part that has a block
    let part_of = |block: u64| ((block + 1) * used - 1) / total.max(1);
    let (mut begin, mut part) = (0, 0);
    for (number, (item, words)) in items.iter().zip(item_words.as_chunks_mut::<ITEM_WORDS>().0).enumerate() {
        let end = begin + u64::from(item.blocks);
        let (first_part, count) = match item.blocks {
            0 => (0, 0),
            _ => (part_of(begin), part_of(end - 1) - part_of(begin) + 1),
        };
        *words = [item.first_row, item.rows, begin as u32, first_part as u32, count as u32];
        while part < used && begin_of(part) < end {
            part_words[part as usize * PART_WORDS..][..PART_WORDS]
                .copy_from_slice(&[begin_of(part) as u32, number as u32]);
            part += 1;
        }
        begin = end;
    }
    for words in part_words[part as usize * PART_WORDS..(parts + 1) * PART_WORDS].as_chunks_mut::<PART_WORDS>().0 {
        *words = [total as u32, 0];
    }
}

/// Parts that are used: one for each block where blocks are few, and where it costs little as many for each item, so that items of the
/// same length begin with a part.
fn used_parts(total: u64, items: usize, parts: usize) -> u64 {
    let spare = parts % items.max(1);
    let even = if items <= parts && spare <= parts / 8 { parts - spare } else { parts };
    (even as u64).min(total).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every block of every item stands in exactly one part, and the items know which.
    fn check(blocks: &[u32], parts: usize) -> Vec<[u32; PART_WORDS]> {
        let items: Vec<Share> = blocks
            .iter()
            .enumerate()
            .map(|(row, blocks)| Share { first_row: row as u32, rows: 1, blocks: *blocks })
            .collect();
        let mut item_words = vec![u32::MAX; items.len() * ITEM_WORDS];
        let mut part_words = vec![u32::MAX; (parts + 1) * PART_WORDS];
        share_out(&items, parts, &mut item_words, &mut part_words);
        let items = item_words.as_chunks::<ITEM_WORDS>().0;
        let parts = part_words.as_chunks::<PART_WORDS>().0;
        let mut seen = vec![Vec::new(); items.len()];
        for (part, pair) in parts.windows(2).enumerate() {
            let (mut at, end, mut item) = (pair[0][0], pair[1][0], pair[0][1] as usize);
            while at < end {
                if blocks[item] == 0 {
                    item += 1;
                    continue;
                }
                let [_, _, begin, ..] = items[item];
                let last = (begin + blocks[item]).min(end);
                assert!(at >= begin && last > at, "part {part} begins in item {item}");
                seen[item].push((part as u32, at - begin, last - begin));
                (at, item) = (last, item + 1);
            }
        }
        for (number, (item, seen)) in items.iter().zip(&seen).enumerate() {
            assert_eq!(item[4] as usize, seen.len(), "parts of item {number}");
            let mut next = 0;
            for (index, (part, first, last)) in seen.iter().enumerate() {
                assert_eq!((*part, *first), (item[3] + index as u32, next), "item {number}");
                next = *last;
            }
            assert_eq!(next, blocks[number], "blocks of item {number}");
        }
        parts.to_vec()
    }

    #[test]
    fn every_block_has_its_part() {
        check(&[1], 33);
        check(&[16], 33);
        check(&[2048], 33);
        check(&[1, 1, 1], 1);
        check(&[0, 5, 0, 9, 0], 4);
        check(&[1600, 3, 17, 17, 1, 900], 33);
        check(&vec![17; 128], 33);
        check(&(1..200).collect::<Vec<u32>>(), 66);
    }

    #[test]
    fn nothing_is_shared_out_where_nothing_is_to_do() {
        let parts = check(&[0, 0], 8);
        assert!(parts.iter().all(|part| part[0] == 0));
    }

    #[test]
    fn items_of_one_length_begin_with_a_part() {
        for (items, parts) in [(4, 33), (8, 33), (16, 33), (32, 33)] {
            let shared = check(&vec![64; items], parts);
            for item in 0..items as u32 {
                assert!(shared.iter().any(|part| part[0] == item * 64), "{items} items, item {item}");
            }
        }
    }

    #[test]
    fn a_long_context_among_short_ones_takes_its_share() {
        let mut blocks = vec![4; 31];
        blocks.push(4096);
        let shared = check(&blocks, 33);
        let most = shared.windows(2).map(|pair| pair[1][0] - pair[0][0]).max();
        assert_eq!(most, Some((4096u32 + 31 * 4).div_ceil(32)));
    }
}
