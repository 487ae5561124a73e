//! What a tenant may do holds for every operation, and every operation is counted.

use std::{fmt::Write as _, sync::Arc};

use bora_proto::v1::FinishReason;
use bora_router::{AccessOptions, RouterOptions};
use serde_json::{Value, json};

use crate::support::*;

/// A router over groups whose tenants have these limits (YAML) and a key of their name.
async fn guarded(tenants: &[(&str, &str)], groups: Vec<Group>) -> (Arc<Harness>, tempfile::TempDir) {
    let mut file = String::from("tenants:\n");
    for (name, limits) in tenants {
        let digest = ring::digest::digest(&ring::digest::SHA256, name.as_bytes());
        let sha = digest.as_ref().iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        });
        let _ = writeln!(file, "- {{name: {name}, keys: [{{sha256: {sha}}}], {limits}}}");
    }
    let directory = tempfile::tempdir().expect("a folder");
    let path = directory.path().join("keys.yaml");
    std::fs::write(&path, file).expect("written");
    let access = AccessOptions { keys: Some(path), ..AccessOptions::default() };
    let options = RouterOptions { access, ..options() };
    (Arc::new(Harness::with(options, bora_router::ModelSpec::new(tokenizer()), groups).await), directory)
}

async fn ask(harness: &Harness, key: &str, path: &str, body: &Value) -> Answered {
    let headers = [("authorization", &*format!("Bearer {key}")), ("content-type", "application/json")];
    harness.request("POST", path, &headers, body.to_string()).await
}

/// What is left of the tenant's tokens or requests.
async fn left(harness: &Harness, key: &str, what: &str) -> f64 {
    let headers = [("authorization", &*format!("Bearer {key}"))];
    let answered = harness.request("GET", "/v1/models", &headers, axum::body::Body::empty()).await;
    let header = answered.headers.get(format!("x-ratelimit-remaining-{what}")).expect("a limit");
    header.to_str().expect("text").parse().expect("a number")
}

fn conversation() -> Value {
    json!([{"role": "user", "content": "What is the capital of France? ".repeat(20)}])
}

/// A request of every operation.
fn operations() -> Vec<(&'static str, Value)> {
    vec![
        ("/v1/chat/completions", json!({"model": MODEL, "messages": conversation(), "max_tokens": 4})),
        ("/v1/completions", json!({"model": MODEL, "prompt": "a", "max_tokens": 4})),
        ("/v1/responses", json!({"model": MODEL, "input": conversation(), "max_output_tokens": 4})),
        ("/v1/responses/input_tokens", json!({"model": MODEL, "input": conversation()})),
        ("/v1/messages", json!({"model": MODEL, "messages": conversation(), "max_tokens": 4})),
        ("/v1/messages/count_tokens", json!({"model": MODEL, "messages": conversation()})),
        ("/tokenize", json!({"model": MODEL, "messages": conversation()})),
        ("/tokenize", json!({"model": MODEL, "prompt": "a"})),
        ("/v1/tokenize", json!({"prompt": "a"})),
        ("/detokenize", json!({"model": MODEL, "tokens": [1000, 1001]})),
    ]
}

#[tokio::test]
async fn no_operation_passes_by_the_allowed_models() {
    let group = || Group::start("a", |_| Ok(say("ok")));
    let tenants = [("elsewhere", "models: [large]"), ("here", "models: [devstral-test]")];
    let (harness, _folder) = guarded(&tenants, vec![group()]).await;
    for (path, body) in operations() {
        let refused = ask(&harness, "elsewhere", path, &body).await;
        assert_eq!(refused.status, 403, "{path}: {}", refused.text);
        let alias = match body.get("model") {
            Some(_) => {
                let mut body = body.clone();
                body["model"] = ALIAS.into();
                body
            }
            None => body.clone(),
        };
        assert_eq!(ask(&harness, "elsewhere", path, &alias).await.status, 403, "{path} by another name");
        let answered = ask(&harness, "here", path, &body).await;
        assert_eq!(answered.status, 200, "{path}: {}", answered.text);
    }
}

#[tokio::test]
async fn no_operation_shares_what_is_known_with_another_tenant() {
    let tenants = [("one", "cache_salt: one"), ("other", "cache_salt: other")];
    let (harness, _folder) = guarded(&tenants, vec![Group::start("a", |_| Ok(say("ok")))]).await;
    let known = |text: &str| -> u64 {
        let line = text.lines().find_map(|line| line.strip_prefix("bora_router_encoded_tokens_total{kind=\"known\"} "));
        line.expect("a counter").parse().expect("a number")
    };
    let conversations: Vec<_> = operations()
        .into_iter()
        .filter(|(_, body)| body.get("prompt").is_none() && body.get("tokens").is_none())
        .collect();
    for (path, body) in &conversations {
        assert_eq!(ask(&harness, "one", path, body).await.status, 200);
    }
    let before = known(&harness.get("/metrics").await.text);
    assert!(before > 0, "a tenant's own conversation is known");
    // the first operation that another tenant sends it by finds nothing, whichever it is
    for (index, (path, body)) in conversations.iter().enumerate() {
        let mut body = body.clone();
        let field = if body.get("input").is_some() { "input" } else { "messages" };
        body[field][0]["content"] = format!("{} {}", body[field][0]["content"], index).into();
        assert_eq!(ask(&harness, "one", path, &body).await.status, 200);
        let before = known(&harness.get("/metrics").await.text);
        assert_eq!(ask(&harness, "other", path, &body).await.status, 200);
        assert_eq!(known(&harness.get("/metrics").await.text), before, "{path}");
    }
}

