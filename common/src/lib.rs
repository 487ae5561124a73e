//! What router and worker share.
//!
//! | module | what it is |
//! |---|---|
//! | [`config`] | the configuration file, errors with file, line and key |
//! | [`model`] | `config.json` and `params.json` of a checkpoint |
//! | [`tokenizer`] | text to token IDs and back |
//! | [`conversation`] | messages and tools to token IDs, tool calls out of token IDs, repair of histories |
//! | [`blocks`], [`secret`] | hashes of KV cache blocks, keyed with the cluster secret |
//! | [`cost`] | the cost model: seconds of a prefill and of a decode step |
//! | [`cpu_budget`] | limits of the CPU time of one request |
//! | [`registry`] | discovery of groups: etcd, a static list, memory |
//! | [`peer`], [`tls`], [`version`] | identities and roles of gRPC peers, certificates, the contract version |
//! | [`telemetry`] | traces, metrics and the log writer |
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
