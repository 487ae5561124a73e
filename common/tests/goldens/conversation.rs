//! Conversations to token IDs: every golden of the reference, and every request that it refuses.

use crate::support::{FixtureImages, fixture, goldens, ids, lines, tokenizer};
use bora_common::conversation::{Conversation, ConversationOptions, Json};
use serde_json::{Value, json};

/// A golden's request with `messages_spec` written out.
fn expand(request: &Value) -> Value {
    let mut request = request.clone();
    let Some(spec) = request.as_object_mut().expect("request").remove("messages_spec") else {
        return request;
    };
    let mut messages = Vec::new();
    for item in spec.as_array().expect("spec") {
        match item.get("repeat") {
            None => messages.push(item.clone()),
            Some(count) => {
                for _ in 0..count.as_u64().expect("count") {
                    messages.extend(item["messages"].as_array().expect("messages").iter().cloned());
                }
            }
        }
    }
    request["messages"] = Value::Array(messages);
    request
}

fn little_endian(ids: &[u32]) -> Vec<u8> {
    ids.iter().flat_map(|id| id.to_le_bytes()).collect()
}

/// SHA-256 by the system's tool: the goldens name it, nothing else here needs it.
fn sha256(bytes: &[u8]) -> String {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let mut child = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("sha256sum");
    child.stdin.take().expect("stdin").write_all(bytes).expect("write");
    let output = child.wait_with_output().expect("sha256sum");
    String::from_utf8(output.stdout).expect("text").split_whitespace().next().expect("hash").to_owned()
}

#[test]
fn every_encoding_golden_is_met() {
    let mut checked = 0;
    for golden in goldens("golden_encodings.jsonl") {
        let name = format!("{} with {}", golden["name"], golden["tokenizer"]);
        let tokenizer = tokenizer(golden["tokenizer"].as_str().expect("tokenizer"));
        let request = expand(&golden["request"]);
        let conversation =
            Conversation::parse_request(&Json::from(&request)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let encoded = conversation.encode(&tokenizer, &FixtureImages).unwrap_or_else(|error| panic!("{name}: {error}"));

        if golden.get("token_ids").is_some() {
            assert_eq!(encoded.token_ids, ids(&golden["token_ids"]), "{name}");
        } else {
            assert!(encoded.token_ids.starts_with(&ids(&golden["first_ids"])), "{name}");
            assert!(encoded.token_ids.ends_with(&ids(&golden["last_ids"])), "{name}");
        }
        assert_eq!(encoded.token_ids.len() as u64, golden["count"].as_u64().expect("count"), "{name}");
        if let Some(hash) = golden["sha256_u32le"].as_str() {
            assert_eq!(sha256(&little_endian(&encoded.token_ids)), hash, "{name}");
        }
        if let Some(shapes) = golden["images_chw"].as_array() {
            let sizes: Vec<Value> =
                encoded.images.iter().map(|image| json!([3, image.rows * 28, image.columns * 28])).collect();
            assert_eq!(&sizes, shapes, "{name}");
        }
        if let Some(text) = golden["text"].as_str() {
            assert_eq!(tokenizer.decode(&encoded.token_ids, false), text, "{name}");
        }
        for image in &encoded.images {
            let placeholders = &encoded.token_ids[image.offset..image.offset + image.length];
            assert!(placeholders.iter().all(|id| [10, 12, 13].contains(id)), "{name}");
            let features = placeholders.iter().filter(|id| **id == 10).count();
            assert_eq!(features, (image.rows * image.columns) as usize, "{name}");
        }
        assert_eq!(encoded.message_ends.last(), Some(&encoded.token_ids.len()), "{name}");
        assert!(encoded.message_ends.is_sorted(), "{name}");
        checked += 1;
    }
    assert!(checked >= 88, "only {checked} goldens");
}

/// The same through the parser that keeps numbers exactly, from the text of the file.
#[test]
fn exact_json_gives_the_same_ids() {
    for line in lines("golden_encodings.jsonl") {
        let golden = Json::parse(&line).expect("golden line");
        let (Some(request), Some(expected)) = (golden.get("request"), golden.get("token_ids")) else {
            continue;
        };
        let tokenizer = tokenizer(golden.get("tokenizer").and_then(Json::as_str).expect("tokenizer"));
        let conversation = Conversation::parse_request(request).expect("valid");
        let encoded = conversation.encode(&tokenizer, &FixtureImages).expect("encodes");
        assert_eq!(encoded.token_ids, ids(&expected.to_value()));
    }
}

#[test]
fn every_rejection_golden_is_met() {
    let tokenizer = tokenizer("tekken-v13-8k.json");
    let mut refused = 0;
    for golden in goldens("golden_rejections.jsonl") {
        let name = &golden["name"];
        let outcome = Conversation::parse_request(&Json::from(&golden["request"]))
            .and_then(|conversation| conversation.encode(&tokenizer, &FixtureImages));
        assert_eq!(outcome.is_ok(), golden["accepted"].as_bool().expect("accepted"), "{name}: {outcome:?}");
        if let Err(error) = outcome {
            assert!(!error.param.is_empty() && !error.message.is_empty(), "{name}: {error:?}");
            refused += 1;
        }
    }
    assert!(refused >= 25, "only {refused} rejections");
}

#[test]
fn the_model_cards_requests_are_accepted() {
    let tokenizer = tokenizer("tekken-v13.json");
    let mut checked = 0;
    for entry in std::fs::read_dir(fixture("model_card")).expect("model_card") {
        let path = entry.expect("entry").path();
        if path.extension().is_none_or(|extension| extension != "json") || path.ends_with("tools.json") {
            continue;
        }
        let card: Value = serde_json::from_slice(&std::fs::read(&path).expect("card")).expect("card");
        let request = expand(&card["request"]);
        let conversation =
            Conversation::parse(&request["messages"], request.get("tools"), ConversationOptions::default())
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        conversation.encode(&tokenizer, &FixtureImages).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        checked += 1;
    }
    assert_eq!(checked, 6);
}

/// Where each kind of mistake is said to be.
#[test]
fn errors_name_the_field() {
    let user = json!({"role": "user", "content": "q"});
    let call = |id: &str, arguments: Value| json!({"id": id, "type": "function", "function": {"name": "f", "arguments": arguments}});
    let cases = [
        (json!([]), "messages", "empty_array"),
        (json!({"a": 1}), "messages", "invalid_type"),
        (json!([user, 3]), "messages[1]", "invalid_type"),
        (json!([{"content": "x"}]), "messages[0].role", "missing_required_parameter"),
        (json!([{"role": "robot", "content": "x"}]), "messages[0].role", "invalid_value"),
        (json!([user, {"role": "user"}]), "messages[1].content", "invalid_type"),
        (json!([{"role": "user", "content": ["x"]}]), "messages[0].content[0]", "invalid_type"),
        (
            json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "video"}]}]),
            "messages[0].content[1].type",
            "invalid_value",
        ),
        (
            json!([{"role": "user", "content": [{"type": "text"}]}]),
            "messages[0].content[0].text",
            "missing_required_parameter",
        ),
        (
            json!([{"role": "user", "content": [{"type": "input_audio"}]}]),
            "messages[0].content[0].type",
            "unsupported_content_type",
        ),
        (
            json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 1}}]}]),
            "messages[0].content[0].image_url.url",
            "invalid_type",
        ),
        (
            json!([user, {"role": "assistant", "tool_calls": [call("a", json!(7))]}]),
            "messages[1].tool_calls[0].function.arguments",
            "invalid_type",
        ),
        (
            json!([user, {"role": "assistant", "tool_calls": [call("", json!("{}"))]}]),
            "messages[1].tool_calls[0].id",
            "invalid_tool_call_id",
        ),
        (
            json!([user, {"role": "assistant", "tool_calls": [call("a", json!("{}"))]}, user]),
            "messages[1].tool_calls",
            "invalid_tool_messages",
        ),
        (
            json!([user, {"role": "assistant", "content": "a", "prefix": true}, user]),
            "messages[1].prefix",
            "invalid_prefix",
        ),
        (json!([user, {"role": "assistant", "content": ""}, user]), "messages[1].content", "empty_assistant_message"),
        (
            json!([user, {"role": "tool", "content": "r", "tool_call_id": "x"}]),
            "messages[1].role",
            "invalid_message_order",
        ),
    ];
    for (messages, param, code) in cases {
        let error =
            Conversation::parse(&messages, None, ConversationOptions::default()).expect_err(&messages.to_string());
        assert_eq!((error.param.as_str(), error.code()), (param, code), "{messages}: {error}");
    }
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "objekt"}}}]);
    let error = Conversation::parse(&json!([user]), Some(&tools), ConversationOptions::default()).expect_err("schema");
    assert_eq!((error.param.as_str(), error.code()), ("tools[0].function.parameters", "invalid_function_parameters"));
}

