//! Tool calls that are cut off or not well-formed: the same in every API, whole and streamed, however the group splits its
//! tokens.

use crate::support::*;
use bora_common::tokenizer::Tokenizer;
use bora_proto::v1::FinishReason;
use bora_router::{ModelSpec, RouterOptions};
use parking_lot::Mutex;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde_json::{Value, json};
use std::sync::Arc;

const CALL: u32 = 9;
const ARGS: u32 = 32;

/// What an output says, in whichever API: text, calls, and why it ended.
#[derive(Clone, Debug, Default, PartialEq)]
struct Said {
    text: String,
    /// Name and arguments; `None` for arguments of a call that was cut off, where they are given in another form.
    calls: Vec<(String, String)>,
    finish: String,
}

fn tools(api: &str) -> Value {
    let schema = json!({"type": "object"});
    match api {
        "chat/completions" => json!([{"type": "function", "function": {"name": "f", "parameters": schema}}]),
        "responses" => json!([{"type": "function", "name": "f", "parameters": schema}]),
        _ => json!([{"name": "f", "input_schema": schema}]),
    }
}

fn body(api: &str, stream: bool) -> Value {
    let user = json!([{"role": "user", "content": "Hi"}]);
    match api {
        "responses" => json!({"model": MODEL, "input": user, "tools": tools(api), "stream": stream}),
        _ => json!({"model": MODEL, "messages": user, "tools": tools(api), "stream": stream, "max_tokens": 500}),
    }
}

/// Arguments as every API gives them that takes any text.
fn text_of_input(input: &Value) -> String {
    match input.get("INVALID_JSON").and_then(Value::as_str) {
        Some(written) => written.to_owned(),
        None => input.to_string(),
    }
}

fn finish_of(api: &str, ended: &Value) -> String {
    let name = ended.as_str().unwrap_or_default();
    match (api, name) {
        (_, "length" | "max_tokens" | "incomplete") => "cut",
        (_, "tool_calls" | "tool_use") => "calls",
        (_, "stop" | "end_turn" | "completed") => "end",
        _ => panic!("{api}: {ended}"),
    }
    .to_owned()
}

fn from_items(items: &Value, said: &mut Said) {
    for item in items.as_array().into_iter().flatten() {
        match item["type"].as_str() {
            Some("message") => said.text.push_str(item["content"][0]["text"].as_str().unwrap_or_default()),
            Some("function_call") => said.calls.push((
                item["name"].as_str().expect("a name").to_owned(),
                item["arguments"].as_str().expect("arguments").to_owned(),
            )),
            _ => panic!("{item}"),
        }
    }
}

fn plain(api: &str, response: &Answered) -> Said {
    let json = response.json();
    let mut said = Said::default();
    match api {
        "chat/completions" => {
            let choice = &json["choices"][0];
            said.text = choice["message"]["content"].as_str().unwrap_or_default().to_owned();
            for call in choice["message"]["tool_calls"].as_array().into_iter().flatten() {
                let text = |value: &Value| value.as_str().expect("a text").to_owned();
                said.calls.push((text(&call["function"]["name"]), text(&call["function"]["arguments"])));
            }
            said.finish = finish_of(api, &choice["finish_reason"]);
        }
        "responses" => {
            from_items(&json["output"], &mut said);
            said.finish = finish_of(api, &json["status"]);
        }
        _ => {
            for block in json["content"].as_array().into_iter().flatten() {
                match block["type"].as_str() {
                    Some("text") => said.text.push_str(block["text"].as_str().expect("a text")),
                    _ => said
                        .calls
                        .push((block["name"].as_str().expect("a name").to_owned(), text_of_input(&block["input"]))),
                }
            }
            said.finish = finish_of(api, &json["stop_reason"]);
        }
    }
    said
}

