//! `bora.v1.Admin`, for operators and for the pre-stop hook of a pod.

use std::time::Duration;

use bora_common::peer::Peer;
use bora_common::registry::{Device, GroupState};
use bora_proto::v1::{self, admin_server::Admin};
use tonic::{Request, Response, Status};

use super::{Group, Host};
use crate::engine::ResumeError;

/// Default timeout of a drain.
const DEFAULT_DRAIN: Duration = Duration::from_secs(300);
/// Maximum timeout of a drain.
const MAX_DRAIN: Duration = Duration::from_secs(86_400);

pub(super) struct AdminService {
    pub(super) host: Host,
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        let group = self.host.group()?;
        let timeout = drain_timeout(request.get_ref().timeout_seconds)?;
        let audit = Audit::of(&request, "drain", group);
        let drained = group.engine.drain(timeout).await;
        audit.outcome(&drained);
        let (finished, unfinished) = drained?;
        tracing::info!(finished, unfinished, "drained");
        Ok(Response::new(v1::DrainResponse { finished, unfinished }))
    }

    async fn resume(&self, request: Request<v1::ResumeRequest>) -> Result<Response<v1::ResumeResponse>, Status> {
        let group = self.host.group()?;
        let audit = Audit::of(&request, "resume", group);
        let resumed = group.engine.resume().await;
        audit.outcome(&resumed);
        match resumed {
            Ok(()) => Ok(Response::new(v1::ResumeResponse {})),
            Err(ResumeError::Ending) => Err(Status::failed_precondition("the process of the group is ending")),
            Err(ResumeError::Engine(error)) => Err(error.into()),
        }
    }

    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        let group = self.host.group()?;
        let record = group.record();
        let load = group.engine.load();
        let device = match record.device {
            Device::Cpu => "cpu",
            Device::Cuda => "cuda",
            Device::Fake => "fake",
        };
        let state = match record.state {
            GroupState::Loading => "loading",
            GroupState::Ready => "ready",
            GroupState::Draining => "draining",
        };
        Ok(Response::new(v1::StatusResponse {
            group: record.group,
            model: record.model,
            device: device.into(),
            state: state.into(),
            epoch: record.epoch,
            ranks: (group.ranks)(),
            running: load.running,
            waiting: load.waiting,
        }))
    }

    async fn flush_cache(
        &self,
        request: Request<v1::FlushCacheRequest>,
    ) -> Result<Response<v1::FlushCacheResponse>, Status> {
        let group = self.host.group()?;
        let audit = Audit::of(&request, "flush", group);
        let flushed = group.engine.flush().await;
        audit.outcome(&flushed);
        let blocks = flushed?;
        tracing::info!(blocks, "cache flushed");
        Ok(Response::new(v1::FlushCacheResponse { blocks }))
    }
}

/// The timeout of a drain: a finite number of seconds within bounds; 0 means the default.
fn drain_timeout(seconds: f64) -> Result<Duration, Status> {
    if seconds == 0.0 {
        return Ok(DEFAULT_DRAIN);
    }
    Duration::try_from_secs_f64(seconds).ok().filter(|timeout| *timeout <= MAX_DRAIN).ok_or_else(|| {
        Status::invalid_argument(format!("timeout_seconds: expected 0 to {} seconds", MAX_DRAIN.as_secs()))
    })
}

/// Audit log of an operation: two lines with the target `bora::audit`, at its start and at its end, because a drain may
/// take minutes.
struct Audit {
    operation: &'static str,
    group: String,
    peer: Peer,
}

impl Audit {
    fn of<T>(request: &Request<T>, operation: &'static str, group: &Group) -> Self {
        let peer = request.extensions().get::<Peer>().cloned().unwrap_or_default();
        let address = peer.address.or_else(|| request.remote_addr());
        let audit = Self { operation, group: group.record.group.clone(), peer: Peer { address, ..peer } };
        audit.line("begun");
        audit
    }

    fn outcome<T, E>(&self, outcome: &Result<T, E>) {
        self.line(if outcome.is_ok() { "done" } else { "failed" });
    }

    fn line(&self, outcome: &'static str) {
        let certificate = self.peer.certificate.as_ref();
        tracing::info!(
            target: "bora::audit",
            operation = self.operation,
            group = self.group,
            address = self.peer.address.map(tracing::field::display),
            certificate = certificate.map(|certificate| &*certificate.names),
            outcome,
            "admin"
        );
    }
}
