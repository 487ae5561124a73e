//! Memory of grammars.
//!
//! llguidance does not count its tables exactly, so they are estimated from what llguidance counts.
//! `tests/grammar_memory.rs` compares the estimate with the allocator's count.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use llguidance::TokenParser;

/// Maximum bytes of the tables of one sequence's grammar.
pub const MAX_STATE_BYTES: usize = 32 << 20;
/// Maximum bytes of the tables of all sequences' grammars.
pub const MAX_LIVE_BYTES: usize = 1 << 30;

/// Bytes per unit of fuel: expressions, their derivatives and the tables that index them.
const BYTES_OF_FUEL: usize = 16;
/// Bytes per lexer state beside what the lexer counts.
const BYTES_OF_STATE: usize = 160;
/// Bytes per item of a parser row, with its share of the row.
const BYTES_OF_ITEM: usize = 32;
/// Bytes per byte of text: the lexer's stack and the text itself.
const BYTES_OF_TEXT_BYTE: usize = 48;
/// Minimum bytes of a parser.
const BYTES_OF_PARSER: usize = 64 << 10;

/// Estimated bytes of a parser whose rows hold `items` items.
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

/// Bytes of all states in use, as counted by [`LiveBytes`].
#[derive(Clone, Debug, Default)]
pub(super) struct TotalBytes(Arc<AtomicUsize>);

impl TotalBytes {
    pub(super) fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// Bytes of one state; they are subtracted from the total when it is dropped.
#[derive(Debug)]
pub(super) struct LiveBytes {
    total: TotalBytes,
    bytes: usize,
    /// Whether exceeding the total fails this state. Only one rank decides, because ranks must agree.
    is_judge: bool,
}

impl LiveBytes {
    pub(super) fn new(total: &TotalBytes, is_judge: bool) -> Self {
        Self { total: total.clone(), bytes: 0, is_judge }
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Records a new measurement; returns whether the state grew.
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
