//! Groups that compile grammars, and die of them.

use std::time::Duration;

use crate::support::*;
use bora_proto::v1::{FinishReason, GenerateRequest};
use serde_json::{Value, json};
use tonic::Status;

const CHAT: &str = "/v1/chat/completions";

fn chat(stream: bool) -> Value {
    json!({"model": MODEL, "stream": stream, "guided_regex": "a+", "messages": [{"role": "user", "content": "Hi"}]})
}

fn seen(harness: &Harness) -> usize {
    harness.groups.iter().map(|group| group.seen().len()).sum()
}

#[tokio::test]
async fn a_request_whose_group_dies_while_it_compiles_is_not_sent_to_another() {
    for stream in [false, true] {
        let dies = |_: &GenerateRequest| Ok(vec![Act::Pause(Duration::from_millis(30)), Act::Die]);
        let harness = Harness::start(["a", "b", "c"].map(|name| Group::start(name, dies)).into()).await;
        let response = harness.post(CHAT, chat(stream)).await;
        assert_eq!(response.status, 500, "{}", response.text);
        let error = &response.json()["error"];
        assert!(error["message"].as_str().unwrap().contains("`guided_regex`"), "{}", response.text);
        assert_eq!(error["type"], "server_error", "{}", response.text);
        assert_eq!(seen(&harness), 1);
        assert!(harness.get("/metrics").await.text.contains("poison_pills_total 1"));
        // what has no grammar is sent on
        let harness = Harness::start(vec![Group::start("a", dies), Group::start("b", dies)]).await;
        let plain = json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]});
        harness.post(CHAT, plain).await;
        assert_eq!(seen(&harness), 2);
    }
}

#[tokio::test]
async fn a_stream_whose_grammar_had_compiled_survives_its_group() {
    for before in [0, 2] {
        let ids = [tokenizer().encode("aaaa"), vec![EOS]].concat();
        let all = ids.clone();
        let script = move |request: &GenerateRequest| {
            let done = request.generated_len as usize;
            assert_eq!(request.token_ids[request.token_ids.len() - done..], all[..done]);
            let mut acts = vec![Act::Compile];
            acts.extend(say_ids(&all[done..], FinishReason::Stop));
            Ok(acts)
        };
        let begun = ids[..before.min(ids.len() - 1)].to_vec();
        let dies = move |_: &GenerateRequest| {
            let mut acts = vec![Act::Compile];
            if !begun.is_empty() {
                acts.push(Act::Start { cached: 0 });
            }
            acts.extend(begun.iter().map(|id| Act::Ids(vec![*id])));
            acts.extend([Act::Pause(Duration::from_millis(30)), Act::Die]);
            Ok(acts)
        };
        let harness = Harness::start(vec![Group::start("dies", dies), Group::start("lives", script)]).await;
        // whichever is asked first, the one that lives ends it
        for _ in 0..3 {
            let response = harness.post(CHAT, chat(true)).await;
            assert!(response.is_done(), "{}", response.text);
            assert_eq!(response.content(0), "aaaa");
        }
    }
}

#[tokio::test]
async fn a_grammar_that_is_refused_late_is_a_400_before_anything_is_streamed() {
    for stream in [false, true] {
        let refuses = |_: &GenerateRequest| {
            Ok(vec![
                Act::Pause(Duration::from_millis(30)),
                Act::Fail(Status::invalid_argument("grammar: it is too big")),
            ])
        };
        let harness = Harness::start(vec![Group::start("a", refuses), Group::start("b", refuses)]).await;
        let response = harness.post(CHAT, chat(stream)).await;
        assert_eq!(response.status, 400, "{}", response.text);
        assert_eq!(response.json()["error"]["param"], "guided_regex");
        assert_eq!(seen(&harness), 1);
    }
}

#[tokio::test]
async fn a_grammar_that_fails_while_it_is_matched_is_the_request_s_fault() {
    let fails = |_: &GenerateRequest| {
        let failure = Status::invalid_argument("grammar: matching it takes more than 32 MiB of memory");
        Ok(vec![Act::Compile, Act::Start { cached: 0 }, Act::Ids(vec![1500]), Act::Fail(failure)])
    };
    let harness = Harness::start(vec![Group::start("a", fails)]).await;
    let response = harness.post(CHAT, chat(false)).await;
    assert_eq!(response.status, 400, "{}", response.text);
    assert_eq!(response.json()["error"]["type"], "invalid_request_error");
    let streamed = harness.post(CHAT, chat(true)).await;
    assert!(streamed.text.contains("invalid_request_error"), "{}", streamed.text);
}
