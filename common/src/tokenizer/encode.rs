//! Text to token IDs. The one place that knows which library does it.

use std::convert::Infallible;

/// The encoder of one tokenizer file.
pub(super) enum Encoder {
    /// Byte-pair encoding over ranks, and what to add to a rank to get its id.
    Ranks {
        /// The library's tokenizer.
        tokenizer: Box<fastokens::Tokenizer>,
        /// Id of rank 0.
        first_id: u32,
        /// Whether a text may be cut in front of certain lines: see [`segment`].
        cuts_at_lines: bool,
    },
    /// A `tokenizer.json` of any kind.
    HuggingFace(Box<tokenizers::Tokenizer>),
}

impl Encoder {
    /// `ranks` in order of their rank; `pattern` splits text into words; id = `first_id` + rank.
    pub(super) fn from_ranks(ranks: Vec<Vec<u8>>, pattern: &str, first_id: u32) -> Result<Self, String> {
        let ranks: Vec<(Vec<u8>, u32)> = ranks.into_iter().zip(0..).collect();
        let config = fastokens::TiktokenConfig::new(pattern, Vec::new());
        let tokenizer = fastokens::Tokenizer::from_tiktoken_ranks(&ranks, config).map_err(|error| error.to_string())?;
        Ok(Self::Ranks { tokenizer: Box::new(tokenizer), first_id, cuts_at_lines: pattern == TEKKEN_PATTERN })
    }

    pub(super) fn encode_into(&self, text: &str, ids: &mut Vec<u32>) {
        match self.encode_checked(text, ids, || Ok::<(), Infallible>(())) {
            Ok(()) => {}
            Err(never) => match never {},
        }
    }

    /// Asks `may_go_on` before each part of the text, and ends with its error.
    pub(super) fn encode_checked<E>(
        &self,
        text: &str,
        ids: &mut Vec<u32>,
        mut may_go_on: impl FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        match self {
            Self::Ranks { tokenizer, first_id, cuts_at_lines } => {
                let mut rest = text;
                while !rest.is_empty() {
                    may_go_on()?;
                    let end = if *cuts_at_lines { segment(rest) } else { rest.len() };
                    let (segment, behind) = rest.split_at(end);
                    rest = behind;
                    match tokenizer.encode_ordinary(segment) {
                        Ok(ranks) => {
                            // what follows is likely to have as many token IDs a byte: the list moves once
                            let behind =
                                (ranks.len() + ranks.len() / 16) as f64 / segment.len() as f64 * rest.len() as f64;
                            ids.reserve(ranks.len() + behind as usize);
                            ids.extend(ranks.into_iter().map(|rank| rank + first_id));
                        }
                        Err(error) => tracing::error!(%error, "the tokenizer failed on a text"),
                    }
                }
            }
            Self::HuggingFace(tokenizer) => {
                may_go_on()?;
                match tokenizer.encode_fast(text, false) {
                    Ok(encoding) => ids.extend_from_slice(encoding.get_ids()),
                    Err(error) => tracing::error!(%error, "the tokenizer failed on a text"),
                }
            }
        }
        Ok(())
    }
}

/// The pattern of every `tekken.json` so far. No word that it matches goes from a line break on to a letter, or to
/// spaces before one, so the words of two texts that meet there are those of both together: a line break is the last of
/// its word unless another one or a slash follows, at once or behind white space.
const TEKKEN_PATTERN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// From this length on the library spreads a text over threads of its own, which take processors from whoever
/// serves requests and spin for a while after each text.
const LIBRARY_SPREADS_FROM: usize = 64 << 10;

/// Length of the first segment of a text that may be encoded by itself.
fn segment(text: &str) -> usize {
    if text.len() < LIBRARY_SPREADS_FROM {
        return text.len();
    }
    let bytes = &text.as_bytes()[..LIBRARY_SPREADS_FROM - 1];
    // from behind: what the line that begins at `end` begins with, behind its spaces and tabs
    let mut first = None;
    for (before, byte) in bytes.iter().enumerate().rev() {
        match byte {
            b'\n' if first.is_some_and(|first: u8| first.is_ascii_alphabetic()) => return before + 1,
            b' ' | b'\t' => {}
            other => first = Some(*other),
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The token IDs of a text that is not cut.
    fn whole_of(library: &fastokens::Tokenizer, first_id: u32, text: &str) -> Vec<u32> {
        library.encode_ordinary(text).expect("ids").into_iter().map(|rank| rank + first_id).collect()
    }

    /// Lines of everything that stands beside a line break in real text, cut and not cut.
    #[test]
    fn pieces_give_the_ids_of_the_whole() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/tokenizers/tekken-v13-8k.json");
        let tokenizer = crate::tokenizer::Tokenizer::from_file(path).expect("a tokenizer");
        let ends = ["", " ", "  ", ";", "{/", "}\r", "\t", "\n\n", " \n", "é", "\u{301}", "9", "//", "\u{2028}", "..."];
        let begins = [
            "a",
            "Z",
            " a",
            "\tx",
            "é",
            "1",
            "/",
            "\n",
            "\r\n",
            "ab",
            "_",
            "\u{301}a",
            "    b",
            " \t c",
            "  /d",
            " \n e",
            "  \u{301}f",
        ];
        let mut text = String::new();
        let mut state = 7u64;
        while text.len() < 3 * LIBRARY_SPREADS_FROM {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            text.push_str(begins[(state >> 33) as usize % begins.len()]);
            text.push_str("let x = 1");
            text.push_str(ends[(state >> 45) as usize % ends.len()]);
            text.push('\n');
        }
        let Encoder::Ranks { tokenizer: library, first_id, cuts_at_lines: true } = &tokenizer.encoder else {
            panic!("the fixture has the pattern of tekken");
        };
        assert!(segment(&text) < LIBRARY_SPREADS_FROM);
        let indented = format!("{}x", "    let y = 2; // \n\t  \t\n \n\n    \t".repeat(LIBRARY_SPREADS_FROM / 20));
        assert!(segment(&indented) < LIBRARY_SPREADS_FROM, "code is indented");
        assert_eq!(tokenizer.encode(&indented), whole_of(library, *first_id, &indented));
        assert_eq!(tokenizer.encode(&text), whole_of(library, *first_id, &text));
        let endless = "x".repeat(LIBRARY_SPREADS_FROM + 5);
        assert_eq!(segment(&endless), endless.len());
    }
}
