//! The HTTP API: OpenAI's API with vLLM's additions, and Anthropic's Messages.
//!
//! The steps of a request: its body is parsed ([`request`], with fields that are declared once: [`declare`]); a request
//! of another API is converted to a chat request ([`convert`], [`responses`], [`messages`]); its parameters are
//! validated ([`params`]); its prompt is encoded ([`prepare`]); its sequences are placed and run ([`completion`]); the
//! result ([`response`]) is written as an object or as events ([`chat`], [`completions`], [`sse`]).

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
