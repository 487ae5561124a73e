//! Declarations of request fields: each field is declared once, with its name, kind, operations, bounds and
//! description.
//!
//! [`fields!`] generates three things from a list of declarations: the struct that a body is parsed into
//! ([`Fields::read`]), an accessor with bounds for each bounded field, and the schema entries at `/openapi.json`
//! ([`object`]). Parser, limits and description therefore cannot differ. `schemars` generates the description instead
//! of annotations of handlers, because these schemas depend on the operation and on the options of the router.

use std::cell::Cell;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, de::MapAccess};
use serde_json::{Map, Value, json};

use super::{bounds::FieldBounds, params::Endpoint};

/// An operation that a client requests with a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names are those of the routes
pub enum Operation {
    Chat,
    Completions,
    Responses,
    InputTokens,
    Messages,
    CountTokens,
    Tokenize,
    Detokenize,
}

impl Operation {
    /// The operation's name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Completions => "completions",
            Self::Responses => "responses",
            Self::InputTokens => "input_tokens",
            Self::Messages => "messages",
            Self::CountTokens => "count_tokens",
            Self::Tokenize => "tokenize",
            Self::Detokenize => "detokenize",
        }
    }

    /// Whether a group serves the operation.
    pub fn generates(self) -> bool {
        matches!(self, Self::Chat | Self::Completions | Self::Responses | Self::Messages)
    }
}

impl From<Endpoint> for Operation {
    fn from(endpoint: Endpoint) -> Self {
        match endpoint {
            Endpoint::Chat => Self::Chat,
            Endpoint::Completions => Self::Completions,
            Endpoint::Responses => Self::Responses,
            Endpoint::Messages => Self::Messages,
        }
    }
}

/// The operations that support a field.
#[derive(Clone, Copy, Debug)]
pub struct Uses {
    known: &'static [Operation],
    required: &'static [Operation],
}

impl Uses {
    /// These operations support it.
    pub const fn of(known: &'static [Operation]) -> Self {
        Self { known, required: &[] }
    }

    /// These operations require it.
    pub const fn required(mut self, required: &'static [Operation]) -> Self {
        self.required = required;
        self
    }

    /// Whether `operation` supports it.
    pub fn include(&self, operation: Operation) -> bool {
        self.known.contains(&operation)
    }
}

/// The description of one field.
pub struct Declared {
    /// Its name.
    pub name: &'static str,
    /// Its aliases.
    pub aliases: &'static [&'static str],
    /// Its description.
    pub words: &'static str,
    /// The operations that support it.
    pub uses: Uses,
    /// Its schema, for an operation that requires it (`true`) or also accepts null.
    pub schema: fn(&mut SchemaGenerator, Operation, bool) -> Schema,
    /// Its bounds.
    pub bound: Option<fn(&mut Schema, &FieldBounds<'_>)>,
}

impl Declared {
    /// Describes a field whose schema is the same for all operations.
    pub const fn new<T: JsonSchema>(name: &'static str, words: &'static str, uses: Uses) -> Self {
        let schema = |generator: &mut SchemaGenerator, _, required| schema_of::<T>(generator, required);
        Self { name, aliases: &[], words, uses, schema, bound: None }
    }
}

/// The schema of a value, or of a value that may be null.
pub fn schema_of<T: JsonSchema>(generator: &mut SchemaGenerator, required: bool) -> Schema {
    if required { generator.subschema_for::<T>() } else { generator.subschema_for::<Option<T>>() }
}

/// Fields that are parsed from a body.
pub trait Fields<'de>: Default {
    /// Their declarations.
    const DECLARED: &'static [Declared];

    /// Parses the value of `key` if it is one of these fields, and returns the operations that support it. `at`
    /// receives its name for errors.
    fn read<A: MapAccess<'de>>(
        &mut self,
        key: &str,
        map: &mut A,
        at: &Cell<&'static str>,
    ) -> Result<Option<Uses>, A::Error>;
}

/// An empty set of fields.
impl<'de> Fields<'de> for () {
    const DECLARED: &'static [Declared] = &[];

    fn read<A: MapAccess<'de>>(
        &mut self,
        _: &str,
        _: &mut A,
        _: &Cell<&'static str>,
    ) -> Result<Option<Uses>, A::Error> {
        Ok(None)
    }
}

/// Parses one value and stores its name for errors.
pub fn value<'de, T: Deserialize<'de>, A: MapAccess<'de>>(
    map: &mut A,
    at: &Cell<&'static str>,
    name: &'static str,
) -> Result<Option<T>, A::Error> {
    at.set(name);
    map.next_value()
}

