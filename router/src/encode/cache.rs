//! What is known of conversations seen before: their token IDs and block hashes, message by message.
//!
//! A conversation is a path: each *turn* (neighbouring messages of one role) hangs on the turn before it and
//! is found by a hash over every byte up to its end, the tools and the tenant's salt. An agent's next
//! request finds the longest path that it shares with an earlier one; only what is new is read, checked,
//! encoded and hashed. Texts are kept besides by their own hash, so that a message whose past was rewritten
//! (a client that shortens its history) is not encoded again either.
//!
//! Tenants with different salts share nothing, so nobody learns from the time a response takes what another
//! one asked. The hash is keyed with a number that no client knows. Both parts are bounded in bytes.

use std::{cell::RefCell, ops::Range, sync::Arc};

use bora_common::{
    blocks::{BLOCK_TOKENS, BlockChain, BlockDigest, BlockHash},
    conversation::{
        ConversationLimits, ConversationOptions, DataUrls, FunctionNames, Growth, NotGrown, Outline, TextEncoder,
    },
    cpu_budget::Stopped,
    secret::{CacheSalt, ClusterKeys},
    tokenizer::Tokenizer,
};
use bora_proto::v1::Image;
use bytes::Bytes;
use serde_json::value::RawValue;
use xxhash_rust::xxh3::xxh3_128_with_seed;

use super::{
    EncodedPrompt,
    generations::Generations,
    wire::{Packer, pack_with_parts, unpack},
};

/// Shorter texts are encoded faster than they are looked up.
const SHORTEST_KEPT_TEXT: usize = 128;
/// What a turn takes beside its contents: the map's entry, the counters, the allocations.
const TURN_BYTES: usize = 320;

/// A conversation as the request wrote it.
#[derive(Clone, Copy)]
pub struct ChatInput<'a> {
    /// The model's name: caches of models do not mix.
    pub model: &'a str,
    /// Its messages.
    pub messages: &'a [&'a RawValue],
    /// Its tools.
    pub tools: Option<&'a RawValue>,
    /// What its blocks and images are named under.
    pub keys: &'a ClusterKeys,
    /// Separates tenants.
    pub salt: CacheSalt,
    /// The model continues with the last message.
    pub continue_final_message: bool,
    /// Which names functions may have.
    pub function_names: FunctionNames,
    /// Whether the model takes images.
    pub takes_images: bool,
    /// How long its lists may be.
    pub limits: ConversationLimits,
}

impl ChatInput<'_> {
    /// What the conversation's reader has to know.
    pub fn options(&self) -> ConversationOptions {
        let Self { continue_final_message, function_names, limits, .. } = *self;
        ConversationOptions { continue_final_message, function_names, limits }
    }
}

/// Neighbouring messages of one role, and all before them.
struct Turn {
    before: Option<Arc<Turn>>,
    key: u128,
    /// Messages up to its end.
    messages: usize,
    /// Ids up to its end.
    tokens: usize,
    outlines: Vec<Outline>,
    /// Its own token IDs, packed, and their number.
    packed: Bytes,
    count: usize,
    hashes: Box<[BlockHash]>,
    images: Vec<Image>,
    /// Ready for the id behind it.
    chain: BlockChain,
}

impl Turn {
    fn bytes(&self) -> usize {
        let images: usize = self.images.iter().map(|image| image.data.len() + size_of::<Image>()).sum();
        let outlines: usize = self.outlines.iter().map(Outline::size).sum();
        TURN_BYTES + self.packed.len() + self.hashes.len() * 16 + self.key.to_le_bytes().len() + images + outlines
    }
}

impl Drop for Turn {
    /// A long conversation is a long chain: dropped link by link, not by recursion.
    fn drop(&mut self) {
        let mut next = self.before.take();
        while let Some(turn) = next {
            next = Arc::into_inner(turn).and_then(|mut turn| turn.before.take());
        }
    }
}

/// The cache of one router.
pub struct ConversationCache {
    turns: Generations<Arc<Turn>>,
    /// Their token IDs, packed.
    texts: Generations<Bytes>,
    seed: u64,
}

