//! One sequence, from its placement to its end, across failures of its groups.
//!
//! The generated tokens are kept. If a group crashes, drains or refuses, the sequence is placed on another group with
//! the prompt and those tokens, and continues from there. Sampling depends only on seed and position, so the client
//! sees a pause but no error and no repeated token.
//!
//! After `max_attempts` group crashes the request is treated as a poison pill and is not retried. Groups that drain or
//! refuse do not count, because a long stream may outlive many of them. If a group crashes before the request's grammar
//! has compiled, the request is not retried at all.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bora_common::{blocks::BlockHash, peer::identity, telemetry::TraceContext};
use bora_proto::v1::{
    FinishReason, Finished, GenerateEvent, GenerateRequest, Grammar, GrammarCompiled, Image, Logprobs, Priority,
    PromptLogprobs, Sampling, Stopping, Tokens, generate_event::Event as Sent,
};
use bytes::Bytes;
use futures::Stream as _;
use prost::Message as _;
use tokio::{
    sync::oneshot,
    time::{Instant, Sleep},
};
use tonic::{Status, Streaming};

use super::{
    attempts::Tried,
    budget::RetryBudget,
    codec::Outgoing,
    crash_tracker::Deaths,
    stream::{self, Failure},
    watch::Watch,
};
use crate::{
    encode::wire::{PackedIds, pack},
    fleet::{
        validate::stream::{StreamBounds, StreamCheck},
        view::{Fleet, Group, Link},
    },
    metrics::Metrics,
    options::RouterOptions,
    place::{
        Slot,
        admission::{Admission, Class, QueuedRequest},
        choose::{NoGroup, Placement, PlacementRequest, place},
        load_tracker::Booking,
    },
};

/// Maximum number of groups that a sequence is tried on, including groups that only drained or refused.
const MAX_ATTEMPTS: u32 = 32;
/// Maximum number of output tokens that count as requested work. Most outputs end long before `max_tokens`.
const MAX_EXPECTED_TOKENS: u32 = 1024;
/// Interval at which a sequence without a group looks for one.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Silence after which a client that leaves counts against the group. A live group reports every second.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(3);
/// Time without acceptance after which a client that leaves counts against the group. A live group accepts a call
/// without delay, even if it queues the sequence.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(15);

/// A prompt and its parameters, which all its `n` sequences share.
pub struct Task {
    /// ID of the HTTP request.
    pub request_id: String,
    /// Name of the model.
    pub model: String,
    /// The prompt, as it is sent to a group.
    pub ids: PackedIds,
    /// Its images, in the order of their offsets.
    pub images: Vec<Image>,
    /// The hashes of its full blocks.
    pub hashes: Arc<[BlockHash]>,
    /// The session, if the client names one.
    pub session: Option<u64>,
    /// Class: interactive or batch.
    pub class: Class,
    /// The tenant.
    pub tenant: u64,
    /// Sampling parameters. Each sequence has its own seed.
    pub sampling: Sampling,
    /// Stop conditions.
    pub stopping: Stopping,
    /// Token IDs that end it: end of sequence (unless ignored) and `stop_token_ids`.
    pub end_ids: Vec<u32>,
    /// Grammar of the structured output.
    pub grammar: Option<Grammar>,
    /// Salt of the prefix cache.
    pub cache_salt: Bytes,
    /// Deadline.
    pub deadline: Instant,
    /// Groups that crashed under the request, including under sequences of its other prompts.
    pub deaths: Arc<Deaths>,
    /// Parent of the spans of its calls: the request's span, or the client's trace context.
    pub trace: Option<TraceContext>,
    /// The client's `tracestate`, forwarded unchanged.
    pub tracestate: Option<tonic::metadata::AsciiMetadataValue>,
}

/// The events of a sequence, in this order.
#[derive(Debug)]
pub enum Event {
    /// The sequence left the queue. Sent once.
    Started {
        /// Prompt tokens found in the group's cache.
        cached_tokens: u32,
    },
    /// Logprobs of prompt positions, each sent once.
    PromptLogprobs(PromptLogprobs),
    /// Generated token IDs.
    Tokens(Tokens),
    /// The end.
    Finished(Finished),
}

