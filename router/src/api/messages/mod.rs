//! `POST /v1/messages` and `/v1/messages/count_tokens`, Anthropic's Messages API.
//!
//! A request is converted to a chat request ([`request`]), and the response is written as content blocks ([`output`]),
//! complete or as events ([`stream`]). Every error on these paths has Anthropic's form ([`error`]).

pub mod count;
pub mod error;
pub mod output;
pub mod request;
pub mod stream;
