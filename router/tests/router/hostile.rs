//! Groups that break the contract: what they send reaches neither clients nor the index, another group continues, and what
//! they claim to be does not become true.

use std::{sync::Arc, time::Duration};

use bora_common::registry::{Device, GroupChange, GroupRecord};
use bora_proto::v1::{
    FinishReason, Finished, GenerateRequest, Load, PositionLogprobs, Snapshot, Started, TokenLogprob, Tokens,
    generate_event::Event, group_event::Event as Update,
};
use bora_router::{ModelSpec, fleet::validate::record::ModelLimits};
use serde_json::{Value, json};
use tonic::Status;

use crate::support::*;

const COMPLETIONS: &str = "/v1/completions";
const PROMPT: [u32; 3] = [1, 1600, 1700];

fn body() -> Value {
    json!({"model": MODEL, "prompt": PROMPT, "max_tokens": 5, "return_token_ids": true})
}

fn started() -> Event {
    Event::Started(Started { prompt_tokens: 3, cached_tokens: 0, queued_seconds: 0.0 })
}

fn tokens(token_ids: &[u32]) -> Event {
    Event::Tokens(Tokens { token_ids: token_ids.to_vec(), logprobs: Vec::new() })
}

fn finished() -> Finished {
    let reason = FinishReason::Length as i32;
    Finished { reason, prompt_tokens: 3, cached_tokens: 0, completion_tokens: 0, timing: None }
}

/// A group that does this whatever it is asked.
fn hostile(name: &str, events: Vec<Event>) -> Group {
    let acts: Vec<Act> = events.into_iter().map(Act::Raw).chain([Act::Hang]).collect();
    Group::start(name, move |_| Ok(acts.clone()))
}

/// A group that has the right response: 1500 and so on.
fn good(name: &str) -> Group {
    good_as(name, 1, "none")
}

/// The same, of this epoch and with the weights of this fingerprint.
fn good_as(name: &str, epoch: u64, weights: &str) -> Group {
    Group::start_as("127.0.0.1:0", name, MODEL, epoch, weights, |request: &GenerateRequest| {
        let ids: Vec<u32> = (1500 + request.generated_len..1505).collect();
        Ok(say_ids(&ids, FinishReason::Length))
    })
}

/// Both groups of the harness are known; the second one looks busy.
async fn prefer_the_first(harness: &Harness) {
    harness.groups[1].report(Update::Load(Load { queued_prefill_tokens: 1_000_000, ..Load::default() }));
    harness
        .until("the load is known", |harness| {
            let view = harness.router.service().fleet().view();
            view.groups().any(|group| group.link.load_tracker.reported().queued_prefill_tokens == 1_000_000)
        })
        .await;
}

fn allows(harness: &Harness, name: &str) -> bool {
    let view = harness.router.service().fleet().view();
    view.groups().find(|group| group.link.group == name).is_some_and(|group| group.link.breaker.allows())
}

async fn violations(harness: &Harness, kind: &str) -> u64 {
    let metrics = harness.get("/metrics").await.text;
    let series = format!("bora_router_protocol_violations_total{{kind=\"{kind}\"}} ");
    let value = metrics.lines().find_map(|line| line.strip_prefix(&series)).unwrap_or_else(|| panic!("{metrics}"));
    value.parse().expect("a count")
}

#[tokio::test]
async fn a_stream_that_breaks_the_contract_goes_on_with_another_group() {
    let scored = |logprob| {
        let token = TokenLogprob { token_id: 1500, logprob, rank: 1 };
        PositionLogprobs { chosen: Some(token), top: Vec::new() }
    };
    let cached = Started { prompt_tokens: 3, cached_tokens: u32::MAX, queued_seconds: 0.0 };
    let nan = Tokens { token_ids: vec![1500], logprobs: vec![scored(f32::NAN)] };
    let cases: Vec<(&str, Vec<Event>)> = vec![
        ("too_many_tokens", vec![started(), tokens(&[1500; 6])]),
        ("too_large", vec![started(), tokens(&[u32::MAX; 100_000])]),
        ("order", vec![tokens(&[1500])]),
        ("order", vec![started(), started()]),
        ("order", vec![Event::Finished(finished())]),
        ("count", vec![Event::Started(cached)]),
        (
            "count",
            vec![started(), tokens(&[1500]), Event::Finished(Finished { completion_tokens: u32::MAX, ..finished() })],
        ),
        ("token_id", vec![started(), tokens(&[1500]), tokens(&[u32::MAX])]),
        ("logprobs", vec![started(), Event::Tokens(nan)]),
        ("finish_reason", vec![started(), Event::Finished(Finished { reason: 99, ..finished() })]),
    ];
    for (kind, events) in cases {
        let update = format!("{kind}: {events:?}").chars().take(200).collect::<String>();
        let harness = Harness::start(vec![hostile("bad", events), good("good")]).await;
        prefer_the_first(&harness).await;
        let response = harness.post(COMPLETIONS, body()).await;
        assert_eq!(response.status, 200, "{update}: {}", response.text);
        let json = response.json();
        assert_eq!(json["choices"][0]["token_ids"], json!([1500, 1501, 1502, 1503, 1504]), "{update}");
        assert_eq!(json["usage"]["completion_tokens"], 5, "{update}");
        assert_eq!(response.headers["x-bora-group"], "bad,good", "{update}");
        assert_eq!(violations(&harness, kind).await, 1, "{update}");
        assert!(!allows(&harness, "bad"), "{update}");
        harness.until("the bad stream is reset", |harness| harness.groups[0].cancelled() == 1).await;
    }
}

