//! The router over scripted groups: real gRPC, everything else in this process.

mod admission;
mod agents;
mod api;
mod calls;
mod connections;
mod description;
mod faults;
mod goldens;
mod grammar;
mod hostile;
mod lenient;
mod linear;
mod malformed;
mod messages;
mod parameters;
mod placement;
mod policy;
mod rebalance;
mod responses;
mod support;
mod virtual_network;
mod virtual_time;
