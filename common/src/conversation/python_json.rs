//! JSON as Python reads and writes it.
//!
//! The reference tokenizer parses tool calls and tool schemas with Python's `json.loads` and writes them
//! into the prompt with `json.dumps(..., ensure_ascii=False)`, and every byte of that counts: integers of
//! any size keep their digits, floats print as their `repr`, the last of duplicate keys wins at the place
//! of the first, `NaN` and `Infinity` exist. `serde_json` can do none of these without changing how the
//! whole workspace parses numbers, hence this small reader. Strings borrow from the text where they can.
//!
//! One difference is left: half of a surrogate pair (`"\ud800"`) becomes U+FFFD; Python carries it along
//! until a later step refuses it.

use std::borrow::Cow;
use std::collections::HashMap;

use serde_json::Value;

use crate::cpu_budget::{self, Stage, Stopped};

/// Deepest nesting that is read.
const MAX_DEPTH: usize = 900;
/// Arrays and objects that are read between two looks at the CPU budget.
const VALUES_BETWEEN_CHECKS: usize = 256;

/// A JSON value.
#[derive(Clone, Debug, PartialEq)]
pub enum Json<'a> {
    /// `null`
    Null,
    /// `true` or `false`
    Bool(bool),
    /// A number without fraction and exponent, by its digits.
    Integer(Cow<'a, str>),
    /// Any other number, `NaN`, `Infinity`, `-Infinity`.
    Float(f64),
    /// A string.
    String(Cow<'a, str>),
    /// An array.
    Array(Vec<Json<'a>>),
    /// An object; keys are unique and in the order of their first appearance.
    Object(Vec<(Cow<'a, str>, Json<'a>)>),
}

/// Why a text is not JSON.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JsonError {
    /// Not JSON.
    #[error("invalid JSON at byte {0}")]
    Syntax(usize),
    /// Nested more than 900 deep.
    #[error("JSON is nested more than {MAX_DEPTH} levels deep")]
    Depth,
    /// The work was stopped.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

impl<'a> Json<'a> {
    /// Reads a text as Python's `json.loads` does.
    pub fn parse(text: &'a str) -> Result<Self, JsonError> {
        cpu_budget::check(Stage::Parse)?;
        let mut reader = Reader { text, bytes: text.as_bytes(), position: 0, depth: 0, nested: 0, spare: text.len() };
        reader.skip_whitespace();
        let value = reader.value()?;
        reader.skip_whitespace();
        if reader.position < text.len() {
            return Err(JsonError::Syntax(reader.position));
        }
        Ok(value)
    }

    /// The value of a key, if this is an object that has it.
    pub fn get(&self, key: &str) -> Option<&Json<'a>> {
        match self {
            Self::Object(fields) => fields.iter().find(|(name, _)| name == key).map(|(_, value)| value),
            _ => None,
        }
    }

    /// The string, if this is one.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(text) => Some(text),
            _ => None,
        }
    }

    /// What kind of value this is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a boolean",
            Self::Integer(_) | Self::Float(_) => "a number",
            Self::String(_) => "a string",
            Self::Array(_) => "an array",
            Self::Object(_) => "an object",
        }
    }

    /// Appends what `json.dumps(value, ensure_ascii=False)` gives.
    pub fn dump(&self, out: &mut String) {
        match self {
            Self::Null => out.push_str("null"),
            Self::Bool(true) => out.push_str("true"),
            Self::Bool(false) => out.push_str("false"),
            Self::Integer(digits) => out.push_str(digits),
            Self::Float(number) => dump_float(*number, out),
            Self::String(text) => dump_string(text, out),
            Self::Array(items) => {
                out.push('[');
                for (index, item) in items.iter().enumerate() {
                    if index > 0 {
                        out.push_str(", ");
                    }
                    item.dump(out);
                }
                out.push(']');
            }
            Self::Object(fields) => {
                out.push('{');
                for (index, (name, value)) in fields.iter().enumerate() {
                    if index > 0 {
                        out.push_str(", ");
                    }
                    dump_string(name, out);
                    out.push_str(": ");
                    value.dump(out);
                }
                out.push('}');
            }
        }
    }

    /// The same as a `serde_json` value; integers beyond 64 bits become floats, `NaN` and infinities null.
    pub fn to_value(&self) -> Value {
        match self {
            Self::Null => Value::Null,
            Self::Bool(value) => Value::Bool(*value),
            Self::Integer(digits) => serde_json::from_str(digits).unwrap_or(Value::Null),
            Self::Float(number) => Value::from(*number),
            Self::String(text) => Value::String(text.clone().into_owned()),
            Self::Array(items) => Value::Array(items.iter().map(Json::to_value).collect()),
            Self::Object(fields) => Value::Object(
                fields.iter().map(|(name, value)| (name.clone().into_owned(), value.to_value())).collect(),
            ),
        }
    }
}

