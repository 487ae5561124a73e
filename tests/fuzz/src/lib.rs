//! Fuzz targets. Each takes any bytes and panics where something that must always hold does not.
//!
//! They run under libFuzzer (`fuzz_targets/`, which needs a nightly compiler) and, for a bounded time, with the mutator
//! of [`mutate`] in `cargo test` (`tests/bounded.rs`). Both begin with the inputs of `corpus/`; an input that once broke
//! something stays there.

pub mod mutate;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use bora_common::{
    conversation::{Conversation, DataUrls, Delta, Json, ToolCallParser},
    registry::{Device, GroupRecord, GroupState, RankRecord, Speed},
    secret::ClusterKeys,
    tokenizer::Tokenizer,
};
use bora_proto::v1;
use bora_router::fleet::validate::{
    clip,
    events::{EventCheck, GroupBounds},
    record,
    stream::{StreamBounds, StreamCheck},
};
use bora_router::{
    Access, AccessOptions, ModelSpec, RouterOptions, Service,
    access::policy::Policy,
    api::{
        error::ApiError,
        params::{Client, Endpoint},
        prepare::{Prepared, prepare},
    },
};
use bora_worker::grammar::{GrammarError, GrammarSource, Grammars, PrepareError};
use bytes::Bytes;
use prost::Message;

const MODEL: &str = "m";
const VOCABULARY: u32 = 9192;
const WINDOW: u32 = 4096;

/// Where the inputs to begin with are.
pub fn corpus(target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target)
}

/// A request's body, read, checked and encoded as the router does it: an error is the client's, and a prompt is the same
/// whether or not its beginning was seen before.
pub fn request(input: &[u8]) {
    prepare_for([Endpoint::Chat, Endpoint::Completions], input);
}

/// The same for the requests of other APIs.
pub fn agents(input: &[u8]) {
    prepare_for([Endpoint::Responses, Endpoint::Messages], input);
}

fn prepare_for(endpoints: [Endpoint; 2], input: &[u8]) {
    let bytes = Bytes::copy_from_slice(input);
    for endpoint in endpoints {
        let prepared = |service: &Service| {
            let policy = Policy::without_keys(service).expect("no keys");
            prepare(service, &policy, endpoint, Client::default(), &bytes)
        };
        let (cached, fresh) = (prepared(service(true)), prepared(service(false)));
        match (&cached, &fresh) {
            (Ok(cached), Ok(fresh)) => same(cached, fresh),
            (Err(cached), Err(fresh)) => {
                check_error(cached);
                check_error(fresh);
            }
            _ => panic!("a cache decided about a request: {:?}, {:?}", cached.err(), fresh.err()),
        }
    }
}

fn same(cached: &Prepared, fresh: &Prepared) {
    assert_eq!(cached.prompts.len(), fresh.prompts.len());
    for (one, other) in cached.prompts.iter().zip(&fresh.prompts) {
        assert_eq!(one.encoded.ids, other.encoded.ids);
        assert_eq!(one.encoded.hashes, other.encoded.hashes);
        assert_eq!(one.encoded.images, other.encoded.images);
        let length = one.encoded.ids.len();
        assert!(length + one.output_bound as usize <= WINDOW as usize, "{length} + {}", one.output_bound);
        assert!(one.encoded.ids.iter().all(|id| id < VOCABULARY));
    }
}

fn check_error(error: &ApiError) {
    assert!((400..500).contains(&error.status.as_u16()), "{error:?}");
    assert!(!error.message.is_empty(), "{error:?}");
    let body: serde_json::Value = serde_json::from_slice(&error.to_json()).expect("an error is JSON");
    assert!(body["error"]["message"].is_string());
}

/// What a model generated (token IDs of two bytes, little-endian): calls have names, and what parses without an error has
/// objects as arguments.
pub fn tool_calls(input: &[u8]) {
    let tokenizer = tokenizer();
    let ids: Vec<u32> = input.chunks_exact(2).map(|pair| u32::from(u16::from_le_bytes([pair[0], pair[1]]))).collect();
    let mut parser = ToolCallParser::new(Arc::clone(tokenizer));
    let mut deltas: Vec<Delta> = ids.iter().flat_map(|id| parser.push(*id)).collect();
    deltas.extend(parser.finish(false));
    let mut calls: Vec<(String, String)> = Vec::new();
    let mut ended = 0;
    for delta in deltas {
        match delta {
            Delta::Content(text) => assert!(!text.is_empty()),
            Delta::CallStart { index, name } => {
                assert_eq!((index, ended), (calls.len(), calls.len()));
                assert!(!name.is_empty());
                calls.push((name, String::new()));
            }
            Delta::Arguments { index, text } => calls[index].1.push_str(&text),
            Delta::CallEnd { index } => {
                assert_eq!(index + 1, calls.len());
                ended += 1;
            }
        }
    }
    assert_eq!(ended, calls.len());
    if parser.error().is_none() {
        for (_, arguments) in &calls {
            assert!(matches!(Json::parse(arguments), Ok(Json::Object(_))), "{arguments}");
        }
    }
}

