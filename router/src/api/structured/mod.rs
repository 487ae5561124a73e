//! Structured outputs: `response_format`, vLLM's `guided_*` and `structured_outputs`, and `tool_choice`, compiled into
//! one grammar for the group.
//!
//! A forced call is written in the model's own format, `[TOOL_CALLS]name[ARGS]{...}`, with the special tokens as token
//! IDs, so that no text can imitate them. The group compiles the grammar and refuses an unsupported one; the refusal
//! names the field that the grammar came from ([`Structure::field`]).

mod pattern;
mod schema;

use std::{collections::HashSet, fmt::Write as _};

use bora_common::{
    conversation::Json,
    cpu_budget::{self, Stage},
};
use bora_proto::v1::{Grammar, grammar::Kind};
use serde_json::Value;

use super::{error::ApiError, params::Endpoint, request::Body, surrogates::replace_halves_of_text};
use crate::{access::limits::TenantLimits, models::ModelSpec};

/// Maximum bytes of a grammar, equal to the worker's limit.
const MAX_GRAMMAR_BYTES: usize = 256 * 1024;
/// The schema that accepts any object.
const ANY_OBJECT: &str =
    r#"{"type":"object","x-guidance":{"whitespace_pattern":"[\\x20\\x0A\\x0D\\x09]{1,64}","lenient":true}}"#;
/// Maximum number of choices of `guided_choice`.
const MAX_CHOICES: usize = 4_096;

/// A structured output.
#[derive(Clone, Debug, PartialEq)]
pub struct Structure {
    /// The grammar for the group.
    pub grammar: Grammar,
    /// The field of the request that requested it.
    pub field: &'static str,
}

/// The rule of `tool_choice` for tool calls.
#[derive(Clone, Debug, PartialEq)]
pub enum ToolChoice {
    /// The request has no tools.
    NoTools,
    /// These tools may be called; all tools if `None`.
    Auto(Option<Vec<String>>),
    /// Tools are in the prompt, but calls are not allowed.
    Forbidden,
    /// One of these tools must be called; of all tools if `None`. The flag allows several calls.
    Forced(Option<Vec<String>>, bool),
}

impl ToolChoice {
    /// Parses `tool_choice` and `parallel_tool_calls`, given whether there are tools.
    pub fn of(body: &Body<'_>) -> Result<Self, ApiError> {
        // the conversation parser validates their contents
        let tools = body.late_tools || body.tools.is_some_and(|tools| !is_empty_array(tools.get()));
        let several = body.parallel_tool_calls != Some(false);
        let choice = match &body.tool_choice {
            None => Self::Auto(None),
            Some(Value::String(choice)) => match choice.as_str() {
                "auto" => Self::Auto(None),
                "none" => Self::Forbidden,
                // "any" is Mistral's name
                "required" | "any" => Self::Forced(None, several),
                _ => return Err(unknown_choice()),
            },
            Some(Value::Object(choice)) => match choice.get("type").and_then(Value::as_str) {
                Some("function") => {
                    let name = choice.get("function").unwrap_or(&Value::Null).get("name").or(choice.get("name"));
                    let name = name
                        .and_then(Value::as_str)
                        .ok_or_else(|| ApiError::invalid("tool_choice", "`tool_choice.function.name` is required."))?;
                    Self::Forced(Some(vec![name.to_owned()]), false)
                }
                Some("allowed_tools") => {
                    let allowed = choice.get("allowed_tools").unwrap_or(&Value::Null);
                    let name = |tool: &Value| Some(tool.get("function")?.get("name")?.as_str()?.to_owned());
                    let names: Option<Vec<String>> = allowed
                        .get("tools")
                        .and_then(Value::as_array)
                        .and_then(|tools| tools.iter().map(name).collect());
                    let names = names.ok_or_else(|| {
                        let message =
                            "`tool_choice.allowed_tools.tools` must be an array of objects that name functions.";
                        ApiError::invalid("tool_choice", message)
                    })?;
                    match allowed.get("mode").and_then(Value::as_str) {
                        Some("required") => Self::Forced(Some(names), several),
                        Some("auto") if names.is_empty() => Self::Forbidden,
                        Some("auto") => Self::Auto(Some(names)),
                        _ => {
                            let message = "`tool_choice.allowed_tools.mode` must be \"auto\" or \"required\".";
                            return Err(ApiError::invalid("tool_choice", message));
                        }
                    }
                }
                _ => return Err(unknown_choice()),
            },
            Some(_) => return Err(unknown_choice()),
        };
        match choice {
            Self::Auto(_) | Self::Forbidden if !tools => Ok(Self::NoTools),
            Self::Forced(..) if !tools => {
                Err(ApiError::invalid("tool_choice", "`tool_choice` forces a call, but there are no `tools`."))
            }
            choice => Ok(choice),
        }
    }
}

