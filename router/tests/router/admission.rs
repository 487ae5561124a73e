//! Requests that no group can start now: who waits, who goes first, who is refused. Groups hold their sequences until the test
//! lets them go, so that no pause decides anything.

use std::sync::Arc;

use crate::support::*;
use bora_router::RouterOptions;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
/// More than any test sends.
const ALL: usize = 1_000;

/// A router over groups that run one sequence at a time, each until its group's gate lets it go.
async fn one_at_a_time<const N: usize>(names: [&str; N], options: RouterOptions) -> (Arc<Harness>, [Gate; N]) {
    let gates = names.map(|_| Gate::closed());
    let groups = names
        .iter()
        .zip(&gates)
        .map(|(name, gate)| {
            let gate = gate.clone();
            let mut group = Group::start(name, move |_| {
                let mut acts = say("ok");
                acts.insert(1, Act::Hold(gate.clone()));
                Ok(acts)
            });
            group.max_sequences = 1;
            group
        })
        .collect();
    (Arc::new(Harness::with(options, bora_router::ModelSpec::new(tokenizer()), groups).await), gates)
}

fn chat(text: &str, priority: Value) -> Value {
    json!({"model": MODEL, "messages": [{"role": "user", "content": text}], "priority": priority})
}

/// Sends a request for a tenant and returns when it runs or waits.
async fn send(harness: &Arc<Harness>, tenant: &str, body: Value) -> tokio::task::JoinHandle<Answered> {
    let before = standing(harness);
    let for_task = Arc::clone(harness);
    let key = format!("Bearer {tenant}");
    let task =
        tokio::spawn(async move { for_task.request("POST", CHAT, &[("authorization", &key)], body.to_string()).await });
    harness.until("the request is under way", |harness| standing(harness) > before).await;
    task
}

/// Requests that were sent to a group or wait.
fn standing(harness: &Harness) -> usize {
    let seen: usize = harness.groups.iter().map(|group| group.seen().len()).sum();
    seen + harness.router.service().fleet().room.waiting()
}

/// The texts in the order in which the groups got them.
fn order(harness: &Harness) -> Vec<String> {
    let seen = harness.groups[0].seen();
    seen.iter().map(|request| tokenizer().decode(&request.token_ids, true).trim().to_string()).collect()
}

#[tokio::test]
async fn what_has_no_room_waits_in_the_router_and_goes_where_room_comes_first() {
    let (harness, [one, other]) = one_at_a_time(["a", "b"], options()).await;
    let mut tasks = Vec::new();
    for number in 0..6 {
        tasks.push(send(&harness, "t", chat(&number.to_string(), Value::Null)).await);
    }
    let each = |harness: &Harness| [harness.groups[0].seen().len(), harness.groups[1].seen().len()];
    assert_eq!(each(&harness), [1, 1], "one on each group, the others wait here");
    // wherever a sequence ends, the next one goes
    for (gate, expected) in [(&one, [2, 1]), (&one, [3, 1]), (&other, [3, 2]), (&one, [4, 2])] {
        gate.open(1);
        harness
            .until("the next one is sent", |harness| {
                each(harness).iter().sum::<usize>() == expected.iter().sum::<usize>()
            })
            .await;
        assert_eq!(each(&harness), expected);
    }
    assert_eq!(harness.router.service().fleet().room.waiting(), 0);
    one.open(ALL);
    other.open(ALL);
    for task in tasks {
        assert_eq!(task.await.expect("joined").status, 200);
    }
    assert_eq!(each(&harness), [4, 2]);
}

