//! The engine: one loop per group on its leader, and what a step is.
//!
//! # The front
//!
//! Whoever has a [`StepRunner`](step::StepRunner) (the ranks of a real model, or the
//! [fake](crate::backend::fake)) starts the engine with it and serves the handle:
//!
//! ```no_run
//! # use bora_worker::{backend::fake::{FakeOptions, FakeRunner}, engine::{EngineConfig, EngineHandle, EngineOptions}};
//! # async fn example(record: bora_common::registry::GroupRecord, keys: bora_common::secret::ClusterKeys, listener: tokio::net::TcpListener)
//! #     -> Result<(), Box<dyn std::error::Error>> {
//! let runner = FakeRunner::new(FakeOptions::default());
//! let config = EngineConfig::of_group(&record, vec![2], EngineOptions::default(), keys);
//! let (engine, thread) = EngineHandle::start(config, Box::new(runner))?;
//! let failed = engine.failed(); // or a signal
//! let host = bora_worker::service::Host::of("bora", engine, record);
//! bora_worker::service::serve(listener, host, Default::default(), async move {
//!     tracing::error!(reason = failed.await, "the engine failed");
//! })
//! .await?;
//! # Ok(()) }
//! ```
//!
//! - [`EngineHandle::generate`] checks a request, queues it and returns the stream of its events.
//! - [`EngineHandle::watch`], [`load`](EngineHandle::load), [`flush`](EngineHandle::flush),
//!   [`drain`](EngineHandle::drain), [`resume`](EngineHandle::resume), [`health`](EngineHandle::health): for routers and operators.
//! - [`EngineHandle::failed`] completes when the group can't continue; the process then ends, so that the
//!   group is created again. Every stream has been given `UNAVAILABLE` by then.
//!
//! # Inside
//!
//! [`run`](self) is the loop, on a plain thread; `sequence` is one request's life; `stream` carries its
//! events out without ever blocking; `places` counts who waits, so that a full queue refuses at once;
//! `watch` reports watchers what changed; `progress` is what health is judged by. What runs when is decided
//! in [`schedule`](crate::schedule).

pub(crate) mod admission_permits;
mod calibrate;
mod config;
pub(crate) mod error;
mod handle;
mod progress;
pub(crate) mod request;
mod run;
pub mod runner;
pub(crate) mod sequence;
pub mod step;
pub(crate) mod stream;
mod watch;

pub use calibrate::calibrate;
pub use config::{EngineConfig, EngineConfigError, EngineOptions};
pub use error::EngineError;
pub(crate) use handle::EngineObserver;
pub use handle::{EngineHandle, EngineHealth, EngineStartError, ResumeError};
pub use progress::{LOST_AFTER, STALLED_AFTER};
pub use stream::EventStream;

#[cfg(test)]
mod tests;
