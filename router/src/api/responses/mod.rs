//! `POST /v1/responses`, OpenAI's Responses API, without memory: the client sends the whole conversation each time.
//!
//! A request becomes a chat request ([`request`]), and the answer is written as a list of output items
//! ([`output`]), whole or as typed events ([`stream`]).

pub mod output;
pub mod request;
pub mod stream;
