//! The filters and tests that differ from minijinja's, or that minijinja computes without a limit.

use minijinja::formatting::FormatStyle;
use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, State, Value};

use super::methods::{bind, optional_int, replace};
use super::operators::{add, contains, equal, formatted, order};
use super::strings::{self, Ends};
use super::text::{Json, Text, to_text};
use super::values::{View, error, is_list, is_namespace, items, type_name};

/// minijinja's that Jinja2 lacks, or that no template uses.
const REMOVED: [&str; 13] = [
    "attr",
    "batch",
    "bool",
    "chain",
    "e",
    "escape",
    "groupby",
    "lines",
    "pprint",
    "slice",
    "split",
    "urlencode",
    "zip",
];

pub fn install(environment: &mut Environment<'_>) {
    for name in REMOVED {
        environment.remove_filter(name);
    }
    for name in ["startingwith", "endingwith", "safe", "escaped"] {
        environment.remove_test(name);
    }
    for name in ["upper", "lower", "capitalize", "title", "string", "safe"] {
        let filter = move |state: &State<'_, '_>, value: &Value| -> Result<String, Error> {
            let text = to_text(state, value)?;
            Ok(match name {
                "upper" => text.to_uppercase(),
                "lower" => text.to_lowercase(),
                "capitalize" => strings::capitalize(&text),
                "title" => strings::title(&text, |c| strings::is_space(c) || "-({[<".contains(c)),
                _ => text,
            })
        };
        environment.add_filter(name, filter);
    }
    environment.add_filter("trim", trim);
    environment.add_filter("replace", replace_filter);
    environment.add_filter("indent", indent);
    environment.add_filter("tojson", to_json);
    environment.add_filter("join", join);
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_filter("sum", sum);
    environment.add_filter("format", |state: &State<'_, '_>, value: &Value, arguments: Rest<Value>| {
        formatted(state, FormatStyle::Printf, &to_text(state, value)?, &arguments)
    });
    let int = |value: &Value, arguments: Rest<Value>, named: Kwargs| number("int", value, &arguments, &named);
    environment.add_filter("int", int);
    let float =
        |value: &Value, arguments: Rest<Value>, named: Kwargs| number("float", value, &arguments, &named);
    environment.add_filter("float", float);

    for name in ["eq", "equalto", "=="] {
        environment.add_test(name, |state: &State<'_, '_>, a: &Value, b: &Value| equal(state, a, b));
    }
    for name in ["ne", "!="] {
        environment.add_test(name, |state: &State<'_, '_>, a: &Value, b: &Value| Ok(!equal(state, a, b)?));
    }
    environment.add_test("sequence", |value: &Value| match value.kind() {
        // What has a length and items.
        ValueKind::Seq | ValueKind::String | ValueKind::Undefined => true,
        ValueKind::Map => !is_namespace(value),
        ValueKind::Iterable => value.downcast_object_ref::<View>().is_none(),
        _ => false,
    });
    environment.add_test("iterable", |value: &Value| {
        is_list(value)
            || matches!(value.kind(), ValueKind::String | ValueKind::Undefined)
            || (value.kind() == ValueKind::Map && !is_namespace(value))
    });
    environment.add_test("in", |state: &State<'_, '_>, a: &Value, b: &Value| contains(state, b, a));
    for (names, wanted) in [
        (["lt", "lessthan", "<"], [-1, -1]),
        (["le", "<=", "<="], [-1, 0]),
        (["gt", "greaterthan", ">"], [1, 1]),
        (["ge", ">=", ">="], [0, 1]),
    ] {
        for name in names {
            environment.add_test(name, move |state: &State<'_, '_>, a: &Value, b: &Value| {
                Ok::<_, Error>(
                    order(state, name, a, b)?.is_some_and(|order| wanted.contains(&(order as i32))),
                )
            });
        }
    }
    for name in ["upper", "lower"] {
        environment.add_test(name, move |state: &State<'_, '_>, value: &Value| {
            Ok::<_, Error>(strings::all_case(&to_text(state, value)?, name == "upper"))
        });
    }
}

