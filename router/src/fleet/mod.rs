//! The groups as this router sees them: which are alive ([`view`]), which of them serve a model
//! ([`models`]), whose a name is ([`names`]), what they report ([`watch`]) and whether that can be true ([`validate`]), whether they respond
//! ([`health`]) and what Prometheus is shown of them ([`gauges`]).

pub mod gauges;
pub mod health;
pub mod models;
mod names;
pub mod validate;
pub mod view;
pub mod watch;
