//! Counts the contents of a JSON schema in one walk.

use serde_json::Value;

use super::{GrammarError, at_most};

/// Maximum members of an object, and elements of a list of schemas or required names.
const MAX_MEMBERS: usize = 1_000;
/// Maximum members of `properties`: optional ones cost the square of their number, and references multiply them.
const MAX_PROPERTIES: usize = 500;
/// Maximum members of all objects and elements of all lists, wherever they occur: in `$defs`, `anyOf`, `enum`,
/// `properties`.
const MAX_PARTS: usize = 20_000;
/// Maximum bytes of one `pattern`.
const MAX_PATTERN_BYTES: usize = 8 * 1024;
/// Maximum patterns of all `patternProperties`; each is compared with every other one of its object.
const MAX_PATTERN_PROPERTIES: usize = 64;
/// Maximum least common multiple of all `multipleOf`, without powers of ten: it is the number of states of the counting
/// automaton.
const MAX_MULTIPLE: u64 = 10_000;
/// Lists with these names hold schemas, or names of members.
const LISTS_OF_SCHEMAS: [&str; 7] = ["anyOf", "oneOf", "allOf", "prefixItems", "items", "required", "type"];
/// Texts with these names are regular expressions; all but the first are options of llguidance.
const PATTERNS: [&str; 4] = ["pattern", "whitespace_pattern", "item_separator", "key_separator"];

/// Counts of the schemas of one grammar so far.
pub(super) struct Counts {
    parts: usize,
    pattern_properties: usize,
    multiple: u64,
}

impl Default for Counts {
    fn default() -> Self {
        Self { parts: 0, pattern_properties: 0, multiple: 1 }
    }
}

