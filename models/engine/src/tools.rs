//! Calls of tools (functions): how models write them in their answers. There is one table of forms, and the chat template
//! says by its own text which of them the model was trained on.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::constraint::{Constraint, json_schema, lark_text};
use crate::sampling::StopMatcher;

/// A function that a model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// The schema of its arguments, an object. Without one, any object will do.
    pub parameters: Option<Value>,
}

/// One call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolCall {
    /// The function's name.
    pub name: String,
    /// A JSON object as text.
    pub arguments: String,
}

/// How calls are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallForm {
    /// `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen 2.5 and 3, Falcon 3, Falcon-H1.
    Hermes,
    /// `<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`, with line breaks between the
    /// parts: Qwen3-Coder, Qwen 3.5.
    Xml,
    /// `{"name": ..., "parameters": {...}}`, perhaps behind `<|python_tag|>`: Llama 3.1 and later.
    Llama,
    /// `[TOOL_CALLS] [{"name": ..., "arguments": {...}}]`: Mistral.
    Mistral,
    /// `[TOOL_CALLS]NAME[ARGS]{...}`: Mistral's models of 2025.
    MistralArgs,
}

/// What tells of a form.
struct Marks {
    form: CallForm,
    /// Stands in a template of this form, and in none of the forms behind it.
    template: &'static str,
    /// What calls begin with, in an answer.
    begins: &'static [&'static str],
    /// Special tokens that are a part of calls.
    special: &'static [&'static str],
    /// What a prompt ends with whose answer must be a call.
    prompt: &'static str,
}

const FORMS: [Marks; 5] = [
    Marks {
        form: CallForm::Xml,
        template: "<parameter=",
        begins: &["<tool_call>", "<function="],
        special: &[],
        prompt: "",
    },
    Marks {
        form: CallForm::MistralArgs,
        template: "[ARGS]",
        begins: &["[TOOL_CALLS]"],
        special: &["[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"],
        prompt: "[TOOL_CALLS]",
    },
    Marks {
        form: CallForm::Mistral,
        template: "[TOOL_CALLS]",
        begins: &["[TOOL_CALLS]"],
        special: &["[TOOL_CALLS]"],
        prompt: "[TOOL_CALLS]",
    },
    Marks {
        form: CallForm::Hermes,
        template: "<tool_call>",
        begins: &["<tool_call>"],
        special: &[],
        prompt: "",
    },
    Marks {
        form: CallForm::Llama,
        template: "\"parameters\": ",
        begins: &["<|python_tag|>", "{\"name\":", "{\"type\": \"function\""],
        special: &["<|python_tag|>"],
        prompt: "",
    },
];

/// A call as JSON.
#[derive(Deserialize)]
struct Written {
    name: String,
    #[serde(alias = "parameters")]
    arguments: Box<RawValue>,
}

impl CallForm {
    /// The form that a chat template asks for. One that says nothing of a form leaves it to the model: then it is Hermes'.
    pub fn of(template: &str) -> Self {
        FORMS.iter().find(|marks| template.contains(marks.template)).map_or(Self::Hermes, |marks| marks.form)
    }