fn unknown_choice() -> ApiError {
    ApiError::invalid(
        "tool_choice",
        "`tool_choice` must be \"auto\", \"none\", \"required\" or an object that names a tool.",
    )
}

fn is_empty_array(json: &str) -> bool {
    json.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).is_some_and(|inside| inside.trim().is_empty())
}

/// The grammar of an output; `None` if any output is allowed.
pub fn structure(
    body: &Body<'_>,
    endpoint: Endpoint,
    choice: &ToolChoice,
    spec: &ModelSpec,
) -> Result<Option<Structure>, ApiError> {
    let mut wanted: Option<Structure> = None;
    for (field, value) in &body.structured {
        let Some(grammar) = asked_for(field, value)? else { continue };
        if let Some(other) = &wanted {
            let message = format!("`{field}` and `{}` exclude each other.", other.field);
            return Err(ApiError::invalid(*field, message));
        }
        wanted = Some(Structure { grammar, field });
    }
    if endpoint.is_conversation() {
        wanted = match (choice, wanted) {
            (ToolChoice::Forced(names, several), _) => {
                let calls = calls(body, names.as_deref(), *several, spec)?;
                let grammar = lark(format!("start: {}\n{}", calls.start, calls.rules));
                Some(Structure { grammar, field: "tool_choice" })
            }
            // an output in the requested form, or tool calls
            (ToolChoice::Auto(names), Some(Structure { grammar, field })) if grammar.kind() == Kind::JsonSchema => {
                let calls = calls(body, names.as_deref(), body.parallel_tool_calls != Some(false), spec)?;
                let source = &grammar.source;
                let source = format!("start: answer | {}\nanswer: %json {source}\n{}", calls.start, calls.rules);
                Some(Structure { grammar: lark(source), field })
            }
            // any text, followed by calls of some of the tools
            (ToolChoice::Auto(Some(names)), None) => {
                let calls = calls(body, Some(names), body.parallel_tool_calls != Some(false), spec)?;
                let source = format!("start: text? ({})?\ntext: /(?s:.+)/\n{}", calls.start, calls.rules);
                Some(Structure { grammar: lark(source), field: "tool_choice" })
            }
            (_, wanted) => wanted,
        };
    }
    if let Some(Structure { grammar, field }) = &wanted {
        if spec.tokenizer.is_none() {
            let message = format!("`{field}` needs text, and this model is served without a tokenizer.");
            return Err(ApiError::invalid(*field, message));
        }
        if grammar.source.len() > MAX_GRAMMAR_BYTES {
            let message = format!("`{field}` has more than {MAX_GRAMMAR_BYTES} bytes.");
            return Err(ApiError::invalid(*field, message));
        }
    }
    Ok(wanted)
}

