//! Placement: the choice of a group for each request, and the time at which the request starts.
//!
//! - [`index`]: the groups that hold each block of a prefix.
//! - [`load_tracker`]: the load of each group and the work assigned to it.
//! - [`choose`]: the choice of the group with the shortest predicted time to first token.
//! - [`rebalance`]: the migration of conversations away from a group with more than its share of work.
//! - [`sessions`]: the affine group of each session.
//! - [`admission`]: the queue of requests that no group can start yet.

pub mod admission;
pub mod choose;
pub mod index;
pub mod load_tracker;
pub mod rebalance;
pub mod sessions;
mod table;

/// A group's bit in the index. It is reused after the group has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);