#[tokio::test]
async fn an_endless_stream_ends_at_max_tokens() {
    let endless = std::iter::once(started()).chain((0..10_000).map(|_| tokens(&[1500]))).collect();
    let harness = Harness::start(vec![hostile("endless", endless)]).await;
    let response = harness.post(COMPLETIONS, body()).await;
    assert_eq!(response.status, 200, "{}", response.text);
    assert_eq!(response.json()["choices"][0]["token_ids"], json!(vec![1500; 5]));
    assert_eq!(response.json()["choices"][0]["finish_reason"], "length");
    assert!(violations(&harness, "too_many_tokens").await >= 1);
}

#[tokio::test]
async fn a_client_reads_the_routers_own_text() {
    const SECRET: &str = "grammar: /etc/secret of 10.0.0.7";
    let statuses = [
        Status::invalid_argument(SECRET),
        Status::internal(SECRET),
        Status::unavailable(SECRET),
        Status::resource_exhausted(SECRET),
        Status::failed_precondition(SECRET),
        Status::unknown(SECRET),
        Status::permission_denied(SECRET),
    ];
    for status in statuses {
        for acts in [Err(status.clone()), Ok(vec![Act::Start { cached: 0 }, Act::Fail(status.clone())])] {
            let quick = bora_router::RouterOptions { failover_wait_seconds: 0.02, ..options() };
            let group = Group::start("only", move |_| acts.clone());
            let harness = Harness::with(quick, ModelSpec::new(tokenizer()), vec![group]).await;
            for more in [json!({}), json!({"stream": true}), json!({"guided_regex": "a+"})] {
                let mut body = body();
                body.as_object_mut().expect("an object").extend(more.as_object().cloned().expect("an object"));
                let response = harness.post(COMPLETIONS, body).await;
                assert!(!response.text.contains("secret") && !response.text.contains("10.0.0.7"), "{}", response.text);
                assert!(response.text.contains("\"error\""), "{status:?}: {}", response.text);
            }
        }
    }
}

#[tokio::test]
async fn the_index_holds_no_more_of_a_group_than_it_has() {
    let harness = Harness::start(vec![good("bad"), good("good")]).await;
    let index = |harness: &Harness| harness.router.service().fleet().index.len();
    let group = &harness.groups[0];
    // a thousand blocks are what its record says
    group.tell_hashes((0..1000).map(|at| at << 64 | (at + 1)));
    harness.until("its blocks are known", |harness| index(harness) == 1000).await;
    group.tell_hashes((2000..2001).map(|at| at << 64 | (at + 1)));
    harness.until("nothing of it is believed", |harness| index(harness) == 0).await;
    assert_eq!(violations(&harness, "blocks").await, 1);
    assert!(!allows(&harness, "bad") && allows(&harness, "good"));
    harness.until("it is asked again", |harness| harness.groups[0].watches() == 2).await;
    for update in [
        Update::Snapshot(Snapshot { block_hashes: vec![1; 16].into(), last: true }),
        Update::State(77),
        Update::Load(Load { prefill_seconds: f64::NAN, ..Load::default() }),
        Update::Load(Load { blocks_used: u32::MAX, ..Load::default() }),
    ] {
        let watches = harness.groups[0].watches();
        harness
            .until("it is watched", |harness| {
                harness.router.service().fleet().view().groups().all(|group| group.link.is_watched())
            })
            .await;
        harness.groups[0].report(update);
        harness.until("it is asked again", |harness| harness.groups[0].watches() > watches).await;
    }
    assert_eq!((violations(&harness, "order").await, violations(&harness, "load").await), (1, 3));
}

