//! Generated ids to tool calls: every golden, in every way of cutting the stream.

use crate::support::{goldens, ids, tokenizer};
use bora_common::conversation::{Delta, FinalParse, ToolCallParser, new_call_id};
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

fn parse(name: &str, ids: &[u32]) -> (Received, FinalParse) {
    let mut parser = ToolCallParser::new(tokenizer(name));
    let mut received = Received::default();
    for id in ids {
        received.add(parser.push(*id));
    }
    let (deltas, parse) = parser.finish();
    received.add(deltas);
    (received, parse)
}

#[test]
fn every_tool_parse_golden_is_met() {
    let goldens = goldens("golden_tool_parse.jsonl");
    assert!(goldens.len() >= 20);
    for golden in goldens {
        let name = &golden["name"];
        let tokenizer = golden["tokenizer"].as_str().expect("tokenizer");
        let output = ids(&golden["output_ids"]);
        let without_end: Vec<u32> = output.iter().copied().filter(|id| *id != 2).collect();
        let (received, parse) = parse(tokenizer, &output);
        assert_eq!(
            (&received, &parse),
            (&self::parse(tokenizer, &without_end).0, &self::parse(tokenizer, &without_end).1),
            "{name}"
        );

        if golden.get("error").is_some() {
            assert!(parse.error.is_some(), "{name}");
            assert!(parse.tool_calls.is_empty(), "{name}");
            let text = golden["output_text"].as_str().expect("text").trim_end_matches("</s>");
            assert_eq!(parse.content.as_deref(), Some(text), "{name}");
            continue;
        }
        assert_eq!(parse.error, None, "{name}");
        assert_eq!(parse.content.as_deref(), golden["content"].as_str(), "{name}");
        let expected = golden["tool_calls"].as_array().expect("calls");
        assert_eq!(parse.tool_calls.len(), expected.len(), "{name}");
        for (call, expected) in parse.tool_calls.iter().zip(expected) {
            assert_eq!(call.name, expected["name"].as_str().expect("name"), "{name}");
            let arguments: Value = serde_json::from_str(&call.arguments).expect("arguments");
            let wanted: Value =
                serde_json::from_str(expected["arguments"].as_str().expect("arguments")).expect("arguments");
            assert_eq!(arguments, wanted, "{name}");
        }
        assert_eq!(received.content, parse.content.clone().unwrap_or_default(), "{name}");
        let calls: Vec<_> = parse.tool_calls.iter().map(|call| (call.name.clone(), call.arguments.clone())).collect();
        assert_eq!(received.calls, calls, "{name}");
        assert_eq!(received.ended, calls.len(), "{name}");
    }
}

/// A stream never shows a call before its name is complete, and text that is no call becomes content.
#[test]
fn broken_calls_end_as_content() {
    let tokenizer = tokenizer("tekken-v13.json");
    let cases: [(&[u32], &str, &str); 4] = [
        (&[9, 1102], "[TOOL_CALLS]f", "[TOOL_CALLS]f"),
        (
            &[1097, 9, 1102, 9, 1103, 32, 30620],
            "a[TOOL_CALLS]f[TOOL_CALLS]g[ARGS]{}",
            "a[TOOL_CALLS]f[TOOL_CALLS]g[ARGS]{}",
        ),
        (&[1097, 32, 1098], "a[ARGS]b", "a[ARGS]b"),
        (&[9, 1102, 32, 30620, 32, 30620], "[ARGS]{}", "[TOOL_CALLS]f[ARGS]{}[ARGS]{}"),
    ];
    for (ids, streamed, whole) in cases {
        let (received, parse) = parse("tekken-v13.json", ids);
        assert_eq!(received.content, streamed, "{ids:?}");
        assert_eq!(parse.content.as_deref(), Some(whole), "{ids:?}");
        assert!(parse.error.is_some() && parse.tool_calls.is_empty(), "{ids:?}");
    }
    drop(tokenizer);
}

#[test]
fn call_ids_are_nine_letters_and_digits() {
    let ids: std::collections::HashSet<String> = (0..1000).map(|_| new_call_id()).collect();
    assert_eq!(ids.len(), 1000);
    assert!(ids.iter().all(|id| id.len() == 9 && id.bytes().all(|byte| byte.is_ascii_alphanumeric())));
}
