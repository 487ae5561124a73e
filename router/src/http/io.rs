//! The byte stream of a connection, with a deadline for each of its states.

use std::{
    future::Future as _,
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::http::StatusCode;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep},
};

use super::{options::Timeouts, refusal};

/// The state that a connection's byte stream and its requests share.
#[derive(Debug)]
pub(super) struct Exchange {
    opened: Instant,
    /// Number of requests so far.
    requests: AtomicU32,
    /// Whether a request is being served.
    busy: AtomicBool,
    /// Milliseconds from the opening of the connection to the end of the last response.
    idle_since: AtomicU64,
    /// Whether the body of a request was left unread: the client may still send it.
    unread: AtomicBool,
}

impl Exchange {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            opened: Instant::now(),
            requests: AtomicU32::new(0),
            busy: AtomicBool::new(false),
            idle_since: AtomicU64::new(0),
            unread: AtomicBool::new(false),
        })
    }

    /// Counts a new request; it ends when the guard is dropped.
    pub(super) fn begin(self: &Arc<Self>) -> ExchangeGuard {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.busy.store(true, Ordering::Relaxed);
        ExchangeGuard(Arc::clone(self))
    }

    pub(super) fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Relaxed)
    }

    /// The time at which the last response ended.
    fn idle_since(&self) -> Instant {
        self.opened + Duration::from_millis(self.idle_since.load(Ordering::Relaxed))
    }

    /// How long the connection has been idle.
    pub(super) fn idle_time(&self) -> Duration {
        if self.is_busy() { Duration::ZERO } else { self.idle_since().elapsed() }
    }

    /// Records that the rest of a body will not be read.
    pub(super) fn leave_unread(&self) {
        self.unread.store(true, Ordering::Relaxed);
    }

    pub(super) fn has_unread(&self) -> bool {
        self.unread.load(Ordering::Relaxed)
    }
}

/// A request that is being served.
pub(super) struct ExchangeGuard(Arc<Exchange>);

impl Drop for ExchangeGuard {
    fn drop(&mut self) {
        self.0.idle_since.store(self.0.opened.elapsed().as_millis() as u64, Ordering::Relaxed);
        self.0.busy.store(false, Ordering::Relaxed);
    }
}

/// Why the server closes a connection before the client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// The head is incomplete.
    HeadTimeout,
    /// hyper refused the head with this status; its own response, which has no body, was withheld.
    BadHead(StatusCode),
    /// The client does not read its response.
    WriteTimeout,
}

/// A stream whose reads fail if a head is late, and whose writes fail if the client does not read. Its owner shuts it
/// down, not hyper.
pub(super) struct TimedIo<S> {
    pub(super) stream: S,
    pub(super) ended: Option<Ended>,
    exchange: Arc<Exchange>,
    timeouts: Timeouts,
    /// Never later than the next deadline. It is checked only if no progress is possible, and reset only when it fires.
    timer: Pin<Box<Sleep>>,
    /// The number of requests when the read side began to wait; a new number resets its deadline.
    after: u32,
    head_begun: bool,
    read_due: Option<Instant>,
    write_due: Option<Instant>,
}

impl<S> TimedIo<S> {
    pub(super) fn new(stream: S, exchange: Arc<Exchange>, timeouts: Timeouts) -> Self {
        let timer = Box::pin(tokio::time::sleep(timeouts.idle));
        Self {
            stream,
            ended: None,
            exchange,
            timeouts,
            timer,
            after: 0,
            head_begun: false,
            read_due: None,
            write_due: None,
        }
    }

    /// Whether a deadline has passed; if not, the task is woken at the deadline.
    fn is_late(&mut self, due: Instant, cx: &mut Context<'_>) -> bool {
        if self.timer.deadline() > due {
            self.timer.as_mut().reset(due);
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            if Instant::now() >= due {
                return true;
            }
            self.timer.as_mut().reset(due);
        }
        false
    }

    fn blocked<T>(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        let timeout = self.timeouts.write;
        let due = *self.write_due.get_or_insert_with(|| Instant::now() + timeout);
        if self.is_late(due, cx) {
            self.ended = Some(Ended::WriteTimeout);
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Poll::Pending
    }

    /// Replaces hyper's own response to a head that hyper cannot parse.
    fn withhold(&mut self, bytes: &[u8]) -> bool {
        if self.exchange.is_busy() {
            return false;
        }
        let Some(status) = refusal::of_hyper(bytes) else { return false };
        self.ended = Some(Ended::BadHead(status));
        true
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for TimedIo<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let requests = this.exchange.requests.load(Ordering::Relaxed);
        if this.after != requests {
            (this.after, this.head_begun, this.read_due) = (requests, false, None);
        }
        let before = buffer.filled().len();
        match Pin::new(&mut this.stream).poll_read(cx, buffer) {
            Poll::Ready(outcome) => {
                if buffer.filled().len() > before && !this.head_begun && !this.exchange.is_busy() {
                    (this.head_begun, this.read_due) = (true, None);
                }
                Poll::Ready(outcome)
            }
            // the body has deadlines of its own, and a response may take long; hyper does not poll reads again when it
            // ends
            Poll::Pending if this.exchange.is_busy() => {
                this.is_late(Instant::now() + this.timeouts.idle, cx);
                Poll::Pending
            }
            Poll::Pending => {
                let Timeouts { idle, head, .. } = this.timeouts;
                let (begun, idle_since) = (this.head_begun, this.exchange.idle_since());
                let due =
                    *this.read_due.get_or_insert_with(|| if begun { Instant::now() + head } else { idle_since + idle });
                match (this.is_late(due, cx), this.head_begun) {
                    (false, _) => Poll::Pending,
                    // end of file, as if the client had closed the connection
                    (true, false) => Poll::Ready(Ok(())),
                    (true, true) => {
                        this.ended = Some(Ended::HeadTimeout);
                        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
                    }
                }
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for TimedIo<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if let [only] = slices
            && this.withhold(only)
        {
            return Poll::Ready(Ok(only.len()));
        }
        match Pin::new(&mut this.stream).poll_write_vectored(cx, slices) {
            Poll::Pending => this.blocked(cx),
            ready => {
                this.write_due = None;
                ready
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        match Pin::new(&mut this.stream).poll_flush(cx) {
            Poll::Pending => this.blocked(cx),
            ready => ready,
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
