//! What an operator can set about the router: one plain struct, embedded as `router:` in the
//! configuration file. Every field has a default that is right for most clusters.

use std::time::Duration;

use bora_common::{conversation::ConversationLimits, peer::local::LocalConnector, tls::Connector};
use serde::{Deserialize, Serialize};

use crate::{access::AccessOptions, http::options::HttpOptions};

/// What becomes of a conversation that the reference encoder refuses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConversationRules {
    /// A 400 that names the message and the rule.
    Strict,
    /// It is repaired, where [`bora_common::conversation::repair`] knows how.
    #[default]
    Lenient,
}

/// Limits and habits of the router.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RouterOptions {
    /// Largest request body in bytes; a larger one is served with 413.
    pub max_body_bytes: usize,
    /// Seconds from a request's arrival to its last token; then its streams are aborted.
    pub request_timeout_seconds: f64,
    /// Seconds of silence on a stream after which a comment is sent, so that proxies keep it open.
    pub heartbeat_seconds: f64,
    /// Largest `n` of a request.
    pub max_choices: u32,
    /// Most sequences that one request may start (prompts times `n`).
    pub max_sequences_per_request: u32,
    /// Most stop strings (and stop token IDs) of a request.
    pub max_stop_strings: usize,
    /// Largest `top_logprobs`, `logprobs` and `prompt_logprobs`.
    pub max_logprobs: u32,
    /// Most messages of a request.
    pub max_messages: usize,
    /// Most content parts of a request, those of all its messages together.
    pub max_content_parts: usize,
    /// Most tool calls in the messages of a request.
    pub max_tool_calls: usize,
    /// Most tools of a request.
    pub max_tools: usize,
    /// Seconds of CPU time that reading, checking and encoding one request may take.
    pub max_prepare_cpu_seconds: f64,
    /// Groups that may die under a request, all its choices together: then it is taken for the cause and not given
    /// another one.
    pub max_attempts: u32,
    /// Sequences of one tenant that may be placed again at once; each new one allows one more, up to this. Each of the
    /// routers that live has an equal share.
    pub retries_per_tenant: u32,
    /// The same for all tenants together.
    pub retries: u32,
    /// Requests that may wait for a group with room. Tenants share a full queue equally and interactive requests displace
    /// batch ones; what has no place is served with 429.
    pub max_waiting: usize,
    /// Seconds that an interactive request waits for a group with room; a batch one waits until its deadline.
    pub max_waiting_seconds: f64,
    /// Seconds that a request waits for a group of its model to become ready, if one is expected: it loads, drains or does
    /// not respond, or the last one left within the last ten minutes. 0 = such a request is served with 503 at once.
    pub wait_for_group_seconds: f64,
    /// Seconds that a broken stream waits for a group that can continue with it.
    pub failover_wait_seconds: f64,
    /// HTTP/2 connections to each group.
    pub connections_per_group: usize,
    /// Seconds to wait for a connection to a group.
    pub connect_timeout_seconds: f64,
    /// Threads that parse and encode requests; 0 = one for every two cores, and at least two.
    pub encode_threads: usize,
    /// Requests that may wait for such a thread; tenants share a full queue equally, and what does not fit gets a 503.
    pub encode_queue: usize,
    /// Bodies up to this size go before longer ones, and have one of the threads (of two or more) to themselves.
    pub short_body_bytes: usize,
    /// Bytes for the token IDs of conversations seen before.
    pub conversation_cache_bytes: usize,
    /// Whether faulty conversations are refused or repaired; a tenant may have its own.
    pub conversation: ConversationRules,
    /// Seconds that open requests get to finish when the router stops.
    pub shutdown_grace_seconds: f64,
    /// Names the reasons of each placement in the header `x-bora-decision`.
    pub debug: bool,
    /// Who may ask for what.
    pub access: AccessOptions,
    /// Where and how it listens (`http` of the file).
    #[serde(skip)]
    pub http: HttpOptions,
    /// Name of the cluster (`cluster` of the file): what groups have to be of.
    #[serde(skip)]
    pub cluster: String,
    /// Groups beyond this host are not connected to: gRPC is plain text (and `grpc.insecure` is not set).
    #[serde(skip)]
    pub loopback_only: bool,
    /// How groups are connected to (`grpc.tls` of the file); plain text where it is absent.
    #[serde(skip)]
    pub grpc: Option<Connector>,
    /// The way to the group of the same process (`bora serve`), in place of a network.
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

/// A value of [`RouterOptions`] or [`HttpOptions`] that can't work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{section}.{field}: {expected}")]
pub struct OptionsError {
    /// The section of the file.
    pub section: &'static str,
    /// The field.
    pub field: &'static str,
    /// What it must be.
    pub expected: &'static str,
}

impl RouterOptions {
    /// Checks every value, so that nothing fails later for a number that makes no sense.
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
    fn defaults_are_valid_and_unknown_keys_are_refused() {
        assert_eq!(RouterOptions::default().validate(), Ok(()));
        let read: RouterOptions = serde_json::from_str(r#"{"debug": true}"#).expect("partial options");
        assert_eq!(read, RouterOptions { debug: true, ..RouterOptions::default() });
        assert!(serde_json::from_str::<RouterOptions>(r#"{"debugg": true}"#).is_err());
    }

    #[test]
    fn a_number_that_makes_no_sense_is_named() {
        let options = RouterOptions { heartbeat_seconds: 0.0, ..RouterOptions::default() };
        assert_eq!(options.validate().map_err(|error| error.field), Err("heartbeat_seconds"));
        let options = RouterOptions { max_attempts: 0, ..RouterOptions::default() };
        assert_eq!(options.validate().map_err(|error| error.field), Err("max_attempts"));
    }
}
