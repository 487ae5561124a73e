//! The tools of a request to `/v1/responses`: their form in the prompt, and the names of their calls in the response.
//!
//! - A *function* is a function.
//! - The functions of a *namespace* are functions named `namespace__function`; their calls are returned with both
//!   parts.
//! - A *custom* tool accepts a text. It is a function with one argument, which holds the text.
//! - All other tools run on OpenAI's servers (`web_search`, ...). They are left out.

use std::{borrow::Cow, collections::HashMap};

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{
    Map, Value, json,
    value::{RawValue, to_raw_value},
};

use crate::api::{
    convert::{ChatTool, ChatToolFunction, Place, Text, entry, missing},
    error::ApiError,
};

/// The single argument of a custom tool.
pub const INPUT: &str = "input";
/// Maximum length of a function's name.
const MAX_NAME_BYTES: usize = 128;

/// One of `tools`: a function, a namespace of functions or a custom tool; other tools are left out.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(rename = "ResponsesTool")]
pub struct Tool<'a> {
    /// `function`, `namespace` or `custom`.
    #[schemars(required)]
    r#type: Option<Cow<'a, str>>,
    #[serde(borrow)]
    #[schemars(required, with = "String")]
    name: Option<&'a RawValue>,
    #[serde(borrow)]
    #[schemars(with = "Option<String>")]
    description: Option<&'a RawValue>,
    /// A JSON schema.
    #[serde(borrow)]
    #[schemars(with = "Option<Map<String, Value>>")]
    parameters: Option<&'a RawValue>,
    #[serde(borrow)]
    #[schemars(with = "Option<bool>")]
    strict: Option<&'a RawValue>,
    /// The functions of a namespace.
    #[serde(borrow)]
    #[schemars(with = "Option<Vec<Map<String, Value>>>")]
    tools: Option<&'a RawValue>,
    /// The format of a custom tool's text.
    #[serde(borrow)]
    #[schemars(with = "Option<Map<String, Value>>")]
    format: Option<&'a RawValue>,
}

/// `format` of a custom tool.
#[derive(Deserialize)]
struct Format {
    r#type: String,
    syntax: Option<String>,
    definition: Option<String>,
}

/// The client's name of a tool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ToolName {
    /// The namespace of its declaration.
    pub namespace: Option<String>,
    /// Its name in that declaration.
    pub name: String,
    /// Whether it accepts a text instead of arguments.
    pub is_custom: bool,
}

/// The tools whose name in the prompt differs from the client's name.
#[derive(Debug, Default)]
pub struct ToolNames(HashMap<String, ToolName>);

impl ToolNames {
    /// The tool that the model calls by this name.
    pub fn resolve(&self, name: &str) -> ToolName {
        self.0.get(name).cloned().unwrap_or_else(|| ToolName { name: name.to_owned(), ..ToolName::default() })
    }

    /// The name of a tool in the prompt.
    pub fn in_prompt<'n>(&self, namespace: Option<&str>, name: &'n str) -> Cow<'n, str> {
        let Some(namespace) = namespace.filter(|namespace| !namespace.is_empty()) else { return Cow::Borrowed(name) };
        let joined = joined(namespace, name);
        let is_it = |tool: &ToolName| tool.namespace.as_deref() == Some(namespace) && tool.name == name;
        if self.0.get(&joined).is_none_or(is_it) {
            return Cow::Owned(joined);
        }
        let declared = self.0.iter().find(|(_, tool)| is_it(tool));
        Cow::Owned(declared.map_or(joined, |(in_prompt, _)| in_prompt.clone()))
    }

    /// Stores a tool. Returns its name in the prompt: a different one if the name is already used.
    fn add(&mut self, tool: ToolName) -> String {
        let first = tool.namespace.as_deref().map_or_else(|| tool.name.clone(), |space| joined(space, &tool.name));
        let mut in_prompt = first.clone();
        let mut number = 2;
        while self.0.get(&in_prompt).is_some_and(|other| *other != tool) {
            in_prompt = shortened(format!("{first}_{number}"));
            number += 1;
        }
        self.0.insert(in_prompt.clone(), tool);
        in_prompt
    }
}

fn joined(namespace: &str, name: &str) -> String {
    shortened(format!("{namespace}__{name}"))
}

/// Shortens a name that is too long: its beginning is kept, and a hash of the whole name is appended.
fn shortened(name: String) -> String {
    if name.len() <= MAX_NAME_BYTES {
        return name;
    }
    let hash = format!("_{:08x}", xxhash_rust::xxh3::xxh3_64(name.as_bytes()) as u32);
    let most = MAX_NAME_BYTES - hash.len();
    let end = (0..=most).rev().find(|at| name.is_char_boundary(*at)).unwrap_or(0);
    format!("{}{hash}", &name[..end])
}

