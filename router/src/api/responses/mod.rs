//! `POST /v1/responses`, OpenAI's Responses API without stored state: the client sends the whole conversation each
//! time.
//!
//! A request is converted to a chat request ([`request`], its tools in [`tools`]), and the response becomes a list of
//! output items ([`items`]) that is written complete ([`output`]) or as typed events ([`stream`]).

pub mod count;
pub mod items;
pub mod output;
pub mod request;
pub mod stream;
pub mod tools;