/// The reason why a sequence failed finally.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SequenceError {
    /// No group was found, at first or after the failure of another group.
    #[error("{0}")]
    NoGroup(NoGroup),
    /// `max_attempts` groups crashed: the request is treated as a poison pill.
    #[error("the groups that took the request died ({deaths} of them)")]
    Poison {
        /// Number of groups that crashed under the request.
        deaths: u32,
    },
    /// The group crashed while it compiled the request's grammar. The grammar is treated as the cause.
    #[error("the group that compiled the request's grammar died")]
    GrammarPoisonPill,
    /// The failure of the last group, if no other group could continue.
    #[error("{failure} (after {attempts} attempts)")]
    Failed {
        /// The failure.
        failure: Failure,
        /// Number of groups tried.
        attempts: u32,
    },
}

enum Phase {
    /// No group can start the sequence now.
    Queued {
        placed: oneshot::Receiver<Result<Placement, NoGroup>>,
        since: Instant,
    },
    Opening {
        booking: Booking,
        opening: Pin<Box<dyn Future<Output = Result<Streaming<GenerateEvent>, Status>> + Send>>,
        since: Instant,
        /// Limits of what the group may send.
        bounds: StreamBounds,
        /// The wait that the sequence resumes if the group is full.
        waited: Option<Wait>,
    },
    Streaming {
        booking: Booking,
        events: Box<Streaming<GenerateEvent>>,
        check: StreamCheck,
        responded: bool,
    },
    Waiting {
        poll_again: Pin<Box<Sleep>>,
        wait: Wait,
    },
    /// All tokens were generated. Only the final event was lost.
    Ended(Finished),
    Done,
}

/// The sequence has lost its group, and no other group can continue it now.
struct Wait {
    until: Instant,
    /// The error it ends with, if no group can continue it in time.
    failure: Failure,
}

/// The parts of the router that sequences use.
pub struct Relay {
    /// The groups.
    pub fleet: Arc<Fleet>,
    /// The queue of requests that wait for a group.
    pub admission: Arc<Admission>,
    /// The retry budget.
    pub retries: RetryBudget,
    /// Limits.
    pub options: RouterOptions,
    /// Counters.
    pub metrics: Arc<Metrics>,
}

/// One sequence of a task.
pub struct Sequence {
    relay: Arc<Relay>,
    task: Arc<Task>,
    stream_id: String,
    seed: u64,
    logprobs: Option<Logprobs>,
    generated: Vec<u32>,
    prompt_logprobs_until: u32,
    /// Whether a group has accepted the sequence and the client may be notified.
    accepted: bool,
    /// Whether a group has compiled its grammar, or it has none.
    compiled: bool,
    /// An event that arrived before the caller polled.
    early: Option<Event>,
    started: bool,
    attempts: u32,
    /// Number of groups that were unreachable or violated the contract. The request is not the cause of these failures.
    unreached: u32,
    tried: Tried,
    served_by: Vec<String>,
    /// Fingerprint of the weights that generated its tokens.
    weights: Option<Arc<str>>,
    explanation: Option<String>,
    watch: Watch,
    phase: Phase,
}

impl Sequence {
    /// Places a sequence. Its load is assigned on return. Nothing is sent before the sequence is polled.
    pub fn place(
        relay: Arc<Relay>,
        task: Arc<Task>,
        stream_id: String,
        seed: u64,
        logprobs: Option<Logprobs>,
    ) -> Result<Self, SequenceError> {
        let mut sequence = Self {
            watch: Watch::new(task.trace),
            compiled: task.grammar.is_none(),
            early: None,
            relay,
            task,
            stream_id,
            seed,
            logprobs,
            generated: Vec::new(),
            prompt_logprobs_until: 0,
            accepted: false,
            started: false,
            attempts: 0,
            unreached: 0,
            tried: Tried::default(),
            served_by: Vec::new(),
            weights: None,
            explanation: None,
            phase: Phase::Done,
        };
        sequence.relay.retries.earn(sequence.task.tenant);
        sequence.place_first().map_err(SequenceError::NoGroup)?;
        Ok(sequence)
    }

