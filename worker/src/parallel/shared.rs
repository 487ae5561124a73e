//! The collective of ranks that are threads of one process. Each rank writes its elements to its own slot in shared
//! memory, all ranks meet at a barrier, and every rank reads all slots in the order of the ranks.
//!
//! Slots alternate between two sets. A rank that writes its slot for call n + 2 has passed the barrier of call n + 1,
//! and so has every other rank; no rank still reads the slots of call n. One barrier per call therefore suffices.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use super::collective::{Abort, Collective, CollectiveError};

/// One rank's access to the shared memory.
pub struct SharedRank {
    rank: usize,
    calls: u64,
    place: Arc<Place>,
    timeout: Duration,
}

struct Place {
    sets: [Vec<RwLock<Offered>>; 2],
    meeting: Mutex<Meeting>,
    changed: Condvar,
}

/// Data that a rank passes to a call.
#[derive(Default)]
struct Offered {
    elements: Vec<f32>,
    bytes: Vec<u8>,
}

struct Meeting {
    /// Number of calls that each rank has reached.
    arrived: Vec<u64>,
    ended: Option<CollectiveError>,
}

impl SharedRank {
    /// Creates the collectives of `ranks` threads. A rank that waits longer than `timeout` for another fails.
    pub fn group(ranks: usize, timeout: Duration) -> Vec<SharedRank> {
        let set = || (0..ranks).map(|_| RwLock::default()).collect();
        let place = Arc::new(Place {
            sets: [set(), set()],
            meeting: Mutex::new(Meeting { arrived: vec![0; ranks], ended: None }),
            changed: Condvar::new(),
        });
        (0..ranks).map(|rank| SharedRank { rank, calls: 0, place: Arc::clone(&place), timeout }).collect()
    }

