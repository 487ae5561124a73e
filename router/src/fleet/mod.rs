//! The groups as this router sees them: which are alive ([`view`]), what they tell ([`watch`]) and whether
//! they answer ([`health`]).

pub mod health;
pub mod view;
pub mod watch;
