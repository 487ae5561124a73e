//! The events of one group, against what its record says that it has.

use bora_common::registry::GroupRecord;
use bora_proto::v1::{GroupEvent, Load, State, group_event::Event};

use super::{Violation, ViolationKind as Kind, ensure, is_duration};

/// Bytes of a block's hash.
const HASH_BYTES: usize = 16;
/// An event without blocks.
const BASE_MESSAGE_BYTES: usize = 4 << 10;
/// Sequences that a group may say to have.
const MAX_SEQUENCES: u32 = 1 << 24;
/// Tokens that may wait in a group.
const MAX_QUEUED_TOKENS: u64 = 1 << 44;
/// Largest counter that a 64-bit float still holds.
const MAX_COUNT: u64 = 1 << 53;

/// What a group has, by its record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupBounds {
    /// Blocks of KV cache.
    pub kv_blocks: u32,
    /// Blocks of host memory.
    pub host_blocks: u32,
}

impl GroupBounds {
    /// Those of a record that was checked.
    pub fn of(record: &GroupRecord) -> Self {
        Self { kv_blocks: record.kv_blocks, host_blocks: record.host_blocks }
    }

    /// Whether the record states no size, as that of a loading group.
    pub fn is_unknown(&self) -> bool {
        self.kv_blocks == 0
    }

    /// Blocks that it can hold in all: more of them are not in the index.
    pub fn blocks(&self) -> usize {
        self.kv_blocks as usize + self.host_blocks as usize
    }

    /// Bytes of the largest event that can be meant: all blocks evicted, and as many stored.
    pub fn max_message_bytes(&self) -> usize {
        BASE_MESSAGE_BYTES + 2 * HASH_BYTES * self.blocks()
    }
}

/// Follows the events of one group on one stream.
#[derive(Debug)]
pub struct EventCheck {
    bounds: GroupBounds,
    /// Blocks of the snapshot so far.
    snapshot: usize,
    parts: usize,
    snapshot_is_over: bool,
}

impl EventCheck {
    /// Of a stream that begins.
    pub fn new(bounds: GroupBounds) -> Self {
        Self { bounds, snapshot: 0, parts: 0, snapshot_is_over: false }
    }

    /// Whether the next event may come as it is.
    pub fn check(&mut self, event: &GroupEvent) -> Result<(), Violation> {
        match &event.event {
            Some(Event::Snapshot(part)) => {
                ensure(!self.snapshot_is_over, Kind::Order, || "a second snapshot")?;
                self.parts += 1;
                self.snapshot += blocks_of(&part.block_hashes)?;
                self.snapshot_is_over = part.last;
                ensure(self.parts <= self.bounds.blocks() + 1, Kind::Blocks, || "a snapshot of too many parts")?;
                self.within(self.snapshot)
            }
            Some(Event::Blocks(changed)) => {
                ensure(self.snapshot_is_over, Kind::Order, || "changed blocks before the end of the snapshot")?;
                self.within(blocks_of(&changed.stored)?)?;
                self.within(blocks_of(&changed.evicted)?)
            }
            Some(Event::Load(load)) => self.load(load),
            Some(Event::State(state)) => {
                ensure(State::try_from(*state).is_ok_and(|state| state != State::Unspecified), Kind::Load, || {
                    format!("state {state}")
                })
            }
            None => Ok(()), // a kind of event that a newer worker sends
        }
    }

    /// Whether a group may hold so many blocks.
    pub fn within(&self, blocks: usize) -> Result<(), Violation> {
        let most = self.bounds.blocks();
        ensure(blocks <= most, Kind::Blocks, || format!("{blocks} blocks of a group that has {most}"))
    }

    fn load(&self, load: &Load) -> Result<(), Violation> {
        let GroupBounds { kv_blocks, host_blocks } = self.bounds;
        let on_device = [load.blocks_total, load.blocks_used, load.blocks_cached];
        let holds = on_device.into_iter().all(|blocks| blocks <= kv_blocks)
            && load.host_blocks_total <= host_blocks
            && load.host_blocks_cached <= host_blocks;
        ensure(holds, Kind::Load, || "more blocks than the group has")?;
        let few = load.running <= MAX_SEQUENCES
            && load.waiting <= MAX_SEQUENCES
            && load.queued_prefill_tokens <= MAX_QUEUED_TOKENS
            && load.steps <= MAX_COUNT
            && load.draft_tokens <= MAX_COUNT;
        ensure(few, Kind::Load, || "a count beyond all bounds")?;
        ensure(load.accepted_draft_tokens <= load.draft_tokens, Kind::Load, || "more draft tokens accepted than made")?;
        ensure(is_duration(load.prefill_seconds), Kind::Load, || "a time that is no duration")
    }
}

