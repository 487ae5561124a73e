//! One worker process: the ranks of a tensor-parallel group that it holds, and, where it holds rank 0,
//! the scheduler, the block table and the gRPC service of the group.

pub mod cache;
pub mod engine;
pub mod sample;
