//! Halves of surrogate pairs in a JSON body.
//!
//! JavaScript strings are UTF-16: an agent that truncates a string may split a character, and `JSON.stringify` writes
//! the remaining half as an escape (`"\ud83d"`). The reference reads the half as U+FFFD, but `serde_json` rejects the
//! whole body. The escape is therefore replaced before parsing by an escape of the same length.

use std::borrow::Cow;

use memchr::memmem;

/// Bytes of an escape.
const ESCAPE: usize = r"\uFFFD".len();
const REPLACEMENT: &[u8] = br"\uFFFD";

/// Returns the body with U+FFFD in place of each unpaired half. The body is copied only if it has one.
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

/// Whether another backslash escapes the backslash at this index.
fn is_escaped(body: &[u8], at: usize) -> bool {
    body[..at].iter().rev().take_while(|byte| **byte == b'\\').count() % 2 == 1
}

/// The code unit of the `\uXXXX` at this index, if there is one.
fn code_unit(body: &[u8], at: usize) -> Option<u32> {
    let digits = body.get(at..at + ESCAPE)?.strip_prefix(br"\u")?;
    digits.iter().try_fold(0, |sum, digit| Some(sum * 16 + char::from(*digit).to_digit(16)?))
}

#[cfg(test)]
mod tests {
    use bora_common::conversation::Json;

    use super::*;

    #[test]
    fn replaces_only_unpaired_halves() {
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
            // like the conversation parser
            assert_eq!(Json::parse(written).expect(written).as_str(), Some(read));
            assert_eq!(matches!(replaced, Cow::Owned(_)), read.contains('\u{fffd}'), "{written}");
        }
    }

    /// Text that is not valid JSON stays unchanged, even if an escape is truncated.
    #[test]
    fn keeps_broken_escapes() {
        for body in [&br"\u"[..], br"\ud8", br"\ud83", br"\ud8zz", b"\\u\xff\xff\xff\xff", br"\\\\"] {
            assert_eq!(&*replace_halves(body), body);
        }
    }

    /// A run of backslashes is counted once for each escape at its end.
    #[test]
    fn long_runs_of_backslashes_take_linear_time() {
        let body = [br"\".repeat(8 << 20), br"ud83d".to_vec()].concat();
        let begun = std::time::Instant::now();
        replace_halves(&body);
        assert!(begun.elapsed() < std::time::Duration::from_secs(10));
    }
}
