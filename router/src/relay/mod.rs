//! The streams between client and group: one upstream call ([`stream`]), the sequence that survives the
//! death of its group ([`resume`], as often as [`budget`] and [`deaths`] allow), and what its token IDs mean to the client
//! ([`emit`]).

mod attempts;
pub mod budget;
mod codec;
pub mod crash_tracker;
pub mod emit;
pub mod failover;
pub mod stop;
pub mod stream;
mod watch;
