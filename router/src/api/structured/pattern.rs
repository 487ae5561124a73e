//! Translation of the regular expressions of JSON schemas to Rust's dialect, which groups compile.
//!
//! Schemas use ECMA's dialect, or that of their authors' tools: Python's, or JavaScript's without the `u` flag. Some
//! characters differ in Rust's dialect (`&&`, `--`, `~~` and `[` in a class are operators, `\d` is every digit of
//! Unicode), so a pattern is parsed here and written again. Features that a group cannot match (look-around, back
//! references, word boundaries) have no translation.

use std::fmt::Write as _;
use std::iter::Peekable;
use std::str::Chars;

use regex_syntax::hir::{Hir, HirKind, Look};

const DIGIT: &str = "0-9";
const WORD: &str = "0-9A-Za-z_";
const SPACE: &str = r"\x{9}-\x{d}\x{20}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}\x{feff}";
/// The characters that ECMA's dot does not match.
const LINE_ENDS: &str = r"\x{a}\x{d}\x{2028}\x{2029}";
/// Maximum bytes of a pattern.
const MAX_BYTES: usize = 8 * 1024;

/// Why a pattern has no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Untranslatable {
    /// `(?=`, `(?!`, `(?<=` or `(?<!`.
    #[error("it has a look-around")]
    LookAround,
    /// `\1`, `\k<name>` or `(?P=name)`.
    #[error("it has a back reference")]
    BackReference,
    /// `\b` or `\B`.
    #[error("it has a word boundary")]
    WordBoundary,
    /// `^` or `$` in the middle.
    #[error("it has an anchor that is not at its beginning or end")]
    Anchor,
    /// `(?>` or a quantifier followed by `+`.
    #[error("it has an atomic group or a possessive quantifier")]
    Atomic,
    /// The pattern is malformed.
    #[error("it is not a valid regular expression")]
    Malformed,
    /// The pattern is too long.
    #[error("it has more than {MAX_BYTES} bytes")]
    TooLong,
}

/// Translates a pattern to Rust's dialect.
pub(super) fn translate(pattern: &str) -> Result<String, Untranslatable> {
    if pattern.len() > MAX_BYTES {
        return Err(Untranslatable::TooLong);
    }
    let mut translation = Translation {
        rest: pattern.chars().peekable(),
        text: String::with_capacity(pattern.len() + 16),
        groups: groups(pattern),
        keeps_dots: false,
    };
    translation.pattern()?;
    let parsed = regex_syntax::parse(&translation.text).map_err(|_| Untranslatable::Malformed)?;
    check_anchors(&parsed)?;
    Ok(translation.text)
}

/// Number of capture groups that a back reference may name.
fn groups(pattern: &str) -> u32 {
    let (mut escaped, mut in_class, mut groups) = (false, false, 0);
    for (index, character) in pattern.char_indices() {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '[' => in_class = true,
            ']' => in_class = false,
            '(' if !in_class => {
                let behind = &pattern[index + 1..];
                let named = behind.starts_with("?P<")
                    || (behind.starts_with("?<") && !behind.starts_with("?<=") && !behind.starts_with("?<!"));
                groups += u32::from(!behind.starts_with('?') || named);
            }
            _ => {}
        }
    }
    groups
}

/// Groups of workers support anchors at the outer ends of a pattern only.
fn check_anchors(parsed: &Hir) -> Result<(), Untranslatable> {
    let mut rest = vec![(parsed, true, true)];
    while let Some((part, at_start, at_end)) = rest.pop() {
        match part.kind() {
            HirKind::Look(Look::Start) if at_start => {}
            HirKind::Look(Look::End) if at_end => {}
            HirKind::Look(Look::Start | Look::End | Look::StartLF | Look::EndLF | Look::StartCRLF | Look::EndCRLF) => {
                return Err(Untranslatable::Anchor);
            }
            HirKind::Look(_) => return Err(Untranslatable::WordBoundary),
            HirKind::Concat(parts) => {
                let first = parts.iter().position(|part| *part.kind() != HirKind::Look(Look::Start));
                let last = parts.iter().rposition(|part| *part.kind() != HirKind::Look(Look::End));
                for (index, part) in parts.iter().enumerate() {
                    let begins = at_start && first.is_none_or(|first| index <= first);
                    let ends = at_end && last.is_none_or(|last| index >= last);
                    rest.push((part, begins, ends));
                }
            }
            HirKind::Alternation(parts) => rest.extend(parts.iter().map(|part| (part, at_start, at_end))),
            HirKind::Capture(capture) => rest.push((&capture.sub, at_start, at_end)),
            HirKind::Repetition(repetition) => rest.push((&repetition.sub, false, false)),
            HirKind::Empty | HirKind::Literal(_) | HirKind::Class(_) => {}
        }
    }
    Ok(())
}

