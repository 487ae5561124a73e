//! Malformed requests: each is refused with its status, the field at fault and OpenAI's shape, and none of
//! them reaches a group.

use crate::support::*;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const TOKENIZE: &str = "/tokenize";
const DETOKENIZE: &str = "/detokenize";

/// Path, body, status, `param` ("" = null).
type Row = (&'static str, String, u16, &'static str);

fn chat(field: &str, value: Value) -> String {
    let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]});
    body[field] = value;
    body.to_string()
}

fn completion(field: &str, value: Value) -> String {
    let mut body = json!({"model": MODEL, "prompt": "Hi"});
    body[field] = value;
    body.to_string()
}

fn messages(messages: Value) -> String {
    json!({"model": MODEL, "messages": messages}).to_string()
}

fn rows() -> Vec<Row> {
    let user = json!({"role": "user", "content": "Hi"});
    let tool = |function: Value| json!([{"type": "function", "function": function}]);
    let mut rows: Vec<Row> = vec![
        // no JSON object
        (CHAT, String::new(), 400, ""),
        (CHAT, "{".into(), 400, ""),
        (CHAT, "[]".into(), 400, ""),
        (CHAT, "null".into(), 400, ""),
        (CHAT, "\"text\"".into(), 400, ""),
        (CHAT, "{\"model\": \"m\"} trailing".into(), 400, ""),
        (CHAT, "{'model': 1}".into(), 400, ""),
        (COMPLETIONS, "{\"prompt\": \"unterminated".into(), 400, ""),
        (COMPLETIONS, "{\"temperature\": 1e999}".into(), 400, ""),
        // models
        (CHAT, json!({"model": "none", "messages": [user]}).to_string(), 404, "model"),
        (CHAT, json!({"model": 7, "messages": [user]}).to_string(), 400, "model"),
        (COMPLETIONS, json!({"model": "none", "prompt": "x"}).to_string(), 404, "model"),
        (TOKENIZE, json!({"model": "none", "prompt": "x"}).to_string(), 404, "model"),
        (DETOKENIZE, json!({"model": "none", "tokens": [1]}).to_string(), 404, "model"),
        // prompts
        (CHAT, json!({"model": MODEL}).to_string(), 400, "messages"),
        (CHAT, messages(json!("text")), 400, "messages"),
        (CHAT, messages(json!([])), 400, "messages"),
        (CHAT, messages(json!([7])), 400, "messages[0]"),
        (CHAT, messages(json!([{"role": "robot", "content": "x"}])), 400, "messages[0].role"),
        (CHAT, messages(json!([{"role": "user"}])), 400, "messages[0].content"),
        (CHAT, messages(json!([user, {"role": "assistant", "content": "x"}])), 400, "messages[1].role"),
        (COMPLETIONS, json!({"model": MODEL}).to_string(), 400, "prompt"),
        (COMPLETIONS, completion("prompt", json!([])), 400, "prompt"),
        (COMPLETIONS, completion("prompt", json!([[]])), 400, "prompt"),
        (COMPLETIONS, completion("prompt", json!({})), 400, "prompt"),
        (COMPLETIONS, completion("prompt", json!(3)), 400, "prompt"),
        (COMPLETIONS, completion("prompt", json!([1, "a"])), 400, "prompt"),
        (COMPLETIONS, completion("prompt", json!(["a", 1])), 400, "prompt"),
        (COMPLETIONS, completion("prompt", json!([[1], 2])), 400, "prompt"),
        (COMPLETIONS, completion("prompt", json!([-1])), 400, "prompt"),
        (COMPLETIONS, completion("prompt", json!([1.5])), 400, "prompt"),
        (COMPLETIONS, completion("prompt", json!([9192])), 400, "prompt"),
        (COMPLETIONS, completion("prompt", json!([4_294_967_296u64])), 400, "prompt"),
        (COMPLETIONS, completion("prompt", json!(vec![1; 4096])), 400, "prompt"),
        (COMPLETIONS, completion("prompt", json!(vec!["a"; 257])), 400, "prompt"),
        (COMPLETIONS, completion("suffix", json!("x")), 400, "suffix"),
        // tools
        (CHAT, chat("tools", json!("x")), 400, "tools"),
        (CHAT, chat("tools", tool(json!({"name": "bad name"}))), 400, "tools[0].function.name"),
        (
            CHAT,
            chat("tools", tool(json!({"name": "f", "parameters": {"type": 7}}))),
            400,
            "tools[0].function.parameters",
        ),
        (CHAT, chat("tool_choice", json!("required")), 400, "tool_choice"),
        (CHAT, chat("tool_choice", json!({"type": "function", "function": {"name": "f"}})), 400, "tool_choice"),
        (CHAT, chat("tool_choice", json!("sometimes")), 400, "tool_choice"),
        (CHAT, chat("tool_choice", json!(1)), 400, "tool_choice"),
        (CHAT, chat("parallel_tool_calls", json!("no")), 400, "parallel_tool_calls"),
        // not served
        (CHAT, chat("response_format", json!({"type": "json_schema"})), 400, "response_format"),
        (CHAT, chat("response_format", json!({"type": "xml"})), 400, "response_format"),
        (CHAT, chat("guided_json", json!(7)), 400, "guided_json"),
        (CHAT, chat("structured_outputs", json!({"regex": "a", "json": {}})), 400, "structured_outputs"),
        (CHAT, chat("functions", json!([{"name": "f"}])), 400, "functions"),
        (CHAT, chat("modalities", json!(["text", "audio"])), 400, "modalities"),
        (CHAT, chat("use_beam_search", json!(true)), 400, "use_beam_search"),
        (COMPLETIONS, completion("best_of", json!(3)), 400, "best_of"),
        // combinations
        (CHAT, chat("stream_options", json!({"include_usage": true})), 400, "stream_options"),
        (CHAT, chat("top_logprobs", json!(2)), 400, "top_logprobs"),
        (CHAT, chat("logprobs", json!(3)), 400, "logprobs"),
        (COMPLETIONS, completion("logprobs", json!(true)), 400, "logprobs"),
        (
            COMPLETIONS,
            json!({"model": MODEL, "prompt": "x", "max_tokens": 2, "min_tokens": 3}).to_string(),
            400,
            "min_tokens",
        ),
        (
            COMPLETIONS,
            json!({"model": MODEL, "prompt": "x", "stream": true, "prompt_logprobs": 1}).to_string(),
            400,
            "prompt_logprobs",
        ),
        (
            CHAT,
            json!({"model": MODEL, "messages": [user, {"role": "assistant", "content": "x"}],
                   "continue_final_message": true, "add_generation_prompt": true})
            .to_string(),
            400,
            "continue_final_message",
        ),
        (CHAT, chat("continue_final_message", json!(true)), 400, "continue_final_message"),
        // tokenize
        (TOKENIZE, json!({"model": MODEL}).to_string(), 400, "prompt"),
        (TOKENIZE, json!({"model": MODEL, "prompt": ["a", "b"]}).to_string(), 400, "prompt"),
        (TOKENIZE, json!({"model": MODEL, "prompt": "a", "messages": [user]}).to_string(), 400, "prompt"),
        (DETOKENIZE, json!({"model": MODEL}).to_string(), 400, "tokens"),
        (DETOKENIZE, json!({"model": MODEL, "tokens": "x"}).to_string(), 400, "tokens"),
        (DETOKENIZE, json!({"model": MODEL, "tokens": [99_999]}).to_string(), 400, "tokens"),
    ];
    // one field, one wrong value: on both endpoints
    for (field, value) in [
        ("temperature", json!("hot")),
        ("temperature", json!(-0.1)),
        ("temperature", json!(2.1)),
        ("top_p", json!(0)),
        ("top_p", json!(1.1)),
        ("top_k", json!(-2)),
        ("top_k", json!(1.5)),
        ("min_p", json!(-1)),
        ("min_p", json!(2)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-5)),
        ("max_tokens", json!("many")),
        ("max_tokens", json!(1e30)),
        ("max_completion_tokens", json!(0)),
        ("min_tokens", json!(-1)),
        ("n", json!(0)),
        ("n", json!(129)),
        ("n", json!("two")),
        ("seed", json!("x")),
        ("seed", json!(1.5)),
        ("stream", json!("yes")),
        ("stream", json!(1)),
        ("stop", json!(1)),
        ("stop", json!([null])),
        ("stop", json!("")),
        ("stop", json!(["a", ""])),
        ("stop", json!(vec!["a"; 17])),
        ("stop", json!("a".repeat(1025))),
        ("stop_token_ids", json!("x")),
        ("stop_token_ids", json!([-1])),
        ("stop_token_ids", json!([9192])),
        ("presence_penalty", json!(2.5)),
        ("frequency_penalty", json!(-2.5)),
        ("repetition_penalty", json!(0)),
        ("repetition_penalty", json!(-1)),
        ("logit_bias", json!([1])),
        ("logit_bias", json!({"x": 1})),
        ("logit_bias", json!({"5": 101})),
        ("logit_bias", json!({"9192": 1})),
        ("logit_bias", json!({"5": "high"})),
        ("logprobs", json!(-1)),
        ("logprobs", json!("x")),
        ("top_logprobs", json!(21)),
        ("prompt_logprobs", json!(-1)),
        ("prompt_logprobs", json!(21)),
        ("ignore_eos", json!("x")),
        ("cache_salt", json!("")),
        ("cache_salt", json!(7)),
        ("skip_special_tokens", json!(0)),
        ("return_token_ids", json!("x")),
        ("include_stop_str_in_output", json!(1)),
    ] {
        rows.push((CHAT, chat(field, value.clone()), 400, field));
        rows.push((COMPLETIONS, completion(field, value), 400, field));
    }
    rows
}

