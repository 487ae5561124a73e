//! One sequence, from its placement to its end, whatever happens to the groups under it.
//!
//! The token IDs generated so far are kept. When a group dies, drains or refuses, the sequence is placed again as
//! prompt + those token IDs on another group, which continues where the first one stopped (sampling depends on seed
//! and position alone): the client sees a pause, never an error and never a token twice. A request under
//! whose sequences `max_attempts` groups died is taken for the cause and given no other. Groups that drain or
//! refuse do not count: a long stream may outlive many of them. A request whose group died before its grammar had compiled is
//! given no other at all.

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

/// Groups that a sequence is tried on in all, those included that only drained or refused.
const MAX_ATTEMPTS: u32 = 32;
/// Of a bound on the response, what counts as work asked for: most responses end long before theirs.
const MAX_EXPECTED_TOKENS: u32 = 1024;
/// How often a sequence without a group looks for one.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// A group reports each second that it lives. One that is silent for so long does not serve the client that leaves now.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(3);
/// A group accepts a call at once, however long it is queued then: one that has not within this time does not serve.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(15);

/// A prompt and how it continues: what all `n` sequences of it share.
pub struct Task {
    /// Of the HTTP request.
    pub request_id: String,
    /// The model's name.
    pub model: String,
    /// The prompt, as it goes to a group.
    pub ids: PackedIds,
    /// Its images, in the order of their offsets.
    pub images: Vec<Image>,
    /// The hashes of its full blocks.
    pub hashes: Arc<[BlockHash]>,
    /// The conversation that it belongs to, where the client says so.
    pub session: Option<u64>,
    /// How urgent it is.
    pub class: Class,
    /// Who asks.
    pub tenant: u64,
    /// How token IDs are sampled; each sequence has a seed of its own.
    pub sampling: Sampling,
    /// When it ends.
    pub stopping: Stopping,
    /// Ids that end it: end of sequence (unless ignored) and `stop_token_ids`.
    pub end_ids: Vec<u32>,
    /// What the generated text must match.
    pub grammar: Option<Grammar>,
    /// Separates the caches of tenants.
    pub cache_salt: Bytes,
    /// When it is given up.
    pub deadline: Instant,
    /// Groups that died under the request, be it under sequences of its other prompts.
    pub deaths: Arc<Deaths>,
    /// What its calls are made under: the request's span, or the client's context.
    pub trace: Option<TraceContext>,
    /// What the client's tracing system adds to it, handed on as it came.
    pub tracestate: Option<tonic::metadata::AsciiMetadataValue>,
}

/// What a sequence reports, in this order.
#[derive(Debug)]
pub enum Event {
    /// It left the queue. Once.
    Started {
        /// Prompt tokens found in the group's cache.
        cached_tokens: u32,
    },
    /// Logprobs of prompt positions, each once.
    PromptLogprobs(PromptLogprobs),
    /// Generated token IDs.
    Tokens(Tokens),
    /// The end.
    Finished(Finished),
}

/// Why a sequence failed for good.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SequenceError {
    /// No group could be found, at first or after the failure of another.
    #[error("{0}")]
    NoGroup(NoGroup),
    /// So many groups died that the request is taken for the cause.
    #[error("the groups that took the request died ({deaths} of them)")]
    Poison {
        /// Groups that died under the request.
        deaths: u32,
    },
    /// The group died while it compiled the request's grammar, which is taken for the cause.
    #[error("the group that compiled the request's grammar died")]
    GrammarPoisonPill,
    /// The last group's failure, where no other could continue.
    #[error("{failure} (after {attempts} attempts)")]
    Failed {
        /// What it was.
        failure: Failure,
        /// Groups tried.
        attempts: u32,
    },
}

