//! A group on its leader: [`start_group`] starts all ranks and returns a runner, which runs steps on all of them until
//! one fails or the runner is dropped.

use std::sync::Arc;
use std::time::Instant;

use bora_common::model::{ModelConfig, ModelConfigError};
use bora_common::peer::ServerIdentity;
use bora_common::registry::RankRecord;
use bora_common::tls::{Acceptor, TlsError};
use bora_common::version;
use bora_proto::v1::{RankAddress, Start, Welcome, from_leader};
use bytes::Bytes;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::collective::{Collective, CollectiveError};
use super::fault::{Fault, GroupProgress};
use super::handshake::MeshKey;
use super::options::LeaderOptions;
use super::rank::{Loading, RankThread, open_weights};
use super::rendezvous::{Expected, Rendezvous, serve};
use super::shared::SharedRank;
use super::single::SingleRank;
use super::tcp::{MeshOptions, connect_mesh};
use crate::engine::step::{HostMemory, RunError, Step, StepOutput, StepRunner};
use crate::telemetry::ranks::RankMetrics;
use crate::telemetry::spans::RankSpans;
use crate::weights::{ShardError, ShardPlan, WeightError};

/// A running group.
pub struct StartedGroup {
    /// Runs steps on every rank; rank 0 computes on the calling thread. Dropping it stops the group.
    pub runner: GroupRunner,
    /// Blocks of KV cache, the same on every rank.
    pub kv_blocks: usize,
    /// Process and host of each rank, rank 0 first.
    pub ranks: Vec<RankRecord>,
    /// Weights fingerprint.
    pub fingerprint: String,
    /// The model.
    pub model: ModelConfig,
    /// Progress of each rank.
    pub progress: Arc<GroupProgress>,
    /// The group's first failure, even while no step runs.
    pub failed: watch::Receiver<Option<RunError>>,
}

