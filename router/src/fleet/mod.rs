//! The groups as this router sees them: which are alive ([`view`]), what they tell ([`watch`]), whether they
//! answer ([`health`]) and what Prometheus is shown of them ([`gauges`]).

pub mod gauges;
pub mod health;
pub mod view;
pub mod watch;
