//! The body of a generation or tokenize request, read once and typed from the bytes.
//!
//! One struct serves all endpoints: they share nearly every field. Every field may be absent or `null`.
//! A field of a wrong type is an error that names it; a field that nobody knows is counted and ignored.
//! Values are not judged here: ranges and limits are in [`params`](super::params). Messages and tools stay
//! as they came, because their numbers and keys go into the prompt exactly as they were written.

use std::{borrow::Cow, cell::Cell, fmt};

use bora_common::conversation::{Json, JsonError};
use serde::{
    Deserialize,
    de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Value, value::RawValue};

use super::error::ApiError;

/// All fields that mean something to Bora.
#[derive(Debug, Default)]
#[allow(missing_docs)] // the names are OpenAI's and vLLM's
pub struct Body<'de> {
    pub model: Option<String>,
    pub messages: Option<Messages<'de>>,
    pub tools: Option<&'de RawValue>,
    pub tool_choice: Option<Value>,
    pub parallel_tool_calls: Option<bool>,
    pub prompt: Option<Prompt>,
    pub suffix: Option<Value>,
    pub tokens: Option<Vec<u32>>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<Integer>,
    pub min_p: Option<f64>,
    pub max_tokens: Option<Integer>,
    pub max_completion_tokens: Option<Integer>,
    pub min_tokens: Option<Integer>,
    pub stop: Option<OneOrMany>,
    pub stop_token_ids: Option<Vec<u32>>,
    pub include_stop_str_in_output: Option<bool>,
    pub ignore_eos: Option<bool>,
    pub seed: Option<Integer>,
    pub n: Option<Integer>,
    pub best_of: Option<Integer>,
    pub use_beam_search: Option<bool>,
    pub presence_penalty: Option<f64>,
    pub frequency_penalty: Option<f64>,
    pub repetition_penalty: Option<f64>,
    pub logit_bias: Option<Vec<(String, f64)>>,
    pub logprobs: Option<LogprobsField>,
    pub top_logprobs: Option<Integer>,
    pub prompt_logprobs: Option<Integer>,
    pub echo: Option<bool>,
    pub skip_special_tokens: Option<bool>,
    pub return_token_ids: Option<bool>,
    pub return_tokens_as_token_ids: Option<bool>,
    pub return_token_strs: Option<bool>,
    pub add_generation_prompt: Option<bool>,
    pub continue_final_message: Option<bool>,
    pub add_special_tokens: Option<bool>,
    pub cache_salt: Option<String>,
    pub priority: Option<PriorityField>,
    /// Fields that ask for a form of the answer, in the order they came.
    pub structured: Vec<(&'static str, Value)>,
    /// Fields that would change the answer and are not served, in the order they came.
    pub refused: Vec<(&'static str, Value)>,
    /// Fields that were ignored because nobody knows them.
    pub unknown: u32,
}

/// Fields that say what an answer has to look like.
const STRUCTURED: [&str; 6] =
    ["response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"];

/// Fields that ask for something which silence would not do justice to.
const REFUSED: [&str; 6] = ["structural_tag", "reasoning_effort", "functions", "function_call", "modalities", "audio"];

/// Fields that are known and mean nothing here.
const WITHOUT_MEANING: [&str; 13] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "safe_prompt",
    "prediction",
    "prompt_mode",
    "request_id",
    "length_penalty",
    "spaces_between_special_tokens",
];

impl<'de> Body<'de> {
    /// Reads a body.
    pub fn parse(bytes: &'de [u8]) -> Result<Self, ApiError> {
        let field = Cell::new("");
        let mut deserializer = serde_json::Deserializer::from_slice(bytes);
        let parsed = BodySeed { field: &field }
            .deserialize(&mut deserializer)
            .and_then(|body| deserializer.end().map(|()| body));
        parsed.map_err(|error| {
            let text = error.to_string();
            if error.classify() != serde_json::error::Category::Data {
                return ApiError::malformed(format!("The body is not valid JSON: {text}."));
            }
            let reason = text.rfind(" at line ").map_or(text.as_str(), |at| &text[..at]);
            match field.get() {
                "" => ApiError::malformed(format!("The body must be a JSON object: {reason}.")),
                name => ApiError::invalid(name, format!("`{name}`: {reason}.")),
            }
        })
    }
}

