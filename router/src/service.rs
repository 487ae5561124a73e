//! The state that all requests share: options, models, fleet, metrics.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use bora_common::secret::ClusterKeys;

use crate::{
    access::{Access, open_requests::OpenRequests},
    encode::{cache::ConversationCache, pool::EncodePool},
    fleet::view::Fleet,
    http::{body::BodyReader, metrics::HttpMetrics, shutdown::Shutdown},
    metrics::Metrics,
    models::ModelSpec,
    options::RouterOptions,
    place::admission::Admission,
    relay::{budget::RetryBudget, failover::Relay},
};

/// The state of one router. Nothing in it needs to survive the process.
pub struct Service {
    options: RouterOptions,
    models: HashMap<String, Arc<ModelSpec>>,
    aliases: HashMap<String, String>,
    ids_only: Arc<ModelSpec>,
    relay: Arc<Relay>,
    pool: EncodePool,
    conversations: ConversationCache,
    access: Arc<Access>,
    keys: ClusterKeys,
    http_metrics: HttpMetrics,
    bodies: BodyReader,
    shutdown: Shutdown,
    open_requests: OpenRequests,
    started_at: u64,
}

impl Service {
    /// Creates the state of a router that has seen no group yet.
    pub fn new(
        options: RouterOptions,
        keys: ClusterKeys,
        models: HashMap<String, ModelSpec>,
        access: Arc<Access>,
    ) -> Self {
        let aliases = models
            .iter()
            .flat_map(|(name, spec)| spec.aliases.iter().map(|alias| (alias.clone(), name.clone())))
            .collect();
        let metrics = Metrics::new();
        for name in models.keys() {
            metrics.know_model(name);
        }
        let limits = models.iter().map(|(name, spec)| (name.clone(), spec.limits.clone())).collect();
        let fleet = Fleet::of_models(options.clone(), &keys, limits);
        let violations = fleet.violations.clone();
        let help = "Messages of groups that violate the protocol, by violation";
        metrics.register(|registry| registry.register("protocol_violations", help, violations));
        let http_metrics = HttpMetrics::default();
        metrics.register(|registry| http_metrics.register(registry));
        let shutdown = Shutdown::default();
        let mismatches = fleet.identity_mismatches.clone();
        let help = "Calls that reached another server than the intended group, by the field that differs";
        metrics.register(|registry| registry.register("identity_mismatches", help, mismatches));
        let relay = Relay {
            admission: Arc::new(Admission::new(Arc::clone(&fleet.room), options.max_waiting)),
            retries: RetryBudget::new(options.retries_per_tenant, options.retries, access.routers().clone()),
            fleet,
            options: options.clone(),
            metrics,
        };
        Self {
            pool: EncodePool::new(&options, &models),
            conversations: ConversationCache::new(options.conversation_cache_bytes),
            models: models.into_iter().map(|(name, spec)| (name, Arc::new(spec))).collect(),
            aliases,
            ids_only: Arc::default(),
            relay: Arc::new(relay),
            access,
            keys,
            bodies: BodyReader::new(
                options.http.clone(),
                options.max_body_bytes,
                http_metrics.clone(),
                shutdown.clone(),
            ),
            http_metrics,
            shutdown,
            open_requests: OpenRequests::default(),
            started_at: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            options,
        }
    }

    /// The options that the operator set.
    pub fn options(&self) -> &RouterOptions {
        &self.options
    }

    /// Keys, tenants and their limits.
    pub fn access(&self) -> &Access {
        &self.access
    }

    /// The requests that are open now.
    pub fn open_requests(&self) -> &OpenRequests {
        &self.open_requests
    }

    /// The keys from which the names of blocks, images and salts are derived.
    pub fn keys(&self) -> &ClusterKeys {
        &self.keys
    }

    /// The groups.
    pub fn fleet(&self) -> &Arc<Fleet> {
        &self.relay.fleet
    }

    /// The metrics registry of this router.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.relay.metrics
    }

    /// All metrics of this process in their current state, in OpenMetrics text.
    pub fn metrics_text(&self) -> String {
        self.metrics().conversation_cache(self.conversations().bytes());
        self.metrics().text(self.fleet(), &self.model_names(), &self.relay.admission.lines())
    }

    /// The parts that a sequence needs while it runs: placement, admission, retries.
    pub fn relay(&self) -> Arc<Relay> {
        Arc::clone(&self.relay)
    }

    /// The cache of conversations that were encoded before.
    pub fn conversations(&self) -> &ConversationCache {
        &self.conversations
    }

    /// The reader of request bodies.
    pub fn bodies(&self) -> &BodyReader {
        &self.bodies
    }

    /// The progress of the shutdown.
    pub fn shutdown(&self) -> &Shutdown {
        &self.shutdown
    }

    /// The metrics of the HTTP server.
    pub fn http_metrics(&self) -> &HttpMetrics {
        &self.http_metrics
    }

    /// The thread pool that parses and encodes requests.
    pub fn pool(&self) -> &EncodePool {
        &self.pool
    }

    /// A model's tokenizer and defaults. A model without a configuration accepts and returns token IDs only.
    pub fn spec(&self, model: &str) -> Arc<ModelSpec> {
        Arc::clone(self.models.get(model).unwrap_or(&self.ids_only))
    }

    /// The configured name of a model, by name or alias.
    pub fn configured(&self, name: &str) -> Option<&str> {
        let name = self.aliases.get(name).map_or(name, String::as_str);
        self.models.get_key_value(name).map(|(name, _)| name.as_str())
    }

    /// The name of the configured model, if exactly one is configured.
    pub fn only_configured(&self) -> Option<&str> {
        let mut names = self.models.keys();
        names.next().filter(|_| names.next().is_none()).map(String::as_str)
    }

    /// Every name that requests may use, with the configured model behind the name.
    pub fn configured_names(&self) -> impl Iterator<Item = (&str, &str)> {
        let names = self.models.keys().map(|name| (name.as_str(), name.as_str()));
        names.chain(self.aliases.iter().map(|(alias, name)| (alias.as_str(), name.as_str())))
    }

    /// The models that are configured or that groups announce.
    pub fn model_names(&self) -> BTreeSet<String> {
        let view = self.fleet().view();
        self.models.keys().cloned().chain(view.models().map(|model| model.name.clone())).collect()
    }

    /// Time of the start, in seconds since 1970.
    pub fn started_at(&self) -> u64 {
        self.started_at
    }

    /// Seconds after which a request that found every group full should be sent again: the time that the least loaded
    /// group needs for its queued work.
    pub fn seconds_until_room(&self) -> u32 {
        let view = self.fleet().view();
        let seconds = view
            .groups()
            .filter(|group| group.is_ready())
            .map(|group| group.cost.prefill_seconds(0, group.link.load_tracker.busy().queued_tokens))
            .fold(f64::INFINITY, f64::min);
        if seconds.is_finite() { seconds.ceil().clamp(1.0, 60.0) as u32 } else { 2 }
    }
}
