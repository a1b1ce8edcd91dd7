//! Binary operators, as Python's.

use std::cmp::Ordering;

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Rest, Tuple, ValueKind};
use minijinja::{Error, State, Value};

use super::text::{Text, pairs, to_text};
use super::values::{View, error, is_list, is_namespace, items, type_name};

/// A chain of operators that bind alike.
///
/// # Arguments
/// - `operators`: their names, separated by commas
/// - `operands`: one more
pub fn operate(state: &State<'_, '_>, operators: &str, operands: Rest<Value>) -> Result<Value, Error> {
    if operators.starts_with('~') {
        let mut text = Text::new(state);
        for operand in operands.iter() {
            text.value(operand)?;
        }
        return Ok(Value::from(text.finish()));
    }
    let mut operands = operands.0.into_iter();
    let mut left = operands.next().unwrap_or_default();
    let mut compared = false;
    for (operator, right) in operators.split(',').zip(operands) {
        left = match operator {
            "+" => add(state, &left, &right)?,
            "-" | "*" | "/" | "//" | "%" => multiply(state, operator, &left, &right)?,
            _ => {
                if !compare(state, operator, &left, &right)? {
                    return Ok(false.into());
                }
                compared = true;
                right
            }
        };
    }
    Ok(if compared { true.into() } else { left })
}

fn compare(state: &State<'_, '_>, operator: &str, a: &Value, b: &Value) -> Result<bool, Error> {
    Ok(match operator {
        "==" => equal(state, a, b)?,
        "!=" => !equal(state, a, b)?,
        "in" => contains(state, b, a)?,
        "not in" => !contains(state, b, a)?,
        "<" => order(state, operator, a, b)? == Some(Ordering::Less),
        "<=" => matches!(order(state, operator, a, b)?, Some(Ordering::Less | Ordering::Equal)),
        ">" => order(state, operator, a, b)? == Some(Ordering::Greater),
        ">=" => matches!(order(state, operator, a, b)?, Some(Ordering::Greater | Ordering::Equal)),
        other => return Err(error(format!("unknown operator {other}"))),
    })
}

#[derive(Clone, Copy)]
enum Number {
    Int(i128),
    Float(f64),
}

impl Number {
    fn of(value: &Value) -> Option<Self> {
        match value.kind() {
            ValueKind::Bool => Some(Self::Int(value.is_true().into())),
            ValueKind::Number if value.is_integer() => i128::try_from(value.clone()).ok().map(Self::Int),
            ValueKind::Number => f64::try_from(value.clone()).ok().map(Self::Float),
            _ => None,
        }
    }

    fn float(self) -> f64 {
        match self {
            Self::Int(number) => number as f64,
            Self::Float(number) => number,
        }
    }

    fn compare(self, other: Self) -> Option<Ordering> {
        match (self, other) {
            (Self::Int(a), Self::Int(b)) => Some(a.cmp(&b)),
            // Exactly: a float beyond 2^53 is whole.
            (Self::Int(a), Self::Float(b)) if b.abs() >= 9007199254740992.0 && b.abs() < 1e38 => {
                Some(a.cmp(&(b as i128)))
            }
            (Self::Float(_), Self::Int(_)) => other.compare(self).map(Ordering::reverse),
            (a, b) => a.float().partial_cmp(&b.float()),
        }
    }
}

/// `a == b`
pub fn equal(state: &State<'_, '_>, a: &Value, b: &Value) -> Result<bool, Error> {
    if let (Some(a), Some(b)) = (a.as_str(), b.as_str()) {
        return Ok(a == b);
    }
    if let (Some(a), Some(b)) = (Number::of(a), Number::of(b)) {
        return Ok(a.compare(b) == Some(Ordering::Equal));
    }
    state.consume_fuel(1)?;
    if a.is_undefined() || b.is_undefined() || a.is_none() || b.is_none() {
        return Ok(a.kind() == b.kind());
    }
    let view = |value: &Value| value.downcast_object_ref::<View>().is_some();
    if is_namespace(a) || is_namespace(b) || view(a) || view(b) {
        return Err(error("namespaces and views can't be compared"));
    }
    if is_list(a) && is_list(b) {
        if a.is_tuple() != b.is_tuple() {
            return Ok(false);
        }
        let (a, b) = (items(state, a)?, items(state, b)?);
        if a.len() != b.len() {
            return Ok(false);
        }
        for (a, b) in a.iter().zip(&b) {
            if !equal(state, a, b)? {
                return Ok(false);
            }
        }
        return Ok(true);
    }
    if a.kind() == ValueKind::Map && b.kind() == ValueKind::Map {
        if a.len() != b.len() {
            return Ok(false);
        }
        for (key, value) in pairs(a) {
            match item(b, &key)? {
                Some(other) if equal(state, &value, &other)? => {}
                _ => return Ok(false),
            }
        }
        return Ok(true);
    }
    Ok(false)
}

