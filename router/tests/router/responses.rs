//! `/v1/responses`: what its requests become, the shapes of its responds and events, and what it refuses.

use crate::support::*;
use bora_proto::v1::FinishReason;
use serde_json::{Value, json};
use tonic::Status;

const PATH: &str = "/v1/responses";

fn ask(extra: Value) -> Value {
    let mut body = json!({"model": MODEL, "input": "Hi"});
    for (key, value) in extra.as_object().expect("an object") {
        body[key] = value.clone();
    }
    body
}

fn tool() -> Value {
    json!({"type": "function", "name": "read_file", "description": "d", "parameters": {"type": "object"}, "strict": false})
}

/// The prompt of a chat request.
async fn chat_prompt(harness: &Harness, messages: Value, tools: Value) -> Value {
    let body = json!({"model": MODEL, "messages": messages, "tools": tools});
    harness.post("/tokenize", body).await.json()["tokens"].clone()
}

#[tokio::test]
async fn a_plain_response_has_openais_shape() {
    let harness = Harness::saying("Hello, world!").await;
    let body = ask(json!({"instructions": "Be brief.", "metadata": {"a": "b"}, "user": "u", "max_output_tokens": 50,
                          "temperature": 0.5, "store": true, "tools": [tool()], "truncation": "auto"}));
    let completion = harness.request("POST", PATH, &[("x-request-id", "abc")], body.to_string()).await;
    assert_eq!(completion.status, 200, "{}", completion.text);
    let got = completion.json();
    assert_eq!(
        (&got["id"], &got["object"], &got["status"]),
        (&json!("resp_abc"), &json!("response"), &json!("completed"))
    );
    let text = json!({"type": "output_text", "text": "Hello, world!", "annotations": [], "logprobs": []});
    let item =
        json!({"type": "message", "id": "msg_abc_0", "status": "completed", "role": "assistant", "content": [text]});
    assert_eq!(got["output"], json!([item]));
    for (field, expected) in [
        ("instructions", json!("Be brief.")),
        ("metadata", json!({"a": "b"})),
        ("user", json!("u")),
        ("max_output_tokens", json!(50)),
        ("temperature", json!(0.5)),
        ("store", json!(false)),
        ("truncation", json!("disabled")),
        ("tools", json!([tool()])),
        ("tool_choice", json!("auto")),
        ("text", json!({"format": {"type": "text"}})),
        ("error", Value::Null),
        ("incomplete_details", Value::Null),
        ("previous_response_id", Value::Null),
    ] {
        assert_eq!(got[field], expected, "{field}");
    }
    let sent = &harness.groups[0].seen()[0];
    let generated = tokenizer().encode("Hello, world!").len() + 1;
    let usage = json!({
        "input_tokens": sent.token_ids.len(), "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": generated, "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": sent.token_ids.len() + generated
    });
    assert_eq!(got["usage"], usage);
    let messages = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]);
    let chat_tool = json!({"type": "function", "function":
        {"name": "read_file", "description": "d", "parameters": {"type": "object"}}});
    assert_eq!(json!(sent.token_ids), chat_prompt(&harness, messages, json!([chat_tool])).await);
    let stopping = sent.stopping.clone().expect("set");
    assert_eq!(stopping.max_tokens, 50);
}

#[tokio::test]
async fn items_are_the_messages_that_they_stand_for() {
    let harness = Harness::saying("x").await;
    let items = json!([
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Read "},
            {"type": "input_text", "text": "both"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
            "content": [{"type": "output_text", "text": "I will.", "annotations": []}]},
        {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "read_file",
            "arguments": "{\"path\": \"a\", \"n\": 1e2}", "status": "completed"},
        {"type": "reasoning", "summary": []},
        {"type": "function_call", "call_id": "call_2", "name": "read_file", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "two"}]},
        {"type": "function_call_output", "call_id": "call_1", "output": "one"},
        {"role": "user", "content": "Well?"}
    ]);
    let completion = harness.post(PATH, ask(json!({"input": items}))).await;
    assert_eq!(completion.status, 200, "{}", completion.text);
    let call = |id: &str, arguments: &str| json!({"id": id, "type": "function", "function": {"name": "read_file", "arguments": arguments}});
    let messages = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Read "}, {"type": "text", "text": "both"}]},
        {"role": "assistant", "content": "I will.",
            "tool_calls": [call("call_1", "{\"path\": \"a\", \"n\": 1e2}"), call("call_2", "{}")]},
        {"role": "tool", "tool_call_id": "call_1", "content": "one"},
        {"role": "tool", "tool_call_id": "call_2", "content": "two"},
        {"role": "user", "content": "Well?"}
    ]);
    let expected = chat_prompt(&harness, messages, Value::Null).await;
    assert_eq!(json!(harness.groups[0].seen()[0].token_ids), expected);
}

