//! Groups that refuse, die and fall silent, and clients that leave.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::support::*;
use axum::body::Body;
use bora_common::registry::{GroupChange, GroupRecord};
use bora_common::secret::ClusterKeys;
use bora_proto::v1::{FinishReason, Load, State, group_event::Event as Update};
use bora_router::RouterOptions;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tonic::Status;

const CHAT: &str = "/v1/chat/completions";

fn chat(stream: bool) -> Value {
    json!({"model": MODEL, "stream": stream, "messages": [{"role": "user", "content": "Hi"}]})
}

/// What a group without faults continues with: the token IDs of the text after those already generated.
fn go_on(text: &'static str) -> impl Fn(&bora_proto::v1::GenerateRequest) -> Result<Vec<Act>, Status> {
    move |request| {
        let ids = [tokenizer().encode(text), vec![EOS]].concat();
        let done = request.generated_len as usize;
        let prompt = request.token_ids.len() - done;
        assert_eq!(request.token_ids[prompt..], ids[..done], "the ids of the group before come back");
        Ok(say_ids(&ids[done..], FinishReason::Stop))
    }
}

/// Both groups get requests: the faulty one is put where the first request goes by making the other busy.
async fn prefer(harness: &Harness, busy: usize) {
    harness.groups[busy].report(Update::Load(Load { queued_prefill_tokens: 1_000_000, ..Load::default() }));
    harness
        .until("the load is known", |harness| {
            let view = harness.router.service().fleet().view();
            view.groups().any(|group| group.link.load_tracker.reported().queued_prefill_tokens == 1_000_000)
        })
        .await;
}

#[tokio::test]
async fn a_refusal_before_the_first_token_is_retried_elsewhere() {
    for status in [Status::resource_exhausted("full"), Status::unavailable("draining")] {
        let refusal = status.clone();
        let groups =
            vec![Group::start("bad", move |_| Err(refusal.clone())), Group::start("good", |_| Ok(say("fine")))];
        let harness = Harness::start(groups).await;
        prefer(&harness, 1).await;
        let completion = harness.post(CHAT, chat(false)).await;
        assert_eq!(completion.status, 200, "{status:?}: {}", completion.text);
        assert_eq!(completion.json()["choices"][0]["message"]["content"], "fine");
        assert_eq!(completion.headers["x-bora-group"], "bad,good");
        assert_eq!(harness.groups[0].seen().len(), 1);
        let view = harness.router.service().fleet().view();
        assert!(view.groups().all(|group| group.link.breaker.allows()), "a refusal opens no breaker");
    }
}

#[tokio::test]
async fn a_full_fleet_is_a_429_with_a_time_and_a_stream_gets_the_status_too() {
    let full = |_: &bora_proto::v1::GenerateRequest| Err(Status::resource_exhausted("queue"));
    let harness = Harness::start(vec![Group::start("a", full), Group::start("b", full)]).await;
    for stream in [false, true] {
        let completion = harness.post(CHAT, chat(stream)).await;
        assert_eq!((completion.status, completion.json()["error"]["type"].clone()), (429, json!("rate_limit_error")));
        assert!(completion.headers.contains_key("retry-after"));
    }
    assert_eq!(harness.groups[0].seen().len() + harness.groups[1].seen().len(), 4, "each group once a request");
}

/// Its client has been notified that it is served: where nobody has room for it now, it waits.
#[tokio::test]
async fn what_was_accepted_waits_for_room_elsewhere() {
    let was_asked = AtomicBool::new(false);
    let breaks_at_first = move |_: &bora_proto::v1::GenerateRequest| {
        let again = was_asked.swap(true, Ordering::SeqCst);
        let breaks = vec![Act::Start { cached: 0 }, Act::Fail(Status::unavailable("a rank is gone"))];
        Ok(if again { say("fine") } else { breaks })
    };
    let full = |_: &bora_proto::v1::GenerateRequest| Err(Status::resource_exhausted("queue"));
    let harness = Harness::start(vec![Group::start("breaks", breaks_at_first), Group::start("full", full)]).await;
    prefer(&harness, 1).await;
    // and full, as the group reports it too: it is not asked again while the stream waits
    harness.groups[1].report(Update::Load(Load { running: 64, queued_prefill_tokens: 1_000_000, ..Load::default() }));
    let completion = harness.post(CHAT, chat(true)).await;
    assert!(completion.is_done(), "{}", completion.text);
    assert_eq!((completion.content(0), harness.groups[1].seen().len()), ("fine".into(), 1));
}

