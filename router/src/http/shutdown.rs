//! The shutdown of the server in two steps: it stops accepting requests, and after the grace period responses that are
//! not complete end with an error.

use std::{
    future::Future as _,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
};

use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// The progress of the shutdown.
#[derive(Clone, Default)]
pub struct Shutdown(Arc<State>);

#[derive(Default)]
struct State {
    stopping: AtomicBool,
    cut: AtomicBool,
    wakes: CancellationToken,
}

impl Shutdown {
    /// Stops accepting requests; running ones may finish.
    pub fn stop(&self) {
        self.0.stopping.store(true, Ordering::Relaxed);
    }

    /// Whether the server stops.
    pub fn is_stopping(&self) -> bool {
        self.0.stopping.load(Ordering::Relaxed)
    }

    /// Ends the grace period: running requests end with an error.
    pub fn cut(&self) {
        self.stop();
        self.0.cut.store(true, Ordering::Release);
        self.0.wakes.cancel();
    }

    /// Resolves when the grace period is over.
    pub fn wait_cut(&self) -> Cut {
        let wakes = Box::pin(self.0.wakes.clone().cancelled_owned());
        Cut { state: Arc::clone(&self.0), wakes, registered: None }
    }
}

/// The end of the grace period, as a future for one request. A stream polls it with every token, so it takes a lock
/// only if the task changes.
pub struct Cut {
    state: Arc<State>,
    wakes: Pin<Box<WaitForCancellationFutureOwned>>,
    registered: Option<Waker>,
}

impl Cut {
    /// Ready when the grace period is over.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.state.cut.load(Ordering::Acquire) {
            return Poll::Ready(());
        }
        if self.registered.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            return Poll::Pending;
        }
        self.registered = Some(cx.waker().clone());
        self.wakes.as_mut().poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn wakes_all_waiters() {
        let shutdown = Shutdown::default();
        let mut cut = shutdown.wait_cut();
        let waiting = tokio::spawn(async move { std::future::poll_fn(|cx| cut.poll(cx)).await });
        tokio::task::yield_now().await;
        shutdown.stop();
        assert!(shutdown.is_stopping() && !waiting.is_finished());
        shutdown.cut();
        waiting.await.expect("it resolves");
        let mut late = shutdown.wait_cut();
        std::future::poll_fn(|cx| late.poll(cx)).await;
    }
}
