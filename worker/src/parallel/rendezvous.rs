//! The leader's side of the `Peers` service: admits followers, tracks them, and watches their heartbeats.
//!
//! Until the group is complete, a process that leaves only frees its ranks for the next one. After that, the end of its
//! stream or a missed heartbeat ends the group.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bora_common::peer::{Admission, Guard, ServerIdentity};
use bora_common::registry::RankRecord;
use bora_common::tls::Acceptor;
use bora_proto::v1::peers_server::{Peers, PeersServer};
use bora_proto::v1::{FromFollower, FromLeader, Goodbye, Hello, from_follower, from_leader};
use futures::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tracing::{info, warn};

use super::fault::{ECHO_WAIT, Fault, GroupProgress};
use crate::engine::step::RunError;

/// Maximum messages that wait for a follower's socket; a follower further behind counts as dead.
const WAITING_MESSAGES: usize = 64;
/// Timeout for the hello of a process that joins.
const HELLO_WITHIN: Duration = Duration::from_secs(10);

/// Properties that a joining process must match, beyond its identity, which the server's [`Guard`] has checked.
pub(super) struct Expected {
    pub(super) ranks: usize,
    /// First rank of the followers; lower ranks belong to the leader.
    pub(super) first_remote: usize,
    pub(super) revision: String,
    pub(super) settings: String,
    pub(super) heartbeat_timeout: Duration,
}

/// State of the group's other processes on the leader.
pub(super) struct Rendezvous {
    expected: Expected,
    fault: Arc<Fault>,
    progress: Arc<GroupProgress>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    members: Vec<Member>,
    next_id: u64,
    /// All ranks have joined and were welcomed: a process that leaves now ends the group.
    complete: bool,
    /// The leader is stopping: processes may leave now.
    stopped: bool,
}

struct Member {
    id: u64,
    ranks: Vec<u32>,
    host: String,
    pid: u32,
    collective_address: String,
    sender: mpsc::Sender<Result<FromLeader, Status>>,
    kv_blocks: Option<u32>,
    last_heard: Instant,
}

