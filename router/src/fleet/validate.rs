//! What a worker may say. Every message of a group passes here before anything believes it: the events of a sequence
//! ([`stream`]), the events of the group ([`events`]) and its record ([`record`]).
//!
//! A message that breaks the contract is a [`Violation`]. It ends the stream that it came on, is counted by kind, and
//! opens the group's breaker. What a client is notified of it is the router's own text.

pub mod events;
pub mod record;
pub mod stream;

use std::borrow::Cow;

/// Characters of a worker's text that are logged.
const MAX_LOGGED_CHARS: usize = 300;

/// Which part of the contract a message breaks: the label of `bora_router_protocol_violations_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ViolationKind {
    /// It cannot be decoded.
    Malformed,
    /// It is larger than anything that could be meant.
    TooLarge,
    /// It comes at the wrong time: before the start, twice, after the end.
    Order,
    /// A token ID outside the vocabulary.
    TokenId,
    /// More tokens than were asked for.
    TooManyTokens,
    /// A count that the request does not allow.
    Count,
    /// Logprobs that were not asked for, too few, too many, or no numbers.
    Logprobs,
    /// An end for no known reason.
    FinishReason,
    /// More blocks than the group has.
    Blocks,
    /// A load or a state that cannot be.
    Load,
    /// A record that cannot be.
    Record,
    /// Weights that differ from those of the model's other groups.
    Weights,
}

impl ViolationKind {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Malformed,
        Self::TooLarge,
        Self::Order,
        Self::TokenId,
        Self::TooManyTokens,
        Self::Count,
        Self::Logprobs,
        Self::FinishReason,
        Self::Blocks,
        Self::Load,
        Self::Record,
        Self::Weights,
    ];

    /// Its name on labels.
    pub fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::TooLarge => "too_large",
            Self::Order => "order",
            Self::TokenId => "token_id",
            Self::TooManyTokens => "too_many_tokens",
            Self::Count => "count",
            Self::Logprobs => "logprobs",
            Self::FinishReason => "finish_reason",
            Self::Blocks => "blocks",
            Self::Load => "load",
            Self::Record => "record",
            Self::Weights => "weights",
        }
    }
}

/// A message that breaks the contract.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("protocol violation ({}): {detail}", kind.name())]
pub struct Violation {
    /// Which part of it.
    pub kind: ViolationKind,
    /// For the log: our own text with the message's numbers.
    pub detail: Cow<'static, str>,
}

impl Violation {
    /// With a description of what is wrong.
    pub fn new(kind: ViolationKind, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, detail: detail.into() }
    }
}

/// Fails unless `holds`.
fn ensure<D: Into<Cow<'static, str>>>(
    holds: bool,
    kind: ViolationKind,
    detail: impl FnOnce() -> D,
) -> Result<(), Violation> {
    if holds { Ok(()) } else { Err(Violation::new(kind, detail())) }
}

/// A number of seconds that can be true.
fn is_duration(seconds: f64) -> bool {
    (0.0..=1e10).contains(&seconds)
}

/// A worker's text for the log: one line of bounded length.
pub fn clip(text: &str) -> String {
    let mut clipped: String =
        text.chars().take(MAX_LOGGED_CHARS).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(MAX_LOGGED_CHARS).is_some() {
        clipped.push('…');
    }
    clipped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logged_text_is_one_bounded_line() {
        assert_eq!(clip("a\nb\x1b[31m"), "a b [31m");
        let long = clip(&"ä".repeat(10_000));
        assert_eq!((long.chars().count(), long.chars().last()), (MAX_LOGGED_CHARS + 1, Some('…')));
        assert_eq!(clip(""), "");
    }

    #[test]
    fn every_kind_has_a_name_of_its_own() {
        let mut names: Vec<&str> = ViolationKind::ALL.iter().map(|kind| kind.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ViolationKind::ALL.len());
    }
}
