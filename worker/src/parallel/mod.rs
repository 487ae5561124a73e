//! Tensor parallelism: the ranks of a group, their rendezvous, the distribution of steps, collectives, and failures.
//!
//! The leader's process calls [`start_group`]; every other process of the group calls [`follow`]. Ranks of one process
//! are threads that all-reduce in shared memory ([`SharedRank`]). If a group has several processes, all ranks are
//! connected over TCP ([`TcpRank`]).
//!
//! ```text
//! follower: Hello ──▶ leader: Welcome (all have joined: addresses) ──▶ connect, load ──▶ Ready (KV blocks)
//!           ◀── Start (the minimum of all) ── Step, Step, Step ... ──▶ Heartbeat each second
//! ```

mod collective;
mod fault;
mod follower;
mod group;
mod handshake;
mod options;
mod rank;
mod rendezvous;
mod shared;
mod single;
mod tcp;

pub use collective::{Abort, Collective, CollectiveError};
pub use fault::GroupProgress;
pub(crate) use follower::follow_and_report;
pub use follower::{FollowError, follow};
pub use group::{GroupRunner, StartError, StartedGroup, start_group};
pub use options::{DeviceOptions, FollowerOptions, LeaderOptions, MemberOptions, Timeouts};
pub use shared::SharedRank;
pub use single::SingleRank;
pub use tcp::{TcpRank, loopback_mesh};

use crate::backend::Limits;

impl From<Limits> for bora_proto::v1::Limits {
    fn from(limits: Limits) -> Self {
        let narrow = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        Self {
            step_tokens: narrow(limits.step_tokens),
            sequences: narrow(limits.sequences),
            model_len: narrow(limits.model_len),
            logit_rows: narrow(limits.logit_rows),
        }
    }
}

impl From<bora_proto::v1::Limits> for Limits {
    fn from(limits: bora_proto::v1::Limits) -> Self {
        Self {
            step_tokens: limits.step_tokens as usize,
            sequences: limits.sequences as usize,
            model_len: limits.model_len as usize,
            logit_rows: limits.logit_rows as usize,
        }
    }
}
