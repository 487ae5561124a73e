//! JSON schemas in the form that groups compile: patterns in their dialect, and numbers that their compiler reads
//! exactly.

use serde_json::{Map, Value, json};

use super::pattern::{self, Untranslatable};

/// Maximum white space between the parts of a JSON text: enough for any indentation, too little to fill the context
/// window.
const WHITE_SPACE: &str = r"[\x20\x0A\x0D\x09]{1,64}";
/// Integers up to this are exact as doubles.
const MAX_EXACT: i128 = 1 << 53;
/// The largest double below 2^63, the limit of the compiler's integers.
const MAX_INTEGER: f64 = 9_223_372_036_854_774_784.0;
/// From this value on the compiler needs both bounds.
const MAX_OPEN: f64 = 999_999_999_999_999_872.0;
/// Keywords whose values hold no schemas.
const DATA: [&str; 5] = ["const", "enum", "default", "example", "examples"];
/// Keywords whose values are maps of schemas.
const MAPS: [&str; 5] = ["properties", "patternProperties", "$defs", "definitions", "dependentSchemas"];

/// A part of a schema that is not supported.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{place}` can't be kept: {reason}")]
pub(super) struct Unkept {
    /// A JSON pointer to it.
    pub place: String,
    /// The reason.
    pub reason: String,
}

/// Converts a schema for a group. If it is not strict, unsupported parts are left out; if it is strict, they are
/// errors. With `refuses_malformed`, a malformed regular expression is always an error.
pub(super) fn for_group(schema: &Value, strict: bool, refuses_malformed: bool) -> Result<String, Unkept> {
    let mut schema = schema.clone();
    Rewriting { strict, refuses_malformed, depth: 0, place: String::new() }.schema(&mut schema)?;
    if let Some(object) = schema.as_object_mut() {
        object.insert("x-guidance".into(), json!({"whitespace_pattern": WHITE_SPACE, "lenient": !strict}));
    }
    Ok(schema.to_string())
}

/// Maximum depth of a schema; the limit of groups is lower.
const MAX_DEPTH: usize = 200;

struct Rewriting {
    strict: bool,
    refuses_malformed: bool,
    depth: usize,
    /// The JSON pointer to the current position.
    place: String,
}

impl Rewriting {
    fn schema(&mut self, schema: &mut Value) -> Result<(), Unkept> {
        if self.depth > MAX_DEPTH {
            return Err(Unkept { place: self.shown(), reason: "it is nested too deep".into() });
        }
        let object = match schema {
            Value::Object(object) => object,
            Value::Array(schemas) => {
                for (index, schema) in schemas.iter_mut().enumerate() {
                    self.at(&index.to_string(), |below| below.schema(schema))?;
                }
                return Ok(());
            }
            _ => return Ok(()),
        };
        self.pattern(object)?;
        self.pattern_properties(object)?;
        self.bounds(object)?;
        self.constants(object)?;
        for (key, member) in object.iter_mut().filter(|(key, _)| !DATA.contains(&key.as_str())) {
            self.at(key, |below| match member {
                Value::Object(members) if MAPS.contains(&key.as_str()) => {
                    members.iter_mut().try_for_each(|(name, member)| below.at(name, |below| below.schema(member)))
                }
                member => below.schema(member),
            })?;
        }
        Ok(())
    }

    fn at<T>(&mut self, key: &str, work: impl FnOnce(&mut Self) -> T) -> T {
        let length = self.place.len();
        self.place.push('/');
        self.place.push_str(&key.replace('~', "~0").replace('/', "~1"));
        self.depth += 1;
        let outcome = work(self);
        self.depth -= 1;
        self.place.truncate(length);
        outcome
    }

    /// Returns an error if the schema is strict.
    fn unkept(&mut self, key: &str, reason: String) -> Result<(), Unkept> {
        if !self.strict {
            return Ok(());
        }
        Err(self.at(key, |below| Unkept { place: below.shown(), reason }))
    }

