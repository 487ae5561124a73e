//! The description at `/openapi.json` against the server: what it lists is known, nothing else is, and its bounds are those
//! that are kept.

use crate::support::*;
use bora_router::{ModelSpec, RouterOptions};
use serde_json::{Value, json};

/// Each operation's path, the name of its schema, and a request that is served.
fn operations() -> [(&'static str, &'static str, Value); 7] {
    let messages = json!([{"role": "user", "content": "Hi"}]);
    [
        ("/v1/chat/completions", "Chat", json!({"messages": messages, "max_tokens": 9})),
        ("/v1/completions", "Completions", json!({"prompt": "Hi", "max_tokens": 9})),
        ("/v1/responses", "Responses", json!({"input": "Hi", "max_output_tokens": 9})),
        ("/v1/messages", "Messages", json!({"messages": messages, "max_tokens": 9})),
        ("/v1/messages/count_tokens", "CountTokens", json!({"messages": messages})),
        ("/tokenize", "Tokenize", json!({"prompt": "Hi"})),
        ("/detokenize", "Detokenize", json!({"tokens": [5]})),
    ]
}

async fn described(harness: &Harness, name: &str) -> serde_json::Map<String, Value> {
    let document = harness.get("/openapi.json").await.json();
    let schema = &document["components"]["schemas"][format!("{name}Request")];
    schema["properties"].as_object().cloned().unwrap_or_else(|| panic!("{name} is not described"))
}

async fn unknown(harness: &Harness) -> u64 {
    let metrics = harness.get("/metrics").await.text;
    let line = metrics.lines().find_map(|line| line.strip_prefix("bora_router_unknown_fields_total "));
    line.and_then(|count| count.parse().ok()).expect("the counter")
}

#[tokio::test]
async fn an_operation_knows_what_is_described_for_it_and_nothing_else() {
    let harness = Harness::saying("x").await;
    let mut every_field = std::collections::BTreeSet::new();
    for (_, name, _) in operations() {
        every_field.extend(described(&harness, name).await.into_iter().map(|(field, _)| field));
    }
    assert!(every_field.len() > 80, "{every_field:?}");
    // the operations that count what they don't know
    for (path, name, base) in operations().into_iter().filter(|(path, ..)| path.starts_with("/v1")) {
        let fields = described(&harness, name).await;
        for (here, is_known) in [(true, 0), (false, 1)] {
            let mut body = base.clone();
            let asked: Vec<&String> = every_field.iter().filter(|field| fields.contains_key(*field) == here).collect();
            for field in asked.iter().filter(|field| base.get(field.as_str()).is_none()) {
                body[field.as_str()] = Value::Null;
            }
            let before = unknown(&harness).await;
            let response = harness.post(path, body).await;
            assert_eq!(response.status, 200, "{path}: {}", response.text);
            let counted = unknown(&harness).await - before;
            assert_eq!(counted, is_known * asked.len() as u64, "{path}, of {asked:?}");
        }
    }
}

/// Values just beyond what a schema allows, and on its edge.
fn around(schema: &Value) -> (Vec<Value>, Vec<Value>) {
    let (mut beyond, mut edge) = (Vec::new(), Vec::new());
    let whole = schema["type"].as_array().is_some_and(|kinds| kinds.contains(&json!("integer")))
        || schema["type"] == json!("integer");
    let step = if whole { 1.0 } else { 0.5 };
    let number = |value: f64| if whole { json!(value as i64) } else { json!(value) };
    // numbers beyond are not exact here
    let exact = |bound: &f64| bound.abs() < 9e15;
    if let Some(least) = schema["minimum"].as_f64().filter(exact) {
        beyond.push(number(least - step));
        edge.push(number(least));
    }
    if let Some(least) = schema["exclusiveMinimum"].as_f64() {
        beyond.push(number(least));
    }
    if let Some(most) = schema["maximum"].as_f64().filter(exact) {
        beyond.push(number(most + step));
        edge.push(number(most));
    }
    if let Some(most) = schema["maxItems"].as_u64().filter(|most| *most > 0) {
        let of_texts = schema["items"]["type"] == json!("string");
        let items = |count: u64| json!(vec![if of_texts { json!("zz") } else { json!(5) }; count as usize]);
        beyond.push(items(most + 1));
        edge.push(items(most));
    }
    if let Some(most) = schema["maxLength"].as_u64() {
        beyond.extend([json!(""), json!("z".repeat(most as usize + 1))]);
        edge.push(json!("z".repeat(most as usize)));
    }
    if let Some(most) = schema["maxProperties"].as_u64() {
        let biases = |count: u64, bias: i64| (0..count).map(|id| (id.to_string(), json!(bias))).collect::<Value>();
        beyond.extend([biases(most + 1, 1), biases(1, 101), biases(1, -101)]);
        edge.push(biases(most, -100));
    }
    (beyond, edge)
}

#[tokio::test]
async fn bounds_are_those_that_are_kept() {
    // limits of this router, not of every one
    let options = RouterOptions { max_choices: 3, max_logprobs: 7, max_stop_strings: 5, ..options() };
    let groups = vec![Group::start("only", |_| Ok(say("x")))];
    let harness = Harness::with(options, ModelSpec::new(tokenizer()), groups).await;
    let mut tried = std::collections::BTreeMap::new();
    for (path, name, mut base) in operations() {
        // what else these fields need
        match name {
            "Chat" => base["logprobs"] = json!(true),
            "Completions" => base["echo"] = json!(true),
            "Responses" => base["include"] = json!(["message.output_text.logprobs"]),
            _ => {}
        }
        for (field, schema) in described(&harness, name).await {
            let (beyond, edge) = around(&schema);
            // other APIs have other names of these, and errors say those
            let said = match (name, field.as_str()) {
                ("Responses", "max_tokens") => "max_output_tokens",
                ("Messages", "stop") => "stop_sequences",
                (_, field) => field,
            };
            let with = |value: &Value| {
                let mut body = base.clone();
                if matches!(&*field, "max_tokens" | "max_completion_tokens") && name == "Responses" {
                    body["max_output_tokens"] = Value::Null;
                }
                body[&field] = value.clone();
                body
            };
            for value in &beyond {
                let response = harness.post(path, with(value)).await;
                let error = response.json()["error"].clone();
                let message = error["message"].as_str().unwrap_or_default();
                assert_eq!(response.status, 400, "{path}: {field} = {value}: {}", response.text);
                assert!(message.starts_with(&format!("`{said}`")), "{path}: {field} = {value}: {error}");
                *tried.entry(name).or_insert(0) += 1;
            }
            for value in &edge {
                let response = harness.post(path, with(value)).await;
                // what there is no room for is another matter
                let is_beyond = response.status == 400 && response.text.contains(" must have ")
                    || response.text.contains(" must be at least ")
                    || response.text.contains(" must be between ");
                assert!(!is_beyond, "{path}: {field} = {value}: {}", response.text);
            }
        }
    }
    assert!(tried["Chat"] >= 35 && tried["Completions"] >= 35 && tried["Messages"] >= 25, "{tried:?}");
    let chat = described(&harness, "Chat").await;
    assert_eq!(
        (&chat["n"]["maximum"], &chat["top_logprobs"]["maximum"], &chat["stop_token_ids"]["maxItems"]),
        (&json!(3), &json!(7), &json!(5))
    );
}