/// The schema of a body with the fields of `declared` that its operation supports; the first of two fields with one
/// name is used.
pub fn object<'d>(
    declared: impl IntoIterator<Item = &'d Declared>,
    limits: &FieldBounds<'_>,
    generator: &mut SchemaGenerator,
) -> Schema {
    let mut properties = Map::new();
    let mut required = Vec::new();
    for field in declared {
        if !field.uses.include(limits.operation) || properties.contains_key(field.name) {
            continue;
        }
        let is_required = field.uses.required.contains(&limits.operation);
        if is_required {
            required.push(field.name);
        }
        let mut schema = (field.schema)(generator, limits.operation, is_required);
        if let Some(bound) = field.bound {
            bound(&mut schema, limits);
        }
        // turns a schema that is `true` into an object
        let mut words = field.words.trim().to_owned();
        if let Some(alias) = field.aliases.first() {
            words = format!("{words} Also `{alias}`.").trim_start().to_owned();
        }
        if !words.is_empty() {
            schema.insert("description".into(), words.into());
        }
        properties.insert(field.name.into(), schema.to_value());
    }
    let mut schema = Map::from_iter([("type".to_owned(), json!("object")), ("properties".into(), properties.into())]);
    if !required.is_empty() {
        schema.insert("required".into(), Value::from(required));
    }
    Schema::from(schema)
}

/// Declares the fields of a body: `name | "alias": kind as schema, uses, within bounds;`.
///
/// The kind is the type that the value is parsed as. The schema (`as`) describes it if the kind cannot; `as {..}` is an
/// arm for each operation. The bounds are a function of [`FieldBounds`]. Further members of the struct are in its
/// braces.
macro_rules! fields {
    (
        $(#[$meta:meta])*
        pub struct $name:ident<$life:lifetime> {
            $( $(#[doc = $besides_doc:literal])* pub $besides:ident: $besides_kind:ty, )*
        }
        $(
            $(#[doc = $doc:literal])*
            $field:ident $(| $alias:literal)? : $kind:ty
                $(as $schema:ty)? $(as { $($at:pat => $at_schema:ty,)+ })?
                , $uses:expr
                $(, within $bounds:expr)? ;
        )*
    ) => {
        $(#[$meta])*
        #[derive(Debug, Default)]
        pub struct $name<$life> {
            $( $(#[doc = $doc])* pub $field: Option<$kind>, )*
            $( $(#[doc = $besides_doc])* pub $besides: $besides_kind, )*
        }

        impl<$life> $name<$life> {
            $( $crate::api::declare::fields!(@accessor $field: $kind $(, $bounds)?); )*
        }

        impl<$life> $crate::api::declare::Fields<$life> for $name<$life> {
            const DECLARED: &'static [$crate::api::declare::Declared] = &[
                $( $crate::api::declare::Declared {
                    name: stringify!($field),
                    aliases: &[$($alias)?],
                    words: concat!($($doc),*),
                    uses: $uses,
                    schema: $crate::api::declare::fields!(@schema $kind $(as $schema)? $(as { $($at => $at_schema,)+ })?),
                    bound: $crate::api::declare::fields!(@bound $kind $(, $bounds)?),
                }, )*
            ];

            fn read<Entries: serde::de::MapAccess<$life>>(
                &mut self,
                key: &str,
                map: &mut Entries,
                at: &std::cell::Cell<&'static str>,
            ) -> Result<Option<$crate::api::declare::Uses>, Entries::Error> {
                match key {
                    $( stringify!($field) $(| $alias)? => {
                        self.$field = $crate::api::declare::value(map, at, stringify!($field))?;
                        Ok(Some($uses))
                    } )*
                    _ => Ok(None),
                }
            }
        }
    };
    (@accessor $field:ident: $kind:ty) => {};
    (@accessor $field:ident: $kind:ty, $bounds:expr) => {
        #[doc = concat!("`", stringify!($field), "`, or why it can't be that.")]
        pub fn $field(
            &self,
            limits: &$crate::api::bounds::FieldBounds<'_>,
        ) -> Result<Option<<$kind as $crate::api::bounds::Bounded>::Checked<'_>>, $crate::api::error::ApiError> {
            let bounds: fn(
                &$crate::api::bounds::FieldBounds<'_>,
            ) -> <$kind as $crate::api::bounds::Bounded>::Bounds = $bounds;
            let Some(value) = &self.$field else { return Ok(None) };
            $crate::api::bounds::Bounded::checked(value, stringify!($field), &bounds(limits)).map(Some)
        }
    };
    (@schema $kind:ty as { $($at:pat => $at_schema:ty,)+ }) => {
        |generator, operation, required| match operation {
            $( $at => $crate::api::declare::schema_of::<$at_schema>(generator, required), )+
        }
    };
    (@schema $kind:ty as $schema:ty) => {
        |generator, _, required| $crate::api::declare::schema_of::<$schema>(generator, required)
    };
    (@schema $kind:ty) => {
        |generator, _, required| $crate::api::declare::schema_of::<$kind>(generator, required)
    };
    (@bound $kind:ty) => { None };
    (@bound $kind:ty, $bounds:expr) => {
        Some(|schema, limits| {
            let bounds: fn(
                &$crate::api::bounds::FieldBounds<'_>,
            ) -> <$kind as $crate::api::bounds::Bounded>::Bounds = $bounds;
            <$kind as $crate::api::bounds::Bounded>::describe(&bounds(limits), schema);
        })
    };
}
pub(crate) use fields;
