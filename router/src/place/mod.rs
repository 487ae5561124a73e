//! Where a request goes and when: who holds its prefix ([`index`]), what is booked on each group ([`load_tracker`]),
//! which one would respond soonest ([`choose`]), when a
//! conversation leaves a group that was given too much ([`level`]), where its session is at home ([`sessions`]), and who waits while none
//! can start it ([`admission`]).

pub mod admission;
pub mod choose;
pub mod index;
pub mod load_tracker;
pub mod rebalance;
pub mod sessions;
mod table;

/// A group's bit in the index; reused after the group is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);
