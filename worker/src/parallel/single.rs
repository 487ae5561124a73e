//! The collective of a group with one rank, which does nothing.

use std::sync::{Arc, OnceLock};

use super::collective::{Abort, Collective, CollectiveError};

/// The only rank of a group.
#[derive(Default)]
pub struct SingleRank {
    ended: Arc<Ended>,
}

#[derive(Default)]
struct Ended(OnceLock<String>);

impl Abort for Ended {
    fn abort(&self, reason: &str) {
        let _ = self.0.set(reason.to_owned());
    }
}

impl SingleRank {
    fn check(&self) -> Result<(), CollectiveError> {
        match self.ended.0.get() {
            Some(reason) => Err(CollectiveError::Aborted(reason.clone())),
            None => Ok(()),
        }
    }
}

impl Collective for SingleRank {
    fn rank(&self) -> usize {
        0
    }

    fn ranks(&self) -> usize {
        1
    }

    fn all_reduce(&mut self, _values: &mut [f32]) -> Result<(), CollectiveError> {
        self.check()
    }

    fn all_gather(&mut self, own: &[f32], all: &mut [f32]) -> Result<(), CollectiveError> {
        all.copy_from_slice(own);
        self.check()
    }

    fn exchange(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.check()?;
        Ok(vec![own.to_vec()])
    }

    fn aborter(&self) -> Arc<dyn Abort> {
        self.ended.clone()
    }
}