    /// Returns an error if the schema is strict, or if the pattern is malformed and malformed patterns are refused.
    fn untranslatable(&mut self, key: &str, reason: &Untranslatable) -> Result<(), Unkept> {
        let is_refused = self.refuses_malformed && *reason == Untranslatable::Malformed;
        if is_refused {
            return Err(self.at(key, |below| Unkept { place: below.shown(), reason: reason.to_string() }));
        }
        self.unkept(key, reason.to_string())
    }

    fn shown(&self) -> String {
        self.place.chars().take(200).collect()
    }

    fn pattern(&mut self, object: &mut Map<String, Value>) -> Result<(), Unkept> {
        let Some(Value::String(pattern)) = object.get_mut("pattern") else { return Ok(()) };
        match pattern::translate(pattern) {
            Ok(translated) => *pattern = translated,
            Err(reason) => {
                self.untranslatable("pattern", &reason)?;
                object.shift_remove("pattern");
            }
        }
        Ok(())
    }

    fn pattern_properties(&mut self, object: &mut Map<String, Value>) -> Result<(), Unkept> {
        let Some(Value::Object(patterns)) = object.get_mut("patternProperties") else { return Ok(()) };
        let mut translated = Map::new();
        let mut left_out = false;
        for (pattern, schema) in std::mem::take(patterns) {
            match pattern::translate(&pattern) {
                Ok(pattern) => {
                    translated.insert(pattern, schema);
                }
                Err(reason) => {
                    self.at("patternProperties", |below| below.untranslatable(&pattern, &reason))?;
                    left_out = true;
                }
            }
        }
        if left_out {
            // text that the pattern would have allowed must stay allowed
            object.shift_remove("additionalProperties");
        }
        if translated.is_empty() {
            object.shift_remove("patternProperties");
        } else {
            object.insert("patternProperties".into(), Value::Object(translated));
        }
        Ok(())
    }

    /// The compiler reads bounds as doubles: a bound that is not a double is moved inwards to the next double.
    fn bounds(&mut self, object: &mut Map<String, Value>) -> Result<(), Unkept> {
        let is_integer = object.get("type").and_then(Value::as_str) == Some("integer");
        for (key, upwards) in
            [("minimum", true), ("exclusiveMinimum", true), ("maximum", false), ("exclusiveMaximum", false)]
        {
            let Some(Value::Number(number)) = object.get(key) else { continue };
            let exact = number.as_i64().map(i128::from).or_else(|| number.as_u64().map(i128::from));
            let mut bound = match exact {
                Some(exact) if exact.abs() > MAX_EXACT => next_double(exact, upwards),
                Some(_) => continue,
                None => number.as_f64().unwrap_or(0.0),
            };
            if is_integer {
                bound = bound.clamp(-MAX_INTEGER, MAX_INTEGER);
            }
            if exact.is_some() || number.as_f64() != Some(bound) {
                object.insert(key.to_owned(), json!(bound));
            }
        }
        let bound = |key: &str| object.get(key).and_then(Value::as_f64);
        let (least, most) = (
            bound("minimum").into_iter().chain(bound("exclusiveMinimum")).reduce(f64::max),
            bound("maximum").into_iter().chain(bound("exclusiveMaximum")).reduce(f64::min),
        );
        if let (Some(least), Some(most)) = (least, most)
            && least > most
            && least.abs().max(most.abs()) > MAX_EXACT as f64
        {
            self.unkept("minimum", "no double lies between its bounds".into())?;
            let (least, most) = (json!(most), json!(least));
            object.retain(|key, _| !["exclusiveMinimum", "exclusiveMaximum"].contains(&key.as_str()));
            object.insert("minimum".into(), least);
            object.insert("maximum".into(), most);
        } else if is_integer && least.is_some_and(|least| least > MAX_OPEN) && most.is_none() {
            object.insert("maximum".into(), json!(MAX_INTEGER));
        } else if is_integer && most.is_some_and(|most| most < -MAX_OPEN) && least.is_none() {
            object.insert("minimum".into(), json!(-MAX_INTEGER));
        }
        Ok(())
    }

