//! The collective of ranks in several processes: a full mesh of TCP connections.
//!
//! Every pair of ranks shares one connection; the higher rank dials. A reader thread per peer drains the socket, so
//! that two ranks that send large tensors to each other never block each other. A peer that dies closes its
//! connections, which is detected immediately; a peer that hangs is detected by the timeout. The rank that detects a
//! failure reports the failed rank to the others, so that all ranks name the same one.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::Scope;
use std::time::{Duration, Instant};

use super::collective::{Abort, Collective, CollectiveError};
use super::handshake::{MeshKey, Pending, greet, introduce};

/// call, length
const HEADER_BYTES: usize = 8 + 8;
/// Call number of a message that reports a lost rank: its body is the rank (4 bytes) and the reason.
const LOST: u64 = u64::MAX;
const LARGEST_FRAME: u64 = 1 << 32;

/// Options of the mesh for the ranks of one process.
pub(super) struct MeshOptions<'a> {
    /// Ranks of this process.
    pub(super) local_ranks: &'a [usize],
    /// `host:port` of each rank of the group; equal for ranks of one process.
    pub(super) addresses: &'a [String],
    /// See [`MeshKey`].
    pub(super) key: MeshKey,
    /// Deadline for the whole mesh.
    pub(super) deadline: Instant,
    /// Timeout of a call for each rank.
    pub(super) timeout: Duration,
}

/// Dials and accepts until every local rank is connected with every other rank.
pub(super) fn connect_mesh(listener: &TcpListener, options: &MeshOptions<'_>) -> Result<Vec<TcpRank>, CollectiveError> {
    let ranks = options.addresses.len();
    let mut streams: Vec<Vec<Option<TcpStream>>> =
        options.local_ranks.iter().map(|_| (0..ranks).map(|_| None).collect()).collect();
    listener.set_nonblocking(true).map_err(|error| listener_failed(options, &error))?;
    // dials and accepts concurrently, because a dialled rank may belong to this process
    std::thread::scope(|scope| {
        let dialling = scope.spawn(|| dial_all(options));
        accept_all(scope, listener, options, &mut streams)?;
        let dialled = dialling.join().map_err(|_| listener_failed(options, &ErrorKind::Other.into()))??;
        for (local, peer, stream) in dialled {
            streams[local][peer] = Some(stream);
        }
        Ok(())
    })?;
    let mut meshes = Vec::with_capacity(options.local_ranks.len());
    for (rank, streams) in options.local_ranks.iter().zip(streams) {
        meshes.push(TcpRank::new(*rank, streams, options.timeout)?);
    }
    Ok(meshes)
}

/// Connects to every rank below each local one. Returns index of the local rank, rank and connection.
fn dial_all(options: &MeshOptions<'_>) -> Result<Vec<(usize, usize, TcpStream)>, CollectiveError> {
    let mut dialled = Vec::new();
    for (local, rank) in options.local_ranks.iter().enumerate() {
        for peer in 0..*rank {
            dialled.push((local, peer, dial(*rank, peer, options)?));
        }
    }
    Ok(dialled)
}

/// Accepts until every rank above each local one has connected. Each handshake runs on its own thread, so that a silent
/// caller blocks no other.
fn accept_all<'scope>(
    scope: &'scope Scope<'scope, '_>,
    listener: &TcpListener,
    options: &MeshOptions<'_>,
    streams: &mut [Vec<Option<TcpStream>>],
) -> Result<(), CollectiveError> {
    let ranks = options.addresses.len();
    let (greeted, greetings) = channel();
    let mut pending = Pending::default();
    loop {
        for (stream, outcome) in greetings.try_iter() {
            pending.remove(&stream);
            let Ok((from, to)) = outcome else { continue };
            let local = options.local_ranks.iter().position(|rank| *rank == to);
            if let Some(local) = local.filter(|_| from > to && from < ranks) {
                streams[local][from] = Some(stream);
            }
        }
        let missing = options
            .local_ranks
            .iter()
            .enumerate()
            .find_map(|(local, rank)| (rank + 1..ranks).find(|peer| streams[local][*peer].is_none()));
        let Some(missing) = missing else { return Ok(()) };
        match listener.accept() {
            Ok((mut stream, _)) => {
                if pending.add(&stream).is_err() {
                    continue;
                }
                let (greeted, key) = (greeted.clone(), options.key);
                scope.spawn(move || {
                    let outcome = greet(&mut stream, &key);
                    // the receiver is gone if the mesh is complete
                    let _ = greeted.send((stream, outcome));
                });
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if Instant::now() >= options.deadline {
                    let reason = "it did not connect to the other ranks in time".to_owned();
                    return Err(CollectiveError::Lost { rank: missing, reason });
                }
                pause(Duration::from_millis(5));
            }
            Err(error) => return Err(listener_failed(options, &error)),
        }
    }
}

