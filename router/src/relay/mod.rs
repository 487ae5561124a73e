//! The streams between client and group.
//!
//! - [`stream`]: one upstream call.
//! - [`failover`]: a sequence that continues on another group after a failure.
//! - [`budget`] and [`crash_tracker`]: the limits of retries.
//! - [`emit`]: the conversion of tokens to the client's events.

mod attempts;
pub mod budget;
mod codec;
pub mod crash_tracker;
pub mod emit;
pub mod failover;
pub mod stop;
pub mod stream;
mod watch;
