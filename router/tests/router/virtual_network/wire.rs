//! A network in memory: connections are pipes whose bytes take time, wait while the path is cut, and are lost with the
//! process at their end.

use std::{collections::HashMap, io, sync::Arc, time::Duration};

use axum::http::Uri;
use bora_router::relay::stream::Dial;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, duplex, split},
    sync::{Notify, mpsc},
    time::sleep,
};
use tokio_stream::{Stream, StreamExt as _, wrappers::UnboundedReceiverStream};
use tokio_util::sync::CancellationToken;

/// What is changed from outside while others wait for it. They hear of it in the order in which they came, which those
/// of `tokio::sync::watch` do not.
pub(super) struct Setting<T> {
    value: Mutex<T>,
    changed: Notify,
}

impl<T: Copy> Setting<T> {
    pub(super) fn new(value: T) -> Self {
        Self { value: Mutex::new(value), changed: Notify::new() }
    }

    pub(super) fn get(&self) -> T {
        *self.value.lock()
    }

    pub(super) fn set(&self, value: T) {
        *self.value.lock() = value;
        self.changed.notify_waiters();
    }

    pub(super) async fn until(&self, holds: impl Fn(T) -> bool) {
        loop {
            let changed = self.changed.notified();
            if holds(self.get()) {
                return;
            }
            changed.await;
        }
    }
}

const BUFFER: usize = 64 << 10;

/// What lies between the router and a group.
#[derive(Clone, Copy, Debug)]
pub(super) struct Path {
    pub(super) delay: Duration,
    /// Nothing comes through, and nobody is given.
    pub(super) is_cut: bool,
}

pub(super) const GOOD: Path = Path { delay: Duration::from_millis(1), is_cut: false };

#[derive(Clone)]
struct Listener {
    incoming: mpsc::UnboundedSender<DuplexStream>,
    path: Arc<Setting<Path>>,
    /// Of the process that listens.
    life: CancellationToken,
}

#[derive(Default)]
pub(super) struct Network {
    listeners: Mutex<HashMap<String, Listener>>,
}

impl Network {
    /// The connections to an address, from now on, of a process that lives so long.
    pub(super) fn listen(
        &self,
        host: &str,
        path: Arc<Setting<Path>>,
        life: CancellationToken,
    ) -> impl Stream<Item = io::Result<DuplexStream>> + use<> {
        let (incoming, accepted) = mpsc::unbounded_channel();
        self.listeners.lock().insert(host.into(), Listener { incoming, path, life });
        UnboundedReceiverStream::new(accepted).map(Ok)
    }

    /// How a router gets there.
    pub(super) fn dial(self: Arc<Self>) -> Dial {
        Box::new(move |endpoint| {
            let network = Arc::clone(&self);
            endpoint.connect_with_connector_lazy(tower::service_fn(move |uri| Arc::clone(&network).connect(uri)))
        })
    }

    async fn connect(self: Arc<Self>, uri: Uri) -> io::Result<TokioIo<DuplexStream>> {
        let listener = self.listeners.lock().get(uri.host().unwrap_or_default()).cloned();
        let Listener { incoming, path, life } = listener.ok_or(io::ErrorKind::HostUnreachable)?;
        let (near, near_end) = duplex(BUFFER);
        let (far_end, far) = duplex(BUFFER);
        path.until(is_whole).await;
        sleep(path.get().delay).await;
        incoming.send(far).ok().filter(|()| !life.is_cancelled()).ok_or(io::ErrorKind::ConnectionRefused)?;
        tokio::spawn(carry(near_end, far_end, path, life));
        Ok(TokioIo::new(near))
    }
}

fn is_whole(path: Path) -> bool {
    !path.is_cut
}

/// Until one end is closed or the process is gone; the other end hears of it as soon as the path lets it.
async fn carry(near: DuplexStream, far: DuplexStream, path: Arc<Setting<Path>>, life: CancellationToken) {
    let (mut from_near, mut to_near) = split(near);
    let (mut from_far, mut to_far) = split(far);
    tokio::select! {
        biased;
        () = life.cancelled() => {}
        _ = pass(&mut from_near, &mut to_far, &path) => {}
        _ = pass(&mut from_far, &mut to_near, &path) => {}
    }
    path.until(is_whole).await;
}

async fn pass(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    path: &Setting<Path>,
) -> io::Result<()> {
    let mut bytes = vec![0; BUFFER];
    loop {
        let count = from.read(&mut bytes).await?;
        if count == 0 {
            return Ok(());
        }
        sleep(path.get().delay).await;
        path.until(is_whole).await;
        to.write_all(&bytes[..count]).await?;
    }
}
