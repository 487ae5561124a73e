//! The response objects that are sent to clients: OpenAI's objects with vLLM's additional fields. They borrow their
//! contents and are serialized directly into the output buffer.

#![allow(missing_docs)] // of fields: they are OpenAI's and vLLM's own

use std::{borrow::Cow, collections::BTreeMap, sync::Arc};

use bora_common::tokenizer::{IncrementalDecoder, Tokenizer};
use bora_proto::v1::{PositionLogprobs, TokenLogprob};
use schemars::JsonSchema;
use serde::{Serialize, Serializer, ser::SerializeMap as _};

use crate::{
    encode::wire::PackedIds,
    openapi::responses as described,
    relay::emit::{CallDelta, StopReason},
};

/// JSON has no infinity: OpenAI and vLLM write this value.
const MIN_LOGPROB: f32 = -9999.0;

/// `usage`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Usage {
    /// Tokens of the prompts, each prompt counted once.
    pub prompt_tokens: u32,
    /// The sum of both.
    pub total_tokens: u32,
    /// Generated tokens of all choices.
    pub completion_tokens: u32,
    /// Details of the prompt tokens.
    pub prompt_tokens_details: PromptTokensDetails,
}

/// Part of [`Usage`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct PromptTokensDetails {
    /// Tokens found in the group's prefix cache.
    pub cached_tokens: u32,
}

/// A chat response, or a chunk of one.
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "ChatCompletion")]
pub struct ChatObject<'a, C> {
    pub id: &'a str,
    pub object: &'static str,
    pub created: u64,
    pub model: &'a str,
    pub choices: C,
    /// Absent in some chunks of a stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(required)]
    pub usage: Option<Usage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<DescribedPromptLogprobs>")]
    pub prompt_logprobs: Option<PromptLogprobList<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<u32>>")]
    pub prompt_token_ids: Option<&'a PackedIds>,
}

/// One choice of a plain chat response.
#[derive(Serialize, JsonSchema)]
pub struct ChatChoice<'a> {
    pub index: u32,
    pub message: ChatMessage<'a>,
    pub logprobs: Option<ChatLogprobs<'a>>,
    #[schemars(with = "Option<described::FinishReason>")]
    pub finish_reason: Option<&'static str>,
    /// The stop string or stop token that ended it.
    #[schemars(with = "Option<described::StopReason>")]
    pub stop_reason: Option<&'a StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<&'a [u32]>,
}

/// The assistant's message.
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "AssistantMessage")]
pub struct ChatMessage<'a> {
    pub role: &'static str,
    pub content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<ToolCallObject<'a>>>,
}

/// One choice of a chunk.
#[derive(Serialize)]
pub struct ChatChunkChoice<'a> {
    pub index: u32,
    pub delta: ChatDelta<'a>,
    pub logprobs: Option<ChatLogprobs<'a>>,
    pub finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<&'a StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<&'a [u32]>,
}

/// The new part of a message.
#[derive(Default, Serialize)]
pub struct ChatDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<ToolCallObject<'a>>>,
}

/// A tool call, or a chunk of one. A chunk has an index; only the first chunk has the ID and the name.
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "MadeCall")]
pub struct ToolCallObject<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(skip)]
    pub index: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(required)]
    pub id: Option<&'a str>,
    pub r#type: &'static str,
    pub function: FunctionObject<'a>,
}

/// Part of [`ToolCallObject`].
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "MadeFunction")]
pub struct FunctionObject<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(required)]
    pub name: Option<&'a str>,
    /// JSON text.
    pub arguments: &'a str,
}

impl<'a> ToolCallObject<'a> {
    /// `in_stream`: the call is part of a delta.
    pub fn new(call: &'a CallDelta, in_stream: bool) -> Self {
        let start = call.start.as_ref();
        Self {
            index: in_stream.then_some(call.index),
            id: start.map(|start| start.id.as_str()),
            r#type: "function",
            function: FunctionObject { name: start.map(|start| start.name.as_str()), arguments: &call.arguments },
        }
    }
}

/// A completion, or a chunk of one.
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "Completion")]
pub struct CompletionObject<'a, C> {
    pub id: &'a str,
    pub object: &'static str,
    pub created: u64,
    pub model: &'a str,
    pub choices: C,
    /// Absent in some chunks of a stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(required)]
    pub usage: Option<Usage>,
}

