use std::{sync::Arc, time::Instant};

use axum::http::{HeaderMap, HeaderValue, StatusCode};

use super::{
    Access, AccessOptions, Caller,
    keys::Digest,
    limits::{LiveRouters, Tenant, TenantLimits},
    policy::Policy,
    quota::{Permit, QuotaRequest},
};
use crate::api::error::ApiError;

fn caller(limits: TenantLimits) -> Caller {
    among(limits, &LiveRouters::default())
}

fn among(limits: TenantLimits, routers: &LiveRouters) -> Caller {
    Caller { tenant: Arc::new(Tenant::new("acme".into(), limits, routers)), key: "ci".into() }
}

fn wish(prompt_tokens: u64, max_tokens: u64) -> QuotaRequest {
    QuotaRequest {
        prompt_tokens,
        longest_prompt: prompt_tokens,
        prompt_logprobs: false,
        sequences: 1,
        max_tokens,
        names_max_tokens: true,
    }
}

fn admit(caller: &Caller, wish: QuotaRequest) -> Result<Permit, ApiError> {
    caller.admit(wish, caller.begin()?)
}

fn with(name: &'static str, value: &str) -> HeaderMap {
    HeaderMap::from_iter([(name.parse().unwrap(), HeaderValue::from_str(value).unwrap())])
}

#[tokio::test]
async fn finds_keys_by_their_hash() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("keys.yaml");
    let sha: String = {
        use std::fmt::Write as _;
        let digest = ring::digest::digest(&ring::digest::SHA256, b"secret");
        digest.as_ref().iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    };
    std::fs::write(&file, format!("tenants:\n- name: acme\n  keys: [{{name: ci, sha256: {sha}}}]\n")).unwrap();
    let options = AccessOptions { keys: Some(file), api_keys: vec![Digest::of(b"other")], ..Default::default() };
    let access = Access::open(options).unwrap();
    assert!(!access.is_open());
    let found = access.caller(&with("authorization", "Bearer secret")).await.unwrap().unwrap();
    assert_eq!((found.tenant.name.as_str(), &*found.key), ("acme", "ci"));
    assert_eq!(access.caller(&with("x-api-key", "other")).await.unwrap().unwrap().tenant.name, "default");
    for (headers, code) in [
        (HeaderMap::new(), "missing_api_key"),
        (with("authorization", "Basic secret"), "missing_api_key"),
        (with("authorization", "Bearer "), "missing_api_key"),
        (with("authorization", "Bearer wrong"), "invalid_api_key"),
    ] {
        let error = access.caller(&headers).await.unwrap_err();
        assert_eq!((error.status, error.code), (StatusCode::UNAUTHORIZED, Some(code)));
    }
    let open = Access::open(AccessOptions::default()).unwrap();
    assert!(open.is_open() && open.caller(&HeaderMap::new()).await.unwrap().is_none());
    assert!(Access::open(AccessOptions { keys: Some("/nowhere".into()), ..Default::default() }).is_err());
}

/// Of two credentials one has to be valid; two valid ones must be those of one tenant.
#[tokio::test]
async fn accepts_one_valid_credential_of_two() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("keys.yaml");
    let sha256 = |key: &str| {
        let digest = ring::digest::digest(&ring::digest::SHA256, key.as_bytes());
        digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    let (a, b, c) = (sha256("a"), sha256("b"), sha256("c"));
    let text = format!(
        "tenants:\n- name: one\n  keys: [{{sha256: {a}}}, {{sha256: {b}}}]\n- name: two\n  keys: [{{sha256: {c}}}]\n"
    );
    std::fs::write(&file, text).unwrap();
    let access = Access::open(AccessOptions { keys: Some(file), ..Default::default() }).unwrap();
    for (bearer, key, expected) in [
        ("a", "b", Ok("one")),
        ("a", "wrong", Ok("one")),
        ("wrong", "c", Ok("two")),
        ("", "c", Ok("two")),
        ("a", "", Ok("one")),
        ("a", "c", Err("ambiguous_credentials")),
        ("wrong", "wrong", Err("invalid_api_key")),
    ] {
        let mut headers = with("authorization", &format!("Bearer {bearer}"));
        headers.insert("x-api-key", HeaderValue::from_str(key).unwrap());
        let found = access.caller(&headers).await;
        let found = found.as_ref().map(|caller| caller.as_ref().unwrap().tenant.name.as_str());
        assert_eq!(found.map_err(|error| error.code.unwrap()), expected, "{bearer} {key}");
    }
}