    fn marks(self) -> &'static Marks {
        FORMS.iter().find(|marks| marks.form == self).expect("the table has every form")
    }

    /// What calls begin with, in an answer.
    pub fn begins(self) -> &'static [&'static str] {
        self.marks().begins
    }

    /// Special tokens that are a part of calls. The text of an answer needs them.
    pub fn special(self) -> &'static [&'static str] {
        self.marks().special
    }

    /// What a prompt ends with whose answer must be a call. It is a part of the call.
    pub fn prompt(self) -> &'static str {
        self.marks().prompt
    }

    /// The text in front of the calls in an answer, and the calls. What only looks like a call is text.
    pub fn split<'t>(self, text: &'t str, tools: &[Tool]) -> (&'t str, Vec<ToolCall>) {
        // (The table has no empty text, so there is a matcher.)
        let Ok(mut matcher) = StopMatcher::new(self.begins()) else { return (text, Vec::new()) };
        let output = matcher.push(text);
        let (before, calls) = text.split_at(output.text.len());
        match output.stopped.and_then(|_| self.parse(calls, tools)) {
            Some(calls) => (before.trim_end(), calls),
            None => (text, Vec::new()),
        }
    }

    /// The calls of a text that begins with the first one. `None` if anything in it is no call.
    pub fn parse(self, text: &str, tools: &[Tool]) -> Option<Vec<ToolCall>> {
        let mut rest = text.trim();
        let mut calls = Vec::new();
        while !rest.is_empty() {
            rest = match self {
                Self::Hermes => hermes(rest, &mut calls)?,
                Self::Xml => xml(rest, tools, &mut calls)?,
                Self::Llama => llama(rest, tools, &mut calls)?,
                Self::Mistral | Self::MistralArgs => mistral(rest, &mut calls)?,
            }
            .trim_start();
        }
        (!calls.is_empty()).then_some(calls)
    }

    /// An answer that is a call of one of these tools, behind [`prompt`](Self::prompt). The arguments are valid by the tool's
    /// schema.
    pub fn constraint(self, tools: &[Tool]) -> Constraint {
        let (mut calls, mut rules) = (Vec::new(), String::new());
        for (i, Tool { name, parameters }) in tools.iter().enumerate() {
            let mut schema = json_schema(parameters.clone().unwrap_or_else(|| json!({})));
            if let Value::Object(fields) = &mut schema {
                fields.entry("type").or_insert_with(|| json!("object"));
            }
            calls.push(format!("call_{i}"));
            let (head, end) = match self {
                Self::Xml => {
                    rules.push_str(&xml_rules(i, name, &schema));
                    continue;
                }
                Self::MistralArgs => (format!("{name}[ARGS]"), ""),
                Self::Llama => (format!("{{\"name\": {}, \"parameters\": ", json!(name)), "}"),
                _ => (format!("{{\"name\": {}, \"arguments\": ", json!(name)), "}"),
            };
            let (head, end) = (lark_text(&head), lark_text(end));
            rules.push_str(&format!("call_{i}: {head} arguments_{i} {end}\narguments_{i}: %json {schema}\n"));
        }
        let calls = calls.join(" | ");
        let (begin, end) = match self {
            Self::Hermes => ("<tool_call>", "</tool_call>"),
            Self::Xml => ("<tool_call>\n", "</tool_call>"),
            Self::Mistral => ("[", "]"),
            Self::Llama | Self::MistralArgs => ("", ""),
        };
        let (begin, end) = (lark_text(begin), lark_text(end));
        Constraint::Grammar(format!("start: {begin} ({calls}) {end}\n{rules}"))
    }
}

/// The JSON at the beginning of a text, and what is behind it. It says itself where it ends: its texts may hold anything.
fn leading<'t, T: Deserialize<'t>>(text: &'t str) -> Option<(T, &'t str)> {
    let mut all = serde_json::Deserializer::from_str(text).into_iter();
    let value = all.next()?.ok()?;
    Some((value, &text[all.byte_offset()..]))
}

impl Written {
    fn call(self) -> Option<ToolCall> {
        let arguments = self.arguments.get();
        arguments.starts_with('{').then(|| ToolCall { name: self.name, arguments: arguments.to_owned() })
    }
}

fn hermes<'t>(text: &'t str, calls: &mut Vec<ToolCall>) -> Option<&'t str> {
    let (written, rest): (Written, _) = leading(text.strip_prefix("<tool_call>")?)?;
    calls.push(written.call()?);
    rest.trim_start().strip_prefix("</tool_call>")
}

fn llama<'t>(text: &'t str, tools: &[Tool], calls: &mut Vec<ToolCall>) -> Option<&'t str> {
    let text = text.strip_prefix(';').unwrap_or(text).trim_start();
    let tagged = text.strip_prefix("<|python_tag|>");
    let (written, rest): (Written, _) = leading(tagged.unwrap_or(text))?;
    // Any JSON may look like this.
    let known = tools.iter().any(|tool| tool.name == written.name);
    calls.push(written.call().filter(|_| known || tagged.is_some())?);
    Some(rest)
}