/// The item of a dictionary.
fn item(dict: &Value, key: &Value) -> Result<Option<Value>, Error> {
    if key.as_object().is_some() && !key.is_tuple() {
        return Err(error(format!("unhashable type: {}", type_name(key))));
    }
    Ok(dict.as_object().and_then(|object| object.get_value(key)))
}

/// How two values are ordered, if they can be.
pub fn order(state: &State<'_, '_>, operator: &str, a: &Value, b: &Value) -> Result<Option<Ordering>, Error> {
    if let (Some(a), Some(b)) = (a.as_str(), b.as_str()) {
        return Ok(Some(a.cmp(b)));
    }
    if let (Some(a), Some(b)) = (Number::of(a), Number::of(b)) {
        return Ok(a.compare(b));
    }
    if is_list(a) && is_list(b) && a.is_tuple() == b.is_tuple() {
        let (a, b) = (items(state, a)?, items(state, b)?);
        for (a, b) in a.iter().zip(&b) {
            if !equal(state, a, b)? {
                return order(state, operator, a, b);
            }
        }
        return Ok(Some(a.len().cmp(&b.len())));
    }
    Err(unsupported(operator, a, b))
}

fn unsupported(operator: &str, a: &Value, b: &Value) -> Error {
    error(format!("{operator} is not supported between {} and {}", type_name(a), type_name(b)))
}

