//! The shapes of responses, plain and streamed, over scripted groups.

use crate::support::*;
use bora_proto::v1::FinishReason;
use bora_router::ModelSpec;
use serde_json::{Value, json};

fn chat(extra: Value) -> Value {
    let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]});
    merge(&mut body, extra);
    body
}

fn completion(extra: Value) -> Value {
    let mut body = json!({"model": MODEL, "prompt": [1, 1500, 1600]});
    merge(&mut body, extra);
    body
}

fn merge(body: &mut Value, extra: Value) {
    let Value::Object(extra) = extra else { panic!("an object") };
    for (key, value) in extra {
        body[key] = value;
    }
}

fn tools() -> Value {
    json!([{"type": "function", "function": {"name": "read_file", "description": "d", "parameters": {"type": "object"}}}])
}

#[tokio::test]
async fn a_plain_chat_answer_has_openais_shape() {
    let harness = Harness::saying("Hello, world!").await;
    let response = harness
        .request("POST", "/v1/chat/completions", &[("x-request-id", "abc-1")], chat(json!({})).to_string())
        .await;
    assert_eq!(response.status, 200, "{}", response.text);
    assert_eq!(response.headers["x-request-id"], "abc-1");
    assert_eq!(response.headers["x-bora-group"], "only");
    assert_eq!(response.headers["content-type"], "application/json");
    let body = response.json();
    assert_eq!(body["id"], "chatcmpl-abc-1");
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], MODEL);
    let choice = &body["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": "Hello, world!"}));
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!((choice["index"].as_u64(), &choice["logprobs"]), (Some(0), &Value::Null));
    let sent = &harness.groups[0].seen()[0];
    let generated = tokenizer().encode("Hello, world!").len() + 1;
    assert_eq!(
        body["usage"],
        json!({
            "prompt_tokens": sent.token_ids.len(),
            "completion_tokens": generated,
            "total_tokens": sent.token_ids.len() + generated,
            "prompt_tokens_details": {"cached_tokens": 0}
        })
    );
    assert_eq!(sent.token_ids, [&[1, 3][..], &tokenizer().encode("Hi"), &[4]].concat());
    let stopping = sent.stopping.clone().expect("set");
    assert_eq!(stopping.max_tokens, WINDOW - sent.token_ids.len() as u32, "the room left");
    assert_eq!(sent.sampling.as_ref().and_then(|sampling| sampling.temperature), Some(1.0));
}

#[tokio::test]
async fn a_streamed_chat_answer_begins_with_the_role_and_ends_with_done() {
    let harness = Harness::saying("Hello, world!").await;
    let body = chat(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let response = harness.post("/v1/chat/completions", body).await;
    assert_eq!(response.headers["content-type"], "text/event-stream; charset=utf-8");
    assert!(response.is_done(), "{}", response.text);
    let chunks = response.chunks();
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert!(chunks.iter().all(|chunk| chunk["object"] == "chat.completion.chunk" && chunk["id"] == chunks[0]["id"]));
    assert_eq!(response.content(0), "Hello, world!");
    let finish = &chunks[chunks.len() - 2];
    assert_eq!(finish["choices"][0]["finish_reason"], "stop");
    let usage = &chunks[chunks.len() - 1];
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], tokenizer().encode("Hello, world!").len() + 1);
    assert!(chunks[..chunks.len() - 1].iter().all(|chunk| chunk.get("usage").is_none()));
    let without = harness.post("/v1/chat/completions", chat(json!({"stream": true}))).await;
    assert!(without.chunks().iter().all(|chunk| chunk.get("usage").is_none()));
}