/// One choice of a completion.
#[derive(Serialize, JsonSchema)]
pub struct CompletionChoice<'a> {
    pub index: u32,
    pub text: &'a str,
    pub logprobs: Option<CompletionLogprobs<'a>>,
    #[schemars(with = "Option<described::FinishReason>")]
    pub finish_reason: Option<&'static str>,
    /// The stop string or stop token that ended it.
    #[schemars(with = "Option<described::StopReason>")]
    pub stop_reason: Option<&'a StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<DescribedPromptLogprobs>")]
    pub prompt_logprobs: Option<PromptLogprobList<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<u32>>")]
    pub prompt_token_ids: Option<&'a PackedIds>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<&'a [u32]>,
}

/// How tokens are named in logprobs.
#[derive(Clone, Copy)]
pub struct TokenNames<'a> {
    pub tokenizer: Option<&'a Tokenizer>,
    pub as_ids: bool,
}

impl<'a> TokenNames<'a> {
    /// The token's text (U+FFFD for bytes that are not valid UTF-8), or `token_id:7`.
    pub fn name(&self, id: u32) -> Cow<'a, str> {
        let Some(tokenizer) = self.tokenizer.filter(|_| !self.as_ids) else {
            return Cow::Owned(format!("token_id:{id}"));
        };
        match tokenizer.token_bytes(id) {
            Some(bytes) => String::from_utf8_lossy(bytes),
            None => Cow::Borrowed(tokenizer.special_name(id).unwrap_or_default()),
        }
    }

    fn bytes(&self, id: u32) -> Option<Cow<'a, [u8]>> {
        match self.tokenizer?.token_bytes(id) {
            Some(bytes) => Some(Cow::Borrowed(bytes)),
            None => Some(Cow::Owned(self.name(id).into_owned().into_bytes())),
        }
    }
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_nan() { MIN_LOGPROB } else { logprob.max(MIN_LOGPROB) }
}

/// `logprobs` in chat.
#[derive(Serialize, JsonSchema)]
pub struct ChatLogprobs<'a> {
    pub content: Vec<ChatLogprob<'a>>,
}

/// A token of [`ChatLogprobs`].
#[derive(Serialize, JsonSchema)]
pub struct ChatLogprob<'a> {
    token: Cow<'a, str>,
    logprob: f32,
    bytes: Option<Cow<'a, [u8]>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_logprobs: Option<Vec<ChatLogprob<'a>>>,
}

impl<'a> ChatLogprobs<'a> {
    /// Converts logprobs, with at most `top` alternatives at each position.
    pub fn new(positions: &[PositionLogprobs], top: u32, names: TokenNames<'a>) -> Self {
        let content = positions
            .iter()
            .filter_map(|position| {
                let alternatives =
                    position.top.iter().take(top as usize).map(|one| ChatLogprob::new(one, names, None)).collect();
                Some(ChatLogprob::new(position.chosen.as_ref()?, names, Some(alternatives)))
            })
            .collect();
        Self { content }
    }
}

impl<'a> ChatLogprob<'a> {
    fn new(token: &TokenLogprob, names: TokenNames<'a>, top_logprobs: Option<Vec<ChatLogprob<'a>>>) -> Self {
        Self {
            token: names.name(token.token_id),
            logprob: finite(token.logprob),
            bytes: names.bytes(token.token_id),
            top_logprobs,
        }
    }
}

/// `logprobs` in completions: four lists of the same length.
#[derive(Default, Serialize, JsonSchema)]
pub struct CompletionLogprobs<'a> {
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<Cow<'a, str>>,
    #[schemars(with = "Vec<Option<BTreeMap<String, f32>>>")]
    top_logprobs: Vec<Option<TopLogprobs<'a>>>,
}

impl<'a> CompletionLogprobs<'a> {
    /// Adds the first token of a prompt, which has no logprob.
    pub fn push_unknown(&mut self, id: u32, offset: &mut TextOffset, names: TokenNames<'a>) {
        self.push_token(id, offset, names);
        self.token_logprobs.push(None);
        self.top_logprobs.push(None);
    }

