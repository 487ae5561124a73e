//! The body of a generation or tokenize request, parsed once into typed fields.
//!
//! One struct serves all endpoints, because they share nearly every field. Fields that only one endpoint has, or
//! interprets differently, are parsed in the same pass into a struct of their own. Every field may be absent or `null`.
//! A field of a wrong type is an error that names the field; a field that the operation does not support is counted and
//! ignored. Bounds are declared here and checked when a value is accessed ([`params`](super::params)). Messages and
//! tools stay unparsed, because their numbers and keys go into the prompt exactly as the client wrote them.

use std::{cell::Cell, fmt, marker::PhantomData};

use bora_common::cpu_budget::{self, Stage};
use schemars::{Schema, SchemaGenerator};
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::{Map, Value, json, value::RawValue};

use super::{
    bounds::{Biasing, FieldBounds, LogprobsForm, Numbers, Texts, at_least},
    declare::{
        Declared, Fields,
        Operation::{self, Chat, Completions, CountTokens, Detokenize, Messages as AgentMessages, Responses, Tokenize},
        Uses, fields, object, value,
    },
    error::ApiError,
    fields::{Biases, Integer, Key, LogprobsField, Messages, Name, OneOrMany, PriorityField, Prompt, StreamOptions},
    messages, responses,
};
use crate::openapi::requests;

const EVERYWHERE: Uses = Uses::of(&[Chat, Completions, Responses, AgentMessages, CountTokens, Tokenize, Detokenize]);
const GENERATION: Uses = Uses::of(&[Chat, Completions, Responses, AgentMessages]);
/// The operations that refuse unsupported fields by name.
const REFUSING: Uses = Uses::of(&[Chat, Completions, Responses, AgentMessages, Tokenize]);
const OWN_WORDS: Uses = Uses::of(&[Chat, Completions]);

/// Maximum bytes of a stop string; text of this length may be held back.
const MAX_STOP_BYTES: usize = 1024;
const MAX_CACHE_SALT_BYTES: usize = 256;
const MAX_BIASES: usize = 1024;

/// The maximum number and length of stop strings.
pub fn stops(limits: &FieldBounds<'_>) -> Texts {
    Texts { most: limits.options.max_stop_strings, bytes: MAX_STOP_BYTES }
}

fn choices(limits: &FieldBounds<'_>) -> std::ops::RangeInclusive<i64> {
    1..=i64::from(limits.options.max_choices)
}

fn alternatives(limits: &FieldBounds<'_>) -> std::ops::RangeInclusive<i64> {
    0..=i64::from(limits.options.max_logprobs)
}

/// The minimum of `max_tokens`: 0 only if a completion echoes its prompt or a message fills the cache.
fn output_tokens(limits: &FieldBounds<'_>) -> std::ops::RangeInclusive<i64> {
    at_least(if matches!(limits.operation, Completions | AgentMessages) { 0 } else { 1 })
}