#[tokio::test]
async fn mistrals_client_gets_usage_with_the_last_chunk_and_calls_whole() {
    let ids = call_ids(&[("read_file", "{\"path\": \"a.txt\"}"), ("read_file", "{}")]);
    let harness = Harness::scripted(move |_| Ok(say_ids(&[ids.clone(), vec![EOS]].concat(), FinishReason::Stop))).await;
    let body = chat(json!({"stream": true, "tools": tools(), "tool_choice": "auto"}));
    let agent = [("user-agent", "mistral-client-python/1.9.1")];
    let response = harness.request("POST", "/v1/chat/completions", &agent, body.to_string()).await;
    let chunks = response.chunks();
    let deltas: Vec<&Value> =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"].get("tool_calls")).collect();
    assert_eq!(deltas.len(), 2, "{}", response.text);
    assert_eq!(deltas[0][0]["function"], json!({"name": "read_file", "arguments": "{\"path\": \"a.txt\"}"}));
    assert_eq!((&deltas[1][0]["index"], &deltas[1][0]["function"]["arguments"]), (&json!(1), &json!("{}")));
    let last = chunks.last().expect("chunks");
    assert_eq!(last["choices"][0]["finish_reason"], "tool_calls");
    assert!(last["usage"]["prompt_tokens"].as_u64() > Some(0));
}

#[tokio::test]
async fn tool_calls_are_streamed_in_pieces_and_answered_whole() {
    let arguments = "{\"path\": \"src/main.rs\", \"lines\": [1, 2]}";
    let content = tokenizer().encode("Let me look.");
    let ids = [content, call_ids(&[("read_file", arguments)]), vec![EOS]].concat();
    let harness = Harness::scripted(move |_| Ok(say_ids(&ids, FinishReason::Stop))).await;
    let plain = harness.post("/v1/chat/completions", chat(json!({"tools": tools()}))).await.json();
    let message = &plain["choices"][0]["message"];
    assert_eq!(message["content"], "Let me look.");
    let call = &message["tool_calls"][0];
    assert_eq!(
        (&call["type"], &call["function"]),
        (&json!("function"), &json!({"name": "read_file", "arguments": arguments}))
    );
    assert_eq!(call["id"].as_str().map(str::len), Some(9));
    assert_eq!(plain["choices"][0]["finish_reason"], "tool_calls");

    let response = harness.post("/v1/chat/completions", chat(json!({"tools": tools(), "stream": true}))).await;
    let mut name = String::new();
    let mut joined = String::new();
    let mut parts = 0;
    for chunk in response.chunks() {
        for call in chunk["choices"][0]["delta"]["tool_calls"].as_array().into_iter().flatten() {
            parts += 1;
            assert_eq!((&call["index"], &call["type"]), (&json!(0), &json!("function")));
            name.push_str(call["function"]["name"].as_str().unwrap_or_default());
            joined.push_str(call["function"]["arguments"].as_str().unwrap_or_default());
        }
    }
    assert!(parts > 3, "arguments come in pieces");
    assert_eq!(
        (name.as_str(), joined.as_str(), response.content(0).as_str()),
        ("read_file", arguments, "Let me look.")
    );

    // declared all the same, as the reference does, but calls mean nothing
    let none =
        harness.post("/v1/chat/completions", chat(json!({"tools": tools(), "tool_choice": "none"}))).await.json();
    assert!(none["choices"][0]["message"].get("tool_calls").is_none());
    let offered: Vec<usize> = harness.groups[0].seen().iter().map(|request| request.token_ids.len()).collect();
    assert_eq!(offered[0], offered[2], "`tool_choice` does not change the prompt");
}

#[tokio::test]
async fn parallel_tool_calls_false_keeps_the_first_call() {
    let ids = [call_ids(&[("read_file", "{}"), ("read_file", "{\"a\": 1}")]), vec![EOS]].concat();
    let harness = Harness::scripted(move |_| Ok(say_ids(&ids, FinishReason::Stop))).await;
    let body = chat(json!({"tools": tools(), "parallel_tool_calls": false}));
    let calls = harness.post("/v1/chat/completions", body).await.json()["choices"][0]["message"]["tool_calls"].clone();
    assert_eq!(calls.as_array().map(Vec::len), Some(1));
    assert_eq!(calls[0]["function"]["arguments"], "{}");
}