/// Refuses forms that the tenant's policy does not permit.
pub fn check_allowed(body: &Body<'_>, limits: &TenantLimits) -> Result<(), ApiError> {
    let forbidden = |what: &str| match what {
        "grammar" => limits.allow_grammar == Some(false),
        "regex" => limits.allow_regex == Some(false),
        _ => false,
    };
    for (field, value) in &body.structured {
        let asked = match (*field, value) {
            ("guided_grammar", _) => vec!["grammar"],
            ("guided_regex", _) => vec!["regex"],
            ("structured_outputs", Value::Object(options)) => {
                options.iter().filter(|(_, value)| !value.is_null()).map(|(option, _)| option.as_str()).collect()
            }
            _ => continue,
        };
        if let Some(what) = asked.into_iter().find(|what| forbidden(what)) {
            let place = if field.starts_with("guided_") { (*field).to_owned() } else { format!("{field}.{what}") };
            let mut error = ApiError::forbidden(format!("This API key may not use `{place}`."));
            error.param = Some((*field).to_owned());
            return Err(error);
        }
    }
    Ok(())
}

/// The form that one field requests; `None` if it requests none.
fn asked_for(field: &'static str, value: &Value) -> Result<Option<Grammar>, ApiError> {
    let wrong = |what: &str| ApiError::invalid(field, format!("`{field}` must be {what}."));
    match field {
        "response_format" => response_format(value),
        "guided_json" => json_schema(field, value, false).map(Some),
        "guided_regex" => value.as_str().map(regex).map(Some).ok_or_else(|| wrong("a regular expression")),
        "guided_grammar" => {
            value.as_str().map(|source| Some(lark(source.to_owned()))).ok_or_else(|| wrong("a grammar in Lark"))
        }
        "guided_choice" => choices(field, value).map(Some),
        _ => {
            let options = value.as_object().ok_or_else(|| wrong("an object"))?;
            let mut asked = None;
            for (key, value) in options.iter().filter(|(_, value)| !value.is_null()) {
                let grammar = match (key.as_str(), value) {
                    ("json", _) => json_schema(field, value, false)?,
                    ("json_object", Value::Bool(true)) => any_object(),
                    ("json_object", Value::Bool(false)) => continue,
                    ("regex", Value::String(source)) => regex(source),
                    ("choice", _) => choices(field, value)?,
                    ("grammar", Value::String(source)) => lark(source.clone()),
                    ("disable_fallback" | "disable_any_whitespace" | "disable_additional_properties", _) => continue,
                    _ => {
                        let shown: String = key.chars().take(40).collect();
                        return Err(ApiError::invalid(field, format!("`{field}.{shown}` is not supported.")));
                    }
                };
                if asked.replace(grammar).is_some() {
                    return Err(ApiError::invalid(field, format!("`{field}` must ask for one thing.")));
                }
            }
            asked.map(Some).ok_or_else(|| wrong("an object with `json`, `regex`, `choice`, `grammar` or `json_object`"))
        }
    }
}

fn response_format(value: &Value) -> Result<Option<Grammar>, ApiError> {
    const FIELD: &str = "response_format";
    match value.get("type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        Some("json_object") => match value.get("schema") {
            None | Some(Value::Null) => Ok(Some(any_object())),
            // vLLM's form
            Some(schema) => json_schema(FIELD, schema, false).map(Some),
        },
        Some("json_schema") => {
            let format = value.get("json_schema").unwrap_or(&Value::Null);
            // Mistral's name
            let schema = format.get("schema").or_else(|| format.get("schema_definition"));
            let schema =
                schema.ok_or_else(|| ApiError::invalid(FIELD, "`response_format.json_schema.schema` is required."))?;
            let strict = format.get("strict").and_then(Value::as_bool).unwrap_or(false);
            json_schema(FIELD, schema, strict).map(Some)
        }
        Some("structural_tag") => {
            Err(ApiError::invalid(FIELD, "`response_format` of type \"structural_tag\" is not supported."))
        }
        _ => Err(ApiError::invalid(
            FIELD,
            "`response_format.type` must be \"text\", \"json_object\" or \"json_schema\".",
        )),
    }
}

