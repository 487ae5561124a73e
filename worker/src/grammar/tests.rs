use std::path::PathBuf;

use super::*;

fn grammars() -> Grammars {
    let file = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/tokenizers/tekken-v13-8k.json"));
    Grammars::load(&file).unwrap()
}

fn vocabulary() -> Vocabulary {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/tokenizers/tekken-v13-8k.json");
    Vocabulary::load(file).unwrap()
}

fn prepare(grammars: &Grammars, source: &GrammarSource) -> Result<(), GrammarError> {
    grammars.prepare(source).map(drop).map_err(|error| match error {
        PrepareError::Refused(error) => error,
        PrepareError::Busy(reason) => panic!("{reason}"),
    })
}

fn source(kind: GrammarKind, text: &str) -> GrammarSource {
    GrammarSource { kind, text: text.to_owned() }
}

/// Walks to the end; each step takes the allowed token that `choose` rates highest. Returns text and tokens.
fn walk(state: &mut GrammarState, vocabulary: &Vocabulary, choose: impl Fn(&[u8], usize) -> i64) -> (String, Vec<u32>) {
    let (mut text, mut ids) = (Vec::new(), Vec::new());
    for step in 0..200 {
        let mask = state.mask().unwrap();
        let allowed = (0..vocabulary.len() as u32).filter(|id| allows(&mask, *id));
        let id = allowed.max_by_key(|id| choose(vocabulary.ordinary(*id).unwrap_or_default(), step)).unwrap();
        ids.push(id);
        state.accept(id).unwrap();
        if id == vocabulary.eos_id() {
            return (String::from_utf8(text).unwrap(), ids);
        }
        match vocabulary.ordinary(id) {
            Some(bytes) => text.extend_from_slice(bytes),
            None => text.extend_from_slice(vocabulary.special_name(id).unwrap().as_bytes()),
        }
    }
    panic!("no end within 200 ids: {}", String::from_utf8_lossy(&text));
}

/// Prefers short texts and avoids whitespace.
fn terse(bytes: &[u8], _: usize) -> i64 {
    if bytes.is_empty() {
        return 1_000; // the end
    }
    -(bytes.len() as i64) - if bytes.iter().any(u8::is_ascii_whitespace) { 1_000 } else { 0 }
}

#[test]
fn generates_json_that_matches_the_schema() {
    let (grammars, vocabulary) = (grammars(), vocabulary());
    let schema = r#"{"type": "object", "properties": {"name": {"type": "string", "maxLength": 3},
        "age": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["name", "age"], "additionalProperties": false}"#;
    let mut state = grammars.begin(&source(GrammarKind::JsonSchema, schema), &[]).unwrap();
    assert!(!state.may_end());
    let (text, _) = walk(&mut state, &vocabulary, terse);
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(value["name"].is_string() && value["age"].is_u64(), "{text}");
    assert_eq!(value.as_object().unwrap().len(), 2);
    assert!(state.may_end());
    // tokens after the end change nothing
    state.accept(1_500).unwrap();
    assert!(allows(&state.mask().unwrap(), vocabulary.eos_id()));
}