#[tokio::test]
async fn completions_take_texts_and_ids_one_or_many() {
    let harness = Harness::saying("x y").await;
    let count = |body: &Value| body["choices"].as_array().map(Vec::len);
    let one = harness.post("/v1/completions", completion(json!({}))).await.json();
    assert_eq!(one["object"], "text_completion");
    assert_eq!((count(&one), &one["choices"][0]["text"]), (Some(1), &json!("x y")));
    assert!(one["id"].as_str().is_some_and(|id| id.starts_with("cmpl-")));
    let stopping = harness.groups[0].seen()[0].stopping.clone().expect("set");
    assert_eq!(stopping.max_tokens, 16, "OpenAI's default");

    let text = harness.post("/v1/completions", completion(json!({"prompt": "Hi"}))).await;
    assert_eq!(text.status, 200);
    let sent = harness.groups[0].seen()[1].token_ids.clone();
    assert_eq!(sent, [&[1][..], &tokenizer().encode("Hi")].concat());

    let many = harness.post("/v1/completions", completion(json!({"prompt": ["a", "b", "c"], "n": 2}))).await.json();
    assert_eq!(count(&many), Some(6));
    let indices: Vec<u64> =
        many["choices"].as_array().into_iter().flatten().filter_map(|choice| choice["index"].as_u64()).collect();
    assert_eq!(indices, [0, 1, 2, 3, 4, 5]);
    let lists = harness
        .post("/v1/completions", completion(json!({"prompt": [[1, 5000], [7]], "add_special_tokens": true})))
        .await
        .json();
    assert_eq!(count(&lists), Some(2));
    assert_eq!(lists["usage"]["prompt_tokens"], 3);
}

#[tokio::test]
async fn n_choices_are_n_sequences_with_seeds_of_their_own() {
    let harness = Harness::scripted(|request| {
        let text = if request.sampling.as_ref().is_some_and(|sampling| sampling.seed == 7) { "first" } else { "other" };
        Ok(say(text))
    })
    .await;
    let response = harness.post("/v1/chat/completions", chat(json!({"n": 3, "seed": 7, "stream": true}))).await;
    assert!(response.is_done());
    assert_eq!([response.content(0), response.content(1), response.content(2)], ["first", "other", "other"]);
    let mut seeds: Vec<u64> =
        harness.groups[0].seen().iter().filter_map(|seen| Some(seen.sampling.as_ref()?.seed)).collect();
    seeds.sort_unstable();
    seeds.dedup();
    assert_eq!(seeds.len(), 3);
    let roles = response.chunks().iter().filter(|chunk| chunk["choices"][0]["delta"]["role"] == "assistant").count();
    assert_eq!(roles, 3);
}

#[tokio::test]
async fn stop_strings_work_across_tokens_and_end_the_upstream_stream() {
    let harness = Harness::scripted(|_| {
        let mut acts = vec![Act::Start { cached: 0 }];
        acts.extend(tokenizer().encode("one two STOP three").into_iter().map(|id| Act::Ids(vec![id])));
        acts.push(Act::Hang);
        Ok(acts)
    })
    .await;
    for (extra, expected) in [
        (json!({"stop": "two STOP"}), "one "),
        (json!({"stop": ["never", "STOP t"], "include_stop_str_in_output": true}), "one two STOP t"),
    ] {
        for stream in [false, true] {
            let mut body = chat(extra.clone());
            body["stream"] = json!(stream);
            let response = harness.post("/v1/chat/completions", body).await;
            let (content, finish, reason) = if stream {
                let last = response.chunks().last().cloned().expect("chunks");
                let choice = last["choices"][0].clone();
                (response.content(0), choice["finish_reason"].clone(), choice["stop_reason"].clone())
            } else {
                let choice = response.json()["choices"][0].clone();
                let content = choice["message"]["content"].as_str().unwrap_or_default().to_string();
                (content, choice["finish_reason"].clone(), choice["stop_reason"].clone())
            };
            assert_eq!((content.as_str(), finish), (expected, json!("stop")), "{extra} {stream}");
            assert!(reason.as_str().is_some_and(|reason| reason.contains("STOP")), "{reason}");
        }
    }
    harness.until("every upstream stream was cancelled", |harness| harness.groups[0].cancelled() == 4).await;
}

