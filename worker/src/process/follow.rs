//! Follower process: finds the leader of its group and follows it until the group ends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bora_common::registry::{Device, Registry, RegistryError};
use bora_common::version;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{WorkerError, WorkerSettings, load_grammars, member_options};
use crate::options::WorkerOptions;
use crate::parallel::{FollowError, FollowerOptions, follow_and_report};

/// Interval between lookups of the leader.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// Time that a follower tries an address from the registry before it looks the leader up again.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(5);

/// Follows the group's leader until the group ends, or until `stop` is cancelled and the leader has drained.
pub(super) async fn follow_leader(
    settings: WorkerSettings,
    device: Device,
    registry: Arc<dyn Registry>,
    stop: CancellationToken,
) -> Result<(), WorkerError> {
    let options = &settings.options;
    if device == Device::Fake {
        return Err(WorkerError::Options("worker.ranks: a fake group has one process, which holds all ranks".into()));
    }
    let Some(group) = options.group.clone() else {
        return Err(WorkerError::Options("worker.group: a group of several processes needs a name".into()));
    };
    let deadline = Instant::now() + options.rendezvous_seconds;
    settings.metrics.of_group(&settings.model.name, &group, device, &options.local_ranks());
    let grammars = load_grammars(&settings)?;
    let (pending, metrics) = (grammars.clone(), settings.metrics.clone());
    tokio::task::spawn_blocking(move || {
        if let Ok(Some(grammars)) = pending.wait() {
            metrics.of_grammars(&grammars);
        }
    });
    loop {
        let (leader, epoch) = tokio::select! {
            found = find_leader(options, &group, registry.as_ref()) => found?,
            () = stop.cancelled() => return Ok(()),
        };
        tracing::info!(group, leader, epoch, ranks = ?options.local_ranks(), "joining the group");
        // an address from the registry may be that of a leader that has just died: it is looked up again
        let looked_up = options.leader.is_none();
        let connect_within = if looked_up { RESOLVE_INTERVAL } else { options.rendezvous_seconds };
        let member = member_options(&settings, device, &group, grammars.clone())?;
        let following = FollowerOptions { member, leader, epoch, connect_within };
        let ended = tokio::select! {
            ended = follow_and_report(following, settings.metrics.group_runs()) => ended,
            () = drained(&stop, options.drain_seconds) => return Ok(()),
        };
        match ended {
            Ok(reason) => {
                tracing::info!(group, reason, "the group ended");
                return Ok(());
            }
            Err(error) if stop.is_cancelled() => {
                // the leader's goodbye may be lost if its process ends directly after it
                tracing::info!(group, %error, "the group ended");
                return Ok(());
            }
            Err(FollowError::Unreachable { .. } | FollowError::OtherEpoch { .. })
                if looked_up && Instant::now() < deadline =>
            {
                sleep(POLL_INTERVAL).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Completes when a stopping follower may exit. All processes of a group are stopped at the same time, and the leader
/// needs its ranks until its running sequences have finished.
async fn drained(stop: &CancellationToken, drain: Duration) {
    stop.cancelled().await;
    tracing::info!(seconds = drain.as_secs(), "staying until the leader has drained");
    sleep(drain).await;
}

async fn find_leader(
    options: &WorkerOptions,
    group: &str,
    registry: &dyn Registry,
) -> Result<(String, Option<u64>), WorkerError> {
    if let Some(leader) = &options.leader {
        return Ok((leader.to_string(), None));
    }
    let deadline = Instant::now() + options.rendezvous_seconds;
    // in a rolling update leaders of both revisions have one name; a leader of the other revision is not joined
    let mut other = None;
    loop {
        match registry.find_rendezvous(group).await {
            Ok(Some(record)) if record.revision == options.revision => {
                version::check_contract(record.contract)
                    .map_err(|skew| WorkerError::Options(format!("the leader of group `{group}`: {skew}")))?;
                return Ok((record.leader, Some(record.epoch)));
            }
            Ok(Some(record)) => {
                if other.as_ref() != Some(&record.revision) {
                    let (theirs, own) = (&record.revision, &options.revision);
                    tracing::warn!(
                        group,
                        leader = record.leader,
                        theirs,
                        own,
                        "the group's leader is of another revision"
                    );
                    other = Some(record.revision);
                }
            }
            Ok(None) => {}
            Err(error @ RegistryError::Unsupported { .. }) => return Err(error.into()),
            Err(error) => tracing::debug!(group, %error, "looking for the leader"),
        }
        if Instant::now() >= deadline {
            let seconds = options.rendezvous_seconds.as_secs();
            if let Some(theirs) = other {
                let own = options.revision.clone();
                return Err(WorkerError::OtherRevision { group: group.into(), theirs, own, seconds });
            }
            return Err(WorkerError::NoLeader { group: group.into(), seconds });
        }
        sleep(POLL_INTERVAL).await;
    }
}
