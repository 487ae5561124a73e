//! What coding agents send: Codex by Responses, Claude Code by Messages. Both with the reference's rules, because it is their
//! APIs that allow it.

use crate::support::*;
use bora_proto::v1::FinishReason;
use bora_router::ModelSpec;
use serde_json::{Value, json};

const RESPONSES: &str = "/v1/responses";
const MESSAGES: &str = "/v1/messages";

async fn strictly(script: Vec<Act>) -> Harness {
    let group = Group::start("only", move |_| Ok(script.clone()));
    Harness::with(strict(), ModelSpec::new(tokenizer()), vec![group]).await
}

fn prompt(harness: &Harness, number: usize) -> String {
    tokenizer().decode(&harness.groups[0].seen()[number].token_ids, false)
}

async fn accepted(harness: &Harness, path: &str, mut body: Value) -> Value {
    body["model"] = json!(MODEL);
    if path == MESSAGES && body.get("max_tokens").is_none() {
        body["max_tokens"] = json!(9);
    }
    let completion = harness.post(path, body.clone()).await;
    assert_eq!(completion.status, 200, "{body}: {}", completion.text);
    if body["stream"] == true { Value::Null } else { completion.json() }
}

fn codex_tools() -> Value {
    json!([
        {"type": "function", "name": "shell", "parameters": {"type": "object"}},
        {"type": "namespace", "name": "mcp__demo", "description": "Tools of demo.", "tools": [
            {"type": "function", "name": "shout", "parameters": {"type": "object"}},
            {"type": "custom", "name": "write"}]},
        {"type": "custom", "name": "apply_patch", "description": "Edits files.",
            "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/s"}},
        {"type": "web_search", "external_web_access": true}
    ])
}

#[tokio::test]
async fn codex_gets_namespaces_and_custom_tools_back_as_it_declared_them() {
    let ids = [
        call_ids(&[("mcp__demo__shout", "{\"text\": \"a\"}"), ("apply_patch", "{\"input\": \"*** Begin\\nx\"}")]),
        call_ids(&[("mcp__demo__write", "no JSON"), ("shell", "{}")]),
        vec![EOS],
    ];
    let harness = strictly(say_ids(&ids.concat(), FinishReason::Stop)).await;
    let body = json!({"model": MODEL, "input": "Hi", "tools": codex_tools()});
    let plain = accepted(&harness, RESPONSES, body.clone()).await;
    let shown = |items: &Value| -> Vec<Value> {
        let item = |item: &Value| {
            json!([item["type"], item["namespace"], item["name"], item["arguments"], item["input"], item["status"]])
        };
        items.as_array().into_iter().flatten().map(item).collect()
    };
    let expected = [
        json!(["function_call", "mcp__demo", "shout", "{\"text\": \"a\"}", null, "completed"]),
        json!(["custom_tool_call", null, "apply_patch", null, "*** Begin\nx", "completed"]),
        json!(["custom_tool_call", "mcp__demo", "write", null, "no JSON", "completed"]),
        json!(["function_call", null, "shell", "{}", null, "completed"]),
    ];
    assert_eq!(shown(&plain["output"]), expected);
    assert_eq!(plain["tools"], codex_tools(), "as they were declared");

    let mut streaming = body.clone();
    streaming["stream"] = json!(true);
    let events = harness.post(RESPONSES, streaming).await.events();
    let (_, last) = events.last().expect("events");
    assert_eq!(shown(&last["response"]["output"]), expected);
    let of =
        |wanted: &str| events.iter().filter(|(name, _)| name == wanted).map(|(_, event)| event).collect::<Vec<_>>();
    assert_eq!(of("response.custom_tool_call_input.delta")[0]["delta"], "*** Begin\nx");
    assert_eq!(of("response.custom_tool_call_input.done")[1]["input"], "no JSON");
    assert_eq!(of("response.function_call_arguments.done").len(), 2);
    assert_eq!(of("response.output_item.added")[0]["item"]["namespace"], "mcp__demo");
    let text = prompt(&harness, 0);
    for name in [
        "\"name\": \"mcp__demo__shout\"",
        "\"name\": \"mcp__demo__write\"",
        "\"name\": \"apply_patch\"",
        "start: /.+/s",
    ] {
        assert!(text.contains(name), "{name}: {text}");
    }
    assert!(!text.contains("web_search"), "{text}");
    assert!(harness.get("/metrics").await.text.contains("bora_router_left_out_tools_total 2"));

    // the history has what was said, under the names that the model knows
    let mut history = vec![json!({"role": "user", "content": "Hi"})];
    for item in plain["output"].as_array().into_iter().flatten() {
        history.push(item.clone());
    }
    for item in plain["output"].as_array().into_iter().flatten() {
        let kind = if item["type"] == "custom_tool_call" { "custom_tool_call_output" } else { "function_call_output" };
        history.push(json!({"type": kind, "call_id": item["call_id"], "output": "done"}));
    }
    accepted(&harness, RESPONSES, json!({"input": history, "tools": codex_tools()})).await;
    let text = prompt(&harness, 2);
    let calls = "[TOOL_CALLS]mcp__demo__shout[ARGS]{\"text\": \"a\"}[TOOL_CALLS]apply_patch[ARGS]{\"input\": \"*** Begin\\nx\"}";
    assert!(text.contains(calls), "{text}");
}