/// A whole chat request as a conversation: laid out and encoded twice to the same token IDs, with an end for each part.
pub fn conversation(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let Ok(request) = Json::parse(text) else { return };
    let conversation = match Conversation::parse_request(&request) {
        Ok(conversation) => conversation,
        Err(error) => {
            assert!(!error.message.is_empty() && !error.code().is_empty(), "{error:?}");
            return;
        }
    };
    let tokenizer = tokenizer();
    let Ok(encoded) = conversation.encode(tokenizer, &DataUrls) else { return };
    assert_eq!(Ok(&encoded), conversation.encode(tokenizer, &DataUrls).as_ref());
    assert_eq!(encoded.message_ends.len(), conversation.parts().len());
    assert!(encoded.message_ends.is_sorted());
    assert_eq!(encoded.message_ends.last(), Some(&encoded.token_ids.len()));
    assert_eq!(encoded.token_ids.first().copied(), tokenizer.bos_id());
    for image in &encoded.images {
        assert_eq!(image.length, (image.columns as usize + 1) * image.rows as usize);
        assert!(image.offset + image.length <= encoded.token_ids.len());
        assert!(image.index < conversation.images().len());
    }
}

/// A grammar in each of its languages: compiled soon or refused in words, the same way each time.
pub fn grammar(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    for kind in [v1::grammar::Kind::JsonSchema, v1::grammar::Kind::Lark, v1::grammar::Kind::Regex] {
        let grammar = v1::Grammar { kind: kind.into(), source: text.to_owned() };
        let Ok(source) = GrammarSource::try_from(grammar) else { continue };
        match (grammars().prepare(&source), grammars().begin(&source, &[])) {
            (Ok(_), Ok(mut state)) => assert!(state.mask().is_ok(), "a grammar that was compiled has a first mask"),
            (Err(PrepareError::Refused(GrammarError(once))), Err(GrammarError(again))) => {
                assert!(!once.is_empty() && once == again, "{once}; {again}")
            }
            (once, again) => panic!("{once:?}, and then {:?}", again.err()),
        }
    }
}

/// What a worker sends: its record as JSON, or a byte that says which stream, what is expected of it in another one, and
/// messages with a length of two bytes each. Whatever passes the checks is within its bounds.
pub fn worker(input: &[u8]) {
    match input {
        [b'{', ..] => described(input),
        [which, expected, rest @ ..] if which % 2 == 0 => stream(*expected, rest),
        [_, expected, rest @ ..] => group_events(*expected, rest),
        _ => {}
    }
}

/// Messages one after the other, those that can be decoded.
fn messages<M: Message + Default>(mut input: &[u8]) -> Vec<M> {
    let mut messages = Vec::new();
    while let Some((length, rest)) = input.split_first_chunk::<2>() {
        let (bytes, behind) = rest.split_at(rest.len().min(usize::from(u16::from_le_bytes(*length))));
        messages.extend(M::decode(bytes));
        input = behind;
    }
    messages
}

fn stream(expected: u8, input: &[u8]) {
    let top_logprobs = (expected & 1 != 0).then_some(u32::from(expected >> 1 & 3));
    let prompt_logprobs = (expected & 8 != 0).then_some(1);
    let bounds = StreamBounds {
        prompt_tokens: 3,
        max_tokens: 8,
        vocabulary_size: VOCABULARY,
        top_logprobs,
        prompt_logprobs,
        ..StreamBounds::default()
    };
    let mut check = StreamCheck::new(bounds);
    let (mut generated, mut scored) = (0, 0);
    for event in messages::<v1::GenerateEvent>(input) {
        if check.check(&event).is_err() {
            return;
        }
        match event.event {
            Some(v1::generate_event::Event::Started(started)) => assert!(started.cached_tokens <= 3),
            Some(v1::generate_event::Event::Tokens(tokens)) => {
                generated += tokens.token_ids.len();
                assert!(tokens.token_ids.iter().all(|id| *id < VOCABULARY));
                let expected = if top_logprobs.is_some() { tokens.token_ids.len() } else { 0 };
                assert_eq!(tokens.logprobs.len(), expected);
                let logprobs = tokens.logprobs.iter().flat_map(|position| position.top.iter().chain(&position.chosen));
                assert!(logprobs.into_iter().all(|token| token.logprob.is_finite()));
            }
            Some(v1::generate_event::Event::PromptLogprobs(part)) => scored += part.positions.len(),
            Some(v1::generate_event::Event::Finished(finished)) => {
                let is_aborted = finished.reason() == v1::FinishReason::Aborted;
                assert!(is_aborted || finished.completion_tokens as usize == generated);
            }
            Some(v1::generate_event::Event::Compiled(_)) | None => {}
        }
        assert!(generated <= 8 && scored <= 2);
    }
}