fn present(value: Option<Value>) -> Option<Value> {
    value.filter(|value| !value.is_none())
}

fn is_true(value: Option<Value>) -> bool {
    value.is_some_and(|value| value.is_true())
}

fn default(value: &Value, arguments: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let [default, boolean] = bind("default", &arguments, &named, ["default_value", "boolean"])?;
    let missing = value.is_undefined() || (is_true(boolean) && !value.is_true());
    Ok(if missing { default.unwrap_or_else(|| Value::from("")) } else { value.clone() })
}

fn trim(
    state: &State<'_, '_>,
    value: &Value,
    arguments: Rest<Value>,
    named: Kwargs,
) -> Result<String, Error> {
    let [characters] = bind("trim", &arguments, &named, ["chars"])?;
    let characters = present(characters).map(|value| to_text(state, &value)).transpose()?;
    Ok(strings::strip(&to_text(state, value)?, characters.as_deref(), Ends::Both).into())
}

fn replace_filter(
    state: &State<'_, '_>,
    value: &Value,
    arguments: Rest<Value>,
    named: Kwargs,
) -> Result<Value, Error> {
    let [old, new, count] = bind("replace", &arguments, &named, ["old", "new", "count"])?;
    let (Some(old), Some(new)) = (old, new) else { return Err(error("replace takes two strings")) };
    let times = optional_int("replace", count.as_ref())?.and_then(|times| usize::try_from(times).ok());
    replace(state, &to_text(state, value)?, &to_text(state, &old)?, &to_text(state, &new)?, times)
}

fn indent(
    state: &State<'_, '_>,
    value: &Value,
    arguments: Rest<Value>,
    named: Kwargs,
) -> Result<String, Error> {
    let [width, first, blank] = bind("indent", &arguments, &named, ["width", "first", "blank"])?;
    let wrong = || error(format!("indent takes a string, not a value of type {}", type_name(value)));
    let text = value.as_str().ok_or_else(wrong)?;
    let mut indention = Text::new(state);
    match width.as_ref().and_then(Value::as_str) {
        Some(text) => indention.push(text)?,
        None => {
            let width = optional_int("indent", width.as_ref())?.unwrap_or(4);
            indention.repeat(" ", usize::try_from(width).unwrap_or(0))?;
        }
    }
    let (indention, first, blank) = (indention.finish(), is_true(first), is_true(blank));
    let mut out = Text::new(state);
    out.push(if first { &indention } else { "" })?;
    // Jinja2 adds a line end before it splits the lines, so that one at the end stays.
    let text = format!("{text}\n");
    for (at, line) in strings::lines(&text).into_iter().enumerate() {
        let line = strings::without_end(line);
        if at > 0 {
            out.push("\n")?;
            out.push(if blank || !line.is_empty() { &indention } else { "" })?;
        }
        out.push(line)?;
    }
    Ok(out.finish())
}

/// `tojson` as transformers defines it: Python's `json.dumps` with `ensure_ascii=False`.
fn to_json(
    state: &State<'_, '_>,
    value: &Value,
    arguments: Rest<Value>,
    named: Kwargs,
) -> Result<String, Error> {
    let [ascii, indent, separators, sort] =
        bind("tojson", &arguments, &named, ["ensure_ascii", "indent", "separators", "sort_keys"])?;
    let indent = present(indent);
    let indent = match indent.as_ref().and_then(Value::as_str) {
        Some(text) => Some(text.to_owned()),
        None => match optional_int("tojson", indent.as_ref())? {
            Some(width) => {
                let mut text = Text::new(state);
                text.repeat(" ", usize::try_from(width).unwrap_or(0))?;
                Some(text.finish())
            }
            None => None,
        },
    };
    let (mut item_separator, mut key_separator) =
        (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned());
    if let Some(separators) = present(separators) {
        let pair = items(state, &separators)?;
        match pair.iter().map(Value::as_str).collect::<Vec<_>>()[..] {
            [Some(item), Some(key)] => (item_separator, key_separator) = (item.into(), key.into()),
            _ => return Err(error("tojson: separators are two strings")),
        }
    }
    let json =
        Json { ascii: is_true(ascii), indent, item_separator, key_separator, sort_keys: is_true(sort) };
    let mut out = Text::new(state);
    json.write(value, 0, &mut out)?;
    Ok(out.finish())
}

