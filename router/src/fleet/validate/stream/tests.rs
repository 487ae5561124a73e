use bora_proto::v1::Timing;

use super::*;

fn bounds() -> StreamBounds {
    StreamBounds { prompt_tokens: 3, max_tokens: 5, vocabulary_size: 100, ..StreamBounds::default() }
}

fn started() -> Event {
    Event::Started(Started { prompt_tokens: 3, cached_tokens: 1, queued_seconds: 0.5 })
}

fn tokens(token_ids: &[u32]) -> Event {
    Event::Tokens(Tokens { token_ids: token_ids.to_vec(), logprobs: Vec::new() })
}

fn scored(token_id: u32, logprob: f32, top: usize) -> PositionLogprobs {
    let token = TokenLogprob { token_id, logprob, rank: 1 };
    PositionLogprobs { chosen: Some(token), top: vec![token; top] }
}

fn finished(completion_tokens: u32) -> Finished {
    let reason = FinishReason::Stop as i32;
    Finished { reason, prompt_tokens: 3, cached_tokens: 1, completion_tokens, timing: Some(Timing::default()) }
}

/// What is wrong with the first event that is, and its place.
fn first_violation(bounds: StreamBounds, events: impl IntoIterator<Item = Event>) -> Option<(usize, Kind)> {
    let mut check = StreamCheck::new(bounds);
    let mut violation = |event| check.check(&GenerateEvent { event: Some(event) }).err();
    events.into_iter().enumerate().find_map(|(at, event)| Some((at, violation(event)?.kind)))
}

#[test]
fn a_stream_within_its_request_passes() {
    let events = [started(), tokens(&[1, 99]), tokens(&[3, 4, 5]), Event::Finished(finished(5))];
    assert_eq!(first_violation(bounds(), events), None);
    let resumed = StreamBounds { generated: 4, ..bounds() };
    let cached = Event::Started(Started { prompt_tokens: 3, cached_tokens: 7, queued_seconds: 0.0 });
    assert_eq!(first_violation(resumed, [cached, tokens(&[1]), Event::Finished(finished(5))]), None);
    let aborted = Finished { reason: FinishReason::Aborted as i32, ..Finished::default() };
    assert_eq!(first_violation(bounds(), [Event::Finished(aborted)]), None, "a group that drains says no more");
    let logprobs = StreamBounds { top_logprobs: Some(2), prompt_logprobs: Some(0), ..bounds() };
    let prompt =
        |start, count| Event::PromptLogprobs(PromptLogprobs { start, positions: vec![scored(7, -0.5, 0); count] });
    let token = |id| Event::Tokens(Tokens { token_ids: vec![id], logprobs: vec![scored(id, 0.0, 2)] });
    let events = [started(), prompt(1, 1), prompt(2, 1), token(4), Event::Finished(finished(1))];
    assert_eq!(first_violation(logprobs, events), None);
}

#[test]
fn no_more_tokens_pass_than_were_asked_for() {
    let endless = std::iter::once(started()).chain(std::iter::repeat_with(|| tokens(&[1])));
    assert_eq!(first_violation(bounds(), endless), Some((6, Kind::TooManyTokens)));
    assert_eq!(first_violation(bounds(), [started(), tokens(&[1; 6])]), Some((1, Kind::TooManyTokens)));
    let nothing = std::iter::once(started()).chain(std::iter::repeat_with(|| tokens(&[])));
    assert_eq!(first_violation(bounds(), nothing), Some((1, Kind::Count)));
    let mut check = StreamCheck::new(bounds());
    let unknown = (0..1_000).find(|_| check.check(&GenerateEvent { event: None }).is_err());
    assert_eq!(unknown, Some(MAX_UNKNOWN_EVENTS as usize), "events of unknown kinds do not continue for ever");
}

#[test]
fn events_out_of_order_are_refused() {
    for first in [tokens(&[1]), Event::Finished(finished(0))] {
        assert_eq!(first_violation(bounds(), [first]), Some((0, Kind::Order)));
    }
    assert_eq!(first_violation(bounds(), [started(), started()]), Some((1, Kind::Order)));
    let asked = StreamBounds { prompt_logprobs: Some(0), ..bounds() };
    let part =
        |start, count| Event::PromptLogprobs(PromptLogprobs { start, positions: vec![scored(7, -0.5, 0); count] });
    assert_eq!(first_violation(bounds(), [started(), part(1, 2)]), Some((1, Kind::Logprobs)), "nobody asked");
    assert_eq!(first_violation(asked, [started(), part(0, 1)]), Some((1, Kind::Logprobs)), "the first has none");
    assert_eq!(first_violation(asked, [started(), part(1, 1), part(1, 1)]), Some((2, Kind::Logprobs)), "again");
    assert_eq!(first_violation(asked, [started(), part(1, 3)]), Some((1, Kind::Logprobs)), "beyond the prompt");
    assert_eq!(first_violation(asked, [started(), part(1, 0)]), Some((1, Kind::Logprobs)), "of nothing");
    assert_eq!(first_violation(asked, [started(), part(u32::MAX, 1)]), Some((1, Kind::Logprobs)));
    assert_eq!(
        first_violation(asked, [started(), part(1, 1), tokens(&[1])]),
        Some((2, Kind::Logprobs)),
        "one is missing"
    );
}

