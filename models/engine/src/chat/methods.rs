//! Methods of values: those of Python's types that change nothing.

use minijinja::formatting::FormatStyle;
use minijinja::value::{Kwargs, Rest, Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};

use super::operators::{equal, formatted};
use super::strings::{self, Ends};
use super::text::{Text, pairs};
use super::values::{View, error, is_list, is_namespace, items, make, type_name};

/// Arguments by their place or their name.
pub fn bind<const N: usize>(
    of: &str,
    arguments: &[Value],
    named: &Kwargs,
    names: [&str; N],
) -> Result<[Option<Value>; N], Error> {
    if arguments.len() > N {
        return Err(error(format!("{of} takes at most {N} arguments")));
    }
    let mut bound = [const { None }; N];
    for (at, name) in names.into_iter().enumerate() {
        bound[at] = match (arguments.get(at), named.has(name)) {
            (Some(_), true) => return Err(error(format!("{of} has two values for {name}"))),
            (Some(value), false) => Some(value.clone()),
            (None, true) => Some(named.get(name)?),
            (None, false) => None,
        };
    }
    named.assert_all_used()?;
    Ok(bound)
}

/// `value.name(...)`
pub fn call(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    let state = &*state;
    let (arguments, named): (Rest<Value>, Kwargs) = from_args(arguments)?;
    let unknown = || Err(Error::from(ErrorKind::UnknownMethod));
    if let Some(text) = value.as_str() {
        return of_str(state, text, name, &arguments, &named);
    }
    if value.kind() == ValueKind::Map && !is_namespace(value) {
        let view = |name, items| {
            let view = View { name: Some(name), text: String::new(), items };
            Ok(Value::from_object(view))
        };
        state.consume_fuel(1 + value.len().unwrap_or(0) as u64)?;
        return match name {
            "get" => {
                let [key, default] = bind(name, &arguments, &named, ["key", "default"])?;
                let key = key.ok_or_else(|| error("get takes a key"))?;
                let item = value.as_object().and_then(|object| object.get_value(&key));
                Ok(item.or(default).unwrap_or(Value::from(())))
            }
            "keys" => view("dict_keys", pairs(value).map(|(key, _)| key).collect()),
            "values" => view("dict_values", pairs(value).map(|(_, value)| value).collect()),
            "items" => {
                view("dict_items", pairs(value).map(|(k, v)| Value::from(Tuple::from([k, v]))).collect())
            }
            "copy" => Ok(value.clone()),
            _ => unknown(),
        };
    }
    if is_list(value) && matches!(name, "count" | "index") {
        let [wanted] = bind(name, &arguments, &named, ["value"])?;
        let wanted = wanted.ok_or_else(|| error(format!("{name} takes a value")))?;
        let mut count = 0;
        for (at, item) in items(state, value)?.iter().enumerate() {
            if equal(state, item, &wanted)? {
                if name == "index" {
                    return Ok(Value::from(at));
                }
                count += 1;
            }
        }
        return if name == "count" {
            Ok(Value::from(count))
        } else {
            Err(error("index: it is not in the list"))
        };
    }
    unknown()
}

/// A string argument.
fn text<'a>(name: &str, value: Option<&'a Value>) -> Result<&'a str, Error> {
    match value {
        Some(value) => value
            .as_str()
            .ok_or_else(|| error(format!("{name} takes a string, not a value of type {}", type_name(value)))),
        None => Err(error(format!("{name} takes a string"))),
    }
}

fn optional_text<'a>(name: &str, value: Option<&'a Value>) -> Result<Option<&'a str>, Error> {
    match value {
        Some(value) if !value.is_none() => text(name, Some(value)).map(Some),
        _ => Ok(None),
    }
}

/// A whole number that may be absent or none.
pub fn optional_int(name: &str, value: Option<&Value>) -> Result<Option<i64>, Error> {
    match value {
        Some(value) if value.kind() == ValueKind::Bool => Ok(Some(value.is_true().into())),
        Some(value) if !value.is_none() => {
            let number = value.as_i64().filter(|_| value.is_integer());
            let wrong =
                || error(format!("{name} takes a whole number, not a value of type {}", type_name(value)));
            number.map(Some).ok_or_else(wrong)
        }
        _ => Ok(None),
    }
}

/// The part of a text between two positions in characters, and where it begins, in bytes.
fn part<'a>(
    name: &str,
    text: &'a str,
    start: Option<&Value>,
    end: Option<&Value>,
) -> Result<Option<(usize, &'a str)>, Error> {
    let (start, end) = (optional_int(name, start)?, optional_int(name, end)?);
    if start.is_none() && end.is_none() {
        return Ok(Some((0, text)));
    }
    let n = text.chars().count() as i64;
    let position = |at: i64| if at < 0 { at.saturating_add(n).max(0) } else { at };
    let (start, end) = (start.map_or(0, position), end.map_or(n, position).min(n));
    if start > end {
        return Ok(None);
    }
    let byte = |at: i64| text.char_indices().nth(at as usize).map_or(text.len(), |(byte, _)| byte);
    Ok(Some((byte(start), &text[byte(start)..byte(end)])))
}

