//! Responses as server-sent events: new output as it arrives, a comment or ping after each interval of silence, and the
//! API's final events. A response that breaks never ends like a complete one.

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

/// Size in bytes up to which available output is combined into one write.
const WRITE_BYTES: usize = 16 << 10;
const COMMENT: &[u8] = b": keep-alive\n\n";
const DONE: &[u8] = b"data: [DONE]\n\n";

/// How one API writes its chunks.
pub trait EventWriter: Send + Unpin + 'static {
    /// The event that is sent in silence.
    const SIGN_OF_LIFE: &'static [u8] = COMMENT;
    /// Writes the events that do not depend on any group.
    fn begin(&mut self, completion: &mut Completion, out: &mut Vec<u8>);
    /// Writes the new output of choice `number`.
    fn progress(&mut self, completion: &mut Completion, number: usize, out: &mut Vec<u8>);
    /// Writes the end after all choices are complete.
    fn end(&mut self, completion: &mut Completion, out: &mut Vec<u8>);
    /// Writes the end of a response that is incomplete.
    fn failed(&mut self, _answer: &mut Completion, error: &ApiError, out: &mut Vec<u8>) {
        write_error(error, out);
    }
}

/// Appends the final event of OpenAI's older APIs.
pub fn write_done(out: &mut Vec<u8>) {
    out.extend_from_slice(DONE);
}

/// Appends one event with a name.
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
        // only a map with keys that are not strings could cause an error
        tracing::error!(%error, "failed to serialize a chunk");
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
                    // a refusal's message may repeat contents of the request
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

/// Adds a keep-alive event to a stream after each interval of silence.
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
        // the timer is polled only in silence, and reset only when it fires
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

/// Starts the streamed response; its headers are sent immediately.
pub fn respond<W: EventWriter>(completion: Completion, writer: W) -> Response<Body> {
    let interval = completion.service().options().heartbeat();
    let events = Events { completion, writer, out: Vec::with_capacity(1024), phase: Phase::Begin };
    let mut response = Response::new(Body::from_stream(Heartbeat::new(events, W::SIGN_OF_LIFE, interval)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // proxies must not buffer the stream
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn adds_comments_only_in_silence() {
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
