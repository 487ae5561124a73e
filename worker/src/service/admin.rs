//! `bora.v1.Admin`: for operators and for the pre-stop hook of a pod.

use std::time::Duration;

use bora_common::registry::{Device, GroupState};
use bora_proto::v1::{self, admin_server::Admin};
use tonic::{Request, Response, Status};

use super::Host;

/// A drain without a time of its own takes at most this long.
const DEFAULT_DRAIN: Duration = Duration::from_secs(300);

pub(super) struct AdminService {
    pub(super) host: Host,
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        let seconds = request.into_inner().timeout_seconds;
        let timeout = if seconds == 0.0 { Ok(DEFAULT_DRAIN) } else { Duration::try_from_secs_f64(seconds) };
        let timeout =
            timeout.map_err(|error| Status::invalid_argument(format!("timeout_seconds: {seconds}: {error}")))?;
        tracing::info!(?timeout, "draining");
        let (finished, unfinished) = self.host.group()?.engine.drain(timeout).await?;
        tracing::info!(finished, unfinished, "drained");
        Ok(Response::new(v1::DrainResponse { finished, unfinished }))
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

    async fn flush_cache(&self, _: Request<v1::FlushCacheRequest>) -> Result<Response<v1::FlushCacheResponse>, Status> {
        let blocks = self.host.group()?.engine.flush().await?;
        tracing::info!(blocks, "cache flushed");
        Ok(Response::new(v1::FlushCacheResponse { blocks }))
    }
}
