//! The groups of the fleet as this router sees them.
//!
//! - [`view`]: the groups that are alive.
//! - [`models`]: the groups that serve each model.
//! - [`names`]: the group that owns each name.
//! - [`watch`]: the reports of the groups.
//! - [`validate`]: the checks of records, reports and streams against the contract.
//! - [`health`]: the circuit breaker of each group.
//! - [`gauges`]: the Prometheus gauges of each group.

pub mod gauges;
pub mod health;
pub mod models;
mod names;
pub mod validate;
pub mod view;
pub mod watch;