fields! {
    /// All fields that Bora supports.
    #[allow(missing_docs)] // the names are OpenAI's and vLLM's; those that need an explanation have a comment
    pub struct Body<'de> {
        /// Fields that request a structured output, in the order of the body.
        pub structured: Vec<(&'static str, Value)>,
        /// Unsupported fields that would change the response, in the order of the body.
        pub refused: Vec<(&'static Refused, Value)>,
        /// Fields that were ignored because the operation does not support them.
        pub unknown: u32,
        /// Number of tools that were left out because a server would have to run them.
        pub left_out: u32,
        /// Whether the conversation itself defines tools besides `tools`.
        pub late_tools: bool,
    }

    /// Optional if exactly one model is served.
    model: String, EVERYWHERE;
    messages: Messages<'de> as {
        AgentMessages | CountTokens => requests::OneOrMore<messages::request::Message<'static>>,
        _ => requests::OneOrMore<requests::Message>,
    }, Uses::of(&[Chat, AgentMessages, CountTokens, Tokenize]).required(&[Chat, AgentMessages, CountTokens]);
    tools: &'de RawValue as Vec<requests::Tool>, Uses::of(&[Chat, Tokenize]);
    tool_choice: Value as requests::ToolChoice, Uses::of(&[Chat]);
    /// `false`: at most one call.
    parallel_tool_calls: bool, Uses::of(&[Chat, Responses, AgentMessages]);
    prompt: Prompt as { Tokenize => String, _ => Prompt, },
        Uses::of(&[Completions, Tokenize]).required(&[Completions]);
    /// Must be empty.
    suffix: Value as String, Uses::of(&[Completions]);
    tokens: Vec<u32>, Uses::of(&[Detokenize]).required(&[Detokenize]);
    stream: bool, GENERATION;
    stream_options: StreamOptions, OWN_WORDS;
    temperature: f64, GENERATION, within |_| (0.0..=2.0).into();
    top_p: f64, GENERATION, within |_| Numbers { range: 0.0..=1.0, above: true };
    /// -1 and 0: no limit.
    top_k: Integer, GENERATION, within |_| at_least(-1);
    min_p: f64, GENERATION, within |_| (0.0..=1.0).into();
    /// Maximum number of tokens to generate; reduced to the room that a conversation leaves.
    max_tokens: Integer, GENERATION.required(&[AgentMessages]), within output_tokens;
    /// Takes precedence over `max_tokens`.
    max_completion_tokens: Integer, GENERATION, within output_tokens;
    min_tokens: Integer, GENERATION, within |_| at_least(0);
    stop: OneOrMany, GENERATION, within stops;
    stop_token_ids: Vec<u32>, GENERATION, within |limits| limits.options.max_stop_strings;
    include_stop_str_in_output: bool, GENERATION;
    ignore_eos: bool, GENERATION;
    seed | "random_seed": Integer, GENERATION, within |_| i64::MIN..=i64::MAX;
    n: Integer, OWN_WORDS, within choices;
    /// Must equal `n`.
    best_of: Integer, OWN_WORDS, within choices;
    /// Must be `false`.
    use_beam_search: bool, REFUSING;
    presence_penalty: f64, GENERATION, within |_| (-2.0..=2.0).into();
    frequency_penalty: f64, GENERATION, within |_| (-2.0..=2.0).into();
    repetition_penalty: f64, GENERATION, within |_| (0.01..=10.0).into();
    /// Maps token IDs to biases that are added to their logits.
    logit_bias: Biases, GENERATION, within |_| Biasing { most: MAX_BIASES, range: -100..=100 };
    /// Whether to return logprobs (chat), or the number of alternatives (completions).
    logprobs: LogprobsField, OWN_WORDS, within |limits| match limits.operation {
        Completions => LogprobsForm::Count(limits.options.max_logprobs),
        _ => LogprobsForm::Flag,
    };
    top_logprobs: Integer, Uses::of(&[Chat, Responses]), within alternatives;
    prompt_logprobs: Integer, OWN_WORDS, within alternatives;
    /// Returns the prompt in front of the output.
    echo: bool, Uses::of(&[Completions]);
    skip_special_tokens: bool, GENERATION;
    return_token_ids: bool, OWN_WORDS;
    return_tokens_as_token_ids: bool, Uses::of(&[Chat, Completions, Responses]);
    return_token_strs: bool, Uses::of(&[Tokenize]);
    add_generation_prompt: bool, Uses::of(&[Chat, Tokenize]);
    /// The model continues the last message, which must be the assistant's.
    continue_final_message: bool, Uses::of(&[Chat, Tokenize]);
    add_special_tokens: bool, Uses::of(&[Completions, Tokenize]);
    /// Separates prefix caches.
    cache_salt: String, GENERATION, within |_| 1..=MAX_CACHE_SALT_BYTES;
    /// Accepted without effect: this model does not reason.
    reasoning_effort: String, REFUSING;
    /// Names the session, as a hint for placement.
    prompt_cache_key: Name, GENERATION;
    /// Names the session, as a hint for placement, if `prompt_cache_key` does not.
    user: Name, GENERATION;
    /// `interactive`, `batch`, or a number: above 0 is batch.
    priority: PriorityField, GENERATION;
}

/// Fields that request a structured output.
const STRUCTURED: [Declared; 6] = [
    Declared::new::<requests::ResponseFormat>("response_format", "", GENERATION),
    Declared::new::<Map<String, Value>>("guided_json", "A JSON schema that the answer keeps (vLLM's).", GENERATION),
    Declared::new::<String>("guided_regex", "A regular expression in Rust's syntax.", GENERATION),
    Declared::new::<Vec<String>>("guided_choice", "One of these texts.", GENERATION),
    Declared::new::<String>("guided_grammar", "In llguidance's variant of Lark.", GENERATION),
    Declared::new::<Map<String, Value>>(
        "structured_outputs",
        "vLLM's newer form: one of `json`, `regex`, `choice`, `grammar`, `json_object`.",
        GENERATION,
    ),
];

/// An unsupported field that must not be ignored silently, because it would change the response.
#[derive(Debug)]
pub struct Refused {
    /// Its name.
    pub name: &'static str,
    /// The values that are allowed because they have no effect.
    pub harmless: Harmless,
    /// The text after the field's name in the refusal.
    pub reason: &'static str,
}

/// Values without effect.
#[derive(Debug)]
pub enum Harmless {
    /// Only null.
    Null,
    /// One of these strings.
    Texts(&'static [&'static str]),
    /// An empty list.
    EmptyList,
    /// A list with no other entry than this.
    ListOf(&'static str),
}