fn blocks_of(hashes: &[u8]) -> Result<usize, Violation> {
    ensure(hashes.len().is_multiple_of(HASH_BYTES), Kind::Malformed, || "hashes that are not 16 bytes each")?;
    Ok(hashes.len() / HASH_BYTES)
}

#[cfg(test)]
mod tests {
    use bora_proto::v1::{BlocksChanged, Snapshot};

    use super::*;

    fn kind(check: &mut EventCheck, event: Event) -> Option<Kind> {
        check.check(&GroupEvent { epoch: 1, sequence: 1, event: Some(event) }).err().map(|violation| violation.kind)
    }

    fn snapshot(blocks: usize, last: bool) -> Event {
        Event::Snapshot(Snapshot { block_hashes: vec![7; blocks * HASH_BYTES].into(), last })
    }

    fn changed(stored: usize, evicted: usize) -> Event {
        let bytes = |blocks| vec![7; blocks * HASH_BYTES].into();
        Event::Blocks(BlocksChanged { stored: bytes(stored), evicted: bytes(evicted) })
    }

    fn check() -> EventCheck {
        EventCheck::new(GroupBounds { kv_blocks: 8, host_blocks: 2 })
    }

    #[test]
    fn a_group_reports_what_it_can_hold_and_no_more() {
        let mut good = check();
        for event in [snapshot(4, false), snapshot(6, true), changed(10, 10), Event::State(State::Draining as i32)] {
            assert_eq!(kind(&mut good, event), None);
        }
        assert_eq!(kind(&mut good, changed(11, 0)), Some(Kind::Blocks));
        assert_eq!(kind(&mut good, changed(0, 11)), Some(Kind::Blocks));
        assert_eq!(kind(&mut good, snapshot(0, true)), Some(Kind::Order));
        let mut large = check();
        assert_eq!(kind(&mut large, snapshot(6, false)), None);
        assert_eq!(kind(&mut large, snapshot(5, true)), Some(Kind::Blocks));
        let mut endless = check();
        let first = (0..100).find_map(|_| kind(&mut endless, snapshot(0, false)));
        assert_eq!(first, Some(Kind::Blocks), "parts without blocks do not continue for ever");
        assert_eq!(kind(&mut check(), changed(1, 0)), Some(Kind::Order));
        let odd = Event::Snapshot(Snapshot { block_hashes: vec![1; 17].into(), last: true });
        assert_eq!(kind(&mut check(), odd), Some(Kind::Malformed));
        let mut none = EventCheck::new(GroupBounds::default());
        assert_eq!(kind(&mut none, snapshot(0, true)), None);
        assert_eq!(kind(&mut none, changed(1, 0)), Some(Kind::Blocks));
    }

    #[test]
    fn a_load_that_cannot_be_is_refused() {
        let good = Load { running: 3, blocks_total: 8, blocks_used: 8, host_blocks_total: 2, ..Load::default() };
        assert_eq!(kind(&mut check(), Event::Load(good)), None);
        let bad = [
            Load { running: u32::MAX, ..good },
            Load { waiting: u32::MAX, ..good },
            Load { queued_prefill_tokens: u64::MAX, ..good },
            Load { blocks_total: 9, ..good },
            Load { blocks_used: u32::MAX, ..good },
            Load { host_blocks_cached: 3, ..good },
            Load { steps: u64::MAX, ..good },
            Load { accepted_draft_tokens: 1, ..good },
            Load { prefill_seconds: f64::NAN, ..good },
            Load { prefill_seconds: f64::INFINITY, ..good },
            Load { prefill_seconds: -1.0, ..good },
        ];
        for load in bad {
            assert_eq!(kind(&mut check(), Event::Load(load)), Some(Kind::Load), "{load:?}");
        }
        for state in [0, 4, -1] {
            assert_eq!(kind(&mut check(), Event::State(state)), Some(Kind::Load), "{state}");
        }
    }
}
