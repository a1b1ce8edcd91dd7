//! Values beyond minijinja's, and the limits of all.

use std::sync::Arc;

use minijinja::value::{Enumerator, Object, ObjectRepr, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

use super::text::pairs;

/// How deep lists may nest in lists.
pub const MAX_DEPTH: usize = 100;
/// How many values a list in a list may have, with all that is in them: what is shared counts each time.
const MAX_NODES: usize = 20_000;

pub fn error(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// What `range`, `keys`, `values` and `items` return: Python writes them other than lists.
#[derive(Debug)]
pub struct View {
    /// The name that stands before the items, or else [`text`](Self::text).
    pub name: Option<&'static str>,
    pub text: String,
    pub items: Vec<Value>,
}

impl Object for View {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        // Only a range has items that can be asked for.
        if self.name.is_some() { ObjectRepr::Iterable } else { ObjectRepr::Seq }
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.items.get(key.as_usize()?).cloned()
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.items.clone())
    }
}

pub fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().ends_with("Namespace"))
}

/// Python's name of a value's type.
pub fn type_name(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => "undefined".into(),
        ValueKind::None => "None".into(),
        ValueKind::Bool => "bool".into(),
        ValueKind::Number => if value.is_integer() { "int" } else { "float" }.into(),
        ValueKind::String => "str".into(),
        ValueKind::Seq | ValueKind::Iterable => if value.is_tuple() { "tuple" } else { "list" }.into(),
        ValueKind::Map => if is_namespace(value) { "namespace" } else { "dict" }.into(),
        other => other.to_string(),
    }
}

pub fn is_list(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}

/// The items of a list, paid for.
pub fn items(state: &State<'_, '_>, value: &Value) -> Result<Vec<Value>, Error> {
    if value.is_undefined() {
        return Ok(Vec::new());
    }
    if let Some(text) = value.as_str() {
        state.consume_fuel(text.len() as u64 / 2)?;
        return Ok(text.chars().map(|c| Value::from(String::from(c))).collect());
    }
    if !is_list(value) && (value.kind() != ValueKind::Map || is_namespace(value)) {
        return Err(error(format!("a value of type {} has no items", type_name(value))));
    }
    if let Some(n) = value.len() {
        state.consume_fuel(n as u64 / 2)?;
    }
    value.try_iter()?.checked().collect()
}

/// Refuses a container that nests too much, or one that a namespace or an unhashable key is in.
pub fn make(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    let mut nodes = 0;
    check(&value, 0, &mut nodes)?;
    state.consume_fuel(nodes as u64 / 16)?;
    Ok(value)
}

fn check(value: &Value, depth: usize, nodes: &mut usize) -> Result<(), Error> {
    *nodes += 1;
    if *nodes > MAX_NODES {
        return Err(error(format!("a value has more than {MAX_NODES} values in it")));
    }
    if depth > MAX_DEPTH {
        return Err(error(format!("more than {MAX_DEPTH} lists in lists")));
    }
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            for item in value.try_iter()?.checked() {
                check(&item?, depth + 1, nodes)?;
            }
        }
        ValueKind::Map if !is_namespace(value) => {
            for (key, value) in pairs(value) {
                if key.as_object().is_some() && !key.is_tuple() {
                    return Err(error(format!("unhashable type: {}", type_name(&key))));
                }
                check(&key, depth + 1, nodes)?;
                check(&value, depth + 1, nodes)?;
            }
        }
        ValueKind::Map => return Err(error("a namespace can't be put into a value")),
        ValueKind::Invalid => return Err(error(value.to_string())),
        _ => {}
    }
    Ok(())
}
