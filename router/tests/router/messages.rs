//! `/v1/messages`: what its requests become, the shapes of its responds and events, and what it refuses.

use crate::support::*;
use bora_proto::v1::FinishReason;
use bora_router::{ModelSpec, RouterOptions};
use serde_json::{Value, json};
use tonic::Status;

const PATH: &str = "/v1/messages";
const COUNT: &str = "/v1/messages/count_tokens";

fn ask(extra: Value) -> Value {
    let mut body = json!({"model": MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": "Hi"}]});
    for (key, value) in extra.as_object().expect("an object") {
        body[key] = value.clone();
    }
    body
}

fn tool() -> Value {
    json!({"name": "read_file", "description": "d", "input_schema": {"type": "object"}})
}

/// The prompt of a chat request.
async fn chat_prompt(harness: &Harness, messages: Value, extra: Value) -> Value {
    let mut body = json!({"model": MODEL, "messages": messages});
    for (key, value) in extra.as_object().expect("an object") {
        body[key] = value.clone();
    }
    let tokens = harness.post("/tokenize", body).await.json()["tokens"].clone();
    assert!(tokens.is_array());
    tokens
}

#[tokio::test]
async fn a_plain_message_has_anthropics_shape() {
    let harness = Harness::scripted(|_| {
        let mut acts = say("Hello, world!");
        acts[0] = Act::Start { cached: 2 };
        Ok(acts)
    })
    .await;
    let headers = [("x-request-id", "abc"), ("anthropic-version", "2023-06-01"), ("x-api-key", "any")];
    let response =
        harness.request("POST", PATH, &headers, ask(json!({"metadata": {"user_id": "u"}})).to_string()).await;
    assert_eq!(response.status, 200, "{}", response.text);
    assert_eq!(
        (&response.headers["request-id"], &response.headers["x-request-id"]),
        (&"abc".parse().unwrap(), &"abc".parse().unwrap())
    );
    let prompt = harness.groups[0].seen()[0].token_ids.len();
    let generated = tokenizer().encode("Hello, world!").len() + 1;
    let expected = json!({
        "id": "msg_abc", "type": "message", "role": "assistant", "model": MODEL,
        "content": [{"type": "text", "text": "Hello, world!"}], "stop_reason": "end_turn", "stop_sequence": null,
        "usage": {"input_tokens": prompt - 2, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 2,
                  "output_tokens": generated}
    });
    assert_eq!(response.json(), expected);
    let metrics = harness.get("/metrics").await.text;
    assert!(metrics.contains("bora_router_requests_total{endpoint=\"messages\",status=\"200\"} 1"), "{metrics}");
    assert!(metrics.contains("bora_router_unknown_fields_total 0"), "{metrics}");
}

#[tokio::test]
async fn blocks_are_the_messages_that_they_stand_for() {
    let harness = Harness::saying("x").await;
    let messages = json!([
        {"role": "user", "content": [{"type": "text", "text": "Read", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "both"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "text", "text": "I will."},
            {"type": "tool_use", "id": "toolu_1", "name": "read_file", "input": {"path": "a", "n": 1e2, "big": "BIG"}},
            {"type": "tool_use", "id": "toolu_2", "name": "read_file"}]},
        {"role": "user", "content": [{"type": "text", "text": "Quick!"},
            {"type": "tool_result", "tool_use_id": "toolu_2", "content": [{"type": "text", "text": "not found"}], "is_error": true},
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": "one"}]},
        {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]},
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": "It"}
    ]);
    let system = json!([{"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=12ab;"},
        {"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]);
    let body = ask(json!({"messages": messages, "system": system, "tools": [tool()]}));
    // a number that JSON readers round
    let text = body.to_string().replace("\"BIG\"", "12345678901234567890123");
    let response = harness.request("POST", PATH, &[], text).await;
    assert_eq!(response.status, 200, "{}", response.text);
    let call = |id: &str, arguments: &str| json!({"id": id, "type": "function", "function": {"name": "read_file", "arguments": arguments}});
    let chat = json!([
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "Read\n\nboth"},
        {"role": "assistant", "content": "I will.", "tool_calls": [
            call("toolu_1", "{\"path\": \"a\", \"n\": 1e2, \"big\": 12345678901234567890123}"), call("toolu_2", "{}")]},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "one"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "Error: not found"},
        {"role": "user", "content": "Quick!\n\nWell?"},
        {"role": "assistant", "content": "It"}
    ]);
    let function = json!({"type": "function", "function":
        {"name": "read_file", "description": "d", "parameters": {"type": "object"}}});
    let expected = chat_prompt(&harness, chat, json!({"tools": [function], "continue_final_message": true})).await;
    let sent = harness.groups[0].seen()[0].token_ids.clone();
    assert_eq!(json!(sent), expected);
    let uncounted = body.to_string().replace("\"BIG\"", "12345678901234567890123").replace("max_tokens", "user");
    let count = harness.request("POST", COUNT, &[], uncounted.replace(":100,", ":\"u\",")).await;
    assert_eq!((count.status, count.json()), (200, json!({"input_tokens": sent.len()})));

    // the billing line is not part of a text either
    let with_line = ask(json!({"system": "x-anthropic-billing-header: cch=1;\nBe brief."}));
    let without = ask(json!({"system": "Be brief."}));
    assert_eq!(harness.post(COUNT, with_line).await.json(), harness.post(COUNT, without).await.json());
}

/// One pixel.
const PIXEL: &str = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";

#[tokio::test]
async fn images_of_tools_are_shown_by_the_user() {
    let harness = Harness::saying("x").await;
    let image = json!({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}});
    let messages = json!([
        {"role": "user", "content": [image, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "look", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": [image]},
            {"type": "text", "text": "b"}]}
    ]);
    let response = harness.post(PATH, ask(json!({"messages": messages}))).await;
    assert_eq!(response.status, 200, "{}", response.text);
    let image = json!({"type": "image_url", "image_url": format!("data:image/png;base64,{PIXEL}")});
    let chat = json!([
        {"role": "user", "content": [image, {"type": "text", "text": "a"}]},
        {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "look", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": ""},
        {"role": "user", "content": [image, {"type": "text", "text": "b"}]}
    ]);
    let sent = &harness.groups[0].seen()[0];
    assert_eq!((json!(sent.token_ids), sent.images.len()), (chat_prompt(&harness, chat, json!({})).await, 2));
}

#[tokio::test]
async fn events_come_in_order() {
    let arguments = "{\"path\": \"src/main.rs\"}";
    let ids =
        [tokenizer().encode("Let me look."), call_ids(&[("read_file", arguments), ("read_file", "{}")]), vec![EOS]];
    let ids = ids.concat();
    let harness = Harness::scripted(move |_| {
        let mut acts = say_ids(&ids, FinishReason::Stop);
        acts[0] = Act::Start { cached: 3 };
        Ok(acts)
    })
    .await;
    let events = harness.post(PATH, ask(json!({"stream": true, "tools": [tool()]}))).await.events();
    assert!(events.iter().all(|(name, event)| event["type"] == *name));
    let mut names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    names.dedup();
    let block = ["content_block_start", "content_block_delta", "content_block_stop"];
    let expected =
        [&["message_start", "ping"][..], &block, &block, &block, &["message_delta", "message_stop"]].concat();
    assert_eq!(names, expected);
    let message = &events[0].1["message"];
    assert_eq!((&message["content"], &message["stop_reason"]), (&json!([]), &Value::Null));
    assert_eq!(
        (&message["usage"]["cache_read_input_tokens"], &message["usage"]["output_tokens"]),
        (&json!(3), &json!(0))
    );
    let joined = |index: u64, field: &str| -> String {
        let of_block = events.iter().filter(|(_, event)| event["index"] == index);
        of_block.filter_map(|(_, event)| event["delta"][field].as_str()).collect()
    };
    assert_eq!(joined(0, "text"), "Let me look.");
    assert_eq!((joined(1, "partial_json").as_str(), joined(2, "partial_json").as_str()), (arguments, "{}"));
    let starts: Vec<&Value> =
        events.iter().map(|(_, event)| &event["content_block"]).filter(|block| !block.is_null()).collect();
    assert_eq!(
        (starts[0], &starts[1]["input"], &starts[1]["name"]),
        (&json!({"type": "text", "text": ""}), &json!({}), &json!("read_file"))
    );
    assert!(starts[1]["id"].as_str().is_some_and(|id| id.starts_with("toolu_")));
    let (_, end) = &events[events.len() - 2];
    assert_eq!(end["delta"], json!({"stop_reason": "tool_use", "stop_sequence": null}));
    assert!(end["usage"]["output_tokens"].as_u64() > Some(5));

    // the same, whole
    let plain = harness.post(PATH, ask(json!({"tools": [tool()]}))).await.json();
    assert_eq!(plain["content"][0], json!({"type": "text", "text": "Let me look."}));
    assert_eq!(
        (&plain["content"][1]["input"], &plain["stop_reason"]),
        (&json!({"path": "src/main.rs"}), &json!("tool_use"))
    );
}

#[tokio::test]
async fn it_ends_for_a_reason_and_breaks_with_an_error() {
    let harness = Harness::scripted(|request| {
        if request.token_ids.contains(&tokenizer().encode("break")[0]) {
            let mut acts = say("one two");
            acts.truncate(3);
            acts.push(Act::Fail(Status::invalid_argument("not like this")));
            return Ok(acts);
        }
        Ok(say_ids(&tokenizer().encode("one two STOP three"), FinishReason::Length))
    })
    .await;
    let cut = harness.post(PATH, ask(json!({}))).await.json();
    assert_eq!(cut["stop_reason"], "max_tokens");
    for stream in [false, true] {
        let response = harness.post(PATH, ask(json!({"stop_sequences": ["STOP"], "stream": stream}))).await;
        let end = if stream {
            response.events().iter().rev().nth(1).expect("events").1["delta"].clone()
        } else {
            response.json()
        };
        assert_eq!((&end["stop_reason"], &end["stop_sequence"]), (&json!("stop_sequence"), &json!("STOP")));
    }
    let broken = json!({"stream": true, "messages": [{"role": "user", "content": "break"}]});
    let events = harness.post(PATH, ask(broken)).await.events();
    let (name, event) = events.last().expect("events");
    assert_eq!(
        (name.as_str(), &event["type"], &event["error"]["type"]),
        ("error", &json!("error"), &json!("invalid_request_error"))
    );
    assert!(events.iter().all(|(name, _)| name != "message_stop"));
}

#[tokio::test]
async fn silence_is_broken_by_pings() {
    let group = Group::start("only", |_| {
        let mut acts = say("Hi");
        acts.insert(0, Act::Pause(std::time::Duration::from_millis(700)));
        Ok(acts)
    });
    let options = RouterOptions { heartbeat_seconds: 0.1, ..options() };
    let harness = Harness::with(options, ModelSpec::new(tokenizer()), vec![group]).await;
    let response = harness.post(PATH, ask(json!({"stream": true}))).await;
    let events = response.events();
    // the message begins when the group has said what it knows of the prompt
    let begins = events.iter().position(|(name, _)| name == "message_start").expect("a message");
    assert!(begins >= 1 && events[..begins].iter().all(|(name, _)| name == "ping"), "{}", response.text);
    assert!(!response.text.contains(": keep-alive"));
}

#[tokio::test]
async fn choices_and_forms_reach_the_group() {
    let harness = Harness::saying("x").await;
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
    let format = json!({"type": "json_schema", "schema": schema});
    for extra in [
        json!({"tool_choice": {"type": "any"}, "tools": [tool()]}),
        json!({"tool_choice": {"type": "tool", "name": "read_file"}, "tools": [tool()]}),
        json!({"output_config": {"format": format, "effort": "high"}}),
        json!({"output_format": format}),
        json!({"tool_choice": {"type": "auto", "disable_parallel_tool_use": true}, "tools": [tool()], "top_k": 4}),
        json!({"tool_choice": {"type": "none"}, "tools": [tool()], "thinking": {"type": "enabled", "budget_tokens": 1024}}),
    ] {
        let response = harness.post(PATH, ask(extra.clone())).await;
        assert_eq!(response.status, 200, "{extra}: {}", response.text);
    }
    let seen = harness.groups[0].seen();
    let grammar = |at: usize| seen[at].grammar.as_ref().map_or("", |grammar| grammar.source.as_str());
    assert!(grammar(0).contains("calls+") && grammar(1).starts_with("start: calls\n"));
    assert!(grammar(2).contains("integer") && grammar(2) == grammar(3));
    assert_eq!((grammar(4), grammar(5)), ("", ""));
    let sampling = |at: usize| seen[at].sampling.clone().expect("set");
    assert_eq!(sampling(4).top_k, Some(4));
    for token in [9, 32, 33] {
        assert!(sampling(5).logit_bias[&token] <= -1_000.0, "a call is written with {token}");
    }
}

#[tokio::test]
async fn what_it_refuses_is_named_in_anthropics_form() {
    let harness = Harness::strict("x").await;
    let user = json!({"role": "user", "content": "a"});
    let block =
        |block: Value| json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, block]}]});
    let asked = |block: Value| json!({"messages": [user, {"role": "assistant", "content": [block]}, user]});
    let use_tool = |name: &str| json!({"type": "tool_use", "id": "t", "name": name, "input": {}});
    for (extra, named) in [
        (json!({"max_tokens": null}), "max_tokens"),
        (json!({"max_tokens": 0, "stream": true}), "max_tokens"),
        (json!({"max_tokens": 0, "tools": [tool()], "tool_choice": {"type": "any"}}), "max_tokens"),
        (json!({"max_tokens": "many"}), "max_tokens"),
        (json!({"messages": null}), "messages"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": "Hi"}), "messages"),
        (json!({"messages": ["Hi"]}), "messages[0]"),
        (json!({"messages": [{"content": "a"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "tool", "content": "a"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": 7}]}), "messages[0].content"),
        (json!({"messages": [{"role": "assistant", "content": "a"}]}), "messages[0].role"),
        (block(json!({"text": "b"})), "messages[0].content[1].type"),
        (block(json!({"type": "text"})), "messages[0].content[1].text"),
        (block(json!({"type": "text", "text": 7})), "messages[0].content[1].text"),
        (
            block(json!({"type": "document", "source": {}})),
            "messages.0.content.1.document: this model does not support PDF input",
        ),
        (block(json!({"type": "search_result", "source": "https://x", "title": "t"})), "search_result"),
        (block(json!({"type": "tool_use", "id": "t", "name": "f", "input": {}})), "messages[0].content[1]"),
        (block(json!({"type": "image"})), "messages[0].content[1].source"),
        (block(json!({"type": "image", "source": {"type": "file", "file_id": "f"}})), "messages[0].content[1].source"),
        (
            block(json!({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}})),
            "messages[0].content[1].source",
        ),
        (block(json!({"type": "tool_result", "content": "x"})), "messages[0].content[1].tool_use_id"),
        (
            json!({"messages": [user, {"role": "assistant", "content": "b"}, {"role": "user", "content": [
                {"type": "text", "text": "c"}, {"type": "tool_result", "tool_use_id": "t", "content": "x"}]}]}),
            "messages[2].content[1]",
        ),
        (
            block(json!({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "document"}]})),
            "messages.0.content.1.document: ",
        ),
        (asked(use_tool("a b")), "messages[1].content[0].name"),
        (asked(use_tool("f")), "messages[1].content"),
        (asked(json!({"type": "tool_use", "name": "f", "input": {}})), "messages[1].content[0].id"),
        (asked(json!({"type": "tool_use", "id": "t", "input": {}})), "messages[1].content[0].name"),
        (asked(json!({"type": "server_tool_use", "id": "t"})), "messages[1].content[0]"),
        (json!({"system": 7}), "system"),
        (json!({"system": [{"type": "image"}]}), "system[0]"),
        (json!({"tools": [{"name": "f"}]}), "tools[0].input_schema"),
        (json!({"tools": [{"input_schema": {}}]}), "tools[0].name"),
        (json!({"tools": [{"name": "a b", "input_schema": {}}]}), "tools[0].name"),
        (json!({"tools": [{"name": "f", "input_schema": {"type": 7}}]}), "tools[0].input_schema"),
        (
            json!({"tools": [{"type": "web_search_20250305", "name": "web_search"}],
            "tool_choice": {"type": "tool", "name": "web_search"}}),
            "tool_choice",
        ),
        (json!({"tool_choice": {"type": "any"}}), "tool_choice"),
        (json!({"tool_choice": {"type": "sometimes"}, "tools": [tool()]}), "tool_choice.type"),
        (json!({"tool_choice": {"type": "tool"}, "tools": [tool()]}), "tool_choice.name"),
        (json!({"tool_choice": {"type": "tool", "name": "g"}, "tools": [tool()]}), "tool_choice"),
        (json!({"tool_choice": "auto"}), "tool_choice"),
        (json!({"stop_sequences": "x"}), "stop_sequences"),
        (json!({"stop_sequences": [""]}), "stop_sequences"),
        (json!({"output_config": {"format": {"type": "xml"}}}), "output_config.format"),
        (json!({"mcp_servers": [{"type": "url"}]}), "mcp_servers"),
        (json!({"container": "c"}), "container"),
        (json!({"n": 2}), "n"),
        (json!({"temperature": 3}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"messages": [{"role": "user", "content": "word ".repeat(5_000)}]}), "prompt is too long: "),
    ] {
        let response = harness.post(PATH, ask(extra.clone())).await;
        let shown: String = extra.to_string().chars().take(200).collect();
        let body = response.json();
        assert_eq!((response.status, &body["type"]), (400, &json!("error")), "{shown}: {body}");
        assert_eq!(body["error"]["type"], "invalid_request_error", "{shown}");
        assert!(body["error"]["message"].as_str().is_some_and(|message| message.contains(named)), "{shown}: {body}");
        assert!(body["request_id"].as_str().is_some_and(|id| !id.is_empty()));
    }
    for (method, path, body, status, kind) in [
        ("POST", PATH, ask(json!({"model": "none"})).to_string(), 404, "not_found_error"),
        ("POST", PATH, "{".to_owned(), 400, "invalid_request_error"),
        ("POST", COUNT, ask(json!({"model": "none"})).to_string(), 404, "not_found_error"),
        ("POST", COUNT, "[]".to_owned(), 400, "invalid_request_error"),
        ("GET", PATH, String::new(), 405, "invalid_request_error"),
        ("POST", "/v1/messages/batches", String::new(), 404, "not_found_error"),
    ] {
        let response = harness.request(method, path, &[], body).await;
        let json = response.json();
        assert_eq!((response.status, &json["error"]["type"]), (status, &json!(kind)), "{method} {path}: {json}");
    }
    assert!(harness.groups[0].seen().is_empty(), "none of them reached the group");
    let empty = Harness::start(Vec::new()).await;
    let response = empty.post(PATH, ask(json!({}))).await;
    assert_eq!((response.status, &response.json()["error"]["type"]), (503, &json!("overloaded_error")));
    assert!(response.headers.contains_key("retry-after"));
}