/// Why a group did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The model's configuration is invalid.
    #[error(transparent)]
    Model(#[from] ModelConfigError),
    /// The checkpoint is invalid.
    #[error(transparent)]
    Weights(#[from] WeightError),
    /// The model can't be split over this number of ranks.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// The options contradict each other.
    #[error("{0}")]
    Options(String),
    /// The certificates are not usable.
    #[error("grpc.tls: {0}")]
    Tls(#[from] TlsError),
    /// The ranks could not be connected.
    #[error("collective: {0}")]
    Collective(#[from] CollectiveError),
    /// A rank failed or did not join.
    #[error(transparent)]
    Rank(#[from] RunError),
    /// A system call failed (a port, a thread).
    #[error("can't {what}: {reason}")]
    System {
        /// The operation.
        what: &'static str,
        /// Error of the system.
        reason: String,
    },
}

pub(super) fn system(what: &'static str) -> impl Fn(std::io::Error) -> StartError {
    move |error| StartError::System { what, reason: error.to_string() }
}

/// Reads the model's configuration, waits for the followers (if there are any), loads every rank and creates the
/// caches.
///
/// Must run within a tokio runtime that lives as long as the group. Cancelling the future stops all ranks.
pub async fn start_group(options: LeaderOptions) -> Result<StartedGroup, StartError> {
    let LeaderOptions { member, epoch, limits, peers } = options;
    if member.local_ranks.start != 0 || member.local_ranks.is_empty() || member.local_ranks.end > member.ranks {
        let (local, ranks) = (&member.local_ranks, member.ranks);
        return Err(StartError::Options(format!(
            "the leader holds rank 0 and the next ones of {ranks}, not {local:?}"
        )));
    }
    if limits.model_len == 0 || limits.step_tokens == 0 || limits.sequences == 0 || limits.logit_rows == 0 {
        return Err(StartError::Options(format!("no limit may be 0: {limits:?}")));
    }
    let model = ModelConfig::from_dir(&member.model_dir)?;
    for rank in 0..member.ranks {
        ShardPlan::new(&model, rank, member.ranks)?;
    }
    let (member, model, weights) = blocking(move || {
        let weights = open_weights(&member, &model)?;
        Ok::<_, StartError>((member, model, weights))
    })
    .await?;
    let fingerprint = weights.fingerprint().to_owned();
    let fault = Fault::new();
    let progress = GroupProgress::new(member.ranks, model.num_hidden_layers);
    let stop = CancellationToken::new();
    let stop_on_drop = stop.clone().drop_guard();

    let mut records: Vec<RankRecord> = member.local_ranks.clone().map(|rank| own_record(rank, &member.host)).collect();
    let mut collectives = Vec::new();
    let mut remotes = None;
    if member.all_local() {
        collectives = local_collectives(&member);
    } else {
        let Some(listener) = peers else {
            let reason = "ranks of other processes need an address where they can join";
            return Err(StartError::Options(reason.to_owned()));
        };
        let expected = Expected {
            ranks: member.ranks,
            first_remote: member.local_ranks.end,
            revision: member.revision.clone(),
            settings: member.settings(),
            heartbeat_timeout: member.timeouts.heartbeat,
        };
        let rendezvous = Rendezvous::new(expected, Arc::clone(&fault), Arc::clone(&progress));
        let tls = member.tls.as_ref().map(|files| Acceptor::for_grpc(files, &member.cluster)).transpose()?;
        let identity = ServerIdentity::new(&member.cluster, &member.model, &member.group, epoch);
        identity.set_weights(&fingerprint);
        let serving = serve(listener, tls, Arc::new(identity), Arc::clone(&rendezvous), stop.clone());
        tokio::spawn(async move {
            if let Err(error) = serving.await {
                warn!(%error, "the peers service ended");
            }
        });
        let deadline = Instant::now() + member.timeouts.join;
        info!(group = member.group, epoch, ranks = member.ranks, "waiting for the followers");
        tokio::spawn(Arc::clone(&rendezvous).watch(stop.clone()));
        rendezvous.all_joined(deadline).await.map_err(|error| fault.fail(error))?;
        records.extend(rendezvous.records());
        records.sort_by_key(|record| record.rank);
        fault.set_records(records.clone());
        remotes = Some((rendezvous, deadline));
    }
    if let Some((rendezvous, deadline)) = &remotes {
        let (listener, own_address) = member.listen_for_ranks().map_err(system("listen for the other ranks"))?;
        let key: MeshKey = rand::random();
        let mut addresses = vec![own_address; member.ranks];
        for (rank, address) in rendezvous.collective_addresses() {
            addresses[rank as usize] = address;
        }
        let welcome = Welcome {
            ranks: addresses
                .iter()
                .enumerate()
                .map(|(rank, address)| RankAddress { rank: rank as u32, collective_address: address.clone() })
                .collect(),
            collective_key: key.to_vec(),
            epoch,
            limits: Some(limits.into()),
            contract: version::CONTRACT,
        };
        rendezvous.send_to_all(&from_leader::Message::Welcome(welcome)).map_err(|error| fault.fail(error))?;
        let (local_ranks, deadline, timeout) = (member.local_ranks.clone(), *deadline, member.timeouts.collective);
        let meshes = blocking(move || {
            let local_ranks: Vec<usize> = local_ranks.collect();
            let mesh = MeshOptions { local_ranks: &local_ranks, addresses: &addresses, key, deadline, timeout };
            connect_mesh(&listener, &mesh)
        })
        .await
        .map_err(|error| lost(&fault, error))?;
        collectives = meshes.into_iter().map(|rank| Box::new(rank) as Box<dyn Collective>).collect();
    }

    // load the local ranks, then create caches of equal size
    let (loading_fault, loading_progress) = (Arc::clone(&fault), Arc::clone(&progress));
    let (member, weights, loaded) = blocking(move || {
        let (fault, progress) = (&*loading_fault, &*loading_progress);
        let loaded = Loading { weights: &weights, options: &member, limits, fault, progress }.load_all(collectives)?;
        Ok::<_, StartError>((member, weights, loaded))
    })
    .await?;
    let mut kv_blocks = loaded.iter().map(|rank| rank.kv_blocks()).min().unwrap_or(0);
    if let Some((rendezvous, _)) = &remotes {
        if let Some(theirs) = rendezvous.all_ready().await? {
            kv_blocks = kv_blocks.min(theirs as usize);
        }
        let start = from_leader::Message::Start(Start { kv_blocks: kv_blocks as u32 });
        rendezvous.send_to_all(&start).map_err(|error| fault.fail(error))?;
    }
    let (loading_fault, loading_progress) = (Arc::clone(&fault), Arc::clone(&progress));
    let runners = blocking(move || {
        let (fault, progress) = (&*loading_fault, &*loading_progress);
        Loading { weights: &weights, options: &member, limits, fault, progress }.start_all(loaded, kv_blocks)
    })
    .await?;

    info!(kv_blocks, ranks = records.len(), fingerprint, "the group is ready");
    let failed = fault.subscribe();
    let remotes = remotes.map(|(rendezvous, _)| rendezvous);
    let runner = GroupRunner::new(runners, remotes, fault, Arc::clone(&progress), stop_on_drop.disarm())?;
    Ok(StartedGroup { runner, kv_blocks, ranks: records, fingerprint, model, progress, failed })
}

/// Runs blocking work and propagates its panic.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

pub(super) fn own_record(rank: usize, host: &str) -> RankRecord {
    RankRecord { rank: rank as u32, host: host.to_owned(), pid: std::process::id() }
}

fn local_collectives(member: &super::options::MemberOptions) -> Vec<Box<dyn Collective>> {
    if member.ranks == 1 {
        return vec![Box::new(SingleRank::default())];
    }
    let shared = SharedRank::group(member.ranks, member.timeouts.collective);
    shared.into_iter().map(|rank| Box::new(rank) as Box<dyn Collective>).collect()
}

/// Converts an error while connecting; adds the host of the missing rank.
fn lost(fault: &Fault, error: CollectiveError) -> StartError {
    match error {
        CollectiveError::Lost { rank, reason } => {
            let host = "unknown host".to_owned();
            StartError::Rank(fault.fail(RunError::RankLost { rank: rank as u32, host, reason }))
        }
        other => StartError::Collective(other),
    }
}

/// Runs steps on all ranks of a group.
///
/// Rank 0 computes on the calling thread, the other local ranks on their own threads. The ranks of other processes
/// receive the step as one encoded message. The first failure of any rank ends the group; every later call returns that
/// failure.
pub struct GroupRunner {
    first: Box<dyn StepRunner>,
    others: Vec<RankThread>,
    remotes: Option<Arc<Rendezvous>>,
    fault: Arc<Fault>,
    progress: Arc<GroupProgress>,
    stop: CancellationToken,
    spans: RankSpans,
}

impl GroupRunner {
    /// `runners` are those of the local ranks, rank 0 first.
    fn new(
        runners: Vec<Box<dyn StepRunner>>,
        remotes: Option<Arc<Rendezvous>>,
        fault: Arc<Fault>,
        progress: Arc<GroupProgress>,
        stop: CancellationToken,
    ) -> Result<Self, StartError> {
        let mut runners = runners.into_iter();
        let Some(first) = runners.next() else {
            return Err(StartError::Options("the leader holds no rank".to_owned()));
        };
        let mut others = Vec::new();
        for (index, runner) in runners.enumerate() {
            let failing = Arc::clone(&fault);
            let thread = RankThread::spawn(index + 1, runner, Arc::clone(&progress), move |error| {
                failing.settle(error);
            });
            others.push(thread.map_err(system("start a rank's thread"))?);
        }
        Ok(Self { first, others, remotes, fault, progress, stop, spans: RankSpans::new(0) })
    }

    fn check(&self) -> Result<(), RunError> {
        self.fault.first().map_or(Ok(()), Err)
    }

    fn spread(&self, step: &Step) -> Result<(), RunError> {
        if let Some(remotes) = &self.remotes {
            let encoded = postcard::to_allocvec(step).map_err(|error| RunError::Invalid {
                step: step.id,
                reason: format!("it can't be encoded: {error}"),
            })?;
            let message = bora_proto::v1::Step { id: step.id, encoded: Bytes::from(encoded) };
            remotes.send_to_all(&from_leader::Message::Step(message))?;
        }
        if self.others.is_empty() {
            return Ok(());
        }
        let shared = Arc::new(step.clone());
        for other in &self.others {
            other.submit(&shared).map_err(|reason| {
                let host = "this process".to_owned();
                RunError::RankLost { rank: other.rank as u32, host, reason }
            })?;
        }
        Ok(())
    }
}

impl StepRunner for GroupRunner {
    fn host_memory(&self) -> HostMemory {
        self.first.host_memory()
    }

    fn pipeline_depth(&self) -> usize {
        self.first.pipeline_depth()
    }

    fn least_chunk(&self) -> usize {
        self.first.least_chunk()
    }

    fn submit(&mut self, step: Step) -> Result<(), RunError> {
        self.check()?;
        self.spread(&step).map_err(|error| self.fault.settle(error))?;
        self.spans.submitted(&step);
        self.first.submit(step).map_err(|error| self.fault.settle(error))
    }

    fn collect(&mut self) -> Result<StepOutput, RunError> {
        self.check()?;
        let output = self.first.collect().map_err(|error| self.fault.settle(error))?;
        self.progress.set_steps(0, output.id);
        self.spans.collected(output.id);
        RankMetrics::global().step(0, output.id);
        Ok(output)
    }

    fn idle(&mut self) {
        self.spans.idle();
    }
}

impl Drop for GroupRunner {
    fn drop(&mut self) {
        if let Some(remotes) = &self.remotes {
            remotes.send_goodbye("the leader stopped", false);
        }
        // unblocks ranks that wait in a collective, so that their threads can be joined
        self.fault.abort("the leader stopped");
        self.stop.cancel();
    }
}

#[cfg(test)]
mod tests;