/// One pixel.
const IMAGE: &str = "data:image/png;base64,\
    iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";

#[tokio::test]
async fn images_of_tools_are_shown_by_the_user() {
    let harness = Harness::saying("x").await;
    let items = json!([
        {"role": "user", "content": [{"type": "input_image", "image_url": IMAGE}, {"type": "input_text", "text": "a"}]},
        {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output":
            [{"type": "input_text", "text": "seen"}, {"type": "input_image", "image_url": IMAGE}]}
    ]);
    let completion = harness.post(PATH, ask(json!({"input": items}))).await;
    assert_eq!(completion.status, 200, "{}", completion.text);
    let image = json!({"type": "image_url", "image_url": {"url": IMAGE}});
    let messages = json!([
        {"role": "user", "content": [image, {"type": "text", "text": "a"}]},
        {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "look", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "seen"},
        {"role": "user", "content": [image]}
    ]);
    let sent = &harness.groups[0].seen()[0];
    assert_eq!(json!(sent.token_ids), chat_prompt(&harness, messages, Value::Null).await);
    assert_eq!(sent.images.len(), 2);
}

#[tokio::test]
async fn events_come_in_order_and_numbered() {
    let arguments = "{\"path\": \"src/main.rs\"}";
    let ids =
        [tokenizer().encode("Let me look."), call_ids(&[("read_file", arguments), ("read_file", "{}")]), vec![EOS]];
    let ids = ids.concat();
    let harness = Harness::scripted(move |_| Ok(say_ids(&ids, FinishReason::Stop))).await;
    let body = ask(json!({"stream": true, "tools": [tool()]}));
    let completion = harness.request("POST", PATH, &[("x-request-id", "s")], body.to_string()).await;
    assert!(!completion.text.contains("[DONE]"));
    let events = completion.events();
    for (number, (name, event)) in events.iter().enumerate() {
        assert_eq!((&event["type"], &event["sequence_number"]), (&json!(name), &json!(number)));
    }
    let mut names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    names.dedup();
    assert_eq!(
        names,
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.output_item.added",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.output_item.done",
            "response.output_item.added",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.output_item.done",
            "response.completed",
        ]
    );
    let joined = |kind: &str, index: u64| -> String {
        let of_item = events.iter().filter(|(name, event)| name == kind && event["output_index"] == index);
        of_item.filter_map(|(_, event)| event["delta"].as_str()).collect()
    };
    assert_eq!(joined("response.output_text.delta", 0), "Let me look.");
    assert_eq!(joined("response.function_call_arguments.delta", 1), arguments);
    let (_, over) = events.last().expect("events");
    let response = &over["response"];
    assert_eq!((&response["status"], &response["id"]), (&json!("completed"), &json!("resp_s")));
    let done: Vec<&Value> = events
        .iter()
        .filter(|(name, _)| name == "response.output_item.done")
        .map(|(_, event)| &event["item"])
        .collect();
    assert_eq!(json!(done), response["output"]);
    assert_eq!(response["output"][1]["arguments"], arguments);
    assert_ne!(response["output"][1]["call_id"], response["output"][2]["call_id"]);
    assert!(events[0].1["response"]["usage"].is_null() && response["usage"]["output_tokens"].as_u64() > Some(5));

    // the same, whole
    let plain = harness.post(PATH, ask(json!({"tools": [tool()]}))).await.json();
    let shape = |output: &Value| -> Vec<Value> {
        output
            .as_array()
            .into_iter()
            .flatten()
            .map(|item| json!([item["type"], item["content"], item["arguments"]]))
            .collect()
    };
    assert_eq!(shape(&plain["output"]), shape(&response["output"]));
}

