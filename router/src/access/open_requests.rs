//! The requests that are open now, for operators: who waits for what, on which group, and since when.

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
    /// Length at which those that ended are looked for.
    sweep_at: usize,
}

/// What is known of an open request.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OpenRequest {
    /// The router's own identifier, as in the header `x-bora-request-id`.
    pub request_id: String,
    /// The identifier that the client sent in the header `x-request-id`.
    pub client_request_id: Option<String>,
    /// The address of the client.
    pub client: Option<IpAddr>,
    /// Whose it is; none where no key is needed.
    pub tenant: Option<String>,
    /// Method and path.
    pub request: String,
    /// The model that is asked; none until the body was read.
    pub model: Option<String>,
    /// The group that serves it now; none until one does.
    pub group: Option<String>,
    /// Seconds since it came.
    pub age_seconds: f64,
    /// Tokens of its prompt.
    pub prompt_tokens: u64,
    /// Tokens generated so far.
    pub completion_tokens: u64,
}

impl OpenRequests {
    /// One more, until the last clone of its audit is dropped.
    pub fn add(&self, audit: &Audit) {
        let mut lines = self.lines.lock();
        if lines.all.len() >= lines.sweep_at {
            lines.all.retain(|line| line.strong_count() > 0);
            // each is looked at a constant number of times on average
            lines.sweep_at = (2 * lines.all.len()).max(256);
        }
        lines.all.push(Arc::downgrade(&audit.0));
    }

    /// All of them, the oldest first.
    pub fn list(&self) -> Vec<OpenRequest> {
        let open: Vec<Arc<AuditLine>> = self.lines.lock().all.iter().filter_map(Weak::upgrade).collect();
        let now = Instant::now();
        open.iter().filter_map(|line| line.describe(now)).collect()
    }
}