#[tokio::test]
async fn interactive_goes_before_batch() {
    let (harness, [gate]) = one_at_a_time(["a"], options()).await;
    let mut tasks = vec![send(&harness, "t", chat("first", Value::Null)).await];
    for (text, priority) in [("batch", json!("batch")), ("later", json!(7)), ("soon", json!("interactive"))] {
        tasks.push(send(&harness, "t", chat(text, priority)).await);
    }
    let metrics = harness.get("/metrics").await.text;
    let in_line = |what: &str, class: &str| -> u64 {
        let start = format!("bora_router_waiting_{what}{{model=\"{MODEL}\",class=\"{class}\"}} ");
        let line = metrics.lines().find_map(|line| line.strip_prefix(&start)).expect("a series of each class");
        line.parse().expect("a number")
    };
    assert_eq!((in_line("sequences", "interactive"), in_line("sequences", "batch")), (1, 2));
    let (interactive, batch) = (in_line("tokens", "interactive"), in_line("tokens", "batch"));
    assert!(interactive > 0 && batch > interactive, "{interactive} {batch}");
    gate.open(ALL);
    for task in tasks {
        assert_eq!(task.await.expect("joined").status, 200);
    }
    assert_eq!(order(&harness), ["first", "soon", "batch", "later"]);
    let refused = harness.post(CHAT, chat("x", json!("urgent"))).await;
    assert_eq!((refused.status, refused.json()["error"]["param"].clone()), (400, json!("priority")));
}

#[tokio::test]
async fn tenants_take_turns() {
    let (harness, [gate]) = one_at_a_time(["a"], options()).await;
    let mut tasks = vec![send(&harness, "many", chat("m0", Value::Null)).await];
    for number in 1..5 {
        tasks.push(send(&harness, "many", chat(&format!("m{number}"), Value::Null)).await);
    }
    tasks.push(send(&harness, "few", chat("f0", Value::Null)).await);
    gate.open(ALL);
    for task in tasks {
        assert_eq!(task.await.expect("joined").status, 200);
    }
    let order = order(&harness);
    let place = order.iter().position(|text| text == "f0").expect("it ran");
    assert!(place <= 2, "{order:?}");
}

#[tokio::test]
async fn who_leaves_while_waiting_is_never_sent_and_a_full_line_is_a_429() {
    let (harness, [gate]) = one_at_a_time(["a"], RouterOptions { max_waiting: 1, ..options() }).await;
    let first = send(&harness, "t", chat("first", Value::Null)).await;
    let migration = send(&harness, "t", chat("leaves", Value::Null)).await;
    let refused = harness.post(CHAT, chat("too many", Value::Null)).await;
    assert_eq!(refused.status, 429, "{}", refused.text);
    assert!(refused.headers.contains_key("retry-after"));
    migration.abort();
    harness.until("its place in line is free", |harness| harness.router.service().fleet().room.waiting() == 0).await;
    let last = send(&harness, "t", chat("last", Value::Null)).await;
    gate.open(ALL);
    assert_eq!(first.await.expect("joined").status, 200);
    assert_eq!(last.await.expect("joined").status, 200);
    assert_eq!(order(&harness), ["first", "last"]);
}

/// A router whose queue is full, and the requests that are under way: the first one runs.
async fn full_queue(tenant: &str, class: &str, places: usize) -> (Arc<Harness>, Gate, Vec<Sent>) {
    let (harness, [gate]) = one_at_a_time(["a"], RouterOptions { max_waiting: places, ..options() }).await;
    let mut sent = vec![send(&harness, tenant, chat("first", Value::Null)).await];
    for number in 0..places {
        sent.push(send(&harness, tenant, chat(&format!("{tenant}{number}"), json!(class))).await);
    }
    (harness, gate, sent)
}

type Sent = tokio::task::JoinHandle<Answered>;

/// Sends a request that takes the place of another one.
async fn send_into_full(harness: &Arc<Harness>, tenant: &str, text: &str, class: &str) -> Sent {
    let (key, body) = (format!("Bearer {tenant}"), chat(text, json!(class)));
    let for_task = Arc::clone(harness);
    tokio::spawn(async move { for_task.request("POST", CHAT, &[("authorization", &key)], body.to_string()).await })
}

