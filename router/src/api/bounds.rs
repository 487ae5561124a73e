//! The bounds of a request's fields. Each kind of value defines which bounds it can have, how they are checked, and how
//! JSON Schema expresses them. Every refusal names the field and its limit.

use std::ops::RangeInclusive;

use schemars::Schema;
use serde_json::{Value, json};

use super::{
    declare::Operation,
    error::ApiError,
    fields::{Biases, Integer, LogprobsField, OneOrMany},
};
use crate::options::RouterOptions;

/// The inputs that bounds depend on besides the field.
#[derive(Clone, Copy, Debug)]
pub struct FieldBounds<'a> {
    /// The operation of the request.
    pub operation: Operation,
    /// The options of the router.
    pub options: &'a RouterOptions,
}

/// A kind of value that can have bounds.
pub trait Bounded {
    /// Its bounds.
    type Bounds;
    /// The type of a value within its bounds.
    type Checked<'v>
    where
        Self: 'v;

    /// Returns the value, or a refusal that names `field`.
    fn checked(&self, field: &'static str, bounds: &Self::Bounds) -> Result<Self::Checked<'_>, ApiError>;

    /// Adds the bounds to a field's schema.
    fn describe(bounds: &Self::Bounds, schema: &mut Schema);
}

fn add<const N: usize>(schema: &mut Schema, keywords: [(&str, Value); N]) {
    for (keyword, value) in keywords {
        schema.insert(keyword.to_owned(), value);
    }
}

/// At least `least`, and at most the maximum of 32 bits.
pub fn at_least(least: i64) -> RangeInclusive<i64> {
    least..=i64::from(u32::MAX)
}

impl Bounded for Integer {
    type Bounds = RangeInclusive<i64>;
    type Checked<'v> = i64;

    fn checked(&self, field: &'static str, bounds: &Self::Bounds) -> Result<i64, ApiError> {
        let Integer(value) = *self;
        let (least, most) = (bounds.start(), bounds.end());
        if let Some(value) = i64::try_from(value).ok().filter(|value| bounds.contains(value)) {
            return Ok(value);
        }
        let is_open = *most >= i64::from(u32::MAX);
        let limit = match value < i128::from(*least) {
            true if is_open => format!("at least {least}"),
            false if is_open => format!("at most {most}"),
            _ => format!("between {least} and {most}"),
        };
        Err(ApiError::invalid(field, format!("`{field}` must be {limit}, got {value}.")))
    }

    fn describe(bounds: &Self::Bounds, schema: &mut Schema) {
        add(schema, [("minimum", json!(bounds.start())), ("maximum", json!(bounds.end()))]);
    }
}

/// The bounds of a number.
#[derive(Clone, Debug)]
pub struct Numbers {
    /// The minimum and the maximum.
    pub range: RangeInclusive<f64>,
    /// Whether the minimum is exclusive.
    pub above: bool,
}

impl From<RangeInclusive<f64>> for Numbers {
    fn from(range: RangeInclusive<f64>) -> Self {
        Self { range, above: false }
    }
}

impl Bounded for f64 {
    type Bounds = Numbers;
    type Checked<'v> = f32;

    fn checked(&self, field: &'static str, bounds: &Numbers) -> Result<f32, ApiError> {
        let (least, most) = (bounds.range.start(), bounds.range.end());
        if !bounds.range.contains(self) {
            let message = format!("`{field}` must be between {least} and {most}, got {self}.");
            return Err(ApiError::invalid(field, message));
        }
        // a value that rounds to the minimum in 32 bits counts as the minimum
        if bounds.above && *self as f32 <= *least as f32 {
            return Err(ApiError::invalid(field, format!("`{field}` must be above {least} and at most {most}.")));
        }
        Ok(*self as f32)
    }

    fn describe(bounds: &Numbers, schema: &mut Schema) {
        let least = if bounds.above { "exclusiveMinimum" } else { "minimum" };
        add(schema, [(least, json!(bounds.range.start())), ("maximum", json!(bounds.range.end()))]);
    }
}

/// The bounds of a list of strings: their number and their length. None may be empty.
#[derive(Clone, Copy, Debug)]
pub struct Texts {
    /// Maximum number of strings.
    pub most: usize,
    /// Maximum bytes of each string.
    pub bytes: usize,
}

impl Bounded for Vec<String> {
    type Bounds = Texts;
    type Checked<'v> = &'v [String];

    fn checked(&self, field: &'static str, bounds: &Texts) -> Result<&[String], ApiError> {
        let Texts { most, bytes } = *bounds;
        if self.len() > most {
            return Err(too_many(field, most));
        }
        if self.iter().any(|text| text.is_empty() || text.len() > bytes) {
            let message = format!("`{field}`: a stop string must have 1 to {bytes} bytes.");
            return Err(ApiError::invalid(field, message));
        }
        Ok(self)
    }

    fn describe(bounds: &Texts, schema: &mut Schema) {
        let text = json!({"type": "string", "minLength": 1, "maxLength": bounds.bytes});
        add(schema, [("maxItems", json!(bounds.most)), ("items", text)]);
    }
}

impl Bounded for OneOrMany {
    type Bounds = Texts;
    type Checked<'v> = &'v [String];

