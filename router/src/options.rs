//! The options of the router: one plain struct, embedded as `router:` in the configuration file. Every field has a
//! default that suits most clusters.

use std::time::Duration;

use bora_common::{conversation::ConversationLimits, peer::local::LocalConnector, tls::Connector};
use serde::{Deserialize, Serialize};

use crate::{access::AccessOptions, http::options::HttpOptions};

/// What happens to a conversation that the reference encoder refuses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConversationRules {
    /// It gets a 400 that names the message and the rule.
    Strict,
    /// It is repaired if [`bora_common::conversation::repair`] supports the fault.
    #[default]
    Lenient,
}

/// The `router` section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RouterOptions {
    /// Maximum request body in bytes; a larger one gets a 413.
    pub max_body_bytes: usize,
    /// Seconds from a request's arrival to its last token; then its sequences are aborted.
    pub request_timeout_seconds: f64,
    /// Seconds of silence on a stream after which a comment is sent, so that proxies keep the connection open.
    pub heartbeat_seconds: f64,
    /// Maximum `n` of a request.
    pub max_choices: u32,
    /// Maximum number of sequences of one request (prompts times `n`).
    pub max_sequences_per_request: u32,
    /// Maximum number of stop strings, and of stop token IDs, of a request.
    pub max_stop_strings: usize,
    /// Maximum `top_logprobs`, `logprobs` and `prompt_logprobs`.
    pub max_logprobs: u32,
    /// Maximum number of messages of a request.
    pub max_messages: usize,
    /// Maximum number of content parts of a request, over all its messages.
    pub max_content_parts: usize,
    /// Maximum number of tool calls in the messages of a request.
    pub max_tool_calls: usize,
    /// Maximum number of tools of a request.
    pub max_tools: usize,
    /// Seconds of CPU time that parsing, validating and encoding one request may take.
    pub max_prepare_cpu_seconds: f64,
    /// Group crashes under one request, over all its choices, after which the request is treated as a poison pill and
    /// is not retried.
    pub max_attempts: u32,
    /// Retry budget of one tenant, in sequences. Each new sequence adds one, up to this number. The live routers share
    /// the budget equally.
    pub retries_per_tenant: u32,
    /// Retry budget of all tenants together, in sequences.
    pub retries: u32,
    /// Maximum length of the queue for a group with room. Tenants share a full queue equally, and interactive requests
    /// displace batch requests. A request without a place gets a 429.
    pub max_waiting: usize,
    /// Seconds that an interactive request waits for a group with room; a batch request waits until its deadline.
    pub max_waiting_seconds: f64,
    /// Seconds that a request waits for a group of its model to become ready, if one is expected: a group loads, drains
    /// or does not respond, or the last one left within the last ten minutes. 0 = such a request gets a 503 without
    /// waiting.
    pub wait_for_group_seconds: f64,
    /// Seconds that a broken stream waits for a group that can continue the sequence; `wait_for_group_seconds` if that is
    /// longer and a group of the model is expected.
    pub failover_wait_seconds: f64,
    /// HTTP/2 connections to each group.
    pub connections_per_group: usize,
    /// Seconds after which connecting to a group times out.
    pub connect_timeout_seconds: f64,
    /// Threads that parse and encode requests; 0 = one per two cores, and at least two.
    pub encode_threads: usize,
    /// Requests that may wait for such a thread. Tenants share a full queue equally; a request without a place gets a
    /// 503.
    pub encode_queue: usize,
    /// Bodies up to this size in bytes go before longer ones, and have one thread of their own if there are two or
    /// more.
    pub short_body_bytes: usize,
    /// Bytes of the cache of token IDs of encoded conversations.
    pub conversation_cache_bytes: usize,
    /// Whether faulty conversations are refused or repaired; a tenant's own setting overrides it.
    pub conversation: ConversationRules,
    /// Seconds that open requests get to finish when the router stops.
    pub shutdown_grace_seconds: f64,
    /// Whether the header `x-bora-decision` names the reasons of each placement.
    pub debug: bool,
    /// Keys, tenants and tokens.
    pub access: AccessOptions,
    /// The listeners (`http` of the file).
    #[serde(skip)]
    pub http: HttpOptions,
    /// Name of the cluster (`cluster` of the file), which groups must belong to.
    #[serde(skip)]
    pub cluster: String,
    /// Refuse groups on other hosts, because gRPC is plain text and `grpc.insecure` is not set.
    #[serde(skip)]
    pub loopback_only: bool,
    /// TLS towards groups (`grpc.tls` of the file); plain text if absent.
    #[serde(skip)]
    pub grpc: Option<Connector>,
    /// The in-process connection to the group of `bora serve`, instead of a network connection.
    #[serde(skip)]
    pub in_process: Option<LocalConnector>,
}