/// Sleeps on a thread that may block.
#[allow(clippy::disallowed_methods)]
fn pause(duration: Duration) {
    std::thread::sleep(duration);
}

fn listener_failed(options: &MeshOptions<'_>, error: &std::io::Error) -> CollectiveError {
    let rank = options.local_ranks.first().copied().unwrap_or(0);
    CollectiveError::Lost { rank, reason: format!("its listener failed: {error}") }
}

fn dial(rank: usize, peer: usize, options: &MeshOptions<'_>) -> Result<TcpStream, CollectiveError> {
    let address = &options.addresses[peer];
    let mut refused = None;
    loop {
        let attempt = || -> std::io::Result<TcpStream> {
            let target = address
                .to_socket_addrs()?
                .next()
                .ok_or_else(|| std::io::Error::new(ErrorKind::NotFound, "no such host"))?;
            let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(2))?;
            stream.set_nodelay(true)?;
            introduce(&mut stream, &options.key, rank, peer)?;
            Ok(stream)
        };
        match attempt() {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() >= options.deadline => {
                // if a process of another epoch refuses first and is silent later, the refusal describes the problem
                // best
                let error = refused.unwrap_or(error);
                let reason = format!("rank {rank} can't reach it at {address}: {error}");
                return Err(CollectiveError::Lost { rank: peer, reason });
            }
            Err(error) => {
                if error.kind() == ErrorKind::PermissionDenied {
                    refused = Some(error);
                }
                pause(Duration::from_millis(50));
            }
        }
    }
}

/// Connections of one rank.
pub struct TcpRank {
    rank: usize,
    peers: Vec<Option<TcpStream>>,
    arrivals: Receiver<Arrival>,
    /// Frames of peers that are one call ahead.
    early: Vec<VecDeque<Vec<u8>>>,
    calls: u64,
    timeout: Duration,
    /// A rank that left after it completed the previous call.
    left: Option<CollectiveError>,
    failed: Option<CollectiveError>,
    ended: Arc<Ended>,
}

struct Arrival {
    from: usize,
    frame: Result<Frame, CollectiveError>,
}

struct Frame {
    call: u64,
    bytes: Vec<u8>,
}

struct Ended {
    reason: OnceLock<String>,
    streams: Mutex<Vec<TcpStream>>,
}