#[test]
fn limits_models_and_context() {
    let caller = caller(TenantLimits { models: Some(vec!["large".into()]), ..TenantLimits::default() });
    let policy = Policy::of(Some(caller));
    assert_eq!(policy.allow("small").unwrap_err().status, StatusCode::FORBIDDEN);
    policy.allow("large").unwrap();
    let caller = self::caller(TenantLimits { max_context: Some(100), ..TenantLimits::default() });
    assert_eq!(admit(&caller, wish(101, 0)).unwrap_err().status, StatusCode::FORBIDDEN);
    admit(&caller, wish(100, 0)).unwrap();
}

#[test]
fn counts_parallel_requests_while_they_run() {
    let caller = caller(TenantLimits { parallel_requests: Some(2), ..TenantLimits::default() });
    let first = admit(&caller, wish(1, 0)).unwrap();
    let _second = admit(&caller, wish(1, 0)).unwrap();
    for _ in 0..3 {
        let error = admit(&caller, wish(1, 0)).unwrap_err();
        assert_eq!((error.status, error.retry_after), (StatusCode::TOO_MANY_REQUESTS, Some(1)));
    }
    drop(first);
    admit(&caller, wish(1, 0)).unwrap();
}

/// Whether that is the number of seconds, less those that a slow machine let pass.
fn is_within(seconds: Option<u32>, most: u32, began: Instant) -> bool {
    let passed = began.elapsed().as_secs() as u32 + 1;
    seconds.is_some_and(|seconds| seconds <= most && seconds + passed >= most)
}

#[test]
fn rejects_requests_above_the_minute_limit() {
    let began = Instant::now();
    let caller = caller(TenantLimits { requests_per_minute: Some(3), ..TenantLimits::default() });
    for left in (0..3).rev() {
        admit(&caller, wish(1, 0)).unwrap();
        let mut headers = HeaderMap::new();
        caller.tenant.write_headers(&mut headers);
        assert_eq!(headers["x-ratelimit-limit-requests"], "3");
        assert_eq!(headers["x-ratelimit-remaining-requests"], left.to_string().as_str());
        assert!(!headers.contains_key("x-ratelimit-limit-tokens"));
    }
    let error = admit(&caller, wish(1, 0)).unwrap_err();
    assert_eq!(error.status, StatusCode::TOO_MANY_REQUESTS);
    assert!(is_within(error.retry_after, 20, began), "a third of a minute: {:?}", error.retry_after);
}

#[test]
fn reserves_and_settles_tokens() {
    let caller = caller(TenantLimits { tokens_per_minute: Some(6_000), ..TenantLimits::default() });
    let mut permit = admit(&caller, wish(1_000, 4_000)).unwrap();
    assert_eq!(admit(&caller, wish(2_000, 0)).unwrap_err().status, StatusCode::TOO_MANY_REQUESTS);
    permit.generated(500);
    drop(permit);
    // 1,500 were used, 4,500 are left
    drop(admit(&caller, wish(4_400, 0)).unwrap());
    assert!(admit(&caller, wish(1_000, 0)).is_err());
    // larger than a minute's worth: when the bucket is full, and then it is owed
    let began = Instant::now();
    let caller = self::caller(TenantLimits { tokens_per_minute: Some(100), ..TenantLimits::default() });
    drop(admit(&caller, wish(350, 0)).unwrap());
    let error = admit(&caller, wish(1, 0)).unwrap_err();
    assert!(is_within(error.retry_after, 151, began), "{:?}", error.retry_after);
}