struct BodySeed<'a> {
    field: &'a Cell<&'static str>,
}

impl<'de> DeserializeSeed<'de> for BodySeed<'_> {
    type Value = Body<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Body<'de>, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for BodySeed<'_> {
    type Value = Body<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Body<'de>, A::Error> {
        let mut body = Body::default();
        let at = self.field;
        while let Some(Key(key)) = map.next_key()? {
            match &*key {
                "model" => body.model = field(&mut map, at, "model")?,
                "messages" => body.messages = field(&mut map, at, "messages")?,
                "tools" => body.tools = field(&mut map, at, "tools")?,
                "tool_choice" => body.tool_choice = field(&mut map, at, "tool_choice")?,
                "parallel_tool_calls" => body.parallel_tool_calls = field(&mut map, at, "parallel_tool_calls")?,
                "prompt" => body.prompt = field(&mut map, at, "prompt")?,
                "suffix" => body.suffix = field(&mut map, at, "suffix")?,
                "tokens" => body.tokens = field(&mut map, at, "tokens")?,
                "stream" => body.stream = field(&mut map, at, "stream")?,
                "stream_options" => body.stream_options = field(&mut map, at, "stream_options")?,
                "temperature" => body.temperature = field(&mut map, at, "temperature")?,
                "top_p" => body.top_p = field(&mut map, at, "top_p")?,
                "top_k" => body.top_k = field(&mut map, at, "top_k")?,
                "min_p" => body.min_p = field(&mut map, at, "min_p")?,
                "max_tokens" => body.max_tokens = field(&mut map, at, "max_tokens")?,
                "max_completion_tokens" => body.max_completion_tokens = field(&mut map, at, "max_completion_tokens")?,
                "min_tokens" => body.min_tokens = field(&mut map, at, "min_tokens")?,
                "stop" => body.stop = field(&mut map, at, "stop")?,
                "stop_token_ids" => body.stop_token_ids = field(&mut map, at, "stop_token_ids")?,
                "include_stop_str_in_output" => {
                    body.include_stop_str_in_output = field(&mut map, at, "include_stop_str_in_output")?;
                }
                "ignore_eos" => body.ignore_eos = field(&mut map, at, "ignore_eos")?,
                // Mistral's name for it
                "seed" | "random_seed" => body.seed = field(&mut map, at, "seed")?,
                "n" => body.n = field(&mut map, at, "n")?,
                "best_of" => body.best_of = field(&mut map, at, "best_of")?,
                "use_beam_search" => body.use_beam_search = field(&mut map, at, "use_beam_search")?,
                "presence_penalty" => body.presence_penalty = field(&mut map, at, "presence_penalty")?,
                "frequency_penalty" => body.frequency_penalty = field(&mut map, at, "frequency_penalty")?,
                "repetition_penalty" => body.repetition_penalty = field(&mut map, at, "repetition_penalty")?,
                "logit_bias" => {
                    body.logit_bias = field::<Biases, A>(&mut map, at, "logit_bias")?.map(|biases| biases.0);
                }
                "logprobs" => body.logprobs = field(&mut map, at, "logprobs")?,
                "top_logprobs" => body.top_logprobs = field(&mut map, at, "top_logprobs")?,
                "prompt_logprobs" => body.prompt_logprobs = field(&mut map, at, "prompt_logprobs")?,
                "echo" => body.echo = field(&mut map, at, "echo")?,
                "skip_special_tokens" => body.skip_special_tokens = field(&mut map, at, "skip_special_tokens")?,
                "return_token_ids" => body.return_token_ids = field(&mut map, at, "return_token_ids")?,
                "return_tokens_as_token_ids" => {
                    body.return_tokens_as_token_ids = field(&mut map, at, "return_tokens_as_token_ids")?;
                }
                "return_token_strs" => body.return_token_strs = field(&mut map, at, "return_token_strs")?,
                "add_generation_prompt" => body.add_generation_prompt = field(&mut map, at, "add_generation_prompt")?,
                "continue_final_message" => {
                    body.continue_final_message = field(&mut map, at, "continue_final_message")?;
                }
                "add_special_tokens" => body.add_special_tokens = field(&mut map, at, "add_special_tokens")?,
                "priority" => body.priority = field(&mut map, at, "priority")?,
                "cache_salt" => body.cache_salt = field(&mut map, at, "cache_salt")?,
                other => {
                    if let Some(name) = REFUSED.iter().find(|name| **name == other) {
                        if let Some(value) = field::<Value, A>(&mut map, at, name)? {
                            body.refused.push((name, value));
                        }
                    } else if let Some(name) = STRUCTURED.iter().find(|name| **name == other) {
                        if let Some(value) = field::<Value, A>(&mut map, at, name)? {
                            body.structured.push((name, value));
                        }
                    } else {
                        at.set("");
                        body.unknown += u32::from(!WITHOUT_MEANING.contains(&other));
                        map.next_value::<IgnoredAny>()?;
                    }
                }
            }
        }
        at.set("");
        Ok(body)
    }
}