fn lark(source: String) -> Grammar {
    Grammar { kind: Kind::Lark.into(), source }
}

fn regex(source: &str) -> Grammar {
    Grammar { kind: Kind::Regex.into(), source: source.to_owned() }
}

fn any_object() -> Grammar {
    Grammar { kind: Kind::JsonSchema.into(), source: ANY_OBJECT.into() }
}

/// Parses a schema, given as JSON or as text that holds JSON.
fn json_schema(field: &'static str, value: &Value, strict: bool) -> Result<Grammar, ApiError> {
    let parsed;
    let schema = match value {
        Value::String(text) => {
            parsed = serde_json::from_str(&replace_halves_of_text(text))
                .map_err(|error| ApiError::invalid(field, format!("`{field}` is not a JSON schema: {error}.")))?;
            &parsed
        }
        schema => schema,
    };
    if !schema.is_object() && !schema.is_boolean() {
        return Err(ApiError::invalid(field, format!("`{field}`: a JSON schema must be an object.")));
    }
    let source = schema::for_group(schema, strict, true)
        .map_err(|unkept| ApiError::invalid(field, format!("`{field}`: the schema's {unkept}.")))?;
    Ok(Grammar { kind: Kind::JsonSchema.into(), source })
}

fn choices(field: &'static str, value: &Value) -> Result<Grammar, ApiError> {
    let wrong = || ApiError::invalid(field, format!("`{field}`: choices must be 1 to {MAX_CHOICES} texts."));
    let texts = value.as_array().filter(|texts| (1..=MAX_CHOICES).contains(&texts.len())).ok_or_else(wrong)?;
    let mut source = String::from("start: ");
    for (index, text) in texts.iter().enumerate() {
        let text = text.as_str().filter(|text| !text.is_empty()).ok_or_else(wrong)?;
        let separator = if index == 0 { "" } else { " | " };
        let _ = write!(source, "{separator}{}", literal(text));
    }
    Ok(lark(source))
}

/// Quotes a text for Lark: a JSON string.
fn literal(text: &str) -> String {
    Value::from(text).to_string()
}

/// Tool calls as a part of a Lark grammar.
struct Calls {
    start: &'static str,
    rules: String,
}

