//! `POST /v1/responses`, OpenAI's Responses API, without memory: the client sends the whole conversation each time.
//!
//! A request becomes a chat request ([`request`], its tools [`tools`]), and the response becomes a list of output items
//! ([`items`]) that is written whole ([`output`]) or as typed events ([`stream`]).

pub mod count;
pub mod items;
pub mod output;
pub mod request;
pub mod stream;
pub mod tools;