    fn checked(&self, field: &'static str, bounds: &Texts) -> Result<&[String], ApiError> {
        self.0.checked(field, bounds)
    }

    fn describe(bounds: &Texts, schema: &mut Schema) {
        Vec::<String>::describe(bounds, schema);
        add(schema, [("minLength", json!(1)), ("maxLength", json!(bounds.bytes))]);
    }
}

/// The maximum number of token IDs.
impl Bounded for Vec<u32> {
    type Bounds = usize;
    type Checked<'v> = &'v [u32];

    fn checked(&self, field: &'static str, most: &usize) -> Result<&[u32], ApiError> {
        if self.len() > *most {
            return Err(too_many(field, *most));
        }
        Ok(self)
    }

    fn describe(most: &usize, schema: &mut Schema) {
        add(schema, [("maxItems", json!(most))]);
    }
}

/// The maximum bytes of a string.
impl Bounded for String {
    type Bounds = RangeInclusive<usize>;
    type Checked<'v> = &'v str;

    fn checked(&self, field: &'static str, bounds: &Self::Bounds) -> Result<&str, ApiError> {
        if !bounds.contains(&self.len()) {
            let message = format!("`{field}` must have {} to {} bytes.", bounds.start(), bounds.end());
            return Err(ApiError::invalid(field, message));
        }
        Ok(self)
    }

    fn describe(bounds: &Self::Bounds, schema: &mut Schema) {
        // a character has at least one byte
        add(schema, [("minLength", json!(bounds.start().min(&1))), ("maxLength", json!(bounds.end()))]);
    }
}

/// The bounds of `logit_bias`.
#[derive(Clone, Debug)]
pub struct Biasing {
    /// Maximum number of biases.
    pub most: usize,
    /// The bounds of each bias.
    pub range: RangeInclusive<i32>,
}

impl Bounded for Biases {
    type Bounds = Biasing;
    type Checked<'v> = Vec<(u32, f32)>;

    fn checked(&self, field: &'static str, bounds: &Biasing) -> Result<Vec<(u32, f32)>, ApiError> {
        if self.0.len() > bounds.most {
            return Err(too_many(field, bounds.most));
        }
        let (least, most) = (bounds.range.start(), bounds.range.end());
        let checked = |(key, bias): &(String, f64)| {
            let id: u32 = key.parse().map_err(|_| {
                let shown: String = key.chars().take(40).collect();
                ApiError::invalid(field, format!("`{field}`: the key `{shown}` is not a token ID."))
            })?;
            if !(f64::from(*least)..=f64::from(*most)).contains(bias) {
                let message = format!("`{field}`: a bias must be between {least} and {most}.");
                return Err(ApiError::invalid(field, message));
            }
            Ok((id, *bias as f32))
        };
        self.0.iter().map(checked).collect()
    }

    fn describe(bounds: &Biasing, schema: &mut Schema) {
        let number = json!({"type": "number", "minimum": bounds.range.start(), "maximum": bounds.range.end()});
        add(schema, [("maxProperties", json!(bounds.most)), ("additionalProperties", number)]);
    }
}

/// The form of `logprobs`.
#[derive(Clone, Copy, Debug)]
pub enum LogprobsForm {
    /// Chat: whether to return logprobs.
    Flag,
    /// Completions: the number of alternatives, with this maximum.
    Count(u32),
}

impl Bounded for LogprobsField {
    type Bounds = LogprobsForm;
    type Checked<'v> = LogprobsField;

    fn checked(&self, field: &'static str, form: &LogprobsForm) -> Result<LogprobsField, ApiError> {
        match (*self, *form) {
            (Self::Flag(_), LogprobsForm::Flag) => Ok(*self),
            (Self::Count(count), LogprobsForm::Count(most)) => {
                count.checked(field, &(0..=i64::from(most))).map(|count| Self::Count(Integer(count.into())))
            }
            (Self::Count(_), LogprobsForm::Flag) => {
                let message = format!("`{field}` must be a boolean here; `top_logprobs` is the number.");
                Err(ApiError::invalid(field, message))
            }
            (Self::Flag(_), LogprobsForm::Count(most)) => {
                let message = format!("`{field}` must be an integer between 0 and {most} here.");
                Err(ApiError::invalid(field, message))
            }
        }
    }

    fn describe(form: &LogprobsForm, schema: &mut Schema) {
        // the schema of the operation's form replaces the schema of both forms
        *schema = Schema::default();
        match form {
            LogprobsForm::Flag => add(schema, [("type", json!(["boolean", "null"]))]),
            LogprobsForm::Count(most) => {
                add(schema, [("type", json!(["integer", "null"])), ("minimum", json!(0)), ("maximum", json!(most))]);
            }
        }
    }
}

/// The refusal of a list that is too long.
pub fn too_many(field: &str, most: usize) -> ApiError {
    ApiError::invalid(field, format!("`{field}` must have at most {most} entries."))
}
