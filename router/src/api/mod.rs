//! The HTTP surface: OpenAI's API with vLLM's additions, one file a concern. A request is read
//! ([`request`]), checked ([`params`]), encoded ([`prepare`]), placed and run ([`answer`]), and written as
//! an object or as events ([`chat`], [`completions`], [`sse`]).

pub mod answer;
pub mod chat;
pub mod completions;
pub mod error;
pub mod generate;
pub mod groups;
pub mod listing;
pub mod params;
pub mod prepare;
pub mod request;
pub mod response;
pub mod sse;
pub mod status;
pub mod structured;
pub mod tokenize;
mod trace;