fn mistral<'t>(text: &'t str, calls: &mut Vec<ToolCall>) -> Option<&'t str> {
    let body = text.strip_prefix("[TOOL_CALLS]")?.trim_start();
    if body.starts_with('[') {
        let (all, rest): (Vec<Written>, _) = leading(body)?;
        for written in all {
            calls.push(written.call()?);
        }
        return Some(rest);
    }
    let (head, arguments) = body.split_once("[ARGS]")?;
    let name = head.split("[CALL_ID]").next()?.trim();
    let (arguments, rest): (&RawValue, _) = leading(arguments)?;
    let name = (!name.is_empty() && !name.contains(['[', '{', '\n'])).then(|| name.to_owned())?;
    calls.push(Written { name, arguments: arguments.to_owned() }.call()?);
    Some(rest)
}

fn xml<'t>(text: &'t str, tools: &[Tool], calls: &mut Vec<ToolCall>) -> Option<&'t str> {
    // Some models leave the outer tags out.
    let tagged = text.strip_prefix("<tool_call>");
    let (name, mut rest) = tagged.unwrap_or(text).trim_start().strip_prefix("<function=")?.split_once('>')?;
    let tool = tools.iter().find(|tool| tool.name == name);
    let mut arguments = Vec::new();
    let rest = loop {
        rest = rest.trim_start();
        if let Some(rest) = rest.strip_prefix("</function>") {
            break rest;
        }
        let (key, value) = rest.strip_prefix("<parameter=")?.split_once('>')?;
        let (value, behind) = value.split_once("</parameter>")?;
        let value = value.strip_prefix('\n').unwrap_or(value);
        let value = value.strip_suffix('\n').unwrap_or(value);
        arguments.push(format!("{}: {}", json!(key), xml_value(value, property(tool, key))));
        rest = behind;
    };
    calls.push(ToolCall { name: name.to_owned(), arguments: format!("{{{}}}", arguments.join(", ")) });
    match tagged {
        Some(_) => rest.trim_start().strip_prefix("</tool_call>"),
        None => Some(rest),
    }
}

/// The schema of one of a tool's parameters.
fn property<'t>(tool: Option<&'t Tool>, key: &str) -> Option<&'t Value> {
    tool?.parameters.as_ref()?.get("properties")?.get(key)
}

/// Whether a parameter is a text, which is written as it is, and not as JSON.
fn is_text(schema: Option<&Value>) -> bool {
    let Some(schema) = schema else { return true };
    match (schema.get("type"), schema.get("enum").and_then(Value::as_array)) {
        (Some(kind), _) => kind == "string",
        (None, Some(values)) => values.iter().all(Value::is_string),
        (None, None) => schema.as_object().is_none_or(serde_json::Map::is_empty),
    }
}

/// A parameter as JSON. What its schema wants to be no text, and is no JSON, stays a text.
fn xml_value(value: &str, schema: Option<&Value>) -> Cow<'static, str> {
    if !is_text(schema)
        && let Ok(value) = serde_json::from_str::<&RawValue>(value.trim())
    {
        return value.get().to_owned().into();
    }
    json!(value).to_string().into()
}