/// Borrows from a parsed value. What `serde_json` lost in reading (digits of integers beyond 64 bits) is lost.
impl<'a> From<&'a Value> for Json<'a> {
    fn from(value: &'a Value) -> Self {
        match value {
            Value::Null => Self::Null,
            Value::Bool(value) => Self::Bool(*value),
            Value::Number(number) => match number.as_f64() {
                Some(float) if number.is_f64() => Self::Float(float),
                _ => Self::Integer(number.to_string().into()),
            },
            Value::String(text) => Self::String(text.into()),
            Value::Array(items) => Self::Array(items.iter().map(Json::from).collect()),
            Value::Object(fields) => {
                Self::Object(fields.iter().map(|(name, value)| (name.into(), value.into())).collect())
            }
        }
    }
}

/// Appends a string literal with Python's escapes: the two-letter ones, `\u00XX` for other control
/// characters, nothing else.
pub(super) fn dump_string(text: &str, out: &mut String) {
    out.push('"');
    let mut start = 0;
    for (index, byte) in text.bytes().enumerate() {
        if byte >= 0x20 && byte != b'"' && byte != b'\\' {
            continue;
        }
        out.push_str(&text[start..index]);
        start = index + 1;
        match byte {
            b'"' => out.push_str("\\\""),
            b'\\' => out.push_str("\\\\"),
            b'\n' => out.push_str("\\n"),
            b'\r' => out.push_str("\\r"),
            b'\t' => out.push_str("\\t"),
            0x08 => out.push_str("\\b"),
            0x0C => out.push_str("\\f"),
            _ => out.push_str(&format!("\\u{byte:04x}")),
        }
    }
    out.push_str(&text[start..]);
    out.push('"');
}

/// Appends a float as Python's `repr`: shortest digits that read back, positional from 1e-4 to 1e16.
fn dump_float(number: f64, out: &mut String) {
    if number.is_nan() {
        return out.push_str("NaN");
    }
    if number.is_infinite() {
        return out.push_str(if number > 0.0 { "Infinity" } else { "-Infinity" });
    }
    let scientific = format!("{:e}", number.abs());
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if number.is_sign_negative() {
        out.push('-');
    }
    if !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return out.push_str(&format!("{mantissa}e{sign}{:02}", exponent.abs()));
    }
    let digits = mantissa.replace('.', "");
    if exponent < 0 {
        out.push_str("0.");
        (1..-exponent).for_each(|_| out.push('0'));
        return out.push_str(&digits);
    }
    let whole = exponent as usize + 1;
    if digits.len() <= whole {
        out.push_str(&digits);
        (digits.len()..whole).for_each(|_| out.push('0'));
        return out.push_str(".0");
    }
    out.push_str(&digits[..whole]);
    out.push('.');
    out.push_str(&digits[whole..]);
}

/// Eight bytes of a string at once: the lowest bit that is set is the highest one of the first byte that a string can't
/// hold as it is (a quote, a backslash, a control character). What stands behind that byte may be given wrongly.
fn special_bytes(word: u64) -> u64 {
    const ONES: u64 = u64::MAX / 255;
    const HIGH: u64 = ONES << 7;
    // a byte below `n` borrows when `n` is taken from it
    let below = |word: u64, n: u8| word.wrapping_sub(ONES * u64::from(n)) & !word & HIGH;
    let equal = |byte: u8| below(word ^ (ONES * u64::from(byte)), 1);
    below(word, 0x20) | equal(b'"') | equal(b'\\')
}

struct Reader<'a> {
    text: &'a str,
    bytes: &'a [u8],
    position: usize,
    depth: usize,
    /// Arrays and objects so far.
    nested: usize,
    /// Bytes that strings may yet reserve for what they might turn out to have.
    spare: usize,
}

