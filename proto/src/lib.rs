//! Bora's gRPC contracts: `proto/bora/v1/*.proto`, and nothing but the code generated from them.
#![forbid(unsafe_code)]

/// Version 1 of the contracts.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod v1 {
    tonic::include_proto!("bora.v1");
}

/// The compiled descriptors, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/bora.bin"));