impl Rendezvous {
    pub(super) fn new(expected: Expected, fault: Arc<Fault>, progress: Arc<GroupProgress>) -> Arc<Self> {
        Arc::new(Self { expected, fault, progress, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Admits a process, or refuses it. A refusal names what differs and never the group's own value.
    fn admit(&self, hello: Hello, sender: mpsc::Sender<Result<FromLeader, Status>>) -> Result<u64, Status> {
        let expected = &self.expected;
        let refuse = |reason: &str| Err(Status::failed_precondition(reason));
        if hello.revision != expected.revision {
            return refuse("the leader is of another revision: all processes of a group must have the same revision");
        }
        if hello.version != env!("CARGO_PKG_VERSION") {
            return refuse("the leader runs another version: all processes of a group must run the same version");
        }
        if hello.world_size as usize != expected.ranks {
            return refuse("worker.tensor_parallel_size: the leader has another number of ranks");
        }
        if hello.settings != expected.settings {
            return refuse("the leader has other settings (device, number formats, load format, host memory)");
        }
        if hello.ranks.is_empty() {
            return refuse("the hello names no ranks");
        }
        let mut state = self.state();
        for rank in &hello.ranks {
            if (*rank as usize) < expected.first_remote || *rank as usize >= expected.ranks {
                return refuse(&format!("rank {rank} is not one that followers hold"));
            }
            if let Some(holder) = state.members.iter().find(|member| member.ranks.contains(rank)) {
                // unavailable, so that the caller retries: the other process may just have died
                warn!(
                    rank,
                    host = holder.host,
                    pid = holder.pid,
                    by = hello.host,
                    "a process claims a rank that another one holds"
                );
                return Err(Status::unavailable(format!("rank {rank} is held by another process")));
            }
        }
        if state.complete || state.stopped {
            return Err(Status::unavailable("the group is complete"));
        }
        info!(ranks = ?hello.ranks, host = hello.host, pid = hello.pid, "a follower joined");
        state.next_id += 1;
        let id = state.next_id;
        state.members.push(Member {
            id,
            ranks: hello.ranks,
            host: hello.host,
            pid: hello.pid,
            collective_address: hello.collective_address,
            sender,
            kv_blocks: None,
            last_heard: Instant::now(),
        });
        Ok(id)
    }

    /// Handles messages of a follower until it leaves.
    async fn listen(self: Arc<Self>, id: u64, mut incoming: Streaming<FromFollower>) {
        let reason = loop {
            match incoming.message().await {
                Ok(Some(FromFollower { message: Some(message) })) => self.handle_message(id, message),
                Ok(Some(FromFollower { message: None })) => {}
                Ok(None) => break "its process ended".to_owned(),
                Err(status) => break format!("its process ended ({})", status.message()),
            }
        };
        self.lose(id, &reason);
    }

    fn handle_message(&self, id: u64, message: from_follower::Message) {
        let mut state = self.state();
        let Some(member) = state.members.iter_mut().find(|member| member.id == id) else { return };
        member.last_heard = Instant::now();
        match message {
            from_follower::Message::Ready(ready) => member.kv_blocks = Some(ready.kv_blocks),
            from_follower::Message::Heartbeat(heartbeat) => {
                for rank in heartbeat.ranks.iter().filter(|rank| member.ranks.contains(&rank.rank)) {
                    self.progress.set_steps(rank.rank as usize, rank.steps);
                }
            }
            from_follower::Message::Failed(failed) => {
                let own = member.ranks.contains(&failed.rank);
                drop(state);
                if own {
                    self.fault.fail(RunError::Device { rank: failed.rank, step: failed.step, reason: failed.reason });
                    return;
                }
                // a report about another rank may be a consequence of a failure that is known here soon (a rank that
                // learns of a failure closes its connections to ranks that still write), and this process's own ranks
                // wait as well
                let host = "unknown host".to_owned();
                let failure = RunError::RankLost { rank: failed.rank, host, reason: failed.reason };
                let fault = Arc::clone(&self.fault);
                tokio::spawn(async move {
                    let _ = tokio::time::timeout(2 * ECHO_WAIT, fault.failure()).await;
                    fault.fail(failure);
                });
            }
            from_follower::Message::Hello(_) => warn!(id, "a follower said hello twice"),
        }
    }

    fn lose(&self, id: u64, reason: &str) {
        let mut state = self.state();
        let Some(index) = state.members.iter().position(|member| member.id == id) else { return };
        if state.stopped {
            return;
        }
        let rank = state.members[index].ranks[0];
        let host = state.members[index].host.clone();
        if state.complete {
            drop(state);
            self.fault.fail(RunError::RankLost { rank, host, reason: reason.to_owned() });
        } else {
            warn!(rank, host, reason, "a follower left before the group was complete");
            state.members.remove(index);
        }
    }

    /// Waits until every remote rank has joined.
    pub(super) async fn all_joined(&self, deadline: Instant) -> Result<(), RunError> {
        loop {
            let missing = {
                let mut state = self.state();
                let joined = |rank: &usize| state.members.iter().any(|member| member.ranks.contains(&(*rank as u32)));
                let missing = (self.expected.first_remote..self.expected.ranks).find(|rank| !joined(rank));
                state.complete = missing.is_none();
                missing
            };
            let Some(rank) = missing else { return Ok(()) };
            if Instant::now() >= deadline {
                let (host, reason) = ("no host".to_owned(), "it did not join in time".to_owned());
                return Err(RunError::RankLost { rank: rank as u32, host, reason });
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until every follower is ready; returns the minimum of their KV blocks.
    pub(super) async fn all_ready(&self) -> Result<Option<u32>, RunError> {
        loop {
            if let Some(failure) = self.fault.first() {
                return Err(failure);
            }
            let kv_blocks: Option<Vec<u32>> = self.state().members.iter().map(|member| member.kv_blocks).collect();
            if let Some(kv_blocks) = kv_blocks {
                return Ok(kv_blocks.into_iter().min());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Watches heartbeats while the group runs, and sends goodbyes at its end.
    pub(super) async fn watch(self: Arc<Self>, stop: CancellationToken) {
        let limit = self.expected.heartbeat_timeout;
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                _ = self.fault.failure() => break,
                () = tokio::time::sleep(Duration::from_millis(250)) => {}
            }
            let silent = self.state().members.iter().find(|member| member.last_heard.elapsed() > limit).map(|m| m.id);
            if let Some(id) = silent {
                self.lose(id, &format!("no heartbeat for {limit:?}"));
            }
        }
        match self.fault.first() {
            Some(failure) => self.send_goodbye(&failure.to_string(), true),
            None => self.send_goodbye("the leader stopped", false),
        }
    }

    /// Sends the same message to every follower; a follower that can't accept it fails the group.
    pub(super) fn send_to_all(&self, message: &from_leader::Message) -> Result<(), RunError> {
        for member in &self.state().members {
            let message = FromLeader { message: Some(message.clone()) };
            if let Err(error) = member.sender.try_send(Ok(message)) {
                let reason = match error {
                    mpsc::error::TrySendError::Full(_) => "it does not read its messages".to_owned(),
                    mpsc::error::TrySendError::Closed(_) => "its stream is closed".to_owned(),
                };
                return Err(RunError::RankLost { rank: member.ranks[0], host: member.host.clone(), reason });
            }
        }
        Ok(())
    }

    /// Ends the followers' streams with the reason.
    pub(super) fn send_goodbye(&self, reason: &str, failed: bool) {
        let mut state = self.state();
        state.stopped = true;
        let goodbye = from_leader::Message::Goodbye(Goodbye { reason: reason.to_owned(), failed });
        for member in state.members.drain(..) {
            // a follower that can't receive it sees the stream end
            let _ = member.sender.try_send(Ok(FromLeader { message: Some(goodbye.clone()) }));
        }
    }

    /// Addresses on which the processes of remote ranks listen for the collective.
    pub(super) fn collective_addresses(&self) -> Vec<(u32, String)> {
        let state = self.state();
        let addresses = state
            .members
            .iter()
            .flat_map(|member| member.ranks.iter().map(|rank| (*rank, member.collective_address.clone())));
        addresses.collect()
    }

    pub(super) fn records(&self) -> Vec<RankRecord> {
        let state = self.state();
        let records = state.members.iter().flat_map(|member| {
            member.ranks.iter().map(|rank| RankRecord { rank: *rank, host: member.host.clone(), pid: member.pid })
        });
        records.collect()
    }
}

/// Serves the rendezvous until `stop`.
pub(super) async fn serve(
    listener: tokio::net::TcpListener,
    tls: Option<Acceptor>,
    identity: Arc<ServerIdentity>,
    rendezvous: Arc<Rendezvous>,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let admission = if tls.is_some() { Admission::ByRole } else { Admission::Anybody };
    let server = tonic::transport::Server::builder()
        .layer(Guard::new(identity, admission))
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(Duration::from_secs(2)))
        .http2_keepalive_timeout(Some(rendezvous.expected.heartbeat_timeout))
        .add_service(PeersServer::new(PeersService { rendezvous }));
    let stopped = stop.cancelled_owned();
    match tls {
        None => server.serve_with_incoming_shutdown(TcpListenerStream::new(listener), stopped).await,
        Some(tls) => server.serve_with_incoming_shutdown(tls.incoming(listener), stopped).await,
    }
}

struct PeersService {
    rendezvous: Arc<Rendezvous>,
}

#[tonic::async_trait]
impl Peers for PeersService {
    type JoinStream = Pin<Box<dyn Stream<Item = Result<FromLeader, Status>> + Send>>;

    async fn join(&self, request: Request<Streaming<FromFollower>>) -> Result<Response<Self::JoinStream>, Status> {
        let mut incoming = request.into_inner();
        let first = tokio::time::timeout(HELLO_WITHIN, incoming.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no hello"))??;
        let Some(from_follower::Message::Hello(hello)) = first.and_then(|first| first.message) else {
            return Err(Status::invalid_argument("the first message must be a hello"));
        };
        let (sender, receiver) = mpsc::channel(WAITING_MESSAGES);
        let id = self.rendezvous.admit(hello, sender)?;
        tokio::spawn(Arc::clone(&self.rendezvous).listen(id, incoming));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
