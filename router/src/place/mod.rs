//! Where a request goes: who holds its prefix ([`index`]), what is booked on each group ([`ledger`]) and
//! which one would answer soonest ([`choose`]).

pub mod choose;
pub mod index;
pub mod ledger;

/// A group's bit in the index; reused after the group is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);
