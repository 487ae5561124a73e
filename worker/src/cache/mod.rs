//! The bookkeeping of the paged KV cache on the leader: which block holds what, which sequences refer to it, and which
//! blocks a later sequence can reuse. It handles block numbers; the backend holds the bytes.
//!
//! [`KvCache`] is the interface. A sequence is admitted with a [`Lease`] on all blocks that it can need, grows into it,
//! publishes the blocks that it fills, and releases the lease at its end.
//!
//! A block is found by its name and used only if its content is equal ([`BlockContent`]).
//!
//! With host memory, blocks are copied there before they are evicted, and fetched when a sequence needs them (`host`).

mod content;
mod events;
mod host;
mod pool;
mod prefix;

pub use content::BlockContent;
pub use events::{Delta, to_bytes};
pub use prefix::{Found, KvCache, Lease, Usage};
