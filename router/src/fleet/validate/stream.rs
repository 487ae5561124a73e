//! The events of one sequence, against what its request allows.

use bora_proto::v1::{
    FinishReason, Finished, GenerateEvent, PositionLogprobs, PromptLogprobs, Started, TokenLogprob, Tokens,
    generate_event::Event,
};

use super::{Violation, ViolationKind as Kind, ensure, is_duration};

/// Events of a kind that this router does not know, which a newer worker may send.
const MAX_UNKNOWN_EVENTS: u32 = 64;
/// What rounding may add to the logarithm of a probability.
const LOGPROB_MARGIN: f32 = 1e-3;
/// An event without tokens, and what stands around them.
const BASE_MESSAGE_BYTES: u64 = 4 << 10;
/// A token ID on the wire: five bytes at most.
const TOKEN_BYTES: u64 = 5;
/// A token with its logprob and rank on the wire.
const LOGPROB_BYTES: u64 = 24;
/// No event is larger, whatever the request allows: the logprobs of a prompt of 262,144 tokens.
const MAX_MESSAGE_BYTES: u64 = 256 << 20;

/// What a request allows its stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamBounds {
    /// Tokens of the prompt, without those generated before.
    pub prompt_tokens: u32,
    /// Tokens that groups before this one generated.
    pub generated: u32,
    /// Tokens that may be generated, those of `generated` included.
    pub max_tokens: u32,
    /// Token IDs are below this.
    pub vocabulary_size: u32,
    /// Alternatives that each generated token comes with; `None` = no logprobs.
    pub top_logprobs: Option<u32>,
    /// The same for the prompt's tokens.
    pub prompt_logprobs: Option<u32>,
    /// Whether the output must match a grammar.
    pub has_grammar: bool,
}

impl StreamBounds {
    /// Bytes of the largest event that can be meant.
    pub fn max_message_bytes(&self) -> usize {
        let position = |top: Option<u32>| top.map_or(0, |top| (u64::from(top) + 2) * LOGPROB_BYTES);
        let output = u64::from(self.max_tokens.saturating_sub(self.generated));
        let tokens = output.saturating_mul(TOKEN_BYTES + position(self.top_logprobs));
        let prompt = u64::from(self.prompt_tokens).saturating_mul(position(self.prompt_logprobs));
        BASE_MESSAGE_BYTES.saturating_add(tokens).saturating_add(prompt).min(MAX_MESSAGE_BYTES) as usize
    }

    /// Alternatives that are listed where so many were asked for.
    fn listed(&self, asked: u32) -> usize {
        asked.min(self.vocabulary_size) as usize
    }
}

/// Follows one stream.
#[derive(Debug)]
pub struct StreamCheck {
    bounds: StreamBounds,
    compiled: bool,
    started: bool,
    /// Position of the prompt whose logprobs come next; the first position has none.
    next_position: u32,
    generated: u32,
    unknown: u32,
}

impl StreamCheck {
    /// Of a stream that begins.
    pub fn new(bounds: StreamBounds) -> Self {
        let generated = bounds.generated;
        Self { bounds, compiled: false, started: false, next_position: 1, generated, unknown: 0 }
    }

    /// Whether the next event may come as it is.
    pub fn check(&mut self, event: &GenerateEvent) -> Result<(), Violation> {
        match &event.event {
            Some(Event::Compiled(_)) => self.compiled(),
            Some(Event::Started(started)) => self.start(started),
            Some(Event::PromptLogprobs(part)) => self.prompt_logprobs(part),
            Some(Event::Tokens(tokens)) => self.tokens(tokens),
            Some(Event::Finished(finished)) => self.finish(finished),
            None => self.unknown(),
        }
    }

    /// The grammar has compiled. Once, before the sequence starts.
    fn compiled(&mut self) -> Result<(), Violation> {
        ensure(self.bounds.has_grammar, Kind::Order, || "a grammar that nobody sent has compiled")?;
        ensure(!self.compiled && self.generated == self.bounds.generated, Kind::Order, || "the grammar compiled late")?;
        self.compiled = true;
        Ok(())
    }

    fn start(&mut self, started: &Started) -> Result<(), Violation> {
        ensure(!self.started, Kind::Order, || "it started twice")?;
        self.started = true;
        self.prompt_counts(started.prompt_tokens, started.cached_tokens)?;
        ensure(is_duration(started.queued_seconds), Kind::Count, || "the time in the queue is no duration")
    }

    fn has_started(&self) -> Result<(), Violation> {
        ensure(self.started, Kind::Order, || "it did not start first")
    }

    fn prompt_counts(&self, prompt_tokens: u32, cached_tokens: u32) -> Result<(), Violation> {
        let expected = self.bounds.prompt_tokens;
        ensure(prompt_tokens == expected, Kind::Count, || {
            format!("a prompt of {prompt_tokens} tokens, it has {expected}")
        })?;
        // tokens that were generated before are part of what the group computes, so they may be cached as well
        let most = u64::from(expected) + u64::from(self.bounds.generated);
        ensure(u64::from(cached_tokens) <= most, Kind::Count, || format!("{cached_tokens} of {most} tokens cached"))
    }