fn group_events(blocks: u8, input: &[u8]) {
    let bounds = GroupBounds { kv_blocks: blocks.into(), host_blocks: 1 };
    let most = usize::from(blocks) + 1;
    let mut check = EventCheck::new(bounds);
    let mut snapshot = 0;
    for event in messages::<v1::GroupEvent>(input) {
        if check.check(&event).is_err() {
            return;
        }
        match event.event {
            Some(v1::group_event::Event::Snapshot(part)) => {
                snapshot += part.block_hashes.len();
                assert!(snapshot <= most * 16);
            }
            Some(v1::group_event::Event::Blocks(changed)) => {
                assert!(changed.stored.len() <= most * 16 && changed.evicted.len() <= most * 16);
            }
            Some(v1::group_event::Event::Load(load)) => {
                assert!(load.prefill_seconds.is_finite() && load.blocks_total <= u32::from(blocks));
            }
            Some(v1::group_event::Event::State(_)) | None => {}
        }
    }
}

fn described(input: &[u8]) {
    let Ok(described) = serde_json::from_slice::<GroupRecord>(input) else { return };
    let limits = record::ModelLimits { max_model_len: Some(WINDOW), ..record::ModelLimits::default() };
    let Ok(checked) = record::check(described.clone(), Some(&limits)) else { return };
    assert!(checked.aliases.is_empty() && checked.speed.prefill_tokens_per_second > 0.0);
    assert!(checked.device == Device::Fake || checked.max_model_len <= WINDOW);
    assert_eq!(clip(&checked.group).len(), checked.group.len(), "a valid name can be logged as it is");
    // and what the cost model makes of it is a number
    let seconds = bora_common::cost::CostModel::new(&checked.speed).prefill_seconds(1000, 1000);
    assert!(seconds.is_finite() && seconds >= 0.0, "{seconds}");
}

fn grammars() -> &'static Grammars {
    static GRAMMARS: OnceLock<Grammars> = OnceLock::new();
    GRAMMARS.get_or_init(|| {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/tokenizers/tekken-v13-8k.json");
        Grammars::load(path.as_ref()).expect("the fixture is a tokenizer")
    })
}

fn tokenizer() -> &'static Arc<Tokenizer> {
    static TOKENIZER: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    TOKENIZER.get_or_init(|| {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/tokenizers/tekken-v13-8k.json");
        Arc::new(Tokenizer::from_file(path).expect("the fixture is a tokenizer"))
    })
}

/// A router's state with one group; with a cache of conversations, or without.
fn service(cache: bool) -> &'static Service {
    static SERVICES: OnceLock<[Service; 2]> = OnceLock::new();
    let services = SERVICES.get_or_init(|| {
        // channels to groups want a runtime, though nothing is ever sent
        let runtime = Box::leak(Box::new(
            tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime can be made"),
        ));
        let _entered = runtime.enter();
        [1 << 20, 0].map(|conversation_cache_bytes| {
            let options = RouterOptions { conversation_cache_bytes, encode_threads: 1, ..RouterOptions::default() };
            let access = Arc::new(Access::open(AccessOptions::default()).expect("no keys"));
            let models = HashMap::from([(MODEL.to_owned(), ModelSpec::new(Arc::clone(tokenizer())))]);
            let service = Service::new(options, ClusterKeys::derive(&[1; 32]), models, access);
            service.fleet().put_unwatched(group(), std::time::Instant::now()).expect("an endpoint");
            service
        })
    });
    &services[usize::from(!cache)]
}

fn group() -> GroupRecord {
    GroupRecord {
        group: "fuzzed".into(),
        epoch: 1,
        endpoint: "127.0.0.1:1".into(),
        model: MODEL.into(),
        aliases: vec![],
        device: Device::Fake,
        cache_key_id: String::new(),
        weight_fingerprint: "0".into(),
        ranks: vec![RankRecord { rank: 0, host: "here".into(), pid: 1 }],
        block_tokens: 64,
        kv_blocks: 64,
        host_blocks: 0,
        max_model_len: WINDOW,
        vocabulary_size: VOCABULARY,
        max_sequences: 8,
        images: true,
        speed: Speed { prefill_tokens_per_second: 1.0, prefill_seconds_per_token_pair: 0.0, decode_step_seconds: 1.0 },
        state: GroupState::Ready,
        version: "0".into(),
        contract: bora_common::version::CONTRACT,
    }
}