#[tokio::test]
async fn codex_may_say_anything_anywhere() {
    let harness = strictly(say("x")).await;
    let message = |role: &str, text: &str| json!({"type": "message", "role": role, "content": [{"type": "input_text", "text": text}]});
    let call = |id: &str| json!({"type": "function_call", "call_id": id, "name": "f", "arguments": "{}"});
    let output = |id: &str| json!({"type": "function_call_output", "call_id": id, "output": "r"});
    for (input, expected) in [
        (
            json!([message("user", "a"), message("assistant", "b"), message("developer", "c"), message("user", "d")]),
            "[INST]a[/INST]b</s>[INST]c\n\nd[/INST]",
        ),
        (
            json!([message("user", "a"), call("1"), message("assistant", "b"), output("1"), message("developer", "c")]),
            "[INST]a[/INST]b[TOOL_CALLS]f[ARGS]{}</s>[TOOL_RESULTS]r[/TOOL_RESULTS][INST]c[/INST]",
        ),
        (
            json!([message("user", "a"), call("1"), call("2"), output("2"), message("assistant", "b"), output("1")]),
            "[INST]a[/INST]b[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]f[ARGS]{}</s>\
             [TOOL_RESULTS]r[/TOOL_RESULTS][TOOL_RESULTS]r[/TOOL_RESULTS]",
        ),
        (
            json!([message("user", "a"), {"type": "web_search_call", "id": "ws", "status": "completed"},
                {"type": "local_shell_call", "call_id": "9", "action": {}}, {"type": "reasoning", "summary": []},
                output("9"), message("user", "b")]),
            "[INST]a\n\nb[/INST]",
        ),
    ] {
        let number = harness.groups[0].seen().len();
        accepted(&harness, RESPONSES, json!({"input": input})).await;
        assert_eq!(prompt(&harness, number), format!("<s>{expected}"), "{input}");
    }
}

/// The format has one place for tools. Those that come later are shown where they come, so that the prompt up to there
/// stays.
#[tokio::test]
async fn late_tools_leave_the_prompt_before_them_as_it_was() {
    let harness = strictly(say_ids(&[call_ids(&[("late", "{}")]), vec![EOS]].concat(), FinishReason::Stop)).await;
    let more = |name: &str| json!({"type": "additional_tools", "role": "developer", "tools": [{"type": "function", "name": name}]});
    let user = |text: &str| json!({"role": "user", "content": text});
    let first = accepted(&harness, RESPONSES, json!({"input": [more("early"), user("a")]})).await;
    let completion = json!({"role": "assistant", "content": "b"});
    let input = json!([more("early"), user("a"), completion, user("c"), more("late")]);
    let second = accepted(&harness, RESPONSES, json!({"input": input})).await;
    let late_only = accepted(&harness, RESPONSES, json!({"input": [user("a"), more("late")]})).await;
    for response in [&first, &second, &late_only] {
        assert_eq!(response["output"][0]["name"], "late", "{response}");
    }
    let (before, after) = (prompt(&harness, 0), prompt(&harness, 1));
    assert!(before.contains("[AVAILABLE_TOOLS]") && before.contains("early") && after.starts_with(&before), "{after}");
    assert!(after[before.len()..].contains("\"name\": \"late\""), "{after}");

    // and in Messages: a deferred tool is shown where a result refers to it
    let tools = json!([{"name": "search", "input_schema": {"type": "object"}},
        {"name": "late", "description": "Later.", "input_schema": {"type": "object"}, "defer_loading": true}]);
    let mut messages = vec![json!({"role": "user", "content": "a"})];
    let mut prompts = Vec::new();
    for _ in 0..2 {
        let body = json!({"messages": messages, "tools": tools});
        let number = harness.groups[0].seen().len();
        accepted(&harness, MESSAGES, body.clone()).await;
        prompts.push(prompt(&harness, number));
        messages.push(
            json!({"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "search", "input": {}}]}),
        );
        messages.push(json!({"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [
            {"type": "tool_reference", "tool_name": "late"}]}]}));
    }
    assert!(!prompts[0].contains("Later.") && prompts[1].starts_with(&prompts[0]), "{}", prompts[1]);
    assert!(
        prompts[1].contains("[TOOL_RESULTS]{\"type\": \"function\", \"function\": {\"name\": \"late\""),
        "{}",
        prompts[1]
    );
    // a choice that forces it needs it among the tools
    let forced = json!({"messages": [{"role": "user", "content": "a"}], "tools": tools, "tool_choice": {"type": "tool", "name": "late"}});
    accepted(&harness, MESSAGES, forced).await;
}