async fn put(harness: &Harness, record: GroupRecord) {
    harness.changes.send(GroupChange::Put(Box::new(record))).await.expect("followed");
}

#[tokio::test]
async fn a_record_widens_nothing_that_is_configured() {
    let spec = ModelSpec {
        limits: ModelLimits { max_model_len: Some(2048), vocabulary_size: Some(9192), ..ModelLimits::default() },
        ..ModelSpec::new(tokenizer())
    };
    let harness = Harness::with(options(), spec, vec![]).await;
    let group = good("a");
    let record = GroupRecord {
        device: Device::Cuda,
        max_model_len: 1 << 20,
        vocabulary_size: 1 << 20,
        aliases: vec!["gpt-4".into(), MODEL.into()],
        ..group.record()
    };
    put(&harness, record).await;
    harness.until("it is ready", |harness| harness.router.service().fleet().is_ready()).await;
    let models = harness.get("/v1/models").await.json();
    let names: Vec<&str> =
        models["data"].as_array().expect("a list").iter().filter_map(|model| model["id"].as_str()).collect();
    assert_eq!(names, [ALIAS, MODEL]);
    assert_eq!(models["data"][0]["max_model_len"], 2048);
    assert_eq!(harness.post(COMPLETIONS, json!({"model": "gpt-4", "prompt": "x"})).await.status, 404);
    // a group that calls itself by an alias of the model does not become it
    let thief = good("thief");
    put(&harness, GroupRecord { model: ALIAS.into(), ..thief.record() }).await;
    harness.until("both are known", |harness| harness.router.service().fleet().view().groups().count() == 2).await;
    for _ in 0..4 {
        let mut body = body();
        body["model"] = ALIAS.into();
        assert_eq!(harness.post(COMPLETIONS, body).await.headers["x-bora-group"], "a");
    }
}

#[tokio::test]
async fn a_record_that_cannot_be_is_refused_and_takes_nothing_from_others() {
    let harness = Harness::start(vec![good("a")]).await;
    let good_record = harness.groups[0].record();
    let bad = GroupRecord { kv_blocks: u32::MAX, epoch: 2, model: "other".into(), ..good_record.clone() };
    put(&harness, bad).await;
    let long = GroupRecord { group: "x".repeat(1 << 20), ..good_record.clone() };
    put(&harness, long).await;
    let gone = GroupChange::Gone { model: "third".into(), group: "a".into() };
    harness.changes.send(gone).await.expect("followed");
    harness.until("they are refused", |harness| harness.router.service().fleet().refused() == 2).await;
    assert_eq!(violations(&harness, "record").await, 2);
    let view = harness.router.service().fleet().view();
    assert!(view.groups().all(|group| group.link.group == "a" && group.link.is_announced()));
    assert_eq!(harness.post(COMPLETIONS, body()).await.status, 200);
}

#[tokio::test]
async fn groups_of_one_model_have_the_same_weights() {
    let harness = Harness::start(vec![good("a"), good("b")]).await;
    let other = good_as("other", 0, "evil");
    put(&harness, other.record()).await;
    harness.until("it is refused", |harness| harness.router.service().fleet().refused() == 1).await;
    assert_eq!(violations(&harness, "weights").await, 1);
    for _ in 0..8 {
        assert_eq!(harness.post(COMPLETIONS, body()).await.json()["choices"][0]["token_ids"][0], 1500);
    }
    assert!(other.seen().is_empty());
    // when the others are gone it is what there is
    for group in &harness.groups {
        group.kill();
        let gone = GroupChange::Gone { model: MODEL.into(), group: group.name.clone() };
        harness.changes.send(gone).await.expect("followed");
    }
    harness
        .until("it serves", |harness| {
            let fleet = harness.router.service().fleet();
            fleet.refused() == 0 && fleet.is_ready()
        })
        .await;
}

#[tokio::test]
async fn a_pinned_model_has_only_these_weights() {
    let limits = ModelLimits { weight_fingerprint: Some("none".into()), ..ModelLimits::default() };
    let spec = ModelSpec { limits, ..ModelSpec::new(tokenizer()) };
    let harness = Harness::with(options(), spec, vec![]).await;
    let (first, pinned) = (good("first"), good("pinned"));
    put(&harness, GroupRecord { weight_fingerprint: "evil".into(), ..first.record() }).await;
    put(&harness, pinned.record()).await;
    harness.until("the pinned one serves", |harness| harness.router.service().fleet().is_ready()).await;
    assert_eq!(harness.post(COMPLETIONS, body()).await.headers["x-bora-group"], "pinned");
    assert_eq!((harness.router.service().fleet().refused(), first.seen().len()), (1, 0));
}

