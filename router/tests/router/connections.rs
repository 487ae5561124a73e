//! Connections of the real server: what clients do with sockets, and what each state of a connection ends in.

use std::{net::SocketAddr, time::Duration};

use bora_common::config::ByteSize;
use bora_proto::v1::FinishReason;
use bora_router::{AccessOptions, HttpOptions, ModelSpec, RouterOptions};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::oneshot,
};

use crate::support::*;

const CHAT: &str = "/v1/chat/completions";
const KEYS: &str = "tenants:\n\
    - {name: one, parallel_requests: 2, keys: [{sha256: 2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683}]}\n\
    - {name: two, models: [other], keys: [{sha256: ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad}]}\n";

/// A router that listens.
struct Served {
    address: SocketAddr,
    service: std::sync::Weak<bora_router::Service>,
    groups: Vec<Group>,
    stop: Option<oneshot::Sender<()>>,
    server: tokio::task::JoinHandle<std::io::Result<()>>,
    _changes: tokio::sync::mpsc::Sender<bora_common::registry::GroupChange>,
    _keys: Option<tempfile::NamedTempFile>,
}

impl Served {
    async fn start(mut options: RouterOptions, keys: Option<&str>, group: Group) -> Self {
        let keys = keys.map(|text| {
            let file = tempfile::NamedTempFile::new().expect("a file");
            std::fs::write(file.path(), text).expect("written");
            options.access = AccessOptions { keys: Some(file.path().into()), ..AccessOptions::default() };
            file
        });
        let Harness { router, changes, groups } =
            Harness::with(options, ModelSpec::new(tokenizer()), vec![group]).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let service = std::sync::Arc::downgrade(router.service());
        let (stop, stopped) = oneshot::channel::<()>();
        let server = tokio::spawn(router.serve(listener, None, async move {
            let _ = stopped.await;
        }));
        Self { address, service, groups, stop: Some(stop), server, _changes: changes, _keys: keys }
    }

    async fn saying(http: HttpOptions) -> Self {
        Self::start(RouterOptions { http, ..options() }, None, Group::start("only", |_| Ok(say("yes")))).await
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.expect("connected")
    }

    /// Sends bytes on a new connection and reads until its end.
    async fn exchange(&self, bytes: impl AsRef<[u8]>) -> Reply {
        let mut client = self.connect().await;
        client.write_all(bytes.as_ref()).await.expect("sent");
        Reply::read(&mut client).await
    }

    fn metrics(&self) -> String {
        self.service.upgrade().expect("it runs").metrics_text()
    }

    async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        for _ in 0..3_000 {
            if holds(self) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("it did not come true that {what}");
    }

    fn stop(&mut self) {
        self.stop.take().expect("once").send(()).expect("it runs");
    }
}

/// Everything that came until the connection's end.
#[derive(Debug)]
struct Reply {
    status: u16,
    head: String,
    body: String,
}

