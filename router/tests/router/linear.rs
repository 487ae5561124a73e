//! The time that a request takes grows with its size and no faster: for every list and map that a request of any API may
//! contain, the CPU time of reading, checking, repairing and encoding is measured at two sizes.
//!
//! Eight times the entries may take about ten times as long (n·log n, and memory that is slower when there is more of
//! it); what is quadratic takes sixty-four times as long. A case that looks too slow is measured again: other work on the
//! machine makes CPU time longer, never shorter.

use std::{collections::HashMap, fmt::Write as _, sync::Arc, time::Duration};

use bora_common::cpu_budget::thread_cpu_time;
use bora_router::{
    Access, AccessOptions, ConversationRules, ModelSpec, RouterOptions, Service,
    access::policy::Policy,
    api::{
        error::ApiError,
        messages::count::count,
        params::{Client, Endpoint},
        prepare::prepare,
        tokenize::{detokenize_body, tokenize_body},
    },
};
use bytes::Bytes;

use crate::support::*;

/// Entries of the smaller request.
const FEW: usize = 1_500;
/// How many times more the larger one has.
const FACTOR: usize = 8;
/// How many times longer the larger one may take.
const MAX_GROWTH: f64 = 24.0;
/// What takes less is not measured well enough to judge its growth.
const NEGLIGIBLE: Duration = Duration::from_millis(20);
const MEASUREMENTS: usize = 4;

/// A service with one group that has room for everything, and a cache of conversations or none.
fn service(rules: ConversationRules, conversation_cache_bytes: usize) -> Arc<Service> {
    let options = RouterOptions {
        conversation: rules,
        conversation_cache_bytes,
        encode_threads: 1,
        // the bounds are to be met by nothing here
        max_messages: usize::MAX,
        max_content_parts: usize::MAX,
        max_tool_calls: usize::MAX,
        max_tools: usize::MAX,
        ..options()
    };
    let access = Arc::new(Access::open(AccessOptions::default()).expect("no keys"));
    let models = HashMap::from([(MODEL.to_owned(), ModelSpec::new(tokenizer()))]);
    let service = Service::new(options, keys(), models, access);
    let mut record = Group::start("only", |_| Ok(Vec::new())).record();
    record.max_model_len = 1 << 30;
    service.fleet().put_unwatched(record, std::time::Instant::now()).expect("an endpoint");
    Arc::new(service)
}

/// A list of `count` entries.
fn list(count: usize, entry: impl Fn(usize) -> String) -> String {
    let mut text = String::from("[");
    for index in 0..count {
        let separator = if index == 0 { "" } else { "," };
        let _ = write!(text, "{separator}{}", entry(index));
    }
    text.push(']');
    text
}

/// A map of `count` entries.
fn map(count: usize, value: impl Fn(usize) -> String) -> String {
    let entries = list(count, |index| format!("\"key{index}\":{}", value(index)));
    format!("{{{}}}", &entries[1..entries.len() - 1])
}

/// Lists one behind the other.
fn chain(lists: &[String]) -> String {
    let inside: Vec<&str> = lists.iter().map(|list| &list[1..list.len() - 1]).filter(|list| !list.is_empty()).collect();
    format!("[{}]", inside.join(","))
}

