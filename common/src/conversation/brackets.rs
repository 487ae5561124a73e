//! Where a JSON text that comes in chunks ends: the bracket that closes its first one.

/// Follows the brackets of one JSON object or array.
#[derive(Clone, Debug, Default)]
pub(super) struct Brackets {
    begun: bool,
    /// The text begins with no bracket: nothing closes it.
    is_other: bool,
    depth: usize,
    in_string: bool,
    is_escaped: bool,
}

impl Brackets {
    /// Reads one more chunk. Returns where the text ends in it, if it does: right behind the closing bracket.
    pub(super) fn close_at(&mut self, text: &str) -> Option<usize> {
        if self.is_other {
            return None;
        }
        for (index, byte) in text.bytes().enumerate() {
            if !self.begun {
                if byte.is_ascii_whitespace() {
                    continue;
                }
                self.begun = true;
                if !matches!(byte, b'{' | b'[') {
                    self.is_other = true;
                    return None;
                }
            }
            if self.in_string {
                match byte {
                    _ if self.is_escaped => self.is_escaped = false,
                    b'\\' => self.is_escaped = true,
                    b'"' => self.in_string = false,
                    _ => {}
                }
                continue;
            }
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        return Some(index + 1);
                    }
                }
                _ => {}
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The end is found wherever the text is split.
    #[test]
    fn finds_the_end_over_every_split() {
        for (text, end) in [
            ("{} behind", Some(2)),
            (r#" {"a": ["}", {"b": "\"]"}]}x"#, Some(27)),
            ("[1, [2]]}", Some(8)),
            (r#"{"a": "b"#, None),
            ("```{}", None),
            ("", None),
        ] {
            for split in (0..=text.len()).filter(|at| text.is_char_boundary(*at)) {
                let mut brackets = Brackets::default();
                let (first, second) = text.split_at(split);
                let found = brackets.close_at(first).or_else(|| brackets.close_at(second).map(|at| split + at));
                assert_eq!(found, end, "{first:?} {second:?}");
            }
        }
    }
}
