//! Tensor parallelism: the ranks of a group, how they find each other, how steps reach them, how their
//! numbers are summed, and what happens when one of them dies.

mod collective;
mod shared;
mod single;
mod tcp;

pub use collective::{Abort, Collective, CollectiveError};
pub use shared::SharedRank;
pub use single::SingleRank;
pub use tcp::{TcpRank, loopback_mesh};