    /// Writes this rank's slot, waits for all ranks, and returns the set of slots to read.
    fn meet(&mut self, offer: impl FnOnce(&mut Offered)) -> Result<usize, CollectiveError> {
        self.calls += 1;
        let set = (self.calls % 2) as usize;
        {
            let mut own = self.place.sets[set][self.rank].write().unwrap_or_else(PoisonError::into_inner);
            offer(&mut own);
        }
        let mut meeting = self.place.lock();
        meeting.arrived[self.rank] = self.calls;
        self.place.changed.notify_all();
        let deadline = Instant::now() + self.timeout;
        loop {
            // a call that all ranks reached succeeds, even if a rank has left since
            let Some(late) = meeting.arrived.iter().position(|calls| *calls < self.calls) else {
                return Ok(set);
            };
            if let Some(error) = &meeting.ended {
                return Err(error.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let error = CollectiveError::Timeout { rank: late, waited: self.timeout };
                meeting.ended = Some(error.clone());
                self.place.changed.notify_all();
                return Err(error);
            }
            meeting = self.place.changed.wait_timeout(meeting, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn read<R>(&self, set: usize, rank: usize, read: impl FnOnce(&Offered) -> R) -> R {
        read(&self.place.sets[set][rank].read().unwrap_or_else(PoisonError::into_inner))
    }

    fn same_length(&self, rank: usize, found: usize, own: usize) -> Result<(), CollectiveError> {
        if found == own {
            return Ok(());
        }
        Err(CollectiveError::OutOfStep {
            rank,
            reason: format!("it passed {found} elements, rank {} passed {own}", self.rank),
        })
    }
}

impl Place {
    fn lock(&self) -> MutexGuard<'_, Meeting> {
        self.meeting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, error: CollectiveError) {
        self.lock().ended.get_or_insert(error);
        self.changed.notify_all();
    }
}

impl Abort for Place {
    fn abort(&self, reason: &str) {
        self.end(CollectiveError::Aborted(reason.to_owned()));
    }
}

/// A rank whose thread ends for any reason fails the other ranks immediately.
impl Drop for SharedRank {
    fn drop(&mut self) {
        self.place.end(CollectiveError::Lost { rank: self.rank, reason: "its thread ended".to_owned() });
    }
}

impl Collective for SharedRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.place.sets[0].len()
    }

    fn all_reduce(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        let set = self.meet(|own| {
            own.elements.clear();
            own.elements.extend_from_slice(values);
        })?;
        for rank in 0..self.ranks() {
            self.read(set, rank, |offered| {
                self.same_length(rank, offered.elements.len(), values.len())?;
                if rank == 0 {
                    values.copy_from_slice(&offered.elements);
                } else {
                    for (sum, number) in values.iter_mut().zip(&offered.elements) {
                        *sum += number;
                    }
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    fn all_gather(&mut self, own: &[f32], all: &mut [f32]) -> Result<(), CollectiveError> {
        let set = self.meet(|place| {
            place.elements.clear();
            place.elements.extend_from_slice(own);
        })?;
        for rank in 0..self.ranks() {
            self.read(set, rank, |offered| {
                self.same_length(rank, offered.elements.len(), own.len())?;
                all[rank * own.len()..(rank + 1) * own.len()].copy_from_slice(&offered.elements);
                Ok(())
            })?;
        }
        Ok(())
    }

    fn exchange(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let set = self.meet(|place| place.bytes = own.to_vec())?;
        Ok((0..self.ranks()).map(|rank| self.read(set, rank, |offered| offered.bytes.clone())).collect())
    }

    fn aborter(&self) -> Arc<dyn Abort> {
        self.place.clone()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods)] // ranks that hang

    use super::*;

    fn run<R: Send>(ranks: usize, timeout: Duration, work: impl Fn(SharedRank) -> R + Sync) -> Vec<R> {
        std::thread::scope(|scope| {
            let work = &work;
            let threads: Vec<_> =
                SharedRank::group(ranks, timeout).into_iter().map(|rank| scope.spawn(move || work(rank))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn reduces_to_the_same_bits_on_every_rank() {
        let results = run(4, Duration::from_secs(20), |mut rank| {
            let mut all = Vec::new();
            for call in 0..200 {
                let mut values: Vec<f32> =
                    (0..5).map(|i| 0.1 + (rank.rank() as f32 * 7.3 + i as f32 + call as f32).sin()).collect();
                rank.all_reduce(&mut values).unwrap();
                all.extend(values.iter().map(|value| value.to_bits()));
            }
            let mut gathered = vec![0.0; 8];
            rank.all_gather(&[rank.rank() as f32, 0.5], &mut gathered).unwrap();
            assert_eq!(gathered, [0.0, 0.5, 1.0, 0.5, 2.0, 0.5, 3.0, 0.5]);
            let names = rank.exchange(&vec![b'x'; rank.rank()]).unwrap();
            assert_eq!(names.iter().map(Vec::len).collect::<Vec<_>>(), [0, 1, 2, 3]);
            all
        });
        assert!(results.iter().all(|result| *result == results[0]));
    }

    #[test]
    fn fails_the_others_if_a_thread_ends() {
        let results = run(3, Duration::from_secs(20), |mut rank| {
            if rank.rank() == 1 {
                return Ok(());
            }
            rank.barrier()
        });
        let lost = Err(CollectiveError::Lost { rank: 1, reason: "its thread ended".to_owned() });
        assert_eq!(results[0], lost);
        assert_eq!(results[2], lost);
    }

    #[test]
    fn names_a_missing_rank() {
        let results = run(3, Duration::from_millis(100), |mut rank| {
            if rank.rank() == 1 {
                std::thread::sleep(Duration::from_millis(600));
                return Ok(());
            }
            rank.barrier()
        });
        let late = CollectiveError::Timeout { rank: 1, waited: Duration::from_millis(100) };
        assert_eq!(results, [Err(late.clone()), Ok(()), Err(late)]);
    }

    #[test]
    fn rejects_different_lengths() {
        let results = run(2, Duration::from_secs(20), |mut rank| {
            let mut values = vec![0.0; 1 + rank.rank()];
            rank.all_reduce(&mut values)
        });
        assert!(results.iter().all(|result| matches!(result, Err(CollectiveError::OutOfStep { .. }))), "{results:?}");
    }
}