#[tokio::test]
async fn what_is_cut_off_is_incomplete_and_what_breaks_has_failed() {
    let harness = Harness::scripted(move |request| {
        let mut acts = say_ids(&tokenizer().encode("one two"), FinishReason::Length);
        if request.token_ids.contains(&tokenizer().encode("break")[0]) {
            acts.pop();
            acts.push(Act::Fail(Status::invalid_argument("not like this")));
        }
        Ok(acts)
    })
    .await;
    let plain = harness.post(PATH, ask(json!({}))).await.json();
    assert_eq!((&plain["status"], &plain["output"][0]["status"]), (&json!("incomplete"), &json!("incomplete")));
    assert_eq!(plain["incomplete_details"], json!({"reason": "max_output_tokens"}));
    let streamed = harness.post(PATH, ask(json!({"stream": true}))).await.events();
    let (name, event) = streamed.last().expect("events");
    assert_eq!((name.as_str(), &event["response"]["status"]), ("response.incomplete", &json!("incomplete")));
    let broken = harness.post(PATH, ask(json!({"stream": true, "input": "break"}))).await.events();
    let (name, event) = broken.last().expect("events");
    assert_eq!((name.as_str(), &event["response"]["status"]), ("response.failed", &json!("failed")));
    assert_eq!(event["response"]["error"]["message"], "The groups of this model cannot run the request.");
    assert_eq!(event["response"]["output"][0]["content"][0]["text"], "one two");
    let status = harness.post(PATH, ask(json!({"input": "break"}))).await.status;
    assert_eq!(status, 400);
}

#[tokio::test]
async fn forms_choices_and_logprobs_reach_the_group() {
    let harness = Harness::scripted(|_| {
        let ids = tokenizer().encode("Hi");
        Ok(vec![Act::Start { cached: 0 }, Act::IdsWithLogprobs(ids), Act::Finish(FinishReason::Length)])
    })
    .await;
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
    let format = json!({"type": "json_schema", "name": "n", "schema": schema, "strict": true});
    let completion = harness.post(PATH, ask(json!({"text": {"format": format}}))).await;
    assert_eq!(completion.json()["text"]["format"], format);
    let named = json!({"type": "function", "name": "read_file"});
    harness.post(PATH, ask(json!({"tools": [tool()], "tool_choice": named, "seed": 7, "top_k": 3}))).await;
    for mode in ["required", "auto"] {
        let some = json!({"type": "allowed_tools", "mode": mode, "tools": [named]});
        harness.post(PATH, ask(json!({"tools": [tool()], "tool_choice": some}))).await;
    }
    let seen = harness.groups[0].seen();
    assert!(seen[0].grammar.as_ref().is_some_and(|grammar| grammar.source.contains("integer")));
    for request in &seen[1..4] {
        assert!(request.grammar.as_ref().is_some_and(|grammar| grammar.source.contains("read_file")));
    }
    assert_eq!(seen[1].sampling.as_ref().map(|sampling| (sampling.seed, sampling.top_k)), Some((7, Some(3))));

    let wanted = ask(json!({"include": ["message.output_text.logprobs"], "top_logprobs": 2}));
    let logprobs = harness.post(PATH, wanted).await.json()["output"][0]["content"][0]["logprobs"].clone();
    assert_eq!(
        (&logprobs[0]["logprob"], logprobs[0]["top_logprobs"].as_array().map(Vec::len)),
        (&json!(-0.5), Some(2))
    );
}

