//! A follower: a process whose leader is another process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bora_common::model::ModelConfig;
use bora_common::peer::{Expected, Role, identity};
use bora_common::tls::{self, Connector};
use bora_common::version;
use bora_proto::v1::peers_client::PeersClient;
use bora_proto::v1::{
    Failed, FromFollower, FromLeader, Heartbeat, Hello, Identity, RankProgress, Ready, Welcome, from_follower,
    from_leader,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;
use tonic::{Code, Streaming};
use tracing::{info, warn};

use super::collective::{Collective, CollectiveError};
use super::fault::{Fault, GroupProgress};
use super::group::{StartError, blocking, system};
use super::handshake::MeshKey;
use super::options::FollowerOptions;
use super::rank::{Loading, RankThread, open_weights};
use super::tcp::{MeshOptions, connect_mesh};
use crate::backend::Limits;
use crate::engine::step::{RunError, Step};

/// Maximum messages that wait to be sent to the leader.
const WAITING_MESSAGES: usize = 16;

/// Why a follower ended.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// The leader could not be reached in time.
    #[error("can't reach the leader of group `{group}` at {leader} within {waited:?}: {reason}")]
    Unreachable {
        /// The group.
        group: String,
        /// Address tried.
        leader: String,
        /// Time waited.
        waited: Duration,
        /// Error of the last attempt.
        reason: String,
    },
    /// The leader refused this process.
    #[error("the leader of group `{group}` at {leader} refused this process: {reason}")]
    Refused {
        /// The group.
        group: String,
        /// The leader's address.
        leader: String,
        /// Reason, as the leader reports it.
        reason: String,
    },
    /// The leader at this address belongs to another start of the group.
    #[error("the leader of group `{group}` at {leader} is of another epoch: {reason}")]
    OtherEpoch {
        /// The group.
        group: String,
        /// The leader's address.
        leader: String,
        /// Reason, as the leader reports it.
        reason: String,
    },
    /// The leader's process ended or is unreachable.
    #[error("the leader of group `{group}` at {leader} is gone: {reason}")]
    LeaderGone {
        /// The group.
        group: String,
        /// The leader's address.
        leader: String,
        /// How the loss was detected.
        reason: String,
    },
    /// The leader reported that the group failed.
    #[error("group `{group}` failed: {reason}")]
    GroupFailed {
        /// The group.
        group: String,
        /// Reason, as the leader reports it.
        reason: String,
    },
    /// A rank of this process failed, or lost another rank.
    #[error(transparent)]
    Rank(#[from] RunError),
    /// This process could not start its ranks.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The leader sent an unexpected message.
    #[error("the leader broke the protocol: {0}")]
    Protocol(String),
}

/// Joins the leader's group and runs its steps until the group ends. Returns the leader's reason if the group stopped
/// without a failure.
///
/// The leader may start later than this process: connecting is retried until `connect_within` has passed.
pub async fn follow(options: FollowerOptions) -> Result<String, FollowError> {
    follow_and_report(options, &AtomicBool::new(false)).await
}

/// Like [`follow`]; `group_runs` is true while the whole group runs.
pub(crate) async fn follow_and_report(
    options: FollowerOptions,
    group_runs: &AtomicBool,
) -> Result<String, FollowError> {
    let model = ModelConfig::from_dir(&options.member.model_dir).map_err(StartError::from)?;
    let opening = (options.member.clone(), model.clone());
    let weights = blocking(move || open_weights(&opening.0, &opening.1)).await.map_err(StartError::from)?;
    let (listener, collective_address) =
        options.member.listen_for_ranks().map_err(system("listen for the other ranks"))?;
    let identity = Identity {
        contract: version::CONTRACT,
        cluster: options.member.cluster.clone(),
        model: options.member.model.clone(),
        group: options.member.group.clone(),
        epoch: options.epoch.unwrap_or(0),
        weight_fingerprint: weights.fingerprint().to_owned(),
    };
    let hello = Hello {
        group: options.member.group.clone(),
        epoch: options.epoch.unwrap_or(0),
        ranks: options.member.local_ranks.clone().map(|rank| rank as u32).collect(),
        world_size: options.member.ranks as u32,
        weight_fingerprint: weights.fingerprint().to_owned(),
        host: options.member.host.clone(),
        pid: std::process::id(),
        collective_address,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        settings: options.member.settings(),
        revision: options.member.revision.clone(),
    };
    let deadline = Instant::now() + options.connect_within;
    let mut link = Link::join(&options, hello, &Expected::new(&identity), deadline).await?;
    let progress = GroupProgress::new(options.member.ranks, model.num_hidden_layers);
    let fault = Fault::new();
    let heartbeats = tokio::spawn(send_heartbeats(link.sender.clone(), options.clone(), Arc::clone(&progress)));
    let ended = run(&options, &mut link, listener, weights, &fault, &progress, group_runs).await;
    group_runs.store(false, Ordering::Relaxed);
    heartbeats.abort();
    fault.abort("this process stops");
    ended
}

async fn run(
    options: &FollowerOptions,
    link: &mut Link,
    listener: std::net::TcpListener,
    weights: crate::weights::Weights,
    fault: &Arc<Fault>,
    progress: &Arc<GroupProgress>,
    group_runs: &AtomicBool,
) -> Result<String, FollowError> {
    let welcome = match link.next().await? {
        from_leader::Message::Welcome(welcome) => welcome,
        from_leader::Message::Goodbye(goodbye) => return link.ended(goodbye),
        other => return Err(FollowError::Protocol(format!("a welcome was expected, not {other:?}"))),
    };
    version::check_contract(welcome.contract).map_err(|skew| link.refused(skew.to_string()))?;
    info!(group = options.member.group, epoch = welcome.epoch, "joined the group");
    let limits: Limits =
        welcome.limits.ok_or_else(|| FollowError::Protocol("the welcome has no limits".to_owned()))?.into();
    let collectives = connect(options, welcome, listener).await?;

    let (member, loading_fault, loading_progress) = (options.member.clone(), Arc::clone(fault), Arc::clone(progress));
    let loading = tokio::task::spawn_blocking(move || {
        let (fault, progress) = (&*loading_fault, &*loading_progress);
        let loaded = Loading { weights: &weights, options: &member, limits, fault, progress }.load_all(collectives);
        loaded.map(|loaded| (weights, loaded))
    });
    let (weights, loaded) = match link.while_it_lives(loading).await? {
        Ok(loaded) => loaded,
        Err(error) => return link.give_up(error).await,
    };
    let kv_blocks = loaded.iter().map(|rank| rank.kv_blocks()).min().unwrap_or(0);
    link.send(from_follower::Message::Ready(Ready { kv_blocks: kv_blocks as u32 })).await?;
    let kv_blocks = match link.next().await? {
        from_leader::Message::Start(start) => start.kv_blocks as usize,
        from_leader::Message::Goodbye(goodbye) => return link.ended(goodbye),
        other => return Err(FollowError::Protocol(format!("a start was expected, not {other:?}"))),
    };
    let (member, starting_fault, starting_progress) = (options.member.clone(), Arc::clone(fault), Arc::clone(progress));
    let starting = blocking(move || {
        let (fault, progress) = (&*starting_fault, &*starting_progress);
        Loading { weights: &weights, options: &member, limits, fault, progress }.start_all(loaded, kv_blocks)
    });
    let runners = match starting.await {
        Ok(runners) => runners,
        Err(error) => return link.give_up(error).await,
    };

    let mut ranks = Vec::new();
    for (rank, runner) in options.member.local_ranks.clone().zip(runners) {
        let failing = Arc::clone(fault);
        let thread = RankThread::spawn(rank, runner, Arc::clone(progress), move |error| {
            failing.fail(error);
        });
        ranks.push(thread.map_err(system("start a rank's thread"))?);
    }
    group_runs.store(true, Ordering::Relaxed);
    let ended = run_steps(link, &ranks, fault).await;
    // the threads must be unblocked before they are joined
    fault.abort("the group ended");
    blocking(move || drop(ranks)).await;
    ended
}

/// Forwards steps to the ranks until the leader ends the group or a rank fails.
async fn run_steps(link: &mut Link, ranks: &[RankThread], fault: &Fault) -> Result<String, FollowError> {
    loop {
        let message = tokio::select! {
            message = link.next() => message?,
            failure = fault.failure() => return link.give_up(failure).await,
        };
        let step = match message {
            from_leader::Message::Step(step) => step,
            from_leader::Message::Goodbye(goodbye) => return link.ended(goodbye),
            other => return Err(FollowError::Protocol(format!("a step was expected, not {other:?}"))),
        };
        let decoded: Step = postcard::from_bytes(&step.encoded)
            .map_err(|error| FollowError::Protocol(format!("step {} can't be decoded: {error}", step.id)))?;
        let shared = Arc::new(decoded);
        for rank in ranks {
            if let Err(reason) = rank.submit(&shared) {
                let failure = RunError::Device { rank: rank.rank as u32, step: step.id, reason };
                let failure = fault.first().unwrap_or(failure);
                return link.give_up(failure).await;
            }
        }
    }
}

async fn connect(
    options: &FollowerOptions,
    welcome: Welcome,
    listener: std::net::TcpListener,
) -> Result<Vec<Box<dyn Collective>>, FollowError> {
    let key = MeshKey::try_from(&welcome.collective_key[..])
        .map_err(|_| FollowError::Protocol("the collective's key is not 32 bytes long".to_owned()))?;
    let addresses: Vec<String> = welcome.ranks.into_iter().map(|rank| rank.collective_address).collect();
    if addresses.len() != options.member.ranks {
        return Err(FollowError::Protocol(format!("{} addresses for {} ranks", addresses.len(), options.member.ranks)));
    }
    let timeouts = options.member.timeouts;
    let local_ranks = options.member.local_ranks.clone();
    let meshes = blocking(move || {
        let local_ranks: Vec<usize> = local_ranks.collect();
        let deadline = Instant::now() + timeouts.join;
        let timeout = timeouts.collective;
        connect_mesh(
            &listener,
            &MeshOptions { local_ranks: &local_ranks, addresses: &addresses, key, deadline, timeout },
        )
    })
    .await
    .map_err(|error: CollectiveError| StartError::Collective(error))?;
    Ok(meshes.into_iter().map(|rank| Box::new(rank) as Box<dyn Collective>).collect())
}

async fn send_heartbeats(sender: mpsc::Sender<FromFollower>, options: FollowerOptions, progress: Arc<GroupProgress>) {
    loop {
        let steps = progress.steps();
        let ranks = options.member.local_ranks.clone();
        let ranks = ranks.map(|rank| RankProgress { rank: rank as u32, steps: steps[rank] }).collect();
        let message = Some(from_follower::Message::Heartbeat(Heartbeat { ranks }));
        if sender.send(FromFollower { message }).await.is_err() {
            return;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// The stream to and from the leader.
struct Link {
    group: String,
    leader: String,
    sender: mpsc::Sender<FromFollower>,
    incoming: Streaming<FromLeader>,
    /// A message that arrived while another event was awaited.
    kept: Option<from_leader::Message>,
}

impl Link {
    async fn join(
        options: &FollowerOptions,
        hello: Hello,
        expected: &Expected,
        deadline: Instant,
    ) -> Result<Self, FollowError> {
        let (group, leader) = (options.member.group.clone(), options.leader.clone());
        let heartbeat = options.member.timeouts.heartbeat;
        let endpoint = Endpoint::from_shared(format!("http://{leader}"))
            .map_err(|error| FollowError::Protocol(format!("`{leader}` is not an address: {error}")))?
            .tcp_nodelay(true)
            .connect_timeout(Duration::from_secs(2))
            .http2_keep_alive_interval(heartbeat / 3)
            .keep_alive_timeout(heartbeat * 2 / 3)
            .keep_alive_while_idle(true);
        let roles = [Role::Worker, Role::Follower];
        let tls = options.member.tls.as_ref().map(|files| Connector::new(files, &options.member.cluster, &roles));
        let tls = tls.transpose().map_err(StartError::from)?;
        loop {
            let (sender, receiver) = mpsc::channel(WAITING_MESSAGES);
            // the channel is empty, so this does not wait
            let _ = sender.try_send(FromFollower { message: Some(from_follower::Message::Hello(hello.clone())) });
            let reason = match tls::connect(&endpoint, tls.as_ref()).await {
                Err(error) => with_cause(&error),
                Ok(channel) => match PeersClient::new(channel).join(expected.on(ReceiverStream::new(receiver))).await {
                    Ok(response) => {
                        return Ok(Self { group, leader, sender, incoming: response.into_inner(), kept: None });
                    }
                    Err(status) if identity::mismatch_of(&status) == Some("epoch") => {
                        return Err(FollowError::OtherEpoch { group, leader, reason: status.message().to_owned() });
                    }
                    Err(status)
                        if matches!(
                            status.code(),
                            Code::FailedPrecondition
                                | Code::InvalidArgument
                                | Code::PermissionDenied
                                | Code::Unauthenticated
                        ) =>
                    {
                        return Err(FollowError::Refused { group, leader, reason: status.message().to_owned() });
                    }
                    Err(status) => status.message().to_owned(),
                },
            };
            if Instant::now() >= deadline {
                let waited = options.connect_within;
                return Err(FollowError::Unreachable { group, leader, waited, reason });
            }
            warn!(leader, reason, "the leader is not reachable yet");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn next(&mut self) -> Result<from_leader::Message, FollowError> {
        if let Some(kept) = self.kept.take() {
            return Ok(kept);
        }
        loop {
            match self.incoming.message().await {
                Ok(Some(FromLeader { message: Some(message) })) => return Ok(message),
                Ok(Some(FromLeader { message: None })) => {}
                Ok(None) => return Err(self.gone("its stream ended".to_owned())),
                Err(status) => return Err(self.gone(status.message().to_owned())),
            }
        }
    }

    /// Waits for work of this process, but fails if the leader ends first.
    async fn while_it_lives<T>(&mut self, work: tokio::task::JoinHandle<T>) -> Result<T, FollowError> {
        tokio::select! {
            result = work => match result {
                Ok(result) => Ok(result),
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            },
            message = self.next() => match message? {
                from_leader::Message::Goodbye(goodbye) => {
                    Err(FollowError::GroupFailed { group: self.group.clone(), reason: goodbye.reason })
                }
                other => Err(FollowError::Protocol(format!("nothing was expected, not {other:?}"))),
            },
        }
    }

    async fn send(&self, message: from_follower::Message) -> Result<(), FollowError> {
        let sent = self.sender.send(FromFollower { message: Some(message) }).await;
        sent.map_err(|_| self.gone("its stream is closed".to_owned()))
    }

    /// Reports a failure to the leader and waits briefly for its goodbye, which names the cause if this failure is a
    /// consequence of another one.
    async fn give_up(&mut self, failure: RunError) -> Result<String, FollowError> {
        let (rank, step) = match &failure {
            RunError::Device { rank, step, .. } => (*rank, *step),
            RunError::RankLost { rank, .. } => (*rank, 0),
            RunError::Invalid { step, .. } => (0, *step),
        };
        let reason = match &failure {
            RunError::Device { reason, .. } | RunError::RankLost { reason, .. } => reason.clone(),
            RunError::Invalid { .. } => failure.to_string(),
        };
        self.send(from_follower::Message::Failed(Failed { rank, step, reason })).await?;
        let last_word = tokio::time::timeout(Duration::from_secs(2), async {
            loop {
                match self.next().await {
                    Ok(from_leader::Message::Goodbye(goodbye)) => return Some(goodbye),
                    Ok(_) => {}
                    Err(_) => return None,
                }
            }
        });
        match last_word.await {
            Ok(Some(goodbye)) if !goodbye.failed => self.ended(goodbye),
            _ => Err(FollowError::Rank(failure)),
        }
    }

    fn ended(&self, goodbye: bora_proto::v1::Goodbye) -> Result<String, FollowError> {
        if goodbye.failed {
            return Err(FollowError::GroupFailed { group: self.group.clone(), reason: goodbye.reason });
        }
        info!(group = self.group, reason = goodbye.reason, "the group ended");
        Ok(goodbye.reason)
    }

    fn refused(&self, reason: String) -> FollowError {
        FollowError::Refused { group: self.group.clone(), leader: self.leader.clone(), reason }
    }

    fn gone(&self, reason: String) -> FollowError {
        FollowError::LeaderGone { group: self.group.clone(), leader: self.leader.clone(), reason }
    }
}

fn with_cause(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {}", with_cause(cause)),
        None => error.to_string(),
    }
}
