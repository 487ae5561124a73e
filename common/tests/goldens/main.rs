//! The goldens of the reference (mistral-common) in `tests/fixtures`: texts, conversations, refusals and
//! tool calls.

mod conversation;
mod support;
mod tokenizer;
mod toolcall;
