//! The fields of a request that give its answer a form.

use bitnet_burn_engine::Constraint;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::ApiError;
use crate::fields::Fields;

/// A constraint, and the field that asks for it.
pub(crate) type Asked = (&'static str, Constraint);

/// (Not an enum by `type`: those can't hold a schema as it was written.)
#[derive(Deserialize)]
struct ResponseFormat {
    #[serde(rename = "type")]
    kind: String,
    json_schema: Option<JsonSchema>,
}

/// (Its `name`, `description` and `strict` change nothing: answers always follow the schema.)
#[derive(Deserialize)]
struct JsonSchema {
    schema: Box<RawValue>,
}

/// The form that `response_format`, `regex`, `choice` or `grammar` asks for.
pub(crate) fn take(fields: &mut Fields) -> Result<Option<Asked>, ApiError> {
    let format = match fields.take::<ResponseFormat>("response_format")? {
        None => None,
        Some(ResponseFormat { kind, json_schema }) => match (kind.as_str(), json_schema) {
            ("text", _) => None,
            ("json_object", _) => Some(Constraint::Json),
            ("json_schema", Some(format)) => Some(Constraint::JsonSchema(format.schema.get().to_owned())),
            _ => {
                let message = "response_format: its type is \"text\", \"json_object\", or \"json_schema\" with json_schema: \
                               {\"schema\": {...}}";
                return Err(ApiError::field("response_format", message));
            }
        },
    };
    let all = [
        ("response_format", format),
        ("regex", fields.take("regex")?.map(Constraint::Regex)),
        ("choice", fields.take("choice")?.map(Constraint::Choice)),
        ("grammar", fields.take("grammar")?.map(Constraint::Grammar)),
    ];
    all.into_iter().filter_map(|(field, constraint)| Some((field, constraint?))).try_fold(None, one)
}

/// At most one of them.
pub(crate) fn one(before: Option<Asked>, next: Asked) -> Result<Option<Asked>, ApiError> {
    match before {
        None => Ok(Some(next)),
        Some((other, _)) => {
            let message = format!("{other} and {} exclude each other: an answer has one form", next.0);
            Err(ApiError::field(next.0, message))
        }
    }
}

#[derive(Deserialize)]
struct Tool {
    function: Function,
}

#[derive(Deserialize)]
struct Function {
    name: String,
    parameters: Option<Value>,
}

#[derive(Deserialize)]
struct Named {
    function: Name,
}

#[derive(Deserialize)]
struct Name {
    name: String,
}

/// What `tool_choice` says.
pub(crate) enum ToolChoice {
    /// The model decides.
    Auto,
    /// The model is told of no tool.
    None,
    /// It must call a tool.
    Call(Constraint),
}

/// What becomes of these tools, a list as JSON.
pub(crate) fn tool_choice(fields: &mut Fields, tools: Option<&RawValue>) -> Result<ToolChoice, ApiError> {
    const FIELD: &str = "tool_choice";
    let Some(choice) = fields.take::<Value>(FIELD)? else { return Ok(ToolChoice::Auto) };
    let name = match choice.as_str() {
        Some("auto") => return Ok(ToolChoice::Auto),
        Some("none") => return Ok(ToolChoice::None),
        Some("required") => None,
        _ => match serde_json::from_value(choice) {
            Ok(Named { function: Name { name } }) => Some(name),
            Err(_) => {
                let message = "tool_choice is \"auto\", \"none\", \"required\", or {\"type\": \"function\", \"function\": \
                    {\"name\": ...}}";
                return Err(ApiError::field(FIELD, message));
            }
        },
    };
    let tools = tools.map_or("[]", RawValue::get);
    let tools: Vec<Tool> = serde_json::from_str(tools)
        .map_err(|_| ApiError::field("tools", "tools: each needs a function with a name"))?;
    let mut functions: Vec<_> =
        tools.into_iter().map(|tool| (tool.function.name, tool.function.parameters)).collect();
    if let Some(name) = &name {
        functions.retain(|(known, _)| known == name);
    }
    if functions.is_empty() {
        let message = match name {
            Some(name) => format!("tool_choice: tools has no function {name:?}"),
            None => "tool_choice \"required\" needs tools".to_owned(),
        };
        return Err(ApiError::field(FIELD, message));
    }
    Ok(ToolChoice::Call(Constraint::tool_call(functions)))
}