impl ConversationCache {
    /// Holds at most `max_bytes`: three quarters for conversations, one for texts.
    pub fn new(max_bytes: usize) -> Self {
        Self {
            turns: Generations::new(max_bytes / 4 * 3),
            texts: Generations::new(max_bytes / 4),
            seed: rand::random(),
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.turns.bytes() + self.texts.bytes()
    }

    /// The prompt of a conversation. `None`: it is to be read and judged as a whole.
    pub fn encode(&self, tokenizer: &Tokenizer, written: &ChatInput<'_>) -> Option<EncodedPrompt> {
        let keys = self.keys(written);
        let mut known = self.longest_known(&keys, written);
        let growth = loop {
            match self.read_behind(known.as_ref(), written) {
                Ok(growth) => break growth,
                Err(NotGrown::WithinRun) => known = known?.before.clone(),
                Err(NotGrown::Invalid(_) | NotGrown::Json(_) | NotGrown::Stopped(_)) => return None,
            }
        };
        let salt = self.link(self.link(0, written.model.as_bytes()), written.salt.as_ref());
        let texts = Texts { tokenizer, cache: self, salt, new: RefCell::default() };
        let mut prompt = Prompt::with(known.as_ref());
        let reused_tokens = prompt.ids.len();
        let mut last = known;
        for run in &growth.runs {
            let encoded = growth.encode(run, tokenizer, &texts, &DataUrls).ok()?;
            if !encoded.images.is_empty() && !written.takes_images {
                return None;
            }
            let begin = prompt.ids.len();
            let images: Vec<Image> =
                encoded.images.iter().map(|image| super::shown_image(image, begin, written.keys)).collect();
            let mut chain = last
                .as_ref()
                .map(|turn| turn.chain.clone())
                .unwrap_or_else(|| BlockChain::new(written.keys, written.salt.as_ref(), Vec::new()));
            chain.expect_images(super::image_spans(&images));
            let hashes: Box<[BlockHash]> = chain.extend(&encoded.token_ids).iter().map(BlockDigest::hash).collect();
            let packed = self.pack(&encoded.token_ids, texts.new.take());
            prompt.ids.push(&packed, encoded.token_ids.len());
            prompt.hashes.extend_from_slice(&hashes);
            prompt.images.extend_from_slice(&images);
            let messages = last.as_ref().map_or(0, |turn| turn.messages) + run.outlines.len();
            let turn = Arc::new(Turn {
                before: last.take(),
                key: *keys.get(messages)?,
                messages,
                tokens: prompt.ids.len(),
                outlines: run.outlines.clone(),
                packed,
                count: encoded.token_ids.len(),
                hashes,
                images,
                chain,
            });
            if !run.is_continued {
                self.turns.insert(turn.key, Arc::clone(&turn), turn.bytes());
            }
            last = Some(turn);
        }
        let Prompt { ids, hashes, images } = prompt;
        Some(EncodedPrompt { ids: ids.finish(), images, hashes, reused_tokens })
    }

    /// Packs the token IDs of a turn, and keeps those of its texts that were not known.
    fn pack(&self, token_ids: &[u32], new: Vec<(u128, Range<usize>)>) -> Bytes {
        let (packed, ranges) = pack_with_parts(token_ids, new.iter().map(|(_, range)| range.clone()));
        for ((key, _), range) in new.into_iter().zip(ranges) {
            let bytes = TURN_BYTES + range.len();
            // a slice holds the whole turn: only what is most of it may do that, or a small text would hold a large turn
            let most = range.len() * 2 >= packed.len();
            let text = if most { packed.slice(range) } else { Bytes::copy_from_slice(&packed[range]) };
            self.texts.insert(key, text, bytes);
        }
        packed
    }

    /// Number `n` is the key of the first `n` messages.
    fn keys(&self, written: &ChatInput<'_>) -> Vec<u128> {
        let mut keys = Vec::with_capacity(written.messages.len() + 1);
        let tools = written.tools.map_or("", RawValue::get);
        let mut key = self.link(0, written.model.as_bytes());
        key = self.link(key, written.salt.as_ref());
        // what is known under other names may break the rule of these
        key ^= written.function_names as u128;
        key = self.link(key, tools.as_bytes());
        keys.push(key);
        for message in written.messages {
            key = self.link(key, message.get().as_bytes());
            keys.push(key);
        }
        keys
    }

    fn link(&self, before: u128, part: &[u8]) -> u128 {
        let mut both = [0; 32];
        both[..16].copy_from_slice(&before.to_le_bytes());
        both[16..].copy_from_slice(&xxh3_128_with_seed(part, self.seed).to_le_bytes());
        xxh3_128_with_seed(&both, self.seed)
    }

    /// The last turn of the longest known path. The whole path is in use with it.
    fn longest_known(&self, keys: &[u128], written: &ChatInput<'_>) -> Option<Arc<Turn>> {
        // the message that the model continues with is never a known turn
        let most = written.messages.len() - usize::from(written.continue_final_message && !written.messages.is_empty());
        let (turn, mut aged) = keys.get(1..=most)?.iter().rev().find_map(|key| self.turns.get(*key))?;
        let mut path = turn.before.as_ref();
        while let (true, Some(before)) = (aged, path) {
            aged = match self.turns.get(before.key) {
                Some((_, was_old)) => was_old,
                None => {
                    self.turns.insert(before.key, Arc::clone(before), before.bytes());
                    true
                }
            };
            path = before.before.as_ref();
        }
        Some(turn)
    }

    fn read_behind(&self, known: Option<&Arc<Turn>>, written: &ChatInput<'_>) -> Result<Growth, NotGrown> {
        let mut path = Vec::new();
        let mut turn = known;
        while let Some(one) = turn {
            path.push(one);
            turn = one.before.as_ref();
        }
        let outlines: Vec<&Outline> = path.iter().rev().flat_map(|turn| &turn.outlines).collect();
        let behind = written.messages.iter().skip(outlines.len()).map(|message| message.get());
        Growth::read(&outlines, behind, written.tools.map(RawValue::get), written.options())
    }
}

/// A prompt while it is put together.
struct Prompt {
    ids: Packer,
    hashes: Vec<BlockHash>,
    images: Vec<Image>,
}

impl Prompt {
    fn with(known: Option<&Arc<Turn>>) -> Self {
        let mut path = Vec::new();
        let mut turn = known;
        while let Some(one) = turn {
            path.push(one);
            turn = one.before.as_ref();
        }
        // room for a response's worth of new token IDs, so that the copy is made once
        let tokens = known.map_or(0, |turn| turn.tokens) + 1024;
        let hashes = Vec::with_capacity(tokens / BLOCK_TOKENS);
        let mut prompt = Self { ids: Packer::default(), hashes, images: Vec::new() };
        for turn in path.into_iter().rev() {
            prompt.ids.push(&turn.packed, turn.count);
            prompt.hashes.extend_from_slice(&turn.hashes);
            prompt.images.extend_from_slice(&turn.images);
        }
        prompt
    }
}

/// A tokenizer that remembers texts.
struct Texts<'a> {
    tokenizer: &'a Tokenizer,
    cache: &'a ConversationCache,
    /// Of model, tenant and router: models differ in their tokenizers.
    salt: u128,
    /// Texts that were not known: their keys, and where their token IDs stand in the turn.
    new: RefCell<Vec<(u128, Range<usize>)>>,
}

