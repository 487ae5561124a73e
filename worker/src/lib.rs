//! One process of a group: the ranks that it holds and, on the leader (rank 0), the scheduler, the block table and the
//! gRPC service.
//!
//! # Layers
//!
//! From the outside inwards. All layers share the types of [`engine::step`].
//!
//! - `process`: the life of the process: start, registration, drain, end.
//! - [`service`]: the gRPC services `Inference`, `Admin` and health, on the leader.
//! - [`engine`]: the loop that schedules, runs and samples; [`engine::step`] defines a step.
//! - `schedule`: the scheduler: admission, chunked prefill, draft tokens, outcomes. It has no threads and no clock.
//! - [`cache`]: the bookkeeping of the paged KV cache and of the prefix cache.
//! - [`grammar`]: structured output: compiled grammars and masks.
//! - [`speculate`]: proposers of draft tokens.
//! - [`parallel`]: tensor parallelism: rendezvous, steps to the ranks, collectives, failures.
//! - [`model`]: the models, in terms of backend operations.
//! - [`sample`]: the sampler.
//! - [`backend`]: the devices: `cpu` (the oracle), `cuda`, and `fake` for tests without a model.
//! - [`weights`]: checkpoints, and the shard of each rank.
//!
//! Across the layers: `device` chooses the device, [`options`] is the `worker` section of the configuration, and
//! [`telemetry`] holds metrics and spans.
//!
//! # Path of a request
//!
//! 1. [`service`] receives a `Generate` call and passes it to [`engine::EngineHandle::generate`].
//! 2. The handle checks the request, takes a permit for a place in the queue and, if the request has a grammar,
//!    compiles the grammar.
//! 3. The engine loop gives the sequence to the scheduler. The scheduler reserves all blocks that the sequence can
//!    need, looks up the prefix cache and plans a [`engine::step::Step`].
//! 4. A [`engine::step::StepRunner`] runs the step. For a real model, [`parallel`] sends the step to every rank, and
//!    [`engine::runner::ModelRunner`] runs the model on the backend and samples.
//! 5. The scheduler applies the [`engine::step::StepOutput`]: new tokens enter the stream of the sequence, full blocks
//!    enter the prefix cache, and ended sequences release their blocks.
//! 6. [`service`] relays the events of the stream to the caller. Watchers of the group receive the changed blocks and
//!    the load.

pub mod backend;
pub mod cache;
mod device;
pub mod engine;
pub mod grammar;
pub mod model;
pub mod options;
pub mod parallel;
mod process;
pub mod sample;
mod schedule;
pub mod service;
pub mod speculate;
pub mod telemetry;
pub mod weights;

pub use backend::{Fp8Mode, KvDtype};
pub use options::{DeviceChoice, KvCacheOptions, WorkerOptions};
pub use process::{WorkerError, WorkerSettings, open_engine, run};
pub use speculate::SpeculativeOptions;
pub use telemetry::WorkerMetrics;
pub use weights::LoadFormat;
