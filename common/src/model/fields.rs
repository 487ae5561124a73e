//! Typed access to the fields of a JSON object, with errors that name the field by its path.

use super::ModelConfigError;
use serde_json::{Map, Value};

/// One object of a configuration file.
pub(super) struct Fields<'a> {
    file: &'static str,
    path: String,
    object: &'a Map<String, Value>,
}

pub(super) fn parse(file: &'static str, text: &str) -> Result<Value, ModelConfigError> {
    serde_json::from_str(text)
        .map_err(|error| ModelConfigError::NotJson { file: file.to_owned(), reason: error.to_string() })
}

impl<'a> Fields<'a> {
    pub(super) fn root(file: &'static str, value: &'a Value) -> Result<Self, ModelConfigError> {
        match value.as_object() {
            Some(object) => Ok(Self { file, path: String::new(), object }),
            None => Err(ModelConfigError::Invalid {
                file: file.to_owned(),
                field: String::new(),
                found: kind(value),
                expected: "an object".to_owned(),
            }),
        }
    }

    /// `null` counts as absent: Hugging Face writes it for "not set".
    pub(super) fn value(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    pub(super) fn object(&self, name: &str) -> Result<Option<Fields<'a>>, ModelConfigError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        match value.as_object() {
            Some(object) => Ok(Some(Fields { file: self.file, path: format!("{}{name}.", self.path), object })),
            None => Err(self.invalid(name, value, "an object")),
        }
    }

    pub(super) fn size(&self, name: &str) -> Result<Option<usize>, ModelConfigError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        match value.as_u64() {
            Some(number) if number > 0 && number < 1 << 32 => Ok(Some(number as usize)),
            _ => Err(self.invalid(name, value, "a whole number above 0")),
        }
    }

    pub(super) fn require_size(&self, name: &str) -> Result<usize, ModelConfigError> {
        self.size(name)?.ok_or_else(|| self.missing(name))
    }

    pub(super) fn token_id(&self, name: &str) -> Result<Option<u32>, ModelConfigError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        match as_id(value) {
            Some(id) => Ok(Some(id)),
            None => Err(self.invalid(name, value, "a token id")),
        }
    }

    pub(super) fn token_ids(&self, name: &str) -> Result<Vec<u32>, ModelConfigError> {
        match self.value(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(values)) => values
                .iter()
                .map(|value| as_id(value).ok_or_else(|| self.invalid(name, value, "a list of token ids")))
                .collect(),
            Some(_) => Ok(self.token_id(name)?.into_iter().collect()),
        }
    }

    /// A finite number; some files hold numbers as strings.
    pub(super) fn number(&self, name: &str) -> Result<Option<f64>, ModelConfigError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let number = match value {
            Value::String(text) => text.parse().ok(),
            _ => value.as_f64(),
        };
        match number.filter(|number: &f64| number.is_finite()) {
            Some(number) => Ok(Some(number)),
            None => Err(self.invalid(name, value, "a number")),
        }
    }

    pub(super) fn positive(&self, name: &str) -> Result<Option<f64>, ModelConfigError> {
        match self.number(name)? {
            Some(number) if number <= 0.0 => Err(self.refuse(name, "a number above 0")),
            other => Ok(other),
        }
    }

    pub(super) fn require_positive(&self, name: &str) -> Result<f64, ModelConfigError> {
        self.positive(name)?.ok_or_else(|| self.missing(name))
    }

    pub(super) fn boolean(&self, name: &str) -> Result<Option<bool>, ModelConfigError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        match value.as_bool() {
            Some(flag) => Ok(Some(flag)),
            None => Err(self.invalid(name, value, "true or false")),
        }
    }

    pub(super) fn text(&self, name: &str) -> Result<Option<&'a str>, ModelConfigError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        match value.as_str() {
            Some(text) => Ok(Some(text)),
            None => Err(self.invalid(name, value, "a string")),
        }
    }

    pub(super) fn missing(&self, name: &str) -> ModelConfigError {
        ModelConfigError::Missing { file: self.file.to_owned(), field: format!("{}{name}", self.path) }
    }

    /// An error about what stands in `name`.
    pub(super) fn refuse(&self, name: &str, expected: &str) -> ModelConfigError {
        self.invalid(name, self.object.get(name).unwrap_or(&Value::Null), expected)
    }

    fn invalid(&self, name: &str, value: &Value, expected: &str) -> ModelConfigError {
        ModelConfigError::Invalid {
            file: self.file.to_owned(),
            field: format!("{}{name}", self.path),
            found: kind(value),
            expected: expected.to_owned(),
        }
    }
}

fn as_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|number| u32::try_from(number).ok())
}

fn kind(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
        other => other.to_string(),
    }
}