fn of_str(
    state: &State<'_, '_>,
    receiver: &str,
    name: &str,
    arguments: &[Value],
    named: &Kwargs,
) -> Result<Value, Error> {
    if name == "format" {
        let mut all = arguments.to_vec();
        let keys: Vec<String> = named.args().map(str::to_owned).collect();
        if !keys.is_empty() {
            let mut pairs = Vec::new();
            for key in keys {
                let value: Value = named.get(&key)?;
                let value = match value.as_object() {
                    Some(_) => Value::from(super::text::to_text(state, &value)?),
                    None => value,
                };
                pairs.push((key, value));
            }
            all.push(Kwargs::from_iter(pairs.iter().map(|(k, v)| (k.as_str(), v.clone()))).into());
        }
        return formatted(state, FormatStyle::StrFormat, receiver, &all);
    }
    let parameters = match name {
        "split" | "rsplit" => ["sep", "maxsplit", "-"],
        "splitlines" => ["keepends", "-", "-"],
        _ => ["-", "--", "---"],
    };
    let most = match name {
        "startswith" | "endswith" | "find" | "rfind" | "index" | "rindex" | "count" | "replace" => 3,
        "split" | "rsplit" | "center" | "ljust" | "rjust" => 2,
        "strip" | "lstrip" | "rstrip" | "splitlines" | "join" | "partition" | "rpartition"
        | "removeprefix" | "removesuffix" | "zfill" => 1,
        "upper" | "lower" | "capitalize" | "title" | "swapcase" | "islower" | "isupper" | "isascii"
        | "isspace" | "isalpha" | "isalnum" | "isdigit" | "isdecimal" | "isnumeric" => 0,
        _ => return Err(Error::from(ErrorKind::UnknownMethod)),
    };
    if arguments.len() > most {
        return Err(error(format!("{name} takes at most {most} arguments")));
    }
    let bound = bind(name, arguments, named, parameters)?;
    let [a, b, c] = bound.each_ref().map(Option::as_ref);
    let string = |text: &str| Value::from(text);
    let list = |parts: Vec<&str>| Value::from(parts.into_iter().map(Value::from).collect::<Vec<_>>());
    Ok(match name {
        "upper" => string(&receiver.to_uppercase()),
        "lower" => string(&receiver.to_lowercase()),
        "capitalize" => string(&strings::capitalize(receiver)),
        "title" => string(&strings::title(receiver, |c| !(c.is_lowercase() || c.is_uppercase()))),
        "swapcase" => {
            let mut out = String::new();
            for c in receiver.chars() {
                if c.is_uppercase() { out.extend(c.to_lowercase()) } else { out.extend(c.to_uppercase()) }
            }
            Value::from(out)
        }
        "strip" => string(strings::strip(receiver, optional_text(name, a)?, Ends::Both)),
        "lstrip" => string(strings::strip(receiver, optional_text(name, a)?, Ends::Left)),
        "rstrip" => string(strings::strip(receiver, optional_text(name, a)?, Ends::Right)),
        "split" | "rsplit" => {
            let times = optional_int(name, b)?.and_then(|times| usize::try_from(times).ok());
            let parts = strings::split(
                receiver,
                optional_text(name, a)?,
                times.unwrap_or(usize::MAX),
                name == "rsplit",
            )?;
            state.consume_fuel(parts.len() as u64 / 2)?;
            list(parts)
        }
        "splitlines" => {
            let lines = strings::lines(receiver);
            state.consume_fuel(lines.len() as u64 / 2)?;
            let keep = a.is_some_and(Value::is_true);
            list(if keep { lines } else { lines.into_iter().map(strings::without_end).collect() })
        }
        "partition" | "rpartition" => {
            let separator = text(name, a)?;
            if separator.is_empty() {
                return Err(error(format!("{name}: the separator is empty")));
            }
            let first = name == "partition";
            let parts =
                match if first { receiver.split_once(separator) } else { receiver.rsplit_once(separator) } {
                    Some((before, after)) => [before, separator, after],
                    None if first => [receiver, "", ""],
                    None => ["", "", receiver],
                };
            Value::from(Tuple::from(parts.map(Value::from)))
        }
        "removeprefix" => string(receiver.strip_prefix(text(name, a)?).unwrap_or(receiver)),
        "removesuffix" => string(receiver.strip_suffix(text(name, a)?).unwrap_or(receiver)),
        "startswith" | "endswith" => {
            let parts = match a {
                Some(value) if value.is_tuple() => items(state, value)?,
                _ => vec![Value::from(text(name, a)?)],
            };
            let part = part(name, receiver, b, c)?.map(|(_, part)| part);
            let mut holds = false;
            for affix in &parts {
                let affix = text(name, Some(affix))?;
                holds |= part.is_some_and(|part| match name {
                    "startswith" => part.starts_with(affix),
                    _ => part.ends_with(affix),
                });
            }
            holds.into()
        }
        "find" | "rfind" | "index" | "rindex" => {
            let wanted = text(name, a)?;
            let found = part(name, receiver, b, c)?.and_then(|(begin, part)| {
                let at = if name.starts_with('r') { part.rfind(wanted) } else { part.find(wanted) };
                Some(receiver[..begin + at?].chars().count() as i64)
            });
            match found {
                None if name.ends_with("index") => {
                    return Err(error(format!("{name}: the text is not found")));
                }
                found => Value::from(found.unwrap_or(-1)),
            }
        }
        "count" => {
            let wanted = text(name, a)?;
            Value::from(part(name, receiver, b, c)?.map_or(0, |(_, part)| part.matches(wanted).count()))
        }
        "replace" => {
            let times = optional_int(name, c)?.and_then(|times| usize::try_from(times).ok());
            replace(state, receiver, text(name, a)?, text(name, b)?, times)?
        }
        "join" => {
            let values = items(state, a.ok_or_else(|| error("join takes what is joined"))?)?;
            let mut out = Text::new(state);
            for (at, value) in values.iter().enumerate() {
                out.push(if at == 0 { "" } else { receiver })?;
                out.push(text(name, Some(value))?)?;
            }
            Value::from(out.finish())
        }
        "ljust" | "rjust" | "center" => {
            let width = optional_int(name, a)?.ok_or_else(|| error(format!("{name} takes a width")))?;
            let fill = optional_text(name, b)?.unwrap_or(" ");
            if fill.chars().count() != 1 {
                return Err(error(format!("{name} fills with one character")));
            }
            let width = usize::try_from(width).unwrap_or(0);
            let missing = width.saturating_sub(receiver.chars().count());
            let left = match name {
                "ljust" => 0,
                "rjust" => missing,
                // Where Python puts the odd one.
                _ => missing / 2 + (missing & width & 1),
            };
            let mut out = Text::new(state);
            out.repeat(fill, left)?;
            out.push(receiver)?;
            out.repeat(fill, missing - left)?;
            Value::from(out.finish())
        }
        "zfill" => {
            let width = optional_int(name, a)?.ok_or_else(|| error("zfill takes a width"))?;
            let missing = usize::try_from(width).unwrap_or(0).saturating_sub(receiver.chars().count());
            let (sign, digits) = receiver.split_at(usize::from(receiver.starts_with(['+', '-'])));
            let mut out = Text::new(state);
            out.push(sign)?;
            out.repeat("0", missing)?;
            out.push(digits)?;
            Value::from(out.finish())
        }
        "islower" | "isupper" => strings::all_case(receiver, name == "isupper").into(),
        _ => strings::all(receiver, name)?.into(),
    })
}

