//! One worker process: the ranks of a tensor-parallel group that it holds, and, where it holds rank 0,
//! the scheduler, the block table and the gRPC service of the group.

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
