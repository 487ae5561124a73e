//! What router and worker share, and what neither of them may own: configuration, the description of a
//! model, the tokenizer, the encoding of conversations, the cluster secret, block hashes, the registry of groups and telemetry.
#![forbid(unsafe_code)]

pub mod blocks;
pub mod config;
pub mod conversation;
pub mod cost;
pub mod cpu_budget;
pub mod model;
pub mod peer;
pub mod registry;
pub mod secret;
pub mod telemetry;
pub mod tls;
pub mod tokenizer;
pub mod version;