    /// The compiler reads constants as doubles too. A constant that is not a double cannot be generated; the other
    /// values of an `enum` stay.
    fn constants(&mut self, object: &mut Map<String, Value>) -> Result<(), Unkept> {
        const REASON: &str = "a number in it is no double";
        if object.get("const").is_some_and(|constant| !is_exact(constant)) {
            self.unkept("const", REASON.into())?;
            object.shift_remove("const");
        }
        if let Some(Value::Array(constants)) = object.get("enum")
            && !constants.iter().all(is_exact)
        {
            self.unkept("enum", REASON.into())?;
            object.shift_remove("enum");
        }
        Ok(())
    }
}

/// The nearest double to an integer that is not below it, or not above it.
fn next_double(exact: i128, upwards: bool) -> f64 {
    let nearest = exact as f64;
    match (nearest as i128).cmp(&exact) {
        std::cmp::Ordering::Less if upwards => nearest.next_up(),
        std::cmp::Ordering::Greater if !upwards => nearest.next_down(),
        _ => nearest,
    }
}

/// Whether the compiler writes every number in the value unchanged.
fn is_exact(value: &Value) -> bool {
    match value {
        Value::Number(number) => {
            let exact = number.as_i64().map(i128::from).or_else(|| number.as_u64().map(i128::from));
            exact.is_none_or(|exact| {
                exact.abs() <= MAX_EXACT || (exact as f64 as i128 == exact && exact.abs() < i128::from(i64::MAX))
            })
        }
        Value::Array(values) => values.iter().all(is_exact),
        Value::Object(members) => members.values().all(is_exact),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(schema: &Value) -> Value {
        let mut schema: Value = serde_json::from_str(&for_group(schema, false, false).unwrap()).unwrap();
        schema.as_object_mut().unwrap().shift_remove("x-guidance");
        schema
    }

    fn refused(schema: &Value) -> (String, String) {
        let unkept = for_group(schema, true, false).expect_err(&schema.to_string());
        (unkept.place, unkept.reason)
    }

    #[test]
    fn translates_patterns_in_all_subschemas() {
        let schema = json!({"properties": {"pattern": {"pattern": r"^\d$"}}, "anyOf": [{"items": [{"pattern": "[&&]"}]}],
            "patternProperties": {r"^\w$": {"pattern": "a"}}, "enum": [{"pattern": r"\d"}], "default": {"pattern": "("}});
        let kept = kept(&schema);
        assert_eq!(kept["properties"]["pattern"]["pattern"], "^[0-9]$");
        assert_eq!(kept["anyOf"][0]["items"][0]["pattern"], r"[\x{26}\x{26}]");
        assert!(kept["patternProperties"].get("^[0-9A-Za-z_]$").is_some());
        assert_eq!((&kept["enum"], &kept["default"]), (&schema["enum"], &schema["default"]));
    }

    #[test]
    fn drops_or_names_unsupported_patterns() {
        let schema = json!({"properties": {"a/b": {"type": "string", "pattern": "(?=a)", "maxLength": 3}}});
        assert_eq!(kept(&schema), json!({"properties": {"a/b": {"type": "string", "maxLength": 3}}}));
        assert_eq!(refused(&schema), ("/properties/a~1b/pattern".into(), "it has a look-around".into()));
        let schema = json!({"patternProperties": {r"\bx": {}, "^y": {}}, "additionalProperties": false});
        assert_eq!(kept(&schema), json!({"patternProperties": {"^y": {}}}));
        assert_eq!(refused(&schema).0, r"/patternProperties/\bx");
        assert_eq!(
            kept(&json!({"pattern": 7, "patternProperties": []})),
            json!({"pattern": 7, "patternProperties": []})
        );
    }

    #[test]
    fn moves_inexact_bounds_inwards() {
        let schema =
            json!({"type": "integer", "minimum": 9_007_199_254_740_993_i64, "maximum": 9_007_199_254_740_999_i64});
        let bounds = kept(&schema);
        assert_eq!(
            (bounds["minimum"].as_f64(), bounds["maximum"].as_f64()),
            (Some(9_007_199_254_740_994.0), Some(9_007_199_254_740_998.0))
        );
        let bounds = kept(&json!({"type": "integer", "minimum": i64::MIN, "exclusiveMaximum": u64::MAX}));
        assert_eq!(
            (bounds["minimum"].as_f64(), bounds["exclusiveMaximum"].as_f64()),
            (Some(-MAX_INTEGER), Some(MAX_INTEGER))
        );
        let open = kept(&json!({"type": "integer", "minimum": 4_000_000_000_000_000_000_i64}));
        assert_eq!(open["maximum"].as_f64(), Some(MAX_INTEGER));
        let none =
            json!({"type": "integer", "minimum": 9_007_199_254_740_993_i64, "maximum": 9_007_199_254_740_993_i64});
        let wider = kept(&none);
        assert_eq!(
            (wider["minimum"].as_f64(), wider["maximum"].as_f64()),
            (Some(9_007_199_254_740_992.0), Some(9_007_199_254_740_994.0))
        );
        assert_eq!(refused(&none).0, "/minimum");
        let small = json!({"minimum": -5, "maximum": 1.5, "exclusiveMinimum": true});
        assert_eq!(kept(&small), small);
    }

    /// Unusual schemas: keywords of any type at any position.
    fn odd(random: &mut impl FnMut(usize) -> usize, depth: usize) -> Value {
        const KEYS: [&str; 17] = [
            "type",
            "pattern",
            "patternProperties",
            "properties",
            "items",
            "anyOf",
            "enum",
            "const",
            "minimum",
            "maximum",
            "exclusiveMaximum",
            "$ref",
            "$defs",
            "additionalProperties",
            "required",
            "default",
            "x-guidance",
        ];
        const TEXTS: [&str; 14] = [
            "string",
            "integer",
            "^(?!a)b",
            "[[:alpha:]]+",
            "(?i)x",
            "(?>a)",
            r"^\$?{{.*}}$",
            "a{,3}",
            "[",
            r"\p{Nope}",
            r"\bx",
            "#/$defs/a",
            "[a&&b]",
            "",
        ];
        match random(if depth > 4 { 6 } else { 9 }) {
            0 => Value::Null,
            1 => random(2).eq(&0).into(),
            2 => json!(9_007_199_254_740_993_i64 - random(3) as i64),
            3 => json!(u64::MAX - random(5) as u64),
            4 => json!(1.5e300),
            5 => TEXTS[random(TEXTS.len())].into(),
            6 => (0..random(4)).map(|_| odd(random, depth + 1)).collect::<Vec<_>>().into(),
            _ => (0..random(6))
                .map(|_| {
                    let key = if random(4) == 0 { TEXTS[random(TEXTS.len())] } else { KEYS[random(KEYS.len())] };
                    (key.to_owned(), odd(random, depth + 1))
                })
                .collect::<Map<_, _>>()
                .into(),
        }
    }

    #[test]
    fn keeps_supported_parts_of_unusual_schemas() {
        let mut state = 11_u64;
        let mut random = |bound: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % bound
        };
        for _ in 0..10_000 {
            let schema = odd(&mut random, 0);
            let once: Value = serde_json::from_str(&for_group(&schema, false, false).unwrap()).unwrap();
            if let Ok(strict) = for_group(&schema, true, false) {
                let mut strict: Value = serde_json::from_str(&strict).unwrap();
                let mut lenient = once.clone();
                for schema in [&mut strict, &mut lenient] {
                    schema.as_object_mut().map(|object| object.shift_remove("x-guidance"));
                }
                assert_eq!(strict, lenient, "{schema}");
            }
        }
    }

    #[test]
    fn drops_or_names_inexact_constants() {
        let schema = json!({"properties": {"id": {"type": "integer", "enum": [1, 9_007_199_254_740_993_i64]}}});
        assert_eq!(kept(&schema), json!({"properties": {"id": {"type": "integer"}}}));
        assert_eq!(refused(&schema).0, "/properties/id/enum");
        assert_eq!(refused(&json!({"const": {"a": [u64::MAX]}})).0, "/const");
        let exact = json!({"enum": [9_007_199_254_740_994_i64, -1, 0.5]});
        assert_eq!(kept(&exact), exact);
    }
}