    /// Opens a stream if the queue is empty and a group can start the sequence now. Otherwise queues the sequence, also
    /// if no group is ready but one is expected.
    fn place_first(&mut self) -> Result<(), NoGroup> {
        let class = self.task.class;
        let options = &self.relay.options;
        let mut longest = match class {
            Class::Interactive => Some(options.max_waiting_time()),
            Class::Batch => None,
        };
        if !self.has_ready_group() {
            self.relay.metrics.unserved(&self.task.model);
            if !self.awaits_group() {
                return Err(NoGroup::NoneReady);
            }
            longest = Some(options.wait_for_group());
        } else if !self.relay.admission.has_line(class) {
            match self.find_group(&[], Some(class)) {
                Ok(placement) => {
                    self.open(placement, None);
                    return Ok(());
                }
                Err(NoGroup::NoRoom | NoGroup::NoneReady) => {}
                Err(other) => return Err(other),
            }
        }
        let until = longest.map_or(self.task.deadline, |longest| self.task.deadline.min(Instant::now() + longest));
        let ask = QueuedRequest {
            model: self.task.model.clone(),
            hashes: Arc::clone(&self.task.hashes),
            tokens: self.task.ids.len(),
            session: self.task.session,
            class,
            tenant: self.task.tenant,
            cost: self.task.ids.len() as f64 + f64::from(self.task.stopping.max_tokens.min(MAX_EXPECTED_TOKENS)),
            until,
            explain: self.explains(),
        };
        let placed = self.relay.admission.wait(ask)?;
        self.relay.metrics.queued();
        self.watch.waits_in_line();
        self.phase = Phase::Queued { placed, since: Instant::now() };
        Ok(())
    }

    /// Whether a group of the model is expected and requests wait for it.
    fn awaits_group(&self) -> bool {
        let is_expected = self.relay.fleet.view().model(&self.task.model).is_some_and(|model| model.is_expected());
        is_expected && !self.relay.options.wait_for_group().is_zero()
    }

    fn has_ready_group(&self) -> bool {
        let view = self.relay.fleet.view();
        view.model(&self.task.model).is_some_and(|model| model.groups.iter().any(|group| group.is_ready()))
    }

    fn explains(&self) -> bool {
        self.relay.options.debug || self.watch.is_traced() || tracing::enabled!(tracing::Level::DEBUG)
    }

    /// The groups that served the sequence, in order.
    pub fn served_by(&self) -> &[String] {
        &self.served_by
    }

    /// The reasons of its first placement, in debug mode.
    pub fn explanation(&self) -> Option<&str> {
        self.explanation.as_deref()
    }

    /// Counts the generated tokens that have arrived and were not read. The call consumes them, so call it only before
    /// the sequence is dropped.
    pub fn unread_tokens(&mut self) -> u64 {
        let Phase::Streaming { events, .. } = &mut self.phase else { return 0 };
        let left = (self.task.stopping.max_tokens as usize).saturating_sub(self.generated.len());
        let mut context = Context::from_waker(Waker::noop());
        let (mut unread, mut bytes) = (0, 0);
        while unread < left
            && let Poll::Ready(Some(Ok(event))) = Pin::new(&mut **events).poll_next(&mut context)
        {
            bytes += event.encoded_len();
            match event.event {
                Some(Sent::Tokens(tokens)) => unread += tokens.token_ids.len(),
                Some(Sent::Finished(_)) => return unread.min(left) as u64,
                _ => {}
            }
        }
        // a full window hides further tokens, so the group counts as having generated all remaining tokens
        let stands_still = bytes >= (stream::STREAM_WINDOW / 2) as usize;
        if stands_still { left as u64 } else { unread.min(left) as u64 }
    }

