//! The fields of a request that give its answer a form.

use bitnet_burn_engine::Constraint;
use bitnet_burn_engine::tools::Tool;
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
fn one(before: Option<Asked>, next: Asked) -> Result<Option<Asked>, ApiError> {
    match before {
        None => Ok(Some(next)),
        Some((other, _)) => Err(both(other, next.0)),
    }
}

/// Two fields that give the answer a form.
pub(crate) fn both(one: &str, other: &'static str) -> ApiError {
    ApiError::field(other, format!("{one} and {other} exclude each other: an answer has one form"))
}

#[derive(Deserialize)]
struct Written {
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

/// What `tools` and `tool_choice` say.
pub(crate) enum ToolChoice {
    /// The model is told of no tool.
    None,
    /// The model decides.
    Auto(Vec<Tool>),
    /// It must call one of these.
    Call(Vec<Tool>),
}

/// What becomes of these tools, a list as JSON.
pub(crate) fn tool_choice(fields: &mut Fields, tools: Option<&RawValue>) -> Result<ToolChoice, ApiError> {
    const FIELD: &str = "tool_choice";
    let choice = fields.take::<Value>(FIELD)?.unwrap_or_else(|| "auto".into());
    let (must, name) = match choice.as_str() {
        Some("none") => return Ok(ToolChoice::None),
        Some("auto") => (false, None),
        Some("required") => (true, None),
        _ => match serde_json::from_value(choice) {
            Ok(Named { function: Name { name } }) => (true, Some(name)),
            Err(_) => {
                let message = "tool_choice is \"auto\", \"none\", \"required\", or {\"type\": \"function\", \"function\": \
                    {\"name\": ...}}";
                return Err(ApiError::field(FIELD, message));
            }
        },
    };
    let tools = tools.map_or("[]", RawValue::get);
    let tools: Vec<Written> = serde_json::from_str(tools)
        .map_err(|_| ApiError::field("tools", "tools: each needs a function with a name"))?;
    let tools = tools
        .into_iter()
        .map(|Written { function: Function { name, parameters } }| Tool { name, parameters });
    let mut tools: Vec<Tool> = tools.collect();
    if !must {
        return Ok(ToolChoice::Auto(tools));
    }
    if let Some(name) = &name {
        tools.retain(|tool| tool.name == *name);
    }
    if tools.is_empty() {
        let message = match name {
            Some(name) => format!("tool_choice: tools has no function {name:?}"),
            None => "tool_choice \"required\" needs tools".to_owned(),
        };
        return Err(ApiError::field(FIELD, message));
    }
    Ok(ToolChoice::Call(tools))
}