#[tokio::test]
async fn every_row_is_refused_in_openais_shape_and_names_its_field() {
    let harness = Harness::strict("never").await;
    let rows = rows();
    assert!(rows.len() >= 150, "{}", rows.len());
    let mut wrong = Vec::new();
    for (path, body, status, param) in rows {
        let response = harness.request("POST", path, &[], body.clone()).await;
        let error: Value =
            serde_json::from_str::<Value>(&response.text).map(|json| json["error"].clone()).unwrap_or_default();
        let named = error["param"].as_str().unwrap_or_default();
        let shaped = error["message"].as_str().is_some_and(|message| !message.is_empty())
            && error["type"] == "invalid_request_error"
            && error.get("code").is_some()
            && response.headers["content-type"] == "application/json";
        // a conversation's error may name the very place within the field
        let placed = named == param || (!param.is_empty() && named.starts_with(param) && param.starts_with("messages"));
        if response.status != status || !placed || !shaped {
            let shown: String = body.chars().take(120).collect();
            wrong.push(format!(
                "{path} {shown}: expected {status} {param:?}, got {} {}",
                response.status, response.text
            ));
        }
    }
    assert!(wrong.is_empty(), "{} rows:\n{}", wrong.len(), wrong.join("\n"));
    assert!(harness.groups[0].seen().is_empty(), "no group saw any of it");
}