#[test]
fn a_grammar_compiles_once_and_only_if_there_is_one() {
    let mut none = StreamCheck::new(bounds());
    assert!(none.compiled().is_err());
    let mut check = StreamCheck::new(StreamBounds { has_grammar: true, ..bounds() });
    assert!(check.compiled().is_ok() && check.compiled().is_err());
}

#[test]
fn counts_and_ids_are_those_of_the_request() {
    let starts = [
        Started { prompt_tokens: 4, cached_tokens: 0, queued_seconds: 0.0 },
        Started { prompt_tokens: 3, cached_tokens: u32::MAX, queued_seconds: 0.0 },
        Started { prompt_tokens: 3, cached_tokens: 4, queued_seconds: 0.0 },
        Started { prompt_tokens: 3, cached_tokens: 0, queued_seconds: f64::NAN },
        Started { prompt_tokens: 3, cached_tokens: 0, queued_seconds: -1.0 },
    ];
    for start in starts {
        assert_eq!(first_violation(bounds(), [Event::Started(start)]), Some((0, Kind::Count)), "{start:?}");
    }
    assert_eq!(first_violation(bounds(), [started(), tokens(&[100])]), Some((1, Kind::TokenId)));
    let bad_timing = Timing { decode_seconds: f64::INFINITY, ..Timing::default() };
    let ends = [
        (Finished { completion_tokens: u32::MAX, ..finished(1) }, Kind::Count),
        (Finished { cached_tokens: u32::MAX, ..finished(1) }, Kind::Count),
        (Finished { prompt_tokens: 0, ..finished(1) }, Kind::Count),
        (Finished { timing: Some(bad_timing), ..finished(1) }, Kind::Count),
        (Finished { reason: 0, ..finished(1) }, Kind::FinishReason),
        (Finished { reason: 77, ..finished(1) }, Kind::FinishReason),
    ];
    for (end, kind) in ends {
        let events = [started(), tokens(&[1]), Event::Finished(end)];
        assert_eq!(first_violation(bounds(), events), Some((2, kind)), "{end:?}");
    }
}

#[test]
fn logprobs_are_numbers_and_as_many_as_asked() {
    let asked = StreamBounds { top_logprobs: Some(1), ..bounds() };
    let event = |logprobs: Vec<PositionLogprobs>| Event::Tokens(Tokens { token_ids: vec![7], logprobs });
    let check = |logprobs: Vec<PositionLogprobs>| first_violation(asked, [started(), event(logprobs)]);
    assert_eq!(check(vec![scored(7, -1.0, 1)]), None);
    for logprob in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1.0] {
        assert_eq!(check(vec![scored(7, logprob, 1)]), Some((1, Kind::Logprobs)), "{logprob}");
    }
    for bad in [
        vec![],
        vec![scored(7, -1.0, 1); 2],
        vec![scored(7, -1.0, 0)],
        vec![scored(7, -1.0, 2)],
        vec![scored(8, -1.0, 1)],
    ] {
        assert_eq!(check(bad), Some((1, Kind::Logprobs)));
    }
    assert_eq!(check(vec![PositionLogprobs { chosen: None, ..scored(7, -1.0, 1) }]), Some((1, Kind::Logprobs)));
    assert_eq!(check(vec![scored(100, -1.0, 1)]), Some((1, Kind::TokenId)));
    assert_eq!(first_violation(bounds(), [started(), event(vec![scored(7, -1.0, 0)])]), Some((1, Kind::Logprobs)));
    let all = StreamBounds { top_logprobs: Some(u32::MAX), ..bounds() };
    assert_eq!(first_violation(all, [started(), event(vec![scored(7, -1.0, 100)])]), None, "no more than there are");
}

#[test]
fn a_message_is_no_larger_than_its_request_allows() {
    assert!(bounds().max_message_bytes() < 5_000);
    let all = StreamBounds { top_logprobs: Some(20), prompt_logprobs: Some(20), max_tokens: u32::MAX, ..bounds() };
    assert_eq!(all.max_message_bytes(), 256 << 20);
    // the largest that can be meant fits
    use prost::Message as _;
    let position = PositionLogprobs {
        chosen: Some(TokenLogprob { token_id: u32::MAX, logprob: -1.0, rank: u32::MAX }),
        top: vec![TokenLogprob { token_id: u32::MAX, logprob: -1.0, rank: u32::MAX }; 20],
    };
    let tokens = Tokens { token_ids: vec![u32::MAX; 1000], logprobs: vec![position; 1000] };
    let bytes = GenerateEvent { event: Some(Event::Tokens(tokens)) }.encoded_len();
    let bounds = StreamBounds { max_tokens: 1000, top_logprobs: Some(20), ..bounds() };
    assert!(bytes <= bounds.max_message_bytes(), "{bytes} {}", bounds.max_message_bytes());
}