#[test]
fn grants_an_equal_share_per_router() {
    let limits = TenantLimits { requests_per_minute: Some(3), parallel_requests: Some(5), ..TenantLimits::default() };
    let routers = LiveRouters::default();
    let caller = among(limits, &routers);
    let admitted = |caller: &Caller| (0..20).filter(|_| admit(caller, wish(1, 0)).is_ok()).count();
    routers.set(3);
    assert_eq!(admitted(&caller), 1, "what was saved for more shrinks to the share");
    routers.set(1);
    assert_eq!(admitted(&caller), 0, "a router that dies leaves a rate, not what it had saved");
    let caller = among(TenantLimits { parallel_requests: Some(5), ..TenantLimits::default() }, &routers);
    routers.set(2);
    let open: Vec<_> = (0..20).map_while(|_| admit(&caller, wish(1, 0)).ok()).collect();
    assert_eq!(open.len(), 3, "five among two, rounded up");
    drop(open);
    let caller = among(TenantLimits { requests_per_minute: Some(1), ..TenantLimits::default() }, &routers);
    assert_eq!(admitted(&caller), 1, "the smallest limit lets something through");
}

/// What is left of a minute's worth of tokens.
fn left(caller: &Caller) -> f64 {
    let mut headers = HeaderMap::new();
    caller.tenant.write_headers(&mut headers);
    headers["x-ratelimit-remaining-tokens"].to_str().unwrap().parse().unwrap()
}

#[test]
fn reserves_the_recent_mean_without_max_tokens() {
    let caller = caller(TenantLimits { tokens_per_minute: Some(1_000), ..TenantLimits::default() });
    let open = |prompt_tokens, window| QuotaRequest { names_max_tokens: false, ..wish(prompt_tokens, window) };
    // as much as a tenant that generated nothing yet is expected to
    let first = admit(&caller, open(10, 100_000)).unwrap();
    assert!(left(&caller) < 500.0);
    assert_eq!(admit(&caller, open(10, 100_000)).unwrap_err().status, StatusCode::TOO_MANY_REQUESTS);
    drop(first);
    // never more than there is room for
    let short = admit(&caller, open(10, 16)).unwrap();
    assert!(left(&caller) >= 940.0, "{}", left(&caller));
    drop(short);
    for _ in 0..60 {
        let mut permit = admit(&caller, open(0, 100_000)).unwrap();
        permit.generated(1);
    }
    let permit = admit(&caller, open(10, 100_000)).unwrap();
    assert!(left(&caller) > 800.0, "{}", left(&caller));
    drop(permit);
}

#[test]
fn charges_tokens_beyond_the_reservation_immediately() {
    let caller = caller(TenantLimits { tokens_per_minute: Some(1_000), ..TenantLimits::default() });
    let mut permit = admit(&caller, wish(10, 20)).unwrap();
    permit.generated(20);
    assert!(left(&caller) >= 970.0);
    permit.generated(5_000);
    assert_eq!(left(&caller), 0.0);
    assert_eq!(admit(&caller, wish(1, 0)).unwrap_err().status, StatusCode::TOO_MANY_REQUESTS, "while it still runs");
    drop(permit);
    let refused = admit(&caller, wish(1, 0)).unwrap_err();
    assert!(refused.retry_after > Some(200), "4,000 tokens are owed: {:?}", refused.retry_after);
}

#[test]
fn charges_more_for_prompt_logprobs_and_less_for_counting() {
    let caller = caller(TenantLimits { tokens_per_minute: Some(10_000), ..TenantLimits::default() });
    let permit = admit(&caller, QuotaRequest { prompt_logprobs: true, ..wish(1_000, 0) }).unwrap();
    assert!((7_999.0..8_100.0).contains(&left(&caller)), "{}", left(&caller));
    drop(permit);
    assert!(left(&caller) < 8_500.0, "it is settled by the same weight");
    let before = left(&caller);
    caller.charge_encoded(10_000);
    assert!((950.0..=1_001.0).contains(&(before - left(&caller))), "{before} {}", left(&caller));
}

#[test]
fn counts_a_request_when_it_begins() {
    let caller = caller(TenantLimits { requests_per_minute: Some(2), ..TenantLimits::default() });
    drop((caller.begin().unwrap(), caller.begin().unwrap()));
    assert_eq!(caller.begin().unwrap_err().status, StatusCode::TOO_MANY_REQUESTS);
}

#[test]
fn limits_requests_to_the_class_of_the_tenant() {
    use crate::place::admission::Class;
    let limits = TenantLimits { class: super::limits::TenantClass::Batch, ..TenantLimits::default() };
    assert_eq!(Policy::of(Some(caller(limits))).class(Class::Interactive), Class::Batch);
    assert_eq!(Policy::of(Some(caller(TenantLimits::default()))).class(Class::Interactive), Class::Interactive);
}