#[test]
fn allows_tool_calls_after_text() {
    let (grammars, vocabulary) = (grammars(), vocabulary());
    let (calls, args) = (vocabulary.special_id("[TOOL_CALLS]").unwrap(), vocabulary.special_id("[ARGS]").unwrap());
    // as the router writes it
    let lark = format!(
        "start: text? (calls+)?\ntext: /(?s:.+)/\ncalls: call_0\ncall_0: <[{calls}]> \"look\" <[{args}]> arguments_0\n\
         arguments_0: %json {{\"type\": \"object\", \"additionalProperties\": false}}\n"
    );
    let source = source(GrammarKind::Lark, &lark);
    let ids = |text: &str| -> Vec<u32> {
        let of_byte = |byte: u8| (0..vocabulary.len() as u32).find(|id| vocabulary.ordinary(*id) == Some(&[byte]));
        text.bytes().map(|byte| of_byte(byte).unwrap()).collect()
    };
    let end = vocabulary.eos_id();
    for before in [String::new(), "a [TOOL_CALLS]\n\"{\u{e9}".to_owned()] {
        let mut state = grammars.begin(&source, &ids(&before)).unwrap();
        let mask = state.mask().unwrap();
        let every = (0..vocabulary.len() as u32).filter(|id| allows(&mask, *id)).count();
        assert!(allows(&mask, calls) && allows(&mask, end) && !allows(&mask, args) && every > 8_000, "{every}");
        state.accept(calls).unwrap();
        let mask = state.mask().unwrap();
        let next = (0..vocabulary.len() as u32).filter(|id| allows(&mask, *id));
        assert!(next.into_iter().all(|id| vocabulary.ordinary(id).is_some_and(|bytes| b"look".starts_with(bytes))));
        for id in [ids("look"), vec![args], ids("{}")].concat() {
            state.accept(id).unwrap();
        }
        let mask = state.mask().unwrap();
        let next: Vec<u32> = (0..vocabulary.len() as u32).filter(|id| allows(&mask, *id)).collect();
        assert_eq!(next, [end.min(calls), end.max(calls)]);
    }
}

#[test]
fn generates_a_forced_call_with_special_tokens() {
    let (grammars, vocabulary) = (grammars(), vocabulary());
    let (calls, args) = (vocabulary.special_id("[TOOL_CALLS]").unwrap(), vocabulary.special_id("[ARGS]").unwrap());
    let lark = format!(
        "start: <[{calls}]> \"look_up\" <[{args}]> arguments\narguments: %json {{\"type\": \"object\", \
         \"properties\": {{\"n\": {{\"const\": 7}}}}, \"required\": [\"n\"], \"additionalProperties\": false}}\n"
    );
    let mut state = grammars.begin(&source(GrammarKind::Lark, &lark), &[]).unwrap();
    let (text, ids) = walk(&mut state, &vocabulary, terse);
    assert_eq!(ids[0], calls);
    assert_eq!(ids.iter().filter(|id| **id == args).count(), 1);
    let (head, json) = text.split_once("[ARGS]").unwrap();
    assert_eq!(head, "[TOOL_CALLS]look_up");
    assert_eq!(serde_json::from_str::<serde_json::Value>(json).unwrap(), serde_json::json!({"n": 7}));
}

#[test]
fn never_matches_special_tokens_as_text() {
    let (grammars, vocabulary) = (grammars(), vocabulary());
    let mut state = grammars.begin(&source(GrammarKind::Regex, r"(?s:.*)"), &[]).unwrap();
    let mask = state.mask().unwrap();
    for id in 0..vocabulary.len() as u32 {
        if vocabulary.special_name(id).is_some() {
            assert_eq!(allows(&mask, id), id == vocabulary.eos_id(), "{id}");
        }
    }
    assert!(!allows(&mask, vocabulary.len() as u32 + 100), "beyond the vocabulary");
}

