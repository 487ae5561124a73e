//! The engine: one loop per group on its leader, and what a step is.

pub mod runner;
pub mod step;
