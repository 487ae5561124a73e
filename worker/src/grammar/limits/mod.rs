//! Limits on the expansion of a grammar, checked before it is compiled.
//!
//! A few hundred bytes can occupy a compiler for minutes or fill its memory: terminals that refer to each other twice
//! double with every level, pattern properties are compared in pairs, `multipleOf` counts through remainders, and
//! optional properties cost the square of their number.
//!
//! - [`schema`] counts the contents of JSON schemas.
//! - [`lark`] counts the expansion of terminals.
//! - [`regex`] weighs regular expressions.
//! - [`merging`] counts the expansion of `allOf`s and references.
//!
//! All parts of one grammar share the limits of [`Counted`]. Combinations that these counts do not see (`allOf` of
//! `anyOf`s, references with siblings) are stopped by [`MAX_SYMBOLS`] and the fuel of the compilation.

mod lark;
mod merging;
mod regex;
mod schema;

use serde_json::Value;

use super::{GrammarError, GrammarKind};

/// Maximum bytes of a grammar's source.
pub const MAX_GRAMMAR_BYTES: usize = 256 * 1024;
/// Maximum symbols of a compiled grammar: 128 tools of 20 parameters fit.
pub(super) const MAX_SYMBOLS: usize = 25_000;
/// Maximum nesting of brackets; deeper nesting could overflow the stack of the grammar's own parser.
const MAX_NESTING: usize = 128;
/// Maximum nodes of the expansion of all terminals and regular expressions of a grammar.
const MAX_EXPANSION: u64 = 100_000;

/// Checks that a grammar is within its limits. The error names the limit that it exceeds.
pub(super) fn check(kind: GrammarKind, text: &str) -> Result<(), GrammarError> {
    let mut counted = Counted::default();
    match kind {
        GrammarKind::JsonSchema => {
            let schema: Value =
                serde_json::from_str(text).map_err(|error| GrammarError(format!("it is no JSON: {error}")))?;
            counted.schema(&schema)
        }
        GrammarKind::Regex => counted.regex(text).map(drop),
        GrammarKind::Lark => {
            if nesting(text) > MAX_NESTING {
                return Err(GrammarError(format!("its brackets are nested more than {MAX_NESTING} deep")));
            }
            lark::check(text, &mut counted)
        }
    }
}

/// The maximum nesting of brackets, wherever they occur.
fn nesting(text: &str) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    deepest
}

/// Counts of the parts of one grammar so far.
#[derive(Default)]
struct Counted {
    schemas: schema::Counts,
    regexes: regex::Counts,
    expansion: u64,
}

impl Counted {
    /// Counts a JSON schema.
    fn schema(&mut self, schema: &Value) -> Result<(), GrammarError> {
        let mut patterns = Vec::new();
        self.schemas.add(schema, "", &mut patterns)?;
        merging::check(schema)?;
        patterns.into_iter().try_for_each(|pattern| self.regex(pattern).map(drop))
    }

    /// Counts a regular expression; returns its nodes.
    fn regex(&mut self, pattern: &str) -> Result<u64, GrammarError> {
        let nodes = self.regexes.weigh(pattern)?;
        self.expand(nodes)?;
        Ok(nodes)
    }

    /// Adds nodes of the lexer.
    fn expand(&mut self, nodes: u64) -> Result<(), GrammarError> {
        self.expansion = self.expansion.saturating_add(nodes);
        if self.expansion > MAX_EXPANSION {
            let reason = format!("its terminals and regular expressions expand to more than {MAX_EXPANSION} nodes");
            return Err(GrammarError(reason));
        }
        Ok(())
    }
}

fn at_most(what: &str, count: usize, limit: usize) -> Result<(), GrammarError> {
    if count > limit { Err(GrammarError(format!("it has more than {limit} {what}"))) } else { Ok(()) }
}