#[tokio::test]
async fn stop_token_ids_end_with_their_reason_and_without_their_text() {
    let stop = tokenizer().encode("!")[0];
    let ids = [tokenizer().encode("Hi"), vec![stop]].concat();
    let harness = Harness::scripted(move |_| Ok(say_ids(&ids, FinishReason::Stop))).await;
    let body = harness.post("/v1/completions", completion(json!({"stop_token_ids": [stop]}))).await.json();
    assert_eq!((&body["choices"][0]["text"], &body["choices"][0]["stop_reason"]), (&json!("Hi"), &json!(stop)));
    let kept = completion(json!({"stop_token_ids": [stop], "include_stop_str_in_output": true}));
    assert_eq!(harness.post("/v1/completions", kept).await.json()["choices"][0]["text"], "Hi!");
    let sent = harness.groups[0].seen()[0].stopping.clone().expect("set");
    assert!(sent.stop_token_ids.contains(&stop));
}

#[tokio::test]
async fn characters_are_never_split() {
    // an emoji is several byte tokens in the small vocabulary
    let text = "a 🦀 é b";
    assert!(tokenizer().encode("🦀").len() > 1);
    let harness = Harness::saying(text).await;
    let response = harness.post("/v1/chat/completions", chat(json!({"stream": true}))).await;
    assert_eq!(response.content(0), text);
    assert!(response.chunks().iter().all(|chunk| !chunk.to_string().contains('\u{fffd}')));
}

#[tokio::test]
async fn the_end_of_a_bound_is_length_and_special_ids_show_on_request() {
    let ids = [tokenizer().encode("ab"), vec![9]].concat();
    let harness = Harness::scripted(move |_| Ok(say_ids(&ids, FinishReason::Length))).await;
    let body = harness.post("/v1/completions", completion(json!({"max_tokens": 3}))).await.json();
    assert_eq!((&body["choices"][0]["finish_reason"], &body["choices"][0]["text"]), (&json!("length"), &json!("ab")));
    let shown = completion(json!({"max_tokens": 3, "skip_special_tokens": false}));
    assert_eq!(harness.post("/v1/completions", shown).await.json()["choices"][0]["text"], "ab[TOOL_CALLS]");
}

