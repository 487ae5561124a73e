//! Generated token IDs to tool calls: every golden, in every way of cutting the stream.

use crate::support::{goldens, ids, tokenizer};
use bora_common::conversation::{CallError, Delta, ToolCallParser, new_call_id};
use serde_json::Value;

/// What a client has after the deltas: content, and name and arguments of each call.
#[derive(Debug, Default, PartialEq, Eq)]
struct Received {
    content: String,
    calls: Vec<(String, String)>,
    ended: usize,
}

impl Received {
    fn add(&mut self, deltas: Vec<Delta>) {
        for delta in deltas {
            match delta {
                Delta::Content(text) => {
                    assert!(!text.is_empty());
                    self.content.push_str(&text);
                }
                Delta::CallStart { index, name } => {
                    assert_eq!(index, self.calls.len());
                    self.calls.push((name, String::new()));
                }
                Delta::Arguments { index, text } => {
                    assert_eq!(index + 1, self.calls.len());
                    self.calls[index].1.push_str(&text);
                }
                Delta::CallEnd { index } => {
                    assert_eq!(index, self.ended);
                    self.ended += 1;
                }
            }
        }
    }
}

fn parse(name: &str, ids: &[u32], cut: bool) -> (Received, Option<CallError>) {
    let mut parser = ToolCallParser::new(tokenizer(name));
    let mut received = Received::default();
    for id in ids {
        received.add(parser.push(*id));
    }
    received.add(parser.finish(cut));
    (received, parser.error())
}

/// What the reference refuses to parse is flagged, and is handed over in a form of its own.
#[test]
fn every_tool_parse_golden_is_met() {
    let goldens = goldens("golden_tool_parse.jsonl");
    assert!(goldens.len() >= 20);
    for golden in goldens {
        let name = &golden["name"];
        let tokenizer = golden["tokenizer"].as_str().expect("tokenizer");
        let output = ids(&golden["output_ids"]);
        let without_end: Vec<u32> = output.iter().copied().filter(|id| *id != 2).collect();
        let (received, error) = parse(tokenizer, &output, false);
        assert_eq!((&received, error), (&parse(tokenizer, &without_end, false).0, error), "{name}");
        assert_eq!(received.ended, received.calls.len(), "{name}");
        if golden.get("error").is_some() {
            assert!(error.is_some(), "{name}");
            assert!(!received.content.contains("[TOOL_CALLS]") && !received.calls.is_empty(), "{name}");
            continue;
        }
        assert_eq!(error, None, "{name}");
        assert_eq!(received.content, golden["content"].as_str().unwrap_or_default(), "{name}");
        let expected = golden["tool_calls"].as_array().expect("calls");
        assert_eq!(received.calls.len(), expected.len(), "{name}");
        for ((called, arguments), expected) in received.calls.iter().zip(expected) {
            assert_eq!(called, expected["name"].as_str().expect("name"), "{name}");
            let arguments: Value = serde_json::from_str(arguments).expect("arguments");
            let wanted: Value =
                serde_json::from_str(expected["arguments"].as_str().expect("arguments")).expect("arguments");
            assert_eq!(arguments, wanted, "{name}");
        }
    }
}

#[test]
fn output_that_is_not_well_formed_has_one_meaning() {
    // 9 [TOOL_CALLS], 32 [ARGS], 33 [CALL_ID]; 1102 f, 1103 g, 1097 a, 1098 b, 30620 {}, 19227 {", 1032 a space
    type Case = (&'static [u32], &'static str, &'static [(&'static str, &'static str)], Option<CallError>);
    let cases: [Case; 14] = [
        (&[9, 1102], "", &[("f", "{}")], Some(CallError::NoArguments)),
        (&[9, 1102, 32], "", &[("f", "{}")], None),
        (&[9, 1102, 32, 1032], "", &[("f", "{}")], None),
        (&[1097, 9, 1102, 9, 1103, 32, 30620], "a", &[("f", "{}"), ("g", "{}")], Some(CallError::NoArguments)),
        (&[1097, 32, 1098], "ab", &[], Some(CallError::StrayArguments)),
        (&[9, 1102, 32, 30620, 32, 1097], "a", &[("f", "{}")], Some(CallError::StrayArguments)),
        (&[9, 1102, 32, 30620, 1032, 1097, 1032], "a ", &[("f", "{}")], None),
        (&[9, 1102, 33, 1097, 1098, 32, 30620], "", &[("f", "{}")], None),
        (&[9, 32, 30620], "{}", &[], Some(CallError::NoName)),
        (&[9, 9, 9, 1102, 32, 30620], "", &[("f", "{}")], Some(CallError::NoArguments)),
        (&[9, 1102, 1032, 1103], "f g", &[], Some(CallError::NoArguments)),
        (&[9, 1102, 1032, 1103, 32, 30620], "", &[("f g", "{}")], None),
        (&[9, 1102, 32, 19227, 1097], "", &[("f", "{\"a")], Some(CallError::InvalidArguments)),
        (&[9, 1102, 32, 1097, 30620, 1098], "", &[("f", "a{}b")], Some(CallError::InvalidArguments)),
    ];
    for (ids, content, calls, expected) in cases {
        let (received, error) = parse("tekken-v13.json", ids, false);
        let called: Vec<(&str, &str)> = received.calls.iter().map(|(name, text)| (&**name, &**text)).collect();
        assert_eq!((&*received.content, &*called, error), (content, calls, expected), "{ids:?}");
        assert_eq!(received.ended, calls.len(), "{ids:?}");
    }
}

/// Where an output is cut off, what was complete stays, and the rest of a call is partial.
#[test]
fn a_cut_leaves_the_beginning_as_it_was() {
    let ids = [1097, 9, 1102, 32, 19227, 1097, 2811, 1032, 1049, 1125, 1032, 1098, 9, 1103, 32, 30620];
    let whole = parse("tekken-v13.json", &ids, false).0;
    assert_eq!(whole.calls, [("f".into(), "{\"a\": 1}".into()), ("g".into(), "{}".into())]);
    for cut in 0..=ids.len() {
        let (received, error) = parse("tekken-v13.json", &ids[..cut], true);
        assert!(whole.content.starts_with(&received.content) && error.is_none(), "{cut}");
        for ((name, arguments), (whole_name, whole_arguments)) in received.calls.iter().zip(&whole.calls) {
            assert!(name == whole_name && whole_arguments.starts_with(arguments), "{cut}");
        }
        assert!(received.ended + 1 >= received.calls.len() && received.calls.len() <= 2, "{cut}");
        // in the middle of a name there is no call yet
        assert_eq!(received.calls.len(), usize::from(cut > 3) + usize::from(cut > 14), "{cut}");
    }
}

#[test]
fn call_ids_are_nine_letters_and_digits() {
    let ids: std::collections::HashSet<String> = (0..1000).map(|_| new_call_id()).collect();
    assert_eq!(ids.len(), 1000);
    assert!(ids.iter().all(|id| id.len() == 9 && id.bytes().all(|byte| byte.is_ascii_alphanumeric())));
}