/// The tools of a request while they are parsed.
#[derive(Default)]
pub struct Tools {
    /// Their names.
    pub names: ToolNames,
    /// Number of tools that were left out.
    pub left_out: u32,
}

impl Tools {
    /// Parses a list of tools; `place` is the position of its entries.
    pub fn read<'a>(
        &mut self,
        written: &[&'a RawValue],
        place: impl Fn(u32) -> Place,
    ) -> Result<Vec<(ChatTool<'a>, Place)>, ApiError> {
        let mut tools = Vec::with_capacity(written.len());
        for (index, written) in written.iter().enumerate() {
            self.read_tool(written, None, place(index as u32), &mut tools)?;
        }
        Ok(tools)
    }

    fn read_tool<'a>(
        &mut self,
        written: &'a RawValue,
        namespace: Option<&str>,
        place: Place,
        tools: &mut Vec<(ChatTool<'a>, Place)>,
    ) -> Result<(), ApiError> {
        let tool: Tool<'a> = entry(written, place)?;
        let name = |tool: &Tool<'a>| -> Result<String, ApiError> {
            entry(tool.name.ok_or_else(|| missing(place, "name"))?, place)
        };
        let function = match tool.r#type.as_deref() {
            Some("function") => {
                let name = match (namespace, tool.name) {
                    (Some(_), _) => Some(Text::Made(self.add(namespace, name(&tool)?, false))),
                    (None, written) => written.map(Text::ChatInput),
                };
                let strict = tool.strict.map(|strict| entry(strict, place)).transpose()?;
                let parameters = tool.parameters.map(Cow::Borrowed);
                ChatToolFunction { name, description: tool.description.map(Text::ChatInput), parameters, strict }
            }
            Some("custom") => {
                let name = Some(Text::Made(self.add(namespace, name(&tool)?, true)));
                custom(&tool, name, place)?
            }
            Some("namespace") if namespace.is_none() => {
                let name = name(&tool)?;
                let inner: Vec<&'a RawValue> = entry(tool.tools.ok_or_else(|| missing(place, "tools"))?, place)?;
                for (number, written) in inner.into_iter().enumerate() {
                    let place = match place {
                        Place::Entry(list, index) => Place::Part(list, index, "tools", number as u32),
                        other => other,
                    };
                    self.read_tool(written, Some(&name), place, tools)?;
                }
                return Ok(());
            }
            Some(_) => {
                self.left_out += 1;
                return Ok(());
            }
            None => return Err(missing(place, "type")),
        };
        tools.push((ChatTool { r#type: "function", function }, place));
        Ok(())
    }

    fn add(&mut self, namespace: Option<&str>, name: String, is_custom: bool) -> String {
        self.names.add(ToolName { namespace: namespace.map(str::to_owned), name, is_custom })
    }
}

/// Converts a custom tool to a function with one argument.
fn custom<'a>(tool: &Tool<'a>, name: Option<Text<'a>>, place: Place) -> Result<ChatToolFunction<'a>, ApiError> {
    let mut description: String =
        tool.description.map(|written| entry(written, place)).transpose()?.unwrap_or_default();
    let mut input = json!({"type": "string", "description": "The whole input of the tool, as text."});
    let format: Option<Format> = tool.format.map(|written| entry(written, place)).transpose()?;
    if let Some(Format { r#type, syntax, definition: Some(definition) }) = format
        && r#type == "grammar"
    {
        let syntax = syntax.unwrap_or_default();
        if syntax == "regex" {
            input["pattern"] = format!("^(?:{definition})$").into();
        }
        let separator = if description.is_empty() { "" } else { "\n\n" };
        description.push_str(&format!("{separator}The input must match this grammar ({syntax}):\n{definition}"));
    }
    let parameters = json!({"type": "object", "properties": {INPUT: input}, "required": [INPUT]});
    let parameters = to_raw_value(&parameters).map_err(|error| ApiError::internal(error.to_string()))?;
    Ok(ChatToolFunction {
        name,
        description: Some(Text::Made(description)),
        parameters: Some(Cow::Owned(parameters)),
        strict: None,
    })
}

/// Converts `tool_choice` to chat's form.
pub fn tool_choice(choice: Value, names: &ToolNames) -> Result<Value, ApiError> {
    let kind = choice.get("type").and_then(Value::as_str);
    match kind {
        // already in chat's form
        Some("function") if choice.get("function").is_some() => Ok(choice),
        Some("function" | "custom") => Ok(named(&choice, names)),
        Some("allowed_tools") if choice.get("allowed_tools").is_none() => {
            let allowed = choice.get("tools").and_then(Value::as_array);
            let allowed = allowed.map(|tools| tools.iter().map(|tool| named(tool, names)).collect());
            let allowed: Value = allowed.map_or(Value::Null, Value::Array);
            Ok(json!({"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": allowed}}))
        }
        Some("allowed_tools") | None => Ok(choice),
        Some(kind) => {
            let kind: String = kind.chars().take(64).collect();
            let message = format!("`tool_choice`: this server runs no tools of type \"{kind}\".");
            Err(ApiError::invalid("tool_choice", message))
        }
    }
}

/// Converts an object that names a tool to chat's form, which is one level deeper.
fn named(choice: &Value, names: &ToolNames) -> Value {
    let text = |key: &str| choice.get(key).and_then(Value::as_str);
    let name = match (text("type"), text("name")) {
        (Some("function" | "custom"), Some(name)) => Value::from(names.in_prompt(text("namespace"), name)),
        _ => Value::Null,
    };
    json!({"type": "function", "function": {"name": name}})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(written: &Value) -> (Tools, Vec<Value>) {
        let written: Vec<Box<RawValue>> = serde_json::from_str(&written.to_string()).expect("a list");
        let written: Vec<&RawValue> = written.iter().map(|tool| &**tool).collect();
        let mut tools = Tools::default();
        let read = tools.read(&written, |index| Place::Entry("tools", index)).expect("tools");
        let read = read.iter().map(|(tool, _)| serde_json::to_value(tool).expect("JSON")).collect();
        (tools, read)
    }

    fn in_namespace(namespace: &str, name: &str) -> Value {
        json!({"type": "namespace", "name": namespace, "tools": [{"type": "function", "name": name}]})
    }

    #[test]
    fn maps_names_in_the_prompt_to_tools() {
        let long = "n".repeat(100);
        let (tools, read) = read(&json!([
            {"type": "function", "name": "f"}, in_namespace("mcp__a", "f"), in_namespace("a", "b__c"),
            in_namespace("a__b", "c"), in_namespace(&long, &long), {"type": "web_search"},
            {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "regex", "definition": "a+"}}
        ]));
        let names: Vec<&str> = read.iter().filter_map(|tool| tool["function"]["name"].as_str()).collect();
        assert_eq!(names[..4], ["f", "mcp__a__f", "a__b__c", "a__b__c_2"]);
        assert!(names[4].len() == 128 && names[4].starts_with(&format!("{long}__n")));
        assert_eq!((names[5], tools.left_out), ("apply_patch", 1));
        for (namespace, name, in_prompt) in [
            (None, "f", names[0]),
            (Some("mcp__a"), "f", names[1]),
            (Some("a"), "b__c", names[2]),
            (Some("a__b"), "c", names[3]),
            (Some(long.as_str()), long.as_str(), names[4]),
            (None, "apply_patch", names[5]),
            (Some("gone"), "x", "gone__x"),
        ] {
            assert_eq!(tools.names.in_prompt(namespace, name), in_prompt);
            if namespace != Some("gone") {
                let resolved = tools.names.resolve(in_prompt);
                assert_eq!((resolved.namespace.as_deref(), resolved.name.as_str()), (namespace, name));
                assert_eq!(resolved.is_custom, name == "apply_patch");
            }
        }
        let function = &read[5]["function"];
        assert_eq!(function["parameters"]["properties"]["input"]["pattern"], "^(?:a+)$");
        assert!(function["description"].as_str().is_some_and(|text| text.ends_with("(regex):\na+")));
    }

    #[test]
    fn converts_choices_to_names_in_the_prompt() {
        let (tools, _) = read(&json!([in_namespace("mcp__a", "f"), {"type": "custom", "name": "p"}]));
        let chosen = |choice: Value| tool_choice(choice, &tools.names);
        let function = |name: &str| json!({"type": "function", "function": {"name": name}});
        assert_eq!(chosen(json!({"type": "function", "namespace": "mcp__a", "name": "f"})), Ok(function("mcp__a__f")));
        assert_eq!(chosen(json!({"type": "custom", "name": "p"})), Ok(function("p")));
        assert_eq!(chosen(json!("auto")), Ok(json!("auto")));
        let error = chosen(json!({"type": "web_search"})).expect_err("a refusal");
        assert!(error.param.as_deref() == Some("tool_choice") && error.message.contains("web_search"));
    }
}
