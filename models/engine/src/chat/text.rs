//! Values as text: Python's `str`, `repr` and `json.dumps`.

use minijinja::value::{DynObject, ValueKind};
use minijinja::{Error, State, Value};

use super::values::{MAX_DEPTH, View, error, is_namespace, type_name};

/// Text that is paid for with fuel as it grows.
pub struct Text<'s, 'a, 'b> {
    state: &'s State<'a, 'b>,
    text: String,
    owed: usize,
}

impl<'s, 'a, 'b> Text<'s, 'a, 'b> {
    pub fn new(state: &'s State<'a, 'b>) -> Self {
        Self { state, text: String::new(), owed: 0 }
    }

    fn pay(&mut self, bytes: usize) -> Result<(), Error> {
        self.owed = self.owed.saturating_add(bytes);
        if self.owed >= 64 {
            self.state.consume_fuel((self.owed / 64) as u64)?;
            self.owed %= 64;
        }
        Ok(())
    }

    pub fn push(&mut self, text: &str) -> Result<(), Error> {
        self.pay(text.len())?;
        self.text.push_str(text);
        Ok(())
    }

    /// The same text `n` times.
    pub fn repeat(&mut self, text: &str, n: usize) -> Result<(), Error> {
        self.pay(text.len().saturating_mul(n))?;
        self.text.push_str(&text.repeat(n));
        Ok(())
    }

    /// Python's `str(value)`; nothing for what is undefined.
    pub fn value(&mut self, value: &Value) -> Result<(), Error> {
        match value.as_str() {
            Some(text) => self.push(text),
            None if value.is_undefined() => Ok(()),
            None => self.repr(value, 0),
        }
    }

    /// Python's `repr(value)`.
    fn repr(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.pay(16)?;
        if depth > MAX_DEPTH {
            return Err(error("a value is nested too deep"));
        }
        if let Some(view) = value.downcast_object_ref::<View>() {
            return match &view.name {
                Some(name) => {
                    self.push(name)?;
                    self.items(value, "([", "])", depth)
                }
                None => self.push(&view.text),
            };
        }
        match value.kind() {
            ValueKind::Undefined => self.push("Undefined"),
            ValueKind::None => self.push("None"),
            ValueKind::Bool => self.push(if value.is_true() { "True" } else { "False" }),
            ValueKind::Number if value.is_integer() => self.push(&value.to_string()),
            ValueKind::Number => self.push(&float(f64::try_from(value.clone())?)),
            ValueKind::String => self.quoted(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable if value.is_tuple() => {
                self.items(value, "(", if value.len() == Some(1) { ",)" } else { ")" }, depth)
            }
            ValueKind::Seq | ValueKind::Iterable => self.items(value, "[", "]", depth),
            ValueKind::Map if !is_namespace(value) => {
                self.push("{")?;
                for (at, (key, value)) in pairs(value).enumerate() {
                    self.push(if at == 0 { "" } else { ", " })?;
                    self.repr(&key, depth + 1)?;
                    self.push(": ")?;
                    self.repr(&value, depth + 1)?;
                }
                self.push("}")
            }
            _ => Err(error(format!("a value of type {} can't be written", type_name(value)))),
        }
    }

    fn items(&mut self, value: &Value, begin: &str, end: &str, depth: usize) -> Result<(), Error> {
        self.push(begin)?;
        for (at, item) in value.try_iter()?.checked().enumerate() {
            self.push(if at == 0 { "" } else { ", " })?;
            self.repr(&item?, depth + 1)?;
        }
        self.push(end)
    }

    fn quoted(&mut self, text: &str) -> Result<(), Error> {
        let quote = if text.contains('\'') && !text.contains('"') { "\"" } else { "'" };
        self.push(quote)?;
        let mut plain = 0;
        for (at, c) in text.char_indices() {
            let code = u32::from(c);
            let escaped = match c {
                '\\' => "\\\\".into(),
                '\n' => "\\n".into(),
                '\r' => "\\r".into(),
                '\t' => "\\t".into(),
                '\'' if quote == "'" => "\\'".into(),
                _ if is_printable(c) => continue,
                _ if code <= 0xff => format!("\\x{code:02x}"),
                _ if code <= 0xffff => format!("\\u{code:04x}"),
                _ => format!("\\U{code:08x}"),
            };
            self.push(&text[plain..at])?;
            self.push(&escaped)?;
            plain = at + c.len_utf8();
        }
        self.push(&text[plain..])?;
        self.push(quote)
    }

    pub fn finish(self) -> String {
        self.text
    }
}

/// The entries of a dictionary.
pub fn pairs(value: &Value) -> impl Iterator<Item = (Value, Value)> + '_ {
    value.as_object().and_then(DynObject::try_iter_pairs).into_iter().flatten()
}

/// Python's `str(value)`.
pub fn to_text(state: &State<'_, '_>, value: &Value) -> Result<String, Error> {
    let mut text = Text::new(state);
    text.value(value)?;
    Ok(text.finish())
}

