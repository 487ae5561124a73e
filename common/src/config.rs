//! The configuration file: one schema for router and worker.