fn says(role: &str, text: &str) -> String {
    format!(r#"{{"role":"{role}","content":"{text}"}}"#)
}

fn call(id: &str) -> String {
    format!(r#"{{"id":"{id}","type":"function","function":{{"name":"f","arguments":"{{\"a\":1}}"}}}}"#)
}

fn unnamed_call() -> String {
    r#"{"type":"function","function":{"name":"f","arguments":"{}"}}"#.into()
}

fn calls(list: &str) -> String {
    format!(r#"{{"role":"assistant","content":"c","tool_calls":{list}}}"#)
}

fn result(id: &str) -> String {
    format!(r#"{{"role":"tool","tool_call_id":"{id}","content":"r"}}"#)
}

fn tool(name: &str, schema: &str) -> String {
    format!(r#"{{"type":"function","function":{{"name":"{name}","parameters":{schema}}}}}"#)
}

const USER: &str = r#"[{"role":"user","content":"u"}]"#;

/// A body with messages, and more fields.
fn body(messages: &str, more: &str) -> String {
    format!(r#"{{"model":"{MODEL}","max_tokens":1,"messages":{messages}{more}}}"#)
}

fn one_of(lists: &[&str]) -> String {
    chain(&lists.iter().map(|list| (*list).to_owned()).collect::<Vec<_>>())
}

type Make = Box<dyn Fn(usize) -> String>;

/// A name, and a body with so many entries.
type Case = (&'static str, Make);

fn case(name: &'static str, make: impl Fn(usize) -> String + 'static) -> Case {
    (name, Box::new(make))
}

/// Conversations that are valid as they are.
fn conversations() -> Vec<Case> {
    let results =
        |count: usize, id: fn(usize, usize) -> usize| list(count, move |n| result(&format!("c{}", id(n, count))));
    let many_calls = |count: usize| list(count, |n| call(&format!("c{n}")));
    let user_then = |lists: &[String]| {
        let mut all = vec![USER.to_owned()];
        all.extend_from_slice(lists);
        chain(&all)
    };
    vec![
        case("turns", |count| {
            let turns = list(count / 2, |_| format!("{},{}", says("user", "a"), says("assistant", "b")));
            body(&one_of(&[&turns, USER]), "")
        }),
        case("messages of the user", |count| body(&list(count, |_| says("user", "a")), "")),
        case("messages of the assistant", |count| {
            body(&one_of(&[USER, &list(count, |_| says("assistant", "a")), USER]), "")
        }),
        case("system messages", |count| body(&one_of(&[&list(count, |_| says("system", "s")), USER]), "")),
        case("content parts", |count| {
            let parts = list(count, |_| r#"{"type":"text","text":"t"}"#.into());
            body(&format!(r#"[{{"role":"user","content":{parts}}}]"#), "")
        }),
        case("images", |count| {
            let url = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";
            let parts = list(count, |_| format!(r#"{{"type":"image_url","image_url":{{"url":"{url}"}}}}"#));
            body(&format!(r#"[{{"role":"user","content":{parts}}}]"#), "")
        }),
        case("calls of one message, answered in order", move |count| {
            body(&user_then(&[format!("[{}]", calls(&many_calls(count))), results(count, |n, _| n)]), "")
        }),
        case("calls of one message, answered in the opposite order", move |count| {
            body(
                &user_then(&[format!("[{}]", calls(&many_calls(count))), results(count, |n, count| count - 1 - n)]),
                "",
            )
        }),
        case("a call and its result, again and again", move |count| {
            let pair =
                |n: usize| format!("{},{}", calls(&list(1, |_| call(&format!("c{n}")))), result(&format!("c{n}")));
            body(&user_then(&[list(count, pair)]), "")
        }),
        case("many calls, and then turns", move |count| {
            let pair =
                |n: usize| format!("{},{}", calls(&list(1, |_| call(&format!("d{n}")))), result(&format!("d{n}")));
            let many = format!("[{}]", calls(&many_calls(count)));
            body(&user_then(&[many, results(count, |n, _| n), list(count, pair)]), "")
        }),
        case("calls that nothing answers, of a first message", move |count| {
            body(&chain(&[format!("[{}]", calls(&many_calls(count))), list(count, |_| says("user", "a"))]), "")
        }),
        case("members of arguments", |count| {
            let arguments = serde_json::Value::from(map(count, |_| "[1,2.5]".into())).to_string();
            let call = format!(r#"[{{"id":"c","function":{{"name":"f","arguments":{arguments}}}}}]"#);
            body(&one_of(&[USER, &format!("[{},{}]", calls(&call), result("c"))]), "")
        }),
        case("members of arguments with one name", |count| {
            let arguments = format!("{{{}}}", list(count, |_| r#""same":1"#.into()).trim_matches(['[', ']']));
            let call = format!(r#"[{{"id":"c","function":{{"name":"f","arguments":{arguments}}}}}]"#);
            body(&one_of(&[USER, &format!("[{},{}]", calls(&call), result("c"))]), "")
        }),
        case("fields of a message", |count| {
            let fields = map(count, |_| "null".into());
            body(&format!(r#"[{{"role":"user","content":"a",{}]"#, &fields[1..]), "")
        }),
        case("digits of a number", |count| {
            let call =
                format!(r#"[{{"id":"c","function":{{"name":"f","arguments":{{"n":{}}}}}}}]"#, "7".repeat(count * 20));
            body(&one_of(&[USER, &format!("[{},{}]", calls(&call), result("c"))]), "")
        }),
        case("lines", |count| body(&format!("[{}]", says("user", &"let x = 1;\\n".repeat(count * 4))), "")),
        case("letters of a word", |count| body(&format!("[{}]", says("user", &"qz".repeat(count * 8))), "")),
        case("spaces", |count| body(&format!("[{}]", says("user", &" ".repeat(count * 16))), "")),
        case("escapes", |count| body(&format!("[{}]", says("user", &"\\n\\u00e9".repeat(count * 4))), "")),
    ]
}

/// Tools, and what a request says beside its messages.
fn fields() -> Vec<Case> {
    let with_schema = |schema: String| body(USER, &format!(r#","tools":[{}]"#, tool("f", &schema)));
    let tools = |count: usize| list(count, |n| tool(&format!("f{n}"), r#"{"type":"object"}"#));
    vec![
        case("tools", move |count| body(USER, &format!(r#","tools":{}"#, tools(count)))),
        case("allowed tools", move |count| {
            // as many names as a grammar has room for
            let count = count / 12;
            let names = list(count, |n| format!(r#"{{"type":"function","function":{{"name":"f{n}"}}}}"#));
            let choice = format!(r#"{{"type":"allowed_tools","allowed_tools":{{"mode":"auto","tools":{names}}}}}"#);
            body(USER, &format!(r#","tools":{},"tool_choice":{choice}"#, tools(count)))
        }),
        case("properties of a schema", move |count| {
            with_schema(format!(
                r#"{{"type":"object","properties":{}}}"#,
                map(count, |_| r#"{"type":"string"}"#.into())
            ))
        }),
        case("required properties of a schema", move |count| {
            with_schema(format!(r#"{{"required":{}}}"#, list(count, |n| format!("\"p{n}\""))))
        }),
        case("values of an enum", move |count| {
            with_schema(format!(r#"{{"enum":{}}}"#, list(count, |n| format!(r#"{{"v":{n}}}"#))))
        }),
        case("alternatives of a schema", move |count| {
            with_schema(format!(r#"{{"anyOf":{}}}"#, list(count, |_| r#"{"type":"string"}"#.into())))
        }),
        case("fields that are not known", |count| {
            let fields = map(count, |_| "[1]".into());
            body(USER, &format!(",{}", &fields[1..fields.len() - 1]))
        }),
        case("metadata", |count| body(USER, &format!(r#","metadata":{}"#, map(count, |_| "\"v\"".into())))),
        case("biases", |count| {
            let entries = list(count, |n| format!("\"{n}\":1"));
            body(USER, &format!(r#","logit_bias":{{{}}}"#, &entries[1..entries.len() - 1]))
        }),
        case("stop strings", |count| body(USER, &format!(r#","stop":{}"#, list(count, |n| format!("\"s{n}\""))))),
        case("stop token IDs", |count| body(USER, &format!(r#","stop_token_ids":{}"#, list(count, |n| n.to_string())))),
        case("choices", |count| {
            body(USER, &format!(r#","guided_choice":{}"#, list(count / 3, |n| format!("\"c{n}\""))))
        }),
        case("properties of a form", |count| {
            let schema = format!(r#"{{"type":"object","properties":{}}}"#, map(count / 2, |_| "{}".into()));
            let format = format!(r#"{{"type":"json_schema","json_schema":{{"name":"n","schema":{schema}}}}}"#);
            body(USER, &format!(r#","response_format":{format}"#))
        }),
    ]
}

/// Conversations that are repaired.
fn faulty() -> Vec<Case> {
    let user_then = |lists: &[String]| chain(&[&[USER.to_owned()], lists].concat());
    vec![
        case("calls without an id", move |count| {
            body(&user_then(&[format!("[{}]", calls(&list(count, |_| unnamed_call())))]), "")
        }),
        case("calls with the same id", move |count| {
            let results = list(count, |_| result("same"));
            body(&user_then(&[format!("[{}]", calls(&list(count, |_| call("same")))), results]), "")
        }),
        case("calls whose numbers are taken", move |count| {
            let both = chain(&[list(count / 2, |_| unnamed_call()), list(count / 2, |n| call(&format!("call{n}")))]);
            body(&user_then(&[format!("[{}]", calls(&both))]), "")
        }),
        case("calls of several messages", move |count| {
            body(&user_then(&[list(count, |n| calls(&list(1, |_| call(&format!("c{n}")))))]), "")
        }),
        case("results without a call", move |count| {
            let orphans = list(count, |n| result(&format!("x{n}")));
            body(&user_then(&[format!("[{}]", calls(&list(1, |_| call("c")))), orphans]), "")
        }),
        case("results without a name", move |count| {
            let results = list(count, |_| r#"{"role":"tool","content":"r"}"#.into());
            let calls = calls(&list(count, |n| call(&format!("c{n}"))));
            body(&user_then(&[format!("[{calls}]"), results]), "")
        }),
        case("results in the opposite order, behind a user's words", move |count| {
            let results = list(count, |n| result(&format!("c{}", count - 1 - n)));
            let calls = calls(&list(count, |n| call(&format!("c{n}"))));
            body(&user_then(&[format!("[{calls}]"), USER.to_owned(), results]), "")
        }),
        case("empty messages of the assistant", move |count| {
            body(&user_then(&[list(count, |_| says("assistant", "")), USER.to_owned()]), "")
        }),
        case("late system messages", move |count| {
            let late = list(count, |_| format!("{},{}", says("assistant", "a"), says("system", "s")));
            body(&user_then(&[late]), "")
        }),
    ]
}

fn completions() -> Vec<Case> {
    let prompt = |prompt: String| format!(r#"{{"model":"{MODEL}","max_tokens":1,"prompt":{prompt}}}"#);
    vec![
        case("token IDs of a prompt", move |count| prompt(list(count * 8, |n| (n % 9000 + 1000).to_string()))),
        case("prompts", move |count| prompt(list(count, |_| "\"p\"".into()))),
        case("prompts of token IDs", move |count| prompt(list(count, |_| "[1000]".into()))),
        case("letters of a prompt", move |count| prompt(format!("\"{}\"", "word ".repeat(count * 4)))),
    ]
}

fn responses() -> Vec<Case> {
    let input = |input: String| format!(r#"{{"model":"{MODEL}","max_output_tokens":1,"input":{input}}}"#);
    let call = |n: usize| format!(r#"{{"type":"function_call","call_id":"c{n}","name":"f","arguments":"{{}}"}}"#);
    let output = |n: usize| format!(r#"{{"type":"function_call_output","call_id":"c{n}","output":"o"}}"#);
    let user = r#"[{"role":"user","content":"u"}]"#;
    let message = move |field: &str, part: &str, count: usize| {
        let parts = list(count, |_| part.to_owned());
        match field {
            "output" => format!(r#"[{},{{"type":"function_call_output","call_id":"c0","output":{parts}}}]"#, call(0)),
            _ => format!(r#"[{{"role":"user","content":{parts}}}]"#),
        }
    };
    vec![
        case("turns", move |count| {
            let turns = list(count / 2, |_| format!("{},{}", says("user", "a"), says("assistant", "b")));
            input(one_of(&[&turns, user]))
        }),
        case("calls and then outputs", move |count| {
            input(one_of(&[user, &list(count, call), &list(count, |n| output(count - 1 - n))]))
        }),
        case("a call and its output, again and again", move |count| {
            input(one_of(&[user, &list(count, |n| format!("{},{}", call(n), output(n)))]))
        }),
        case("content parts", move |count| input(message("content", r#"{"type":"input_text","text":"t"}"#, count))),
        case("parts of an output", move |count| {
            input(one_of(&[user, &message("output", r#"{"type":"input_text","text":"t"}"#, count)]))
        }),
        case("reasoning", move |count| {
            input(one_of(&[user, &list(count, |_| r#"{"type":"reasoning","summary":[]}"#.into())]))
        }),
        case("tools", move |count| {
            let tools =
                list(count, |n| format!(r#"{{"type":"function","name":"f{n}","parameters":{{"type":"object"}}}}"#));
            format!(r#"{{"model":"{MODEL}","input":"u","tools":{tools}}}"#)
        }),
        case("include", move |count| {
            format!(r#"{{"model":"{MODEL}","input":"u","include":{}}}"#, list(count, |n| format!("\"i{n}\"")))
        }),
        case("metadata", move |count| {
            format!(r#"{{"model":"{MODEL}","input":"u","metadata":{}}}"#, map(count, |_| "\"v\"".into()))
        }),
    ]
}

fn messages() -> Vec<Case> {
    let used = |n: usize| format!(r#"{{"type":"tool_use","id":"c{n}","name":"f","input":{{}}}}"#);
    let back = |n: usize| format!(r#"{{"type":"tool_result","tool_use_id":"c{n}","content":"r"}}"#);
    let content = |role: &str, blocks: &str| format!(r#"{{"role":"{role}","content":{blocks}}}"#);
    vec![
        case("turns", |count| {
            let turns = list(count / 2, |_| format!("{},{}", says("user", "a"), says("assistant", "b")));
            body(&one_of(&[&turns, USER]), "")
        }),
        case("text blocks", move |count| {
            let blocks = list(count, |_| r#"{"type":"text","text":"t"}"#.into());
            body(&format!("[{}]", content("user", &blocks)), "")
        }),
        case("uses of tools in one message", move |count| {
            let (uses, results) = (list(count, used), list(count, |n| back(count - 1 - n)));
            body(&format!("[{},{},{}]", says("user", "u"), content("assistant", &uses), content("user", &results)), "")
        }),
        case("uses of tools in many messages", move |count| {
            let pair = |n| {
                format!(
                    "{},{}",
                    content("assistant", &format!("[{}]", used(n))),
                    content("user", &format!("[{}]", back(n)))
                )
            };
            body(&one_of(&[USER, &list(count, pair)]), "")
        }),
        case("blocks of a result", move |count| {
            let blocks = list(count, |_| r#"{"type":"text","text":"t"}"#.into());
            let result = format!(r#"[{{"type":"tool_result","tool_use_id":"c0","content":{blocks}}}]"#);
            let uses = format!("[{}]", used(0));
            body(&format!("[{},{},{}]", says("user", "u"), content("assistant", &uses), content("user", &result)), "")
        }),
        case("system blocks", |count| {
            body(USER, &format!(r#","system":{}"#, list(count, |_| r#"{"type":"text","text":"t"}"#.into())))
        }),
        case("tools", |count| {
            body(
                USER,
                &format!(
                    r#","tools":{}"#,
                    list(count, |n| format!(r#"{{"name":"f{n}","input_schema":{{"type":"object"}}}}"#))
                ),
            )
        }),
        case("stop sequences", |count| {
            body(USER, &format!(r#","stop_sequences":{}"#, list(count, |n| format!("\"s{n}\""))))
        }),
    ]
}

/// The CPU time of this thread for one request, and whether it was refused.
fn time(work: &dyn Fn(&[u8]) -> Result<(), ApiError>, body: &str) -> (Duration, Option<ApiError>) {
    let begun = thread_cpu_time();
    let outcome = work(body.as_bytes());
    (thread_cpu_time() - begun, outcome.err())
}

/// Fails if the time of one of the cases grows too fast. Each measurement has a service of its own, which knows nothing.
fn judge(cases: Vec<Case>, service: &dyn Fn() -> Arc<Service>, work: fn(&Service, &[u8]) -> Result<(), ApiError>) {
    let mut wrong = Vec::new();
    for (name, make) in cases {
        let (few, many) = (make(FEW), make(FEW * FACTOR));
        let mut best = (Duration::MAX, Duration::MAX);
        for measurement in 1.. {
            let service = service();
            let run = |body: &[u8]| work(&service, body);
            let (short, refused) = time(&run, &few);
            let (long, _) = time(&run, &many);
            best = (best.0.min(short), best.1.min(long));
            let growth = best.1.as_secs_f64() / best.0.as_secs_f64();
            if growth <= MAX_GROWTH || best.1 <= NEGLIGIBLE {
                break;
            }
            if measurement == MEASUREMENTS {
                wrong.push(format!("{name}: {:?} and then {:?}, {growth:.0} times ({refused:?})", best.0, best.1));
                break;
            }
        }
    }
    assert!(wrong.is_empty(), "{} times the entries take:\n{}", FACTOR, wrong.join("\n"));
}

fn generate(endpoint: Endpoint) -> impl Fn(&Service, &[u8]) -> Result<(), ApiError> {
    move |service, body| {
        prepare(service, &policy(service), endpoint, Client::default(), &Bytes::copy_from_slice(body)).map(|_| ())
    }
}

fn policy(service: &Service) -> Policy {
    Policy::without_keys(service).expect("there are no keys")
}

fn strict() -> Arc<Service> {
    service(ConversationRules::Strict, 256 << 20)
}

fn lenient() -> Arc<Service> {
    service(ConversationRules::Lenient, 256 << 20)
}

#[tokio::test]
async fn chat_requests_take_time_by_their_size() {
    judge(conversations(), &strict, |service, body| generate(Endpoint::Chat)(service, body));
    judge(fields(), &strict, |service, body| generate(Endpoint::Chat)(service, body));
}

#[tokio::test]
async fn repairs_take_time_by_their_size() {
    judge(faulty(), &lenient, |service, body| generate(Endpoint::Chat)(service, body));
}

/// A conversation that is known, and the same again with a mistake that the cache cannot judge.
#[tokio::test]
async fn known_conversations_take_time_by_their_size() {
    judge(conversations(), &strict, |service, body| {
        let again = body.strip_suffix(b"}").expect("an object");
        let again = [again, br#","continue_final_message":true}"#].concat();
        // what is wrong with some of them is not the point
        let _ = generate(Endpoint::Chat)(service, body);
        let _ = generate(Endpoint::Chat)(service, &again);
        generate(Endpoint::Chat)(service, body)
    });
}

#[tokio::test]
async fn requests_of_other_apis_take_time_by_their_size() {
    judge(completions(), &strict, |service, body| generate(Endpoint::Completions)(service, body));
    judge(responses(), &strict, |service, body| generate(Endpoint::Responses)(service, body));
    judge(messages(), &strict, |service, body| generate(Endpoint::Messages)(service, body));
}

#[tokio::test]
async fn counting_takes_time_by_the_size() {
    judge(messages(), &strict, |service, body| count(service, &policy(service), body).map(|_| ()));
    judge(conversations(), &strict, |service, body| tokenize_body(service, &policy(service), body).map(|_| ()));
    let tokens =
        |count: usize| format!(r#"{{"model":"{MODEL}","tokens":{}}}"#, list(count * 8, |n| (n % 9000).to_string()));
    judge(vec![case("token IDs", tokens)], &strict, |service, body| {
        detokenize_body(service, &policy(service), body).map(|_| ())
    });
}

/// The cases measure what they are meant to: requests that are accepted, but for those that meet a bound.
#[tokio::test]
async fn what_is_measured_is_accepted() {
    let bounded = [
        // their names alone are no repair
        "results without a name",
        "biases",
        "stop strings",
        "stop token IDs",
        "stop sequences",
        "prompts",
        "prompts of token IDs",
        "calls that nothing answers, of a first message",
        "choices",
        "properties of a form",
    ];
    let accepts = |cases: Vec<Case>, service: &Service, endpoint: Endpoint| {
        for (name, make) in cases {
            if let Err(error) = generate(endpoint)(service, make(64).as_bytes()) {
                assert!(bounded.contains(&name), "{endpoint:?}, {name}: {error:?}");
            }
        }
    };
    accepts(conversations(), &strict(), Endpoint::Chat);
    accepts(fields(), &strict(), Endpoint::Chat);
    accepts(faulty(), &lenient(), Endpoint::Chat);
    accepts(completions(), &strict(), Endpoint::Completions);
    accepts(responses(), &strict(), Endpoint::Responses);
    accepts(messages(), &strict(), Endpoint::Messages);
}
