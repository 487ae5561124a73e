//! Cache of compiled and refused grammars, bounded by bytes.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Compiled, GrammarError, GrammarSource};

/// Maximum estimated bytes of cached compiled grammars.
const MAX_KEPT_BYTES: usize = 128 << 20;
/// Maximum bytes of cached refused grammars and reasons.
const MAX_REFUSED_BYTES: usize = 8 << 20;
/// Bytes of an entry beside its text.
const BYTES_OF_ENTRY: usize = 256;

/// Cached outcomes of compilations.
pub(super) struct Kept {
    compiled: Lru<Arc<Compiled>>,
    refused: Lru<GrammarError>,
}

impl Default for Kept {
    fn default() -> Self {
        Self { compiled: Lru::new(MAX_KEPT_BYTES), refused: Lru::new(MAX_REFUSED_BYTES) }
    }
}

impl Kept {
    pub(super) fn get(&mut self, source: &GrammarSource) -> Option<Result<Arc<Compiled>, GrammarError>> {
        self.compiled.get(source).map(Ok).or_else(|| self.refused.get(source).map(Err))
    }

    pub(super) fn add(&mut self, source: &GrammarSource, outcome: &Result<Arc<Compiled>, GrammarError>) {
        match outcome {
            // a grammar that a sequence holds is never evicted
            Ok(compiled) => {
                let bytes = compiled.bytes();
                self.compiled.add(source, compiled.clone(), bytes, |held| Arc::strong_count(held) == 1);
            }
            Err(error) => self.refused.add(source, error.clone(), error.0.len(), |_| true),
        }
    }
}

/// Values by their last use, bounded by bytes.
struct Lru<V> {
    limit: usize,
    bytes: usize,
    uses: u64,
    entries: HashMap<GrammarSource, Entry<V>>,
}

struct Entry<V> {
    value: V,
    bytes: usize,
    last_use: u64,
}

impl<V: Clone> Lru<V> {
    fn new(limit: usize) -> Self {
        Self { limit, bytes: 0, uses: 0, entries: HashMap::new() }
    }

    fn get(&mut self, source: &GrammarSource) -> Option<V> {
        self.uses += 1;
        let entry = self.entries.get_mut(source)?;
        entry.last_use = self.uses;
        Some(entry.value.clone())
    }

    /// Adds a value and evicts the least recently used values that `may_go` until all fit.
    fn add(&mut self, source: &GrammarSource, value: V, value_bytes: usize, may_go: impl Fn(&V) -> bool) {
        self.uses += 1;
        let bytes = BYTES_OF_ENTRY + source.text.len() + value_bytes;
        let entry = Entry { value, bytes, last_use: self.uses };
        self.bytes += bytes;
        if let Some(replaced) = self.entries.insert(source.clone(), entry) {
            self.bytes -= replaced.bytes;
        }
        while self.bytes > self.limit {
            let oldest = self.entries.iter().filter(|(_, entry)| may_go(&entry.value)).min_by_key(|(_, e)| e.last_use);
            let Some(oldest) = oldest.map(|(source, _)| source.clone()) else { return };
            if let Some(entry) = self.entries.remove(&oldest) {
                self.bytes -= entry.bytes;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::GrammarKind;
    use super::*;

    fn source(number: usize) -> GrammarSource {
        GrammarSource { kind: GrammarKind::Regex, text: format!("{number:>744}") }
    }

    #[test]
    fn keeps_recently_used_grammars_within_the_limit() {
        let mut kept = Lru::new(10_000);
        for number in 0..5 {
            kept.add(&source(number), number, 1_000, |_| true);
        }
        assert_eq!(kept.bytes, 10_000);
        assert_eq!(kept.get(&source(0)), Some(0));
        kept.add(&source(5), 5, 1_000, |_| true);
        assert_eq!(kept.get(&source(1)), None, "the oldest was evicted");
        assert_eq!((kept.get(&source(0)), kept.get(&source(5))), (Some(0), Some(5)));
        kept.add(&source(5), 6, 2_000, |held| *held != 0);
        assert_eq!((kept.get(&source(0)), kept.get(&source(5)), kept.bytes), (Some(0), Some(6), 9_000));
        kept.add(&source(7), 7, 50_000, |held| *held == 7);
        assert_eq!(kept.get(&source(7)), None, "too large to be kept");
        assert_eq!(kept.bytes, 9_000);
    }
}