impl Harmless {
    /// Whether `value` has no effect.
    pub fn includes(&self, value: &Value) -> bool {
        match self {
            Self::Null => value.is_null(),
            Self::Texts(texts) => value.as_str().is_some_and(|text| texts.contains(&text)),
            Self::EmptyList => value.as_array().is_some_and(Vec::is_empty),
            Self::ListOf(text) => value.as_array().is_some_and(|list| list.iter().all(|one| one == text)),
        }
    }

    fn schema(&self) -> Value {
        match self {
            Self::Null => json!({"type": "null"}),
            Self::Texts(texts) => {
                let texts = texts.iter().map(|text| json!(text));
                json!({"enum": texts.chain([Value::Null]).collect::<Vec<_>>()})
            }
            Self::EmptyList => json!({"type": ["array", "null"], "maxItems": 0}),
            Self::ListOf(text) => json!({"type": ["array", "null"], "items": {"const": text}}),
        }
    }
}

impl Refused {
    const fn new(name: &'static str, harmless: Harmless) -> Self {
        Self { name, harmless, reason: " is not supported." }
    }

    const fn because(mut self, reason: &'static str) -> Self {
        self.reason = reason;
        self
    }

    /// The refusal of the field.
    pub fn error(&self) -> ApiError {
        ApiError::invalid(self.name, format!("`{}`{}", self.name, self.reason))
    }
}

const USE_TOOLS: &str = " is not supported: use `tools` and `tool_choice`.";
const ONLY_TEXT: &str = ": only text is generated.";

static REFUSED: [Refused; 13] = [
    Refused::new("structural_tag", Harmless::Null),
    Refused::new("functions", Harmless::EmptyList).because(USE_TOOLS),
    Refused::new("function_call", Harmless::Texts(&["none", "auto"])).because(USE_TOOLS),
    Refused::new("modalities", Harmless::ListOf("text")).because(ONLY_TEXT),
    Refused::new("audio", Harmless::Null).because(ONLY_TEXT),
    Refused::new("web_search_options", Harmless::Null),
    Refused::new("bad_words", Harmless::EmptyList),
    Refused::new("allowed_token_ids", Harmless::EmptyList),
    Refused::new("truncate_prompt_tokens", Harmless::Null),
    Refused::new("logits_processors", Harmless::EmptyList),
    Refused::new("chat_template", Harmless::Null),
    Refused::new("documents", Harmless::EmptyList),
    Refused::new("prompt_embeds", Harmless::Null),
];

/// Fields that are known and have no effect.
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

/// The schema of an operation's body.
pub fn describe(limits: &FieldBounds<'_>, generator: &mut SchemaGenerator) -> Schema {
    let own = match limits.operation {
        Responses => responses::request::ResponsesRequest::DECLARED,
        AgentMessages | CountTokens => messages::request::MessagesRequest::DECLARED,
        _ => <()>::DECLARED,
    };
    let mut schema = object(own.iter().chain(Body::DECLARED).chain(&STRUCTURED), limits, generator);
    let properties = schema.get_mut("properties").and_then(Value::as_object_mut);
    let Some(properties) = properties else { return schema };
    let mut add = |name: &str, uses: Uses, field: Value| {
        if uses.include(limits.operation) && !properties.contains_key(name) {
            properties.insert(name.to_owned(), field);
        }
    };
    for refused in &REFUSED {
        let mut field = refused.harmless.schema();
        field["description"] = "Not served: only what asks for nothing.".into();
        add(refused.name, REFUSING, field);
    }
    for name in WITHOUT_MEANING {
        add(name, GENERATION, json!({"description": "Taken, without effect."}));
    }
    schema
}

impl<'de> Body<'de> {
    /// Parses a body.
    pub fn parse(bytes: &'de [u8], operation: Operation) -> Result<Self, ApiError> {
        Self::parse_with::<()>(bytes, operation).map(|(body, ())| body)
    }

