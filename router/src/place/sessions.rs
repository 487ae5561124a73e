//! Where sessions are at home: a hint beside the facts. Clients name a session (`x-session-id`, `x-affinity`); the
//! index says who holds its blocks, this says who had its last turn. It matters where the blocks say little: where
//! the history was rewritten, the conversation stays, if the wait there is not the longer one.
//!
//! Bounded: two generations, of which the older one is forgotten when the younger is full. A tenant that makes up
//! names without end makes others lose a hint, and nothing else: what they hold, the index knows.

use std::collections::HashMap;

use parking_lot::Mutex;
use xxhash_rust::xxh3::xxh3_64;

use super::Slot;

/// Sessions of one generation.
const GENERATION: usize = 32_768;

/// The key of a session: its name means something to one tenant and for one model only.
pub fn key(tenant: u64, model: &str, name: u64) -> u64 {
    xxh3_64(&[&tenant.to_le_bytes()[..], &name.to_le_bytes(), model.as_bytes()].concat())
}

/// One start of one group.
type AffineGroup = (Slot, u64);

#[derive(Default)]
struct Generations {
    young: HashMap<u64, AffineGroup>,
    old: HashMap<u64, AffineGroup>,
}

/// The sessions of one router.
#[derive(Default)]
pub struct Sessions {
    generations: Mutex<Generations>,
}

impl Sessions {
    /// Where the session's last turn went.
    pub fn affine_group(&self, session: u64) -> Option<AffineGroup> {
        let generations = self.generations.lock();
        generations.young.get(&session).or_else(|| generations.old.get(&session)).copied()
    }

    /// Its turn goes there.
    pub fn settle(&self, session: u64, affine: AffineGroup) {
        let mut generations = self.generations.lock();
        if generations.young.len() >= GENERATION {
            generations.old = std::mem::take(&mut generations.young);
        }
        generations.young.insert(session, affine);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_belongs_to_its_tenant_and_its_model() {
        let keys = [key(1, "m", 7), key(2, "m", 7), key(1, "n", 7), key(1, "m", 8)];
        let distinct: std::collections::HashSet<u64> = keys.into_iter().collect();
        assert_eq!(distinct.len(), keys.len());
        assert_eq!(key(1, "m", 7), keys[0]);
    }

    #[test]
    fn sessions_in_use_are_remembered_and_their_number_is_bounded() {
        let sessions = Sessions::default();
        for session in 0..5 * GENERATION as u64 {
            sessions.settle(session, (Slot(1), 7));
            sessions.settle(0, (Slot(2), 7));
        }
        assert_eq!(sessions.affine_group(0), Some((Slot(2), 7)));
        assert_eq!(sessions.affine_group(5 * GENERATION as u64 - 1), Some((Slot(1), 7)));
        assert_eq!(sessions.affine_group(1), None);
        let generations = sessions.generations.lock();
        assert!(generations.young.len() + generations.old.len() <= 2 * GENERATION);
    }
}
