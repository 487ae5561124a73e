//! The metrics of the HTTP server.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// Why a connection or a request was refused before it reached a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Open files or connections are exhausted.
    Connections,
    /// The head did not arrive in time.
    HeadTimeout,
    /// The head is not HTTP, or too large.
    Head,
    /// The body did not arrive in time.
    BodyTimeout,
    /// Memory for bodies is exhausted.
    BodyMemory,
    /// The client did not read its response.
    WriteTimeout,
}

impl Refusal {
    const ALL: [Self; 6] =
        [Self::Connections, Self::HeadTimeout, Self::Head, Self::BodyTimeout, Self::BodyMemory, Self::WriteTimeout];

    fn name(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::HeadTimeout => "head_timeout",
            Self::Head => "head",
            Self::BodyTimeout => "body_timeout",
            Self::BodyMemory => "body_memory",
            Self::WriteTimeout => "write_timeout",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

/// The metrics of the HTTP server.
#[derive(Clone, Debug, Default)]
pub struct HttpMetrics {
    /// Open connections of the API's port.
    pub connections: Gauge,
    /// Memory of request bodies, in bytes.
    pub body_bytes: Gauge,
    refusals: Family<ReasonLabels, Counter>,
}

impl HttpMetrics {
    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("http_connections", "Open connections of the API's port", self.connections.clone());
        registry.register("http_body_bytes", "Memory that request bodies take", self.body_bytes.clone());
        let help = "Connections and requests refused before their route, by reason";
        registry.register("http_refusals", help, self.refusals.clone());
        // a counter that exists at zero shows its first increase
        for reason in Refusal::ALL {
            let _ = self.refusals.get_or_create(&ReasonLabels { reason: reason.name() });
        }
    }

    /// Counts a refusal.
    pub fn refused(&self, reason: Refusal) {
        self.refusals.get_or_create(&ReasonLabels { reason: reason.name() }).inc();
    }
}