    fn prompt_logprobs(&mut self, part: &PromptLogprobs) -> Result<(), Violation> {
        self.has_started()?;
        let Some(asked) = self.bounds.prompt_logprobs else {
            return Err(Violation::new(Kind::Logprobs, "logprobs of the prompt that nobody asked for"));
        };
        ensure(
            self.generated == self.bounds.generated,
            Kind::Order,
            || "logprobs of the prompt after the first token",
        )?;
        let (start, expected) = (part.start, self.next_position);
        ensure(start == expected, Kind::Logprobs, || format!("logprobs of position {start} instead of {expected}"))?;
        let end = u64::from(start) + part.positions.len() as u64;
        ensure(!part.positions.is_empty(), Kind::Logprobs, || "logprobs of no position")?;
        ensure(end <= u64::from(self.bounds.prompt_tokens), Kind::Logprobs, || "logprobs beyond the prompt")?;
        for position in &part.positions {
            self.position(position, asked)?;
        }
        self.next_position = end as u32;
        Ok(())
    }

    fn tokens(&mut self, tokens: &Tokens) -> Result<(), Violation> {
        self.has_started()?;
        self.prompt_is_scored()?;
        let count = tokens.token_ids.len();
        ensure(count > 0, Kind::Count, || "an event of no tokens")?;
        let (generated, most) = (self.generated, self.bounds.max_tokens);
        ensure(count as u64 + u64::from(generated) <= u64::from(most), Kind::TooManyTokens, || {
            format!("{count} tokens after {generated} of at most {most}")
        })?;
        let size = self.bounds.vocabulary_size;
        if let Some(id) = tokens.token_ids.iter().find(|id| **id >= size) {
            return Err(Violation::new(Kind::TokenId, format!("token ID {id} of a vocabulary of {size}")));
        }
        match self.bounds.top_logprobs {
            None => ensure(tokens.logprobs.is_empty(), Kind::Logprobs, || "logprobs that nobody asked for")?,
            Some(asked) => {
                let scored = tokens.logprobs.len();
                ensure(scored == count, Kind::Logprobs, || format!("{scored} logprobs of {count} tokens"))?;
                for (id, position) in tokens.token_ids.iter().zip(&tokens.logprobs) {
                    self.position(position, asked)?;
                    let chosen = position.chosen.as_ref().map(|chosen| chosen.token_id);
                    ensure(chosen == Some(*id), Kind::Logprobs, || {
                        format!("token ID {id} with the logprob of {chosen:?}")
                    })?;
                }
            }
        }
        self.generated += count as u32;
        Ok(())
    }

    /// All logprobs of the prompt came, if they were asked for.
    fn prompt_is_scored(&self) -> Result<(), Violation> {
        let scored = self.bounds.prompt_logprobs.is_none() || self.next_position >= self.bounds.prompt_tokens;
        ensure(scored, Kind::Logprobs, || "logprobs of the prompt are missing")
    }

    fn position(&self, position: &PositionLogprobs, asked: u32) -> Result<(), Violation> {
        let (listed, expected) = (position.top.len(), self.bounds.listed(asked));
        ensure(listed == expected, Kind::Logprobs, || format!("{listed} alternatives instead of {expected}"))?;
        let Some(chosen) = &position.chosen else {
            return Err(Violation::new(Kind::Logprobs, "a position without its token"));
        };
        position.top.iter().chain([chosen]).try_for_each(|token| self.logprob(token))
    }

    fn logprob(&self, token: &TokenLogprob) -> Result<(), Violation> {
        let size = self.bounds.vocabulary_size;
        let TokenLogprob { token_id, logprob, rank } = *token;
        ensure(token_id < size, Kind::TokenId, || format!("token ID {token_id} of a vocabulary of {size}"))?;
        ensure((1..=size).contains(&rank), Kind::Logprobs, || format!("rank {rank} in a vocabulary of {size}"))?;
        ensure(logprob.is_finite() && logprob <= LOGPROB_MARGIN, Kind::Logprobs, || format!("a logprob of {logprob}"))
    }

    fn finish(&mut self, finished: &Finished) -> Result<(), Violation> {
        match FinishReason::try_from(finished.reason) {
            // whatever it counted: another group continues
            Ok(FinishReason::Aborted) => return Ok(()),
            Ok(FinishReason::Stop | FinishReason::Length) => {}
            Ok(FinishReason::Unspecified) | Err(_) => {
                let detail = format!("finish reason {}", finished.reason);
                return Err(Violation::new(Kind::FinishReason, detail));
            }
        }
        self.has_started()?;
        self.prompt_is_scored()?;
        self.prompt_counts(finished.prompt_tokens, finished.cached_tokens)?;
        let (said, sent) = (finished.completion_tokens, self.generated);
        ensure(said == sent, Kind::Count, || format!("{said} tokens generated, {sent} sent"))?;
        let timing = finished.timing.unwrap_or_default();
        let durations = [timing.queued_seconds, timing.prefill_seconds, timing.decode_seconds];
        ensure(durations.into_iter().all(is_duration), Kind::Count, || "a time that is no duration")
    }

    fn unknown(&mut self) -> Result<(), Violation> {
        self.unknown += 1;
        ensure(self.unknown <= MAX_UNKNOWN_EVENTS, Kind::Order, || "too many events of unknown kinds")
    }
}

#[cfg(test)]
mod tests;