/// Reads one value and remembers its name for the error.
fn field<'de, T: Deserialize<'de>, A: MapAccess<'de>>(
    map: &mut A,
    at: &Cell<&'static str>,
    name: &'static str,
) -> Result<Option<T>, A::Error> {
    at.set(name);
    map.next_value()
}

/// `messages`: each as it was written, found in one pass over the body.
#[derive(Debug)]
pub enum Messages<'de> {
    /// An array.
    List(Vec<&'de RawValue>),
    /// Something else, of which only the kind is kept: the conversation's reader words the error.
    Other(Json<'static>),
}

impl<'de> Messages<'de> {
    /// The messages; none if they are no array.
    pub fn list(&self) -> &[&'de RawValue] {
        match self {
            Messages::List(list) => list,
            Messages::Other(_) => &[],
        }
    }

    /// The whole value.
    pub fn to_json(&self) -> Result<Json<'de>, JsonError> {
        match self {
            Messages::List(list) => {
                Ok(Json::Array(list.iter().map(|message| Json::parse(message.get())).collect::<Result<_, _>>()?))
            }
            Messages::Other(other) => Ok(other.clone()),
        }
    }
}

impl<'de> Deserialize<'de> for Messages<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MessagesVisitor;
        impl<'de> Visitor<'de> for MessagesVisitor {
            type Value = Messages<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Messages<'de>, A::Error> {
                let mut list = Vec::new();
                while let Some(message) = seq.next_element()? {
                    list.push(message);
                }
                Ok(Messages::List(list))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Messages<'de>, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Messages::Other(Json::Object(Vec::new())))
            }

            fn visit_str<E>(self, _: &str) -> Result<Messages<'de>, E> {
                Ok(Messages::Other(Json::String("".into())))
            }

            fn visit_bool<E>(self, value: bool) -> Result<Messages<'de>, E> {
                Ok(Messages::Other(Json::Bool(value)))
            }

            fn visit_i64<E>(self, _: i64) -> Result<Messages<'de>, E> {
                Ok(Messages::Other(Json::Float(0.0)))
            }

            fn visit_u64<E>(self, _: u64) -> Result<Messages<'de>, E> {
                Ok(Messages::Other(Json::Float(0.0)))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Messages<'de>, E> {
                Ok(Messages::Other(Json::Float(value)))
            }
        }
        deserializer.deserialize_any(MessagesVisitor)
    }
}

/// A key, borrowed from the body where it has no escapes.
struct Key<'de>(Cow<'de, str>);

impl<'de> Deserialize<'de> for Key<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;
        impl<'de> Visitor<'de> for KeyVisitor {
            type Value = Key<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }

            fn visit_borrowed_str<E>(self, key: &'de str) -> Result<Key<'de>, E> {
                Ok(Key(Cow::Borrowed(key)))
            }

            fn visit_str<E>(self, key: &str) -> Result<Key<'de>, E> {
                Ok(Key(Cow::Owned(key.to_string())))
            }
        }
        deserializer.deserialize_str(KeyVisitor)
    }
}

/// An integer, also written as `3.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Integer(pub i64);

