//! The goldens of the reference (mistral-common) in `tests/fixtures`: texts, conversations, refusals and
//! tool calls.

mod conversation;
mod jsonl;
mod properties;
mod record;
mod support;
mod tokenizer;
mod toolcall;