#[tokio::test]
async fn every_operation_counts_as_a_request_and_its_tokens_weigh() {
    let names: Vec<String> = (0..operations().len()).map(|number| format!("t{number}")).collect();
    // slow enough that what comes back meanwhile does not matter
    let tenants: Vec<_> =
        names.iter().map(|name| (name.as_str(), "requests_per_minute: 3, tokens_per_minute: 600")).collect();
    let (harness, _folder) = guarded(&tenants, vec![Group::start("a", |_| Ok(say("ok")))]).await;
    for ((path, mut body), name) in operations().into_iter().zip(&names) {
        if body.get("tokens").is_some() {
            body["tokens"] = json!(vec![1000; 2_000]);
        }
        if body.get("prompt").is_some() {
            body["prompt"] = "word ".repeat(2_000).into();
        }
        for list in ["messages", "input"] {
            if body.get(list).is_some() {
                body[list][0]["content"] = "word ".repeat(2_000).into();
            }
        }
        let answered = ask(&harness, name, path, &body).await;
        assert_eq!(answered.status, 200, "{path}: {}", answered.text);
        assert_eq!(left(&harness, name, "requests").await, 2.0, "{path}");
        let tokens = left(&harness, name, "tokens").await;
        assert!(tokens < 500.0, "{path}: {tokens}");
    }
}

#[tokio::test]
async fn counting_is_limited_too() {
    let tenants = [("slow", "requests_per_minute: 3"), ("owes", "tokens_per_minute: 100")];
    let (harness, _folder) = guarded(&tenants, vec![Group::start("a", |_| Ok(say("ok")))]).await;
    let body = json!({"model": MODEL, "prompt": "word ".repeat(2_000)});
    for (key, most) in [("slow", 3), ("owes", 1)] {
        let mut statuses = Vec::new();
        for _ in 0..=most {
            statuses.push(ask(&harness, key, "/tokenize", &body).await.status);
        }
        assert_eq!(statuses.last(), Some(&429), "{key}: {statuses:?}");
        assert_eq!(statuses[0], 200, "{key}");
    }
}

#[tokio::test]
async fn requests_without_max_tokens_do_not_pass_a_limit_together() {
    let gate = Gate::closed();
    let group = {
        let gate = gate.clone();
        Group::start("a", move |_| {
            let mut acts = say_ids(&[1000; 300], FinishReason::Stop);
            acts.insert(1, Act::Hold(gate.clone()));
            Ok(acts)
        })
    };
    let (harness, _folder) = guarded(&[("metered", "tokens_per_minute: 1000")], vec![group]).await;
    let body = json!({"model": MODEL, "messages": [{"role": "user", "content": "a"}]});
    let mut tasks = Vec::new();
    for _ in 0..20 {
        let (harness, body) = (Arc::clone(&harness), body.clone());
        tasks.push(tokio::spawn(async move { ask(&harness, "metered", "/v1/chat/completions", &body).await }));
    }
    harness
        .until("all but those that run are refused", |harness| {
            let finished = tasks.iter().filter(|task| task.is_finished()).count();
            finished + harness.groups[0].running() == 20
        })
        .await;
    gate.open(1_000);
    let mut granted = 0;
    for task in tasks {
        let answered = task.await.expect("joined");
        assert!([200, 429].contains(&answered.status), "{}", answered.text);
        granted += usize::from(answered.status == 200);
    }
    // 1,000 tokens and what comes back meanwhile, of about 300 each
    assert!((1..=4).contains(&granted), "{granted} requests were granted");
}

#[tokio::test]
async fn tokens_that_the_client_did_not_read_are_charged() {
    const TOKENS: usize = 2_000;
    let group = Group::start("a", |_| Ok(say_ids(&[1000; TOKENS], FinishReason::Length)));
    let (harness, _folder) = guarded(&[("metered", "tokens_per_minute: 12000")], vec![group]).await;
    let body = json!({"model": MODEL, "prompt": "a", "stream": true, "max_tokens": TOKENS}).to_string();
    let headers = [("authorization", "Bearer metered"), ("content-type", "application/json")];
    // the group has sent all of it; that it has also arrived takes a moment
    for _ in 0..200 {
        let before = left(&harness, "metered", "tokens").await;
        let response = harness.send("POST", "/v1/completions", &headers, body.clone()).await;
        assert_eq!(response.status(), 200);
        harness.until("the group has said everything", |harness| harness.groups[0].running() == 0).await;
        drop(response);
        let charged = before - left(&harness, "metered", "tokens").await;
        if charged > TOKENS as f64 * 0.8 {
            return;
        }
    }
    panic!("tokens that were generated were not charged");
}
