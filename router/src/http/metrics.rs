//! What the HTTP server counts.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// Why a connection or a request was refused before its route saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Open files or connections are exhausted.
    Connections,
    /// The head did not arrive in time.
    HeadTimeout,
    /// The head is no HTTP, or larger than it may be.
    Head,
    /// The body did not arrive in time.
    BodyTimeout,
    /// Memory for bodies is exhausted.
    BodyMemory,
    /// The client did not take its response.
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

/// The HTTP server's counters.
#[derive(Clone, Debug, Default)]
pub struct HttpMetrics {
    /// Open connections of the API's port.
    pub connections: Gauge,
    /// Memory that request bodies take.
    pub body_bytes: Gauge,
    refusals: Family<ReasonLabels, Counter>,
}

impl HttpMetrics {
    /// Adds them to a registry.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("http_connections", "Open connections of the API's port", self.connections.clone());
        registry.register("http_body_bytes", "Memory that request bodies take", self.body_bytes.clone());
        let help = "Connections and requests refused before their route, by reason";
        registry.register("http_refusals", help, self.refusals.clone());
        // a counter that is there at zero shows its first increase
        for reason in Refusal::ALL {
            let _ = self.refusals.get_or_create(&ReasonLabels { reason: reason.name() });
        }
    }

    /// One was refused.
    pub fn refused(&self, reason: Refusal) {
        self.refusals.get_or_create(&ReasonLabels { reason: reason.name() }).inc();
    }
}
