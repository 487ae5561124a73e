//! What access and limits cost a request in processor time: the key or token, admission with every limit set, the
//! `x-ratelimit-*` headers, settling, and the audit line (formatted as JSON, written nowhere).
//!
//!     cargo run --release --workspace --example access_bench

use std::{fmt::Write as _, sync::Arc};

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, Method, Response, header},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bora_router::{
    Access, AccessOptions,
    access::{
        audit::{Arrival, Audit},
        quota::QuotaRequest,
    },
    request_id::RequestId,
};
use ring::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _},
};
use serde_json::json;

const KEYS: usize = 10_000;
const REQUESTS: u32 = 200_000;

fn main() {
    let directory = tempfile::tempdir().expect("a directory");
    let subscriber = tracing_subscriber::fmt().json().flatten_event(true).with_writer(std::io::sink).finish();
    tracing::subscriber::set_global_default(subscriber).expect("the first subscriber");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");

    let mut file = String::from("tenants:\n");
    for number in 0..KEYS {
        let digest = ring::digest::digest(&ring::digest::SHA256, format!("key-{number}").as_bytes());
        let hex = digest.as_ref().iter().fold(String::new(), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        });
        let limits = "requests_per_minute: 100000000, tokens_per_minute: 100000000000, parallel_requests: 1000, max_context: 100000";
        let _ =
            writeln!(file, "- {{name: tenant-{number}, models: [m], {limits}, keys: [{{name: k, sha256: {hex}}}]}}");
    }
    let keys = directory.path().join("keys.yaml");
    std::fs::write(&keys, file).expect("written");

    let random = SystemRandom::new();
    let ec = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).expect("a key");
    let ec = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, ec.as_ref(), &random).expect("a key");
    let ed = Ed25519KeyPair::generate_pkcs8(&random).expect("a key");
    let ed = Ed25519KeyPair::from_pkcs8(ed.as_ref()).expect("a key");
    let coded = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    let point = ec.public_key().as_ref();
    let jwks = json!({"keys": [
        {"kty": "EC", "crv": "P-256", "kid": "ec", "x": coded(&point[1..33]), "y": coded(&point[33..])},
        {"kty": "OKP", "crv": "Ed25519", "kid": "ed", "x": coded(ed.public_key().as_ref())},
    ]});
    let jwks_file = directory.path().join("jwks.json");
    std::fs::write(&jwks_file, jwks.to_string()).expect("written");
    let token = |algorithm: &str, kid: &str, number: u32| {
        let head = coded(json!({"alg": algorithm, "kid": kid, "typ": "JWT"}).to_string().as_bytes());
        let claims = json!({"iss": "i", "aud": "bora", "exp": 4_000_000_000u64, "sub": format!("s{number}"), "tenant": "tenant-7",
                            "email": "somebody@example.com", "roles": ["a", "b", "c"], "jti": "0123456789abcdef0123456789abcdef"});
        let signed = format!("{head}.{}", coded(claims.to_string().as_bytes()));
        let signature = match algorithm {
            "ES256" => ec.sign(&random, signed.as_bytes()).expect("signed").as_ref().to_vec(),
            _ => ed.sign(signed.as_bytes()).as_ref().to_vec(),
        };
        format!("{signed}.{}", coded(&signature))
    };
    let jwt =
        serde_json::from_value(json!({"issuer": "i", "audience": ["bora"], "jwks_file": jwks_file})).expect("options");
    let options = AccessOptions { keys: Some(keys), jwt: Some(jwt), ..AccessOptions::default() };
    let access = Access::open(options).expect("opened");

    let headers = |key: &str| {
        let value = HeaderValue::from_str(&format!("Bearer {key}")).expect("a header");
        HeaderMap::from_iter([(header::AUTHORIZATION, value)])
    };
    let known: Vec<HeaderMap> = (0..KEYS).map(|number| headers(&format!("key-{number}"))).collect();
    let same = vec![headers(&token("ES256", "ec", 0))];
    let fresh =
        |algorithm, kid| (0..2_000).map(|number| headers(&token(algorithm, kid, number + 1))).collect::<Vec<_>>();
    let (fresh_ec, fresh_ed) = (fresh("ES256", "ec"), fresh("EdDSA", "ed"));
    for (name, requests, list) in [
        ("API key (of 10,000)", REQUESTS, &known),
        ("token seen before", REQUESTS, &same),
        ("token seen for the first time, ES256", 2_000, &fresh_ec),
        ("token seen for the first time, EdDSA", 2_000, &fresh_ed),
    ] {
        let before = processor_nanoseconds();
        runtime.block_on(async {
            for number in 0..requests {
                request(&access, &list[number as usize % list.len()]).await;
            }
        });
        let spent = processor_nanoseconds() - before;
        println!("{name}: {:.2} µs a request", spent as f64 / 1000.0 / f64::from(requests));
    }
}

/// What access does in the life of a request.
async fn request(access: &Access, headers: &HeaderMap) {
    let audit = Audit::begin(Arrival {
        id: RequestId::random(),
        method: Method::POST,
        path: "/v1/chat/completions".to_owned(),
        peer: None,
        client: None,
        with_body: false,
    });
    audit.mark_api_request();
    let caller = access.caller(headers).await.expect("known").expect("keys are asked for");
    audit.of(&caller);
    let tenant = Arc::clone(&caller.tenant);
    audit.asks("m", 1000);
    let wish = QuotaRequest {
        prompt_tokens: 1000,
        longest_prompt: 1000,
        prompt_logprobs: false,
        sequences: 1,
        max_tokens: 500,
        names_max_tokens: true,
    };
    let slot = caller.begin().expect("within the limits");
    let mut permit = caller.admit(wish, slot).expect("within the limits");
    let mut response = Response::new(Body::empty());
    tenant.write_headers(response.headers_mut());
    audit.responded(&response);
    for _ in 0..20 {
        audit.generated(10);
        permit.generated(10);
    }
    audit.finished();
    std::hint::black_box(response);
}

/// Of this thread.
fn processor_nanoseconds() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux");
    text.split_whitespace().next().and_then(|first| first.parse().ok()).expect("nanoseconds")
}
