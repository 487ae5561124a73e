//! A map bounded in bytes that forgets what was not asked for lately.
//!
//! Two generations: what is new or was asked for lives in the young one. When that holds half of the bound,
//! the old one is forgotten and the young one becomes the old one. No list to keep in order, nothing to
//! search for the least recently used, and a stay of at least half of the bound for whatever is in use.

use std::collections::HashMap;

use parking_lot::Mutex;

struct Entry<V> {
    value: V,
    bytes: usize,
}

struct State<V> {
    young: HashMap<u128, Entry<V>>,
    old: HashMap<u128, Entry<V>>,
    young_bytes: usize,
    old_bytes: usize,
}

/// The map; keys are hashes.
pub(super) struct Generations<V> {
    state: Mutex<State<V>>,
    max_young_bytes: usize,
}

impl<V: Clone> Generations<V> {
    /// Holds at most `max_bytes`, as its entries' owners count them.
    pub(super) fn new(max_bytes: usize) -> Self {
        let state = State { young: HashMap::new(), old: HashMap::new(), young_bytes: 0, old_bytes: 0 };
        Self { state: Mutex::new(state), max_young_bytes: max_bytes / 2 }
    }

    /// The value, and whether it was about to be forgotten (it is young again now).
    pub(super) fn get(&self, key: u128) -> Option<(V, bool)> {
        let mut state = self.state.lock();
        if let Some(entry) = state.young.get(&key) {
            return Some((entry.value.clone(), false));
        }
        let entry = state.old.remove(&key)?;
        state.old_bytes -= entry.bytes;
        let value = entry.value.clone();
        let forgotten = self.put(&mut state, key, entry);
        drop(state);
        drop(forgotten);
        Some((value, true))
    }

    /// Adds a value of that many bytes; one larger than the bound allows is not kept.
    pub(super) fn insert(&self, key: u128, value: V, bytes: usize) {
        if bytes > self.max_young_bytes {
            return;
        }
        let mut state = self.state.lock();
        let replaced = (state.young.remove(&key), state.old.remove(&key));
        state.young_bytes -= replaced.0.as_ref().map_or(0, |entry| entry.bytes);
        state.old_bytes -= replaced.1.as_ref().map_or(0, |entry| entry.bytes);
        let forgotten = self.put(&mut state, key, Entry { value, bytes });
        drop(state);
        // freeing many entries takes a while: nobody waits for it
        drop((forgotten, replaced));
    }

    fn put(&self, state: &mut State<V>, key: u128, entry: Entry<V>) -> Option<HashMap<u128, Entry<V>>> {
        let mut forgotten = None;
        if state.young_bytes + entry.bytes > self.max_young_bytes {
            let young = std::mem::take(&mut state.young);
            forgotten = Some(std::mem::replace(&mut state.old, young));
            state.old_bytes = std::mem::take(&mut state.young_bytes);
        }
        state.young_bytes += entry.bytes;
        state.young.insert(key, entry);
        forgotten
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        let state = self.state.lock();
        state.young_bytes + state.old_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_stays_and_the_bound_holds() {
        let map = Generations::new(100);
        for key in 0..1000u128 {
            map.insert(key, key, 10);
            assert!(map.get(0).is_some(), "it is asked for all the time ({key})");
            assert!(map.bytes() <= 100, "{}", map.bytes());
        }
        assert!(map.get(500).is_none());
        assert!(map.get(999).is_some());
    }

    #[test]
    fn a_value_may_come_again_and_one_too_large_is_not_kept() {
        let map = Generations::new(100);
        map.insert(1, 'a', 40);
        map.insert(1, 'b', 30);
        assert_eq!(map.get(1), Some(('b', false)));
        assert_eq!(map.bytes(), 30);
        map.insert(2, 'c', 60);
        assert_eq!(map.get(2), None);
        map.insert(3, 'd', 50);
        assert_eq!(map.get(1), Some(('b', true)), "of the old generation");
        assert_eq!(map.get(1), Some(('b', false)));
    }
}