/// One call or several of the named tools (of all tools if none are named).
fn calls(body: &Body<'_>, names: Option<&[String]>, several: bool, spec: &ModelSpec) -> Result<Calls, ApiError> {
    let special = |name: &str| spec.tokenizer.as_ref().and_then(|tokenizer| tokenizer.special_id(name));
    let (Some(begin), Some(arguments)) = (special("[TOOL_CALLS]"), special("[ARGS]")) else {
        return Err(ApiError::invalid(
            "tool_choice",
            "This model's tokenizer has no tool calls: they can't be forced.",
        ));
    };
    // like the conversation parser: an unpaired surrogate becomes U+FFFD
    let tools = match body.tools.map(|tools| Json::parse(tools.get()).map(|tools| tools.to_value())) {
        None => Vec::new(),
        Some(Ok(Value::Array(tools))) => tools,
        Some(Ok(_)) => return Err(ApiError::invalid("tools", "`tools` must be an array.")),
        Some(Err(error)) => return Err(ApiError::invalid("tools", format!("`tools`: {error}."))),
    };
    let functions: Vec<&Value> = tools.iter().filter_map(|tool| tool.get("function")).collect();
    let offered: HashSet<&str> = functions.iter().filter_map(|function| function.get("name")?.as_str()).collect();
    if let Some(stranger) = names.unwrap_or_default().iter().find(|name| !offered.contains(name.as_str())) {
        let shown: String = stranger.chars().take(64).collect();
        let message = format!("`tool_choice` names \"{shown}\", which is not one of `tools`.");
        return Err(ApiError::invalid("tool_choice", message));
    }
    let wanted: Option<HashSet<&str>> = names.map(|names| names.iter().map(String::as_str).collect());
    let mut rules = String::from("calls: ");
    let mut bodies = String::new();
    let mut count = 0;
    for (index, function) in functions.into_iter().enumerate() {
        cpu_budget::check(Stage::Schema)?;
        let Some(name) = function.get("name").and_then(Value::as_str) else { continue };
        if wanted.as_ref().is_some_and(|wanted| !wanted.contains(name)) {
            continue;
        }
        let strict = function.get("strict").and_then(Value::as_bool).unwrap_or(false);
        let schema = match function.get("parameters") {
            Some(schema) if schema.as_object().is_some_and(|schema| !schema.is_empty()) => {
                schema::for_group(schema, strict, false).map_err(|unkept| {
                    let message = format!("`tools.{index}.function.parameters`: the schema's {unkept}.");
                    ApiError::invalid("tools", message)
                })?
            }
            _ => ANY_OBJECT.to_owned(),
        };
        let separator = if count == 0 { "" } else { " | " };
        let _ = write!(rules, "{separator}call_{count}");
        let _ = write!(
            bodies,
            "call_{count}: <[{begin}]> {} <[{arguments}]> arguments_{count}\narguments_{count}: %json {schema}\n",
            literal(name)
        );
        count += 1;
    }
    if count == 0 {
        return Err(ApiError::invalid("tool_choice", "`tool_choice` names no tool of `tools`."));
    }
    let start = if several { "calls+" } else { "calls" };
    Ok(Calls { start, rules: format!("{rules}\n{bodies}") })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(body: &Value) -> Result<Option<Structure>, ApiError> {
        let bytes = body.to_string().into_bytes();
        let body = Body::parse(&bytes, crate::api::declare::Operation::Chat)?;
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/tokenizers/tekken-v13-8k.json");
        let tokenizer = bora_common::tokenizer::Tokenizer::from_file(file).unwrap();
        let spec = ModelSpec { tokenizer: Some(tokenizer.into()), ..ModelSpec::default() };
        structure(&body, Endpoint::Chat, &ToolChoice::of(&body)?, &spec)
    }

    fn tools() -> Value {
        json!([{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
               {"type": "function", "function": {"name": "say \"hi\""}}])
    }

    #[test]
    fn writes_forced_calls_with_token_ids() {
        let forced = read(&json!({"tools": tools(), "tool_choice": "required"})).unwrap().unwrap();
        assert_eq!(forced.field, "tool_choice");
        assert!(
            forced.grammar.source.starts_with("start: calls+\ncalls: call_0 | call_1\n"),
            "{}",
            forced.grammar.source
        );
        assert!(forced.grammar.source.contains(r#"call_0: <[9]> "add" <[32]> arguments_0"#));
        assert!(forced.grammar.source.contains(r#""say \"hi\"""#));

        let named = json!({"tools": tools(), "tool_choice": {"type": "function", "function": {"name": "add"}}});
        let named = read(&named).unwrap().unwrap();
        assert!(named.grammar.source.starts_with("start: calls\ncalls: call_0\n"), "{}", named.grammar.source);

        let allowed = |mode: &str, names: &[&str]| {
            let names: Vec<Value> =
                names.iter().map(|name| json!({"type": "function", "function": {"name": name}})).collect();
            json!({"tools": tools(), "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": names}}})
        };
        let some = read(&allowed("required", &["add"])).unwrap().unwrap();
        assert!(some.grammar.source.starts_with("start: calls+\ncalls: call_0\n"), "{}", some.grammar.source);
        let some = read(&allowed("auto", &["add"])).unwrap().unwrap();
        let start = "start: text? (calls+)?\ntext: /(?s:.+)/\ncalls: call_0\ncall_0: <[9]> \"add\" <[32]>";
        assert!(some.grammar.source.starts_with(start), "{}", some.grammar.source);
        assert_eq!(read(&allowed("auto", &[])).unwrap(), None);

        let one = json!({"tools": tools(), "tool_choice": "any", "parallel_tool_calls": false});
        assert!(read(&one).unwrap().unwrap().grammar.source.starts_with("start: calls\n"));
    }

    #[test]
    fn allows_calls_besides_a_json_output() {
        let format = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}});
        let plain = read(&json!({"response_format": format})).unwrap().unwrap();
        assert_eq!((plain.grammar.kind(), plain.field), (Kind::JsonSchema, "response_format"));
        let either = read(&json!({"response_format": format, "tools": tools()})).unwrap().unwrap();
        assert!(
            either.grammar.source.starts_with("start: answer | calls+\nanswer: %json {"),
            "{}",
            either.grammar.source
        );
        let choice = json!({"type": "allowed_tools", "allowed_tools": {"mode": "auto",
            "tools": [{"type": "function", "function": {"name": "add"}}]}});
        let some = read(&json!({"response_format": format, "tools": tools(), "tool_choice": choice})).unwrap().unwrap();
        assert!(
            some.grammar.source.starts_with("start: answer | calls+\n")
                && some.grammar.source.contains("\ncalls: call_0\n"),
            "{}",
            some.grammar.source
        );
        let never = json!({"response_format": format, "tools": tools(), "tool_choice": "none"});
        assert_eq!(read(&never).unwrap().unwrap().grammar.kind(), Kind::JsonSchema);
        assert_eq!(read(&json!({"response_format": {"type": "text"}})).unwrap(), None);
    }

    #[test]
    fn names_unsupported_combinations() {
        for (body, field) in [
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"tool_choice": "perhaps", "tools": tools()}), "tool_choice"),
            (json!({"tool_choice": 7}), "tool_choice"),
            (
                json!({"tools": tools(), "tool_choice": {"type": "function", "function": {"name": "sub"}}}),
                "tool_choice",
            ),
            (json!({"tools": tools(), "tool_choice": {"type": "function"}}), "tool_choice"),
            (json!({"response_format": {"type": "xml"}}), "response_format"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format"),
            (json!({"guided_json": "{"}), "guided_json"),
            (json!({"guided_json": 7}), "guided_json"),
            (json!({"guided_choice": []}), "guided_choice"),
            (json!({"guided_choice": ["a", 7]}), "guided_choice"),
            (json!({"guided_regex": 7}), "guided_regex"),
            (json!({"guided_json": {}, "guided_regex": "a"}), "guided_regex"),
            (json!({"structured_outputs": {"regex": "a", "json": {}}}), "structured_outputs"),
            (json!({"structured_outputs": {}}), "structured_outputs"),
            (json!({"guided_regex": "a".repeat(MAX_GRAMMAR_BYTES + 1)}), "guided_regex"),
        ] {
            let error = read(&body).expect_err(&body.to_string());
            assert_eq!(error.param.as_deref(), Some(field), "{}", error.message);
        }
    }

    #[test]
    fn accepts_a_schema_for_json_objects() {
        let form = json!({"response_format": {"type": "json_object", "schema": {"properties": {"a": {"const": 1}}}}});
        let form = read(&form).unwrap().unwrap().grammar;
        assert!(form.kind() == Kind::JsonSchema && form.source.contains(r#""const":1"#), "{}", form.source);
        let wrong = read(&json!({"response_format": {"type": "json_object", "schema": 7}})).unwrap_err();
        assert_eq!(wrong.param.as_deref(), Some("response_format"));
        let any = read(&json!({"response_format": {"type": "json_object"}})).unwrap().unwrap();
        assert_eq!(any.grammar.source, schema::for_group(&json!({"type": "object"}), false, true).unwrap());
    }

    #[test]
    fn rejects_patterns_only_if_a_form_is_forced() {
        let tools = |strict: bool| {
            json!([{"type": "function", "function": {"name": "pay", "description": "cut \u{fffd}", "strict": strict,
                "parameters": {"type": "object", "properties": {"x": {"type": "string", "pattern": "^(?!a)b"}}}}}])
        };
        assert_eq!(read(&json!({"tools": tools(true)})).unwrap(), None);
        let forced = |strict: bool| read(&json!({"tools": tools(strict), "tool_choice": "required"}));
        assert!(!forced(false).unwrap().unwrap().grammar.source.contains("\"pattern\":"));
        let refused = forced(true).unwrap_err();
        assert!(refused.message.contains("`tools.0.function.parameters`"), "{}", refused.message);
        assert!(refused.message.contains("`/properties/x/pattern`"), "{}", refused.message);
        let format = json!({"type": "json_schema", "json_schema": {"schema": {"pattern": r"\bx"}, "strict": true}});
        let refused = read(&json!({"response_format": format})).unwrap_err();
        assert!(refused.param.as_deref() == Some("response_format") && refused.message.contains("`/pattern`"));
    }

    #[test]
    fn accepts_unpaired_surrogates_in_forced_tools() {
        let body = br#"{"tool_choice":"required","tools":[{"type":"function","function":{"name":"f","description":"cut \ud83d"}}]}"#;
        let body = Body::parse(body, crate::api::declare::Operation::Chat).unwrap();
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/tokenizers/tekken-v13-8k.json");
        let tokenizer = bora_common::tokenizer::Tokenizer::from_file(file).unwrap();
        let spec = ModelSpec { tokenizer: Some(tokenizer.into()), ..ModelSpec::default() };
        let choice = ToolChoice::of(&body).unwrap();
        assert!(structure(&body, Endpoint::Chat, &choice, &spec).unwrap().is_some());
    }

    #[test]
    fn rejects_forms_that_the_tenant_may_not_use() {
        let limits = TenantLimits { allow_grammar: Some(false), allow_regex: Some(false), ..TenantLimits::default() };
        for (body, field) in [
            (json!({"guided_grammar": "start: \"a\""}), "guided_grammar"),
            (json!({"guided_regex": "a"}), "guided_regex"),
            (json!({"structured_outputs": {"grammar": "start: \"a\""}}), "structured_outputs"),
            (json!({"structured_outputs": {"regex": "a"}}), "structured_outputs"),
            (json!({"guided_json": {}}), ""),
            (json!({"structured_outputs": {"choice": ["a"], "regex": null}}), ""),
        ] {
            let bytes = body.to_string().into_bytes();
            let body = Body::parse(&bytes, crate::api::declare::Operation::Chat).unwrap();
            assert!(check_allowed(&body, &TenantLimits::default()).is_ok());
            match check_allowed(&body, &limits) {
                Ok(()) => assert_eq!(field, ""),
                Err(error) => {
                    assert_eq!((error.status.as_u16(), error.param.as_deref()), (403, Some(field)));
                }
            }
        }
    }

    #[test]
    fn accepts_fields_of_vllm() {
        for (body, kind) in [
            (json!({"guided_json": {"type": "integer"}}), Kind::JsonSchema),
            (json!({"guided_json": "{\"type\": \"integer\"}"}), Kind::JsonSchema),
            (json!({"guided_regex": "[ab]+"}), Kind::Regex),
            (json!({"guided_choice": ["left \"hand\"", "right"]}), Kind::Lark),
            (json!({"guided_grammar": "start: \"a\""}), Kind::Lark),
            (json!({"structured_outputs": {"choice": ["a"]}}), Kind::Lark),
            (json!({"structured_outputs": {"json_object": true, "regex": null}}), Kind::JsonSchema),
        ] {
            assert_eq!(read(&body).unwrap().unwrap().grammar.kind(), kind, "{body}");
        }
        assert_eq!(
            read(&json!({"guided_choice": ["left \"hand\"", "right"]})).unwrap().unwrap().grammar.source,
            r#"start: "left \"hand\"" | "right""#
        );
    }
}
