//! The requests that are open now, for operators: caller, model, group and age.

use std::{
    net::IpAddr,
    sync::{Arc, Weak},
    time::Instant,
};

use parking_lot::Mutex;
use serde::Serialize;

use super::audit::{Audit, AuditLine};

/// All open requests of a router.
#[derive(Default)]
pub struct OpenRequests {
    lines: Mutex<Lines>,
}

#[derive(Default)]
struct Lines {
    all: Vec<Weak<AuditLine>>,
    /// Length of the list at which ended requests are removed.
    sweep_at: usize,
}

/// The state of an open request.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OpenRequest {
    /// The router's own identifier, as in the header `x-bora-request-id`.
    pub request_id: String,
    /// The identifier that the client sent in the header `x-request-id`.
    pub client_request_id: Option<String>,
    /// The address of the client.
    pub client: Option<IpAddr>,
    /// The caller's tenant; none if no key is needed.
    pub tenant: Option<String>,
    /// Method and path.
    pub request: String,
    /// The requested model; none until the body is read.
    pub model: Option<String>,
    /// The group that serves the request now; none before placement.
    pub group: Option<String>,
    /// Age in seconds.
    pub age_seconds: f64,
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens generated so far.
    pub completion_tokens: u64,
}

impl OpenRequests {
    /// Adds a request, until the last clone of its audit is dropped.
    pub fn add(&self, audit: &Audit) {
        let mut lines = self.lines.lock();
        if lines.all.len() >= lines.sweep_at {
            lines.all.retain(|line| line.strong_count() > 0);
            // amortized: each entry is visited a constant number of times on average
            lines.sweep_at = (2 * lines.all.len()).max(256);
        }
        lines.all.push(Arc::downgrade(&audit.0));
    }

    /// All open requests, the oldest first.
    pub fn list(&self) -> Vec<OpenRequest> {
        let open: Vec<Arc<AuditLine>> = self.lines.lock().all.iter().filter_map(Weak::upgrade).collect();
        let now = Instant::now();
        open.iter().filter_map(|line| line.describe(now)).collect()
    }
}