#[tokio::test]
async fn what_it_refuses_is_named_as_the_client_knows_it() {
    let harness = Harness::strict("x").await;
    let item = |item: Value| json!({"input": [{"role": "user", "content": "a"}, item]});
    let part =
        |part: Value| json!({"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}, part]}]});
    let call = json!({"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"});
    for (extra, param) in [
        (json!({"input": null}), "input"),
        (json!({"input": 7}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": ["text"]}), "input[0]"),
        (json!({"input": [{"content": "a"}]}), "input[0].type"),
        (json!({"input": [{"role": "wizard", "content": "a"}]}), "input[0].role"),
        (json!({"input": [{"role": "user"}]}), "input[0].content"),
        (json!({"input": [{"role": "user", "content": 7}]}), "input[0].content"),
        (json!({"input": [{"type": "message", "content": "a"}]}), "input[0].role"),
        (item(json!({"role": "assistant", "content": "b"})), "input[1].role"),
        (item(json!({"type": "item_reference", "id": "msg_1"})), "input[1].type"),
        (item(json!({"type": "smell", "id": "x"})), "input[1].type"),
        (item(json!({"type": "function_call", "name": "f", "arguments": "{}"})), "input[1].call_id"),
        (item(json!({"type": "function_call", "call_id": "c", "arguments": "{}"})), "input[1].name"),
        (item(json!({"type": "function_call", "call_id": "c", "name": "f"})), "input[1].arguments"),
        (item(json!({"type": "function_call", "call_id": "c", "name": "a b", "arguments": "{}"})), "input[1].name"),
        (item(json!({"type": "function_call_output", "output": "x"})), "input[1].call_id"),
        (item(json!({"type": "function_call_output", "call_id": "c"})), "input[1].output"),
        (item(json!({"type": "function_call_output", "call_id": "c", "output": 7})), "input[1].output"),
        (item(json!({"type": "function_call_output", "call_id": "c", "output": "x"})), "input[1].role"),
        (json!({"input": [{"role": "user", "content": "a"}, call, {"role": "user", "content": "b"}]}), "input[1]"),
        (part(json!({"type": "input_file", "file_id": "f"})), "input[0].content[1].type"),
        (part(json!({"type": "input_image", "file_id": "f"})), "input[0].content[1].image_url"),
        (part(json!({"type": "input_image", "image_url": "gopher://x"})), "input[0].content[1].image_url"),
        (part(json!({"type": "input_text"})), "input[0].content[1].text"),
        (part(json!({"text": "x"})), "input[0].content[1].type"),
        (json!({"instructions": ["a"]}), "instructions"),
        (json!({"previous_response_id": "resp_1"}), "previous_response_id"),
        (json!({"conversation": "conv_1"}), "conversation"),
        (json!({"background": true}), "background"),
        (json!({"prompt": {"id": "p"}}), "prompt"),
        (json!({"messages": []}), "messages"),
        (json!({"n": 2}), "n"),
        (json!({"max_output_tokens": 0}), "max_output_tokens"),
        (json!({"max_output_tokens": "many"}), "max_output_tokens"),
        (json!({"temperature": 3}), "temperature"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"metadata": "x"}), "metadata"),
        (json!({"tools": {}}), "tools"),
        (json!({"tools": [{"name": "f"}]}), "tools[0].type"),
        (json!({"tools": [{"type": "web_search"}, {"type": "function", "name": "a b"}]}), "tools[1].name"),
        (json!({"tools": [{"type": "function", "name": "a b"}]}), "tools[0].name"),
        (json!({"tools": [{"type": "function"}]}), "tools[0].name"),
        (json!({"tools": [{"type": "function", "name": "f", "parameters": {"type": 7}}]}), "tools[0].parameters"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"tool_choice": {"type": "web_search"}, "tools": [tool()]}), "tool_choice"),
        (json!({"text": {"format": {"type": "xml"}}}), "text.format"),
        (json!({"text": {"format": {"type": "json_schema", "name": "n"}}}), "text.format"),
        (json!({"text": 7}), "text"),
        (json!({"include": "x"}), "include"),
        (json!({"input": "word ".repeat(5_000)}), "input"),
    ] {
        let completion = harness.post(PATH, ask(extra.clone())).await;
        let error = completion.json()["error"].clone();
        let shown: String = extra.to_string().chars().take(200).collect();
        assert_eq!((completion.status, &error["param"]), (400, &json!(param)), "{shown}: {error}");
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()));
    }
    assert!(harness.groups[0].seen().is_empty(), "none of them reached the group");
    let ignored = ask(json!({"reasoning": {"effort": null, "summary": "auto"}, "service_tier": "auto", "store": null,
        "stream_options": {"include_obfuscation": false}, "prompt_cache_key": "k", "flux": 1}));
    let completion = harness.post(PATH, ignored).await;
    assert_eq!((completion.status, &completion.json()["prompt_cache_key"]), (200, &json!("k")));
    assert!(harness.get("/metrics").await.text.contains("bora_router_unknown_fields_total 1"));
}