/// With `old` replaced by `new`, so often at most.
pub fn replace(
    state: &State<'_, '_>,
    text: &str,
    old: &str,
    new: &str,
    times: Option<usize>,
) -> Result<Value, Error> {
    let times = text.matches(old).count().min(times.unwrap_or(usize::MAX));
    let bytes = text.len().saturating_add(times.saturating_mul(new.len()));
    state.consume_fuel(bytes as u64 / 64)?;
    Ok(Value::from(text.replacen(old, new, times)))
}

/// `dict(...)`
pub fn dict(state: &State<'_, '_>, value: Option<Value>, named: Kwargs) -> Result<Value, Error> {
    let mut all: Vec<(Value, Value)> = Vec::new();
    if let Some(value) = value {
        if value.kind() == ValueKind::Map {
            all.extend(pairs(&value));
        } else {
            for pair in items(state, &value)? {
                match <[Value; 2]>::try_from(items(state, &pair)?) {
                    Ok([key, value]) => all.push((key, value)),
                    Err(_) => return Err(error("dict takes pairs")),
                }
            }
        }
    }
    let names: Vec<String> = named.args().map(str::to_owned).collect();
    for name in names {
        let value: Value = named.get(&name)?;
        all.push((Value::from(name), value));
    }
    make(state, Value::from_pairs(all))
}

/// `range(...)`
pub fn range(state: &State<'_, '_>, a: i64, b: Option<i64>, step: Option<i64>) -> Result<Value, Error> {
    /// Jinja2's limit.
    const MAX: i128 = 100_000;
    let (start, stop) = match b {
        Some(b) => (a, b),
        None => (0, a),
    };
    let step = step.unwrap_or(1);
    if step == 0 {
        return Err(error("range: the step is 0"));
    }
    let (from, to, by) = (i128::from(start), i128::from(stop), i128::from(step));
    let n = if by > 0 { (to - from + by - 1).div_euclid(by) } else { (from - to - by - 1).div_euclid(-by) };
    if n > MAX {
        return Err(error(format!("range: more than {MAX} numbers")));
    }
    let n = n.max(0) as i64;
    state.consume_fuel(n as u64 / 2)?;
    let text = match step {
        1 => format!("range({start}, {stop})"),
        _ => format!("range({start}, {stop}, {step})"),
    };
    let items = (0..n).map(|at| Value::from(start + at * step)).collect();
    Ok(Value::from_object(View { name: None, text, items }))
}
