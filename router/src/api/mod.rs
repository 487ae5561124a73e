//! The HTTP surface: OpenAI's API with vLLM's additions, and Anthropic's Messages. A request is read ([`request`], by fields that
//! are declared once: [`declare`]), made
//! a chat request where it came by another API ([`convert`], [`responses`], [`messages`]), checked ([`params`]), encoded
//! ([`prepare`]), placed and run ([`response`]), and written as an object or as events ([`chat`], [`completions`], [`sse`]).

pub mod bounds;
pub mod chat;
pub mod completion;
pub mod completions;
pub mod context;
pub mod convert;
pub mod declare;
pub mod error;
pub mod fields;
pub mod generate;
pub mod groups;
pub mod listing;
pub mod messages;
pub mod params;
pub mod prepare;
pub mod request;
pub mod response;
pub mod responses;
pub mod sse;
pub mod status;
pub mod structured;
pub mod surrogates;
pub mod tokenize;
mod trace;
pub mod turns;