impl<'de> Deserialize<'de> for Integer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct IntegerVisitor;
        impl Visitor<'_> for IntegerVisitor {
            type Value = Integer;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an integer of 64 bits")
            }

            fn visit_i64<E>(self, value: i64) -> Result<Integer, E> {
                Ok(Integer(value))
            }

            fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Integer, E> {
                let unexpected = serde::de::Unexpected::Unsigned(value);
                i64::try_from(value).map(Integer).map_err(|_| E::invalid_value(unexpected, &self))
            }

            fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Integer, E> {
                if value.fract() == 0.0 && value.abs() < 9e15 {
                    return Ok(Integer(value as i64));
                }
                Err(E::invalid_type(serde::de::Unexpected::Float(value), &self))
            }
        }
        deserializer.deserialize_any(IntegerVisitor)
    }
}

/// A text or a list of texts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OneOrMany(pub Vec<String>);

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextsVisitor;
        impl<'de> Visitor<'de> for TextsVisitor {
            type Value = OneOrMany;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or an array of strings")
            }

            fn visit_str<E>(self, text: &str) -> Result<OneOrMany, E> {
                Ok(OneOrMany(vec![text.to_string()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<OneOrMany, A::Error> {
                let mut texts = Vec::new();
                while let Some(text) = seq.next_element()? {
                    texts.push(text);
                }
                Ok(OneOrMany(texts))
            }
        }
        deserializer.deserialize_any(TextsVisitor)
    }
}

/// `logprobs`: a flag in chat, a number in completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged, expecting = "a boolean (chat) or an integer (completions)")]
pub enum LogprobsField {
    /// Chat.
    Flag(bool),
    /// Completions.
    Count(i64),
}

/// `priority`: a class by name, or vLLM's number (the higher, the later).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged, expecting = "\"interactive\", \"batch\" or an integer")]
pub enum PriorityField {
    /// A class.
    Name(String),
    /// Above 0: batch.
    Number(i64),
}

/// `stream_options`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct StreamOptions {
    /// A last chunk with the usage.
    pub include_usage: Option<bool>,
    /// The usage so far in every chunk (vLLM).
    pub continuous_usage_stats: Option<bool>,
}

/// `logit_bias`.
struct Biases(Vec<(String, f64)>);

impl<'de> Deserialize<'de> for Biases {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BiasVisitor;
        impl<'de> Visitor<'de> for BiasVisitor {
            type Value = Biases;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from token ids to numbers")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Biases, A::Error> {
                let mut biases = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    biases.push(entry);
                }
                Ok(Biases(biases))
            }
        }
        deserializer.deserialize_map(BiasVisitor)
    }
}

/// `prompt` of a completion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// One text.
    Text(String),
    /// Several.
    Texts(Vec<String>),
    /// One list of token ids.
    Ids(Vec<u32>),
    /// Several.
    IdLists(Vec<Vec<u32>>),
}

enum PromptElement {
    Text(String),
    Id(u32),
    Ids(Vec<u32>),
}

impl<'de> Deserialize<'de> for PromptElement {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ElementVisitor;
        impl<'de> Visitor<'de> for ElementVisitor {
            type Value = PromptElement;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id or an array of token ids")
            }

            fn visit_str<E>(self, text: &str) -> Result<PromptElement, E> {
                Ok(PromptElement::Text(text.to_string()))
            }

            fn visit_string<E>(self, text: String) -> Result<PromptElement, E> {
                Ok(PromptElement::Text(text))
            }

