//! The reference tokenizer's goldens through `/tokenize`: every conversation gives exactly its token IDs, every
//! text too, and every conversation that the reference refuses is refused.

use std::sync::Arc;

use crate::support::*;
use base64::Engine as _;
use bora_common::tokenizer::Tokenizer;
use bora_router::{ModelSpec, RouterOptions};
use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures");
const FULL: &str = "tekken-v13.json";
const SMALL: &str = "tekken-v13-8k.json";

fn read(name: &str) -> String {
    std::fs::read_to_string(format!("{FIXTURES}/{name}")).expect("a fixture")
}

async fn serving(tokenizer_file: &str) -> Harness {
    let path = format!("{FIXTURES}/tokenizers/{tokenizer_file}");
    let tokenizer = Tokenizer::from_file(path).expect("a tokenizer");
    let group = Group::start("only", |_| Ok(say("never")));
    let options = RouterOptions { max_body_bytes: 64 << 20, ..strict() };
    Harness::with(options, ModelSpec::new(Arc::new(tokenizer)), vec![group]).await
}

/// A golden's request as a client would send it: images as data URLs, the served model's name. Nothing
/// else may change, not even the way its numbers are written.
fn as_sent(request: &str) -> String {
    let mut sent = String::new();
    let mut rest = request;
    while let Some(at) = rest.find("\"fixture://") {
        sent.push_str(&rest[..at]);
        let url = &rest[at + "\"fixture://".len()..];
        let end = url.find('"').expect("the end of a string");
        let bytes = std::fs::read(format!("{FIXTURES}/{}", &url[..end])).expect("an image");
        sent.push_str("\"data:image/png;base64,");
        base64::engine::general_purpose::STANDARD.encode_string(bytes, &mut sent);
        rest = &url[end..];
    }
    sent.push_str(rest);
    for model in ["mistralai/Devstral-Small-2-24B-Instruct-2512", "devstral-small-2"] {
        sent = sent.replacen(&format!("\"model\": \"{model}\""), &format!("\"model\": \"{MODEL}\""), 1);
    }
    sent
}

/// `messages_spec` written out: items, some of them repeated.
fn expanded(request: &str) -> String {
    let mut value: Value = serde_json::from_str(request).expect("JSON");
    let Some(spec) = value.as_object_mut().and_then(|object| object.remove("messages_spec")) else {
        return request.to_string();
    };
    let mut messages = Vec::new();
    for item in spec.as_array().expect("a list") {
        let Some(times) = item["repeat"].as_u64() else {
            messages.push(item.clone());
            continue;
        };
        for _ in 0..times {
            messages.extend(item["messages"].as_array().expect("a list").iter().cloned());
        }
    }
    value["messages"] = Value::Array(messages);
    // as the goldens' file writes it
    value.to_string().replacen("\"model\":\"", "\"model\": \"", 1)
}

#[derive(Deserialize)]
struct Golden<'a> {
    name: String,
    tokenizer: String,
    #[serde(borrow)]
    request: &'a RawValue,
    token_ids: Option<Vec<u32>>,
    first_ids: Option<Vec<u32>>,
    last_ids: Option<Vec<u32>>,
    count: usize,
}

#[tokio::test]
async fn every_conversation_gives_the_references_ids() {
    let (full, small) = (serving(FULL).await, serving(SMALL).await);
    let lines = read("golden_encodings.jsonl");
    let mut checked = 0;
    for line in lines.lines() {
        let golden: Golden<'_> = serde_json::from_str(line).expect("a golden");
        let harness = if golden.tokenizer == FULL { &full } else { &small };
        let request = as_sent(&expanded(golden.request.get()));
        let response = harness.request("POST", "/tokenize", &[], request).await;
        assert_eq!(response.status, 200, "{}: {}", golden.name, response.text);
        let body = response.json();
        assert_eq!(body["count"], golden.count, "{}", golden.name);
        let ids: Vec<u32> = serde_json::from_value(body["tokens"].clone()).expect("ids");
        if let Some(expected) = golden.token_ids {
            assert_eq!(ids, expected, "{} {}", golden.name, golden.tokenizer);
        }
        assert!(ids.starts_with(&golden.first_ids.unwrap_or_default()), "{}", golden.name);
        assert!(ids.ends_with(&golden.last_ids.unwrap_or_default()), "{}", golden.name);
        checked += 1;
    }
    assert!(checked > 60, "{checked}");
}

#[tokio::test]
async fn what_the_reference_refuses_is_a_400_that_names_a_field() {
    let small = serving(SMALL).await;
    for line in read("golden_rejections.jsonl").lines() {
        let golden: Value = serde_json::from_str(line).expect("a golden");
        let request: &RawValue = {
            #[derive(Deserialize)]
            struct Line<'a> {
                #[serde(borrow)]
                request: &'a RawValue,
            }
            serde_json::from_str::<Line<'_>>(line).expect("a golden").request
        };
        for path in ["/tokenize", "/v1/chat/completions"] {
            let response = small.request("POST", path, &[], as_sent(request.get())).await;
            // clients send an effort by default: it is taken, without effect
            if golden["name"] == "reasoning_effort_unsupported" {
                assert_eq!(response.status, 200, "{}", response.text);
                continue;
            }
            assert_eq!(response.status, 400, "{} {path}: {}", golden["name"], response.text);
            let error = &response.json()["error"];
            assert!(error["param"].is_string(), "{}: {error}", golden["name"]);
        }
    }
    assert_eq!(small.groups[0].seen().len(), 1);
}

#[tokio::test]
async fn every_text_gives_the_references_ids_and_comes_back() {
    let small = serving(SMALL).await;
    for line in read("golden_texts.jsonl").lines() {
        let golden: Value = serde_json::from_str(line).expect("a golden");
        let body = json!({"model": MODEL, "prompt": golden["text"], "add_special_tokens": false});
        let tokens = small.post("/tokenize", body).await.json()["tokens"].clone();
        assert_eq!(tokens, golden[SMALL], "{line}");
        let back = small.post("/detokenize", json!({"model": MODEL, "tokens": tokens})).await;
        assert_eq!(back.json()["prompt"], golden["text"], "{line}");
    }
}