/// Compares requests with the outcome of the reference: their token IDs or its refusal. Returns how many were encoded, how
/// many both refused, and how many the reference refused for a pattern alone.
fn compare_with_reference(file: &str) -> (usize, usize, usize) {
    let tokenizer = tokenizer("tekken-v13-8k.json");
    let (mut encoded, mut refused, mut patterns) = (0, 0, 0);
    for golden in goldens(file) {
        let request = golden["request"].as_str().expect("request");
        let outcome = Conversation::parse_request(&Json::parse(request).expect("json"))
            .and_then(|conversation| conversation.encode(&tokenizer, &FixtureImages));
        match golden.get("token_ids") {
            Some(expected) => {
                let outcome = outcome.unwrap_or_else(|error| panic!("{request}: {error}"));
                assert_eq!(outcome.token_ids, ids(expected), "{request}");
                encoded += 1;
            }
            // A pattern that Python can't compile is no reason to refuse a tool that the model is not forced to call.
            None if golden["pattern"] == true => {
                assert!(outcome.is_ok(), "{request}: {}", golden["refused"]);
                patterns += 1;
            }
            None => {
                assert!(outcome.is_err(), "{request} must be refused: {}", golden["refused"]);
                refused += 1;
            }
        }
    }
    (encoded, refused, patterns)
}

#[test]
fn encodes_or_refuses_odd_tool_schemas_as_the_reference_does() {
    let (encoded, refused, patterns) = compare_with_reference("odd_schemas.jsonl");
    assert!(encoded >= 150 && refused >= 50 && patterns >= 5, "{encoded}, {refused}, {patterns}");
}

#[test]
fn encodes_or_refuses_random_requests_as_the_reference_does() {
    let (encoded, refused, _) = compare_with_reference("random_conversations.jsonl");
    assert!(encoded >= 300 && refused >= 100, "{encoded} encoded, {refused} refused");
}
