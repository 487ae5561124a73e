//! Leader process: serves and announces its group, watches it, and drains it at its end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bora_common::config::HostPort;
use bora_common::peer::ServerIdentity;
use bora_common::peer::local::ENDPOINT;
use bora_common::registry::{Announcement, Device, GroupRecord, GroupState, Registry, RegistryError};
use bora_common::tls::Acceptor;
use bora_proto::v1;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::start::{OpenGroup, loading_record, open};
use super::{WorkerError, WorkerSettings, host_name, listen};
use crate::engine::step::RunError;
use crate::parallel::GroupProgress;
use crate::service::{self, Host, Listener, RankSource, ServiceOptions};

/// Timeout for removing a failed group from the registry.
const WITHDRAW_WITHIN: Duration = Duration::from_secs(1);

/// Leads a group until `stop` is cancelled, then drains it. Returns an error if the group fails.
pub(super) async fn lead(
    settings: WorkerSettings,
    device: Device,
    registry: Arc<dyn Registry>,
    stop: CancellationToken,
) -> Result<(), WorkerError> {
    let options = &settings.options;
    let (listener, endpoint, port) = match &options.in_process {
        Some(local) => (Listener::Local(local.clone()), ENDPOINT.to_owned(), 0),
        None => {
            let listener = listen("worker.listen", &options.listen).await?;
            let port = listener.local_addr().map_or(options.listen.port, |address| address.port());
            let own = HostPort { host: options.listen.host.clone(), port };
            let endpoint = options.advertise.clone().unwrap_or(own);
            (Listener::Tcp(listener), endpoint.to_string(), port)
        }
    };
    let health = match &options.health {
        Some(address) => Some(listen("worker.health", address).await?),
        None => None,
    };
    let tls = options.tls.as_ref().map(|files| Acceptor::for_grpc(files, &settings.cluster)).transpose()?;
    let group = options.group.clone().unwrap_or_else(|| format!("{}-{port}", host_name()));
    let epoch = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);

    let host = Host::loading(ServerIdentity::new(&settings.cluster, &settings.model.name, &group, epoch));
    let closing = CancellationToken::new();
    let _close_on_exit = closing.clone().drop_guard();
    let serving = tokio::spawn(service::serve(
        listener,
        host.clone(),
        ServiceOptions { tls, health, ..ServiceOptions::default() },
        closing.clone().cancelled_owned(),
    ));

    settings.metrics.of_group(&settings.model.name, &group, device, &options.local_ranks());
    // before the weights are loaded, so that routers expect the group and a duplicate name is refused immediately
    let loading = loading_record(&settings, device, &group, epoch, endpoint.clone());
    let announcement = registry.announce(loading).await?;
    settings.metrics.of_announcement(announcement.standing());
    let opened = tokio::select! {
        opened = open(&settings, device, &group, epoch, endpoint, registry.as_ref()) => opened,
        taken = announcement.refused() => Err(RegistryError::from(taken).into()),
        () = stop.cancelled() => {
            withdraw_soon(announcement).await;
            return Ok(());
        }
    };
    let OpenGroup { engine, record, progress, failed } = match opened {
        Ok(opened) => opened,
        Err(error) => {
            withdraw_soon(announcement).await;
            return Err(error);
        }
    };
    settings.metrics.of_leader(engine.observer(), &record, progress.clone());
    host.ready(engine.clone(), record.clone(), rank_source(&record, progress));
    settings.metrics.group_runs().store(true, Ordering::Relaxed);
    announcement.update(|announced| *announced = record);

    let reason = tokio::select! {
        () = stop.cancelled() => None,
        // the registry was unreachable until now: no router has seen this group
        taken = announcement.refused() => return Err(RegistryError::from(taken).into()),
        reason = engine.failed() => Some(reason),
        reason = idle_failure(failed) => Some(reason),
        ended = serving => {
            ended.unwrap_or(Ok(()))?;
            Some("its port was closed".into())
        }
    };
    if let Some(reason) = reason {
        tracing::error!(group, reason, "the group failed, ending so that it can be started again");
        // the engine ends streams with "retry elsewhere"; this gives the responses time to leave
        withdraw_soon(announcement).await;
        return Err(WorkerError::GroupFailed { group, reason });
    }
    announcement.update(|record| record.state = GroupState::Draining);
    match engine.close(options.drain_seconds).await {
        Ok((finished, unfinished)) => tracing::info!(group, finished, unfinished, "drained"),
        Err(error) => tracing::warn!(group, %error, "not drained"),
    }
    announcement.withdraw().await;
    Ok(())
}

/// Removes the group from the registry within a timeout; otherwise its lease expires.
async fn withdraw_soon(announcement: Announcement) {
    let _ = timeout(WITHDRAW_WITHIN, announcement.withdraw()).await;
}

/// Completes when a rank failed while no step ran.
async fn idle_failure(failed: Option<watch::Receiver<Option<RunError>>>) -> String {
    if let Some(mut failed) = failed {
        // an error means that the runner was dropped; the engine then reports the reason
        let reason = match failed.wait_for(Option::is_some).await {
            Ok(error) => error.as_ref().map(ToString::to_string),
            Err(_) => None,
        };
        if let Some(reason) = reason {
            return reason;
        }
    }
    std::future::pending().await
}

/// Source of the ranks' state for `Admin.Status`.
fn rank_source(record: &GroupRecord, progress: Option<Arc<GroupProgress>>) -> RankSource {
    let ranks = record.ranks.clone();
    Arc::new(move || {
        let steps = progress.as_ref().map(|progress| progress.steps()).unwrap_or_default();
        ranks
            .iter()
            .map(|rank| v1::RankStatus {
                rank: rank.rank,
                host: rank.host.clone(),
                pid: rank.pid,
                steps: steps.get(rank.rank as usize).copied().unwrap_or(0),
                ..Default::default()
            })
            .collect()
    })
}
