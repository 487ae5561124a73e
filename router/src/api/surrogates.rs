//! Halves of surrogate pairs in a JSON body.
//!
//! JavaScript's strings are UTF-16: an agent that cuts one may cut a character in two, and `JSON.stringify` writes what is
//! left as an escape (`"\ud83d"`). The reference reads it as U+FFFD, `serde_json` refuses the whole body. So it is
//! replaced before anything is read, by an escape of the same length.

use std::borrow::Cow;

use memchr::memmem;

/// Bytes of an escape.
const ESCAPE: usize = r"\uFFFD".len();
const REPLACEMENT: &[u8] = br"\uFFFD";

/// The body with U+FFFD in place of each half of a pair. It is copied only if there is one.
pub fn replace_halves(body: &[u8]) -> Cow<'_, [u8]> {
    let mut replaced = Cow::Borrowed(body);
    let mut second_of_pair = None;
    for at in memmem::find_iter(body, br"\u") {
        if Some(at) == second_of_pair || is_escaped(body, at) {
            continue;
        }
        match code_unit(body, at) {
            Some(0xD800..=0xDBFF) if matches!(code_unit(body, at + ESCAPE), Some(0xDC00..=0xDFFF)) => {
                second_of_pair = Some(at + ESCAPE);
            }
            Some(0xD800..=0xDFFF) => replaced.to_mut()[at..at + ESCAPE].copy_from_slice(REPLACEMENT),
            _ => {}
        }
    }
    replaced
}

/// The same for a JSON text within a string.
pub fn replace_halves_of_text(text: &str) -> Cow<'_, str> {
    match replace_halves(text.as_bytes()) {
        Cow::Borrowed(_) => Cow::Borrowed(text),
        Cow::Owned(bytes) => String::from_utf8(bytes).map_or(Cow::Borrowed(text), Cow::Owned),
    }
}

/// Whether the backslash at this place is the character that another one escapes.
fn is_escaped(body: &[u8], at: usize) -> bool {
    body[..at].iter().rev().take_while(|byte| **byte == b'\\').count() % 2 == 1
}

/// The number in the `\uXXXX` at this place, if there is one.
fn code_unit(body: &[u8], at: usize) -> Option<u32> {
    let digits = body.get(at..at + ESCAPE)?.strip_prefix(br"\u")?;
    digits.iter().try_fold(0, |sum, digit| Some(sum * 16 + char::from(*digit).to_digit(16)?))
}

#[cfg(test)]
mod tests {
    use bora_common::conversation::Json;

    use super::*;

    #[test]
    fn halves_become_replacement_characters_and_nothing_else_changes() {
        for (written, read) in [
            (r#""\ud83d""#, "\u{fffd}"),
            (r#""\ude00 a""#, "\u{fffd} a"),
            (r#""\ud83d\ude00""#, "😀"),
            (r#""\uD83D\uDE00\uD83D""#, "😀\u{fffd}"),
            (r#""\ud83d\ud83d\ude00""#, "\u{fffd}😀"),
            (r#""\ud83d\u0041""#, "\u{fffd}A"),
            (r#""\ude00\ud83d""#, "\u{fffd}\u{fffd}"),
            (r#""\\ud83d""#, r"\ud83d"),
            (r#""\\\ud83d""#, "\\\u{fffd}"),
            (r#""\\\\ud83d""#, r"\\ud83d"),
            (r#""\u00e9\ud83dx""#, "é\u{fffd}x"),
        ] {
            let replaced = replace_halves_of_text(written);
            assert_eq!(serde_json::from_str::<String>(&replaced).expect(written), read);
            // as the conversation's own reader has it
            assert_eq!(Json::parse(written).expect(written).as_str(), Some(read));
            assert_eq!(matches!(replaced, Cow::Owned(_)), read.contains('\u{fffd}'), "{written}");
        }
    }

    /// What is no JSON stays what it is, also where an escape is cut off.
    #[test]
    fn broken_escapes_are_left_alone() {
        for body in [&br"\u"[..], br"\ud8", br"\ud83", br"\ud8zz", b"\\u\xff\xff\xff\xff", br"\\\\"] {
            assert_eq!(&*replace_halves(body), body);
        }
    }

    /// A run of backslashes is counted once for each escape that ends it.
    #[test]
    fn long_runs_of_backslashes_take_linear_time() {
        let body = [br"\".repeat(8 << 20), br"ud83d".to_vec()].concat();
        let begun = std::time::Instant::now();
        replace_halves(&body);
        assert!(begun.elapsed() < std::time::Duration::from_secs(10));
    }
}