    /// Parses a body, and the fields that only its operation has or that it interprets differently.
    pub fn parse_with<Own: Fields<'de>>(bytes: &'de [u8], operation: Operation) -> Result<(Self, Own), ApiError> {
        let field = Cell::new("");
        let mut deserializer = serde_json::Deserializer::from_slice(bytes);
        let parsed = BodySeed { operation, field: &field, own: PhantomData }
            .deserialize(&mut deserializer)
            .and_then(|body| deserializer.end().map(|()| body));
        cpu_budget::check(Stage::Parse)?;
        parsed.map_err(|error| {
            let text = error.to_string();
            if error.classify() != serde_json::error::Category::Data {
                return ApiError::malformed(format!("The body is not valid JSON: {text}."));
            }
            let reason = in_words(text.rfind(" at line ").map_or(text.as_str(), |at| &text[..at]));
            match field.get() {
                "" => ApiError::malformed(format!("The body must be a JSON object: {reason}.")),
                name => ApiError::invalid(name, format!("`{name}`: {reason}.")),
            }
        })
    }

    /// Parses a field without a member of its own, and returns the operations that support it.
    fn read_other<A: MapAccess<'de>>(
        &mut self,
        key: &str,
        map: &mut A,
        at: &Cell<&'static str>,
    ) -> Result<Uses, A::Error> {
        if let Some(refused) = REFUSED.iter().find(|refused| refused.name == key) {
            let asked = value::<Value, A>(map, at, refused.name)?;
            self.refused.extend(asked.map(|value| (refused, value)));
            return Ok(REFUSING);
        }
        if let Some(form) = STRUCTURED.iter().find(|form| form.name == key) {
            let asked = value::<Value, A>(map, at, form.name)?;
            self.structured.extend(asked.map(|value| (form.name, value)));
            return Ok(GENERATION);
        }
        at.set("");
        map.next_value::<IgnoredAny>()?;
        Ok(if WITHOUT_MEANING.contains(&key) { GENERATION } else { Uses::of(&[]) })
    }
}

/// Returns serde's reason without the name of a Rust type.
fn in_words(reason: &str) -> String {
    const TYPES: [(&str, &str); 4] = [
        ("u32", "an integer between 0 and 4294967295"),
        ("i64", "an integer of 64 bits"),
        ("f64", "a number"),
        ("f32", "a number"),
    ];
    let named = TYPES.iter().find_map(|(name, words)| {
        let before = reason.strip_suffix(name)?;
        before.ends_with("expected ").then(|| format!("{before}{words}"))
    });
    named.unwrap_or_else(|| reason.to_owned())
}

struct BodySeed<'a, Own> {
    operation: Operation,
    field: &'a Cell<&'static str>,
    own: PhantomData<Own>,
}

impl<'de, Own: Fields<'de>> DeserializeSeed<'de> for BodySeed<'_, Own> {
    type Value = (Body<'de>, Own);

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, Own: Fields<'de>> Visitor<'de> for BodySeed<'_, Own> {
    type Value = (Body<'de>, Own);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut own = Own::default();
        let mut body = Body::default();
        let at = self.field;
        while let Some(Key(key)) = map.next_key()? {
            let mut uses = own.read(&key, &mut map, at)?;
            if uses.is_none() {
                uses = body.read(&key, &mut map, at)?;
            }
            let uses = match uses {
                Some(uses) => uses,
                None => body.read_other(&key, &mut map, at)?,
            };
            body.unknown += u32::from(!uses.include(self.operation));
        }
        at.set("");
        Ok((body, own))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(body: &str) -> (Option<String>, String) {
        let error = Body::parse(body.as_bytes(), Chat).expect_err(body);
        (error.param, error.message)
    }

    #[test]
    fn ignores_null_and_counts_unknown_fields() {
        let body = Body::parse(
            br#"{"model":"m","temperature":null,"max_tokens":3.0,"x":{"y":[1]},"user":"u","seed":-1}"#,
            Chat,
        )
        .expect("valid");
        assert_eq!((body.model.as_deref(), body.temperature, body.unknown), (Some("m"), None, 1));
        assert_eq!((body.max_tokens, body.seed), (Some(Integer(3)), Some(Integer(-1))));
    }

    #[test]
    fn names_the_field_of_a_wrong_type() {
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
            (r#"{"seed":0.5}"#, "seed"),
            (r#"{"tokens":[4294967296]}"#, "tokens"),
        ] {
            let (field, message) = error(body);
            assert_eq!(field.as_deref(), Some(param), "{body}");
            assert!(!["u32", "i64", "f64"].iter().any(|name| message.contains(name)), "{message}");
        }
    }

    #[test]
    fn names_no_field_for_bodies_that_are_not_objects() {
        for body in ["", "[]", "3", "{", r#"{"model":"m"} x"#, r#"{"a":tru}"#, "{\"model\":\"\u{1}\"}"] {
            let (param, message) = error(body);
            assert_eq!(param, None, "{body}: {message}");
        }
    }

    #[test]
    fn accepts_four_forms_of_prompts() {
        let prompt = |text: &str| {
            let body = format!(r#"{{"prompt":{text}}}"#);
            Body::parse(body.as_bytes(), Chat).expect(text).prompt
        };
        assert_eq!(prompt(r#""a""#), Some(Prompt::Text("a".into())));
        assert_eq!(prompt(r#"["a","b"]"#), Some(Prompt::Texts(vec!["a".into(), "b".into()])));
        assert_eq!(prompt("[1,2]"), Some(Prompt::Ids(vec![1, 2])));
        assert_eq!(prompt("[[1],[2,3]]"), Some(Prompt::IdLists(vec![vec![1], vec![2, 3]])));
    }
}
