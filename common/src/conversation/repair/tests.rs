use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use serde_json::{Value, json};

use super::*;
use crate::conversation::{Conversation, ConversationOptions, Part};

fn repaired(messages: &[Value], continue_final_message: bool) -> (Vec<Value>, Vec<(usize, Repair)>, bool) {
    let texts: Vec<String> = messages.iter().map(Value::to_string).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let outcome = repair(&texts, continue_final_message).expect("JSON");
    let message = |message: &RepairedMessage| match &message.changed {
        Some(text) => serde_json::from_str(text).expect("JSON"),
        None => messages[message.index].clone(),
    };
    (outcome.messages.iter().map(message).collect(), outcome.repairs, outcome.continue_final_message)
}

/// What the prompt shows, or the rule that is broken.
fn parts(messages: &[Value], continue_final_message: bool) -> Result<Vec<Part>, String> {
    let options = ConversationOptions { continue_final_message, ..ConversationOptions::default() };
    Conversation::parse(&Value::from(messages), None, options)
        .map(|conversation| conversation.parts().to_vec())
        .map_err(|error| error.to_string())
}

fn user(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

fn system(text: &str) -> Value {
    json!({"role": "system", "content": text})
}

fn says(text: &str) -> Value {
    json!({"role": "assistant", "content": text})
}

fn call(id: &str) -> Value {
    json!({"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}})
}

fn calls(text: Value, ids: &[&str]) -> Value {
    let calls: Vec<Value> = ids.iter().map(|id| call(id)).collect();
    json!({"role": "assistant", "content": text, "tool_calls": calls})
}

fn result(id: &str, text: &str) -> Value {
    json!({"role": "tool", "tool_call_id": id, "content": text})
}

fn not_run(id: &str) -> Value {
    result(id, NOT_RUN)
}

/// Name, conversation, what becomes of it, the repairs.
type Case = (&'static str, Vec<Value>, Vec<Value>, Vec<(usize, Repair)>);

fn cases() -> Vec<Case> {
    use Repair::*;
    let mut unnamed_calls = calls(Value::Null, &["", "x"]);
    unnamed_calls["tool_calls"][0].as_object_mut().expect("an object").remove("id");
    let named_calls = json!({"role": "assistant", "content": null, "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": "{}"}, "id": "call0"}, call("x")]});
    let twice = json!({"role": "assistant", "content": null, "tool_calls": [
        call("a"), {"type": "function", "function": {"name": "f", "arguments": "{}"}, "id": "call1"}]});
    vec![
        (
            "an empty answer",
            vec![user("a"), says(""), user("b"), json!({"role": "assistant"}), user("c")],
            vec![user("a"), user("b"), user("c")],
            vec![(1, EmptyAssistant), (3, EmptyAssistant)],
        ),
        (
            "a denied call",
            vec![user("a"), calls(json!("t"), &["x"]), user("no")],
            vec![user("a"), calls(json!("t"), &["x"]), not_run("x"), user("no")],
            vec![(1, MissingResult)],
        ),
        (
            "one of two calls was run, and nothing follows",
            vec![user("a"), calls(Value::Null, &["x", "y"]), result("y", "1")],
            vec![user("a"), calls(Value::Null, &["x", "y"]), result("y", "1"), not_run("x")],
            vec![(1, MissingResult)],
        ),
        (
            "an abandoned call before the next answer",
            vec![user("a"), calls(Value::Null, &["x"]), says("well"), user("b")],
            vec![
                user("a"),
                json!({"role": "assistant", "content": "well", "tool_calls": [call("x")]}),
                not_run("x"),
                user("b"),
            ],
            vec![(1, SplitCalls), (2, MissingResult)],
        ),
        (
            "a reminder behind an answer",
            vec![user("a"), says("b"), system("remember"), user("c"), system("late, and allowed")],
            vec![user("a"), says("b"), user("remember"), user("c"), system("late, and allowed")],
            vec![(2, LateSystem)],
        ),
        (
            "a reminder behind a result",
            vec![user("a"), calls(Value::Null, &["x"]), result("x", "1"), system("r"), system("s")],
            vec![user("a"), calls(Value::Null, &["x"]), result("x", "1"), user("r"), user("s")],
            vec![(3, LateSystem), (4, LateSystem)],
        ),
        (
            "results whose call was cut off",
            vec![result("w", "0"), result("x", "1"), system("s"), user("a"), says("b"), result("y", "2"), user("c")],
            // what comes first is not looked at by the reference
            vec![result("w", "0"), user("s"), user("a"), says("b"), user("c")],
            vec![(1, OrphanResult), (2, LateSystem), (5, OrphanResult)],
        ),
        (
            "a result twice",
            vec![user("a"), calls(Value::Null, &["x"]), result("x", "1"), result("x", "2")],
            vec![user("a"), calls(Value::Null, &["x"]), result("x", "1")],
            vec![(3, OrphanResult)],
        ),
        (
            "a user who spoke while the tool ran",
            vec![user("a"), calls(Value::Null, &["x"]), user("hurry"), result("x", "1"), system("s")],
            vec![user("a"), calls(Value::Null, &["x"]), result("x", "1"), user("hurry"), system("s")],
            vec![(3, LateResult)],
        ),
        (
            "calls without ids",
            vec![user("a"), unnamed_calls, result("x", "1"), json!({"role": "tool", "content": "2"})],
            vec![
                user("a"),
                named_calls,
                result("x", "1"),
                json!({"role": "tool", "content": "2", "tool_call_id": "call0"}),
            ],
            vec![(1, CallId)],
        ),
        (
            "calls with the same id",
            vec![user("a"), calls(Value::Null, &["a", "a"]), result("a", "1"), result("a", "2")],
            vec![user("a"), twice, result("a", "1"), result("call1", "2")],
            vec![(1, CallId)],
        ),
        (
            "no content",
            vec![
                json!({"role": "user"}),
                calls(Value::Null, &["x"]),
                json!({"role": "tool", "tool_call_id": "x", "content": null}),
            ],
            vec![json!({"role": "user", "content": ""}), calls(Value::Null, &["x"]), result("x", "")],
            vec![(0, NoContent), (2, NoContent)],
        ),
        (
            "a prefix that stayed",
            vec![user("a"), json!({"role": "assistant", "content": "b", "prefix": true}), user("c")],
            vec![user("a"), json!({"role": "assistant", "content": "b", "prefix": false}), user("c")],
            vec![(1, StalePrefix)],
        ),
        (
            "an answer at the end",
            vec![user("a"), says("b")],
            vec![user("a"), json!({"role": "assistant", "content": "b", "prefix": true})],
            vec![(1, FinalAssistant)],
        ),
        (
            "a first answer with calls",
            vec![calls(json!("t"), &["x"]), result("x", "1"), user("a")],
            vec![calls(json!("t"), &["x"]), user("a")],
            vec![(1, OrphanResult)],
        ),
    ]
}

#[test]
fn each_case_is_repaired_as_documented() {
    let mut seen = std::collections::BTreeSet::new();
    for (name, before, after, repairs) in cases() {
        assert!(parts(&before, false).is_err(), "{name}: the reference takes it");
        let (messages, done, _) = repaired(&before, false);
        assert_eq!(messages, after, "{name}");
        assert_eq!(done, repairs, "{name}");
        assert!(parts(&messages, false).is_ok(), "{name}: {:?}", parts(&messages, false));
        let (again, more, _) = repaired(&messages, false);
        assert_eq!((again, more), (messages, Vec::new()), "{name}: repaired twice");
        seen.extend(done.into_iter().map(|(_, repair)| repair));
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), Repair::ALL);
}

