//! What a user of vLLM sends besides messages and sampling: each field does what its name says, or is refused by it.

use crate::support::*;
use bora_common::secret::CacheScope;
use bora_proto::v1::{FinishReason, GenerateRequest};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn chat(extra: Value) -> Value {
    let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9});
    for (key, value) in extra.as_object().expect("an object") {
        body[key] = value.clone();
    }
    body
}

/// What the group is asked for a chat request.
async fn sent(harness: &Harness, extra: Value) -> GenerateRequest {
    let response = harness.post(CHAT, chat(extra.clone())).await;
    assert_eq!(response.status, 200, "{extra}: {}", response.text);
    harness.groups[0].seen().pop().expect("a request")
}

async fn refused(harness: &Harness, path: &str, body: Value) -> Value {
    let response = harness.post(path, body.clone()).await;
    assert_eq!(response.status, 400, "{body}: {}", response.text);
    response.json()["error"].clone()
}

#[tokio::test]
async fn the_last_message_is_continued() {
    let harness = Harness::strict("x").await;
    let begun = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, I "}]);
    let continued = sent(&harness, json!({"messages": begun, "continue_final_message": true})).await.token_ids;
    assert_eq!(continued, [&[1, 3][..], &tokenizer().encode("Hi"), &[4], &tokenizer().encode("Well, I")].concat());
    // vLLM's users send both
    let both = json!({"messages": begun, "continue_final_message": true, "add_generation_prompt": false});
    assert_eq!(sent(&harness, both).await.token_ids, continued);
    // Mistral's way to say it
    let prefix =
        json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, I ", "prefix": true}]);
    assert_eq!(sent(&harness, json!({"messages": prefix})).await.token_ids, continued);
    let error = refused(&harness, CHAT, chat(json!({"continue_final_message": true}))).await;
    assert_eq!((&error["param"], &error["code"]), (&json!("continue_final_message"), &json!("invalid_prefix")));
    let early = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a", "prefix": true},
        {"role": "user", "content": "b"}]);
    let error = refused(&harness, CHAT, chat(json!({"messages": early}))).await;
    assert_eq!((&error["param"], &error["code"]), (&json!("messages[1].prefix"), &json!("invalid_prefix")));
}

#[tokio::test]
async fn there_is_no_generation_prompt_to_add() {
    let harness = Harness::saying("x").await;
    let plain = sent(&harness, json!({})).await.token_ids;
    for add in [true, false] {
        assert_eq!(sent(&harness, json!({"add_generation_prompt": add})).await.token_ids, plain);
    }
    let begun = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}]);
    let both = json!({"messages": begun, "continue_final_message": true, "add_generation_prompt": true});
    assert_eq!(refused(&harness, CHAT, chat(both)).await["param"], "continue_final_message");
}

#[tokio::test]
async fn min_tokens_hold_off_stop_strings_and_are_the_groups_business_otherwise() {
    let harness =
        Harness::scripted(|_| Ok(say_ids(&tokenizer().encode("a STOP b STOP c"), FinishReason::Length))).await;
    let many = tokenizer().encode("a STOP b").len();
    let request = sent(&harness, json!({"min_tokens": 7, "max_tokens": 9})).await;
    assert_eq!(request.stopping.map(|stopping| (stopping.min_tokens, stopping.max_tokens)), Some((7, 9)));
    let body = chat(json!({"stop": "STOP", "min_tokens": many, "max_tokens": 50}));
    let choice = harness.post(CHAT, body).await.json()["choices"][0].clone();
    assert_eq!(choice["message"]["content"], "a STOP b ");
    for (extra, why) in [
        (json!({"min_tokens": 10}), "above `max_tokens`"),
        (json!({"min_tokens": -1}), "at least 0"),
        (json!({"min_tokens": WINDOW, "max_tokens": 2 * WINDOW}), "room for"),
    ] {
        let error = refused(&harness, CHAT, chat(extra)).await;
        assert_eq!(error["param"], "min_tokens");
        assert!(error["message"].as_str().is_some_and(|message| message.contains(why)), "{error}");
    }
}

#[tokio::test]
async fn stops_by_id_and_text_in_chat() {
    let stop = tokenizer().encode("!")[0];
    let ids = [tokenizer().encode("Hi"), vec![stop]].concat();
    let harness = Harness::scripted(move |_| Ok(say_ids(&ids, FinishReason::Stop))).await;
    let choice = |body: Value| {
        let harness = &harness;
        async move { harness.post(CHAT, chat(body)).await.json()["choices"][0].clone() }
    };
    let cut = choice(json!({"stop_token_ids": [stop]})).await;
    assert_eq!((&cut["message"]["content"], &cut["stop_reason"]), (&json!("Hi"), &json!(stop)));
    let kept = choice(json!({"stop_token_ids": [stop], "include_stop_str_in_output": true})).await;
    assert_eq!(kept["message"]["content"], "Hi!");
    assert!(harness.groups[0].seen()[0].stopping.as_ref().is_some_and(|one| one.stop_token_ids.contains(&stop)));
    for wrong in [json!([9192]), json!(["a"]), json!(vec![5; 17])] {
        let error = refused(&harness, CHAT, chat(json!({"stop_token_ids": wrong}))).await;
        assert_eq!(error["param"], "stop_token_ids");
    }
}

#[tokio::test]
async fn token_ids_come_back_from_chat() {
    let harness = Harness::saying("Hi").await;
    let body = harness.post(CHAT, chat(json!({"return_token_ids": true}))).await.json();
    assert_eq!(body["prompt_token_ids"], json!(harness.groups[0].seen()[0].token_ids));
    assert_eq!(body["choices"][0]["token_ids"], json!([tokenizer().encode("Hi"), vec![EOS]].concat()));
    let body = harness.post(CHAT, chat(json!({}))).await.json();
    assert!(body.get("prompt_token_ids").is_none() && body["choices"][0].get("token_ids").is_none());
}