#[tokio::test]
async fn a_name_belongs_to_the_first_group_until_it_is_gone() {
    let harness = Harness::start(vec![good("a")]).await;
    let other = good("a");
    put(&harness, GroupRecord { model: "other".into(), epoch: 9, ..other.record() }).await;
    harness.until("it is counted", |harness| harness.router.service().fleet().duplicates() == 1).await;
    assert!(harness.get("/metrics").await.text.contains("bora_router_duplicate_groups 1"));
    assert_eq!(harness.post(COMPLETIONS, body()).await.status, 200);
    assert!(other.seen().is_empty());
    harness.groups[0].kill();
    let gone = GroupChange::Gone { model: MODEL.into(), group: "a".into() };
    harness.changes.send(gone).await.expect("followed");
    harness
        .until("the other one has the name", |harness| {
            let fleet = harness.router.service().fleet();
            fleet.duplicates() == 0 && fleet.view().groups().any(|group| group.record.model == "other")
        })
        .await;
}

/// The only group of a model restarts: what comes meanwhile waits for it.
#[tokio::test]
async fn requests_wait_for_a_group_that_is_expected() {
    let wait = bora_router::RouterOptions { wait_for_group_seconds: 60.0, ..options() };
    let harness = Arc::new(Harness::with(wait, ModelSpec::new(tokenizer()), vec![good("a")]).await);
    harness.groups[0].kill();
    let gone = GroupChange::Gone { model: MODEL.into(), group: "a".into() };
    harness.changes.send(gone).await.expect("followed");
    harness.until("it is gone", |harness| harness.router.service().fleet().view().groups().count() == 0).await;
    let requests: Vec<_> = (0..20)
        .map(|_| {
            let harness = Arc::clone(&harness);
            tokio::spawn(async move { harness.post(COMPLETIONS, body()).await })
        })
        .collect();
    harness.until("they wait", |harness| harness.router.service().fleet().room.waiting() == 20).await;
    let metrics = harness.get("/metrics").await.text;
    assert!(metrics.contains(&format!("bora_router_unserved_requests_total{{model=\"{MODEL}\"}} 20")), "{metrics}");
    let next = good_as("a", 2, "none");
    put(&harness, next.record()).await;
    for request in requests {
        let response = request.await.expect("no panic");
        assert_eq!(response.status, 200, "{}", response.text);
    }
}

/// The router sees the group as ready while the group already drains: the request waits for the next start.
#[tokio::test]
async fn a_refused_request_waits_for_the_next_start_of_its_group() {
    let wait = bora_router::RouterOptions { wait_for_group_seconds: 60.0, ..options() };
    let draining = Group::start("a", |_| Err(Status::unavailable("the group is draining")));
    let harness = Arc::new(Harness::with(wait, ModelSpec::new(tokenizer()), vec![draining]).await);
    let request = {
        let harness = Arc::clone(&harness);
        tokio::spawn(async move { harness.post(COMPLETIONS, body()).await })
    };
    harness.until("the group refused it", |harness| !harness.groups[0].seen().is_empty()).await;
    let next = good_as("a", 2, "none");
    put(&harness, next.record()).await;
    let response = request.await.expect("no panic");
    assert_eq!(response.status, 200, "{}", response.text);
}

/// No longer than the time that is set, and not at all for a model that never had a group.
#[tokio::test]
async fn a_wait_for_a_group_has_an_end() {
    let wait = bora_router::RouterOptions { wait_for_group_seconds: 0.3, ..options() };
    let never = Harness::with(
        bora_router::RouterOptions { wait_for_group_seconds: 600.0, ..wait.clone() },
        ModelSpec::new(tokenizer()),
        vec![],
    )
    .await;
    let response =
        tokio::time::timeout(Duration::from_secs(60), never.post(COMPLETIONS, body())).await.expect("at once");
    assert_eq!(response.status, 503);
    assert!(response.headers.contains_key("retry-after"));
    let harness = Harness::with(wait, ModelSpec::new(tokenizer()), vec![good("a")]).await;
    harness.groups[0].report(Update::State(bora_proto::v1::State::Draining as i32));
    harness.until("it drains", |harness| !harness.router.service().fleet().is_ready()).await;
    let began = std::time::Instant::now();
    let response = harness.post(COMPLETIONS, body()).await;
    assert_eq!(response.status, 503, "{}", response.text);
    assert!(response.headers.contains_key("retry-after") && began.elapsed() >= Duration::from_millis(300));
}