#[tokio::test]
async fn claude_code_may_say_anything_anywhere() {
    let harness = strictly(say("x")).await;
    let used = |id: &str| json!({"type": "tool_use", "id": id, "name": "f", "input": {}});
    let result = |id: &str| json!({"type": "tool_result", "tool_use_id": id, "content": "r"});
    let message = |role: &str, content: Value| json!({"role": role, "content": content});
    let reminder = message("system", json!([{"type": "text", "text": "c", "cache_control": {"type": "ephemeral"}}]));
    let results = "[TOOL_RESULTS]r[/TOOL_RESULTS]";
    for (messages, expected) in [
        (json!([message("user", json!("a")), reminder]), "[INST]a[/INST][SYSTEM_PROMPT]c[/SYSTEM_PROMPT]".to_owned()),
        (
            json!([
                message("user", json!("a")),
                message("assistant", json!([used("1")])),
                message("user", json!([result("1")])),
                reminder
            ]),
            format!("[INST]a[/INST][TOOL_CALLS]f[ARGS]{{}}</s>{results}[INST]c[/INST]"),
        ),
        (
            json!([
                message("user", json!("a")),
                message("assistant", json!([used("1")])),
                message("assistant", json!([used("2")])),
                message("user", json!([result("1"), {"type": "text", "text": "b"}])),
                message("user", json!([result("2")]))
            ]),
            format!("[INST]a[/INST][TOOL_CALLS]f[ARGS]{{}}[TOOL_CALLS]f[ARGS]{{}}</s>{results}{results}[INST]b[/INST]"),
        ),
        (
            json!([message(
                "user",
                json!([{"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "a"}}])
            )]),
            "[INST]a[/INST]".to_owned(),
        ),
        (
            json!([
                message("user", json!("a")),
                message(
                    "assistant",
                    json!([{"type": "tool_use", "id": "1", "name": "f",
                "input": {"INVALID_JSON": "{\"a\": "}}])
                ),
                message("user", json!([result("1")]))
            ]),
            format!("[INST]a[/INST][TOOL_CALLS]f[ARGS]\"{{\\\"a\\\": \"</s>{results}"),
        ),
    ] {
        let number = harness.groups[0].seen().len();
        accepted(&harness, MESSAGES, json!({"messages": messages})).await;
        assert_eq!(prompt(&harness, number), format!("<s>{expected}"), "{messages}");
    }
    let long = "n".repeat(128);
    let tools = json!([{"name": long, "input_schema": {"type": "object"}}, {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}]);
    let number = harness.groups[0].seen().len();
    accepted(&harness, MESSAGES, json!({"messages": [message("user", json!("a"))], "tools": tools})).await;
    assert!(prompt(&harness, number).contains(&long) && !prompt(&harness, number).contains("web_search"));
}

#[tokio::test]
async fn no_tokens_fill_the_cache() {
    let harness = strictly(say("x")).await;
    let completion =
        accepted(&harness, MESSAGES, json!({"max_tokens": 0, "messages": [{"role": "user", "content": "Hi"}]})).await;
    assert_eq!((&completion["content"], &completion["stop_reason"]), (&json!([]), &json!("max_tokens")));
    assert_eq!(completion["usage"]["output_tokens"], 0);
    assert_eq!(harness.groups[0].seen()[0].stopping.as_ref().map(|stopping| stopping.max_tokens), Some(1));
}

#[tokio::test]
async fn efforts_are_taken_alike_and_counted() {
    let harness = strictly(say("x")).await;
    let user = json!([{"role": "user", "content": "Hi"}]);
    for (path, body) in [
        ("/v1/chat/completions", json!({"messages": user, "reasoning_effort": "medium"})),
        (RESPONSES, json!({"input": user, "reasoning": {"effort": "high", "summary": "auto"}})),
        (MESSAGES, json!({"messages": user, "output_config": {"effort": "high"}, "thinking": {"type": "adaptive"}})),
        ("/v1/chat/completions", json!({"messages": user, "reasoning_effort": "none"})),
    ] {
        accepted(&harness, path, body).await;
    }
    let metrics = harness.get("/metrics").await.text;
    assert!(metrics.contains("bora_router_ignored_efforts_total 3"), "{metrics}");
    assert!(metrics.contains("bora_router_unknown_fields_total 0"), "{metrics}");
}

#[tokio::test]
async fn lists_counts_and_upgrades_are_what_agents_expect() {
    let harness = strictly(say("x")).await;
    let anthropic = [("anthropic-version", "2023-06-01")];
    let list = harness.request("GET", "/v1/models?limit=1000", &anthropic, "").await.json();
    assert_eq!((&list["has_more"], &list["data"][0]["type"]), (&json!(false), &json!("model")));
    assert!(
        list["data"].as_array().is_some_and(|models| models.iter().all(|model| model["display_name"] == model["id"]))
    );
    let one = harness.request("GET", &format!("/v1/models/{MODEL}"), &anthropic, "").await.json();
    assert_eq!((&one["display_name"], &one["object"]), (&json!(MODEL), &Value::Null));

    let body = json!({"model": MODEL, "input": "Hi", "instructions": "Be brief.", "tools": codex_tools()});
    let count = harness.post("/v1/responses/input_tokens", body.clone()).await.json();
    let usage = accepted(&harness, RESPONSES, body).await["usage"].clone();
    assert_eq!(count, json!({"object": "response.input_tokens", "input_tokens": usage["input_tokens"]}));

    let upgrade = [("connection", "upgrade"), ("upgrade", "websocket"), ("sec-websocket-version", "13")];
    let completion = harness.request("GET", RESPONSES, &upgrade, "").await;
    assert_eq!((completion.status, completion.json()["error"]["code"].clone()), (426, json!("no_websocket")));
    assert_eq!(harness.request("GET", RESPONSES, &[], "").await.status, 405);
}

/// Errors that a retry can't mend say so, in the words of the clients of OpenAI and Anthropic.
#[tokio::test]
async fn what_fails_again_says_so() {
    let harness = strictly(say("x")).await;
    for (path, body) in [(RESPONSES, json!({"input": 7})), (MESSAGES, json!({})), ("/v1/nothing", json!({}))] {
        let completion = harness.post(path, body).await;
        assert_eq!(
            completion.headers.get("x-should-retry").map(|value| value.as_bytes()),
            Some(&b"false"[..]),
            "{path}"
        );
    }
    let empty = Harness::start(Vec::new()).await;
    let body = json!({"model": MODEL, "input": "Hi"});
    let completion = empty.post(RESPONSES, body).await;
    assert!(completion.status == 503 && !completion.headers.contains_key("x-should-retry"), "{}", completion.text);
}

/// Half of a surrogate pair, wherever it stands.
#[tokio::test]
async fn halves_of_surrogate_pairs_are_replaced_everywhere() {
    let harness = strictly(say("x")).await;
    let chat = r#"{"model": "MODEL", "max_tokens": 9, "user": "\ud83d", "tools": [{"type": "function", "function": {"name": "f",
        "description": "\ud83d", "parameters": {"type": "object", "properties": {"\udc00": {"enum": ["\ud83d"]}}}}}], "messages": [
        {"role": "user", "content": "a \ud83d"}, {"role": "assistant", "tool_calls": [{"id": "\ud83d", "type": "function",
        "function": {"name": "f", "arguments": "{\"a\": \"\\ud83d \ud83d\"}"}}]},
        {"role": "tool", "tool_call_id": "\ud83d", "content": [{"type": "text", "text": "\ud83d"}]}]}"#;
    let responses =
        r#"{"model": "MODEL", "instructions": "\ud83d", "input": "a \ud83d", "metadata": {"\ud83d": "\ud83d"}}"#;
    let items =
        r#"{"model": "MODEL", "input": [{"role": "user", "content": [{"type": "input_text", "text": "a \ud83d"}]}]}"#;
    let messages = r#"{"model": "MODEL", "max_tokens": 9, "system": "\ud83d", "messages": [{"role": "user", "content": [
        {"type": "text", "text": "a \ud83d"}]}], "stop_sequences": ["\ud83d"]}"#;
    let form =
        r#"{"model": "MODEL", "prompt": "a \ud83d", "max_tokens": 9, "guided_json": "{\"const\": \"\\ud83d\"}"}"#;
    for (path, body) in [
        ("/v1/chat/completions", chat),
        (RESPONSES, responses),
        (RESPONSES, items),
        (MESSAGES, messages),
        ("/v1/completions", form),
        ("/tokenize", chat),
        ("/tokenize", r#"{"model": "MODEL", "prompt": "a \ud83d"}"#),
        ("/v1/messages/count_tokens", messages),
        ("/v1/responses/input_tokens", responses),
    ] {
        let number = harness.groups[0].seen().len();
        let completion = harness.request("POST", path, &[], body.replace("MODEL", MODEL)).await;
        assert_eq!(completion.status, 200, "{path} {body}: {}", completion.text);
        if harness.groups[0].seen().len() > number {
            assert!(prompt(&harness, number).contains("a \u{fffd}"), "{}", prompt(&harness, number));
        }
    }
}
