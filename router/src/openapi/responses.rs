//! Response schemas that are not derived from serialized types ([`crate::api::response`]).

#![allow(missing_docs)] // the names are OpenAI's and vLLM's; those that need an explanation have a comment

use bora_common::registry::{Device, GroupState};
use schemars::JsonSchema;

/// OpenAI's form of an error.
#[derive(JsonSchema)]
pub struct ErrorObject {
    pub error: ErrorFields,
}

/// Part of [`ErrorObject`].
#[derive(JsonSchema)]
pub struct ErrorFields {
    /// The message for people.
    pub message: String,
    /// The type of the error.
    pub r#type: String,
    /// The invalid field.
    pub param: Option<String>,
    pub code: Option<String>,
}

/// Why an output ended.
#[derive(JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    Stop,
    Length,
    ToolCalls,
}

/// A stop string, or the ID of a stop token.
#[derive(JsonSchema)]
#[serde(untagged)]
pub enum StopReason {
    Text(String),
    Id(u32),
}

/// All models.
#[derive(JsonSchema)]
pub struct ModelList {
    pub object: String,
    pub data: Vec<Model>,
}

/// A model under one of its names.
#[derive(JsonSchema)]
pub struct Model {
    pub id: String,
    pub object: String,
    pub created: u64,
    pub owned_by: String,
    /// The model behind an alias.
    pub root: String,
    pub parent: Option<String>,
    /// Absent while no group serves it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<u32>,
    #[schemars(with = "Option<DeviceKind>")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<Device>,
    pub groups: usize,
    pub ready_groups: usize,
    pub r#type: String,
    pub name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_context_length: Option<u32>,
    pub aliases: Vec<String>,
    pub capabilities: Capabilities,
}

/// The device of a group; `fake` generates no real output.
#[derive(JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    Cpu,
    Cuda,
    Fake,
}

/// The capabilities of a model, in Mistral's terms.
#[derive(JsonSchema)]
pub struct Capabilities {
    pub completion_chat: bool,
    pub completion_fim: bool,
    pub function_calling: bool,
    pub fine_tuning: bool,
    pub vision: bool,
}

/// Response of `/tokenize`.
#[derive(JsonSchema)]
pub struct Tokenized {
    pub count: usize,
    pub max_model_len: u32,
    pub tokens: Vec<u32>,
    pub token_strs: Option<Vec<String>>,
}

/// Response of `/detokenize`.
#[derive(JsonSchema)]
pub struct Detokenized {
    pub prompt: String,
}

/// The fleet in this router's view.
#[derive(JsonSchema)]
pub struct Groups {
    /// Name of the cluster.
    pub cluster: String,
    /// Live routers, this one included.
    pub routers: u32,
    pub groups: Vec<Group>,
}

/// The requests that are open now.
#[derive(JsonSchema)]
pub struct OpenRequests {
    pub requests: Vec<OpenRequest>,
}

/// A request that is open.
#[derive(JsonSchema)]
pub struct OpenRequest {
    /// The router's own identifier.
    pub request_id: String,
    /// The identifier that the client sent.
    pub client_request_id: Option<String>,
    /// The address of the client.
    pub client: Option<std::net::IpAddr>,
    pub tenant: Option<String>,
    /// Method and path.
    pub request: String,
    pub model: Option<String>,
    /// The group that serves the request now.
    pub group: Option<String>,
    pub age_seconds: f64,
    pub prompt_tokens: u64,
    /// Tokens generated so far.
    pub completion_tokens: u64,
}

/// A group: one copy of a model.
#[derive(JsonSchema)]
pub struct Group {
    pub group: String,
    /// The start of the group; changes with every start.
    pub epoch: u64,
    pub endpoint: String,
    pub model: String,
    pub aliases: Vec<String>,
    #[schemars(with = "DeviceKind")]
    pub device: Device,
    /// Identifies the key of its block hashes.
    pub cache_key_id: String,
    pub weight_fingerprint: String,
    pub ranks: Vec<Rank>,
    pub block_tokens: u32,
    pub kv_blocks: u32,
    pub host_blocks: u32,
    pub max_model_len: u32,
    pub vocabulary_size: u32,
    pub max_sequences: u32,
    pub images: bool,
    pub speed: Speed,
    #[schemars(with = "State")]
    pub state: GroupState,
    pub version: String,
    /// Contract version of its worker.
    pub contract: u32,
    /// Whether the registry still lists it.
    pub announced: bool,
    /// Whether its event stream to this router is connected.
    pub watched: bool,
    /// Whether it reports its state: if not, it gets no requests.
    pub responding: bool,
    pub load: Load,
}

/// Whether a group accepts requests.
#[derive(JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Loading,
    Ready,
    Draining,
}

/// A rank of a group.
#[derive(JsonSchema)]
pub struct Rank {
    pub rank: u32,
    pub host: String,
    pub pid: u32,
}

/// Measured rates of a group.
#[derive(JsonSchema)]
pub struct Speed {
    pub prefill_tokens_per_second: f64,
    pub prefill_seconds_per_token_pair: f64,
    pub decode_step_seconds: f64,
}

/// The last report of a group.
#[derive(JsonSchema)]
pub struct Load {
    pub running: u32,
    pub waiting: u32,
    pub queued_prefill_tokens: u64,
    pub blocks_total: u32,
    pub blocks_used: u32,
    pub blocks_cached: u32,
    pub steps: u64,
}

/// Whether at least one group accepts requests.
#[derive(JsonSchema)]
pub struct Ready {
    pub status: String,
    pub ready_groups: usize,
}

/// The release version.
#[derive(JsonSchema)]
pub struct Version {
    pub version: String,
}
