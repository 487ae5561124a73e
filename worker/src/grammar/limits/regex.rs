//! The weight of a regular expression: its nodes in the lexer, before any derivatives.
//!
//! The lexer makes one node of up to 31 literal bytes, one of a repetition whatever its bounds, and one of each byte
//! range that encodes a character class in UTF-8. `\w` alone takes more than 2,000 nodes; equal classes share their
//! nodes.

use std::collections::HashSet;

use regex_syntax::ParserBuilder;
use regex_syntax::hir::{Class, Hir, HirKind};

use super::{GrammarError, at_most};

/// Maximum bytes of one regular expression, and of all.
const MAX_REGEXES_BYTES: usize = 64 * 1024;
/// Maximum classes such as `\w` in one regular expression: each is a table of some kilobytes while it is parsed.
const MAX_CLASS_ESCAPES: usize = 1_000;
/// Literal bytes per node.
const LITERAL_BYTES: usize = 31;
/// Nodes per range of characters.
const NODES_OF_RANGE: u64 = 4;

/// Counts of all regular expressions of a grammar so far.
#[derive(Default)]
pub(super) struct Counts {
    bytes: usize,
    /// Classes whose nodes are already counted.
    classes: HashSet<Vec<(char, char)>>,
}

impl Counts {
    /// Counts a regular expression; returns its nodes. The compiler refuses malformed ones.
    pub(super) fn weigh(&mut self, pattern: &str) -> Result<u64, GrammarError> {
        self.bytes += pattern.len();
        at_most("bytes in all regular expressions", self.bytes, MAX_REGEXES_BYTES)?;
        let escapes = pattern.as_bytes().windows(2).filter(|pair| {
            pair[0] == b'\\' && matches!(pair[1], b'd' | b'D' | b's' | b'S' | b'w' | b'W' | b'p' | b'P')
        });
        at_most("classes such as `\\w` in a regular expression", escapes.count(), MAX_CLASS_ESCAPES)?;
        match ParserBuilder::new().utf8(false).build().parse(pattern) {
            Ok(parsed) => Ok(self.nodes(&parsed)),
            Err(_) => Ok(pattern.len() as u64),
        }
    }

    fn nodes(&mut self, parsed: &Hir) -> u64 {
        let mut nodes = 0;
        let mut rest = vec![parsed];
        while let Some(part) = rest.pop() {
            nodes += 1;
            match part.kind() {
                HirKind::Literal(literal) => nodes += (literal.0.len() / LITERAL_BYTES) as u64,
                HirKind::Class(Class::Unicode(class)) => {
                    let ranges: Vec<_> = class.ranges().iter().map(|range| (range.start(), range.end())).collect();
                    let count = ranges.len() as u64;
                    if self.classes.insert(ranges) {
                        nodes += NODES_OF_RANGE * count;
                    }
                }
                _ => {}
            }
            rest.extend(part.kind().subs());
        }
        nodes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_repetitions_and_equal_classes_once() {
        let weigh = |pattern: &str| Counts::default().weigh(pattern).unwrap();
        assert!(weigh("(a{0,1000}){0,1000}") < 10);
        let word = weigh(r"\w");
        assert!(word > 1_000, "{word}");
        assert!(weigh(r"\w+@\w+") < word + 10);
        assert!(weigh(r"[\w--a][\w--b]") > 2 * word - 100);
        assert_eq!(weigh("("), 1, "refused by the compiler");
    }

    #[test]
    fn rejects_long_regular_expressions() {
        for hostile in ["a".repeat(MAX_REGEXES_BYTES + 1), r"\w".repeat(MAX_CLASS_ESCAPES + 1)] {
            assert!(Counts::default().weigh(&hostile).is_err());
        }
    }
}