#[tokio::test]
async fn logprobs_have_the_forms_of_chat_and_completions() {
    let hi = tokenizer().encode("Hi");
    let ids = hi.clone();
    let harness = Harness::scripted(move |request| {
        let mut acts = vec![Act::Start { cached: 0 }];
        if request.logprobs.is_some_and(|logprobs| logprobs.prompt_top.is_some()) {
            acts.push(Act::PromptLogprobs);
        }
        acts.push(Act::IdsWithLogprobs(ids.clone()));
        acts.push(Act::Finish(FinishReason::Length));
        Ok(acts)
    })
    .await;
    let name = |id: u32| String::from_utf8_lossy(tokenizer().token_bytes(id).unwrap_or_default()).into_owned();
    let chat_body = chat(json!({"logprobs": true, "top_logprobs": 2, "max_tokens": 2}));
    let content =
        harness.post("/v1/chat/completions", chat_body.clone()).await.json()["choices"][0]["logprobs"]["content"]
            .clone();
    assert_eq!(content.as_array().map(Vec::len), Some(hi.len()));
    assert_eq!(content[0]["token"], name(hi[0]));
    assert_eq!(content[0]["logprob"], -0.5);
    assert_eq!(content[0]["bytes"], json!(tokenizer().token_bytes(hi[0])));
    assert_eq!(content[0]["top_logprobs"][1]["token"], name(1500));

    let mut streamed = chat_body;
    streamed["stream"] = json!(true);
    let response = harness.post("/v1/chat/completions", streamed).await;
    let parts: usize = response
        .chunks()
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array().map(Vec::len))
        .sum();
    assert_eq!(parts, hi.len());

    let body = completion(json!({"logprobs": 1, "max_tokens": 2, "echo": true}));
    let choice = harness.post("/v1/completions", body).await.json()["choices"][0].clone();
    let prompt_text = tokenizer().decode(&[1, 1500, 1600], true);
    assert_eq!(choice["text"], format!("{prompt_text}Hi"));
    let logprobs = &choice["logprobs"];
    assert_eq!(logprobs["token_logprobs"][0], Value::Null);
    assert_eq!(logprobs["token_logprobs"][1], -0.5);
    assert_eq!(logprobs["tokens"].as_array().map(Vec::len), Some(3 + hi.len()));
    assert_eq!(logprobs["text_offset"][0], 0);
    assert_eq!(logprobs["text_offset"][1], 0, "the text has no special tokens");
    assert_eq!(logprobs["top_logprobs"][1][name(1500)], -0.5);
}

/// Every offset points into the text: a character of several tokens counts once.
#[tokio::test]
async fn offsets_of_split_characters_point_into_the_text() {
    let text = "é 🦀🦀 y";
    let harness = Harness::scripted(move |request| {
        let mut acts = vec![Act::Start { cached: 0 }];
        if request.logprobs.is_some_and(|logprobs| logprobs.prompt_top.is_some()) {
            acts.push(Act::PromptLogprobs);
        }
        acts.extend(tokenizer().encode(text).into_iter().map(|id| Act::IdsWithLogprobs(vec![id])));
        acts.push(Act::IdsWithLogprobs(vec![EOS]));
        acts.push(Act::Finish(FinishReason::Stop));
        Ok(acts)
    })
    .await;
    let expected = |before: usize| -> Vec<usize> {
        let ids = [tokenizer().encode(text), vec![EOS]].concat();
        // as many characters as the tokens before make
        (0..ids.len())
            .map(|end| {
                let mut bytes: Vec<u8> = Vec::new();
                ids[..end].iter().for_each(|id| bytes.extend(tokenizer().token_bytes(*id).unwrap_or_default()));
                before
                    + std::str::from_utf8(&bytes)
                        .map_or_else(|e| text[..e.valid_up_to()].chars().count(), |t| t.chars().count())
            })
            .collect()
    };
    let offsets = |choice: &Value| -> Vec<usize> {
        serde_json::from_value(choice["logprobs"]["text_offset"].clone()).expect("numbers")
    };
    let plain = harness.post("/v1/completions", completion(json!({"logprobs": 1}))).await.json()["choices"][0].clone();
    assert_eq!((offsets(&plain), &plain["text"]), (expected(0), &json!(text)));
    let streamed = harness.post("/v1/completions", completion(json!({"logprobs": 1, "stream": true}))).await;
    let streamed: Vec<usize> = streamed
        .chunks()
        .iter()
        .filter(|chunk| !chunk["choices"][0]["logprobs"].is_null())
        .flat_map(|chunk| offsets(&chunk["choices"][0]))
        .collect();
    assert_eq!(streamed, expected(0));
    let echoed = completion(json!({"logprobs": 1, "echo": true}));
    let echoed = harness.post("/v1/completions", echoed).await.json()["choices"][0].clone();
    let prompt = tokenizer().decode(&[1, 1500, 1600], true).chars().count();
    assert_eq!(offsets(&echoed)[3..], expected(prompt));
    let stopped = completion(json!({"logprobs": 1, "stop": "🦀 y"}));
    let stopped = harness.post("/v1/completions", stopped).await.json()["choices"][0].clone();
    assert_eq!(offsets(&stopped).into_iter().max(), Some("é 🦀".chars().count()));
}

