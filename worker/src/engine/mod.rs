//! The engine: the loop on the leader that schedules, runs and samples, and the definition of a step.
//!
//! # Interface
//!
//! A caller starts the engine with a [`StepRunner`](step::StepRunner) (the ranks of a real model, or the
//! [fake](crate::backend::fake)) and serves the handle:
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
//! - [`EngineHandle::generate`] checks a request, queues it and returns its event stream.
//! - [`EngineHandle::watch`], [`load`](EngineHandle::load), [`flush`](EngineHandle::flush),
//!   [`drain`](EngineHandle::drain), [`resume`](EngineHandle::resume) and [`health`](EngineHandle::health) serve
//!   routers and operators.
//! - [`EngineHandle::failed`] completes if the group fails. Every stream has ended with `UNAVAILABLE` by then. The
//!   process should exit, so that the group is started again.
//!
//! # Parts
//!
//! - [`run`](self): the loop, on its own thread.
//! - `sequence`: the state of one sequence, from the queue to its last token.
//! - `stream`: the events of a sequence on their way to the caller; it never blocks the loop.
//! - `admission_permits`: counts waiting and running sequences, so that a full queue refuses a request immediately.
//! - `watch`: reports changes to watchers.
//! - `progress`: completed steps, from which health is derived.
//!
//! [`schedule`](crate::schedule) decides what runs when.

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
