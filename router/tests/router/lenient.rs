//! Conversations that the reference refuses: refused by name, or repaired where the operator or the tenant wants it.

use std::io::Write as _;

use crate::support::*;
use bora_router::{AccessOptions, ModelSpec, RouterOptions};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

fn chat(messages: &Value) -> Value {
    json!({"model": MODEL, "messages": messages})
}

fn denied() -> Value {
    let call = json!({"id": "a", "type": "function", "function": {"name": "rm", "arguments": "{}"}});
    json!([
        {"role": "user", "content": "Clean up. ".repeat(200)},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "system", "content": "The user denied it."},
        {"role": "user", "content": "Don't."}
    ])
}

async fn harness(options: RouterOptions) -> Harness {
    let group = Group::start("only", |_| Ok(say("I see.")));
    Harness::with(options, ModelSpec::new(tokenizer()), vec![group]).await
}

#[tokio::test]
async fn strict_rules_name_the_message_and_the_rule() {
    let harness = harness(strict()).await;
    let response = harness.post(CHAT, chat(&denied())).await;
    let error = &response.json()["error"];
    assert_eq!(
        (response.status, &error["param"], &error["code"]),
        (400, &json!("messages[3].role"), &json!("invalid_message_order"))
    );
    assert_eq!(error["message"], "unexpected role 'system' after role 'assistant'");
}

#[tokio::test]
async fn by_default_a_router_repairs_and_what_was_known_stays_known() {
    let harness = harness(options()).await;
    let response = harness.post(CHAT, chat(&denied())).await;
    assert_eq!(response.status, 200, "{}", response.text);
    let mut longer = denied();
    for message in [
        json!({"role": "assistant", "content": "I see."}),
        json!({"role": "tool", "tool_call_id": "a", "content": "late"}),
        json!({"role": "user", "content": "Well?"}),
    ] {
        longer.as_array_mut().expect("an array").push(message);
    }
    assert_eq!(harness.post(CHAT, chat(&longer)).await.status, 200);
    let seen = harness.groups[0].seen();
    let (first, second) = (&seen[0].token_ids, &seen[1].token_ids);
    assert_eq!(second[..first.len()], first[..], "the beginning is what it was");
    let text = tokenizer().decode(first, false);
    assert!(
        text.contains("This call was not run") && text.contains("[INST]The user denied it.\n\nDon't.[/INST]"),
        "{text}"
    );
    let metrics = harness.get("/metrics").await.text;
    for line in [
        "bora_router_repairs_total{repair=\"empty_assistant\"} 2",
        "bora_router_repairs_total{repair=\"missing_result\"} 2",
        "bora_router_repairs_total{repair=\"late_system\"} 2",
        "bora_router_repairs_total{repair=\"orphan_result\"} 1",
    ] {
        assert!(metrics.contains(line), "{line} is missing in\n{metrics}");
    }
    // the second turn found the first one known, repaired as it was
    assert!(!metrics.contains("bora_router_encoded_tokens_total{kind=\"known\"} 0"), "{metrics}");

    // what can't be repaired is named by its place in the request
    let mut wrong = denied();
    wrong[4] = json!({"role": "wizard", "content": "x"});
    let error = harness.post(CHAT, chat(&wrong)).await.json()["error"].clone();
    assert_eq!(error["param"], "messages[4].role", "{error}");
}

#[tokio::test]
async fn other_apis_are_repaired_as_well() {
    let harness = harness(options()).await;
    let call = json!({"type": "function_call", "call_id": "a", "name": "rm", "arguments": "{}"});
    let input = json!([{"role": "user", "content": "Clean up."}, call, {"role": "user", "content": "Don't."}]);
    let response = harness.post("/v1/responses", json!({"model": MODEL, "input": input})).await;
    assert_eq!(response.status, 200, "{}", response.text);
    let used = json!([{"type": "tool_use", "id": "a", "name": "rm", "input": {}}]);
    let messages = json!([{"role": "user", "content": "Clean up."}, {"role": "assistant", "content": used},
        {"role": "user", "content": "Don't."}]);
    let body = json!({"model": MODEL, "max_tokens": 9, "messages": messages});
    assert_eq!(harness.post("/v1/messages", body.clone()).await.status, 200);
    let seen = harness.groups[0].seen();
    assert_eq!(seen[0].token_ids, seen[1].token_ids);
    assert!(tokenizer().decode(&seen[0].token_ids, false).contains("This call was not run"));
    let count = harness.post("/v1/messages/count_tokens", body).await.json();
    assert_eq!(count["input_tokens"], seen[0].token_ids.len());
}

#[tokio::test]
async fn a_tenant_has_its_own_way() {
    // printf %s KEY | sha256sum, for the keys `key` and `abc`
    let keys = "tenants:\n\
        - {name: agents, conversation: lenient, keys: [{sha256: 2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683}]}\n\
        - {name: exact, conversation: strict, keys: [{sha256: ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad}]}\n";
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(keys.as_bytes()).expect("written");
    let access = AccessOptions { keys: Some(file.path().into()), ..AccessOptions::default() };
    let harness = harness(RouterOptions { access, ..options() }).await;
    for (key, status) in [("key", 200), ("abc", 400)] {
        let headers = [("x-api-key", key)];
        let response = harness.request("POST", CHAT, &headers, chat(&denied()).to_string()).await;
        assert_eq!(response.status, status, "{}", response.text);
        let response = harness.request("POST", "/tokenize", &headers, chat(&denied()).to_string()).await;
        assert_eq!(response.status, status, "{}", response.text);
    }
}
