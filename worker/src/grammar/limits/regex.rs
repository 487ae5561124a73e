//! The weight of a regular expression: nodes of the lexer that it is built of, before anything is derived from it.
//!
//! The lexer makes one node of up to 31 literal bytes, of a repetition whatever its bounds, and of each range of bytes that a
//! class of characters is written with in UTF-8. `\w` alone is more than 2,000 nodes; equal classes share theirs.

use std::collections::HashSet;

use regex_syntax::ParserBuilder;
use regex_syntax::hir::{Class, Hir, HirKind};

use super::{GrammarError, at_most};

/// Bytes of one regular expression, and of all.
const MAX_REGEXES_BYTES: usize = 64 * 1024;
/// Classes such as `\w` in one regular expression: each is a table of some kilobytes while it is parsed.
const MAX_CLASS_ESCAPES: usize = 1_000;
/// Literal bytes of a node.
const LITERAL_BYTES: usize = 31;
/// Nodes of a range of characters.
const NODES_OF_RANGE: u64 = 4;

/// What all regular expressions of a grammar hold so far.
#[derive(Default)]
pub(super) struct Counts {
    bytes: usize,
    /// Hashes of the classes that have their nodes already.
    classes: HashSet<Vec<(char, char)>>,
}

impl Counts {
    /// Counts one more; returns its nodes. One that is malformed is left to the compiler to refuse.
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
    fn repetitions_are_one_node_and_equal_classes_are_counted_once() {
        let weigh = |pattern: &str| Counts::default().weigh(pattern).unwrap();
        assert!(weigh("(a{0,1000}){0,1000}") < 10);
        let word = weigh(r"\w");
        assert!(word > 1_000, "{word}");
        assert!(weigh(r"\w+@\w+") < word + 10);
        assert!(weigh(r"[\w--a][\w--b]") > 2 * word - 100);
        assert_eq!(weigh("("), 1, "the compiler's to refuse");
    }

    #[test]
    fn long_regular_expressions_are_refused() {
        for hostile in ["a".repeat(MAX_REGEXES_BYTES + 1), r"\w".repeat(MAX_CLASS_ESCAPES + 1)] {
            assert!(Counts::default().weigh(&hostile).is_err());
        }
    }
}
