//! How the prompts of a step are cut into tiles of attention, and in how many passes they are computed.

use super::step::TILE_ROWS;

/// Words of a tile and of a prompt as the kernels read them (attention_prefill.cu, `transpose_values`).
pub(super) const TILE_WORDS: usize = 4;
pub(super) const PROMPT_WORDS: usize = 3;
/// Keys that the kernel for Hopper goes through at a time (`ROUND` in attention_prefill_hopper.cu).
pub(super) const ROUND_TOKENS: usize = 128;

/// A chunk of a sequence's prompt.
#[derive(Clone, Copy, Debug)]
pub(super) struct Prompt {
    /// Its number in the batch.
    pub(super) sequence: usize,
    pub(super) first_row: usize,
    pub(super) rows: usize,
    /// Where its block table begins among all tables.
    pub(super) table: usize,
    /// Tokens that it has in the cache after this step.
    pub(super) context: usize,
}

/// Prompts whose values are transposed at once where the kernel needs that, and their tiles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pass {
    pub(super) first_tile: usize,
    pub(super) tiles: usize,
    pub(super) first_prompt: usize,
    pub(super) prompts: usize,
    /// Rounds of transposed values.
    pub(super) rounds: usize,
}

/// What the kernels read, and the launches that read it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Tiles {
    pub(super) tiles: Vec<[u32; TILE_WORDS]>,
    pub(super) prompts: Vec<[u32; PROMPT_WORDS]>,
    pub(super) passes: Vec<Pass>,
}

/// Tiles that the rows of one chunk make at most.
pub(super) fn tiles_of(rows: usize, group: usize) -> usize {
    (rows * group).div_ceil(TILE_ROWS)
}

/// Cuts chunks into tiles of up to 128 (row, query head) pairs, `group` heads a row. `room`: rounds of values that can be transposed at
/// once, at least the longest sequence's; `None` where values are read as they lie, in one pass.
pub(super) fn cut(prompts: &[Prompt], group: usize, room: Option<usize>) -> Tiles {
    let mut cut = Tiles::default();
    let mut pass = Pass::default();
    // (keys that the tile's last row sees, tile)
    let mut tiles = Vec::new();
    let finish = |pass: &mut Pass, tiles: &mut Vec<(usize, [u32; TILE_WORDS])>, cut: &mut Tiles| {
        // longest first: the short ones fill the gaps at the end
        tiles.sort_by_key(|(seen, _)| std::cmp::Reverse(*seen));
        pass.tiles = tiles.len();
        if pass.tiles > 0 {
            cut.tiles.extend(tiles.drain(..).map(|(_, tile)| tile));
            cut.passes.push(*pass);
        }
        *pass = Pass { first_tile: cut.tiles.len(), first_prompt: cut.prompts.len(), ..Pass::default() };
    };
    for prompt in prompts {
        let rounds = prompt.context.div_ceil(ROUND_TOKENS);
        if room.is_some_and(|room| pass.rounds + rounds > room) {
            finish(&mut pass, &mut tiles, &mut cut);
        }
        let first_round = pass.rounds;
        if room.is_some() {
            cut.prompts.push([prompt.table as u32, prompt.context as u32, first_round as u32]);
            pass.prompts += 1;
            pass.rounds += rounds;
        }
        let pairs = prompt.rows * group;
        for offset in (0..pairs).step_by(TILE_ROWS) {
            let count = TILE_ROWS.min(pairs - offset);
            let seen = prompt.context - prompt.rows + (offset + count - 1) / group;
            let first = prompt.first_row * group + offset;
            tiles.push((seen, [prompt.sequence as u32, first as u32, count as u32, first_round as u32]));
        }
    }
    finish(&mut pass, &mut tiles, &mut cut);
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(sequence: usize, first_row: usize, rows: usize, context: usize) -> Prompt {
        Prompt { sequence, first_row, rows, table: sequence * 100, context }
    }

    #[test]
    fn tiles_are_full_whatever_the_heads_and_the_longest_come_first() {
        // twelve heads a row: a tile ends within a row
        let cut = cut(&[prompt(0, 0, 40, 40), prompt(1, 40, 33, 5_000)], 12, None);
        assert_eq!(cut.passes, [Pass { tiles: 8, ..Pass::default() }]);
        assert!(cut.prompts.is_empty());
        assert_eq!(cut.tiles[0], [1, 480 + 384, 12, 0]);
        assert_eq!(cut.tiles[1], [1, 480 + 256, 128, 0]);
        assert_eq!(cut.tiles[4], [0, 384, 96, 0]);
        assert_eq!(cut.tiles.iter().map(|tile| tile[2]).sum::<u32>(), 73 * 12);
        assert_eq!(tiles_of(40, 12) + tiles_of(33, 12), 8);
    }

    #[test]
    fn what_does_not_fit_beside_the_others_is_transposed_in_a_pass_of_its_own() {
        let prompts = [prompt(0, 0, 32, 1_000), prompt(1, 32, 64, 300), prompt(2, 96, 32, 1_280), prompt(3, 128, 1, 1)];
        let cut = cut(&prompts, 4, Some(11));
        // 8 and 3 rounds; 10 and 1
        assert_eq!(
            cut.passes,
            [
                Pass { first_tile: 0, tiles: 3, first_prompt: 0, prompts: 2, rounds: 11 },
                Pass { first_tile: 3, tiles: 2, first_prompt: 2, prompts: 2, rounds: 11 },
            ]
        );
        assert_eq!(cut.prompts, [[0, 1_000, 0], [100, 300, 8], [200, 1_280, 0], [300, 1, 10]]);
        assert_eq!(cut.tiles, [[0, 0, 128, 0], [1, 256, 128, 8], [1, 128, 128, 8], [2, 384, 128, 0], [3, 512, 4, 10]]);
    }

    #[test]
    fn nothing_makes_no_pass() {
        assert_eq!(cut(&[], 4, Some(8)), Tiles::default());
    }
}