/// The rules of a call of the tool `i`. Its parameters come in the order of the schema; those that the schema does not
/// require may be missing.
fn xml_rules(i: usize, name: &str, schema: &Value) -> String {
    const END: &str = "\n</parameter>\n";
    let required: Vec<&str> = schema
        .get("required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let properties = schema.get("properties").and_then(Value::as_object);
    let (mut parts, mut rules) = (String::new(), String::new());
    for (j, (key, property)) in properties.into_iter().flatten().enumerate() {
        let optional = if required.contains(&key.as_str()) { "" } else { "?" };
        parts.push_str(&format!(" parameter_{i}_{j}{optional}"));
        let head = lark_text(&format!("<parameter={key}>\n"));
        rules.push_str(&format!("parameter_{i}_{j}: {head} value_{i}_{j}\n"));
        let texts = property.get("enum").and_then(Value::as_array);
        let value = match (is_text(Some(property)), texts) {
            (true, Some(texts)) => {
                let text = |text: &Value| lark_text(&format!("{}{END}", text.as_str().unwrap_or_default()));
                format!(": {}", texts.iter().map(text).collect::<Vec<_>>().join(" | "))
            }
            (true, None) => format!("[lazy]: /(?s:.*)/ {}", lark_text(END)),
            (false, _) => {
                let mut property = json_schema(property.clone());
                // What it may refer to.
                for definitions in ["$defs", "definitions"] {
                    if let (Value::Object(fields), Some(all)) = (&mut property, schema.get(definitions)) {
                        fields.insert(definitions.to_owned(), all.clone());
                    }
                }
                rules.push_str(&format!("json_{i}_{j}: %json {property}\n"));
                format!(": json_{i}_{j} {}", lark_text(END))
            }
        };
        rules.push_str(&format!("value_{i}_{j}{value}\n"));
    }
    let head = lark_text(&format!("<function={name}>\n"));
    format!("call_{i}: {head}{parts} \"</function>\\n\"\n{rules}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools() -> [Tool; 2] {
        let parameters = json!({ "type": "object", "properties": {
            "city": { "type": "string" }, "days": { "type": "integer" }, "more": { "enum": ["a", "b"] } } });
        [
            Tool { name: "weather".into(), parameters: Some(parameters) },
            Tool { name: "now".into(), parameters: None },
        ]
    }

    fn call(name: &str, arguments: &str) -> ToolCall {
        ToolCall { name: name.into(), arguments: arguments.into() }
    }

    /// Texts in a form with the calls that they are.
    fn read(form: CallForm, all: &[(&str, &[ToolCall])]) {
        for (text, calls) in all {
            assert_eq!(form.parse(text, &tools()).as_deref(), Some(*calls), "{text}");
            let longer = format!("Well. {text}");
            assert_eq!(form.split(&longer, &tools()), ("Well.", calls.to_vec()), "{text}");
        }
    }

    /// Texts that only look like calls.
    fn not_read(form: CallForm, all: &[&str]) {
        for text in all {
            assert_eq!(form.parse(text, &tools()), None, "{text}");
            assert_eq!(form.split(text, &tools()), (*text, Vec::new()), "{text}");
        }
    }

    #[test]
    fn hermes() {
        let one = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Bern\", \"a\": 1}}\n</tool_call>";
        let weather = call("weather", "{\"city\": \"Bern\", \"a\": 1}");
        let odd = "<tool_call>{\"name\": \"a\", \"arguments\": {\"b\": \"</tool_call>\"}}</tool_call>";
        read(
            CallForm::Hermes,
            &[
                (one, std::slice::from_ref(&weather)),
                (&format!("{one}\n{one}\n"), &[weather.clone(), weather.clone()]),
                (odd, &[call("a", "{\"b\": \"</tool_call>\"}")]),
            ],
        );
        not_read(
            CallForm::Hermes,
            &[
                "",
                "text",
                "<tool_call>{}</tool_call>",
                "<tool_call>{\"name\": \"a\", \"arguments\": \"b\"}</tool_call>",
                "<tool_call>{\"name\": \"a\", \"arguments\": {}}",
                "<tool_call>{\"name\": \"a\", \"arguments\": {}}</tool_call> and text",
            ],
        );
    }

    #[test]
    fn llama() {
        let weather = call("weather", "{\"city\": \"Bern\"}");
        let one = "{\"name\": \"weather\", \"parameters\": {\"city\": \"Bern\"}}";
        let typed = "{\"type\": \"function\", \"name\": \"weather\", \"parameters\": {\"city\": \"Bern\"}}";
        read(
            CallForm::Llama,
            &[
                (one, std::slice::from_ref(&weather)),
                (typed, std::slice::from_ref(&weather)),
                (&format!("<|python_tag|>{one}"), std::slice::from_ref(&weather)),
                (&format!("{one}; {one}"), &[weather.clone(), weather.clone()]),
                (&format!("<|python_tag|>{one}\n<|python_tag|>{typed}"), &[weather.clone(), weather.clone()]),
                ("<|python_tag|>{\"name\": \"other\", \"arguments\": {}}", &[call("other", "{}")]),
            ],
        );
        not_read(
            CallForm::Llama,
            &[
                "{\"name\": \"Bern\", \"parameters\": {}}",
                "{\"name\": \"weather\"}",
                "{\"name\": \"weather\", \"parameters\": 1}",
                "{\"name\": \"weather\", \"parameters\": {}} is a call",
                "<|python_tag|>print(1)",
                "{\"type\": \"function\"}",
            ],
        );
    }

    #[test]
    fn mistral() {
        let weather = call("weather", "{\"city\": \"Bern\"}");
        let one = "[TOOL_CALLS] [{\"name\": \"weather\", \"arguments\": {\"city\": \"Bern\"}, \"id\": \"123456789\"}]";
        read(
            CallForm::Mistral,
            &[
                (one, std::slice::from_ref(&weather)),
                (
                    "[TOOL_CALLS][{\"name\": \"weather\", \"arguments\": {\"city\": \"Bern\"}}, {\"name\": \"now\", \
                     \"arguments\": {}}]",
                    &[weather.clone(), call("now", "{}")],
                ),
            ],
        );
        read(
            CallForm::MistralArgs,
            &[
                ("[TOOL_CALLS]weather[ARGS]{\"city\": \"Bern\"}", std::slice::from_ref(&weather)),
                (
                    "[TOOL_CALLS]weather[CALL_ID]123456789[ARGS]{\"city\": \"Bern\"}[TOOL_CALLS]now[ARGS]{}",
                    &[weather.clone(), call("now", "{}")],
                ),
            ],
        );
        not_read(
            CallForm::MistralArgs,
            &[
                "[TOOL_CALLS]",
                "[TOOL_CALLS][]",
                "[TOOL_CALLS][{\"name\": \"a\"}]",
                "[TOOL_CALLS]a[ARGS]1",
                "[TOOL_CALLS] a {}",
            ],
        );
    }

    #[test]
    fn xml() {
        let text = "<tool_call>\n<function=weather>\n<parameter=city>\nBern \"the\ncity\"\n</parameter>\n<parameter=days>\n3\n\
                    </parameter>\n<parameter=more>\na\n</parameter>\n</function>\n</tool_call>";
        let weather = call("weather", r#"{"city": "Bern \"the\ncity\"", "days": 3, "more": "a"}"#);
        read(
            CallForm::Xml,
            &[
                (text, std::slice::from_ref(&weather)),
                (&format!("{text}\n{text}"), &[weather.clone(), weather.clone()]),
                ("<function=now>\n</function>", &[call("now", "{}")]),
                (
                    "<function=weather>\n<parameter=days>\nmany\n</parameter>\n</function>",
                    &[call("weather", "{\"days\": \"many\"}")],
                ),
                (
                    "<function=now>\n<parameter=x>\n1\n</parameter>\n</function>",
                    &[call("now", "{\"x\": \"1\"}")],
                ),
            ],
        );
        not_read(
            CallForm::Xml,
            &[
                "<tool_call>",
                "<tool_call>\n<function=now>\n</function>",
                "<function=now>\n<parameter=x>\n1\n</function>",
                "<function=now>\n</function> and text",
                "<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>",
            ],
        );
    }

    #[test]
    fn the_template_says_which_form_it_is() {
        for (template, form) in [
            ("{{ '<tool_call>' }}", CallForm::Hermes),
            ("no word of it", CallForm::Hermes),
            ("<tool_call>\\n<function=x>\\n<parameter=y>\\n", CallForm::Xml),
            ("{{- '{\"name\": \"' + call.name + '\", ' }}{{- '\"parameters\": ' }}", CallForm::Llama),
            ("{{ '[TOOL_CALLS] [' }}", CallForm::Mistral),
            ("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}", CallForm::MistralArgs),
        ] {
            assert_eq!(CallForm::of(template), form, "{template}");
        }
    }
}
