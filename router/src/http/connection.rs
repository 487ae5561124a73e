//! One connection: it passes its requests to the routes one by one, and closes so that the client receives the last
//! response.

use std::{
    convert::Infallible,
    future::Future as _,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    http::{HeaderValue, Request, StatusCode, header},
};
use hyper::{
    body::{Body as HttpBody, Frame, Incoming, SizeHint},
    server::conn::http1,
    service::{Service as _, service_fn},
};
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    sync::watch,
    time::timeout,
};

use super::{
    ConnectionInfo,
    io::{Ended, Exchange, ExchangeGuard, TimedIo},
    metrics::{HttpMetrics, Refusal},
    options::Timeouts,
    refusal,
};
use crate::{access::audit, request_id::RequestId};

/// Maximum size of a request's head.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// How long an idle connection stays open during shutdown, because a request may be on its way.
const LAST_REQUEST_TIMEOUT: Duration = Duration::from_secs(1);
/// If connections run out, those that have been idle for this long are closed.
const MIN_RECLAIMED_IDLE: Duration = Duration::from_secs(1);
/// How long a client that still sends is read from, so that it receives the response before the connection closes.
const LINGER_TIMEOUT: Duration = Duration::from_secs(5);

/// What all connections of a port share.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Signal {
    /// Set if no further requests are accepted.
    pub(super) stopping: bool,
    /// How often connections ran out.
    pub(super) shortages: u64,
}

/// The parameters of one connection.
pub(super) struct Connection {
    pub(super) info: ConnectionInfo,
    pub(super) routes: Router,
    pub(super) timeouts: Timeouts,
    /// Whether the connection ends after its first response.
    pub(super) only_once: bool,
    pub(super) signal: watch::Receiver<Signal>,
    pub(super) metrics: HttpMetrics,
}

impl Connection {
    /// Serves until the client disconnects, a deadline passes or the server stops.
    pub(super) async fn serve<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(self, stream: S) {
        let Self { info, routes, timeouts, only_once, mut signal, metrics } = self;
        let exchange = Exchange::new();
        let service = {
            let (exchange, signal) = (Arc::clone(&exchange), signal.clone());
            let routes = TowerToHyperService::new(routes);
            let known_shortages = signal.borrow().shortages;
            service_fn(move |request: Request<Incoming>| {
                let busy = exchange.begin();
                let mut request =
                    request.map(|incoming| RequestBody { incoming, ended: false, exchange: Arc::clone(&exchange) });
                request.extensions_mut().insert(info);
                let response = routes.call(request);
                let signal = signal.clone();
                async move {
                    let mut response = response.await?;
                    let Signal { stopping, shortages } = *signal.borrow();
                    if only_once || stopping || shortages != known_shortages {
                        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                    }
                    Ok::<_, Infallible>(response.map(|body| ResponseBody { body, _busy: busy }))
                }
            })
        };
        let io = TokioIo::new(TimedIo::new(stream, Arc::clone(&exchange), timeouts));
        let mut connection = http1::Builder::new()
            // the deadlines are those of the byte stream
            .header_read_timeout(None)
            .max_header_size(MAX_HEAD_BYTES)
            .serve_connection(io, service);
        let outcome = loop {
            tokio::select! {
                biased;
                outcome = &mut connection => break outcome,
                changed = signal.changed() => {
                    if changed.is_err() || signal.borrow().stopping {
                        let mut last_request = pin!(tokio::time::sleep(LAST_REQUEST_TIMEOUT));
                        let ended = std::future::poll_fn(|cx| match Pin::new(&mut connection).poll(cx) {
                            Poll::Ready(outcome) => Poll::Ready(Some(outcome)),
                            Poll::Pending if exchange.is_busy() => Poll::Ready(None),
                            Poll::Pending => last_request.as_mut().poll(cx).map(|()| None),
                        });
                        if let Some(outcome) = ended.await {
                            break outcome;
                        }
                        Pin::new(&mut connection).graceful_shutdown();
                        break (&mut connection).await;
                    }
                    if exchange.idle_time() >= MIN_RECLAIMED_IDLE {
                        Pin::new(&mut connection).graceful_shutdown();
                    }
                }
            }
        };
        if let Err(error) = outcome {
            tracing::debug!(%error, "a connection ended early");
        }
        close(connection.into_parts().io.into_inner(), exchange.has_unread(), info.peer, &metrics).await;
    }
}

/// Flushes and closes a connection. A reset would lose the response of a client that still sends, so its bytes are read
/// and discarded for a while.
async fn close<S: AsyncRead + AsyncWrite + Unpin>(
    io: TimedIo<S>,
    has_unread: bool,
    peer: SocketAddr,
    metrics: &HttpMetrics,
) {
    let TimedIo { mut stream, ended, .. } = io;
    let status = match ended {
        Some(Ended::WriteTimeout) => return metrics.refused(Refusal::WriteTimeout),
        Some(Ended::HeadTimeout) => {
            metrics.refused(Refusal::HeadTimeout);
            Some(StatusCode::REQUEST_TIMEOUT)
        }
        Some(Ended::BadHead(status)) => {
            metrics.refused(Refusal::Head);
            Some(status)
        }
        None => None,
    };
    let closing = async {
        if let Some(status) = status {
            let id = RequestId::random();
            audit::unreadable_head(&id, peer, status);
            stream.write_all(&refusal::response(status, &id)).await?;
        }
        stream.shutdown().await?;
        if has_unread || status.is_some() {
            let mut discarded = [0; 8192];
            while stream.read(&mut discarded).await? > 0 {}
        }
        std::io::Result::Ok(())
    };
    // the response has been sent, or the client has disconnected
    let _ = timeout(LINGER_TIMEOUT, closing).await;
}

/// A request's body that records whether it was read to its end.
struct RequestBody {
    incoming: Incoming,
    ended: bool,
    exchange: Arc<Exchange>,
}

impl HttpBody for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = Pin::new(&mut self.incoming).poll_frame(cx);
        self.ended |= matches!(frame, Poll::Ready(None));
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        if !self.ended && !self.incoming.is_end_stream() {
            self.exchange.leave_unread();
        }
    }
}

/// A response's body; the connection is busy until the body ends.
struct ResponseBody {
    body: Body,
    _busy: ExchangeGuard,
}

impl HttpBody for ResponseBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