fn streamed(api: &str, response: &Answered) -> Said {
    let mut said = Said::default();
    match api {
        "chat/completions" => {
            for chunk in response.chunks() {
                let choice = &chunk["choices"][0];
                let delta = &choice["delta"];
                said.text.push_str(delta["content"].as_str().unwrap_or_default());
                for call in delta["tool_calls"].as_array().into_iter().flatten() {
                    if let Some(name) = call["function"]["name"].as_str() {
                        assert_eq!(call["index"], said.calls.len());
                        said.calls.push((name.to_owned(), String::new()));
                    }
                    let arguments = &mut said.calls.last_mut().expect("a call").1;
                    arguments.push_str(call["function"]["arguments"].as_str().expect("arguments"));
                }
                if !choice["finish_reason"].is_null() {
                    said.finish = finish_of(api, &choice["finish_reason"]);
                }
            }
        }
        "responses" => {
            let events = response.events();
            let (_, last) = events.last().expect("events");
            let done: Vec<&Value> = events
                .iter()
                .filter(|(name, _)| name == "response.output_item.done")
                .map(|(_, event)| &event["item"])
                .collect();
            assert_eq!(json!(done), last["response"]["output"]);
            for (number, item) in done.iter().enumerate() {
                let of_item = events.iter().filter(|(_, event)| event["output_index"] == number);
                let deltas: String = of_item.filter_map(|(_, event)| event["delta"].as_str()).collect();
                let whole = if item["type"] == "message" { &item["content"][0]["text"] } else { &item["arguments"] };
                assert_eq!(&json!(deltas), whole);
            }
            from_items(&json!(done), &mut said);
            said.finish = finish_of(api, &last["response"]["status"]);
        }
        _ => {
            let mut input = String::new();
            for (name, event) in response.events() {
                match name.as_str() {
                    "content_block_start" if event["content_block"]["type"] == "tool_use" => {
                        let name = event["content_block"]["name"].as_str().expect("a name");
                        said.calls.push((name.to_owned(), String::new()));
                        input.clear();
                    }
                    "content_block_delta" => {
                        said.text.push_str(event["delta"]["text"].as_str().unwrap_or_default());
                        if let Some(more) = event["delta"]["partial_json"].as_str() {
                            input.push_str(more);
                            let parsed: Value = serde_json::from_str(&input).expect("an object, whole");
                            said.calls.last_mut().expect("a call").1 = text_of_input(&parsed);
                        }
                    }
                    "message_delta" => said.finish = finish_of(api, &event["delta"]["stop_reason"]),
                    _ => {}
                }
            }
        }
    }
    said
}

/// The output of one sequence of tokens in all APIs, whole and streamed, split at random.
async fn says(harness: &Harness, script: &Script, ids: &[u32], reason: FinishReason, random: &mut StdRng) -> Said {
    let mut first: Option<Said> = None;
    for api in ["chat/completions", "responses", "messages"] {
        for stream in [false, true] {
            let mut acts = vec![Act::Start { cached: 0 }];
            let mut rest = ids;
            while !rest.is_empty() {
                let (batch, behind) = rest.split_at(random.random_range(1..=rest.len().min(4)));
                acts.push(Act::Ids(batch.to_vec()));
                rest = behind;
            }
            if reason == FinishReason::Stop {
                acts.push(Act::Ids(vec![EOS]));
            }
            acts.push(Act::Finish(reason));
            *script.lock() = acts;
            let response = harness.post(&format!("/v1/{api}"), body(api, stream)).await;
            assert_eq!(response.status, 200, "{api} {ids:?}: {}", response.text);
            for marker in ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"] {
                assert!(!response.text.contains(marker), "{api} {stream} {ids:?}: {}", response.text);
            }
            let mut said = if stream { streamed(api, &response) } else { plain(api, &response) };
            if api == "responses" && said.finish == "end" && !said.calls.is_empty() {
                said.finish = "calls".to_owned();
            }
            if api == "messages" {
                // its arguments are a value, whose text is not the model's
                for (_, arguments) in &mut said.calls {
                    *arguments = compact(arguments);
                }
                let compacted = first.clone().map(|mut first| {
                    first.calls.iter_mut().for_each(|(_, arguments)| *arguments = compact(arguments));
                    first
                });
                assert_eq!(Some(&said), compacted.as_ref(), "{api} {stream} {ids:?}");
                continue;
            }
            match &first {
                Some(first) => assert_eq!(&said, first, "{api} {stream} {ids:?}"),
                None => first = Some(said),
            }
        }
    }
    first.expect("an output")
}

fn compact(arguments: &str) -> String {
    let parsed: Result<Value, _> = serde_json::from_str(arguments);
    parsed.map_or_else(|_| arguments.to_owned(), |value| value.to_string())
}

type Script = Arc<Mutex<Vec<Act>>>;

async fn scripted(options: RouterOptions) -> (Harness, Script) {
    let script = Script::default();
    let acts = Arc::clone(&script);
    let group = Group::start("only", move |_| Ok(acts.lock().clone()));
    (Harness::with(options, ModelSpec::new(tokenizer()), vec![group]).await, script)
}

fn encoded(tokenizer: &Tokenizer, parts: &[&str]) -> Vec<u32> {
    let marker = |part: &str| match part {
        "[TOOL_CALLS]" => vec![CALL],
        "[ARGS]" => vec![ARGS],
        text => tokenizer.encode(text),
    };
    parts.iter().flat_map(|part| marker(part)).collect()
}