#[test]
fn resumes_at_the_same_state() {
    let (grammars, vocabulary) = (grammars(), vocabulary());
    let choice = source(GrammarKind::Lark, r#"start: "left hand" | "left foot" | "right""#);
    let mut first = grammars.begin(&choice, &[]).unwrap();
    let (_, ids) = walk(&mut first, &vocabulary, terse);
    for cut in 0..ids.len() {
        let mut resumed = grammars.begin(&choice, &ids[..cut]).unwrap();
        let mut undisturbed = grammars.begin(&choice, &[]).unwrap();
        ids[..cut].iter().for_each(|id| undisturbed.accept(*id).unwrap());
        assert_eq!(resumed.mask().unwrap(), undisturbed.mask().unwrap(), "after {cut}");
    }
    let other = vocabulary.special_id("[INST]").unwrap();
    assert!(grammars.begin(&choice, &[other]).is_err(), "an id that can't have been generated");
}

#[test]
fn rejects_invalid_grammars() {
    let grammars = grammars();
    let deep = format!("start: {}\"a\"{}", "(".repeat(100_000), ")".repeat(100_000));
    let wide = format!(r#"{{"enum": [{}]}}"#, (0..15_000).map(|n| n.to_string()).collect::<Vec<_>>().join(","));
    for (kind, text) in [
        (v1::grammar::Kind::JsonSchema, "not json"),
        (v1::grammar::Kind::JsonSchema, r#"{"type": "nothing"}"#),
        (v1::grammar::Kind::JsonSchema, r#"{"type": "string", "pattern": "("}"#),
        (v1::grammar::Kind::JsonSchema, "false"),
        (v1::grammar::Kind::Regex, "a("),
        (v1::grammar::Kind::Lark, "start: nowhere"),
        (v1::grammar::Kind::Lark, deep.as_str()),
        (v1::grammar::Kind::Lark, ""),
        (v1::grammar::Kind::Unspecified, "a"),
    ] {
        let grammar = v1::Grammar { kind: kind.into(), source: text.to_owned() };
        let outcome = GrammarSource::try_from(grammar).and_then(|source| prepare(&grammars, &source));
        assert!(outcome.is_err(), "{kind:?} {}", text.chars().take(80).collect::<String>());
    }
    // large, but valid
    grammars.prepare(&source(GrammarKind::JsonSchema, &wide)).unwrap();
    let long = v1::Grammar { kind: v1::grammar::Kind::Regex.into(), source: "a".repeat(MAX_GRAMMAR_BYTES + 1) };
    assert!(GrammarSource::try_from(long).is_err());
}

#[test]
fn rejects_grammars_that_multiply_while_compiled() {
    let grammars = grammars();
    let option = |name: String| format!(r#"{{"type": "object", "properties": {{"{name}": {{}}}}}}"#);
    let options = |letter: char, count: usize| {
        let options: Vec<String> = (0..count).map(|number| option(format!("{letter}{number}"))).collect();
        format!(r#"{{"anyOf": [{}]}}"#, options.join(","))
    };
    let product = |letters: &str, count: usize| {
        let factors: Vec<String> = letters.chars().map(|letter| options(letter, count)).collect();
        format!(r#"{{"allOf": [{}]}}"#, factors.join(","))
    };
    // each reference doubles its target
    let doubling = |levels: usize| {
        let level = |number: usize| {
            let next = format!("{{\"$ref\": \"#/$defs/d{}\"}}", number + 1);
            format!("\"d{number}\": {{\"anyOf\": [{next}, {{\"allOf\": [{next}, {{\"minLength\": 1}}]}}]}}")
        };
        let levels_of = (0..levels).map(level).collect::<Vec<_>>().join(", ");
        format!("{{\"$defs\": {{{levels_of}, \"d{levels}\": {}}}, \"$ref\": \"#/$defs/d0\"}}", option("a".into()))
    };
    let read = |source: String| {
        let grammar = v1::Grammar { kind: v1::grammar::Kind::JsonSchema.into(), source };
        GrammarSource::try_from(grammar).and_then(|source| prepare(&grammars, &source))
    };
    assert_eq!(read(product("ab", 10)), Ok(()));
    assert_eq!(read(doubling(5)), Ok(()));
    for hostile in [product("ab", 60), product("abc", 20), doubling(12), doubling(30)] {
        let GrammarError(reason) = read(hostile).unwrap_err();
        assert!(["too big", "too large", "merged"].iter().any(|word| reason.contains(word)), "{reason}");
    }
}

#[test]
fn allows_more_tools_than_any_agent_has() {
    let parameters: Vec<String> = (0..20)
        .map(|number| format!(r#""p{number}": {{"type": "string", "description": "what it is for"}}"#))
        .collect();
    let schema = format!(r#"{{"type": "object", "properties": {{{}}}, "required": ["p0"]}}"#, parameters.join(", "));
    let names: Vec<String> = (0..128).map(|number| format!("call_{number}")).collect();
    // as the router writes it
    let mut lark = format!("start: calls+\ncalls: {}\n", names.join(" | "));
    for (number, name) in names.iter().enumerate() {
        lark +=
            &format!("{name}: <[9]> \"tool_{number}\" <[32]> arguments_{number}\narguments_{number}: %json {schema}\n");
    }
    let read = GrammarSource::try_from(v1::Grammar { kind: v1::grammar::Kind::Lark.into(), source: lark });
    grammars().prepare(&read.unwrap()).unwrap();
}
