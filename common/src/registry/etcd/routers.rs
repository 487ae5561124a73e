//! How many routers live: each keeps a key under a lease and counts the keys of all.
//!
//! More are believed at once, fewer only when a lease's time has passed: a router that is restarted, and an
//! etcd that comes back empty and is filled again, shall not let the others grant more in between.

use std::collections::BTreeSet;

use etcd_client::{EventType, GetOptions, WatchOptions};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};

use super::{Backoff, EtcdRegistry, Kept, RouterPresence, RouterRecord, StoreResult, encode_segment, within};

impl EtcdRegistry {
    fn routers_prefix(&self) -> String {
        format!("/bora/v1/{}/routers/", encode_segment(&self.options.cluster))
    }

    pub(super) fn join_routers(&self, router: &RouterRecord) -> RouterPresence {
        let key = format!("{}{}", self.routers_prefix(), encode_segment(&router.router));
        // a RouterRecord is three strings
        let bytes = serde_json::to_vec(router).unwrap_or_default();
        let (alive, gone) = mpsc::channel::<()>(1);
        let (left, has_left) = watch::channel(false);
        let registry = self.clone();
        tokio::spawn(async move {
            registry.keep_while(Kept { key, address_field: "address", refuses_taken: false }, bytes, gone).await;
            left.send_replace(true);
        });
        let (counted, live) = watch::channel(1);
        let registry = self.clone();
        tokio::spawn(async move {
            let mut backoff = Backoff::new();
            loop {
                tokio::select! {
                    broken = registry.count_routers(&counted, &mut backoff) => {
                        let reason = broken.err().unwrap_or_default();
                        tracing::debug!(reason, routers = *counted.borrow(), "etcd lost, as many routers as before");
                    }
                    () = counted.closed() => return,
                }
                tokio::select! {
                    () = backoff.wait() => {}
                    () = counted.closed() => return,
                }
            }
        });
        RouterPresence { live, alive: Some(alive), left: has_left }
    }

    /// Counts until etcd is lost.
    async fn count_routers(&self, counted: &watch::Sender<u32>, backoff: &mut Backoff) -> StoreResult<()> {
        let mut client = self.connect().await?;
        let prefix = self.routers_prefix();
        let keys_only = GetOptions::new().with_prefix().with_keys_only();
        let all = within(client.get(prefix.clone(), Some(keys_only))).await?;
        let revision = all.header().map_or(0, |header| header.revision());
        let mut keys: BTreeSet<Vec<u8>> = all.kvs().iter().map(|kv| kv.key().to_vec()).collect();
        backoff.reset();
        let options = WatchOptions::new().with_prefix().with_start_revision(revision + 1);
        let mut events = within(client.watch(prefix, Some(options))).await?;
        let mut fewer_since: Option<Instant> = None;
        loop {
            let count = u32::try_from(keys.len()).unwrap_or(u32::MAX).max(1);
            let before = *counted.borrow();
            if count >= before {
                fewer_since = None;
            } else {
                fewer_since.get_or_insert_with(Instant::now);
            }
            if count > before {
                tracing::info!(routers = count, "more routers live");
                counted.send_replace(count);
            }
            let believed_at = fewer_since.map(|since| since + self.options.lease_ttl);
            let response = tokio::select! {
                response = events.message() => response.map_err(|error| error.to_string())?,
                () = sleep_until(believed_at.unwrap_or_else(Instant::now)), if believed_at.is_some() => {
                    tracing::info!(routers = count, "fewer routers live");
                    counted.send_replace(count);
                    continue;
                }
            };
            let Some(response) = response.filter(|response| !response.canceled()) else {
                return Err("the watch ended".into());
            };
            for event in response.events() {
                let Some(kv) = event.kv() else { continue };
                match event.event_type() {
                    EventType::Put => keys.insert(kv.key().to_vec()),
                    EventType::Delete => keys.remove(kv.key()),
                };
            }
        }
    }
}