#[tokio::test]
async fn an_output_that_is_cut_anywhere_is_the_same_in_every_api() {
    let (harness, script) = scripted(options()).await;
    let mut random = StdRng::seed_from_u64(1);
    let parts = [
        "Look. ",
        "[TOOL_CALLS]",
        "f",
        "[ARGS]",
        "{\"a\": \"é 🦀\"}",
        "[TOOL_CALLS]",
        "g",
        "[ARGS]",
        "{\"b\": [1, 2]}",
    ];
    let ids = encoded(&tokenizer(), &parts);
    for cut in 0..=ids.len() {
        let said = says(&harness, &script, &ids[..cut], FinishReason::Length, &mut random).await;
        assert_eq!(said.finish, "cut", "{cut}");
        let second = encoded(&tokenizer(), &parts[..5]).len();
        if cut >= second {
            assert_eq!(said.calls[0], ("f".to_owned(), "{\"a\": \"é 🦀\"}".to_owned()), "{cut}");
        }
    }
    let said = says(&harness, &script, &ids, FinishReason::Stop, &mut random).await;
    assert_eq!((said.text.as_str(), said.finish.as_str(), said.calls.len()), ("Look. ", "calls", 2));
}

#[tokio::test]
async fn calls_that_are_not_well_formed_are_the_same_in_every_api() {
    let mut random = StdRng::seed_from_u64(2);
    for options in [options(), strict()] {
        let (harness, script) = scripted(options).await;
        for (parts, text, calls, finish) in [
            (&["[TOOL_CALLS]", "f", "[ARGS]", "{\"a\": "][..], "", &[("f", "{\"a\": ")][..], "calls"),
            (&["[TOOL_CALLS]", "f", "[ARGS]", "{\"a\": NaN}"], "", &[("f", "{\"a\": NaN}")], "calls"),
            (&["[TOOL_CALLS]", "f", "[ARGS]", "[1, 2]"], "", &[("f", "[1, 2]")], "calls"),
            (&["[TOOL_CALLS]", "f", "[ARGS]", "-Infinity"], "", &[("f", "-Infinity")], "calls"),
            (&["[TOOL_CALLS]", "f", "[ARGS]"], "", &[("f", "{}")], "calls"),
            (&["[TOOL_CALLS]", "f", "[ARGS]", " {}\n"], "", &[("f", "{}")], "calls"),
            (&["a", "[TOOL_CALLS]", "f", "[ARGS]", "{} and then"], "aand then", &[("f", "{}")], "calls"),
            (&["[TOOL_CALLS]", "f"], "", &[("f", "{}")], "calls"),
            (&["a", "[ARGS]", "b"], "ab", &[], "end"),
            (&["[TOOL_CALLS]"], "", &[], "end"),
            (&["[TOOL_CALLS]", "[ARGS]", "x"], "x", &[], "end"),
        ] {
            let ids = encoded(&tokenizer(), parts);
            let said = says(&harness, &script, &ids, FinishReason::Stop, &mut random).await;
            let calls: Vec<_> = calls.iter().map(|(name, text)| (name.to_string(), text.to_string())).collect();
            assert_eq!(said, Said { text: text.to_owned(), calls, finish: finish.to_owned() }, "{parts:?}");
        }
        // a name that could not be sent back is no call
        let ids = encoded(&tokenizer(), &["[TOOL_CALLS]", "a.b c", "[ARGS]", "{\"x\": 1}"]);
        let said = says(&harness, &script, &ids, FinishReason::Stop, &mut random).await;
        let calls: Vec<Value> = said
            .calls
            .iter()
            .map(|(name, text)| json!({"id": "c", "type": "function", "function": {"name": name, "arguments": text}}))
            .collect();
        let user = json!({"role": "user", "content": "Hi"});
        let mut history = vec![user.clone(), json!({"role": "assistant", "content": said.text, "tool_calls": calls})];
        if !calls.is_empty() {
            history.push(json!({"role": "tool", "tool_call_id": "c", "content": "Error: no such tool"}));
        }
        history.push(user);
        let again = json!({"model": MODEL, "messages": history});
        let response = harness.post("/v1/chat/completions", again).await;
        assert_eq!(response.status, 200, "{}", response.text);
    }
}

/// Random outputs of these parts, ended and cut, with few and with all tokens in a batch.
#[tokio::test]
async fn random_outputs_are_the_same_in_every_api() {
    let (harness, script) = scripted(options()).await;
    let mut random = StdRng::seed_from_u64(3);
    let parts = [
        "[TOOL_CALLS]",
        "[ARGS]",
        "[TOOL_CALLS]",
        "f",
        "{\"a\": \"}\"}",
        "{}",
        "{\"",
        " text",
        "é",
        "🦀",
        "\n",
        "NaN",
        "]",
    ];
    for _ in 0..60 {
        let picked: Vec<&str> =
            (0..random.random_range(0..9)).map(|_| parts[random.random_range(0..parts.len())]).collect();
        let mut ids = encoded(&tokenizer(), &picked);
        let reason = if random.random() { FinishReason::Stop } else { FinishReason::Length };
        if reason == FinishReason::Length {
            ids.truncate(random.random_range(0..=ids.len()));
        }
        says(&harness, &script, &ids, reason, &mut random).await;
    }
}
