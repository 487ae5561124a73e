//! Makes new inputs out of those of the corpus: bytes are changed anywhere; what is JSON is changed as JSON as well, so
//! that most inputs reach what lies behind the parser.

use rand::{Rng, rngs::StdRng};
use serde_json::{Value, json};

/// Values that readers trip over.
fn strange(random: &mut StdRng) -> Value {
    match random.random_range(0..24) {
        0 => Value::Null,
        1 => json!(true),
        2 => json!(0),
        3 => json!(-1),
        4 => json!(i64::MAX),
        5 => json!(u64::MAX),
        6 => json!(1e308),
        7 => json!(-0.0),
        8 => json!(1.5),
        9 => json!(""),
        10 => json!("\u{0}\u{feff}\u{202e}"),
        11 => json!("x".repeat(random.random_range(1..5000))),
        12 => json!("[TOOL_CALLS]f[ARGS]{}</s>[INST]"),
        13 => json!([]),
        14 => json!({}),
        15 => json!([[[[[[[[]]]]]]]]),
        16 => json!({"type": "object", "properties": {"a": {"$ref": "#"}}}),
        17 => json!("data:image/png;base64,iVBORw0KGgo="),
        18 => {
            json!([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}])
        }
        19 => {
            json!({"role": "assistant", "content": null, "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{}"}}]})
        }
        20 => json!({"role": "tool", "tool_call_id": "abcdefghi", "content": "r"}),
        21 => json!({"role": "system", "content": "s"}),
        22 => json!(random.random::<i32>()),
        _ => json!(char::from_u32(random.random_range(0..0x11_0000)).unwrap_or('\u{fffd}').to_string()),
    }
}

/// A new input.
pub fn mutate(corpus: &[Vec<u8>], random: &mut StdRng) -> Vec<u8> {
    let base = &corpus[random.random_range(0..corpus.len())];
    let as_json = serde_json::from_slice::<Value>(base).ok().filter(|_| random.random_range(0..4) > 0);
    let mut input = match as_json {
        Some(mut value) => {
            for _ in 0..random.random_range(1..4) {
                let donor = &corpus[random.random_range(0..corpus.len())];
                change(&mut value, serde_json::from_slice(donor).ok(), random);
            }
            value.to_string().into_bytes()
        }
        None => base.clone(),
    };
    if random.random_range(0..3) == 0 || input == *base {
        for _ in 0..random.random_range(1..5) {
            change_bytes(&mut input, corpus, random);
        }
    }
    input
}

/// Changes one place of a JSON value.
fn change(value: &mut Value, donor: Option<Value>, random: &mut StdRng) {
    let deeper = random.random_range(0..8) > 0;
    match value {
        Value::Array(list) if deeper && !list.is_empty() => {
            let at = random.random_range(0..list.len());
            match random.random_range(0..12) {
                0 => drop(list.remove(at)),
                1 => list.insert(at, list[at].clone()),
                2 => list.insert(at, strange(random)),
                3 => list.reverse(),
                _ => change(&mut list[at], donor, random),
            }
        }
        Value::Object(map) if deeper && !map.is_empty() => {
            let Some(key) = map.keys().nth(random.random_range(0..map.len())).cloned() else { return };
            match random.random_range(0..12) {
                0 => drop(map.remove(&key)),
                1 => {
                    let moved = map.remove(&key);
                    map.insert(format!("{key}x"), moved.unwrap_or_default());
                }
                2 => drop(map.insert("content".into(), strange(random))),
                _ => {
                    if let Some(inner) = map.get_mut(&key) {
                        change(inner, donor, random);
                    }
                }
            }
        }
        other => {
            let part = donor.filter(|_| random.random_range(0..3) == 0).map(|donor| part_of(donor, random));
            *other = part.unwrap_or_else(|| strange(random));
        }
    }
}

/// Some value within another.
fn part_of(value: Value, random: &mut StdRng) -> Value {
    let parts: Vec<Value> = match value {
        Value::Array(list) => list,
        Value::Object(map) => map.into_iter().map(|(_, value)| value).collect(),
        other => return other,
    };
    match parts.len() {
        0 => Value::Null,
        count => {
            let part = parts.into_iter().nth(random.random_range(0..count)).unwrap_or_default();
            if random.random_range(0..2) == 0 { part } else { part_of(part, random) }
        }
    }
}

fn change_bytes(input: &mut Vec<u8>, corpus: &[Vec<u8>], random: &mut StdRng) {
    if input.is_empty() {
        input.push(random.random());
        return;
    }
    let at = random.random_range(0..input.len());
    match random.random_range(0..7) {
        0 => input[at] ^= 1 << random.random_range(0..8),
        1 => input[at] = random.random(),
        2 => drop(input.drain(at..(at + random.random_range(1..16)).min(input.len()))),
        3 => {
            let chunk = input[at..(at + random.random_range(1..64)).min(input.len())].to_vec();
            input.splice(at..at, chunk);
        }
        4 => {
            let other = &corpus[random.random_range(0..corpus.len())];
            if !other.is_empty() {
                let from = random.random_range(0..other.len());
                let chunk = other[from..(from + random.random_range(1..128)).min(other.len())].to_vec();
                input.splice(at..at, chunk);
            }
        }
        5 => input.truncate(at),
        _ => {
            let word: &[u8] =
                [&b"\\ud800"[..], b"\xff\xfe", b"null", b"9e999", b"{\"a\":", b"[[[[", b"\x09\x00", b"\x20\x00"]
                    [random.random_range(0..8)];
            input.splice(at..at, word.iter().copied());
        }
    }
}
