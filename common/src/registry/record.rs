//! What is announced: groups, and where the ranks of a group that forms can meet.

use serde::{Deserialize, Serialize};

/// A group as it is announced: one copy of a model on N ranks. The JSON form stands in etcd under
/// `/bora/v1/{cluster}/groups/{model}/{group}` and is meant to be read by people with `etcdctl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupRecord {
    /// Unique within the cluster.
    pub group: String,
    /// Changes with every start of the group (milliseconds since 1970 of the start, so that it grows).
    pub epoch: u64,
    /// `host:port` of the leader's gRPC service.
    pub endpoint: String,
    /// The name it is served under.
    pub model: String,
    /// Other names for it.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// `cpu`, `cuda` or `fake`: a fake group only pretends, and says so here.
    pub device: Device,
    /// Public id of the keys that its blocks are named under: routers have the same ones. Release 0.1 does not say it.
    #[serde(default)]
    pub cache_key_id: String,
    /// Equal for equal weights: groups of one model must agree.
    pub weight_fingerprint: String,
    /// Where each rank runs, rank 0 first.
    pub ranks: Vec<RankRecord>,
    /// Tokens in a block.
    pub block_tokens: u32,
    /// Blocks of KV cache.
    pub kv_blocks: u32,
    /// Blocks of host memory that cached blocks move to; 0 = none.
    #[serde(default)]
    pub host_blocks: u32,
    /// Longest prompt plus output, tokens.
    pub max_model_len: u32,
    /// Ids of the model: 0..vocabulary_size.
    pub vocabulary_size: u32,
    /// Sequences that run at once.
    pub max_sequences: u32,
    /// Whether it takes images.
    pub images: bool,
    /// How fast it is, as measured at its start.
    pub speed: Speed,
    /// Whether it takes requests.
    pub state: GroupState,
    /// Version of the worker.
    pub version: String,
    /// Contract that the worker speaks; a record that names none is of contract 1.
    #[serde(default = "first_contract")]
    pub contract: u32,
}

/// The contract of records that name none.
fn first_contract() -> u32 {
    1
}

/// What a group runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// The reference backend.
    Cpu,
    /// NVIDIA GPUs.
    Cuda,
    /// Scripted ids and a timing model, for tests and benchmarks of router and fleet: no model at all.
    Fake,
}

/// One rank of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankRecord {
    /// 0..N
    pub rank: u32,
    /// Host name of its process.
    pub host: String,
    /// Process id on that host.
    pub pid: u32,
}

/// Measured rates of a group; the inputs of the cost model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// Prompt tokens computed per second at short context.
    pub prefill_tokens_per_second: f64,
    /// Seconds that attention adds for each (token x context token) pair.
    pub prefill_seconds_per_token_pair: f64,
    /// Seconds of a decode step at batch 1.
    pub decode_step_seconds: f64,
}

/// A group's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GroupState {
    /// Weights are being read.
    Loading,
    /// Takes requests.
    Ready,
    /// Finishes what it has and takes nothing new.
    Draining,
}

/// Where the ranks of a group meet: written by the process that holds rank 0, read by all others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RendezvousRecord {
    /// The group that forms.
    pub group: String,
    /// As in [`GroupRecord::epoch`]; a process with an older one is refused.
    pub epoch: u64,
    /// `host:port` of the leader's `Peers` service.
    pub leader: String,
    /// Ranks that must come.
    pub world_size: u32,
    /// Which state of its deployment the leader is of; a process of another one does not come. Empty where nobody says.
    #[serde(default)]
    pub revision: String,
    /// Contract that the leader speaks; a record that names none is of contract 1.
    #[serde(default = "first_contract")]
    pub contract: u32,
}

/// A router as it is announced under `/bora/v1/{cluster}/routers/{router}`: others count it, nobody calls it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouterRecord {
    /// Unique among all that live.
    pub router: String,
    /// Where it listens.
    pub address: String,
    /// Its release.
    pub version: String,
}

/// A record for tests.
#[cfg(test)]
pub(crate) fn example(group: &str) -> GroupRecord {
    GroupRecord {
        group: group.into(),
        epoch: 1,
        endpoint: "127.0.0.1:1".into(),
        model: "devstral/test".into(),
        aliases: vec![],
        device: Device::Fake,
        cache_key_id: "0".into(),
        weight_fingerprint: "0".into(),
        ranks: vec![RankRecord { rank: 0, host: "here".into(), pid: 1 }],
        block_tokens: 64,
        kv_blocks: 10,
        host_blocks: 0,
        max_model_len: 640,
        vocabulary_size: 9192,
        max_sequences: 8,
        images: false,
        speed: Speed { prefill_tokens_per_second: 1.0, prefill_seconds_per_token_pair: 0.0, decode_step_seconds: 1.0 },
        state: GroupState::Ready,
        version: "0".into(),
        contract: crate::version::CONTRACT,
    }
}