/// The meaning of an escape.
enum Escape {
    Character(char),
    /// Members of a class, and whether the class is negated.
    Class(&'static str, bool),
    /// `\p{..}`, unchanged.
    Property(String),
    Start,
    End,
}

struct Translation<'a> {
    rest: Peekable<Chars<'a>>,
    text: String,
    groups: u32,
    /// Flags may change the meaning of a dot.
    keeps_dots: bool,
}

impl Translation<'_> {
    fn pattern(&mut self) -> Result<(), Untranslatable> {
        while let Some(character) = self.rest.next() {
            match character {
                '\\' => match self.escape(false)? {
                    Escape::Character(character) => self.literal(character),
                    Escape::Class(members, negated) => self.class_of(members, negated),
                    Escape::Property(property) => self.text.push_str(&property),
                    Escape::Start => self.text.push('^'),
                    Escape::End => self.text.push('$'),
                },
                '[' => self.class()?,
                '(' => self.group()?,
                '.' if self.keeps_dots => self.text.push('.'),
                '.' => self.class_of(LINE_ENDS, true),
                '*' | '+' | '?' => {
                    self.text.push(character);
                    self.mode()?;
                }
                '{' => self.braces()?,
                '}' | ']' => self.literal(character),
                _ => self.text.push(character),
            }
        }
        Ok(())
    }

    fn literal(&mut self, character: char) {
        if character.is_ascii_alphanumeric() || !character.is_ascii() {
            self.text.push(character);
        } else {
            let _ = write!(self.text, r"\x{{{:x}}}", character as u32);
        }
    }

    fn class_of(&mut self, members: &str, negated: bool) {
        let _ = write!(self.text, "[{}{members}]", if negated { "^" } else { "" });
    }

    /// Parses the suffix of a quantifier.
    fn mode(&mut self) -> Result<(), Untranslatable> {
        match self.rest.peek() {
            Some('+') => Err(Untranslatable::Atomic),
            Some('?') => {
                self.rest.next();
                self.text.push('?');
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Parses a quantifier in braces, or literal braces.
    fn braces(&mut self) -> Result<(), Untranslatable> {
        let inside: String = self.rest.clone().take_while(|character| *character != '}').collect();
        let closed = self.rest.clone().nth(inside.chars().count()) == Some('}');
        let bound = |text: &str| text.is_empty() || (text.len() <= 9 && text.bytes().all(|byte| byte.is_ascii_digit()));
        let quantifier = match inside.split_once(',') {
            _ if !closed => None,
            None if bound(&inside) && !inside.is_empty() => Some(format!("{{{inside}}}")),
            Some((least, most)) if bound(least) && bound(most) && inside.len() > 1 => {
                Some(format!("{{{},{most}}}", if least.is_empty() { "0" } else { least }))
            }
            _ => None,
        };
        let Some(quantifier) = quantifier else {
            self.literal('{');
            return Ok(());
        };
        self.rest.nth(inside.chars().count());
        self.text.push_str(&quantifier);
        self.mode()
    }

    /// Parses the text after an opening parenthesis. Capture groups lose their numbers and names, because nothing
    /// refers to them.
    fn group(&mut self) -> Result<(), Untranslatable> {
        if self.rest.peek() != Some(&'?') {
            self.text.push_str("(?:");
            return Ok(());
        }
        self.rest.next();
        let behind: String = self.rest.clone().take(2).collect();
        if behind.starts_with(['=', '!']) || behind == "<=" || behind == "<!" {
            return Err(Untranslatable::LookAround);
        }
        if behind.starts_with('>') {
            return Err(Untranslatable::Atomic);
        }
        if behind == "P=" || behind.starts_with('(') {
            return Err(Untranslatable::BackReference);
        }
        if behind.starts_with('#') {
            self.rest.by_ref().take_while(|character| *character != ')').for_each(drop);
            return Ok(());
        }
        if behind.starts_with('<') || behind == "P<" {
            if !self.rest.by_ref().any(|character| character == '>') {
                return Err(Untranslatable::Malformed);
            }
            self.text.push_str("(?:");
            return Ok(());
        }
        self.flags()
    }

    /// Parses `(?i)`, `(?s-x:` and the like. Python's flags for kinds of text have no effect.
    fn flags(&mut self) -> Result<(), Untranslatable> {
        let mut flags = String::new();
        for character in self.rest.by_ref() {
            match character {
                ':' | ')' => {
                    self.keeps_dots |= flags.contains('s');
                    let flags = flags.trim_end_matches('-');
                    match (character, flags) {
                        (')', "") => {}
                        _ => {
                            let _ = write!(self.text, "(?{flags}{character}");
                        }
                    }
                    return Ok(());
                }
                'i' | 'm' | 's' | 'x' | '-' => flags.push(character),
                'a' | 'u' | 'L' => {}
                _ => return Err(Untranslatable::Malformed),
            }
        }
        Err(Untranslatable::Malformed)
    }

    /// Parses a class after its opening bracket.
    fn class(&mut self) -> Result<(), Untranslatable> {
        let negated = self.rest.next_if_eq(&'^').is_some();
        let mut members = String::new();
        let closes_later = self.rest.clone().skip(1).any(|character| character == ']');
        if self.rest.peek() == Some(&']') {
            if !closes_later {
                // ECMA's empty class, and its complement
                self.rest.next();
                self.text.push_str(if negated { r"[\x{0}-\x{10ffff}]" } else { r"[^\x{0}-\x{10ffff}]" });
                return Ok(());
            }
            self.rest.next();
            members.push_str(r"\x{5d}");
        }
        loop {
            let character = self.rest.next().ok_or(Untranslatable::Malformed)?;
            if character == ']' {
                break;
            }
            let Some(first) = self.member(character, &mut members)? else { continue };
            // a range, unless a nested class or the end follows
            let mut ahead = self.rest.clone();
            if ahead.next() != Some('-') || matches!(ahead.peek(), Some(']') | None) {
                push_character(&mut members, first);
                continue;
            }
            self.rest.next();
            let character = self.rest.next().ok_or(Untranslatable::Malformed)?;
            match self.member(character, &mut members)? {
                Some(last) if first <= last => {
                    push_character(&mut members, first);
                    members.push('-');
                    push_character(&mut members, last);
                }
                Some(_) => return Err(Untranslatable::Malformed),
                None => {
                    push_character(&mut members, first);
                    push_character(&mut members, '-');
                }
            }
        }
        self.class_of(&members, negated);
        Ok(())
    }

    /// Returns a member that is one character; other members are written directly.
    fn member(&mut self, character: char, members: &mut String) -> Result<Option<char>, Untranslatable> {
        if character != '\\' {
            return Ok(Some(character));
        }
        match self.escape(true)? {
            Escape::Character(character) => return Ok(Some(character)),
            Escape::Class(of, false) => members.push_str(of),
            Escape::Class(of, true) => {
                let _ = write!(members, "[^{of}]");
            }
            Escape::Property(property) => members.push_str(&property),
            Escape::Start | Escape::End => return Err(Untranslatable::Malformed),
        }
        Ok(None)
    }

    /// Parses an escape after its backslash.
    fn escape(&mut self, in_class: bool) -> Result<Escape, Untranslatable> {
        let character = self.rest.next().ok_or(Untranslatable::Malformed)?;
        Ok(Escape::Character(match character {
            'd' => return Ok(Escape::Class(DIGIT, false)),
            'D' => return Ok(Escape::Class(DIGIT, true)),
            'w' => return Ok(Escape::Class(WORD, false)),
            'W' => return Ok(Escape::Class(WORD, true)),
            's' => return Ok(Escape::Class(SPACE, false)),
            'S' => return Ok(Escape::Class(SPACE, true)),
            'b' if in_class => '\u{8}',
            'b' | 'B' => return Err(Untranslatable::WordBoundary),
            'A' if !in_class => return Ok(Escape::Start),
            'Z' | 'z' if !in_class => return Ok(Escape::End),
            'p' | 'P' if self.rest.peek() == Some(&'{') => {
                let name: String = self.rest.by_ref().take_while(|character| *character != '}').collect();
                return Ok(Escape::Property(format!("\\{character}{name}}}")));
            }
            'k' if !in_class && self.rest.peek() == Some(&'<') => return Err(Untranslatable::BackReference),
            'n' => '\n',
            'r' => '\r',
            't' => '\t',
            'f' => '\u{c}',
            'v' => '\u{b}',
            'a' => '\u{7}',
            'c' if self.rest.peek().is_some_and(char::is_ascii_alphabetic) => {
                let letter = self.rest.next().unwrap_or('@');
                char::from(letter as u8 % 32)
            }
            'x' => self.code_point(2).unwrap_or('x'),
            'u' => self.unicode()?,
            'U' => self.code_point(8).unwrap_or('U'),
            '0'..='9' => return self.number(character, in_class),
            other => other,
        }))
    }

    /// Parses a character of a given number of hexadecimal digits, if they are present.
    fn code_point(&mut self, digits: usize) -> Option<char> {
        char::from_u32(self.hexadecimal(digits)?)
    }

    fn hexadecimal(&mut self, digits: usize) -> Option<u32> {
        let text: String = self.rest.clone().take(digits).take_while(char::is_ascii_hexdigit).collect();
        if text.len() != digits {
            return None;
        }
        self.rest.nth(digits - 1);
        u32::from_str_radix(&text, 16).ok()
    }

    /// Parses `\uXXXX`, two of which may form a surrogate pair, or `\u{X}`.
    fn unicode(&mut self) -> Result<char, Untranslatable> {
        if self.rest.peek() == Some(&'{') {
            let digits: String = self.rest.clone().skip(1).take_while(|character| *character != '}').collect();
            let code = u32::from_str_radix(&digits, 16).ok().and_then(char::from_u32);
            self.rest.nth(digits.chars().count() + 1);
            return code.ok_or(Untranslatable::Malformed);
        }
        let Some(high) = self.hexadecimal(4) else { return Ok('u') };
        if let Some(character) = char::from_u32(high) {
            return Ok(character);
        }
        let mut ahead = self.rest.clone();
        if (ahead.next(), ahead.next()) == (Some('\\'), Some('u')) {
            self.rest = ahead;
            let low = self.hexadecimal(4).ok_or(Untranslatable::Malformed)?;
            let units = [high as u16, low as u16];
            if let Some(Ok(character)) = char::decode_utf16(units).next() {
                return Ok(character);
            }
        }
        // an unpaired surrogate is not a character, and never occurs in a text
        Err(Untranslatable::Malformed)
    }

    /// Parses a back reference, or a character given by its octal digits.
    fn number(&mut self, first: char, in_class: bool) -> Result<Escape, Untranslatable> {
        let digit = |character: char| character.to_digit(8);
        let number = first.to_digit(10).unwrap_or(0);
        if !in_class && number > 0 && number <= self.groups {
            return Err(Untranslatable::BackReference);
        }
        let Some(mut code) = digit(first) else { return Ok(Escape::Character(first)) };
        for _ in 0..2 {
            let Some(next) = self.rest.peek().copied().and_then(digit) else { break };
            if code * 8 + next > 0xff {
                break;
            }
            code = code * 8 + next;
            self.rest.next();
        }
        char::from_u32(code).map(Escape::Character).ok_or(Untranslatable::Malformed)
    }
}

fn push_character(members: &mut String, character: char) {
    let _ = write!(members, r"\x{{{:x}}}", character as u32);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the pattern matches the whole text.
    fn matches(pattern: &str, text: &str) -> bool {
        let translated = translate(pattern).unwrap_or_else(|error| panic!("{pattern}: {error}"));
        let regex = regex::Regex::new(&format!("^(?:{translated})$")).expect(&translated);
        regex.is_match(text)
    }

    #[test]
    fn escapes_operators_of_rust_classes() {
        for (pattern, good, bad) in [
            ("[a-z&&]+", vec!["a&z", "&&"], vec!["-", "A"]),
            ("[a-z&&[aeiou]]", vec!["b]", "&]", "[]"], vec!["b", "a"]),
            ("[+--]+", vec!["+,-"], vec!["*", "b"]),
            (r"[\w--z]+", vec!["a-z"], vec!["!"]),
            ("[~~]", vec!["~"], vec!["a"]),
            ("[[a]", vec!["[", "a"], vec!["]"]),
            ("[]a]", vec!["]", "a"], vec!["["]),
            ("[^]a]", vec!["b"], vec!["]", "a"]),
            ("[^]", vec!["a", "\n"], vec![""]),
            ("[a-]", vec!["a", "-"], vec!["b"]),
            ("[-a]", vec!["a", "-"], vec!["b"]),
            (r"[\d-x]", vec!["-", "x", "7"], vec!["a"]),
            (r"[#-\]]", vec!["A", "]"], vec!["^"]),
            ("[[:alpha:]]", vec!["a]", "[]", ":]"], vec!["b", "z"]),
            (r"[\b]", vec!["\u{8}"], vec!["b"]),
            (r"[^\W\d]", vec!["a", "_"], vec!["1", "-"]),
        ] {
            for text in good {
                assert!(matches(pattern, text), "{pattern} {text:?}");
            }
            for text in bad {
                assert!(!matches(pattern, text), "{pattern} {text:?}");
            }
        }
    }

    #[test]
    fn translates_ecma_classes_and_escapes() {
        for (pattern, good, bad) in [
            (r"\d", "7", "\u{667}"),
            (r"\w", "a", "\u{e9}"),
            (r"\s", "\u{feff}", "\u{85}"),
            (r"\D\W\S", "\u{667}\u{e9}a", "7  "),
            (".", "a", "\u{2028}"),
            ("(?s).", "\n", ""),
            (r"\/\-\:\#", "/-:#", "/"),
            (r"\cJ", "\n", "J"),
            (r"\x41\u0042\u{43}\U00000044", "ABCD", "ABC"),
            (r"\ud83d\ude00", "\u{1f600}", ""),
            (r"\0\x", "\0x", ""),
            (r"\101", "A", "1"),
            (r"\p{L}+\P{L}", "\u{e9}1", "\u{e9}a"),
            ("(?<year>[0-9]{4})-(?P<stop>[0-9]{2})", "2026-11", "2026"),
            ("(?i)abc", "aBC", "abd"),
            (r"\$?{{.*}}", "${{x}}", "$x"),
            ("a{,3}", "aaa", "aaaa"),
            ("a{}", "a{}", "a"),
            ("x{a}]", "x{a}]", "x"),
            ("(?#note)a(?a:b)(?u)", "ab", "a"),
            ("a+?b*?", "aab", "c"),
            (r"\Aab\Z", "ab", "abc"),
            (r"(a)\2", "a\u{2}", "aa"),
        ] {
            assert!(matches(pattern, good), "{pattern} {good:?}: {:?}", translate(pattern));
            assert!(!matches(pattern, bad), "{pattern} {bad:?}");
        }
    }

    #[test]
    fn rejects_unsupported_features() {
        for (pattern, reason) in [
            (r"^(?!\.)[a-z]+$", Untranslatable::LookAround),
            ("(?<=a)b", Untranslatable::LookAround),
            (r"(a)\1", Untranslatable::BackReference),
            (r"(?<n>a)\k<n>", Untranslatable::BackReference),
            ("(?P<n>a)(?P=n)", Untranslatable::BackReference),
            ("(a)?(?(1)b|c)", Untranslatable::BackReference),
            (r"\bword\b", Untranslatable::WordBoundary),
            ("a^b", Untranslatable::Anchor),
            ("(?:^a)+", Untranslatable::Anchor),
            ("(?m)^a$", Untranslatable::Anchor),
            ("(?>a+)b", Untranslatable::Atomic),
            ("a++b", Untranslatable::Atomic),
            ("[", Untranslatable::Malformed),
            ("(", Untranslatable::Malformed),
            ("a)", Untranslatable::Malformed),
            ("*a", Untranslatable::Malformed),
            ("a{3,1}", Untranslatable::Malformed),
            ("[z-a]", Untranslatable::Malformed),
            (r"\ud83d", Untranslatable::Malformed),
            (r"\u{110000}", Untranslatable::Malformed),
            ("\\", Untranslatable::Malformed),
            (r"\p{Nothing}", Untranslatable::Malformed),
        ] {
            assert_eq!(translate(pattern), Err(reason), "{pattern}");
        }
        assert_eq!(translate(&"a".repeat(9_000)), Err(Untranslatable::TooLong));
    }

    #[test]
    fn never_panics() {
        let signs = [
            "\\",
            "[",
            "]",
            "(",
            ")",
            "{",
            "}",
            "?",
            "*",
            "+",
            "-",
            "^",
            "$",
            "|",
            ".",
            ",",
            "&&",
            "~~",
            "<",
            ">",
            "=",
            "!",
            ":",
            "#",
            "P",
            "u",
            "x",
            "c",
            "d",
            "b",
            "k",
            "0",
            "1",
            "9",
            "a",
            "\u{e9}",
            "\u{1f600}",
            "ud83d",
            "i",
        ];
        let mut state = 7_u64;
        for _ in 0..20_000 {
            let mut pattern = String::new();
            for _ in 0..12 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                pattern.push_str(signs[(state >> 33) as usize % signs.len()]);
            }
            if let Ok(translated) = translate(&pattern) {
                assert!(regex_syntax::parse(&translated).is_ok(), "{pattern}");
            }
        }
    }
}