impl Abort for Ended {
    fn abort(&self, reason: &str) {
        let _ = self.reason.set(reason.to_owned());
        for stream in self.streams.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            // an already closed connection is fine
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl TcpRank {
    fn new(rank: usize, peers: Vec<Option<TcpStream>>, timeout: Duration) -> Result<Self, CollectiveError> {
        let ranks = peers.len();
        let lost = |peer: usize, error: std::io::Error| CollectiveError::Lost { rank: peer, reason: error.to_string() };
        let (sender, arrivals) = sync_channel(4 * ranks);
        let mut copies = Vec::new();
        for (peer, stream) in peers.iter().enumerate() {
            let Some(stream) = stream else { continue };
            stream.set_write_timeout(Some(timeout)).map_err(|error| lost(peer, error))?;
            copies.push(stream.try_clone().map_err(|error| lost(peer, error))?);
            let reading = stream.try_clone().map_err(|error| lost(peer, error))?;
            let sender = sender.clone();
            std::thread::Builder::new()
                .name(format!("rank{rank}-from{peer}"))
                .spawn(move || read_frames(peer, reading, &sender))
                .map_err(|error| lost(peer, error))?;
        }
        Ok(Self {
            rank,
            peers,
            arrivals,
            early: (0..ranks).map(|_| VecDeque::new()).collect(),
            calls: 0,
            timeout,
            left: None,
            failed: None,
            ended: Arc::new(Ended { reason: OnceLock::new(), streams: Mutex::new(copies) }),
        })
    }

    /// Sends `own` to every peer and returns the peers' data in the order of the ranks.
    fn meet(&mut self, own: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        if let Some(error) = self.left.take() {
            return Err(self.fail(error));
        }
        self.calls += 1;
        self.send_and_receive(own).map_err(|error| self.fail(error))
    }

    fn send_and_receive(&mut self, own: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(&self.calls.to_le_bytes());
        header[8..].copy_from_slice(&(own.len() as u64).to_le_bytes());
        for (peer, stream) in self.peers.iter_mut().enumerate() {
            let Some(stream) = stream else { continue };
            let sent = stream.write_all(&header).and_then(|()| stream.write_all(&own));
            sent.map_err(|error| match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                    CollectiveError::Timeout { rank: peer, waited: self.timeout }
                }
                _ => CollectiveError::Lost { rank: peer, reason: format!("connection lost: {error}") },
            })?;
        }
        let mut received: Vec<Option<Vec<u8>>> = self.early.iter_mut().map(VecDeque::pop_front).collect();
        received[self.rank] = Some(own);
        let deadline = Instant::now() + self.timeout;
        while let Some(late) = received.iter().position(Option::is_none) {
            let left = deadline.saturating_duration_since(Instant::now());
            let arrival = self.arrivals.recv_timeout(left).map_err(|error| match error {
                RecvTimeoutError::Timeout => CollectiveError::Timeout { rank: late, waited: self.timeout },
                RecvTimeoutError::Disconnected => {
                    CollectiveError::Lost { rank: late, reason: "connection closed".to_owned() }
                }
            })?;
            let from = arrival.from;
            let frame = match arrival.frame {
                Ok(frame) => frame,
                Err(error) => {
                    // the failure of a rank that completed its part concerns the next call
                    let culprit = error.rank().unwrap_or(from);
                    if received[from].is_none() || received.get(culprit).is_none_or(Option::is_none) {
                        return Err(error);
                    }
                    self.left.get_or_insert(error);
                    continue;
                }
            };
            let expected = self.calls + u64::from(received[from].is_some()) + self.early[from].len() as u64;
            if frame.call != expected {
                let reason = format!("it is at call {}, expected {expected}", frame.call);
                return Err(CollectiveError::OutOfStep { rank: from, reason });
            }
            match &mut received[from] {
                empty @ None => *empty = Some(frame.bytes),
                Some(_) => self.early[from].push_back(frame.bytes),
            }
        }
        Ok(received.into_iter().flatten().collect())
    }

    /// Stores the first error, reports the failed rank to the others, and closes the connections.
    fn fail(&mut self, error: CollectiveError) -> CollectiveError {
        if let Some(reason) = self.ended.reason.get() {
            let ended = CollectiveError::Aborted(reason.clone());
            self.failed = Some(ended.clone());
            return ended;
        }
        if let CollectiveError::Lost { rank, .. } | CollectiveError::Timeout { rank, .. } = &error {
            let reason = match &error {
                CollectiveError::Lost { reason, .. } => reason.clone(),
                other => other.to_string(),
            };
            let mut frame = LOST.to_le_bytes().to_vec();
            frame.extend_from_slice(&(4 + reason.len() as u64).to_le_bytes());
            frame.extend_from_slice(&(*rank as u32).to_le_bytes());
            frame.extend_from_slice(reason.as_bytes());
            for stream in self.peers.iter_mut().flatten() {
                // best effort: a peer that does not receive it sees the connection close
                let _ = stream.set_write_timeout(Some(Duration::from_millis(200)));
                let _ = stream.write_all(&frame);
            }
        }
        self.hang_up();
        self.failed = Some(error.clone());
        error
    }

    fn hang_up(&self) {
        for stream in self.peers.iter().flatten() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn same_length(&self, rank: usize, found: usize, own: usize) -> Result<(), CollectiveError> {
        if found == own {
            return Ok(());
        }
        Err(CollectiveError::OutOfStep {
            rank,
            reason: format!("it passed {found} bytes, rank {} passed {own}", self.rank),
        })
    }
}

impl Drop for TcpRank {
    fn drop(&mut self) {
        self.hang_up();
    }
}

fn read_frames(from: usize, mut stream: TcpStream, sender: &SyncSender<Arrival>) {
    loop {
        let frame = read_frame(from, &mut stream);
        let last = frame.is_err();
        if sender.send(Arrival { from, frame }).is_err() || last {
            return;
        }
    }
}

fn read_frame(from: usize, stream: &mut TcpStream) -> Result<Frame, CollectiveError> {
    let lost = |reason: String| CollectiveError::Lost { rank: from, reason };
    let closed = |error: std::io::Error| match error.kind() {
        ErrorKind::UnexpectedEof => lost("it closed the connection".to_owned()),
        _ => lost(format!("connection lost: {error}")),
    };
    let (mut call, mut length) = ([0; 8], [0; 8]);
    stream.read_exact(&mut call).map_err(closed)?;
    stream.read_exact(&mut length).map_err(closed)?;
    let (call, length) = (u64::from_le_bytes(call), u64::from_le_bytes(length));
    if length > LARGEST_FRAME {
        return Err(lost(format!("it sent a frame of {length} bytes")));
    }
    let mut bytes = vec![0; length as usize];
    stream.read_exact(&mut bytes).map_err(closed)?;
    if call != LOST {
        return Ok(Frame { call, bytes });
    }
    let Some((rank, reason)) = bytes.split_first_chunk::<4>() else {
        return Err(lost("it gave up".to_owned()));
    };
    let rank = u32::from_le_bytes(*rank) as usize;
    Err(CollectiveError::Lost { rank, reason: String::from_utf8_lossy(reason).into_owned() })
}

fn to_bytes(elements: &[f32]) -> Vec<u8> {
    elements.iter().flat_map(|number| number.to_le_bytes()).collect()
}

fn elements(bytes: &[u8]) -> impl Iterator<Item = f32> + '_ {
    bytes.as_chunks::<4>().0.iter().map(|four| f32::from_le_bytes(*four))
}

