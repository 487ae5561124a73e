//! The body of a generation or tokenize request, read once and typed from the bytes.
//!
//! One struct serves all endpoints: they share nearly every field. What only one of them has, or means something else
//! by, is read in the same pass into [`OwnFields`]. Every field may be absent or `null`.
//! A field of a wrong type is an error that names it; a field that nobody knows is counted and ignored.
//! Values are not judged here: ranges and limits are in [`params`](super::params). Messages and tools stay
//! as they came, because their numbers and keys go into the prompt exactly as they were written.

use std::{cell::Cell, fmt, marker::PhantomData};

use serde::{
    Deserialize,
    de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor},
};
use serde_json::{Value, value::RawValue};

use super::{
    error::ApiError,
    fields::{Biases, Integer, Key, LogprobsField, Messages, Name, OneOrMany, PriorityField, Prompt, StreamOptions},
};

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
    pub prompt_cache_key: Option<Name>,
    pub user: Option<Name>,
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
const REFUSED: [&str; 14] = [
    "structural_tag",
    "reasoning_effort",
    "functions",
    "function_call",
    "modalities",
    "audio",
    "web_search_options",
    "bad_words",
    "allowed_token_ids",
    "truncate_prompt_tokens",
    "logits_processors",
    "chat_template",
    "documents",
    "prompt_embeds",
];

/// Fields that are known and mean nothing here.
const WITHOUT_MEANING: [&str; 12] = [
    "verbosity",
    "metadata",
    "store",
    "service_tier",
    "prompt_cache_retention",
    "safety_identifier",
    "safe_prompt",
    "prediction",
    "prompt_mode",
    "request_id",
    "length_penalty",
    "spaces_between_special_tokens",
];

/// The fields of one endpoint: they go before those that all share.
pub trait OwnFields<'de>: Default {
    /// Reads the value of `key` if it is one of these fields; `at` learns its name for the error.
    fn read<A: MapAccess<'de>>(&mut self, key: &str, map: &mut A, at: &Cell<&'static str>) -> Result<bool, A::Error>;
}

/// An endpoint without fields of its own.
impl<'de> OwnFields<'de> for () {
    fn read<A: MapAccess<'de>>(&mut self, _: &str, _: &mut A, _: &Cell<&'static str>) -> Result<bool, A::Error> {
        Ok(false)
    }
}

impl<'de> Body<'de> {
    /// Reads a body.
    pub fn parse(bytes: &'de [u8]) -> Result<Self, ApiError> {
        Self::parse_with::<()>(bytes).map(|(body, ())| body)
    }

    /// Reads a body and the fields of an endpoint.
    pub fn parse_with<Own: OwnFields<'de>>(bytes: &'de [u8]) -> Result<(Self, Own), ApiError> {
        let field = Cell::new("");
        let mut deserializer = serde_json::Deserializer::from_slice(bytes);
        let parsed = BodySeed { field: &field, own: PhantomData }
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

struct BodySeed<'a, Own> {
    field: &'a Cell<&'static str>,
    own: PhantomData<Own>,
}

impl<'de, Own: OwnFields<'de>> DeserializeSeed<'de> for BodySeed<'_, Own> {
    type Value = (Body<'de>, Own);

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, Own: OwnFields<'de>> Visitor<'de> for BodySeed<'_, Own> {
    type Value = (Body<'de>, Own);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut own = Own::default();
        let mut body = Body::default();
        let at = self.field;
        while let Some(Key(key)) = map.next_key()? {
            if own.read(&key, &mut map, at)? {
                continue;
            }
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
                "prompt_cache_key" => body.prompt_cache_key = field(&mut map, at, "prompt_cache_key")?,
                "user" => body.user = field(&mut map, at, "user")?,
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
        Ok((body, own))
    }
}

/// Reads one value and remembers its name for the error.
pub fn field<'de, T: Deserialize<'de>, A: MapAccess<'de>>(
    map: &mut A,
    at: &Cell<&'static str>,
    name: &'static str,
) -> Result<Option<T>, A::Error> {
    at.set(name);
    map.next_value()
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