impl Counts {
    /// Counts the value of the member `name` and collects its regular expressions. The JSON parser limits the nesting
    /// to 128, and so the recursion.
    pub(super) fn add<'a>(
        &mut self,
        value: &'a Value,
        name: &str,
        patterns: &mut Vec<&'a str>,
    ) -> Result<(), GrammarError> {
        match value {
            Value::Object(members) => {
                at_most("members in an object", members.len(), MAX_MEMBERS)?;
                self.count_parts(members.len())?;
                if name == "properties" {
                    at_most("members in `properties`", members.len(), MAX_PROPERTIES)?;
                }
                if name == "patternProperties" {
                    self.pattern_properties += members.len();
                    at_most("`patternProperties`", self.pattern_properties, MAX_PATTERN_PROPERTIES)?;
                    members.keys().try_for_each(|pattern| add_pattern(pattern, patterns))?;
                }
                members.iter().try_for_each(|(name, member)| self.add(member, name, patterns))
            }
            Value::Array(elements) => {
                if LISTS_OF_SCHEMAS.contains(&name) {
                    at_most(&format!("elements in `{name}`"), elements.len(), MAX_MEMBERS)?;
                }
                self.count_parts(elements.len())?;
                elements.iter().try_for_each(|element| self.add(element, "", patterns))
            }
            Value::String(pattern) if PATTERNS.contains(&name) => add_pattern(pattern, patterns),
            Value::Number(number) if name == "multipleOf" => {
                // the compiler refuses other numbers
                let Some(digits) = digits_of(&number.to_string()) else { return Ok(()) };
                self.multiple = least_common_multiple(self.multiple, digits);
                if self.multiple > MAX_MULTIPLE {
                    let reason = format!(
                        "its `multipleOf` have no common multiple up to {MAX_MULTIPLE} (powers of ten aside), which is the most"
                    );
                    return Err(GrammarError(reason));
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn count_parts(&mut self, parts: usize) -> Result<(), GrammarError> {
        self.parts += parts;
        at_most("members and elements in all", self.parts, MAX_PARTS)
    }
}

fn add_pattern<'a>(pattern: &'a str, patterns: &mut Vec<&'a str>) -> Result<(), GrammarError> {
    at_most("bytes in a pattern", pattern.len(), MAX_PATTERN_BYTES)?;
    patterns.push(pattern);
    Ok(())
}

/// The digits of a positive number without its point, exponent and outer zeros; `None` if there are none or too many.
fn digits_of(number: &str) -> Option<u64> {
    let mantissa = number.split(['e', 'E']).next()?;
    let digits = mantissa.replace('.', "");
    match digits.trim_end_matches('0').parse::<u64>() {
        Ok(digits) => Some(digits),
        Err(_) if digits.bytes().all(|byte| byte == b'0' || byte == b'-') => None,
        Err(_) => Some(u64::MAX),
    }
}

/// Least common multiple of two positive numbers; saturates.
fn least_common_multiple(one: u64, other: u64) -> u64 {
    let (mut larger, mut smaller) = (one, other);
    while smaller > 0 {
        (larger, smaller) = (smaller, larger % smaller);
    }
    (one / larger).saturating_mul(other)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{GrammarKind, check};
    use super::*;

    fn check_schema(text: &str) -> Result<(), GrammarError> {
        check(GrammarKind::JsonSchema, text)
    }

    fn check_lark(text: &str) -> Result<(), GrammarError> {
        check(GrammarKind::Lark, text)
    }

    /// `count` members with this value.
    fn members(count: usize, value: &Value) -> Value {
        (0..count).map(|number| (format!("p{number}"), value.clone())).collect::<serde_json::Map<_, _>>().into()
    }

    fn list(count: usize, value: impl Fn(usize) -> Value) -> Value {
        (0..count).map(value).collect::<Vec<_>>().into()
    }

    fn object(number: usize) -> Value {
        json!({"type": "object", "properties": {format!("k{number}"): {}}})
    }

    /// Hostile schemas, each with a word of its refusal. The compiler does not refuse them reliably or quickly.
    fn hostile() -> Vec<(Value, &'static str)> {
        vec![
            (json!({"properties": members(501, &json!({}))}), "members in `properties`"),
            (json!({"$defs": members(1_001, &json!({"type": "null"}))}), "members in an object"),
            (json!({"$defs": {"a": {"items": {"properties": members(501, &json!({}))}}}}), "members in `properties`"),
            (json!({"properties": members(50, &json!({"properties": members(450, &json!({}))}))}), "in all"),
            (json!({"$defs": members(200, &json!({"enum": list(100, |number| number.into())}))}), "in all"),
            (json!({"anyOf": list(4_000, object)}), "elements in `anyOf`"),
            (json!({"items": {"oneOf": list(1_001, object)}}), "elements in `oneOf`"),
            (json!({"not": {"allOf": list(1_001, object)}}), "elements in `allOf`"),
            (json!({"prefixItems": list(2_000, object)}), "elements in `prefixItems`"),
            (json!({"required": list(5_000, |number| format!("r{number}").into())}), "elements in `required`"),
            (json!({"anyOf": list(30, |_| json!({"anyOf": list(700, |_| json!({}))}))}), "in all"),
            (json!({"enum": list(20_001, |number| number.into())}), "in all"),
            (json!({"const": list(30_000, |number| number.into())}), "in all"),
            (json!({"enum": list(5_000, |number| json!({"a": [number, number]}))}), "in all"),
            (json!({"pattern": "a".repeat(200_000)}), "bytes in a pattern"),
            (json!({"properties": members(30, &json!({"pattern": "a|b".repeat(2_500)}))}), "bytes in all regular"),
            (json!({"patternProperties": {"a".repeat(9_000): {}}}), "bytes in a pattern"),
            (json!({"patternProperties": members(500, &json!({}))}), "patternProperties"),
            (json!({"anyOf": list(3, |_| json!({"patternProperties": members(30, &json!({}))}))}), "patternProperties"),
            (json!({"multipleOf": 1_000_003}), "multipleOf"),
            (json!({"multipleOf": 4_294_967_291_u32}), "multipleOf"),
            (json!({"multipleOf": 1.234_567_891_234_567e-9}), "multipleOf"),
            (json!({"allOf": [{"multipleOf": 101}, {"multipleOf": 1.03}]}), "multipleOf"),
        ]
    }

    #[test]
    fn rejects_hostile_schemas_before_compilation() {
        for (schema, word) in hostile() {
            let text = schema.to_string();
            let shown: String = text.chars().take(80).collect();
            let GrammarError(reason) = check_schema(&text).expect_err(&shown);
            assert!(reason.contains(word), "{shown}: {reason}");
            for lark in [
                format!("start: answer\nanswer: %json {text}\n"),
                // a lone quotation mark, keywords in a text and in a comment, another schema before it
                format!(
                    "// %json [\"\nstart: QUOTE \"%json\" a b\nQUOTE: /\"/\na: %json {{\"type\": \"null\"}}\nb: %json\n {text}\n"
                ),
            ] {
                let GrammarError(reason) = check_lark(&lark).expect_err(&shown);
                assert!(reason.contains(word), "{shown}: {reason}");
            }
        }
    }

    #[test]
    fn shares_limits_between_schemas_of_a_grammar() {
        let schema = json!({"enum": list(6_000, |number| number.into())}).to_string();
        let grammar = |count: usize| {
            (0..count)
                .map(|number| format!("a{number}: %json {schema}\n"))
                .fold("start: a0\n".to_owned(), |all, one| all + &one)
        };
        assert_eq!(check_lark(&grammar(3)), Ok(()));
        assert!(check_lark(&grammar(4)).is_err());
    }

    #[test]
    fn allows_schemas_within_the_limits() {
        for schema in [
            json!({"properties": members(500, &json!({"type": "string"}))}),
            json!({"$defs": members(1_000, &json!({"type": "string"}))}),
            json!({"enum": list(19_000, |number| number.into())}),
            json!({"anyOf": list(1_000, object)}),
            json!({"pattern": "a".repeat(8_000)}),
            json!({"patternProperties": members(64, &json!({}))}),
            json!({"properties": {"a": {"multipleOf": 0.01}, "b": {"multipleOf": 1e-6}, "c": {"multipleOf": 500_000}, "d": {"multipleOf": 60}}}),
            // invalid, but refused by the compiler
            json!({"multipleOf": 0}),
            json!({"multipleOf": "2"}),
            // a property with that name
            json!({"properties": {"pattern": {"type": "string"}, "required": {"type": "array"}}}),
            json!(true),
        ] {
            assert_eq!(check_schema(&schema.to_string()), Ok(()));
        }
        assert!(check_schema("not json").is_err());
        assert!(check_schema(&format!("{}{}", "[".repeat(100_000), "]".repeat(100_000))).is_err(), "no stack overflow");
    }
}