impl Reply {
    async fn read(client: &mut TcpStream) -> Self {
        let mut bytes = Vec::new();
        let reading = tokio::time::timeout(Duration::from_secs(60), client.read_to_end(&mut bytes)).await;
        reading.expect("the connection ends").expect("and is not reset");
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or(("", ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        Self { status, head: head.to_owned(), body: body.to_owned() }
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

fn body(more: Value) -> String {
    let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5});
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    body.to_string()
}

fn post(headers: &str, body: &str) -> String {
    post_of_length(headers, body.len()) + body
}

fn post_of_length(headers: &str, length: usize) -> String {
    format!(
        "POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n{headers}\r\n"
    )
}

const CLOSE: &str = "connection: close\r\n";

fn quick() -> HttpOptions {
    HttpOptions {
        keep_alive_seconds: 0.4,
        read_timeout_seconds: 0.4,
        write_timeout_seconds: 0.4,
        ..HttpOptions::default()
    }
}

#[tokio::test]
async fn heads_that_are_no_good_are_refused_in_json() {
    let served = Served::saying(HttpOptions::default()).await;
    let headers = |count: usize| (0..count).map(|number| format!("x-{number}: a\r\n")).collect::<String>();
    let get = |target: &str, headers: &str| format!("GET {target} HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n");
    for (what, head, status) in [
        ("101 headers", get("/v1/models", &headers(100)), 431),
        ("1,000 headers", get("/v1/messages", &headers(999)), 431),
        ("a header of 70 kB", get("/health", &format!("x: {}\r\n", "a".repeat(70_000))), 431),
        ("a megabyte of headers", get("/health", &format!("x: {}\r\n", "a".repeat(1_000_000))), 431),
        ("70 kB without an end", format!("GET / HTTP/1.1\r\nx: {}", "a".repeat(70_000)), 431),
        ("a target of 65,535 bytes", get(&format!("/{}", "a".repeat(65_534)), ""), 431),
        ("no HTTP", "\x16\x03\x01\x02\x00\x01\x00\r\n\r\n".to_owned(), 400),
        ("no colon", get("/health", "x\r\n"), 400),
        ("two lengths", get("/health", "content-length: 1\r\ncontent-length: 2\r\n"), 400),
    ] {
        let reply = served.exchange(head).await;
        assert_eq!(reply.status, status, "{what}: {reply:?}");
        let json = reply.json();
        assert_eq!(json["type"], "error", "{what}: Anthropic's form");
        let error = &json["error"];
        assert!(error["message"].is_string() && error["code"].is_string() && error.get("param").is_some(), "{what}");
        assert!(reply.head.contains("connection: close") && reply.head.contains("x-request-id: "), "{reply:?}");
    }
    let fine = served.exchange(get("/health", &(headers(98) + CLOSE))).await;
    assert_eq!(fine.status, 200, "100 headers are fine");
    assert!(served.metrics().contains("bora_router_http_refusals_total{reason=\"head\"} 9"), "{}", served.metrics());
}

#[tokio::test]
async fn every_state_of_a_connection_has_a_deadline() {
    let served = Served::saying(quick()).await;
    let mut idle = served.connect().await;
    let nothing = Reply::read(&mut idle).await;
    assert_eq!((nothing.status, nothing.head.as_str()), (0, ""), "one that says nothing is closed without a word");
    let late = served.exchange(format!("POST {CHAT} HTTP/1.1\r\nhost: loc")).await;
    assert_eq!((late.status, &late.json()["error"]["code"]), (408, &json!("request_timeout")), "half a head");
    let late = served.exchange(post_of_length("", 1000) + "{").await;
    assert_eq!((late.status, &late.json()["error"]["code"]), (408, &json!("request_timeout")), "half a body");
    let late = served.exchange(post_of_length("expect: 100-continue\r\n", 1000)).await;
    assert_eq!(late.status, 100, "no body");
    assert!(late.body.starts_with("HTTP/1.1 408 "), "{late:?}");
    // a head that comes byte by byte is as late as one that stops
    let mut slow = served.connect().await;
    let head = post_of_length("", 2);
    let (mut reading, mut writing) = slow.split();
    let trickle = async {
        for byte in head.as_bytes() {
            if writing.write_all(&[*byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let mut text = String::new();
    let (_, read) = tokio::join!(trickle, reading.read_to_string(&mut text));
    assert!(read.is_ok() && text.starts_with("HTTP/1.1 408 "), "{text}");
}

#[tokio::test]
async fn a_connection_without_a_next_request_is_closed() {
    let served = Served::saying(HttpOptions { keep_alive_seconds: 1.0, ..HttpOptions::default() }).await;
    let reply = served.exchange(post("", &body(json!({})))).await;
    assert_eq!(reply.status, 200, "and the connection has ended: {reply:?}");
}

#[tokio::test]
async fn the_pause_between_two_requests_does_not_count_for_the_second() {
    let served = Served::saying(HttpOptions { keep_alive_seconds: 60.0, ..quick() }).await;
    let mut client = served.connect().await;
    for _ in 0..2 {
        client.write_all(post("", &body(json!({}))).as_bytes()).await.expect("sent");
        let mut bytes = [0; 8192];
        let count = client.read(&mut bytes).await.expect("an answer");
        assert!(bytes[..count].starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&bytes[..count]));
        tokio::time::sleep(Duration::from_millis(800)).await;
    }
}

/// Responses that fill every buffer on the way, of which nothing is read.
#[tokio::test]
async fn a_client_that_takes_nothing_is_disconnected() {
    let served = Served::saying(HttpOptions { keep_alive_seconds: 60.0, ..quick() }).await;
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4096).expect("a small buffer");
    let mut client = socket.connect(served.address).await.expect("connected");
    let requests = "GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n".repeat(500);
    client.write_all(requests.as_bytes()).await.expect("sent");
    let gone =
        |served: &Served| served.metrics().contains("bora_router_http_refusals_total{reason=\"write_timeout\"} 1");
    served.until("it is disconnected", gone).await;
    served.until("it is forgotten", |served| served.metrics().contains("bora_router_http_connections 0")).await;
}

#[tokio::test]
async fn a_tenants_slots_are_taken_before_bodies_are_read() {
    let served = Served::start(options(), Some(KEYS), Group::start("only", |_| Ok(say("yes")))).await;
    let key = "authorization: Bearer key\r\n";
    let mut slow = Vec::new();
    for _ in 0..2 {
        let mut client = served.connect().await;
        client.write_all(post_of_length(key, 30 << 20).as_bytes()).await.expect("sent");
        client.write_all(&vec![b' '; 300_000]).await.expect("sent");
        slow.push(client);
    }
    let bytes = |served: &Served| {
        let text = served.metrics();
        let line = text.lines().find_map(|line| line.strip_prefix("bora_router_http_body_bytes ")).expect("the gauge");
        line.parse::<u64>().expect("a number")
    };
    served.until("both are being read", |served| bytes(served) >= 600_000).await;
    assert!(bytes(&served) < 4 << 20, "what has not come takes no memory");
    let third = served.exchange(post_of_length(&format!("{key}{CLOSE}"), 30 << 20)).await;
    assert_eq!(
        (third.status, &third.json()["error"]["type"]),
        (429, &json!("rate_limit_error")),
        "with its body unread"
    );
    let unknown = served.exchange(post_of_length("authorization: Bearer no\r\n", 30 << 20)).await;
    assert_eq!(unknown.status, 401, "with its body unread");
    drop(slow);
    served.until("the memory is given back", |served| bytes(served) == 0).await;
    let fine = served.exchange(post(&format!("{key}{CLOSE}"), &body(json!({})))).await;
    assert_eq!(fine.status, 200, "{fine:?}");
}

#[tokio::test]
async fn memory_for_bodies_is_bounded() {
    let http = HttpOptions {
        max_body_memory: ByteSize(1 << 20),
        max_tenant_body_memory: ByteSize(1 << 20),
        ..HttpOptions::default()
    };
    let options = RouterOptions { http, max_body_bytes: 1 << 20, ..options() };
    let served = Served::start(options, None, Group::start("only", |_| Ok(say("yes")))).await;
    let mut large = served.connect().await;
    large.write_all(post_of_length("", 1 << 20).as_bytes()).await.expect("sent");
    large.write_all(&vec![b' '; 600_000]).await.expect("sent");
    served.until("it is read", |served| served.metrics().contains("bora_router_http_body_bytes 1048576\n")).await;
    let filler = "x".repeat(500_000);
    let refused = served.exchange(post(CLOSE, &filler)).await;
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (503, &json!("unavailable")));
    assert!(refused.head.contains("retry-after: 1"), "{refused:?}");
    // a client that sends all of a body that is too large sees the refusal, not a reset
    let too_large = served.exchange(post("", &" ".repeat(4 << 20))).await;
    assert_eq!((too_large.status, &too_large.json()["error"]["code"]), (413, &json!("request_too_large")));
}

#[tokio::test]
async fn connections_beyond_the_limit_are_answered_with_503_and_probes_as_always() {
    let gate = Gate::closed();
    let held = gate.clone();
    let group = Group::start("only", move |_| {
        let mut acts = vec![Act::Start { cached: 0 }, Act::Ids(vec![1500]), Act::Hold(held.clone())];
        acts.extend([Act::Ids(vec![EOS]), Act::Finish(FinishReason::Stop)]);
        Ok(acts)
    });
    let http = HttpOptions { max_connections: 2, ..HttpOptions::default() };
    let served = Served::start(RouterOptions { http, ..options() }, None, group).await;
    let mut streaming = served.connect().await;
    streaming.write_all(post("", &body(json!({"stream": true}))).as_bytes()).await.expect("sent");
    let mut idle = served.connect().await;
    served.until("both are there", |served| served.metrics().contains("bora_router_http_connections 2")).await;
    served.until("it streams", |served| served.groups[0].running() == 1).await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let refused = served.exchange(post("", &body(json!({})))).await;
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (503, &json!("unavailable")));
    assert!(refused.head.contains("retry-after: ") && refused.head.contains("connection: close"), "{refused:?}");
    let mut closed = Vec::new();
    idle.read_to_end(&mut closed).await.expect("the idle one makes room");
    assert!(closed.is_empty());
    served.until("there is room", |served| served.metrics().contains("bora_router_http_connections 1")).await;
    let health = served.exchange(format!("GET /health HTTP/1.1\r\nhost: localhost\r\n{CLOSE}\r\n")).await;
    assert_eq!(health.status, 200);
    gate.open(1);
    let mut text = String::new();
    while !text.contains("data: [DONE]") {
        let mut bytes = [0; 4096];
        let count = streaming.read(&mut bytes).await.expect("the stream beside is whole");
        assert_ne!(count, 0, "{text}");
        text.push_str(&String::from_utf8_lossy(&bytes[..count]));
    }
}

#[tokio::test]
async fn the_end_of_the_grace_period_ends_streams_with_an_error_and_requests_with_503() {
    let group = Group::start("only", |_| Ok(vec![Act::Start { cached: 0 }, Act::Ids(vec![1500]), Act::Hang]));
    let options = RouterOptions { shutdown_grace_seconds: 1.5, ..options() };
    let mut served = Served::start(options, None, group).await;
    let mut clients = Vec::new();
    for (path, more) in [(CHAT, json!({"stream": true})), (CHAT, json!({})), ("/v1/messages", json!({"stream": true}))]
    {
        let text = body(more);
        let mut client = served.connect().await;
        client.write_all(post("", &text).replacen(CHAT, path, 1).as_bytes()).await.expect("sent");
        clients.push(client);
    }
    let mut reading = served.connect().await;
    reading.write_all((post_of_length("", 1000) + "{").as_bytes()).await.expect("sent");
    let mut idle = served.connect().await;
    served.until("all run", |served| served.groups[0].running() == 3).await;
    served.until("all are there", |served| served.metrics().contains("bora_router_http_connections 5")).await;
    served.stop();
    // a request that was on its way is served, and its client is notified that there is no next one
    tokio::time::sleep(Duration::from_millis(50)).await;
    idle.write_all(b"GET /ready HTTP/1.1\r\nhost: localhost\r\n\r\n").await.expect("sent");
    let ready = Reply::read(&mut idle).await;
    assert_eq!(ready.status, 503, "a server that stops is not ready");
    assert!(ready.head.contains("connection: close"), "{ready:?}");
    let mut replies = Vec::new();
    for client in clients.iter_mut().chain([&mut reading]) {
        replies.push(Reply::read(client).await);
    }
    let [stream, plain, messages, reading] = &replies[..] else { panic!("four") };
    assert_eq!(stream.status, 200);
    assert!(stream.body.contains("data: {\"error\":{\"message\":\"The server is shutting down"), "{stream:?}");
    assert!(!stream.body.contains("[DONE]") && stream.body.ends_with("0\r\n\r\n"), "whole as HTTP, not as an answer");
    assert_eq!((plain.status, &plain.json()["error"]["code"]), (503, &json!("unavailable")));
    assert!(messages.body.contains("event: error\n") && messages.body.contains("overloaded_error"), "{messages:?}");
    assert_eq!(reading.status, 503);
    assert!(served.server.await.expect("joined").is_ok());
}

#[tokio::test]
async fn a_server_without_keys_is_not_for_foreign_pages() {
    let served = Served::saying(HttpOptions::default()).await;
    let text = body(json!({}));
    let host = |host: &str| {
        format!(
            "POST {CHAT} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n{CLOSE}content-length: {}\r\n\r\n{text}",
            text.len()
        )
    };
    for (what, request, status, code) in [
        ("a name of the server", host("localhost"), 200, Value::Null),
        ("an address of the server", host("127.0.0.1:8000"), 200, Value::Null),
        ("a name of somebody else", host("evil.example"), 403, json!("host_not_allowed")),
        (
            "an absolute target",
            host("localhost").replacen("/v1", "http://evil.example/v1", 1),
            403,
            json!("host_not_allowed"),
        ),
        ("two hosts", post(&format!("host: evil.example\r\n{CLOSE}"), &text), 400, Value::Null),
        (
            "a foreign origin",
            post(&format!("origin: https://evil.example\r\n{CLOSE}"), &text),
            403,
            json!("origin_not_allowed"),
        ),
        ("no origin", post(&format!("origin: null\r\n{CLOSE}"), &text), 403, json!("origin_not_allowed")),
        ("its own origin", post(&format!("origin: http://localhost\r\n{CLOSE}"), &text), 200, Value::Null),
        (
            "another site",
            post(&format!("sec-fetch-site: cross-site\r\n{CLOSE}"), &text),
            403,
            json!("origin_not_allowed"),
        ),
        ("the same site", post(&format!("sec-fetch-site: same-origin\r\n{CLOSE}"), &text), 200, Value::Null),
    ] {
        let reply = served.exchange(request).await;
        assert_eq!(reply.status, status, "{what}: {reply:?}");
        assert_eq!(reply.json()["error"]["code"], code, "{what}: {reply:?}");
    }
    let link = "GET / HTTP/1.1\r\nhost: localhost\r\nsec-fetch-site: cross-site\r\nsec-fetch-mode: navigate\r\nsec-fetch-dest: document\r\nconnection: close\r\n\r\n";
    assert_eq!(served.exchange(link).await.status, 200, "a link to the console");
    let framed = link.replace("document", "iframe");
    assert_eq!(served.exchange(framed).await.status, 403);
    let reply = served.exchange(host("evil.example").replacen(CHAT, "/v1/messages", 1)).await;
    assert_eq!((reply.status, &reply.json()["type"]), (403, &json!("error")), "in Anthropic's form");
    let reply = served.exchange(host("localhost").replace("application/json", "text/plain")).await;
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (415, &json!("unsupported_media_type")));
    assert!(reply.body.contains("Content-Type") && reply.body.contains("text/plain"), "{reply:?}");
}

#[tokio::test]
async fn pages_of_allowed_origins_may_use_the_api() {
    let http = HttpOptions { allowed_origins: vec!["http://localhost:3000".into()], ..HttpOptions::default() };
    let served = Served::saying(http).await;
    let preflight = |origin: &str| {
        format!(
            "OPTIONS {CHAT} HTTP/1.1\r\nhost: localhost\r\norigin: {origin}\r\naccess-control-request-method: POST\r\naccess-control-request-headers: authorization,content-type\r\n{CLOSE}\r\n"
        )
    };
    let reply = served.exchange(preflight("http://localhost:3000")).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    for line in [
        "access-control-allow-origin: http://localhost:3000",
        "access-control-allow-headers: authorization,content-type",
        "access-control-allow-methods: GET,POST",
    ] {
        assert!(reply.head.contains(line), "{line}: {reply:?}");
    }
    let reply = served.exchange(preflight("https://evil.example")).await;
    assert!(!reply.head.contains("access-control-allow-origin"), "{reply:?}");
    let ask = |origin: &str| post(&format!("origin: {origin}\r\n{CLOSE}"), &body(json!({})));
    let reply = served.exchange(ask("http://localhost:3000")).await;
    assert_eq!(reply.status, 200);
    assert!(reply.head.contains("access-control-expose-headers: x-request-id"), "{reply:?}");
    let reply = served.exchange(ask("http://localhost:3001")).await;
    assert_eq!(reply.status, 403);
    // an error is readable for the page, too
    let reply = served.exchange(post(&format!("origin: http://localhost:3000\r\n{CLOSE}"), "{")).await;
    assert_eq!(reply.status, 400);
    assert!(reply.head.contains("access-control-allow-origin: http://localhost:3000"), "{reply:?}");
}

#[tokio::test]
async fn a_key_sees_the_models_and_groups_that_it_may_use() {
    let served = Served::start(options(), Some(KEYS), Group::start("only", |_| Ok(say("yes")))).await;
    let get = |path: &str, key: &str| {
        format!("GET {path} HTTP/1.1\r\nhost: evil.example\r\nauthorization: Bearer {key}\r\n{CLOSE}\r\n")
    };
    let one = served.exchange(get("/v1/models", "key")).await.json();
    assert_eq!(one["data"].as_array().map(Vec::len), Some(2), "by name and by alias, and under any host: {one}");
    assert_eq!(served.exchange(get("/groups", "key")).await.json()["groups"].as_array().map(Vec::len), Some(1));
    assert_eq!(served.exchange(get("/v1/models", "abc")).await.json()["data"], json!([]));
    assert_eq!(served.exchange(get("/groups", "abc")).await.json()["groups"], json!([]));
    for name in [MODEL, ALIAS] {
        assert_eq!(served.exchange(get(&format!("/v1/models/{name}"), "key")).await.status, 200);
        assert_eq!(served.exchange(get(&format!("/v1/models/{name}"), "abc")).await.status, 404);
    }
}

#[tokio::test]
async fn integers_that_are_too_large_name_the_field_and_its_limit() {
    let harness = Harness::saying("never").await;
    for (field, value, part) in [
        ("max_tokens", "4294967296", "at most 4294967295"),
        ("max_tokens", "18446744073709551615", "at most 4294967295"),
        ("max_tokens", "99999999999999999999999", "at most 4294967295"),
        ("max_tokens", "1e30", "at most 4294967295"),
        ("max_tokens", "-1", "at least 1"),
        ("max_tokens", "-1e30", "at least 1"),
        ("max_tokens", "1.5", "an integer"),
        ("max_completion_tokens", "4294967296", "at most 4294967295"),
        ("min_tokens", "4294967296", "at most 4294967295"),
        ("top_k", "4294967296", "at most 4294967295"),
        ("top_k", "-2", "at least -1"),
        ("n", "4294967296", "between 1 and 128"),
        ("n", "1e20", "between 1 and 128"),
        ("seed", "9223372036854775808", "at most 9223372036854775807"),
        ("seed", "1e20", "at most 9223372036854775807"),
        ("seed", "-1e20", "at least -9223372036854775808"),
        ("top_logprobs", "99999999999999999999", "between 0 and 20"),
        ("stop_token_ids", "[4294967296]", "between 0 and 4294967295"),
        ("stop_token_ids", "[-1]", "between 0 and 4294967295"),
        ("stop_token_ids", "[1e3]", "between 0 and 4294967295"),
    ] {
        let text = body(json!({})).replacen('{', &format!("{{\"{field}\": {value}, "), 1);
        let text = if field == "max_tokens" { text.replace(",\"max_tokens\":5", "") } else { text };
        let response = harness.request("POST", CHAT, &[], text).await;
        let message = response.json()["error"]["message"].as_str().unwrap_or_default().to_owned();
        assert_eq!(
            (response.status, response.json()["error"]["param"].as_str()),
            (400, Some(field)),
            "{field} {value}"
        );
        assert!(message.contains(part) && message.contains(field), "{field} {value}: {message}");
    }
    for (path, field, value) in [
        ("/v1/messages", "max_tokens", "4294967296"),
        ("/v1/messages", "top_k", "99999999999999999999"),
        ("/v1/responses", "max_output_tokens", "4294967296"),
        ("/v1/completions", "logprobs", "99999999999999999999"),
        ("/v1/completions", "max_tokens", "4294967296"),
        ("/detokenize", "tokens", "[4294967296]"),
    ] {
        let input = match path {
            "/v1/responses" => "\"input\": \"Hi\"",
            "/v1/messages" if field != "max_tokens" => {
                "\"max_tokens\": 3, \"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]"
            }
            "/v1/messages" => "\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]",
            "/v1/completions" => "\"prompt\": \"Hi\"",
            _ => "\"unknown\": 1",
        };
        let response = harness
            .request("POST", path, &[], format!("{{\"model\": \"{MODEL}\", {input}, \"{field}\": {value}}}"))
            .await;
        let text = &response.text;
        assert_eq!(response.status, 400, "{path} {field}: {text}");
        let has_limit = text.contains("at most") || text.contains("between 0 and");
        assert!(text.contains(field) && has_limit && !text.contains("u32"), "{path} {field}: {text}");
    }
    let thousand =
        harness.request("POST", CHAT, &[], body(json!({})).replace("\"max_tokens\":5", "\"max_tokens\":1e3")).await;
    assert_eq!(thousand.status, 200, "an integer, however it is written: {}", thousand.text);
}
