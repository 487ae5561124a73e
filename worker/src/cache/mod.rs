//! The paged KV cache as the leader sees it: which block holds what, who refers to it and what can be
//! found again. The bytes are the backend's; here are only numbers.
//!
//! Where there is host memory for it, blocks that are given up go there (`host`) and are fetched when they are asked for again.
//!
//! A block is found by its name and used only if its content is equal ([`BlockContent`]).
//!
//! [`KvCache`] is the front: a sequence is admitted with a [`Lease`] on all blocks that it can ever need,
//! grows into it, publishes the blocks that it filled and gives the lease back at its end.

mod content;
mod events;
mod host;
mod pool;
mod prefix;

pub use content::BlockContent;
pub use events::{Delta, to_bytes};
pub use prefix::{Found, KvCache, Lease, Usage};