            fn visit_u64<E: serde::de::Error>(self, id: u64) -> Result<PromptElement, E> {
                let unexpected = serde::de::Unexpected::Unsigned(id);
                u32::try_from(id).map(PromptElement::Id).map_err(|_| E::invalid_value(unexpected, &self))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<PromptElement, A::Error> {
                let mut ids = Vec::new();
                while let Some(id) = seq.next_element()? {
                    ids.push(id);
                }
                Ok(PromptElement::Ids(ids))
            }
        }
        deserializer.deserialize_any(ElementVisitor)
    }
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PromptVisitor;
        impl<'de> Visitor<'de> for PromptVisitor {
            type Value = Prompt;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, an array of strings, an array of token ids or an array of such arrays")
            }

            fn visit_str<E>(self, text: &str) -> Result<Prompt, E> {
                Ok(Prompt::Text(text.to_string()))
            }

            fn visit_string<E>(self, text: String) -> Result<Prompt, E> {
                Ok(Prompt::Text(text))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Prompt, A::Error> {
                let mixed = || A::Error::custom("texts, token ids and arrays of token ids can't be mixed");
                match seq.next_element()? {
                    None => Err(A::Error::custom("an empty array holds no prompt")),
                    Some(PromptElement::Text(first)) => {
                        let mut texts = vec![first];
                        while let Some(element) = seq.next_element()? {
                            let PromptElement::Text(text) = element else {
                                return Err(mixed());
                            };
                            texts.push(text);
                        }
                        Ok(Prompt::Texts(texts))
                    }
                    Some(PromptElement::Id(first)) => {
                        let mut ids = vec![first];
                        while let Some(element) = seq.next_element()? {
                            let PromptElement::Id(id) = element else {
                                return Err(mixed());
                            };
                            ids.push(id);
                        }
                        Ok(Prompt::Ids(ids))
                    }
                    Some(PromptElement::Ids(first)) => {
                        let mut lists = vec![first];
                        while let Some(element) = seq.next_element()? {
                            let PromptElement::Ids(ids) = element else {
                                return Err(mixed());
                            };
                            lists.push(ids);
                        }
                        Ok(Prompt::IdLists(lists))
                    }
                }
            }
        }
        deserializer.deserialize_any(PromptVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(body: &str) -> (Option<String>, String) {
        let error = Body::parse(body.as_bytes()).expect_err(body);
        (error.param, error.message)
    }

    #[test]
    fn null_is_absent_and_unknown_fields_are_counted() {
        let body =
            Body::parse(br#"{"model":"m","temperature":null,"max_tokens":3.0,"x":{"y":[1]},"user":"u","seed":-1}"#)
                .expect("valid");
        assert_eq!((body.model.as_deref(), body.temperature, body.unknown), (Some("m"), None, 1));
        assert_eq!((body.max_tokens, body.seed), (Some(Integer(3)), Some(Integer(-1))));
    }

    #[test]
    fn a_wrong_type_names_its_field() {
        for (body, param) in [
            (r#"{"temperature":"hot"}"#, "temperature"),
            (r#"{"model":7}"#, "model"),
            (r#"{"max_tokens":1.5}"#, "max_tokens"),
            (r#"{"stream":"yes"}"#, "stream"),
            (r#"{"stop":[1]}"#, "stop"),
            (r#"{"prompt":{"a":1}}"#, "prompt"),
            (r#"{"prompt":[1,"a"]}"#, "prompt"),
            (r#"{"prompt":[]}"#, "prompt"),
            (r#"{"prompt":[-4]}"#, "prompt"),
            (r#"{"logit_bias":[1]}"#, "logit_bias"),
            (r#"{"seed":99999999999999999999}"#, "seed"),
        ] {
            assert_eq!(error(body).0.as_deref(), Some(param), "{body}");
        }
    }

    #[test]
    fn what_is_no_json_object_names_no_field() {
        for body in ["", "[]", "3", "{", r#"{"model":"m"} x"#, r#"{"a":tru}"#, "{\"model\":\"\u{1}\"}"] {
            let (param, message) = error(body);
            assert_eq!(param, None, "{body}: {message}");
        }
    }

    #[test]
    fn prompts_have_four_forms() {
        let prompt = |text: &str| {
            let body = format!(r#"{{"prompt":{text}}}"#);
            Body::parse(body.as_bytes()).expect(text).prompt
        };
        assert_eq!(prompt(r#""a""#), Some(Prompt::Text("a".into())));
        assert_eq!(prompt(r#"["a","b"]"#), Some(Prompt::Texts(vec!["a".into(), "b".into()])));
        assert_eq!(prompt("[1,2]"), Some(Prompt::Ids(vec![1, 2])));
        assert_eq!(prompt("[[1],[2,3]]"), Some(Prompt::IdLists(vec![vec![1], vec![2, 3]])));
    }
}
