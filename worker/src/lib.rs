//! The worker: one process of a tensor-parallel group. The process that holds rank 0 leads the group: it runs the scheduler,
//! the block table and the gRPC service.
//!
//! The path of a request through the modules, from top to bottom:
//!
//! | module | what it does |
//! |---|---|
//! | `process` | from the command line to running ranks: forms the group, loads weights, announces the group |
//! | [`service`] | gRPC: `Generate`, `Watch`, `Describe`, health, administration |
//! | [`engine`] | the loop that submits steps, the handle that callers use, event streams |
//! | `schedule` | plain data: which sequences run next, chunked prefill, preemption, draft tokens of a step |
//! | [`cache`] | KV cache blocks, the prefix cache, blocks in host memory |
//! | [`model`] | the layers of the model, for any backend |
//! | [`backend`] | CPU (reference), CUDA (Hopper kernels), fake (time and outputs by a formula) |
//! | [`parallel`] | group formation and collectives: shared memory, TCP; NCCL is in the CUDA backend |
//! | [`sample`], [`grammar`], [`speculate`] | sampling, masks of structured output, draft tokens |
//! | [`weights`] | checkpoints: formats, shards, FP8 scales |
//! | [`telemetry`] | metrics, the roofline, spans |

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
