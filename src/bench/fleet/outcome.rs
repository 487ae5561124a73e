//! What came of one simulation.

use serde_json::json;

use super::{FleetArgs, Policy, workload::Workload};

/// Counts and times of all requests.
pub(super) struct Outcome {
    pub(super) requests: usize,
    pub(super) hit: f64,
    pub(super) oracle: f64,
    /// Seconds of prefill of the busiest group over the mean.
    pub(super) hotspot: f64,
    /// Requests of the busiest group over the mean.
    pub(super) hotspot_requests: f64,
    pub(super) first_token_seconds: Vec<f64>,
    pub(super) simulated: f64,
    pub(super) moved: usize,
}

impl Outcome {
    /// The line that is printed.
    pub(super) fn line(&self, workload: Workload, policy: Policy, args: &FleetArgs, took: f64) -> String {
        let at = |share: f64| {
            let place = ((self.first_token_seconds.len() as f64 - 1.0) * share).round() as usize;
            self.first_token_seconds.get(place).map(|seconds| (seconds * 1e4).round() / 1e4)
        };
        let round = |value: f64| (value * 1e3).round() / 1e3;
        let mut what = format!("{workload:?}").to_lowercase();
        for (asked, word) in [(args.join, " join"), (args.die, " die")] {
            what.push_str(if asked { word } else { "" });
        }
        let line = json!({
            "kind": "fleet", "workload": what, "policy": format!("{policy:?}"), "groups": args.groups,
            "routers": args.routers, "requests": self.requests, "hit": round(self.hit),
            "oracle": round(self.oracle), "hotspot": round(self.hotspot),
            "hotspot_requests": round(self.hotspot_requests), "ttft_p50_s": at(0.5),
            "ttft_p90_s": at(0.9), "ttft_p99_s": at(0.99), "moved": self.moved,
            "times_life": (self.simulated / took).round(),
        });
        line.to_string()
    }
}