#[tokio::test]
async fn prompt_logprobs_have_vllms_form() {
    let harness = Harness::scripted(|_| {
        Ok(vec![Act::Start { cached: 0 }, Act::PromptLogprobs, Act::Ids(vec![1700]), Act::Finish(FinishReason::Length)])
    })
    .await;
    let body = completion(json!({"prompt": [1, 1700, 1600], "prompt_logprobs": 2, "max_tokens": 1}));
    let list = harness.post("/v1/completions", body).await.json()["choices"][0]["prompt_logprobs"].clone();
    assert_eq!(list.as_array().map(Vec::len), Some(3));
    assert_eq!(list[0], Value::Null);
    let text = |id: u32| String::from_utf8_lossy(tokenizer().token_bytes(id).unwrap_or_default()).into_owned();
    assert_eq!(list[1]["1700"], json!({"logprob": -0.5, "rank": 1, "decoded_token": text(1700)}));
    assert_eq!(list[1]["1500"]["rank"], 2);
    let sent = harness.groups[0].seen()[0].logprobs.expect("set");
    assert_eq!((sent.top, sent.prompt_top), (None, Some(2)));
    let chat_answer =
        harness.post("/v1/chat/completions", chat(json!({"prompt_logprobs": 0, "max_tokens": 1}))).await.json();
    assert_eq!(chat_answer["prompt_logprobs"][0], Value::Null);
    assert_eq!(chat_answer["prompt_logprobs"][1].as_object().map(|position| position.len()), Some(1));
}

#[tokio::test]
async fn echo_with_no_tokens_gives_the_prompt_only() {
    let harness = Harness::saying("never shown").await;
    let body = harness
        .post("/v1/completions", completion(json!({"prompt": "Hi", "echo": true, "max_tokens": 0})))
        .await
        .json();
    assert_eq!((&body["choices"][0]["text"], &body["usage"]["completion_tokens"]), (&json!("Hi"), &json!(0)));
}

#[tokio::test]
async fn token_ids_come_back_on_request() {
    let harness = Harness::saying("Hi").await;
    let body = harness.post("/v1/completions", completion(json!({"return_token_ids": true}))).await.json();
    let choice = &body["choices"][0];
    assert_eq!(choice["prompt_token_ids"], json!([1, 1500, 1600]));
    assert_eq!(choice["token_ids"], json!([tokenizer().encode("Hi"), vec![EOS]].concat()));
    let response = harness.post("/v1/chat/completions", chat(json!({"return_token_ids": true, "stream": true}))).await;
    let chunks = response.chunks();
    assert!(chunks[0]["prompt_token_ids"].as_array().is_some_and(|ids| ids.len() > 2));
    let ids: Vec<u64> = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["token_ids"].as_array())
        .flatten()
        .filter_map(Value::as_u64)
        .collect();
    assert_eq!(ids.len(), tokenizer().encode("Hi").len() + 1);
}

#[tokio::test]
async fn a_model_without_a_tokenizer_takes_and_gives_ids() {
    let group = Group::start("only", |_| Ok(say_ids(&[1500, 1600, EOS], FinishReason::Stop)));
    let spec = ModelSpec { end_ids: vec![EOS], ..ModelSpec::default() };
    let harness = Harness::with(options(), spec, vec![group]).await;
    let body = harness.post("/v1/completions", completion(json!({}))).await.json();
    assert_eq!(
        (&body["choices"][0]["text"], &body["choices"][0]["token_ids"]),
        (&json!(""), &json!([1500, 1600, EOS]))
    );
    for (path, body, param) in [
        ("/v1/completions", completion(json!({"prompt": "text"})), "prompt"),
        ("/v1/chat/completions", chat(json!({})), "messages"),
        ("/v1/completions", completion(json!({"stop": "x"})), "stop"),
        ("/tokenize", json!({"model": MODEL, "prompt": "x"}), "prompt"),
        ("/detokenize", json!({"model": MODEL, "tokens": [1]}), "model"),
    ] {
        let response = harness.post(path, body).await;
        assert_eq!((response.status, &response.json()["error"]["param"]), (400, &json!(param)), "{path}");
    }
}