/// Python's `repr` of a float: the shortest digits that give it back, with an exponent below 1e-4 and from 1e16 on.
pub fn float(number: f64) -> String {
    if number.is_nan() {
        return "nan".into();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf" } else { "-inf" }.into();
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if number == 0.0 || (-4..16).contains(&exponent) {
        let plain = number.to_string();
        return if plain.contains('.') { plain } else { format!("{plain}.0") };
    }
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

/// What Python's `str.isprintable` says. Rust's `escape_debug` goes by the same categories of characters; behind another
/// character it lets combining marks stand, too.
fn is_printable(c: char) -> bool {
    if c.is_ascii() {
        c == ' ' || c.is_ascii_graphic()
    } else {
        ['a', c].iter().collect::<String>().escape_debug().count() == 2
    }
}

/// How `tojson` writes.
pub struct Json {
    pub ascii: bool,
    pub indent: Option<String>,
    pub item_separator: String,
    pub key_separator: String,
    pub sort_keys: bool,
}

impl Json {
    /// Python's `json.dumps`.
    pub fn write(&self, value: &Value, level: usize, out: &mut Text<'_, '_, '_>) -> Result<(), Error> {
        out.pay(16)?;
        if level > MAX_DEPTH {
            return Err(error("tojson: the value is nested too deep"));
        }
        let is_view = value.downcast_object_ref::<View>().is_some();
        match value.kind() {
            ValueKind::None => out.push("null"),
            ValueKind::Bool => out.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => out.push(&value.to_string()),
            ValueKind::Number => out.push(&json_float(f64::try_from(value.clone())?)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable if !is_view => {
                out.push("[")?;
                let mut empty = true;
                for (at, item) in value.try_iter()?.checked().enumerate() {
                    self.separate(at, level + 1, out)?;
                    self.write(&item?, level + 1, out)?;
                    empty = false;
                }
                if !empty {
                    self.new_line(level, out)?;
                }
                out.push("]")
            }
            ValueKind::Map if !is_namespace(value) => {
                let mut entries: Vec<_> = pairs(value).collect();
                out.pay(entries.len() * 64)?;
                if self.sort_keys {
                    if entries.iter().any(|(key, _)| key.as_str().is_none()) {
                        return Err(error("tojson: sort_keys takes dictionaries whose keys are strings"));
                    }
                    entries.sort_by(|(a, _), (b, _)| a.as_str().cmp(&b.as_str()));
                }
                out.push("{")?;
                for (at, (key, value)) in entries.iter().enumerate() {
                    self.separate(at, level + 1, out)?;
                    match key.kind() {
                        ValueKind::String => self.string(key.as_str().unwrap_or_default(), out)?,
                        ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                            out.push("\"")?;
                            self.write(key, level + 1, out)?;
                            out.push("\"")?;
                        }
                        _ => return Err(error("tojson: a key is not a string, a number or none")),
                    }
                    out.push(&self.key_separator)?;
                    self.write(value, level + 1, out)?;
                }
                if !entries.is_empty() {
                    self.new_line(level, out)?;
                }
                out.push("}")
            }
            _ => Err(error(format!("tojson: a value of type {} is not JSON", type_name(value)))),
        }
    }

    fn separate(&self, at: usize, level: usize, out: &mut Text<'_, '_, '_>) -> Result<(), Error> {
        if at > 0 {
            out.push(&self.item_separator)?;
        }
        self.new_line(level, out)
    }

    fn new_line(&self, level: usize, out: &mut Text<'_, '_, '_>) -> Result<(), Error> {
        let Some(indent) = &self.indent else { return Ok(()) };
        out.push("\n")?;
        out.repeat(indent, level)
    }

    fn string(&self, text: &str, out: &mut Text<'_, '_, '_>) -> Result<(), Error> {
        out.push("\"")?;
        let mut plain = 0;
        for (at, c) in text.char_indices() {
            let short = match c {
                '"' => "\\\"",
                '\\' => "\\\\",
                '\n' => "\\n",
                '\r' => "\\r",
                '\t' => "\\t",
                '\u{8}' => "\\b",
                '\u{c}' => "\\f",
                '\0'..='\u{1f}' => "",
                '\u{7f}'.. if self.ascii => "",
                _ => continue,
            };
            out.push(&text[plain..at])?;
            plain = at + c.len_utf8();
            if !short.is_empty() {
                out.push(short)?;
                continue;
            }
            for unit in c.encode_utf16(&mut [0; 2]) {
                out.push(&format!("\\u{unit:04x}"))?;
            }
        }
        out.push(&text[plain..])?;
        out.push("\"")
    }
}

fn json_float(number: f64) -> String {
    match float(number).as_str() {
        "nan" => "NaN".into(),
        "inf" => "Infinity".into(),
        "-inf" => "-Infinity".into(),
        text => text.into(),
    }
}
