//! Follows one group's events: a snapshot of its blocks, then numbered changes, its load and its state.
//! A gap in the numbers or another epoch means that the stream is begun again, with an empty index.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use bora_common::{peer::identity, version};
use bora_proto::v1::{GroupEvent, State, WatchRequest, group_event::Event};
use rand::Rng as _;
use tokio::time::Instant;
use tonic::{Code, metadata::AsciiMetadataValue};

use super::{
    validate::{Violation, ViolationKind, events::EventCheck},
    view::{Fleet, Link},
};
use crate::relay::stream::Failure;

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_secs(2);
/// Longest wait for a watch to begin.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// A group reports its load at least once a second: one that is silent for longer is stuck.
const EVENT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a stream of events ended.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("the group can't be watched: {0}")]
    Status(#[from] tonic::Status),
    #[error("the watch did not begin in time")]
    Slow,
    #[error("the group has said nothing for {} s", EVENT_TIMEOUT.as_secs())]
    Silent,
    #[error("the stream ended")]
    Ended,
    #[error("event {got} came where {expected} was due")]
    Gap { expected: u64, got: u64 },
    #[error("the epoch changed from {from} to {to}")]
    Epoch { from: u64, to: u64 },
    #[error(transparent)]
    Violation(#[from] Violation),
}

impl Broken {
    /// Whether the group can't be reached. One that says that it loads or stops is reached well enough.
    fn is_outage(&self) -> bool {
        match self {
            Broken::Status(status) => {
                matches!(Failure::from(status), Failure::Lost(_) | Failure::TimedOut)
            }
            Broken::Slow | Broken::Silent => true,
            Broken::Ended | Broken::Gap { .. } | Broken::Epoch { .. } | Broken::Violation(_) => false,
        }
    }

    /// The part that differs, if another server is at the group's address.
    fn mismatch(&self) -> Option<&'static str> {
        match self {
            Broken::Status(status) => identity::mismatch_of(status),
            _ => None,
        }
    }

    /// Whether the group may be gone for good.
    fn is_end(&self) -> bool {
        !matches!(self, Broken::Gap { .. } | Broken::Epoch { .. } | Broken::Violation(_))
    }
}

/// Watches until the group is gone. Holds neither the fleet nor the link while it waits.
pub(super) async fn follow(fleet: Weak<Fleet>, link: Weak<Link>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let (Some(strong_fleet), Some(strong_link)) = (fleet.upgrade(), link.upgrade()) else {
            return;
        };
        if strong_link.bounds.is_unknown() {
            // The record of a loading group states no sizes and no weights. The record of the loaded group brings a new link.
            let changed = Arc::clone(&strong_link.changed);
            drop((strong_fleet, strong_link));
            let _ = tokio::time::timeout(MAX_PAUSE, changed.notified()).await;
            continue;
        }
        let (broken, began) = watch_once(&strong_fleet, strong_link).await;
        let mismatch = broken.mismatch();
        let Some(strong_link) = link.upgrade() else {
            return;
        };
        strong_link.set_watched(false);
        if began {
            pause = FIRST_PAUSE;
            tracing::warn!(group = strong_link.group, reason = %broken, "event stream of the group broke");
        } else {
            tracing::debug!(group = strong_link.group, reason = %broken, "event stream of the group did not begin");
        }
        if let Some(part) = mismatch {
            strong_fleet.mismatched(&strong_link, part);
        } else if broken.is_outage() {
            strong_link.set_silent();
            strong_link.breaker.failed();
        }
        if let Broken::Violation(violation) = &broken {
            strong_fleet.violated(&strong_link.group, violation);
            strong_link.breaker.violated();
            strong_fleet.index.clear(strong_link.slot);
            pause = MAX_PAUSE;
        }
        if broken.is_end() && !strong_link.is_announced() {
            strong_fleet.remove(&strong_link);
            return;
        }
        let share = strong_fleet.placing.lock().random.random_range(0.5..1.0);
        let changed = Arc::clone(&strong_link.changed);
        drop((strong_fleet, strong_link));
        // a group that was loading may be ready now
        let _ = tokio::time::timeout(pause.mul_f64(share), changed.notified()).await;
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

/// One stream of events, to its end; says why it ended and whether it had begun.
async fn watch_once(fleet: &Arc<Fleet>, link: Arc<Link>) -> (Broken, bool) {
    let mut client = link.channels.client(link.bounds.max_message_bytes());
    let mut request = link.expected.on(WatchRequest { watcher: format!("router-{}", std::process::id()) });
    let own_version = AsciiMetadataValue::from_static(env!("CARGO_PKG_VERSION"));
    request.metadata_mut().insert(version::METADATA, own_version);
    let opened = tokio::time::timeout(OPEN_TIMEOUT, client.watch(request));
    let mut events = match opened.await {
        Ok(Ok(response)) => response.into_inner(),
        Ok(Err(status)) => return (status.into(), false),
        Err(_) => return (Broken::Slow, false),
    };
    fleet.index.clear(link.slot);
    let (bounds, weak) = (link.bounds, Arc::downgrade(&link));
    drop(link);
    let mut check = EventCheck::new(bounds);
    let mut last: Option<(u64, u64)> = None;
    loop {
        let event = match tokio::time::timeout(EVENT_TIMEOUT, events.message()).await {
            Ok(Ok(Some(event))) => event,
            Ok(Ok(None)) => return (Broken::Ended, last.is_some()),
            Ok(Err(status)) => return (undecoded(&status).map_or(status.into(), Broken::Violation), last.is_some()),
            Err(_) => return (Broken::Silent, last.is_some()),
        };
        let Some(link) = weak.upgrade() else {
            return (Broken::Ended, true);
        };
        if let Some((epoch, sequence)) = last {
            if event.epoch != epoch {
                return (Broken::Epoch { from: epoch, to: event.epoch }, true);
            }
            if event.sequence != sequence + 1 {
                return (Broken::Gap { expected: sequence + 1, got: event.sequence }, true);
            }
        } else {
            link.set_watched(true);
            link.set_mismatched(false);
            link.breaker.succeeded();
        }
        last = Some((event.epoch, event.sequence));
        if let Err(violation) = check.check(&event) {
            return (violation.into(), true);
        }
        link.heard();
        if let Err(violation) = check.within(apply(fleet, &link, event)) {
            return (violation.into(), true);
        }
    }
}

/// A message that could not be decoded: a group itself does not send these codes on this stream.
fn undecoded(status: &tonic::Status) -> Option<Violation> {
    let is_of_the_connection = std::error::Error::source(status).is_some();
    match status.code() {
        Code::OutOfRange => Some(Violation::new(ViolationKind::TooLarge, "an event of the group is too large")),
        Code::Internal if !is_of_the_connection => {
            Some(Violation::new(ViolationKind::Malformed, "an event of the group cannot be decoded"))
        }
        _ => None,
    }
}

/// Takes over what the group reported. Returns how many blocks it holds.
fn apply(fleet: &Fleet, link: &Link, event: GroupEvent) -> usize {
    match event.event {
        Some(Event::Snapshot(snapshot)) => return fleet.index.apply(link.slot, &snapshot.block_hashes, &[]),
        Some(Event::Blocks(blocks)) => return fleet.index.apply(link.slot, &blocks.stored, &blocks.evicted),
        Some(Event::Load(load)) => {
            link.load_tracker.report(load, Instant::now().into_std());
            link.room.changed();
        }
        Some(Event::State(state)) => link.tell_state(State::try_from(state).unwrap_or(State::Unspecified)),
        None => {} // a kind of event that a newer worker sends
    }
    0
}
