//! Who calls whom between the processes of a cluster: what a caller expects of a server ([`identity`]), what it may
//! call ([`role`]), and the one layer of every gRPC server that checks both ([`guard`]).

pub mod guard;
pub mod identity;
pub mod local;
pub mod role;

pub use guard::{Admission, Guard};
pub use identity::{Expected, Mismatch, ServerIdentity};
pub use role::{Peer, Role, Roles};
