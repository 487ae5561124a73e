//! The functions that a request offers to the model.

use super::error::{At, ConversationError, Rule};
use super::message::{array, function_type, optional_bool, optional_string, required_object, required_string, within};
use super::python_json::{Json, dump_string};
use super::validate::{self, FunctionNames};
use crate::cpu_budget::{self, Stage};

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// What it does; empty when the request does not say.
    pub description: String,
    /// JSON Schema of its arguments; `{}` when the request has none.
    pub parameters: serde_json::Value,
    /// The parameters as Python's `json.dumps` writes them.
    dumped_parameters: String,
}

/// Reads the `tools` array, of at most `limit`.
pub(super) fn read_tools(tools: &Json<'_>, names: FunctionNames, limit: usize) -> Result<Vec<Tool>, ConversationError> {
    let at = At::root("tools");
    if *tools == Json::Null {
        return Ok(Vec::new());
    }
    let tools = array(tools, &at)?;
    within(tools.len(), limit, "tools", &at)?;
    tools.iter().enumerate().map(|(index, tool)| read_tool(tool, &at.index(index), names)).collect()
}

fn read_tool(tool: &Json<'_>, at: &At<'_>, names: FunctionNames) -> Result<Tool, ConversationError> {
    cpu_budget::check(Stage::Schema)?;
    if !matches!(tool, Json::Object(_)) {
        return Err(at.error(Rule::Type, format!("expected an object, got {}", tool.kind())));
    }
    function_type(tool, at)?;
    let function = required_object(tool, at, "function")?;
    let at = at.key("function");
    let name = required_string(function, &at, "name")?;
    names.check(name, &at.key("name"))?;
    let description = optional_string(function, &at, "description")?.unwrap_or_default();
    optional_bool(function, &at, "strict")?;
    let no_parameters = Json::Object(Vec::new());
    let parameters_at = at.key("parameters");
    let parameters = match function.get("parameters") {
        None | Some(Json::Null) => &no_parameters,
        Some(schema @ Json::Object(_)) => schema,
        Some(other) => {
            return Err(parameters_at.error(Rule::Type, format!("expected an object, got {}", other.kind())));
        }
    };
    let schema = parameters.to_value();
    validate::schema(&schema, &parameters_at)?;
    let mut dumped_parameters = String::new();
    parameters.dump(&mut dumped_parameters);
    Ok(Tool { name: name.to_owned(), description: description.to_owned(), parameters: schema, dumped_parameters })
}

/// The text between `[AVAILABLE_TOOLS]` and `[/AVAILABLE_TOOLS]`.
pub(super) fn dump_tools(tools: &[Tool]) -> String {
    let mut text = String::from("[");
    for (index, tool) in tools.iter().enumerate() {
        if index > 0 {
            text.push_str(", ");
        }
        text.push_str(r#"{"type": "function", "function": {"name": "#);
        dump_string(&tool.name, &mut text);
        text.push_str(r#", "description": "#);
        dump_string(&tool.description, &mut text);
        text.push_str(r#", "parameters": "#);
        text.push_str(&tool.dumped_parameters);
        text.push_str("}}");
    }
    text.push(']');
    text
}