#[tokio::test]
async fn chat_clamps_max_tokens_and_completions_refuse() {
    let harness = Harness::saying("x").await;
    assert_eq!(harness.post("/v1/chat/completions", chat(json!({"max_tokens": 262_144}))).await.status, 200);
    let sent = &harness.groups[0].seen()[0];
    assert_eq!(sent.stopping.as_ref().map(|stopping| stopping.max_tokens), Some(WINDOW - sent.token_ids.len() as u32));
    let refused = harness.post("/v1/completions", completion(json!({"max_tokens": WINDOW}))).await;
    assert_eq!(refused.status, 400);
    assert_eq!(refused.json()["error"]["code"], "context_length_exceeded");
    let long = "word ".repeat(WINDOW as usize);
    let refused = harness
        .post("/v1/chat/completions", json!({"model": MODEL, "messages": [{"role": "user", "content": long}]}))
        .await;
    assert_eq!((refused.status, refused.json()["error"]["code"].clone()), (400, json!("context_length_exceeded")));
    assert_eq!(refused.json()["error"]["param"], "messages");
}

#[tokio::test]
async fn defaults_of_the_model_fill_what_the_request_leaves_open() {
    let group = Group::start("only", |_| Ok(say("x")));
    let spec = ModelSpec::new(tokenizer())
        .with_generation_config(&json!({"temperature": 0.15, "top_k": 40, "eos_token_id": [2, 11]}));
    let harness = Harness::with(options(), spec, vec![group]).await;
    harness.post("/v1/completions", completion(json!({}))).await;
    harness
        .post("/v1/completions", completion(json!({"temperature": 0, "top_k": -1, "ignore_eos": true, "seed": -1})))
        .await;
    let seen = harness.groups[0].seen();
    let sampling = |at: usize| seen[at].sampling.clone().expect("set");
    assert_eq!((sampling(0).temperature, sampling(0).top_k), (Some(0.15), Some(40)));
    assert_eq!((sampling(1).temperature, sampling(1).top_k, sampling(1).seed), (Some(0.0), Some(0), u64::MAX));
    let stopping = |at: usize| seen[at].stopping.clone().expect("set");
    assert_eq!((stopping(0).stop_token_ids, stopping(1).stop_token_ids), (vec![2, 11], vec![]));
    assert!(stopping(1).ignore_eos);
}

#[tokio::test]
async fn tokenize_and_detokenize_are_vllms() {
    let harness = Harness::saying("x").await;
    let text = harness.post("/tokenize", json!({"model": MODEL, "prompt": "Hello"})).await.json();
    let ids = [&[1][..], &tokenizer().encode("Hello")].concat();
    assert_eq!(text, json!({"count": ids.len(), "max_model_len": WINDOW, "tokens": ids, "token_strs": null}));
    let bare = json!({"model": MODEL, "prompt": "Hello", "add_special_tokens": false, "return_token_strs": true});
    let bare = harness.post("/tokenize", bare).await.json();
    assert_eq!(bare["tokens"], json!(tokenizer().encode("Hello")));
    assert_eq!(bare["token_strs"].as_array().map(Vec::len), bare["count"].as_u64().map(|count| count as usize));
    let messages = json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "tools": tools()});
    let conversation = harness.post("/v1/tokenize", messages).await.json();
    assert_eq!((&conversation["tokens"][0], &conversation["tokens"][1]), (&json!(1), &json!(5)));
    let back = harness.post("/detokenize", json!({"model": MODEL, "tokens": ids})).await.json();
    assert_eq!(back, json!({"prompt": "<s>Hello"}));
    let continued = json!({"model": MODEL, "continue_final_message": true, "messages": [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]});
    let continued = harness.post("/tokenize", continued).await.json();
    assert_ne!(continued["tokens"].as_array().and_then(|ids| ids.last()), Some(&json!(EOS)));
}

