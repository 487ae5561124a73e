//! The streams between client and group: one upstream call ([`stream`]), the sequence that survives the
//! death of its group ([`resume`], as often as [`budget`] and [`deaths`] allow), and what its token ids mean to the client
//! ([`emit`]).

pub mod budget;
mod codec;
pub mod deaths;
pub mod emit;
pub mod resume;
pub mod stop;
pub mod stream;
mod tried;
mod watch;