    /// Adds one position; `offset` continues over chunks.
    pub fn push(&mut self, position: &PositionLogprobs, top: u32, offset: &mut TextOffset, names: TokenNames<'a>) {
        let Some(chosen) = &position.chosen else {
            return;
        };
        self.push_token(chosen.token_id, offset, names);
        self.token_logprobs.push(Some(finite(chosen.logprob)));
        let mut alternatives: Vec<(Cow<'a, str>, f32)> =
            position.top.iter().take(top as usize).map(|one| (names.name(one.token_id), finite(one.logprob))).collect();
        if !position.top.iter().take(top as usize).any(|one| one.token_id == chosen.token_id) {
            alternatives.push((names.name(chosen.token_id), finite(chosen.logprob)));
        }
        self.top_logprobs.push(Some(TopLogprobs(alternatives)));
    }

    fn push_token(&mut self, id: u32, offset: &mut TextOffset, names: TokenNames<'a>) {
        self.text_offset.push(offset.characters);
        offset.pass(id);
        self.tokens.push(names.name(id));
    }

    /// Limits offsets to the end of `text`, which a stop string may have truncated.
    pub fn clamp_offsets(&mut self, text: &str) {
        let characters = text.chars().count();
        self.text_offset.iter_mut().for_each(|offset| *offset = (*offset).min(characters));
    }
}

/// The text offset of the next token. A token that begins within a character has the offset of that character.
#[derive(Default)]
pub struct TextOffset {
    characters: usize,
    decoder: Option<IncrementalDecoder>,
}

impl TextOffset {
    /// The start of a text, with or without special tokens.
    pub fn new(tokenizer: Option<&Arc<Tokenizer>>, skip_special: bool) -> Self {
        let decoder = tokenizer.map(|tokenizer| IncrementalDecoder::new(Arc::clone(tokenizer), skip_special));
        Self { characters: 0, decoder }
    }

    /// The offset `next` of a separately decoded text that follows this one.
    pub fn followed_by(mut self, next: Self) -> Self {
        let rest = self.decoder.as_mut().map(IncrementalDecoder::finish).unwrap_or_default();
        Self { characters: self.characters + rest.chars().count() + next.characters, decoder: next.decoder }
    }

    fn pass(&mut self, id: u32) {
        if let Some(decoder) = &mut self.decoder {
            self.characters += decoder.push(id).chars().count();
        }
    }
}

/// Alternatives by name. If two token IDs have the same name, the likelier one is kept.
struct TopLogprobs<'a>(Vec<(Cow<'a, str>, f32)>);

impl Serialize for TopLogprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (at, (name, logprob)) in self.0.iter().enumerate() {
            if !self.0[..at].iter().any(|(earlier, _)| earlier == name) {
                map.serialize_entry(name, logprob)?;
            }
        }
        map.end()
    }
}

/// The schema of [`PromptLogprobList`]: its keys are token IDs.
type DescribedPromptLogprobs = Vec<Option<BTreeMap<String, PromptToken<'static>>>>;

/// vLLM's `prompt_logprobs`: `null` for the first token, then `{id: {logprob, rank, decoded_token}}`.
pub struct PromptLogprobList<'a> {
    /// Logprobs from position 1 of the prompt on.
    pub positions: &'a [PositionLogprobs],
    /// Number of alternatives requested.
    pub top: u32,
    /// How tokens are named.
    pub names: TokenNames<'a>,
}

impl Serialize for PromptLogprobList<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let first = std::iter::once(None);
        let rest =
            self.positions.iter().map(|position| Some(PromptPosition { position, top: self.top, names: self.names }));
        serializer.collect_seq(first.chain(rest))
    }
}

struct PromptPosition<'a> {
    position: &'a PositionLogprobs,
    top: u32,
    names: TokenNames<'a>,
}

/// A token of a prompt.
#[derive(Serialize, JsonSchema)]
struct PromptToken<'a> {
    logprob: f32,
    rank: u32,
    decoded_token: Cow<'a, str>,
}

impl Serialize for PromptPosition<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        let mut entry = |token: &TokenLogprob| {
            let value = PromptToken {
                logprob: finite(token.logprob),
                rank: token.rank,
                decoded_token: self.names.name(token.token_id),
            };
            map.serialize_entry(&token.token_id, &value)
        };
        let chosen = self.position.chosen.as_ref();
        if let Some(chosen) = chosen {
            entry(chosen)?;
        }
        for other in self.position.top.iter().take(self.top as usize) {
            if chosen.is_none_or(|chosen| chosen.token_id != other.token_id) {
                entry(other)?;
            }
        }
        map.end()
    }
}