impl<'a> Reader<'a> {
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.position).copied()
    }

    fn syntax<T>(&self) -> Result<T, JsonError> {
        Err(JsonError::Syntax(self.position))
    }

    fn skip_whitespace(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.position += 1;
        }
    }

    fn literal(&mut self, literal: &str, value: Json<'a>) -> Result<Json<'a>, JsonError> {
        if !self.bytes[self.position..].starts_with(literal.as_bytes()) {
            return self.syntax();
        }
        self.position += literal.len();
        Ok(value)
    }

    fn value(&mut self) -> Result<Json<'a>, JsonError> {
        match self.peek() {
            Some(b'"') => Ok(Json::String(self.string()?)),
            Some(b'{') => self.nested(Self::object),
            Some(b'[') => self.nested(Self::array),
            Some(b'n') => self.literal("null", Json::Null),
            Some(b't') => self.literal("true", Json::Bool(true)),
            Some(b'f') => self.literal("false", Json::Bool(false)),
            Some(b'N') => self.literal("NaN", Json::Float(f64::NAN)),
            Some(b'I') => self.literal("Infinity", Json::Float(f64::INFINITY)),
            Some(b'-') if self.bytes.get(self.position + 1) == Some(&b'I') => {
                self.literal("-Infinity", Json::Float(f64::NEG_INFINITY))
            }
            Some(b'-' | b'0'..=b'9') => self.number(),
            _ => self.syntax(),
        }
    }

    fn nested(&mut self, read: fn(&mut Self) -> Result<Json<'a>, JsonError>) -> Result<Json<'a>, JsonError> {
        if self.depth == MAX_DEPTH {
            return Err(JsonError::Depth);
        }
        self.nested += 1;
        if self.nested.is_multiple_of(VALUES_BETWEEN_CHECKS) {
            cpu_budget::check(Stage::Parse)?;
        }
        self.depth += 1;
        self.position += 1;
        self.skip_whitespace();
        let value = read(self)?;
        self.depth -= 1;
        Ok(value)
    }

    fn array(&mut self) -> Result<Json<'a>, JsonError> {
        let mut items = Vec::new();
        if self.peek() == Some(b']') {
            self.position += 1;
            return Ok(Json::Array(items));
        }
        loop {
            items.push(self.value()?);
            self.skip_whitespace();
            match self.peek() {
                Some(b',') => self.position += 1,
                Some(b']') => {
                    self.position += 1;
                    return Ok(Json::Array(items));
                }
                _ => return self.syntax(),
            }
            self.skip_whitespace();
        }
    }

    fn object(&mut self) -> Result<Json<'a>, JsonError> {
        let mut fields: Vec<(Cow<'a, str>, Json<'a>)> = Vec::new();
        if self.peek() == Some(b'}') {
            self.position += 1;
            return Ok(Json::Object(fields));
        }
        loop {
            if self.peek() != Some(b'"') {
                return self.syntax();
            }
            let name = self.string()?;
            self.skip_whitespace();
            if self.peek() != Some(b':') {
                return self.syntax();
            }
            self.position += 1;
            self.skip_whitespace();
            let value = self.value()?;
            fields.push((name, value));
            self.skip_whitespace();
            match self.peek() {
                Some(b',') => self.position += 1,
                Some(b'}') => {
                    self.position += 1;
                    return Ok(Json::Object(last_wins(fields)));
                }
                _ => return self.syntax(),
            }
            self.skip_whitespace();
        }
    }

    fn number(&mut self) -> Result<Json<'a>, JsonError> {
        let start = self.position;
        if self.peek() == Some(b'-') {
            self.position += 1;
        }
        match self.peek() {
            Some(b'0') => self.position += 1,
            Some(b'1'..=b'9') => self.digits(),
            _ => return self.syntax(),
        }
        let whole_end = self.position;
        if self.peek() == Some(b'.') && self.bytes.get(self.position + 1).is_some_and(u8::is_ascii_digit) {
            self.position += 1;
            self.digits();
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            let sign = usize::from(matches!(self.bytes.get(self.position + 1), Some(b'+' | b'-')));
            if self.bytes.get(self.position + 1 + sign).is_some_and(u8::is_ascii_digit) {
                self.position += 1 + sign;
                self.digits();
            }
        }
        let text = &self.text[start..self.position];
        if self.position > whole_end {
            return match text.parse() {
                Ok(number) => Ok(Json::Float(number)),
                Err(_) => self.syntax(),
            };
        }
        Ok(Json::Integer(if text == "-0" { "0".into() } else { text.into() }))
    }

    fn digits(&mut self) {
        while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            self.position += 1;
        }
    }

    /// Reads a string literal; the reader stands at its opening quote.
    fn string(&mut self) -> Result<Cow<'a, str>, JsonError> {
        self.position += 1;
        let start = self.position;
        self.skip_plain()?;
        if self.peek() == Some(b'"') {
            let text = &self.text[start..self.position];
            self.position += 1;
            return Ok(Cow::Borrowed(text));
        }
        // a string is no longer than what is left of the text: a long one need not be moved as it grows, and all of them
        // together reserve no more than the whole text has
        let left = self.text.len() - start;
        let mut text = String::with_capacity(if left <= self.spare { left } else { self.position - start });
        self.spare = self.spare.checked_sub(left).unwrap_or(self.spare);
        text.push_str(&self.text[start..self.position]);
        loop {
            match self.peek() {
                Some(b'"') => {
                    self.position += 1;
                    return Ok(Cow::Owned(text));
                }
                Some(b'\\') => {
                    let character = self.escape()?;
                    text.push(character);
                }
                _ => return self.syntax(),
            }
            let plain = self.position;
            self.skip_plain()?;
            text.push_str(&self.text[plain..self.position]);
        }
    }

    /// Moves to the next quote, backslash or forbidden byte; the end of the text is an error.
    fn skip_plain(&mut self) -> Result<(), JsonError> {
        let rest = &self.bytes[self.position..];
        let (words, last) = rest.as_chunks::<8>();
        let plain = words.iter().position(|word| special_bytes(u64::from_le_bytes(*word)) != 0);
        let length = match plain {
            Some(number) => {
                let first = special_bytes(u64::from_le_bytes(words[number])).trailing_zeros() / 8;
                Some(number * 8 + first as usize)
            }
            None => {
                let ends = |byte: &u8| matches!(byte, b'"' | b'\\' | 0..=0x1F);
                last.iter().position(ends).map(|place| words.len() * 8 + place)
            }
        };
        match length {
            Some(length) => {
                self.position += length;
                Ok(())
            }
            None => Err(JsonError::Syntax(self.bytes.len())),
        }
    }

    /// Reads an escape; the reader stands at its backslash.
    fn escape(&mut self) -> Result<char, JsonError> {
        let kind = self.bytes.get(self.position + 1).copied();
        let character = match kind {
            Some(b'"') => '"',
            Some(b'\\') => '\\',
            Some(b'/') => '/',
            Some(b'b') => '\u{08}',
            Some(b'f') => '\u{0C}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b'u') => return self.unicode_escape(),
            _ => return self.syntax(),
        };
        self.position += 2;
        Ok(character)
    }

    fn unicode_escape(&mut self) -> Result<char, JsonError> {
        let Some(first) = self.code_unit() else {
            return self.syntax();
        };
        self.position += 6;
        if !(0xD800..0xDC00).contains(&first) {
            return Ok(char::from_u32(first).unwrap_or(char::REPLACEMENT_CHARACTER));
        }
        match self.code_unit() {
            Some(second @ 0xDC00..=0xDFFF) => {
                self.position += 6;
                let code = 0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00);
                Ok(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER))
            }
            _ => Ok(char::REPLACEMENT_CHARACTER),
        }
    }

    /// The number in the `\uXXXX` that stands here, if one does.
    fn code_unit(&self) -> Option<u32> {
        let escape = self.bytes.get(self.position..self.position + 6)?;
        let digits = escape.strip_prefix(b"\\u")?;
        digits.iter().try_fold(0, |sum, digit| Some(sum * 16 + char::from(*digit).to_digit(16)?))
    }
}

