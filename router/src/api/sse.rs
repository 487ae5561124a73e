//! Responses as server-sent events: what is new as it comes, a sign of life in every long silence, and at the end what the
//! API says there. A response that breaks never ends as one that is complete.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::Body,
    http::{HeaderValue, Response, header},
};
use bytes::Bytes;
use futures::Stream;
use serde::Serialize;
use tokio::time::{Instant, Sleep};

use super::{completion::Completion, error::ApiError};

/// What is ready at once goes out in one write of about this size.
const WRITE_BYTES: usize = 16 << 10;
const COMMENT: &[u8] = b": keep-alive\n\n";
const DONE: &[u8] = b"data: [DONE]\n\n";

/// How one API writes its chunks.
pub trait EventWriter: Send + Unpin + 'static {
    /// What is sent in silence.
    const SIGN_OF_LIFE: &'static [u8] = COMMENT;
    /// What can be said before any group said anything.
    fn begin(&mut self, completion: &mut Completion, out: &mut Vec<u8>);
    /// Choice `number` has something new.
    fn progress(&mut self, completion: &mut Completion, number: usize, out: &mut Vec<u8>);
    /// All choices are over.
    fn end(&mut self, completion: &mut Completion, out: &mut Vec<u8>);
    /// The response ends here, unfinished.
    fn failed(&mut self, _answer: &mut Completion, error: &ApiError, out: &mut Vec<u8>) {
        write_error(error, out);
    }
}

/// Appends what OpenAI's older APIs send last.
pub fn write_done(out: &mut Vec<u8>) {
    out.extend_from_slice(DONE);
}

/// Appends one event that has a name.
pub fn write_named_event(name: &str, value: &impl Serialize, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(b"event: ");
    out.extend_from_slice(name.as_bytes());
    out.push(b'\n');
    let data = out.len();
    write_event(value, out);
    if out.len() == data {
        out.truncate(start);
    }
}

/// Appends one event.
pub fn write_event(value: &impl Serialize, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(b"data: ");
    if let Err(error) = serde_json::to_writer(&mut *out, value) {
        // only a map with keys that are no strings could cause it
        tracing::error!(%error, "a chunk could not be written");
        out.truncate(start);
        return;
    }
    out.extend_from_slice(b"\n\n");
}

/// Appends the event that ends a broken stream.
fn write_error(error: &ApiError, out: &mut Vec<u8>) {
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(&error.to_json());
    out.extend_from_slice(b"\n\n");
}

#[derive(PartialEq)]
enum Phase {
    Begin,
    Running,
    Over,
}

struct Events<W> {
    completion: Completion,
    writer: W,
    out: Vec<u8>,
    phase: Phase,
}

impl<W: EventWriter> Stream for Events<W> {
    type Item = Bytes;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let Events { completion, writer, out, phase } = &mut *self;
        if *phase == Phase::Begin {
            writer.begin(completion, out);
            *phase = Phase::Running;
        }
        while *phase == Phase::Running && out.len() < WRITE_BYTES {
            match completion.poll_step(cx) {
                Poll::Pending => break,
                Poll::Ready(Some(Ok(number))) => writer.progress(completion, number, out),
                Poll::Ready(Some(Err(error))) => {
                    // a refusal's message may repeat what the request holds
                    let reason = error.status.is_server_error().then_some(error.message.as_str());
                    let status = error.status.as_u16();
                    tracing::warn!(
                        request_id = completion.id,
                        status,
                        code = error.code,
                        reason,
                        "stream ends with an error"
                    );
                    completion.context().open.responded(error.status.as_u16());
                    writer.failed(completion, &error, out);
                    *phase = Phase::Over;
                }
                Poll::Ready(None) => {
                    writer.end(completion, out);
                    completion.context().open.responded(200);
                    *phase = Phase::Over;
                }
            }
        }
        if !out.is_empty() {
            let bytes = Bytes::copy_from_slice(out);
            out.clear();
            return Poll::Ready(Some(bytes));
        }
        if *phase == Phase::Over { Poll::Ready(None) } else { Poll::Pending }
    }
}

/// Adds a sign of life to a stream whenever it was silent for an interval.
struct Heartbeat<S> {
    events: S,
    sign: &'static [u8],
    interval: Duration,
    last: Instant,
    timer: Pin<Box<Sleep>>,
}

impl<S> Heartbeat<S> {
    fn new(events: S, sign: &'static [u8], interval: Duration) -> Self {
        let last = Instant::now();
        Self { events, sign, interval, last, timer: Box::pin(tokio::time::sleep_until(last + interval)) }
    }
}

impl<S: Stream<Item = Bytes> + Unpin> Stream for Heartbeat<S> {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Poll::Ready(event) = Pin::new(&mut self.events).poll_next(cx) {
            self.last = Instant::now();
            return Poll::Ready(event.map(Ok));
        }
        // the timer is only looked at in silence, and set anew only when it rings
        while self.timer.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            let due = self.last + self.interval;
            if now < due {
                self.timer.as_mut().reset(due);
                continue;
            }
            self.last = now;
            let next = now + self.interval;
            self.timer.as_mut().reset(next);
            return Poll::Ready(Some(Ok(Bytes::from_static(self.sign))));
        }
        Poll::Pending
    }
}

/// The streamed response; its headers go out at once.
pub fn respond<W: EventWriter>(completion: Completion, writer: W) -> Response<Body> {
    let interval = completion.service().options().heartbeat();
    let events = Events { completion, writer, out: Vec::with_capacity(1024), phase: Phase::Begin };
    let mut response = Response::new(Body::from_stream(Heartbeat::new(events, W::SIGN_OF_LIFE, interval)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // proxies are not to collect it
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn silence_is_broken_by_comments_and_nothing_else_is_changed() {
        let (sender, receiver) = tokio::sync::mpsc::channel(8);
        let events = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let mut stream = Heartbeat::new(events, COMMENT, Duration::from_secs(10));
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(6)).await;
            sender.send(Bytes::from_static(b"a")).await.expect("received");
            tokio::time::sleep(Duration::from_secs(25)).await;
            sender.send(Bytes::from_static(b"b")).await.expect("received");
        });
        let start = Instant::now();
        let mut seen = Vec::new();
        while let Some(Ok(bytes)) = stream.next().await {
            seen.push((start.elapsed().as_secs(), bytes));
        }
        let comment = Bytes::from_static(COMMENT);
        let expected =
            [(6, Bytes::from_static(b"a")), (16, comment.clone()), (26, comment), (31, Bytes::from_static(b"b"))];
        assert_eq!(seen, expected);
    }
}
