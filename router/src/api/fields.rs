//! Types of request fields with several accepted forms or with error messages of their own.

use std::{borrow::Cow, collections::BTreeMap, fmt};

use bora_common::conversation::{Json, JsonError};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{
    Deserialize,
    de::{Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

/// Describes a type by the schema of another type with the same form.
macro_rules! described {
    ($kind:ident: $like:ty) => {
        impl JsonSchema for $kind {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($kind).into()
            }

            fn json_schema(generator: &mut SchemaGenerator) -> Schema {
                <$like>::json_schema(generator)
            }
        }
    };
}

/// `messages`: each message as unparsed JSON, found in one pass over the body.
#[derive(Debug)]
pub enum Messages<'de> {
    /// An array.
    List(Vec<&'de RawValue>),
    /// Another value, of which only the type is kept: the conversation parser creates the error.
    Other(Json<'static>),
}

impl<'de> Messages<'de> {
    /// The messages; none if the value is not an array.
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

/// A key, borrowed from the body if it has no escapes.
pub(super) struct Key<'de>(pub(super) Cow<'de, str>);

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

/// An integer, also in the form `3.0`; of any size, so that its field can name the bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Integer(pub i128);

impl<'de> Deserialize<'de> for Integer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct IntegerVisitor;
        impl Visitor<'_> for IntegerVisitor {
            type Value = Integer;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an integer")
            }

            fn visit_i64<E>(self, value: i64) -> Result<Integer, E> {
                Ok(Integer(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Integer, E> {
                Ok(Integer(value.into()))
            }

            fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Integer, E> {
                if value.fract() == 0.0 {
                    return Ok(Integer(value as i128));
                }
                Err(E::invalid_type(serde::de::Unexpected::Float(value), &self))
            }
        }
        deserializer.deserialize_any(IntegerVisitor)
    }
}

described!(Integer: i64);

/// A name, of which only the hash is kept. Values of other types count as absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name(pub Option<u64>);

impl Name {
    /// The empty string is not a name.
    pub fn of(text: &[u8]) -> Self {
        Self((!text.is_empty()).then(|| xxhash_rust::xxh3::xxh3_64(text)))
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let written = <&RawValue>::deserialize(deserializer)?.get();
        if !written.starts_with('"') {
            return Ok(Self(None));
        }
        // a string that is not valid text (half of a surrogate pair) counts as absent too
        let text: Option<String> = serde_json::from_str(written).ok();
        Ok(text.map_or(Self(None), |text| Self::of(text.as_bytes())))
    }
}

described!(Name: String);

/// One string or a list of strings.
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

described!(OneOrMany: TextOrTexts);

#[derive(JsonSchema)]
#[schemars(untagged, inline)]
#[allow(dead_code)] // what is read is above
enum TextOrTexts {
    Text(String),
    Texts(Vec<String>),
}

/// `logprobs`: a boolean in chat, a number in completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[schemars(inline)]
#[serde(untagged, expecting = "a boolean (chat) or an integer (completions)")]
pub enum LogprobsField {
    /// Chat.
    Flag(bool),
    /// Completions.
    Count(Integer),
}

/// `priority`: a class by name, or vLLM's number (higher is later).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[schemars(rename = "Priority")]
#[serde(untagged, expecting = "\"interactive\", \"batch\" or an integer")]
pub enum PriorityField {
    /// A class.
    Name(#[schemars(with = "PriorityClass")] String),
    /// Above 0: batch.
    Number(Integer),
}

/// The classes of requests.
#[derive(JsonSchema)]
#[schemars(rename_all = "lowercase")]
#[allow(dead_code)] // only the schema uses the variants
enum PriorityClass {
    Interactive,
    Batch,
}

/// `stream_options`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
pub struct StreamOptions {
    /// Sends a last chunk with the usage.
    pub include_usage: Option<bool>,
    /// Sends the usage so far in every chunk (vLLM).
    pub continuous_usage_stats: Option<bool>,
}

/// `logit_bias`, in the order of the body.
#[derive(Debug)]
pub struct Biases(pub Vec<(String, f64)>);

described!(Biases: BTreeMap<String, f64>);

impl<'de> Deserialize<'de> for Biases {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BiasVisitor;
        impl<'de> Visitor<'de> for BiasVisitor {
            type Value = Biases;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from token IDs to numbers")
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

/// A prompt: one text, several texts, token IDs, or several lists of token IDs.
#[derive(Clone, Debug, PartialEq, Eq, JsonSchema)]
#[schemars(untagged)]
pub enum Prompt {
    /// One text.
    Text(String),
    /// Several texts.
    Texts(Vec<String>),
    /// One list of token IDs.
    Ids(Vec<u32>),
    /// Several lists of token IDs.
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
                f.write_str("a string, a token ID or an array of token IDs")
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
                f.write_str("a string, an array of strings, an array of token IDs or an array of such arrays")
            }

            fn visit_str<E>(self, text: &str) -> Result<Prompt, E> {
                Ok(Prompt::Text(text.to_string()))
            }

            fn visit_string<E>(self, text: String) -> Result<Prompt, E> {
                Ok(Prompt::Text(text))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Prompt, A::Error> {
                let mixed = || A::Error::custom("texts, token IDs and arrays of token IDs can't be mixed");
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