enum Phase {
    /// No group can start it now.
    Queued {
        placed: oneshot::Receiver<Result<Placement, NoGroup>>,
        since: Instant,
    },
    Opening {
        booking: Booking,
        opening: Pin<Box<dyn Future<Output = Result<Streaming<GenerateEvent>, Status>> + Send>>,
        since: Instant,
        /// What it may send.
        bounds: StreamBounds,
        /// What it goes back to where the group is full.
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
    /// Everything was generated, only the last word was lost.
    Ended(Finished),
    Done,
}

/// It has lost its group, and no other can continue with it now.
struct Wait {
    until: Instant,
    /// What it ends with, if none can until then.
    failure: Failure,
}

/// What sequences need of the router.
pub struct Relay {
    /// The groups.
    pub fleet: Arc<Fleet>,
    /// Who waits for one of them.
    pub admission: Arc<Admission>,
    /// How often sequences may be placed again.
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
    /// A group took it, and the client may know.
    accepted: bool,
    /// A group compiled its grammar, or it has none.
    compiled: bool,
    /// An event that came before anybody asked.
    early: Option<Event>,
    started: bool,
    attempts: u32,
    /// Groups that could not be reached, or broke the contract: nothing that it is the cause of.
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
    /// Places a sequence. Its load is booked when this returns; nothing is sent before it is polled.
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

    /// At once, if nobody is queued and a group can start it. Else it is queued, also if no group is ready but one is
    /// expected.
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

    /// Whether a group of the model is expected, and requests wait for it.
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

    /// The groups that served it, the first one first.
    pub fn served_by(&self) -> &[String] {
        &self.served_by
    }

    /// The reasons of its first placement, in debug mode.
    pub fn explanation(&self) -> Option<&str> {
        self.explanation.as_deref()
    }

    /// Tokens that its group has generated and nobody has read, as far as they have arrived. They are read now: the
    /// sequence is about to be dropped.
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
        // a group whose stream stands still has more, and nobody will hear of it: it counts as all that it may generate
        let stands_still = bytes >= (stream::STREAM_WINDOW / 2) as usize;
        if stands_still { left as u64 } else { unread.min(left) as u64 }
    }

    /// Ready when a group accepted it and compiled its grammar (or it failed: then the next event says so).
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

    /// The next event; `None` after the end.
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

    /// What the group that has it says next, if that is anything to report.
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

    /// Continues with opening, or with looking for a group.
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
                            // it has paid for a group and still has none; its time bounds how often it asks
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
                    // the last look
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
        // whatever it says, its grammar is behind it
        self.compiled = true;
        match event.event {
            Some(Sent::Compiled(GrammarCompiled {})) => Ok(None),
            Some(Sent::Started(started)) => {
                self.watch.started(started.cached_tokens);
                let first = !std::mem::replace(&mut self.started, true);
                Ok(first.then_some(Event::Started { cached_tokens: started.cached_tokens }))
            }
            Some(Sent::PromptLogprobs(mut part)) => {
                // a second group begins them anew
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
            None => Ok(None), // a kind of event that a newer worker sends
        }
    }

    /// The present group failed: notes it, and continues elsewhere if that can help.
    fn failed(&mut self, failure: Failure) -> Result<(), SequenceError> {
        let is_lost = matches!(failure, Failure::Lost(_));
        if let Phase::Streaming { booking, .. } = std::mem::replace(&mut self.phase, Phase::Done) {
            if is_lost {
                self.task.deaths.add(booking.link());
            }
            // one that every group responds with nonsense does not go through all of them
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

    /// Gives a group back that failed, and remembers how.
    fn leave(&mut self, booking: Booking, failure: &Failure) {
        self.watch.failed(failure, self.generated.len());
        match failure {
            Failure::Lost(_) => booking.link().breaker.failed(),
            Failure::Violation(violation) => {
                self.relay.fleet.violated(&booking.link().group, violation);
                booking.link().breaker.violated();
            }
            // no fault of the group; but if this was a probe, another request is to be one
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
        // may repeat a part of the request
        tracing::debug!(request_id = self.stream_id, %failure, "reason of the failure, in the group's words");
        self.tried.add(Arc::clone(booking.link()), failure);
    }

    fn go_on_elsewhere(&mut self, failure: Failure) -> Result<(), SequenceError> {
        // before everything else: a response that is complete needs no group, so no retry, and is no error
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
                // The group drains or loads and no other one exists: its next start may be near.
                let awaits_group = !matches!(failure, Failure::Full(_)) && self.awaits_group();
                // No group accepted the request yet, and no group has room: the client retries later.
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

    /// The group died between the last id and the word that it was the last.
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

    /// What the group may send in response to this message.
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
            logprobs.prompt_top = None; // they came before the first id
        }
        let request = GenerateRequest {
            request_id: self.stream_id.clone(),
            token_ids: Vec::new(), // packed beside it
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

/// A client that leaves before its group sent anything says something of the group, too.
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