/// Keeps each key once: the last value at the place of the first.
fn last_wins<'a>(fields: Vec<(Cow<'a, str>, Json<'a>)>) -> Vec<(Cow<'a, str>, Json<'a>)> {
    const FEW: usize = 16;
    let unique = if fields.len() <= FEW {
        fields.iter().enumerate().all(|(index, (name, _))| fields[..index].iter().all(|(other, _)| other != name))
    } else {
        fields.iter().map(|(name, _)| name).collect::<std::collections::HashSet<_>>().len() == fields.len()
    };
    if unique {
        return fields;
    }
    let mut places: HashMap<Cow<'a, str>, usize> = HashMap::new();
    let mut kept: Vec<(Cow<'a, str>, Json<'a>)> = Vec::new();
    for (name, value) in fields {
        match places.get(&name) {
            Some(place) => kept[*place].1 = value,
            None => {
                places.insert(name.clone(), kept.len());
                kept.push((name, value));
            }
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redump(text: &str) -> String {
        let mut out = String::new();
        Json::parse(text).unwrap_or_else(|error| panic!("{text}: {error}")).dump(&mut out);
        out
    }

    /// Right-hand sides printed by CPython 3.11: `json.dumps(json.loads(left), ensure_ascii=False)`.
    #[test]
    fn numbers_print_as_python_prints_them() {
        let cases = [
            ("0", "0"),
            ("-0", "0"),
            ("-0.0", "-0.0"),
            ("1e5", "100000.0"),
            ("2.50", "2.5"),
            ("1e15", "1000000000000000.0"),
            ("1e16", "1e+16"),
            ("123456789012345678.0", "1.2345678901234568e+17"),
            ("9007199254740993.0", "9007199254740992.0"),
            ("0.0001", "0.0001"),
            ("0.00001", "1e-05"),
            ("0.00012345", "0.00012345"),
            ("1.5e300", "1.5e+300"),
            ("5e-324", "5e-324"),
            ("1.7976931348623157e308", "1.7976931348623157e+308"),
            ("1e400", "Infinity"),
            ("-1e400", "-Infinity"),
            ("NaN", "NaN"),
            ("1e22", "1e+22"),
            ("123456789.125", "123456789.125"),
            ("12345678901234567890123", "12345678901234567890123"),
        ];
        for (text, expected) in cases {
            assert_eq!(redump(text), expected, "{text}");
        }
    }

    #[test]
    fn strings_objects_and_whitespace() {
        assert_eq!(redump(r#""\u00e9\ud83d\ude00\/\u0007\u007f\b\f""#), "\"é😀/\\u0007\u{7f}\\b\\f\"");
        assert_eq!(redump(r#""\ud83d \ude00\ud83d""#), "\"\u{fffd} \u{fffd}\u{fffd}\"");
        assert_eq!(redump(" {\"b\" :1,\n\"a\":[ 1 ,{}, [] ]\t} "), r#"{"b": 1, "a": [1, {}, []]}"#);
        assert_eq!(redump(r#"{"k":1,"a":0,"k":2}"#), r#"{"k": 2, "a": 0}"#);
        let many: String = (0..40).map(|i| format!("\"{}\":{i},", i % 20)).collect();
        let last: String = (0..20).map(|i| format!("\"{i}\": {}", i + 20)).collect::<Vec<_>>().join(", ");
        assert_eq!(redump(&format!("{{{}}}", many.trim_end_matches(','))), format!("{{{last}}}"));
    }

    #[test]
    fn what_python_refuses_is_refused() {
        for text in [
            "",
            " ",
            "{",
            "[1,]",
            "{\"a\":1,}",
            "01",
            "1.",
            ".5",
            "+1",
            "-",
            "1e",
            "1e+",
            "\"abc",
            "{\"a\" 1}",
            "nul",
            "truex",
            "{'a':1}",
            "[1 2]",
            "\u{feff}{}",
            "1 1",
            "\"a\nb\"",
            "\"\\x\"",
            "\"\\u12\"",
            "\"\\u+123\"",
            "--1",
            "{1:2}",
            "1_0",
            "\u{a0}{}",
            "{}\0",
        ] {
            assert!(matches!(Json::parse(text), Err(JsonError::Syntax(_))), "{text:?}");
        }
    }

    #[test]
    fn depth_is_bounded_and_the_bound_fits_a_small_stack() {
        let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
        let check = move || {
            assert_eq!(redump(&nested(MAX_DEPTH)), nested(MAX_DEPTH));
            assert_eq!(Json::parse(&nested(MAX_DEPTH + 1)), Err(JsonError::Depth));
        };
        let thread = std::thread::Builder::new().stack_size(1 << 20).spawn(check).expect("thread");
        thread.join().expect("no overflow");
    }

    /// `Conversation::parse` takes numbers as `serde_json` read them, so it must read floats exactly
    /// (its feature `float_roundtrip`, which `jsonschema` turns on).
    #[test]
    fn values_give_the_same_text() {
        for text in [
            r#"{"a": [1, -2, 1.5, 1e-05, true, null, "é"]}"#,
            "[0.30000000000000004, 5e-324, 8.41e+21, 2.2250738585072011e-308]",
        ] {
            let value: Value = serde_json::from_str(text).expect("json");
            let mut out = String::new();
            Json::from(&value).dump(&mut out);
            assert_eq!(out, redump(text));
            assert_eq!(Json::parse(text).expect("json").to_value(), value);
        }
    }
}