impl Default for RouterOptions {
    fn default() -> Self {
        Self {
            max_body_bytes: 32 << 20,
            request_timeout_seconds: 3600.0,
            heartbeat_seconds: 10.0,
            max_choices: 128,
            max_sequences_per_request: 256,
            max_stop_strings: 16,
            max_logprobs: 20,
            max_messages: 32_768,
            max_content_parts: 65_536,
            max_tool_calls: 32_768,
            max_tools: 4_096,
            max_prepare_cpu_seconds: 5.0,
            max_attempts: 3,
            retries_per_tenant: 1024,
            retries: 8192,
            max_waiting: 4096,
            max_waiting_seconds: 120.0,
            wait_for_group_seconds: 120.0,
            failover_wait_seconds: 5.0,
            connections_per_group: 2,
            connect_timeout_seconds: 2.0,
            encode_threads: 0,
            encode_queue: 1024,
            short_body_bytes: 32 << 10,
            conversation_cache_bytes: 1 << 30,
            conversation: ConversationRules::default(),
            shutdown_grace_seconds: 30.0,
            debug: false,
            access: AccessOptions::default(),
            http: HttpOptions::default(),
            cluster: "bora".into(),
            loopback_only: false,
            grpc: None,
            in_process: None,
        }
    }
}

/// An invalid value of [`RouterOptions`] or [`HttpOptions`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{section}.{field}: {expected}")]
pub struct OptionsError {
    /// The section of the file.
    pub section: &'static str,
    /// The field.
    pub field: &'static str,
    /// The allowed values.
    pub expected: &'static str,
}

impl RouterOptions {
    /// Checks every value. The error names the first field that is out of range.
    pub fn validate(&self) -> Result<(), OptionsError> {
        let seconds = [
            ("request_timeout_seconds", self.request_timeout_seconds),
            ("heartbeat_seconds", self.heartbeat_seconds),
            ("connect_timeout_seconds", self.connect_timeout_seconds),
            ("max_prepare_cpu_seconds", self.max_prepare_cpu_seconds),
        ];
        for (field, value) in seconds {
            if !(value > 0.0 && value <= 1e7) {
                return Err(OptionsError { section: "router", field, expected: "a number of seconds above 0" });
            }
        }
        let waits = [
            ("failover_wait_seconds", self.failover_wait_seconds),
            ("shutdown_grace_seconds", self.shutdown_grace_seconds),
            ("max_waiting_seconds", self.max_waiting_seconds),
            ("wait_for_group_seconds", self.wait_for_group_seconds),
        ];
        for (field, value) in waits {
            if !(0.0..=1e7).contains(&value) {
                return Err(OptionsError { section: "router", field, expected: "a number of seconds, 0 or more" });
            }
        }
        let counts = [
            ("max_body_bytes", self.max_body_bytes),
            ("max_choices", self.max_choices as usize),
            ("max_sequences_per_request", self.max_sequences_per_request as usize),
            ("max_attempts", self.max_attempts as usize),
            ("connections_per_group", self.connections_per_group),
            ("encode_queue", self.encode_queue),
            ("max_messages", self.max_messages),
            ("max_content_parts", self.max_content_parts),
            ("max_tool_calls", self.max_tool_calls),
            ("max_tools", self.max_tools),
        ];
        for (field, value) in counts {
            if value == 0 {
                return Err(OptionsError { section: "router", field, expected: "at least 1" });
            }
        }
        Ok(())
    }

    pub(crate) fn conversation_limits(&self) -> ConversationLimits {
        ConversationLimits {
            messages: self.max_messages,
            content_parts: self.max_content_parts,
            tool_calls: self.max_tool_calls,
            tools: self.max_tools,
        }
    }

    pub(crate) fn max_prepare_cpu(&self) -> Duration {
        Duration::from_secs_f64(self.max_prepare_cpu_seconds)
    }

    pub(crate) fn request_timeout(&self) -> Duration {
        Duration::from_secs_f64(self.request_timeout_seconds)
    }

    pub(crate) fn heartbeat(&self) -> Duration {
        Duration::from_secs_f64(self.heartbeat_seconds)
    }

    pub(crate) fn failover_wait(&self) -> Duration {
        Duration::from_secs_f64(self.failover_wait_seconds)
    }

    pub(crate) fn max_waiting_time(&self) -> Duration {
        Duration::from_secs_f64(self.max_waiting_seconds)
    }

    pub(crate) fn wait_for_group(&self) -> Duration {
        Duration::from_secs_f64(self.wait_for_group_seconds)
    }

    pub(crate) fn connect_timeout(&self) -> Duration {
        Duration::from_secs_f64(self.connect_timeout_seconds)
    }

    pub(crate) fn shutdown_grace(&self) -> Duration {
        Duration::from_secs_f64(self.shutdown_grace_seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_defaults_and_rejects_unknown_keys() {
        assert_eq!(RouterOptions::default().validate(), Ok(()));
        let read: RouterOptions = serde_json::from_str(r#"{"debug": true}"#).expect("partial options");
        assert_eq!(read, RouterOptions { debug: true, ..RouterOptions::default() });
        assert!(serde_json::from_str::<RouterOptions>(r#"{"debugg": true}"#).is_err());
    }

    #[test]
    fn names_the_value_out_of_range() {
        let options = RouterOptions { heartbeat_seconds: 0.0, ..RouterOptions::default() };
        assert_eq!(options.validate().map_err(|error| error.field), Err("heartbeat_seconds"));
        let options = RouterOptions { max_attempts: 0, ..RouterOptions::default() };
        assert_eq!(options.validate().map_err(|error| error.field), Err("max_attempts"));
    }
}
