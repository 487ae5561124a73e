//! Events of a sequence on their way from the loop to the caller.
//!
//! Delivery never blocks and never fails. Events gather in a buffer that is no larger than the output of the sequence,
//! because unread tokens are merged into one event. Dropping the [`EventStream`] reports to the loop that the caller is
//! gone.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bora_proto::v1::{self, generate_event::Event};
use futures::task::AtomicWaker;

use super::error::EngineError;

/// Maximum tokens of one event; keeps messages well below gRPC's limit of 4 MB.
const MAX_TOKENS_IN_EVENT: usize = 4_096;
/// Maximum tokens of one event if they have logprobs.
const MAX_SCORED_TOKENS_IN_EVENT: usize = 256;

#[derive(Default)]
struct Buffer {
    /// The grammar has compiled.
    compiled: bool,
    started: Option<v1::Started>,
    prompt_logprobs: VecDeque<v1::PromptLogprobs>,
    token_ids: VecDeque<u32>,
    logprobs: VecDeque<v1::PositionLogprobs>,
    end: Option<Result<v1::Finished, EngineError>>,
    /// `end` was set, even if it has been read.
    ended: bool,
}

#[derive(Default)]
struct Shared {
    buffer: Mutex<Buffer>,
    waker: AtomicWaker,
    closed: AtomicBool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Buffer> {
        // every statement leaves the buffer consistent
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The loop's end of the stream.
pub(crate) struct EventSender {
    shared: Arc<Shared>,
}

/// The caller's end of the stream: `GrammarCompiled` (if there is a grammar), `Started`, prompt logprobs, tokens and
/// `Finished`, or an error that ends the stream. Dropping it aborts the sequence within a step.
pub struct EventStream {
    shared: Arc<Shared>,
    done: bool,
}

/// Creates both ends of a stream.
pub(crate) fn channel() -> (EventSender, EventStream) {
    let shared = Arc::new(Shared::default());
    (EventSender { shared: shared.clone() }, EventStream { shared, done: false })
}

impl EventSender {
    /// Whether the caller dropped the stream.
    pub(crate) fn is_closed(&self) -> bool {
        self.shared.closed.load(Ordering::Acquire)
    }

    /// A function that returns whether the caller dropped the stream.
    pub(crate) fn closed(&self) -> impl Fn() -> bool + Send + use<> {
        let shared = self.shared.clone();
        move || shared.closed.load(Ordering::Acquire)
    }

    pub(crate) fn compiled(&self) {
        self.shared.lock().compiled = true;
        self.shared.waker.wake();
    }

    pub(crate) fn started(&self, started: v1::Started) {
        self.shared.lock().started = Some(started);
        self.shared.waker.wake();
    }

    pub(crate) fn prompt_logprobs(&self, logprobs: v1::PromptLogprobs) {
        self.shared.lock().prompt_logprobs.push_back(logprobs);
        self.shared.waker.wake();
    }

    pub(crate) fn token(&self, token_id: u32, logprobs: Option<v1::PositionLogprobs>) {
        let mut buffer = self.shared.lock();
        buffer.token_ids.push_back(token_id);
        buffer.logprobs.extend(logprobs);
        drop(buffer);
        self.shared.waker.wake();
    }

    /// Ends the stream; later calls have no effect.
    pub(crate) fn end(&self, end: Result<v1::Finished, EngineError>) {
        let mut buffer = self.shared.lock();
        if !buffer.ended {
            buffer.ended = true;
            buffer.end = Some(end);
        }
        drop(buffer);
        self.shared.waker.wake();
    }
}

impl Drop for EventSender {
    fn drop(&mut self) {
        self.end(Err(EngineError::unavailable("the engine stopped")));
    }
}

impl Buffer {
    fn next(&mut self) -> Option<Result<Event, EngineError>> {
        if std::mem::take(&mut self.compiled) {
            return Some(Ok(Event::Compiled(v1::GrammarCompiled {})));
        }
        if let Some(started) = self.started.take() {
            return Some(Ok(Event::Started(started)));
        }
        if let Some(logprobs) = self.prompt_logprobs.pop_front() {
            return Some(Ok(Event::PromptLogprobs(logprobs)));
        }
        if !self.token_ids.is_empty() {
            let limit = if self.logprobs.is_empty() { MAX_TOKENS_IN_EVENT } else { MAX_SCORED_TOKENS_IN_EVENT };
            let count = self.token_ids.len().min(limit);
            let scored = self.logprobs.len().min(limit);
            return Some(Ok(Event::Tokens(v1::Tokens {
                token_ids: self.token_ids.drain(..count).collect(),
                logprobs: self.logprobs.drain(..scored).collect(),
            })));
        }
        Some(self.end.take()?.map(Event::Finished))
    }
}

impl futures::Stream for EventStream {
    type Item = Result<v1::GenerateEvent, EngineError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.done {
            return Poll::Ready(None);
        }
        self.shared.waker.register(context.waker());
        let Some(event) = self.shared.lock().next() else {
            return Poll::Pending;
        };
        self.done = matches!(event, Ok(Event::Finished(_)) | Err(_));
        Poll::Ready(Some(event.map(|event| v1::GenerateEvent { event: Some(event) })))
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt as _, StreamExt as _};

    use super::*;

    fn next(stream: &mut EventStream) -> Option<Option<Result<Event, EngineError>>> {
        stream.next().now_or_never().map(|item| item.map(|result| result.map(|e| e.event.unwrap())))
    }

    #[test]
    fn delivers_in_order_and_merges_unread_tokens() {
        let (sender, mut stream) = channel();
        assert_eq!(next(&mut stream), None, "nothing yet");
        for id in 0..5_000 {
            sender.token(id, None);
        }
        sender.started(v1::Started::default());
        sender.end(Ok(v1::Finished::default()));
        sender.end(Err(EngineError::unavailable("too late")));
        drop(sender);
        assert!(matches!(next(&mut stream), Some(Some(Ok(Event::Started(_))))));
        let mut ids = Vec::new();
        for _ in 0..2 {
            let Some(Some(Ok(Event::Tokens(tokens)))) = next(&mut stream) else { panic!("no tokens") };
            ids.extend(tokens.token_ids);
        }
        assert_eq!(ids, (0..5_000).collect::<Vec<u32>>());
        assert!(matches!(next(&mut stream), Some(Some(Ok(Event::Finished(_))))));
        assert_eq!(next(&mut stream), Some(None));
    }

    #[test]
    fn reports_a_dropped_end_to_the_other_end() {
        let (sender, stream) = channel();
        assert!(!sender.is_closed());
        drop(stream);
        assert!(sender.is_closed());
        let (sender, mut stream) = channel();
        drop(sender);
        assert!(matches!(next(&mut stream), Some(Some(Err(EngineError::Unavailable { .. })))));
        assert_eq!(next(&mut stream), Some(None));
    }
}