    /// Ready if a group has accepted the sequence and compiled its grammar, or if the sequence has ended or failed.
    pub fn poll_accepted(&mut self, cx: &mut Context<'_>) -> Poll<Option<SequenceError>> {
        loop {
            match &mut self.phase {
                Phase::Streaming { .. } if !self.compiled => match ready!(self.poll_stream(cx)) {
                    Ok(event) => self.early = event,
                    Err(error) => return Poll::Ready(Some(error)),
                },
                Phase::Streaming { .. } | Phase::Ended(_) | Phase::Done => {
                    return Poll::Ready(None);
                }
                Phase::Queued { .. } | Phase::Opening { .. } | Phase::Waiting { .. } => {
                    if let Err(error) = ready!(self.poll_phase(cx)) {
                        return Poll::Ready(Some(error));
                    }
                }
            }
        }
    }

    /// Returns the next event, or `None` after the end.
    pub fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Event, SequenceError>>> {
        if let Some(event) = self.early.take() {
            return Poll::Ready(Some(Ok(event)));
        }
        loop {
            if !matches!(self.phase, Phase::Streaming { .. }) {
                match std::mem::replace(&mut self.phase, Phase::Done) {
                    Phase::Done => return Poll::Ready(None),
                    Phase::Ended(finished) => {
                        return Poll::Ready(Some(Ok(Event::Finished(finished))));
                    }
                    other => self.phase = other,
                }
                if let Err(error) = ready!(self.poll_phase(cx)) {
                    return Poll::Ready(Some(Err(error)));
                }
                continue;
            }
            match ready!(self.poll_stream(cx)) {
                Ok(Some(event)) => return Poll::Ready(Some(Ok(event))),
                Ok(None) => {}
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
        }
    }

    /// Polls the stream of the current group. `None` is an event that the client does not see.
    fn poll_stream(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Event>, SequenceError>> {
        let Phase::Streaming { events, check, .. } = &mut self.phase else { return Poll::Ready(Ok(None)) };
        Poll::Ready(match ready!(Pin::new(&mut **events).poll_next(cx)) {
            Some(Ok(event)) => match check.check(&event) {
                Ok(()) => self.receive(event),
                Err(violation) => self.failed(violation.into()).map(|()| None),
            },
            Some(Err(status)) => self.failed(Failure::of_stream(&status)).map(|()| None),
            None => self.failed(Failure::Lost("its stream ended before the sequence did".into())).map(|()| None),
        })
    }

    /// Continues to open a stream or to look for a group.
    fn poll_phase(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SequenceError>> {
        match std::mem::replace(&mut self.phase, Phase::Done) {
            Phase::Queued { mut placed, since } => match Pin::new(&mut placed).poll(cx) {
                Poll::Pending => {
                    self.phase = Phase::Queued { placed, since };
                    Poll::Pending
                }
                Poll::Ready(outcome) => {
                    self.relay.metrics.waited(since.elapsed().as_secs_f64());
                    let placement = outcome.unwrap_or(Err(NoGroup::WaitedTooLong)).map_err(|reason| match reason {
                        NoGroup::WaitedTooLong if !self.has_ready_group() => NoGroup::NoneReady,
                        reason => reason,
                    });
                    self.open(placement.map_err(SequenceError::NoGroup)?, None);
                    Poll::Ready(Ok(()))
                }
            },
            Phase::Opening { booking, mut opening, since, bounds, waited } => match opening.as_mut().poll(cx) {
                Poll::Pending => {
                    self.phase = Phase::Opening { booking, opening, since, bounds, waited };
                    Poll::Pending
                }
                Poll::Ready(Ok(events)) => {
                    self.accepted = true;
                    self.tried.accepted();
                    let check = StreamCheck::new(bounds);
                    self.phase = Phase::Streaming { booking, events: Box::new(events), check, responded: false };
                    Poll::Ready(Ok(()))
                }
                Poll::Ready(Err(status)) => {
                    if let Some(part) = identity::mismatch_of(&status) {
                        self.relay.fleet.mismatched(booking.link(), part);
                    }
                    let failure = Failure::from(&status);
                    self.unreached += u32::from(matches!(failure, Failure::Lost(_)));
                    self.leave(booking, &failure);
                    Poll::Ready(match (waited, &failure) {
                        (Some(wait), Failure::Full(_)) => {
                            // the retry is already paid for; the end of the wait bounds the number of calls
                            self.attempts -= 1;
                            self.wait(wait);
                            Ok(())
                        }
                        _ => self.go_on_elsewhere(failure),
                    })
                }
            },
            Phase::Waiting { mut poll_again, wait } => {
                if poll_again.as_mut().poll(cx).is_pending() {
                    self.phase = Phase::Waiting { poll_again, wait };
                    return Poll::Pending;
                }
                if Instant::now() >= wait.until {
                    // the last attempt
                    let placement = self.find_group(&[], None).map_err(|_| self.given_up(wait.failure))?;
                    self.open(placement, None);
                    return Poll::Ready(Ok(()));
                }
                let avoid = self.tried.slots_without_room(&self.relay.fleet.view());
                match self.find_group(&avoid, None) {
                    Ok(placement) => self.open(placement, Some(wait)),
                    Err(_) => self.wait(wait),
                }
                Poll::Ready(Ok(()))
            }
            other => {
                self.phase = other;
                Poll::Ready(Ok(()))
            }
        }
    }

    fn receive(&mut self, event: GenerateEvent) -> Result<Option<Event>, SequenceError> {
        let Phase::Streaming { booking, responded, .. } = &mut self.phase else {
            return Ok(None);
        };
        if !*responded {
            *responded = true;
            booking.accepted();
            booking.link().breaker.succeeded();
        }
        booking.link().heard();
        // any event proves that the grammar has compiled
        self.compiled = true;
        match event.event {
            Some(Sent::Compiled(GrammarCompiled {})) => Ok(None),
            Some(Sent::Started(started)) => {
                self.watch.started(started.cached_tokens);
                let first = !std::mem::replace(&mut self.started, true);
                Ok(first.then_some(Event::Started { cached_tokens: started.cached_tokens }))
            }
            Some(Sent::PromptLogprobs(mut part)) => {
                // another group sends them from the first position again
                let known = self.prompt_logprobs_until.saturating_sub(part.start) as usize;
                let part_length = part.positions.len();
                if self.prompt_logprobs_until > 0 && known >= part_length {
                    return Ok(None);
                }
                part.positions.drain(..known);
                part.start += known as u32;
                self.prompt_logprobs_until = part.start + part.positions.len() as u32;
                Ok(Some(Event::PromptLogprobs(part)))
            }
            Some(Sent::Tokens(tokens)) => {
                booking.received_token(Instant::now().into_std());
                self.watch.tokens(&self.task.model, tokens.token_ids.len(), &self.relay.metrics);
                if self.weights.is_none() {
                    self.weights = Some(Arc::clone(&booking.link().weights));
                }
                self.generated.extend_from_slice(&tokens.token_ids);
                Ok(Some(Event::Tokens(tokens)))
            }
            Some(Sent::Finished(finished)) => {
                if finished.reason() == FinishReason::Aborted {
                    return self.failed(Failure::Refused("it aborted the sequence".into())).map(|()| None);
                }
                self.phase = Phase::Done;
                self.watch.finished(&finished);
                Ok(Some(Event::Finished(finished)))
            }
            None => Ok(None), // an event type of a newer worker
        }
    }

    /// Records the failure of the current group and continues on another group if that can help.
    fn failed(&mut self, failure: Failure) -> Result<(), SequenceError> {
        let is_lost = matches!(failure, Failure::Lost(_));
        if let Phase::Streaming { booking, .. } = std::mem::replace(&mut self.phase, Phase::Done) {
            if is_lost {
                self.task.deaths.add(booking.link());
            }
            // bounds the attempts of a request that makes every group violate the contract
            self.unreached += u32::from(matches!(failure, Failure::Violation(_)));
            self.leave(booking, &failure);
        }
        if is_lost && !self.compiled {
            self.relay.metrics.poison();
            tracing::error!(
                request_id = self.stream_id,
                group = self.served_by.last(),
                "a request was stopped: its group died while it compiled the request's grammar"
            );
            return Err(SequenceError::GrammarPoisonPill);
        }
        self.go_on_elsewhere(failure)
    }

    /// Releases a group that failed and records the failure.
    fn leave(&mut self, booking: Booking, failure: &Failure) {
        self.watch.failed(failure, self.generated.len());
        match failure {
            Failure::Lost(_) => booking.link().breaker.failed(),
            Failure::Violation(violation) => {
                self.relay.fleet.violated(&booking.link().group, violation);
                booking.link().breaker.violated();
            }
            // not a fault of the group; if this call was a probe, the next request probes again
            Failure::Full(_) | Failure::Refused(_) | Failure::TimedOut | Failure::Invalid(_) | Failure::Sequence(_) => {
                booking.link().breaker.undecided();
            }
        }
        tracing::info!(
            request_id = self.stream_id,
            trace_id = self.task.trace.map(|trace| trace.trace_id_hex()),
            group = booking.link().group,
            generated = self.generated.len(),
            attempt = self.attempts,
            failure = failure.kind(),
            "sequence failed on a group"
        );
        // the text may contain a part of the request
        tracing::debug!(request_id = self.stream_id, %failure, "reason of the failure, in the group's words");
        self.tried.add(Arc::clone(booking.link()), failure);
    }

    fn go_on_elsewhere(&mut self, failure: Failure) -> Result<(), SequenceError> {
        // checked first: a complete output needs no group and no retry, and is not an error
        if let Some(finished) = self.already_finished() {
            self.phase = finished;
            return Ok(());
        }
        if matches!(failure, Failure::TimedOut | Failure::Invalid(_) | Failure::Sequence(_)) {
            return Err(self.given_up(failure));
        }
        let deaths = self.task.deaths.count();
        if deaths >= self.relay.options.max_attempts {
            self.relay.metrics.poison();
            tracing::error!(
                request_id = self.stream_id,
                groups = self.task.deaths.names(),
                "a request was stopped: the groups that took it died"
            );
            return Err(SequenceError::Poison { deaths });
        }
        if self.unreached >= self.relay.options.max_attempts
            || self.attempts >= MAX_ATTEMPTS
            || Instant::now() >= self.task.deadline
        {
            return Err(self.given_up(failure));
        }
        if !self.relay.retries.take(self.task.tenant) {
            self.relay.metrics.retry_refused();
            return Err(self.given_up(failure));
        }
        self.relay.metrics.sequence_failed_over(!self.generated.is_empty());
        match self.find_group(&self.tried.slots(), None) {
            Ok(placement) => self.open(placement, None),
            Err(_) => {
                // The group drains or loads and no other group exists. Its next start may be near.
                let awaits_group = !matches!(failure, Failure::Full(_)) && self.awaits_group();
                // No group has accepted the request, and no group has room. The client retries later.
                if !self.accepted && !awaits_group && !matches!(failure, Failure::Lost(_)) {
                    return Err(self.given_up(failure));
                }
                let options = &self.relay.options;
                let wait_for_group = if awaits_group { options.wait_for_group() } else { Duration::ZERO };
                let wait = options.failover_wait().max(wait_for_group);
                self.wait(Wait { until: self.task.deadline.min(Instant::now() + wait), failure });
            }
        }
        Ok(())
    }

    fn given_up(&self, failure: Failure) -> SequenceError {
        SequenceError::Failed { failure, attempts: self.attempts }
    }

    /// Returns the end of an output that was complete before its group failed. Only the final event was lost.
    fn already_finished(&self) -> Option<Phase> {
        let last = self.generated.last()?;
        let enough = self.generated.len() as u32 >= self.task.stopping.min_tokens;
        let reason = if enough && self.task.end_ids.contains(last) {
            FinishReason::Stop
        } else if self.generated.len() as u32 >= self.task.stopping.max_tokens {
            FinishReason::Length
        } else {
            return None;
        };
        let finished = Finished {
            reason: reason as i32,
            prompt_tokens: self.task.ids.len() as u32,
            cached_tokens: 0,
            completion_tokens: self.generated.len() as u32,
            timing: None,
        };
        Some(Phase::Ended(finished))
    }

    fn wait(&mut self, wait: Wait) {
        self.phase = Phase::Waiting { poll_again: Box::pin(tokio::time::sleep(POLL_INTERVAL)), wait };
    }

    fn find_group(&self, avoid: &[Slot], class: Option<Class>) -> Result<Placement, NoGroup> {
        let view = self.relay.fleet.view();
        let model = view.model(&self.task.model).ok_or(NoGroup::NoneReady)?;
        let wanted = PlacementRequest {
            hashes: &self.task.hashes,
            tokens: self.task.ids.len() + self.generated.len(),
            session: self.task.session,
            avoid,
            weights: self.weights.as_deref(),
            class,
            explain: self.explains(),
            now: Instant::now().into_std(),
        };
        place(&self.relay.fleet, model, &wanted)
    }

    fn open(&mut self, placement: Placement, waited: Option<Wait>) {
        self.attempts += 1;
        let trace = self.watch.placed(&placement, self.attempts, &self.relay.metrics);
        let Placement { group, booking, explanation, .. } = placement;
        self.served_by.push(group.record.group.clone());
        if let Some(decision) = &explanation {
            tracing::debug!(request_id = self.stream_id, group = group.record.group, decision, "placed");
        }
        if self.explanation.is_none() && self.relay.options.debug {
            self.explanation = explanation;
        }
        let time_left = self.task.deadline.saturating_duration_since(Instant::now());
        let tracestate = self.task.tracestate.clone();
        let message = self.message();
        let bounds = self.bounds(&group, &message);
        let channel = group.link.channels.channel();
        let opening = stream::open(
            channel,
            group.link.expected.clone(),
            message,
            bounds.max_message_bytes(),
            time_left,
            trace,
            tracestate,
        );
        self.phase = Phase::Opening { booking, opening: Box::pin(opening), since: Instant::now(), bounds, waited };
    }

    /// Limits of what the group may send in response to this message.
    fn bounds(&self, group: &Group, message: &Outgoing) -> StreamBounds {
        let logprobs = message.request.logprobs.unwrap_or_default();
        StreamBounds {
            prompt_tokens: self.task.ids.len() as u32,
            generated: self.generated.len() as u32,
            max_tokens: self.task.stopping.max_tokens,
            vocabulary_size: group.record.vocabulary_size,
            top_logprobs: logprobs.top,
            prompt_logprobs: logprobs.prompt_top,
            has_grammar: message.request.grammar.is_some(),
        }
    }

    fn message(&self) -> Outgoing {
        let mut logprobs = self.logprobs;
        if !self.generated.is_empty()
            && let Some(logprobs) = &mut logprobs
        {
            logprobs.prompt_top = None; // they came before the first token
        }
        let request = GenerateRequest {
            request_id: self.stream_id.clone(),
            token_ids: Vec::new(), // packed in a separate field
            generated_len: self.generated.len() as u32,
            images: self.task.images.clone(),
            sampling: Some(Sampling { seed: self.seed, ..self.task.sampling.clone() }),
            stopping: Some(self.task.stopping.clone()),
            logprobs,
            cache_salt: self.task.cache_salt.to_vec(),
            priority: match self.task.class {
                Class::Interactive => Priority::Interactive as i32,
                Class::Batch => Priority::Batch as i32,
            },
            grammar: self.task.grammar.clone(),
        };
        Outgoing { request, prompt: self.task.ids.clone(), generated: pack(&self.generated) }
    }
}

/// If a client leaves before its group has sent anything, a silent group counts as failed.
impl Drop for Sequence {
    fn drop(&mut self) {
        let (booking, accepts_too_late) = match &self.phase {
            Phase::Opening { booking, since, .. } => (booking, since.elapsed() >= ACCEPT_TIMEOUT),
            Phase::Streaming { booking, responded: false, .. } => (booking, false),
            _ => return,
        };
        let link: &Link = booking.link();
        if accepts_too_late || link.silence() >= SILENCE_TIMEOUT {
            link.breaker.failed();
        } else {
            link.breaker.undecided();
        }
    }
}
