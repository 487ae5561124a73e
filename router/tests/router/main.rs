//! The router over scripted groups: real gRPC, everything else in this process.

mod admission;
mod api;
mod faults;
mod goldens;
mod malformed;
mod support;