/// What became of requests when the group continues: texts that ran, in their order, and how many were refused.
async fn end(harness: &Harness, gate: &Gate, sent: Vec<Sent>) -> (Vec<String>, usize) {
    gate.open(ALL);
    let mut refused = 0;
    for task in sent {
        let answered = task.await.expect("joined");
        if answered.status == 429 {
            assert!(answered.headers.contains_key("retry-after"), "{}", answered.text);
            assert_eq!(answered.json()["error"]["code"], "overloaded");
            refused += 1;
        } else {
            assert_eq!(answered.status, 200, "{}", answered.text);
        }
    }
    (order(harness), refused)
}

#[tokio::test]
async fn one_tenant_s_batch_queue_locks_nobody_out() {
    let (harness, gate, mut sent) = full_queue("m", "batch", 6).await;
    // its own requests have no place in it, another tenant's have: interactive ones and batch ones
    let own = send_into_full(&harness, "m", "own", "batch").await;
    assert_eq!(own.await.expect("joined").status, 429);
    for (text, class) in [("soon", "interactive"), ("later", "batch"), ("last", "batch")] {
        let before = sent.iter().filter(|task| task.is_finished()).count();
        sent.push(send_into_full(&harness, "few", text, class).await);
        while sent.iter().filter(|task| task.is_finished()).count() == before {
            tokio::task::yield_now().await;
        }
        assert!(!sent[sent.len() - 1].is_finished(), "{text} waits");
    }
    // three places are the tenant's share
    let beyond = send_into_full(&harness, "few", "beyond", "batch").await;
    assert_eq!(beyond.await.expect("joined").status, 429);
    let (order, refused) = end(&harness, &gate, sent).await;
    assert_eq!(refused, 3);
    assert_eq!(order[..2], ["first", "soon"]);
    for (text, ran) in [("later", true), ("last", true), ("m0", true), ("m2", true), ("m3", false), ("m5", false)] {
        assert_eq!(order.iter().any(|one| one == text), ran, "{text}: {order:?}");
    }
}

#[tokio::test]
async fn interactive_requests_displace_batch_requests_of_their_own_tenant() {
    let (harness, gate, mut sent) = full_queue("m", "batch", 2).await;
    for text in ["soon", "sooner"] {
        sent.push(send_into_full(&harness, "m", text, "interactive").await);
    }
    harness.until("the batch requests left", |_| sent[1].is_finished() && sent[2].is_finished()).await;
    let third = send_into_full(&harness, "m", "third", "interactive").await;
    assert_eq!(third.await.expect("joined").status, 429);
    let (order, refused) = end(&harness, &gate, sent).await;
    assert_eq!((order.len(), refused), (3, 2), "{order:?}");
    assert!(order.contains(&"soon".to_owned()) && order.contains(&"sooner".to_owned()), "{order:?}");
}

#[tokio::test]
async fn one_tenant_s_interactive_queue_locks_nobody_out() {
    let (harness, gate, mut sent) = full_queue("m", "interactive", 4).await;
    for text in ["one", "two"] {
        sent.push(send_into_full(&harness, "few", text, "interactive").await);
    }
    harness.until("two made room", |_| sent[3].is_finished() && sent[4].is_finished()).await;
    let batch = send_into_full(&harness, "few", "batch", "batch").await;
    assert_eq!(batch.await.expect("joined").status, 429, "it has its share");
    let (order, refused) = end(&harness, &gate, sent).await;
    assert_eq!((order.len(), refused), (5, 2), "{order:?}");
}

#[tokio::test]
async fn waiting_has_an_end() {
    let (harness, [gate]) = one_at_a_time(["a"], RouterOptions { max_waiting_seconds: 0.05, ..options() }).await;
    let first = send(&harness, "t", chat("first", Value::Null)).await;
    let waited = harness.post(CHAT, chat("second", Value::Null)).await;
    assert_eq!(waited.status, 429, "{}", waited.text);
    gate.open(ALL);
    assert_eq!(first.await.expect("joined").status, 200);
}
