//! Bounds on the expansion of a schema's `allOf`s and references.
//!
//! llguidance merges the members of an `allOf`, and a reference with its siblings, and follows the references in them
//! to do so. An `allOf` with two references to a definition that has an `allOf` with two references, and so on, doubles
//! with every level. A reference without siblings is followed once, however often it occurs. This module computes an
//! upper bound of the merged schemas.

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::GrammarError;

/// Maximum merged schemas, counted as often as they are merged.
const MAX_MERGED: u64 = 50_000;
/// Maximum depth of references within references.
const MAX_DEPTH: usize = 100;
/// Members that hold no schemas.
const DATA: [&str; 5] = ["const", "enum", "default", "example", "examples"];
/// Members beside a reference that do not constrain a value.
const ANNOTATIONS: [&str; 16] = [
    "$ref",
    "$schema",
    "$id",
    "id",
    "title",
    "description",
    "default",
    "example",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "$comment",
    "$defs",
    "definitions",
    "x-guidance",
];

/// Checks that the schema merges within the limit.
pub(super) fn check(schema: &Value) -> Result<(), GrammarError> {
    let mut merging = Merging { root: schema, known: HashMap::new(), merged: 0 };
    merging.find(schema)
}

struct Merging<'a> {
    root: &'a Value,
    /// Schemas that each one is merged from; `None` while it is being counted.
    known: HashMap<*const Value, Option<u64>>,
    merged: u64,
}

impl<'a> Merging<'a> {
    /// Finds all merged schemas at any depth.
    fn find(&mut self, value: &'a Value) -> Result<(), GrammarError> {
        match value {
            Value::Object(members) => {
                if merges(members) {
                    let count = self.count(value, 0)?;
                    self.merged = self.merged.saturating_add(count);
                    if self.merged > MAX_MERGED {
                        let reason =
                            format!("its `allOf`s and references are merged of more than {MAX_MERGED} schemas");
                        return Err(GrammarError(reason));
                    }
                }
                let mut schemas = members.iter().filter(|(key, _)| !DATA.contains(&key.as_str()));
                schemas.try_for_each(|(_, member)| self.find(member))
            }
            Value::Array(elements) => elements.iter().try_for_each(|element| self.find(element)),
            _ => Ok(()),
        }
    }

    /// Number of schemas in this one, with references followed.
    fn count(&mut self, value: &'a Value, depth: usize) -> Result<u64, GrammarError> {
        match value {
            Value::Object(members) => {
                match self.known.get(&std::ptr::from_ref(value)) {
                    Some(Some(count)) => return Ok(*count),
                    // the compiler refuses it
                    Some(None) => return Ok(1),
                    None => {}
                }
                if depth > MAX_DEPTH {
                    let reason = format!("its references are nested more than {MAX_DEPTH} deep where they are merged");
                    return Err(GrammarError(reason));
                }
                self.known.insert(value, None);
                let mut count = 1_u64;
                if let Some(Value::String(reference)) = members.get("$ref") {
                    let target = self.target(reference)?;
                    count = count.saturating_add(self.count(target, depth + 1)?);
                }
                for (_, member) in members.iter().filter(|(key, _)| !DATA.contains(&key.as_str())) {
                    count = count.saturating_add(self.count(member, depth + 1)?);
                }
                self.known.insert(value, Some(count));
                Ok(count)
            }
            Value::Array(elements) => elements
                .iter()
                .try_fold(0_u64, |count, element| Ok(count.saturating_add(self.count(element, depth + 1)?))),
            _ => Ok(0),
        }
    }

    /// The target of a reference.
    fn target(&self, reference: &str) -> Result<&'a Value, GrammarError> {
        let pointer = reference.strip_prefix('#').filter(|_| !has_identifier(self.root));
        pointer.and_then(|pointer| self.root.pointer(&percent_decoded(pointer)?)).ok_or_else(|| {
            let shown: String = reference.chars().take(80).collect();
            GrammarError(format!("the reference `{shown}` can't be followed where it is merged with something"))
        })
    }
}

/// Whether the members are merged with each other.
fn merges(members: &Map<String, Value>) -> bool {
    let all_of = members.get("allOf").and_then(Value::as_array).map_or(0, Vec::len);
    let others = members.keys().any(|key| key != "allOf" && !ANNOTATIONS.contains(&key.as_str()));
    let refers = members.contains_key("$ref");
    all_of > 1 || (all_of == 1 && (others || refers)) || (refers && others)
}

/// Whether a part of the schema has an identifier of its own, which its references start from.
fn has_identifier(root: &Value) -> bool {
    fn within(value: &Value, is_root: bool) -> bool {
        match value {
            Value::Object(members) => {
                let named = ["$id", "id"].iter().any(|key| members.get(*key).is_some_and(Value::is_string));
                (named && !is_root) || members.values().any(|member| within(member, false))
            }
            Value::Array(elements) => elements.iter().any(|element| within(element, false)),
            _ => false,
        }
    }
    within(root, true)
}

/// Decodes a JSON pointer from the fragment of a URI.
fn percent_decoded(pointer: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(pointer.len());
    let mut rest = pointer.as_bytes();
    while let Some((first, behind)) = rest.split_first() {
        rest = behind;
        if *first == b'%' {
            let digits = std::str::from_utf8(rest.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &rest[2..];
        } else {
            bytes.push(*first);
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Definitions, each of which refers to the next one.
    fn levels(count: usize, level: impl Fn(Value) -> Value) -> Value {
        let definitions: Map<String, Value> = (0..count)
            .map(|number| (format!("d {number}"), level(json!({"$ref": format!("#/$defs/d%20{}", number + 1)}))))
            .chain([(format!("d {count}"), json!({"type": "string"}))])
            .collect();
        json!({"$defs": definitions, "$ref": "#/$defs/d%200"})
    }

    #[test]
    fn rejects_merged_references_that_double() {
        for hostile in [
            levels(20, |next| json!({"allOf": [next.clone(), next]})),
            levels(20, |next| json!({"allOf": [{"properties": {"x": next.clone()}}, {"properties": {"x": next}}]})),
            levels(20, |next| json!({"$ref": next["$ref"], "anyOf": [next, {"type": "string"}]})),
            levels(20, |next| json!({"allOf": [{"items": next.clone()}], "items": next})),
            levels(99, |next| json!({"allOf": [next, {"minLength": 1}]})),
            json!({"$defs": {"a": {"$id": "b", "allOf": [{"$ref": "#/c"}, {}]}}}),
            json!({"allOf": [{"$ref": "other.json"}, {"type": "string"}]}),
        ] {
            assert!(check(&hostile).is_err(), "{hostile}");
        }
    }

    #[test]
    fn allows_common_references() {
        for fine in [
            levels(400, |next| next),
            json!({"$ref": "#/$defs/a", "x-guidance": {}, "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}}),
            levels(30, |next| json!({"type": "object", "properties": {"left": next.clone(), "right": next}})),
            levels(30, |next| json!({"anyOf": [next.clone(), {"allOf": [next], "title": "one"}]})),
            levels(8, |next| json!({"allOf": [next.clone(), next]})),
            json!({"properties": {"child": {"$ref": "#", "description": "of its kind"}}}),
            json!({"properties": {"child": {"allOf": [{"$ref": "#"}], "default": null}}, "allOf": [{"$ref": "#/$defs/a"}, {"required": ["b"]}],
                "$defs": {"a": {"properties": {"id": {"type": "string"}, "again": {"$ref": "#"}}}}}),
        ] {
            assert_eq!(check(&fine), Ok(()), "{fine}");
        }
    }
}
