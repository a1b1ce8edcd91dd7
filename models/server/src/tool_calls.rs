//! Calls of tools in a model's answer: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, the form of Hermes, Qwen
//! and others.

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

/// What begins a call.
pub(crate) const BEGIN: &str = "<tool_call>";
const END: &str = "</tool_call>";

/// One call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ToolCall {
    pub name: String,
    /// A JSON object as text.
    pub arguments: String,
}

#[derive(Deserialize)]
struct Written {
    name: String,
    arguments: Box<RawValue>,
}

/// The calls of a text that begins with the first [`BEGIN`]. `None` if anything in it is no call.
pub(crate) fn parse(text: &str) -> Option<Vec<ToolCall>> {
    let mut rest = text.trim();
    let mut calls = Vec::new();
    while !rest.is_empty() {
        // The JSON says where it ends: its texts may hold anything.
        let body = rest.strip_prefix(BEGIN)?;
        let mut json = serde_json::Deserializer::from_str(body).into_iter::<Written>();
        let Written { name, arguments } = json.next()?.ok()?;
        let after = body[json.byte_offset()..].trim_start().strip_prefix(END)?;
        let arguments = arguments.get();
        arguments.starts_with('{').then_some(())?;
        calls.push(ToolCall { name, arguments: arguments.to_owned() });
        rest = after.trim_start();
    }
    (!calls.is_empty()).then_some(calls)
}

/// The calls as OpenAI shows them. `id` makes their names.
pub(crate) fn to_json(calls: &[ToolCall], id: &str, with_index: bool) -> Value {
    let call = |(i, call): (usize, &ToolCall)| {
        let mut value = json!({
            "id": format!("call_{id}_{i}"),
            "type": "function",
            "function": { "name": call.name, "arguments": call.arguments },
        });
        if with_index {
            value["index"] = json!(i);
        }
        value
    };
    calls.iter().enumerate().map(call).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_read_whole_or_not_at_all() {
        let one = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Bern\", \"a\": 1}}\n</tool_call>";
        let weather = ToolCall { name: "weather".into(), arguments: "{\"city\": \"Bern\", \"a\": 1}".into() };
        assert_eq!(parse(one).unwrap(), std::slice::from_ref(&weather));
        assert_eq!(parse(&format!("{one}\n{one}\n")).unwrap(), [weather.clone(), weather]);
        let odd = "<tool_call>{\"name\": \"a\", \"arguments\": {\"b\": \"</tool_call>\"}}</tool_call>";
        let arguments = "{\"b\": \"</tool_call>\"}".into();
        assert_eq!(parse(odd).unwrap(), [ToolCall { name: "a".into(), arguments }]);
        for other in [
            "",
            "text",
            "<tool_call>{}</tool_call>",
            "<tool_call>{\"name\": \"a\", \"arguments\": \"b\"}</tool_call>",
            "<tool_call>{\"name\": \"a\", \"arguments\": {}}",
            "<tool_call>{\"name\": \"a\", \"arguments\": {}}</tool_call> and text",
        ] {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