#[tokio::test]
async fn priorities_and_salts() {
    let harness = Harness::saying("x").await;
    for (priority, status) in [
        (json!("interactive"), 200),
        (json!("batch"), 200),
        (json!(-3), 200),
        (json!(5), 200),
        (json!("urgent"), 400),
        (json!(1.5), 400),
    ] {
        let response = harness.post(CHAT, chat(json!({"priority": priority}))).await;
        assert_eq!(response.status, status, "{priority}: {}", response.text);
        assert!(status == 200 || response.json()["error"]["param"] == "priority");
    }
    let salt = keys().cache_salt(CacheScope::Anonymous, "team");
    assert_eq!(sent(&harness, json!({"cache_salt": "team"})).await.cache_salt, salt.as_ref());
    for wrong in [json!(""), json!("x".repeat(257)), json!(7)] {
        assert_eq!(refused(&harness, CHAT, chat(json!({"cache_salt": wrong}))).await["param"], "cache_salt");
    }
}

#[tokio::test]
async fn usage_is_streamed_as_asked() {
    let harness = Harness::saying("one two three").await;
    let chunks = |options: Value| {
        let harness = &harness;
        async move { harness.post(CHAT, chat(json!({"stream": true, "stream_options": options}))).await.chunks() }
    };
    let at_end = chunks(json!({"include_usage": true})).await;
    assert_eq!(at_end.iter().filter(|chunk| chunk.get("usage").is_some()).count(), 1);
    let all_along = chunks(json!({"include_usage": true, "continuous_usage_stats": true})).await;
    let counts: Vec<u64> = all_along.iter().filter_map(|chunk| chunk["usage"]["completion_tokens"].as_u64()).collect();
    assert!(counts.len() > 3 && counts.is_sorted(), "{counts:?}");
    assert!(chunks(json!({"include_usage": false})).await.iter().all(|chunk| chunk.get("usage").is_none()));
    let error = refused(&harness, CHAT, chat(json!({"stream_options": {"include_usage": true}}))).await;
    assert_eq!(error["param"], "stream_options");
}

#[tokio::test]
async fn what_silence_would_not_do_justice_is_refused() {
    let harness = Harness::saying("x").await;
    for (field, wrong, harmless) in [
        ("best_of", json!(3), json!(1)),
        ("echo", json!(true), json!(false)),
        ("use_beam_search", json!(true), json!(false)),
        ("suffix", json!("x"), json!("")),
        ("functions", json!([{"name": "f"}]), json!([])),
        ("function_call", json!({"name": "f"}), json!("auto")),
        ("modalities", json!(["audio"]), json!(["text"])),
        ("audio", json!({"voice": "v"}), Value::Null),
        ("structural_tag", json!({}), Value::Null),
        ("bad_words", json!(["x"]), json!([])),
        ("allowed_token_ids", json!([5]), json!([])),
        ("truncate_prompt_tokens", json!(5), Value::Null),
        ("logits_processors", json!(["x"]), json!([])),
        ("chat_template", json!("{{ x }}"), Value::Null),
        ("documents", json!([{"text": "x"}]), json!([])),
        ("prompt_embeds", json!("x"), Value::Null),
        ("web_search_options", json!({}), Value::Null),
    ] {
        let mut body = chat(json!({}));
        body[field] = wrong;
        let error = refused(&harness, CHAT, body.clone()).await;
        assert_eq!((&error["param"], &error["type"]), (&json!(field), &json!("invalid_request_error")));
        assert!(error["message"].as_str().is_some_and(|message| message.contains(field)), "{error}");
        body[field] = harmless;
        assert_eq!(harness.post(CHAT, body).await.status, 200, "{field}");
    }
    let completion = json!({"model": MODEL, "prompt": "Hi", "best_of": 2});
    assert_eq!(refused(&harness, COMPLETIONS, completion).await["param"], "best_of");
}

#[tokio::test]
async fn fields_without_effect_are_known_and_unknown_ones_are_counted() {
    let harness = Harness::saying("x").await;
    let plain = sent(&harness, json!({"seed": 1})).await;
    let known = json!({"seed": 1, "user": "u", "metadata": {"a": "b"}, "store": true, "service_tier": "auto", "verbosity": "low",
        "prompt_cache_key": "k", "safety_identifier": "s", "safe_prompt": false, "request_id": "r"});
    let same = sent(&harness, known).await;
    assert_eq!((same.token_ids, same.sampling, same.stopping), (plain.token_ids, plain.sampling, plain.stopping));
    assert!(harness.get("/metrics").await.text.contains("bora_router_unknown_fields_total 0"));
    sent(&harness, json!({"flux": 1, "capacitor": {"a": []}})).await;
    assert!(harness.get("/metrics").await.text.contains("bora_router_unknown_fields_total 2"));
}

#[tokio::test]
async fn a_prompt_without_room_has_its_code_everywhere() {
    let harness = Harness::saying("x").await;
    let long = "word ".repeat(WINDOW as usize);
    for (path, body, param) in [
        (CHAT, json!({"model": MODEL, "messages": [{"role": "user", "content": long}]}), "messages"),
        (COMPLETIONS, json!({"model": MODEL, "prompt": long}), "prompt"),
        ("/v1/responses", json!({"model": MODEL, "input": long}), "input"),
    ] {
        let error = refused(&harness, path, body).await;
        assert_eq!((&error["param"], &error["code"]), (&json!(param), &json!("context_length_exceeded")));
    }
}
