//! What grammars take of the process's memory.
//!
//! llguidance does not count its tables exactly, so they are estimated from what it does count. The estimate is compared with
//! what the allocator gave in `tests/grammar_memory.rs`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use llguidance::TokenParser;

/// Bytes of the tables of one sequence's grammar.
pub const MAX_STATE_BYTES: usize = 32 << 20;
/// Bytes of the tables of all sequences' grammars.
pub const MAX_LIVE_BYTES: usize = 1 << 30;

/// Bytes of a unit of fuel: expressions, their derivatives and the tables that find them.
const BYTES_OF_FUEL: usize = 16;
/// Bytes of a state of the lexer besides what it counts.
const BYTES_OF_STATE: usize = 160;
/// Bytes of an item of a row of the parser, and its share of the row.
const BYTES_OF_ITEM: usize = 32;
/// Bytes of a byte of the text: the lexer's stack and the text itself.
const BYTES_OF_TEXT_BYTE: usize = 48;
/// What a parser takes at least.
const BYTES_OF_PARSER: usize = 64 << 10;

/// Estimated bytes of a parser whose rows have so many items.
pub(super) fn of_parser(parser: &TokenParser, items: usize) -> usize {
    let lexer = parser.parser.lexer_stats();
    let state = BYTES_OF_STATE + lexer.num_regexps.div_ceil(8);
    BYTES_OF_PARSER
        + 2 * lexer.num_bytes
        + BYTES_OF_FUEL * lexer.total_fuel_spent
        + lexer.num_states * state
        + BYTES_OF_ITEM * items
        + BYTES_OF_TEXT_BYTE * parser.final_bytes().len()
}

/// Bytes of everything that is in use, as counted by [`LiveBytes`].
#[derive(Clone, Debug, Default)]
pub(super) struct TotalBytes(Arc<AtomicUsize>);

impl TotalBytes {
    pub(super) fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// The share of one state, given back when it is dropped.
#[derive(Debug)]
pub(super) struct LiveBytes {
    total: TotalBytes,
    bytes: usize,
    /// Whether the total may fail the state: on one rank only, since ranks must agree.
    is_judge: bool,
}

impl LiveBytes {
    pub(super) fn new(total: &TotalBytes, is_judge: bool) -> Self {
        Self { total: total.clone(), bytes: 0, is_judge }
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Takes a new measurement; returns whether the state grew.
    pub(super) fn set(&mut self, bytes: usize) -> bool {
        let grew = bytes > self.bytes;
        if grew {
            self.total.0.fetch_add(bytes - self.bytes, Ordering::Relaxed);
        } else {
            self.total.0.fetch_sub(self.bytes - bytes, Ordering::Relaxed);
        }
        self.bytes = bytes;
        grew
    }

    pub(super) fn exceeds_total(&self) -> bool {
        self.is_judge && self.total.get() > MAX_LIVE_BYTES
    }
}

impl Drop for LiveBytes {
    fn drop(&mut self) {
        self.set(0);
    }
}