#[test]
fn a_silent_message_to_continue_is_answered_instead() {
    let (messages, _, goes_on) = repaired(&[user("a"), says("")], true);
    assert_eq!((messages, goes_on), (vec![user("a")], false));
    let (messages, repairs, goes_on) = repaired(&[says(""), user("a"), says("b")], true);
    assert_eq!((messages, goes_on), (vec![user("a"), says("b")], true));
    assert_eq!(repairs, [(0, Repair::EmptyAssistant)]);
}

#[test]
fn what_is_not_on_the_list_stays_wrong() {
    for messages in [
        vec![json!("text")],
        vec![json!({"role": "wizard", "content": "x"})],
        vec![user("a"), json!({"role": "assistant", "content": 7}), user("b")],
        vec![user("a"), json!({"role": "assistant", "tool_calls": "x"}), user("b")],
        vec![result("x", "alone")],
    ] {
        let (after, _, _) = repaired(&messages, false);
        assert!(parts(&after, false).is_err(), "{messages:?}");
    }
    assert!(repair(&["{"], false).is_err());
}

/// A conversation as an agent with many faults would write it, and the ends of its turns.
fn random(rng: &mut StdRng) -> Vec<Value> {
    let mut messages = Vec::new();
    if rng.random_bool(0.5) {
        messages.push(system("rules"));
    }
    for _ in 0..rng.random_range(1..12) {
        let ids = ["a", "b", ""];
        let id = *ids.choose(rng).expect("not empty");
        let other = *ids.choose(rng).expect("not empty");
        messages.push(match rng.random_range(0..10) {
            0..3 => user("question"),
            3 => system("reminder"),
            4 => says("answer"),
            5 => says(""),
            6 => calls(json!("looking"), &[id]),
            7 => calls(Value::Null, &[id, other]),
            _ => result(id, "found"),
        });
    }
    messages
}

fn without_prefix(messages: &[Value]) -> Vec<Value> {
    let mut messages = messages.to_vec();
    for message in &mut messages {
        message.as_object_mut().expect("an object").remove("prefix");
    }
    messages
}

#[test]
fn valid_conversations_keep_their_prompt_and_growing_ones_their_beginning() {
    let mut rng = StdRng::seed_from_u64(7);
    let (mut valid, mut mended, mut grown) = (0, 0, 0);
    for _ in 0..20_000 {
        let messages = random(&mut rng);
        let (after, repairs, _) = repaired(&messages, false);
        let shown = parts(&after, false);
        match parts(&messages, false) {
            Ok(before) => {
                valid += 1;
                assert_eq!(shown, Ok(before), "{messages:?}");
            }
            Err(_) if repairs.is_empty() => {}
            Err(_) => mended += usize::from(shown.is_ok()),
        }
        if after.iter().any(|message| message["role"] == "user") {
            assert!(shown.is_ok(), "{messages:?} became {after:?}: {shown:?}");
        }
        for end in 1..messages.len() {
            let is_turn_end = messages[end]["role"] == "assistant" && messages[end - 1]["role"] != "assistant";
            if !is_turn_end {
                continue;
            }
            // whichever message is the last one may be continued
            let (beginning, ..) = repaired(&messages[..end], false);
            let (beginning, after) = (without_prefix(&beginning), without_prefix(&after));
            assert_eq!(after[..beginning.len().min(after.len())], beginning[..], "{messages:?} up to {end}");
            grown += 1;
        }
    }
    assert!(valid > 1_000 && mended > 5_000 && grown > 10_000, "{valid} {mended} {grown}");
}