/// It waits for the group that was full, asks it no more than it reports room, and the one that failed not at all.
#[tokio::test]
async fn what_waits_asks_a_full_group_again_when_it_tells_of_room() {
    let breaks = |_: &bora_proto::v1::GenerateRequest| {
        Ok(vec![Act::Start { cached: 0 }, Act::Fail(Status::unavailable("a rank is gone"))])
    };
    let has_room = Arc::new(AtomicBool::new(false));
    let is_asked = Arc::clone(&has_room);
    let fills = move |_: &bora_proto::v1::GenerateRequest| match is_asked.load(Ordering::SeqCst) {
        true => Ok(say("fine")),
        false => Err(Status::resource_exhausted("queue")),
    };
    let options = RouterOptions { failover_wait_seconds: 60.0, ..options() };
    let groups = vec![Group::start("breaks", breaks), Group::start("full", fills)];
    let harness = Harness::with(options, bora_router::ModelSpec::new(tokenizer()), groups).await;
    let full = &harness.groups[1];
    let report = |running, waiting| full.report(Update::Load(Load { running, waiting, ..Load::default() }));
    let reported = |count: u32| {
        harness.until("the load is known", move |harness| {
            let view = harness.router.service().fleet().view();
            view.groups().any(|group| {
                let load = group.link.load_tracker.reported();
                load.running + load.waiting == count
            })
        })
    };
    report(64, 100);
    reported(164).await;
    let room_comes = async {
        harness.until("it was refused", |_| full.seen().len() == 1).await;
        // more than it was known to have, and then fewer of them: the first of these looks is in vain
        for waiting in [300, 400, 350] {
            report(64, waiting);
            reported(64 + waiting).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        harness.until("it was refused again", |_| full.seen().len() == 2).await;
        has_room.store(true, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(full.seen().len(), 2, "it has reported nothing since");
        report(63, 0);
    };
    let began = tokio::time::Instant::now();
    let (completion, ()) = tokio::join!(harness.post(CHAT, chat(true)), room_comes);
    assert!(began.elapsed() < Duration::from_secs(50), "it did not wait for its last look");
    assert!(completion.is_done(), "{}", completion.text);
    assert_eq!((completion.content(0), full.seen().len()), ("fine".into(), 3));
    assert_eq!(harness.groups[0].seen().len(), 1, "what failed is not asked again");
}

/// What a group said long ago is not held against it, whatever it reported since.
#[tokio::test]
async fn a_group_that_was_full_before_another_took_the_stream_is_asked_at_once() {
    let (gate, was_asked) = (Gate::closed(), AtomicBool::new(false));
    let was_full = move |_: &bora_proto::v1::GenerateRequest| match was_asked.swap(true, Ordering::SeqCst) {
        true => Ok(say("fine")),
        false => Err(Status::resource_exhausted("queue")),
    };
    let held = gate.clone();
    let breaks = move |_: &bora_proto::v1::GenerateRequest| {
        Ok(vec![Act::Start { cached: 0 }, Act::Hold(held.clone()), Act::Fail(Status::unavailable("a rank is gone"))])
    };
    let options = RouterOptions { failover_wait_seconds: 60.0, ..options() };
    let groups = vec![Group::start("full", was_full), Group::start("breaks", breaks)];
    let harness = Harness::with(options, bora_router::ModelSpec::new(tokenizer()), groups).await;
    prefer(&harness, 1).await;
    let breaks_later = async {
        harness.until("the other took it", |harness| harness.groups[1].running() == 1).await;
        harness.groups[0].report(Update::Load(Load { running: 64, ..Load::default() }));
        harness
            .until("the load is known", |harness| {
                let view = harness.router.service().fleet().view();
                view.groups().any(|group| group.link.load_tracker.reported().running == 64)
            })
            .await;
        gate.open(1);
    };
    let began = tokio::time::Instant::now();
    let (completion, ()) = tokio::join!(harness.post(CHAT, chat(true)), breaks_later);
    assert!(began.elapsed() < Duration::from_secs(50), "it did not wait for its last look");
    assert_eq!((completion.content(0), harness.groups[0].seen().len()), ("fine".into(), 2));
}

#[tokio::test]
async fn a_group_that_dies_in_mid_stream_is_replaced_and_nothing_is_lost_or_doubled() {
    let text = "The stream goes on as if nothing had happened, token by token.";
    let first = tokenizer().encode(text)[..5].to_vec();
    let dies = move |_: &bora_proto::v1::GenerateRequest| {
        let mut acts = vec![Act::Start { cached: 0 }];
        acts.extend(first.iter().map(|id| Act::Ids(vec![*id])));
        acts.push(Act::Pause(Duration::from_millis(50)));
        acts.push(Act::Die);
        Ok(acts)
    };
    let harness = Harness::start(vec![Group::start("dies", dies), Group::start("lives", go_on(text))]).await;
    prefer(&harness, 1).await;
    let completion = harness
        .post(
            CHAT,
            json!({"model": MODEL, "stream": true, "return_token_ids": true,
        "stream_options": {"include_usage": true}, "messages": [{"role": "user", "content": "Hi"}]}),
        )
        .await;
    assert!(completion.is_done(), "{}", completion.text);
    assert_eq!(completion.content(0), text);
    let ids: Vec<u64> = completion
        .chunks()
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["token_ids"].as_array())
        .flatten()
        .filter_map(Value::as_u64)
        .collect();
    assert_eq!(ids.len(), tokenizer().encode(text).len() + 1);
    let usage = completion.chunks().last().map(|chunk| chunk["usage"]["completion_tokens"].clone());
    assert_eq!(usage, Some(json!(ids.len())));
    let resumed = &harness.groups[1].seen()[0];
    assert_eq!(resumed.generated_len, 5);
    assert_eq!(resumed.sampling, harness.groups[0].seen()[0].sampling, "seed included");
    let metrics = harness.get("/metrics").await.text;
    assert!(metrics.contains("failovers_total{when=\"mid_stream\"} 1"), "{metrics}");
}

#[tokio::test]
async fn tool_calls_and_stop_strings_survive_the_move() {
    let ids = [vec![9], tokenizer().encode("read_file"), vec![32], tokenizer().encode("{\"path\": \"a\"}"), vec![EOS]]
        .concat();
    let all = ids.clone();
    let cut = ids.len() - 4;
    let breaks = move |_: &bora_proto::v1::GenerateRequest| {
        Ok(vec![
            Act::Start { cached: 0 },
            Act::Ids(ids[..cut].to_vec()),
            Act::Fail(Status::unavailable("rank 1 is gone")),
        ])
    };
    let goes_on = move |request: &bora_proto::v1::GenerateRequest| {
        Ok(say_ids(&all[request.generated_len as usize..], FinishReason::Stop))
    };
    let harness = Harness::start(vec![Group::start("breaks", breaks), Group::start("lives", goes_on)]).await;
    prefer(&harness, 1).await;
    let tools = json!([{"type": "function", "function": {"name": "read_file", "parameters": {}}}]);
    let body = json!({"model": MODEL, "tools": tools, "messages": [{"role": "user", "content": "Hi"}]});
    let completion = harness.post(CHAT, body).await.json();
    let call = &completion["choices"][0]["message"]["tool_calls"][0]["function"];
    assert_eq!(call, &json!({"name": "read_file", "arguments": "{\"path\": \"a\"}"}));
}

#[tokio::test]
async fn a_death_after_the_last_token_is_an_end() {
    let ids = [tokenizer().encode("done"), vec![EOS]].concat();
    let dies = move |_: &bora_proto::v1::GenerateRequest| {
        Ok(vec![Act::Start { cached: 0 }, Act::Ids(ids.clone()), Act::Fail(Status::unavailable("gone"))])
    };
    let harness = Harness::scripted(dies).await;
    let completion = harness.post(CHAT, chat(false)).await.json();
    assert_eq!(completion["choices"][0]["message"]["content"], "done");
    assert_eq!(completion["choices"][0]["finish_reason"], "stop");
}

/// Nothing is left to do: no budget is asked, and nobody is to blame.
#[tokio::test]
async fn a_death_after_the_last_token_is_an_end_even_where_no_group_may_be_tried_again() {
    for (retries_per_tenant, max_attempts) in [(0, 3), (9, 1)] {
        let ids = [tokenizer().encode("done"), vec![EOS]].concat();
        let dies = move |_: &bora_proto::v1::GenerateRequest| {
            let pause = Act::Pause(Duration::from_millis(50));
            Ok(vec![Act::Start { cached: 0 }, Act::Ids(ids.clone()), pause, Act::Die])
        };
        let options = RouterOptions { retries_per_tenant, max_attempts, ..options() };
        let spec = bora_router::ModelSpec::new(tokenizer());
        let harness = Harness::with(options, spec, vec![Group::start("only", dies)]).await;
        let completion = harness.post(CHAT, chat(false)).await;
        assert_eq!(completion.status, 200, "{}", completion.text);
        assert_eq!(completion.json()["choices"][0]["message"]["content"], "done");
        assert_eq!(completion.json()["choices"][0]["finish_reason"], "stop");
        let metrics = harness.get("/metrics").await.text;
        for none in ["refused_retries_total", "poison_pills_total"] {
            assert!(metrics.contains(&format!("bora_router_{none} 0")), "{metrics}");
        }
        assert!(!metrics.contains("failovers_total{when=\"mid_stream\"} 1"), "{metrics}");
    }
}

#[tokio::test]
async fn a_stream_that_nobody_can_take_over_ends_with_an_error_and_no_done() {
    let dies = |_: &bora_proto::v1::GenerateRequest| {
        Ok(vec![Act::Start { cached: 0 }, Act::Ids(vec![1500]), Act::Pause(Duration::from_millis(50)), Act::Die])
    };
    let harness = Harness::scripted(dies).await;
    let completion = harness.post(CHAT, chat(true)).await;
    assert_eq!(completion.status, 200);
    assert!(!completion.text.contains("[DONE]"), "{}", completion.text);
    let last = completion.chunks().last().cloned().expect("chunks");
    assert_eq!((&last["error"]["type"], &last["error"]["code"]), (&json!("server_error"), &json!("unavailable")));
}

#[tokio::test]
async fn a_request_that_kills_groups_is_given_three() {
    let kills = |_: &bora_proto::v1::GenerateRequest| {
        Ok(vec![Act::Start { cached: 0 }, Act::Ids(vec![1500]), Act::Pause(Duration::from_millis(30)), Act::Die])
    };
    let groups = ["a", "b", "c", "d", "e"].map(|name| Group::start(name, kills)).into();
    let harness = Harness::start(groups).await;
    let completion = harness.post(CHAT, chat(false)).await;
    assert_eq!(completion.status, 500, "{}", completion.text);
    let seen: usize = harness.groups.iter().map(|group| group.seen().len()).sum();
    assert_eq!(seen, 3);
}

/// What kills groups is the prompt, which all choices share: their deaths count together.
#[tokio::test]
async fn a_request_of_several_choices_is_given_three_groups_too() {
    let (gate, first_choice) = (Gate::closed(), Arc::new(AtomicUsize::new(0)));
    let groups = ["a", "b", "c", "d", "e", "f", "g"].map(|name| {
        let (gate, first_choice) = (gate.clone(), Arc::clone(&first_choice));
        Group::start(name, move |request| {
            if request.request_id == "kills-1" {
                return Ok(vec![Act::Start { cached: 0 }, Act::Hold(gate.clone()), Act::Die]);
            }
            // the first choice kills two groups, and runs on a third one when the other kills its own
            let mut acts = vec![Act::Start { cached: 0 }, Act::Ids(vec![1500]), Act::Pause(Duration::from_millis(30))];
            if first_choice.fetch_add(1, Ordering::SeqCst) < 2 {
                acts.push(Act::Die);
            } else {
                gate.open(10);
                acts.push(Act::Hang);
            }
            Ok(acts)
        })
    });
    let harness = Harness::start(groups.into()).await;
    let prompt: Vec<u32> = (0..300).map(|at| 1000 + at).collect();
    let body = json!({"model": MODEL, "prompt": prompt, "n": 2, "max_tokens": 9});
    let completion = harness.request("POST", "/v1/completions", &[("x-request-id", "kills")], body.to_string()).await;
    assert_eq!(completion.status, 500, "{}", completion.text);
    assert!(completion.text.contains("3 groups failed while they ran this request"), "{}", completion.text);
    let seen: Vec<String> = harness.groups.iter().flat_map(Group::seen).map(|request| request.request_id).collect();
    assert_eq!(seen.iter().filter(|id| *id == "kills-1").count(), 1, "it got no second group: {seen:?}");
    assert_eq!(seen.len(), 4, "{seen:?}");
    let metrics = harness.get("/metrics").await.text;
    assert!(metrics.contains("bora_router_poison_pills_total 1"), "{metrics}");
}

#[tokio::test]
async fn a_group_that_dies_under_several_choices_died_once() {
    let text = "Four choices of one request, and a single death.";
    let first = tokenizer().encode(text)[..2].to_vec();
    let dies = move |_: &bora_proto::v1::GenerateRequest| {
        let pause = Act::Pause(Duration::from_millis(50));
        Ok(vec![Act::Start { cached: 0 }, Act::Ids(first.clone()), pause, Act::Die])
    };
    let harness = Harness::start(vec![Group::start("dies", dies), Group::start("lives", go_on(text))]).await;
    prefer(&harness, 1).await;
    let body = json!({"model": MODEL, "n": 4, "messages": [{"role": "user", "content": "Hi"}]});
    let completion = harness.post(CHAT, body).await;
    assert_eq!(completion.status, 200, "{}", completion.text);
    assert_eq!(completion.headers["x-bora-group"], "dies,lives");
    assert_eq!((harness.groups[0].seen().len(), harness.groups[1].seen().len()), (4, 4));
    let choices = completion.json()["choices"].as_array().cloned().expect("choices");
    assert!(choices.iter().all(|choice| choice["message"]["content"] == text), "{}", completion.text);
}

#[tokio::test]
async fn a_failure_of_the_sequence_alone_is_not_retried() {
    let fails = |_: &bora_proto::v1::GenerateRequest| {
        Ok(vec![Act::Start { cached: 0 }, Act::Fail(Status::internal("logits are not numbers"))])
    };
    let harness = Harness::start(vec![Group::start("a", fails), Group::start("b", fails)]).await;
    let completion = harness.post(CHAT, chat(false)).await;
    assert_eq!(completion.status, 500);
    assert_eq!(harness.groups.iter().map(|group| group.seen().len()).sum::<usize>(), 1);
    let refuses = |_: &bora_proto::v1::GenerateRequest| Err(Status::invalid_argument("token id out of range"));
    let harness = Harness::scripted(refuses).await;
    assert_eq!(harness.post(CHAT, chat(false)).await.status, 400);
}

/// Neither opens a breaker, however often it happens, nor keeps the probe of one that is half open.
#[tokio::test]
async fn what_the_request_itself_causes_is_nothing_to_the_breaker() {
    let at_once = [Status::invalid_argument("bad"), Status::out_of_range("long"), Status::failed_precondition("image")];
    let later = [Status::internal("logits are not numbers"), Status::deadline_exceeded("too late")];
    let scripts = at_once.map(Err).into_iter().chain(later.map(|status| Ok(vec![Act::Fail(status)])));
    for script in scripts {
        let update = format!("{script:?}");
        let harness = Harness::scripted(move |_| script.clone()).await;
        let allows = |harness: &Harness| {
            harness.router.service().fleet().view().groups().all(|group| group.link.breaker.allows())
        };
        for _ in 0..5 {
            harness.post(CHAT, chat(false)).await;
        }
        assert_eq!(harness.groups[0].seen().len(), 5, "{update}");
        assert!(allows(&harness), "{update}");
        harness.router.service().fleet().view().groups().for_each(|group| group.link.breaker.failed());
        assert!(!allows(&harness), "{update}");
        harness.until("a probe is let through", allows).await;
        harness.post(CHAT, chat(false)).await;
        assert_eq!(harness.groups[0].seen().len(), 6, "{update}");
        assert!(allows(&harness), "the next one is let through at once: {update}");
    }
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_sequences_and_gives_back_what_was_booked() {
    let hangs =
        |_: &bora_proto::v1::GenerateRequest| Ok(vec![Act::Start { cached: 0 }, Act::Ids(vec![1500]), Act::Hang]);
    let harness = Harness::scripted(hangs).await;
    // streamed: the body is dropped
    let mut body = json!({"model": MODEL, "stream": true, "n": 3, "messages": [{"role": "user", "content": "Hi"}]});
    let mut response = harness.send("POST", CHAT, &[], body.to_string()).await;
    let first = response.body_mut().frame().await.expect("a frame").expect("data");
    assert!(first.into_data().is_ok_and(|data| data.starts_with(b"data: ")));
    harness.until("three sequences run", |harness| harness.groups[0].running() == 3).await;
    drop(response);
    harness.until("they were aborted", |harness| harness.groups[0].cancelled() == 3).await;
    // plain: the handler is dropped
    body["stream"] = json!(false);
    let text = body.to_string();
    let plain = harness.send("POST", CHAT, &[], text);
    assert!(tokio::time::timeout(Duration::from_millis(300), plain).await.is_err());
    harness.until("they were aborted", |harness| harness.groups[0].cancelled() == 6).await;
    let view = harness.router.service().fleet().view();
    let group = view.groups().next().expect("there").clone();
    assert_eq!(group.link.load_tracker.busy(), bora_router::place::load_tracker::LoadEstimate::default());
    let metrics = harness.get("/metrics").await.text;
    assert!(metrics.contains("requests_total{endpoint=\"chat\",status=\"499\"} 2"), "{metrics}");
}

#[tokio::test]
async fn silence_is_filled_and_a_deadline_ends_it() {
    let hangs = |_: &bora_proto::v1::GenerateRequest| Ok(vec![Act::Start { cached: 0 }, Act::Hang]);
    let options = RouterOptions { heartbeat_seconds: 0.1, request_timeout_seconds: 0.55, ..options() };
    let harness =
        Harness::with(options, bora_router::ModelSpec::new(tokenizer()), vec![Group::start("only", hangs)]).await;
    let completion = harness.post(CHAT, chat(true)).await;
    let comments = completion.text.matches(": keep-alive\n\n").count();
    assert!((3..=5).contains(&comments), "{comments}: {}", completion.text);
    assert!(completion.text.contains("\"timeout\"") && !completion.text.contains("[DONE]"), "{}", completion.text);
    assert_eq!(harness.post(CHAT, chat(false)).await.status, 504);
    harness.until("both were aborted", |harness| harness.groups[0].running() == 0).await;
}

#[tokio::test]
async fn a_known_prefix_draws_its_next_turn_and_load_drives_it_away() {
    let harness = Harness::start(vec![Group::start("a", |_| Ok(say("x"))), Group::start("b", |_| Ok(say("x")))]).await;
    let prompt: Vec<u32> = (0..1000).map(|at| 1000 + at % 7000).collect();
    harness.groups[1].report_stored(&prompt);
    harness
        .until("the blocks are known", |harness| harness.router.service().fleet().index.len() == prompt.len() / 64)
        .await;
    let body = json!({"model": MODEL, "prompt": prompt, "max_tokens": 1});
    for _ in 0..10 {
        assert_eq!(harness.post("/v1/completions", body.clone()).await.headers["x-bora-group"], "b");
    }
    harness.groups[1].report(Update::Load(Load { queued_prefill_tokens: 100_000, ..Load::default() }));
    harness
        .until("the load is known", |harness| {
            harness
                .router
                .service()
                .fleet()
                .view()
                .groups()
                .any(|group| group.link.load_tracker.busy().queued_tokens == 100_000)
        })
        .await;
    assert_eq!(harness.post("/v1/completions", body).await.headers["x-bora-group"], "a");
}

#[tokio::test]
async fn a_burst_of_siblings_is_spread_and_balanced() {
    let slow = |_: &bora_proto::v1::GenerateRequest| {
        Ok(vec![
            Act::Pause(Duration::from_millis(200)),
            Act::Start { cached: 0 },
            Act::Ids(vec![1500, EOS]),
            Act::Finish(FinishReason::Stop),
        ])
    };
    let harness = Harness::start(["a", "b", "c", "d"].map(|name| Group::start(name, slow)).into()).await;
    let requests = (0..40u32).map(|number| {
        let prompt: Vec<u32> = (0..200).map(|at| 1000 + (number * 131 + at * 7) % 8000).collect();
        let body = json!({"model": MODEL, "prompt": prompt, "max_tokens": 2});
        let harness = &harness;
        async move { harness.post("/v1/completions", body).await.status }
    });
    let statuses = futures::future::join_all(requests).await;
    assert!(statuses.iter().all(|status| *status == 200));
    let counts: Vec<usize> = harness.groups.iter().map(|group| group.seen().len()).collect();
    assert!(counts.iter().all(|count| (8..=12).contains(count)), "{counts:?}");
}

#[tokio::test]
async fn a_group_that_drains_gets_nothing_new_and_debug_tells_why() {
    let options = RouterOptions { debug: true, ..options() };
    let groups = vec![Group::start("a", |_| Ok(say("x"))), Group::start("b", |_| Ok(say("x")))];
    let harness = Harness::with(options, bora_router::ModelSpec::new(tokenizer()), groups).await;
    harness.groups[0].report(Update::State(State::Draining as i32));
    harness
        .until("one group is left", |harness| {
            harness.router.service().fleet().view().groups().filter(|group| group.is_ready()).count() == 1
        })
        .await;
    for _ in 0..8 {
        let completion = harness.post(CHAT, chat(false)).await;
        assert_eq!(completion.headers["x-bora-group"], "b");
        let decision = completion.headers["x-bora-decision"].to_str().expect("text");
        assert!(decision.starts_with("chose=b; b: "), "{decision}");
    }
}

#[tokio::test]
async fn a_registry_that_forgets_a_group_does_not_take_it_away_while_it_answers() {
    use bora_common::registry::GroupChange;
    let harness = Harness::saying("x").await;
    let gone = GroupChange::Gone { model: MODEL.into(), group: "only".into() };
    harness.changes.send(gone).await.expect("followed");
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(harness.post(CHAT, chat(false)).await.status, 200);
    harness.groups[0].kill();
    harness.until("it is gone", |harness| harness.router.service().fleet().view().groups().count() == 0).await;
    assert!(harness.router.service().fleet().index.is_empty());
    assert_eq!(harness.get("/ready").await.status, 503);
}

#[tokio::test]
async fn over_real_sockets_connections_finish_before_the_server_stops() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let slow = |_: &bora_proto::v1::GenerateRequest| {
        Ok(vec![
            Act::Start { cached: 0 },
            Act::Pause(Duration::from_millis(300)),
            Act::Ids(vec![1500, EOS]),
            Act::Finish(FinishReason::Stop),
        ])
    };
    let Harness { router, changes: _changes, groups: _groups } = Harness::scripted(slow).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = tokio::spawn(router.serve(listener, None, async move {
        let _ = stopped.await;
    }));
    let body = chat(true).to_string();
    let mut client = tokio::net::TcpStream::connect(address).await.expect("connected");
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    client.write_all(head.as_bytes()).await.expect("sent");
    let mut first = [0; 4096];
    let count = client.read(&mut first).await.expect("headers");
    assert!(first[..count].starts_with(b"HTTP/1.1 200 OK"), "headers come at once");
    stop.send(()).expect("running");
    let mut rest = String::new();
    client.read_to_string(&mut rest).await.expect("the stream goes on to its end and the connection closes");
    assert!(rest.contains("data: [DONE]"), "{rest}");
    assert!(server.await.expect("joined").is_ok());
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn a_panic_is_a_500_in_openais_shape() {
    use tower::ServiceExt as _;
    let routes = axum::Router::new()
        .route(
            "/",
            axum::routing::get(|| async {
                if true {
                    panic!("on purpose")
                }
            }),
        )
        .layer(bora_router::server::catch_panics());
    let request = axum::http::Request::builder().uri("/").body(Body::empty()).expect("a request");
    let response = routes.oneshot(request).await.expect("infallible");
    assert_eq!(response.status(), 500);
    let bytes = response.into_body().collect().await.expect("a body").to_bytes();
    let body: Value = serde_json::from_slice(&bytes).expect("JSON");
    assert_eq!(body["error"]["type"], "server_error");
}

#[tokio::test]
async fn a_gap_in_a_groups_events_starts_them_anew_with_nothing_believed() {
    let harness = Harness::saying("x").await;
    let index = |harness: &Harness| harness.router.service().fleet().index.len();
    let prompt: Vec<u32> = (0..640).collect();
    harness.groups[0].report_stored(&prompt);
    harness.until("the blocks are known", |harness| index(harness) == 10).await;
    harness.groups[0].report_after_a_gap(Update::Load(Load::default()));
    harness.until("the group is asked again", |harness| harness.groups[0].watches() == 2).await;
    harness.until("nothing is believed", |harness| index(harness) == 0).await;
    harness.groups[0].report_stored(&prompt[..128]);
    harness.until("what is told now counts", |harness| index(harness) == 2).await;
    let view = harness.router.service().fleet().view();
    assert!(view.groups().all(|group| group.link.breaker.allows()), "a gap is no failure");
}

#[tokio::test]
async fn over_real_sockets_a_client_that_hangs_up_ends_its_sequence() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let hangs = |_: &bora_proto::v1::GenerateRequest| Ok(vec![Act::Start { cached: 0 }, Act::Hang]);
    let Harness { router, changes: _changes, groups } = Harness::scripted(hangs).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    let server = tokio::spawn(router.serve(listener, None, std::future::pending()));
    for (number, stream) in [true, false].into_iter().enumerate() {
        let body = chat(stream).to_string();
        let mut client = tokio::net::TcpStream::connect(address).await.expect("connected");
        let head = format!(
            "POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        client.write_all(head.as_bytes()).await.expect("sent");
        if stream {
            let mut first = [0; 1024];
            assert!(client.read(&mut first).await.expect("headers") > 0);
        }
        for _ in 0..500 {
            if groups[0].running() == 1 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(groups[0].running(), 1, "stream: {stream}");
        drop(client);
        for _ in 0..500 {
            if groups[0].cancelled() == number + 1 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(groups[0].cancelled(), number + 1, "stream: {stream}");
    }
    server.abort();
}

/// Groups that are restarted one after the other do not count as killed by the stream that outlives them.
#[tokio::test]
async fn a_stream_outlives_more_drains_than_deaths() {
    let names = ["a", "b", "c", "d", "e", "f"];
    let groups = names.map(|name| {
        Group::start(name, |request| {
            let done = request.generated_len;
            if done == 5 {
                return Ok(say_ids(&[1505, EOS], FinishReason::Stop));
            }
            Ok(vec![Act::Start { cached: 0 }, Act::Ids(vec![1500 + done]), Act::Fail(Status::unavailable("draining"))])
        })
    });
    let harness = Harness::start(groups.into()).await;
    let body = json!({"model": MODEL, "prompt": [1000, 1001], "max_tokens": 50, "return_token_ids": true});
    let completion = harness.post("/v1/completions", body).await;
    assert_eq!(completion.status, 200, "{}", completion.text);
    assert_eq!(completion.json()["choices"][0]["token_ids"], json!([1500, 1501, 1502, 1503, 1504, 1505, EOS]));
}

#[tokio::test]
async fn who_has_used_up_his_retries_gets_the_failure() {
    let breaks = |_: &bora_proto::v1::GenerateRequest| Err(Status::unavailable("draining"));
    let groups = vec![Group::start("a", breaks), Group::start("b", breaks)];
    let options = RouterOptions { retries_per_tenant: 0, ..options() };
    let harness = Harness::with(options, bora_router::ModelSpec::new(tokenizer()), groups).await;
    assert_eq!(harness.post(CHAT, chat(false)).await.status, 503);
    assert_eq!(harness.groups.iter().map(|group| group.seen().len()).sum::<usize>(), 1, "no second try");
    let metrics = harness.get("/metrics").await.text;
    assert!(metrics.contains("bora_router_refused_retries_total 1"), "{metrics}");
}

/// What is set holds for all routers together: one of four has a quarter, until the others are gone.
#[tokio::test]
async fn retries_are_shared_among_the_routers_that_live() {
    let refuses = |_: &bora_proto::v1::GenerateRequest| Err(Status::unavailable("draining"));
    let groups = ["a", "b", "c", "d", "e", "f"].map(|name| Group::start(name, refuses)).into();
    let options = RouterOptions { retries_per_tenant: 4, retries: 8, ..options() };
    let mut harness = Harness::with(options, bora_router::ModelSpec::new(tokenizer()), groups).await;
    let (report, update) = tokio::sync::watch::channel(4);
    harness.router.share_limits(update);
    for (routers, tries) in [(4, 2), (1, 5), (4, 2)] {
        report.send(routers).expect("followed");
        harness
            .until("the number is known", |harness| harness.router.service().access().routers().count() == routers)
            .await;
        let seen = |harness: &Harness| harness.groups.iter().map(|group| group.seen().len()).sum::<usize>();
        let before = seen(&harness);
        assert_eq!(harness.post(CHAT, chat(false)).await.status, 503);
        assert_eq!(seen(&harness) - before, tries, "of {routers} routers");
    }
}

#[tokio::test]
async fn groups_one_release_apart_serve_and_others_are_refused_by_name() {
    let harness = Harness::start(vec![Group::start("same", |_| Ok(say("same")))]).await;
    let mut parts = env!("CARGO_PKG_VERSION").split('.').map(|part| part.parse::<u32>().expect("a number"));
    let (major, minor) = (parts.next().expect("major"), parts.next().expect("minor"));
    let others = [
        ("next", format!("{major}.{}.7", minor + 1)),
        ("far", format!("{major}.{}.0", minor + 2)),
        ("major", format!("{}.{minor}.0", major + 1)),
    ];
    let groups: Vec<Group> = others.iter().map(|(name, _)| Group::start(name, |_| Ok(say("other")))).collect();
    for (group, (_, version)) in groups.iter().zip(&others) {
        let record = GroupRecord { version: version.clone(), ..group.record() };
        harness.changes.send(GroupChange::Put(Box::new(record))).await.expect("followed");
    }
    harness
        .until("the group of the next release is watched", |harness| {
            let view = harness.router.service().fleet().view();
            view.groups().any(|group| group.record.group == "next" && group.link.is_watched())
        })
        .await;
    let names: Vec<String> = {
        let view = harness.router.service().fleet().view();
        view.groups().map(|group| group.record.group.clone()).collect()
    };
    assert_eq!(names, ["next", "same"]);
    let metrics = harness.get("/metrics").await.text;
    assert!(metrics.contains("bora_router_refused_groups 2"), "{metrics}");
    // a group that comes back as a release that fits is taken
    harness.changes.send(GroupChange::Put(Box::new(groups[1].record()))).await.expect("followed");
    harness
        .until("it is no longer refused", |harness| {
            harness.router.service().fleet().refused() == 1
                && harness.router.service().fleet().view().groups().count() == 3
        })
        .await;
    // and one that becomes another release goes
    let changed = GroupRecord { version: "9.9.9".into(), epoch: 2, ..harness.groups[0].record() };
    harness.changes.send(GroupChange::Put(Box::new(changed))).await.expect("followed");
    harness
        .until("it is gone", |harness| {
            !harness.router.service().fleet().view().groups().any(|group| group.record.group == "same")
        })
        .await;
}

#[tokio::test]
async fn groups_of_another_cluster_secret_are_refused_until_theirs_agrees() {
    let harness = Harness::start(vec![Group::start("same", |_| Ok(say("same")))]).await;
    let other = Group::start("other", |_| Ok(say("other")));
    let of_another_secret = ClusterKeys::derive(&[2; 32]).cache_key_id().to_owned();
    // one that says nothing has no keys at all
    for cache_key_id in [of_another_secret.clone(), String::new()] {
        let record = GroupRecord { cache_key_id, ..other.record() };
        harness.changes.send(GroupChange::Put(Box::new(record))).await.expect("followed");
        harness.until("it is refused", |harness| harness.router.service().fleet().refused() == 1).await;
        assert_eq!(harness.router.service().fleet().view().groups().count(), 1);
    }
    let metrics = harness.get("/metrics").await.text;
    assert!(metrics.contains("bora_router_refused_groups 1"), "{metrics}");
    // it starts again with this cluster's secret
    let record = GroupRecord { epoch: 2, ..other.record() };
    harness.changes.send(GroupChange::Put(Box::new(record))).await.expect("followed");
    harness
        .until("it is taken", |harness| {
            let fleet = harness.router.service().fleet();
            fleet.refused() == 0 && fleet.view().groups().count() == 2
        })
        .await;
    // the secret is changed, and this group has the new one already
    let record = GroupRecord { epoch: 3, cache_key_id: of_another_secret, ..other.record() };
    harness.changes.send(GroupChange::Put(Box::new(record))).await.expect("followed");
    harness.until("it is gone", |harness| harness.router.service().fleet().view().groups().count() == 1).await;
}

/// The address of a group that died is taken by a group of another model, while the registry still lists the first one
/// (a lease that has not ended) or not any more.
#[tokio::test]
async fn a_recycled_address_never_serves_another_model() {
    let harness = Harness::start(vec![Group::start("first", |_| Ok(say("first")))]).await;
    assert_eq!(harness.post(CHAT, chat(false)).await.status, 200);
    harness.groups[0].kill();
    let address = harness.groups[0].endpoint.clone();
    let second = Group::start_at(&address, "second", "another-model", |_| Ok(say("second")));
    harness
        .until("the other server is noticed", |harness| {
            harness.router.service().fleet().view().groups().any(|group| group.link.is_mismatched())
        })
        .await;
    for _ in 0..5 {
        let completion = harness.post(CHAT, chat(false)).await;
        assert_eq!(completion.status, 503, "{}", completion.text);
    }
    assert!(second.seen().is_empty(), "it was asked for a model that it is not");
    let metrics = harness.get("/metrics").await.text;
    assert!(metrics.contains("bora_router_identity_mismatches_total{part=\"model\"}"), "{metrics}");

    // the second one is announced and the first one leaves the registry: only the first is gone
    harness.changes.send(GroupChange::Put(Box::new(second.record()))).await.expect("followed");
    harness.changes.send(GroupChange::Gone { model: MODEL.into(), group: "first".into() }).await.expect("followed");
    harness
        .until("the second one alone is there", |harness| {
            let view = harness.router.service().fleet().view();
            let names: Vec<_> = view.groups().map(|group| (group.record.group.clone(), group.is_ready())).collect();
            names == [("second".to_owned(), true)]
        })
        .await;
    let body = json!({"model": "another-model", "prompt": [1000, 1001], "max_tokens": 5});
    assert_eq!(harness.post("/v1/completions", body).await.status, 200);
    assert_ne!(harness.post(CHAT, chat(false)).await.status, 200);
    assert_eq!(second.seen().len(), 1);
}

/// The stream that a group died under continues elsewhere, and not on whoever came to its address.
#[tokio::test]
async fn a_stream_moves_past_a_recycled_address() {
    let gate = Gate::closed();
    let held = gate.clone();
    let first =
        Group::start("a", move |_| Ok(vec![Act::Start { cached: 0 }, Act::Ids(vec![1500]), Act::Hold(held.clone())]));
    let harness = Harness::start(vec![first]).await;
    let body = json!({"model": MODEL, "prompt": [1000, 1001], "max_tokens": 3, "return_token_ids": true});
    let asked = harness.post("/v1/completions", body);
    let swapped = async {
        harness.until("it streams", |harness| harness.groups[0].running() == 1).await;
        harness.groups[0].kill();
        let recycled = Group::start_at(&harness.groups[0].endpoint, "a", "another-model", |_| Ok(say("wrong")));
        let other = Group::start("b", |_| Ok(say_ids(&[1501, 1502], FinishReason::Length)));
        harness.changes.send(GroupChange::Put(Box::new(other.record()))).await.expect("followed");
        (recycled, other)
    };
    let (completion, (recycled, other)) = tokio::join!(asked, swapped);
    assert_eq!(completion.status, 200, "{}", completion.text);
    assert_eq!(completion.json()["choices"][0]["token_ids"], json!([1500, 1501, 1502]));
    assert_eq!((recycled.seen().len(), other.seen().len()), (0, 1));
}

#[tokio::test]
async fn a_group_of_contract_1_is_refused_by_name() {
    let harness = Harness::start(vec![Group::start("new", |_| Ok(say("new")))]).await;
    let old = Group::start("old", |_| Ok(say("old")));
    // as release 0.1 announced itself
    let mut record = serde_json::to_value(old.record()).expect("JSON");
    record.as_object_mut().expect("an object").remove("contract");
    record["version"] = "0.1.0".into();
    let record: bora_common::registry::GroupRecord = serde_json::from_value(record).expect("a record of 0.1");
    assert_eq!(record.contract, 1);
    harness.changes.send(GroupChange::Put(Box::new(record))).await.expect("followed");
    harness.until("it is refused", |harness| harness.router.service().fleet().refused() == 1).await;
    assert_eq!(harness.router.service().fleet().view().groups().count(), 1);
    assert_eq!(old.watches(), 0);
}