/// The attribute of an item: a name, names with dots, or a number.
fn attribute(item: &Value, attribute: Option<&Value>) -> Result<Value, Error> {
    let Some(attribute) = attribute else { return Ok(item.clone()) };
    let Some(names) = attribute.as_str() else { return item.get_item(attribute) };
    let mut value = item.clone();
    for name in names.split('.') {
        value = match name.parse::<usize>() {
            Ok(at) => value.get_item_by_index(at)?,
            Err(_) => value.get_attr(name)?,
        };
    }
    Ok(value)
}

fn join(
    state: &State<'_, '_>,
    value: &Value,
    arguments: Rest<Value>,
    named: Kwargs,
) -> Result<String, Error> {
    let [separator, name] = bind("join", &arguments, &named, ["d", "attribute"])?;
    let separator = separator.map_or(Ok(String::new()), |value| to_text(state, &value))?;
    let name = present(name);
    let mut out = Text::new(state);
    for (at, item) in items(state, value)?.iter().enumerate() {
        out.push(if at == 0 { "" } else { &separator })?;
        out.value(&attribute(item, name.as_ref())?)?;
    }
    Ok(out.finish())
}

fn sum(state: &State<'_, '_>, value: &Value, arguments: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let [name, start] = bind("sum", &arguments, &named, ["attribute", "start"])?;
    let name = present(name);
    let mut sum = start.unwrap_or(Value::from(0));
    if sum.as_str().is_some() {
        return Err(error("sum: strings are joined with the filter join"));
    }
    for item in items(state, value)? {
        sum = add(state, &sum, &attribute(&item, name.as_ref())?)?;
    }
    Ok(sum)
}

/// The filters `int` and `float`.
fn number(name: &str, value: &Value, arguments: &[Value], named: &Kwargs) -> Result<Value, Error> {
    let [default, base] = bind(name, arguments, named, ["default", "base"])?;
    if base.is_some_and(|base| base.as_i64() != Some(10)) {
        return Err(error(format!("{name}: only base 10 is supported")));
    }
    let text = value.as_str().map(|text| without_underscores(strings::strip(text, None, Ends::Both)));
    let text = text.map(Option::unwrap_or_default);
    let whole = match (&text, value.kind()) {
        (Some(text), _) => text.parse::<i64>().ok(),
        (None, ValueKind::Bool) => Some(value.is_true().into()),
        (None, _) => value.as_i64().filter(|_| value.is_integer()),
    };
    let float = match &text {
        Some(text) => text.parse::<f64>().ok(),
        None if value.kind() == ValueKind::Number => f64::try_from(value.clone()).ok(),
        None => whole.map(|number| number as f64),
    };
    if name == "float" {
        return Ok(float.map_or_else(|| default.unwrap_or(Value::from(0.0)), Value::from));
    }
    match (whole, float.filter(|number| number.is_finite())) {
        (Some(number), _) => Ok(Value::from(number)),
        (None, Some(number)) if number.abs() < 2f64.powi(63) => Ok(Value::from(number as i64)),
        (None, Some(_)) => Err(error("int: the number does not fit into 64 bits")),
        (None, None) => Ok(default.unwrap_or(Value::from(0))),
    }
}

/// Python allows underscores between digits.
fn without_underscores(text: &str) -> Option<String> {
    let digit = |c: Option<char>| c.is_some_and(|c| c.is_ascii_digit());
    let between = |at: usize| digit(text[..at].chars().last()) && digit(text[at + 1..].chars().next());
    text.match_indices('_').all(|(at, _)| between(at)).then(|| text.replace('_', ""))
}
