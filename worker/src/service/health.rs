//! `grpc.health.v1`, derived from the progress of steps: see [`crate::engine::STALLED_AFTER`].

use std::time::Duration;

use bora_proto::v1::inference_server::InferenceServer;
use tokio_util::sync::CancellationToken;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::Host;
use super::inference::InferenceService;
use crate::engine::EngineHealth;

/// Interval between checks of the engine.
const INTERVAL: Duration = Duration::from_millis(250);

/// Reports health for the whole server (the empty name) and for `bora.v1.Inference` until stopped.
pub(super) async fn report(mut reporter: HealthReporter, host: Host, stopping: CancellationToken) {
    let names = ["", <InferenceServer<InferenceService> as tonic::server::NamedService>::NAME];
    let mut reported = None;
    loop {
        let health = host.group().map(|group| group.engine.health());
        let status = match &health {
            Ok(EngineHealth::Ready) if !stopping.is_cancelled() => ServingStatus::Serving,
            _ => ServingStatus::NotServing,
        };
        if reported != Some(status) {
            reported = Some(status);
            match health {
                Ok(health) => tracing::info!(?health, %status, "health changed"),
                Err(_) => tracing::info!(%status, "loading"),
            }
            for name in names {
                reporter.set_service_status(name, status).await;
            }
        }
        if stopping.is_cancelled() {
            // ends the streams of watchers, which would delay the end of the server
            for name in names {
                let _ = reporter.clear_service_status(name).await;
            }
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            () = stopping.cancelled() => {}
        }
    }
}