#[tokio::test]
async fn unknown_routes_and_methods_have_openais_shape() {
    let harness = Harness::start(Vec::new()).await;
    for (method, path, status) in [
        ("GET", "/nothing", 404),
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", "/tokenize", 405),
        ("POST", "/v1/embeddings", 404),
    ] {
        let response = harness.request(method, path, &[], "").await;
        assert_eq!(response.status, status, "{method} {path}");
        assert_eq!(response.json()["error"]["type"], "invalid_request_error", "{method} {path}");
        assert!(response.headers.contains_key("x-request-id"), "{method} {path}");
    }
}

#[tokio::test]
async fn a_body_above_the_limit_is_a_413_with_and_without_its_length() {
    let group = Group::start("only", |_| Ok(say("x")));
    let options = bora_router::RouterOptions { max_body_bytes: 1000, ..options() };
    let harness = Harness::with(options, bora_router::ModelSpec::new(tokenizer()), vec![group]).await;
    let long = completion("prompt", json!("x".repeat(1000)));
    let length = long.len().to_string();
    let announced = harness.request("POST", COMPLETIONS, &[("content-length", &length)], long.clone()).await;
    let parts: Vec<Result<String, std::io::Error>> =
        long.as_bytes().chunks(100).map(|chunk| Ok(String::from_utf8_lossy(chunk).into_owned())).collect();
    let streamed = axum::body::Body::from_stream(futures::stream::iter(parts));
    let unannounced = harness.request("POST", COMPLETIONS, &[], streamed).await;
    for response in [announced, unannounced] {
        assert_eq!((response.status, response.json()["error"]["code"].clone()), (413, json!("request_too_large")));
    }
}

#[tokio::test]
async fn what_only_looks_odd_is_served() {
    let harness = Harness::saying("x").await;
    for body in [
        chat("temperature", Value::Null),
        chat("tools", json!([])),
        chat("tools", Value::Null),
        chat("tool_choice", json!("auto")),
        chat("response_format", json!({"type": "text"})),
        chat("max_tokens", json!(3.0)),
        chat("seed", json!(-9_223_372_036_854_775_808i64)),
        chat("no_such_field", json!({"deep": [1, 2, {"x": null}]})),
        chat("metadata", json!({"a": "b"})),
        chat("stop", json!([])),
        chat("logit_bias", json!({"5": -100})),
        chat("top_logprobs", json!(0)),
        json!({"messages": [{"role": "user", "content": "the only model needs no name"}]}).to_string(),
        json!({"model": ALIAS, "messages": [{"role": "user", "content": "by its alias"}]}).to_string(),
    ] {
        let response = harness.request("POST", CHAT, &[], body.clone()).await;
        assert_eq!(response.status, 200, "{body}: {}", response.text);
    }
}