/// `value in container`
pub fn contains(state: &State<'_, '_>, container: &Value, value: &Value) -> Result<bool, Error> {
    if let Some(text) = container.as_str() {
        state.consume_fuel(text.len() as u64 / 64)?;
        let part = value.as_str().ok_or_else(|| unsupported("in", value, container))?;
        return Ok(text.contains(part));
    }
    if container.kind() == ValueKind::Map && !is_namespace(container) {
        return Ok(item(container, value)?.is_some());
    }
    if !(is_list(container) || container.is_undefined()) {
        return Err(unsupported("in", value, container));
    }
    for item in items(state, container)? {
        if equal(state, &item, value)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// `a + b`
pub fn add(state: &State<'_, '_>, a: &Value, b: &Value) -> Result<Value, Error> {
    if let (Some(first), Some(second)) = (a.as_str(), b.as_str()) {
        let mut text = Text::new(state);
        text.push(first)?;
        text.push(second)?;
        return Ok(Value::from(text.finish()));
    }
    let view = |value: &Value| value.downcast_object_ref::<View>().is_some();
    if is_list(a) && is_list(b) && a.is_tuple() == b.is_tuple() && !view(a) && !view(b) {
        let mut all = items(state, a)?;
        all.extend(items(state, b)?);
        return Ok(if a.is_tuple() { Value::from(Tuple::from(all)) } else { Value::from(all) });
    }
    multiply(state, "+", a, b)
}

fn multiply(state: &State<'_, '_>, operator: &str, a: &Value, b: &Value) -> Result<Value, Error> {
    let (x, y) = match (Number::of(a), Number::of(b)) {
        (Some(x), Some(y)) => (x, y),
        (None, Some(Number::Int(n))) if operator == "*" => return repeat(state, a, n),
        (Some(Number::Int(n)), None) if operator == "*" => return repeat(state, b, n),
        _ if operator == "%" && a.as_str().is_some() => {
            let arguments = match b {
                b if b.is_tuple() => items(state, b)?,
                b if b.kind() == ValueKind::Map => return Err(error("% with a dictionary is not supported")),
                b => vec![b.clone()],
            };
            return percent(state, a.as_str().unwrap_or_default(), &arguments);
        }
        _ => return Err(unsupported(operator, a, b)),
    };
    let by_zero = || error("division by zero");
    let too_large = || error("a whole number is too large");
    if operator == "/" {
        let divisor = y.float();
        return if divisor == 0.0 { Err(by_zero()) } else { Ok(Value::from(x.float() / divisor)) };
    }
    if let (Number::Int(x), Number::Int(y)) = (x, y) {
        let result = match operator {
            "+" => x.checked_add(y),
            "-" => x.checked_sub(y),
            "*" => x.checked_mul(y),
            _ if y == 0 => return Err(by_zero()),
            "//" => x.checked_div(y).map(|q| q - i128::from(x % y != 0 && (x < 0) != (y < 0))),
            _ => x.checked_rem(y).map(|r| if r != 0 && (r < 0) != (y < 0) { r + y } else { r }),
        };
        let result = result.ok_or_else(too_large)?;
        return Ok(i64::try_from(result).map_or_else(|_| Value::from(result), Value::from));
    }
    let (x, y) = (x.float(), y.float());
    Ok(Value::from(match operator {
        "+" => x + y,
        "-" => x - y,
        "*" => x * y,
        _ if y == 0.0 => return Err(by_zero()),
        "//" => floor_divide(x, y).0,
        _ => floor_divide(x, y).1,
    }))
}

/// Quotient and rest of floats: the rest has the divisor's sign.
fn floor_divide(x: f64, y: f64) -> (f64, f64) {
    let mut rest = x % y;
    let mut quotient = (x - rest) / y;
    if rest == 0.0 {
        rest = 0f64.copysign(y);
    } else if (rest < 0.0) != (y < 0.0) {
        rest += y;
        quotient -= 1.0;
    }
    let floor = quotient.floor();
    let whole = match quotient {
        0.0 => 0f64.copysign(x / y),
        _ if quotient - floor > 0.5 => floor + 1.0,
        _ => floor,
    };
    (whole, rest)
}

fn repeat(state: &State<'_, '_>, value: &Value, n: i128) -> Result<Value, Error> {
    let n = usize::try_from(n.max(0)).unwrap_or(usize::MAX);
    if let Some(unit) = value.as_str() {
        let mut text = Text::new(state);
        text.repeat(unit, n)?;
        return Ok(Value::from(text.finish()));
    }
    if !is_list(value) || value.downcast_object_ref::<View>().is_some() {
        return Err(unsupported("*", value, &Value::from(1)));
    }
    let unit = items(state, value)?;
    state.consume_fuel((unit.len().saturating_mul(n) / 2) as u64)?;
    let all: Vec<Value> = (0..n).flat_map(|_| unit.iter().cloned()).collect();
    Ok(if value.is_tuple() { Value::from(Tuple::from(all)) } else { Value::from(all) })
}

/// `format % arguments`
pub fn percent(state: &State<'_, '_>, text: &str, arguments: &[Value]) -> Result<Value, Error> {
    formatted(state, FormatStyle::Printf, text, arguments)
}

/// Formats with minijinja, which has no limit of its own: widths are bounded first.
pub fn formatted(
    state: &State<'_, '_>,
    style: FormatStyle,
    text: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    let mut digits = 0;
    for byte in text.bytes() {
        digits = if byte.is_ascii_digit() { digits + 1 } else { 0 };
        if digits > 3 || (byte == b'*' && style == FormatStyle::Printf) {
            return Err(error("format: a width of more than three digits is not supported"));
        }
    }
    let fields = text.matches(['%', '{']).count();
    let mut longest = 1000;
    let arguments = arguments.iter().map(|value| match value.as_object() {
        Some(_) => to_text(state, value).map(Value::from),
        None => Ok(value.clone()),
    });
    let arguments = arguments.collect::<Result<Vec<_>, _>>()?;
    for value in &arguments {
        longest = longest.max(value.as_str().map_or(0, str::len));
    }
    state.consume_fuel((fields.saturating_mul(longest) / 64) as u64)?;
    format(style, text, &arguments).map(Value::from)
}