impl Collective for TcpRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.peers.len()
    }

    fn all_reduce(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        let received = self.meet(to_bytes(values))?;
        for (rank, bytes) in received.iter().enumerate() {
            self.same_length(rank, bytes.len(), values.len() * 4)?;
            for (value, number) in values.iter_mut().zip(elements(bytes)) {
                *value = if rank == 0 { number } else { *value + number };
            }
        }
        Ok(())
    }

    fn all_gather(&mut self, own: &[f32], all: &mut [f32]) -> Result<(), CollectiveError> {
        let received = self.meet(to_bytes(own))?;
        for (rank, bytes) in received.iter().enumerate() {
            self.same_length(rank, bytes.len(), own.len() * 4)?;
            for (to, number) in all[rank * own.len()..].iter_mut().zip(elements(bytes)) {
                *to = number;
            }
        }
        Ok(())
    }

    fn exchange(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.meet(own.to_vec())
    }

    fn aborter(&self) -> Arc<dyn Abort> {
        self.ended.clone()
    }
}

/// Connects local ranks over the loopback interface, for tests and for processes of one machine.
pub fn loopback_mesh(ranks: usize, timeout: Duration) -> Result<Vec<TcpRank>, CollectiveError> {
    let failed = |error: std::io::Error| CollectiveError::Lost { rank: 0, reason: format!("no loopback: {error}") };
    let listener = TcpListener::bind("127.0.0.1:0").map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?.to_string();
    let local_ranks: Vec<usize> = (0..ranks).collect();
    connect_mesh(
        &listener,
        &MeshOptions {
            local_ranks: &local_ranks,
            addresses: &vec![address; ranks],
            key: [7; 32],
            deadline: Instant::now() + Duration::from_secs(10),
            timeout,
        },
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods)] // ranks that hang

    use super::*;

    fn run<R: Send>(ranks: Vec<TcpRank>, work: impl Fn(TcpRank) -> R + Sync) -> Vec<R> {
        std::thread::scope(|scope| {
            let work = &work;
            let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(move || work(rank))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn reduces_to_the_same_bits_on_every_rank() {
        let mesh = loopback_mesh(3, Duration::from_secs(20)).unwrap();
        let results = run(mesh, |mut rank| {
            // larger than the sockets' buffers
            let mut large: Vec<f32> = (0..400_000).map(|i| (i as f32 + rank.rank() as f32 * 0.37).sin()).collect();
            rank.all_reduce(&mut large).unwrap();
            for call in 0..50 {
                let mut values = vec![0.1 + call as f32 * rank.rank() as f32; 3];
                rank.all_reduce(&mut values).unwrap();
                large.extend(values);
            }
            let mut gathered = vec![0.0; 3];
            rank.all_gather(&[rank.rank() as f32], &mut gathered).unwrap();
            assert_eq!(gathered, [0.0, 1.0, 2.0]);
            assert_eq!(rank.exchange(&[rank.rank() as u8]).unwrap(), [[0], [1], [2]]);
            rank.barrier().unwrap();
            large.iter().map(|value| value.to_bits()).collect::<Vec<_>>()
        });
        assert!(results[0] == results[1] && results[0] == results[2]);
    }

    #[test]
    fn names_the_rank_that_left_on_all_ranks() {
        let mesh = loopback_mesh(4, Duration::from_secs(20)).unwrap();
        let started = Instant::now();
        let results = run(mesh, |mut rank| {
            if rank.rank() == 2 {
                return None;
            }
            Some(rank.barrier().unwrap_err())
        });
        assert!(started.elapsed() < Duration::from_secs(5));
        for error in results.into_iter().flatten() {
            assert!(matches!(error, CollectiveError::Lost { rank: 2, .. }), "{error}");
        }
    }

    #[test]
    fn names_a_rank_that_hangs() {
        let mesh = loopback_mesh(2, Duration::from_millis(200)).unwrap();
        let results = run(mesh, |mut rank| {
            if rank.rank() == 1 {
                std::thread::sleep(Duration::from_millis(900));
                return None;
            }
            Some(rank.barrier().unwrap_err())
        });
        assert_eq!(results[0], Some(CollectiveError::Timeout { rank: 1, waited: Duration::from_millis(200) }));
    }

    #[test]
    fn aborts_a_waiting_rank() {
        let mut mesh = loopback_mesh(2, Duration::from_secs(20)).unwrap();
        let idle = mesh.pop().unwrap();
        let mut waiting = mesh.pop().unwrap();
        let aborter = waiting.aborter();
        let thread = std::thread::spawn(move || waiting.barrier());
        std::thread::sleep(Duration::from_millis(50));
        aborter.abort("the leader stopped");
        let error = thread.join().unwrap().unwrap_err();
        assert_eq!(error, CollectiveError::Aborted("the leader stopped".to_owned()));
        drop(idle);
    }

    fn options<'a>(rank: &'a [usize], addresses: &'a [String], key: u8, limit: Duration) -> MeshOptions<'a> {
        let deadline = Instant::now() + limit;
        MeshOptions { local_ranks: rank, addresses, key: [key; 32], deadline, timeout: Duration::from_secs(1) }
    }

    fn listen() -> (TcpListener, String) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        (listener, address)
    }

    #[test]
    fn rejects_strangers() {
        let (listener, address) = listen();
        let mut stranger = TcpStream::connect(&address).unwrap();
        stranger.write_all(&[0; 48]).unwrap();
        let addresses = vec![address; 2];
        let error = connect_mesh(&listener, &options(&[0], &addresses, 1, Duration::from_millis(300))).err().unwrap();
        assert!(matches!(error, CollectiveError::Lost { rank: 1, .. }), "{error}");
    }

    #[test]
    fn rejects_ranks_with_another_key() {
        let ((first, first_address), (second, second_address)) = (listen(), listen());
        let addresses = vec![first_address, second_address];
        let limit = Duration::from_secs(2);
        std::thread::scope(|scope| {
            let other = scope.spawn(|| connect_mesh(&second, &options(&[1], &addresses, 2, limit)).err());
            let error = connect_mesh(&first, &options(&[0], &addresses, 1, limit)).err();
            assert!(matches!(error, Some(CollectiveError::Lost { rank: 1, .. })), "{error:?}");
            let error = other.join().unwrap();
            assert!(
                matches!(&error, Some(CollectiveError::Lost { rank: 0, reason }) if reason.contains("epoch")),
                "{error:?}"
            );
        });
    }

    #[test]
    fn accepts_ranks_despite_silent_and_slow_callers() {
        let ((first, first_address), (second, second_address)) = (listen(), listen());
        let idle: Vec<TcpStream> = (0..2 * super::super::handshake::MAX_HANDSHAKES)
            .map(|_| TcpStream::connect(&first_address).unwrap())
            .collect();
        for mut one in &idle {
            one.write_all(b"bora").unwrap();
        }
        let addresses = vec![first_address, second_address];
        let limit = Duration::from_secs(20);
        let began = Instant::now();
        std::thread::scope(|scope| {
            let other = scope.spawn(|| connect_mesh(&second, &options(&[1], &addresses, 1, limit)).map(drop));
            assert!(connect_mesh(&first, &options(&[0], &addresses, 1, limit)).is_ok());
            assert!(other.join().unwrap().is_ok());
        });
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    }

    #[test]
    fn reveals_nothing_of_the_key_to_an_impostor() {
        // the impostor sends a proof of its own and receives no proof in return
        let (listener, address) = listen();
        let impostor = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut hello = [0; 48];
            stream.read_exact(&mut hello).unwrap();
            stream.write_all(&[9; 64]).unwrap();
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest);
            (hello, rest)
        });
        let mut stream = TcpStream::connect(address).unwrap();
        let key = [5; 32];
        assert!(introduce(&mut stream, &key, 1, 0).is_err());
        drop(stream);
        let (hello, rest) = impostor.join().unwrap();
        assert!(rest.is_empty() && !hello.windows(8).any(|window| window == [5; 8]));
    }
}