impl TextEncoder for Texts<'_> {
    fn encode_into(&self, text: &str, token_ids: &mut Vec<u32>) -> Result<(), Stopped> {
        if text.len() < SHORTEST_KEPT_TEXT {
            return self.tokenizer.encode_within_budget(text, token_ids);
        }
        let key = self.salt ^ xxh3_128_with_seed(text.as_bytes(), self.cache.seed);
        if let Some((packed, _)) = self.cache.texts.get(key) {
            token_ids.extend(unpack(&packed));
            return Ok(());
        }
        let begin = token_ids.len();
        self.tokenizer.encode_within_budget(text, token_ids)?;
        self.new.borrow_mut().push((key, begin..token_ids.len()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use bora_common::{conversation::Json, secret::CacheScope};
    use serde::Deserialize;

    use super::*;
    use crate::encode::conversation;

    const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures");

    fn tokenizer() -> &'static Tokenizer {
        static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
        TOKENIZER.get_or_init(|| {
            Tokenizer::from_file(format!("{FIXTURES}/tokenizers/tekken-v13-8k.json")).expect("a tokenizer")
        })
    }

    #[derive(Deserialize)]
    struct Request<'a> {
        #[serde(borrow)]
        messages: Option<Vec<&'a RawValue>>,
        #[serde(borrow)]
        tools: Option<&'a RawValue>,
        #[serde(default)]
        continue_final_message: Option<bool>,
    }

    #[derive(Deserialize)]
    struct Line<'a> {
        #[serde(borrow)]
        request: &'a RawValue,
    }

    impl Line<'_> {
        /// The random conversations are texts within the JSON. Images become data URLs.
        fn request(&self) -> String {
            let text = match serde_json::from_str::<String>(self.request.get()) {
                Ok(text) => text,
                Err(_) => self.request.get().to_string(),
            };
            text.replace("fixture://images/wide_600x50.png", IMAGE)
        }
    }

    /// One pixel.
    const IMAGE: &str = "data:image/png;base64,\
        iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";

    fn keys() -> &'static ClusterKeys {
        static KEYS: OnceLock<ClusterKeys> = OnceLock::new();
        KEYS.get_or_init(ClusterKeys::random)
    }

    fn written<'a>(messages: &'a [&'a RawValue], tools: Option<&'a RawValue>) -> ChatInput<'a> {
        ChatInput {
            model: "m",
            messages,
            tools,
            keys: keys(),
            salt: keys().cache_salt(CacheScope::Anonymous, ""),
            continue_final_message: false,
            function_names: FunctionNames::Reference,
            takes_images: true,
            limits: ConversationLimits::default(),
        }
    }

    fn whole(written: &ChatInput<'_>) -> Option<EncodedPrompt> {
        let messages: Result<Vec<Json<'_>>, _> =
            written.messages.iter().map(|message| Json::parse(message.get())).collect();
        conversation(tokenizer(), &Json::Array(messages.ok()?), written).ok()
    }

    /// Every conversation of the fixtures, grown message by message: the prompt is that of reading all of it,
    /// and what can't be read as a whole has none.
    #[test]
    fn grown_conversations_have_the_prompts_of_whole_ones() {
        let cache = ConversationCache::new(64 << 20);
        let (mut same, mut refused, mut reused) = (0, 0, 0);
        for file in ["golden_encodings.jsonl", "golden_rejections.jsonl", "random_conversations.jsonl"] {
            let lines = std::fs::read_to_string(format!("{FIXTURES}/{file}")).expect("a fixture");
            for line in lines.lines() {
                let line: Line<'_> = serde_json::from_str(line).expect("a golden");
                let text = line.request();
                let Ok(request) = serde_json::from_str::<Request<'_>>(&text) else {
                    continue;
                };
                let messages = request.messages.unwrap_or_default();
                let first = messages.len().saturating_sub(40);
                for end in first..=messages.len() {
                    let all = end == messages.len();
                    let continued = all && request.continue_final_message == Some(true);
                    let written =
                        ChatInput { continue_final_message: continued, ..written(&messages[..end], request.tools) };
                    let expected = whole(&written);
                    let got = cache.encode(tokenizer(), &written);
                    refused += usize::from(expected.is_none());
                    let (Some(expected), Some(got)) = (&expected, &got) else {
                        assert_eq!(expected.is_some(), got.is_some(), "{}", line.request.get());
                        continue;
                    };
                    assert_eq!(got.ids, expected.ids, "{}", line.request.get());
                    assert_eq!(got.hashes, expected.hashes);
                    assert_eq!(got.images, expected.images);
                    same += 1;
                    reused += usize::from(got.reused_tokens > 0);
                }
            }
        }
        assert!(same > 1000 && refused > 100 && reused > 500, "{same} {refused} {reused}");
    }

    fn raw(json: &str) -> &RawValue {
        serde_json::from_str(json).expect("JSON")
    }

    #[test]
    fn a_message_more_costs_that_message_and_tenants_share_nothing() {
        let cache = ConversationCache::new(1 << 20);
        let long = format!(r#"{{"role": "user", "content": "{}"}}"#, "one two three ".repeat(300));
        let mut messages = vec![raw(&long)];
        let first = cache.encode(tokenizer(), &written(&messages, None)).expect("a prompt");
        assert_eq!(first.reused_tokens, 0);
        messages.push(raw(r#"{"role": "assistant", "content": "I see"}"#));
        messages.push(raw(r#"{"role": "user", "content": "Go on"}"#));
        let second = cache.encode(tokenizer(), &written(&messages, None)).expect("a prompt");
        assert_eq!(second.reused_tokens, first.ids.len());
        let again = cache.encode(tokenizer(), &written(&messages, None)).expect("a prompt");
        assert_eq!(again.reused_tokens, second.ids.len());
        assert_eq!(again.ids, second.ids);
        for other in [
            ChatInput { salt: keys().cache_salt(CacheScope::Tenant("tenant"), ""), ..written(&messages, None) },
            ChatInput { model: "other", ..written(&messages, None) },
            written(&messages, Some(raw("[]"))),
        ] {
            let prompt = cache.encode(tokenizer(), &other).expect("a prompt");
            assert_eq!((prompt.reused_tokens, &prompt.ids), (0, &second.ids));
        }
    }

    /// Two models with tokenizers of their own, one long text: neither gets the other's token IDs.
    #[test]
    fn models_share_no_text() {
        let cache = ConversationCache::new(1 << 20);
        let other = Tokenizer::from_file(format!("{FIXTURES}/tokenizers/tekken-v13.json")).expect("a tokenizer");
        let long = format!(r#"{{"role": "user", "content": "{}"}}"#, "incandescent chrysanthemums ".repeat(30));
        let messages = vec![raw(&long)];
        let first = cache.encode(tokenizer(), &written(&messages, None)).expect("a prompt");
        let second = ChatInput { model: "other", ..written(&messages, None) };
        let second = cache.encode(&other, &second).expect("a prompt");
        assert_ne!(first.ids, second.ids);
        let text = |tokenizer: &Tokenizer, prompt: &EncodedPrompt| {
            tokenizer.decode(&prompt.ids.iter().collect::<Vec<_>>(), true)
        };
        assert_eq!(text(&other, &second), text(tokenizer(), &first));
    }

    /// Neighbours of one role become one part of the prompt: a turn that continues is not the one known.
    #[test]
    fn a_turn_that_goes_on_is_read_again() {
        let cache = ConversationCache::new(1 << 20);
        let messages = [
            raw(r#"{"role": "user", "content": "a"}"#),
            raw(r#"{"role": "user", "content": "b"}"#),
            raw(r#"{"role": "user", "content": "c"}"#),
        ];
        for end in 1..=3 {
            let written = written(&messages[..end], None);
            let prompt = cache.encode(tokenizer(), &written).expect("a prompt");
            assert_eq!(prompt.ids, whole(&written).expect("a prompt").ids);
        }
    }

    /// A client that rewrites the past: its texts are known, and give the token IDs that the tokenizer gave.
    #[test]
    fn texts_are_known_when_their_past_is_not() {
        let cache = ConversationCache::new(1 << 20);
        let message = |role: &str, number: u32| {
            let text = format!("line {number}\\n").repeat(40);
            format!(r#"{{"role": "{role}", "content": "{text}"}}"#)
        };
        let mut texts = Vec::new();
        for first in [1, 2, 3, 2] {
            let messages = [message("user", first), message("assistant", 7), message("user", 8)];
            let messages: Vec<&RawValue> = messages.iter().map(|message| raw(message)).collect();
            let written = written(&messages, None);
            let prompt = cache.encode(tokenizer(), &written).expect("a prompt");
            assert_eq!(prompt.ids, whole(&written).expect("a prompt").ids);
            texts.push(cache.texts.bytes());
        }
        let one = texts[0] / 3;
        assert_eq!(texts, [3 * one, 4 * one, 5 * one, 5 * one], "one of three texts is new, then none");
    }

    #[test]
    fn many_long_conversations_stay_within_the_bound() {
        let bound = 256 << 10;
        let cache = ConversationCache::new(bound);
        for number in 0..200 {
            let text = format!(r#"{{"role": "user", "content": "{number} {}"}}"#, "four five ".repeat(500));
            let completion = format!(r#"{{"role": "assistant", "content": "{number}"}}"#);
            let (text, completion) = (raw(&text), raw(&completion));
            let messages: Vec<&RawValue> = (0..9).map(|at| if at % 2 == 0 { text } else { completion }).collect();
            cache.encode(tokenizer(), &written(&messages, None)).expect("a prompt");
            assert!(cache.bytes() <= bound, "{}", cache.bytes());
        }
        assert!(cache.bytes() > bound / 4);
    }
}