#[tokio::test]
async fn models_are_listed_and_a_fake_group_can_not_pass_for_one() {
    let harness = Harness::saying("x").await;
    let list = harness.get("/v1/models").await.json();
    let ids: Vec<&str> =
        list["data"].as_array().into_iter().flatten().filter_map(|model| model["id"].as_str()).collect();
    assert_eq!((list["object"].as_str(), ids), (Some("list"), vec![ALIAS, MODEL]));
    let one = harness.get(&format!("/v1/models/{ALIAS}")).await.json();
    assert_eq!((&one["owned_by"], &one["device"], &one["root"]), (&json!("bora-fake"), &json!("fake"), &json!(MODEL)));
    assert_eq!((&one["max_model_len"], &one["type"]), (&json!(WINDOW), &json!("base")));
    let missing = harness.get("/v1/models/org/none").await;
    assert_eq!((missing.status, missing.json()["error"]["code"].clone()), (404, json!("model_not_found")));
}

#[tokio::test]
async fn health_readiness_and_metrics() {
    let harness = Harness::saying("x").await;
    assert_eq!(harness.get("/health").await.status, 200);
    assert_eq!(harness.get("/ready").await.status, 200);
    let groups = harness.get("/groups").await.json();
    let group = &groups["groups"][0];
    assert_eq!(
        (&group["group"], &group["state"], &group["ranks"][0]["rank"]),
        (&json!("only"), &json!("ready"), &json!(0))
    );
    assert_eq!(harness.get("/version").await.json()["version"], env!("CARGO_PKG_VERSION"));
    harness.post("/v1/chat/completions", chat(json!({"no_such_field": 1}))).await;
    let metrics = harness.get("/metrics").await.text;
    for line in [
        "bora_router_requests_total{endpoint=\"chat\",status=\"200\"} 1",
        "bora_router_unknown_fields_total 1",
        "bora_router_ready_groups 1",
        "bora_router_open_requests 0",
        "bora_router_group_ready{model=\"devstral-test\",group=\"only\"} 1",
        "bora_router_group_queued_prefill_seconds{model=\"devstral-test\",group=\"only\"} 0.0",
        "bora_router_group_kv_blocks{model=\"devstral-test\",group=\"only\",state=\"used\"} 0",
    ] {
        assert!(metrics.contains(line), "{line} is missing in\n{metrics}");
    }
    let empty = Harness::start(Vec::new()).await;
    assert_eq!(empty.get("/health").await.status, 200);
    assert_eq!(empty.get("/ready").await.status, 503);
    let refused = empty.post("/v1/chat/completions", chat(json!({}))).await;
    assert_eq!(refused.status, 503, "configured, but nobody serves it");
    assert!(refused.headers.contains_key("retry-after"));
    let models = empty.get("/v1/models").await.json();
    assert_eq!((&models["data"][1]["id"], &models["data"][1]["ready_groups"]), (&json!(MODEL), &json!(0)), "{models}");
    assert_eq!(empty.get(&format!("/v1/models/{MODEL}")).await.json()["groups"], 0);
    let metrics = empty.get("/metrics").await.text;
    assert!(metrics.contains("bora_router_unserved_requests_total{model=\"devstral-test\"} 1"), "{metrics}");
    assert!(!metrics.contains("bora_router_group_ready{"), "{metrics}");
    let line = "bora_router_waiting_sequences{model=\"devstral-test\",class=\"batch\"} 0";
    assert!(metrics.contains(line), "{metrics}");
}
