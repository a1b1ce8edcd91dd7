//! Metadata values. Arrays stay encoded: a vocabulary of 128 thousand tokens and twice as many merges is a
//! slice of the memory map until somebody iterates over it.

use bytes::Bytes;
use std::fmt;

/// The types of metadata values, with the numbers that the format gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
#[allow(missing_docs, reason = "the names say it all")]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    /// The type with that number.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.get(usize::try_from(id).ok()?).copied()
    }

    /// Bytes of a value; `None` for strings and arrays, which vary.
    pub const fn size(self) -> Option<usize> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::String | Self::Array => None,
        }
    }

    /// Bytes of the smallest value: an empty string is its length, an empty array its type and length.
    pub(super) const fn min_size(self) -> u64 {
        match self.size() {
            Some(size) => size as u64,
            None if matches!(self, Self::String) => 8,
            None => 12,
        }
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::U16 => "u16",
            Self::I16 => "i16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::F32 => "f32",
            Self::Bool => "bool",
            Self::String => "string",
            Self::Array => "array",
            Self::U64 => "u64",
            Self::I64 => "i64",
            Self::F64 => "f64",
        })
    }
}

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the names say it all")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl Value {
    /// Its type.
    pub fn value_type(&self) -> ValueType {
        match self {
            Self::U8(_) => ValueType::U8,
            Self::I8(_) => ValueType::I8,
            Self::U16(_) => ValueType::U16,
            Self::I16(_) => ValueType::I16,
            Self::U32(_) => ValueType::U32,
            Self::I32(_) => ValueType::I32,
            Self::F32(_) => ValueType::F32,
            Self::Bool(_) => ValueType::Bool,
            Self::String(_) => ValueType::String,
            Self::Array(_) => ValueType::Array,
            Self::U64(_) => ValueType::U64,
            Self::I64(_) => ValueType::I64,
            Self::F64(_) => ValueType::F64,
        }
    }

    /// A non-negative integer of any width.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(v) => Some(v.into()),
            Self::U16(v) => Some(v.into()),
            Self::U32(v) => Some(v.into()),
            Self::U64(v) => Some(v),
            _ => u64::try_from(self.as_i64()?).ok(),
        }
    }

    /// An integer of any width that fits.
    pub fn as_i64(&self) -> Option<i64> {
        match *self {
            Self::I8(v) => Some(v.into()),
            Self::I16(v) => Some(v.into()),
            Self::I32(v) => Some(v.into()),
            Self::I64(v) => Some(v),
            Self::U8(v) => Some(v.into()),
            Self::U16(v) => Some(v.into()),
            Self::U32(v) => Some(v.into()),
            Self::U64(v) => i64::try_from(v).ok(),
            _ => None,
        }
    }

    /// A floating-point number of either width.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(v) => Some(v.into()),
            Self::F64(v) => Some(v),
            _ => None,
        }
    }

    /// A truth value.
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(v) = *self { Some(v) } else { None }
    }

    /// A string.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::String(v) = self { Some(v) } else { None }
    }

    /// An array.
    pub fn as_array(&self) -> Option<&Array> {
        if let Self::Array(v) = self { Some(v) } else { None }
    }

    /// Appends the value as the format encodes it.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::U8(v) => out.push(*v),
            Self::I8(v) => out.extend(v.to_le_bytes()),
            Self::U16(v) => out.extend(v.to_le_bytes()),
            Self::I16(v) => out.extend(v.to_le_bytes()),
            Self::U32(v) => out.extend(v.to_le_bytes()),
            Self::I32(v) => out.extend(v.to_le_bytes()),
            Self::F32(v) => out.extend(v.to_le_bytes()),
            Self::Bool(v) => out.push(u8::from(*v)),
            Self::String(v) => encode_str(v, out),
            Self::Array(v) => {
                out.extend((v.element as u32).to_le_bytes());
                out.extend((v.len as u64).to_le_bytes());
                out.extend_from_slice(&v.data);
            }
            Self::U64(v) => out.extend(v.to_le_bytes()),
            Self::I64(v) => out.extend(v.to_le_bytes()),
            Self::F64(v) => out.extend(v.to_le_bytes()),
        }
    }
}

/// Appends a string as the format encodes it.
pub(super) fn encode_str(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// Printable in one line: long strings and arrays are cut, with their length.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN_CHARS: usize = 80;
        const SHOWN_ITEMS: usize = 4;
        match self {
            Self::U8(v) => v.fmt(f),
            Self::I8(v) => v.fmt(f),
            Self::U16(v) => v.fmt(f),
            Self::I16(v) => v.fmt(f),
            Self::U32(v) => v.fmt(f),
            Self::I32(v) => v.fmt(f),
            Self::F32(v) => v.fmt(f),
            Self::Bool(v) => v.fmt(f),
            Self::U64(v) => v.fmt(f),
            Self::I64(v) => v.fmt(f),
            Self::F64(v) => v.fmt(f),
            Self::String(v) => match v.char_indices().nth(SHOWN_CHARS) {
                Some((end, _)) => write!(f, "{:?}... ({} bytes)", &v[..end], v.len()),
                None => write!(f, "{v:?}"),
            },
            Self::Array(v) => {
                f.write_str("[")?;
                for (i, item) in v.iter().take(SHOWN_ITEMS).enumerate() {
                    write!(f, "{}{item}", if i == 0 { "" } else { ", " })?;
                }
                if v.len > SHOWN_ITEMS {
                    write!(f, ", ... ({} {})", v.len, v.element)?;
                }
                f.write_str("]")
            }
        }
    }
}

/// An array, still encoded; its encoding has been checked.
#[derive(Clone, PartialEq)]
pub struct Array {
    element: ValueType,
    len: usize,
    /// The elements as the file holds them: exactly `len`, and valid.
    data: Bytes,
}

impl fmt::Debug for Array {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Array({} {}, {} bytes)", self.len, self.element, self.data.len())
    }
}

impl Array {
    /// An array of strings.
    pub fn from_strings<S: AsRef<str>>(items: impl IntoIterator<Item = S>) -> Self {
        let mut data = Vec::new();
        let len = items.into_iter().map(|s| encode_str(s.as_ref(), &mut data)).count();
        Self { element: ValueType::String, len, data: data.into() }
    }

    /// An array of f32.
    pub fn from_f32(items: impl IntoIterator<Item = f32>) -> Self {
        let data: Vec<u8> = items.into_iter().flat_map(f32::to_le_bytes).collect();
        Self { element: ValueType::F32, len: data.len() / 4, data: data.into() }
    }

    /// An array of i32.
    pub fn from_i32(items: impl IntoIterator<Item = i32>) -> Self {
        let data: Vec<u8> = items.into_iter().flat_map(i32::to_le_bytes).collect();
        Self { element: ValueType::I32, len: data.len() / 4, data: data.into() }
    }

    /// An array of bool.
    pub fn from_bools(items: impl IntoIterator<Item = bool>) -> Self {
        let data: Vec<u8> = items.into_iter().map(u8::from).collect();
        Self { element: ValueType::Bool, len: data.len(), data: data.into() }
    }

    /// The type of its elements.
    pub fn element_type(&self) -> ValueType {
        self.element
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements, decoded one by one.
    pub fn iter(&self) -> impl Iterator<Item = Value> + '_ {
        let mut rest = &self.data[..];
        (0..self.len).map_while(move |_| decode(self.element, &self.data, &mut rest))
    }

    /// The elements of an array of strings, without copying; nothing where the elements are not strings.
    pub fn strings(&self) -> impl Iterator<Item = &str> + '_ {
        let mut rest = &self.data[..];
        let len = if self.element == ValueType::String { self.len } else { 0 };
        (0..len).map_while(move |_| take_str(&mut rest))
    }

    /// The elements of an array of f32 or f64, as f32; `None` where they are something else.
    pub fn to_f32(&self) -> Option<Vec<f32>> {
        matches!(self.element, ValueType::F32 | ValueType::F64)
            .then(|| self.iter().filter_map(|v| v.as_f64()).map(|v| v as f32).collect())
    }

    /// The elements of an array of integers; `None` where they are something else, or too large.
    pub fn to_i64(&self) -> Option<Vec<i64>> {
        self.iter().map(|v| v.as_i64()).collect()
    }
}

fn take<'a>(rest: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
    let (head, tail) = rest.split_at_checked(n)?;
    *rest = tail;
    Some(head)
}

fn take_array<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    take(rest, N)?.try_into().ok()
}

fn take_len(rest: &mut &[u8]) -> Option<usize> {
    usize::try_from(u64::from_le_bytes(take_array(rest)?)).ok()
}

fn take_str<'a>(rest: &mut &'a [u8]) -> Option<&'a str> {
    let len = take_len(rest)?;
    std::str::from_utf8(take(rest, len)?).ok()
}

/// Decodes a value from the front of `rest`, which is a part of `whole`; `None` where it isn't valid, which
/// for checked data does not happen.
pub(super) fn decode(kind: ValueType, whole: &Bytes, rest: &mut &[u8]) -> Option<Value> {
    Some(match kind {
        ValueType::U8 => Value::U8(u8::from_le_bytes(take_array(rest)?)),
        ValueType::I8 => Value::I8(i8::from_le_bytes(take_array(rest)?)),
        ValueType::U16 => Value::U16(u16::from_le_bytes(take_array(rest)?)),
        ValueType::I16 => Value::I16(i16::from_le_bytes(take_array(rest)?)),
        ValueType::U32 => Value::U32(u32::from_le_bytes(take_array(rest)?)),
        ValueType::I32 => Value::I32(i32::from_le_bytes(take_array(rest)?)),
        ValueType::F32 => Value::F32(f32::from_le_bytes(take_array(rest)?)),
        ValueType::Bool => Value::Bool(take_array::<1>(rest)? != [0]),
        ValueType::U64 => Value::U64(u64::from_le_bytes(take_array(rest)?)),
        ValueType::I64 => Value::I64(i64::from_le_bytes(take_array(rest)?)),
        ValueType::F64 => Value::F64(f64::from_le_bytes(take_array(rest)?)),
        ValueType::String => Value::String(take_str(rest)?.to_owned()),
        ValueType::Array => {
            let element = ValueType::from_id(u32::from_le_bytes(take_array(rest)?))?;
            let len = take_len(rest)?;
            let body = *rest;
            match element.size() {
                Some(size) => {
                    take(rest, len.checked_mul(size)?)?;
                }
                None => {
                    for _ in 0..len {
                        skip(element, rest)?;
                    }
                }
            }
            let data = whole.slice_ref(&body[..body.len() - rest.len()]);
            Value::Array(Array { element, len, data })
        }
    })
}

/// Steps over a value of checked data.
fn skip(kind: ValueType, rest: &mut &[u8]) -> Option<()> {
    match kind {
        ValueType::String => {
            let len = take_len(rest)?;
            take(rest, len)?;
        }
        ValueType::Array => {
            let element = ValueType::from_id(u32::from_le_bytes(take_array(rest)?))?;
            for _ in 0..take_len(rest)? {
                skip(element, rest)?;
            }
        }
        fixed => {
            take(rest, fixed.size()?)?;
        }
    }
    Some(())
}

macro_rules! from {
    ($($type:ty => $variant:ident),*) => {$(
        impl From<$type> for Value {
            fn from(v: $type) -> Self {
                Self::$variant(v.into())
            }
        }
    )*};
}
from!(u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, u64 => U64, i64 => I64, f32 => F32,
      f64 => F64, bool => Bool, String => String, &str => String, Array => Array);

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(value: Value) {
        let mut data = Vec::new();
        value.encode(&mut data);
        let data = Bytes::from(data);
        let mut rest = &data[..];
        assert_eq!(decode(value.value_type(), &data, &mut rest), Some(value));
        assert!(rest.is_empty());
    }

    #[test]
    fn every_type_survives_a_round_trip() {
        for value in [
            Value::from(200u8),
            Value::from(-100i8),
            Value::from(60_000u16),
            Value::from(-30_000i16),
            Value::from(4_000_000_000u32),
            Value::from(-2_000_000_000i32),
            Value::from(1.5f32),
            Value::from(true),
            Value::from("grüße"),
            Value::from(u64::MAX),
            Value::from(i64::MIN),
            Value::from(1e300f64),
            Value::from(Array::from_strings(["a", "", "bc"])),
            Value::from(Array::from_f32([0.5, -1.0])),
            Value::from(Array::from_i32([1, -1])),
            Value::from(Array::from_i32([])),
        ] {
            assert_eq!(ValueType::from_id(value.value_type() as u32), Some(value.value_type()));
            round_trip(value);
        }
        assert_eq!(ValueType::from_id(13), None);
    }

    #[test]
    fn arrays_of_arrays_iterate() {
        let inner = [Array::from_strings(["x", "yz"]), Array::from_i32([7])];
        let mut data = Vec::new();
        for array in &inner {
            Value::Array(array.clone()).encode(&mut data);
        }
        let outer = Array { element: ValueType::Array, len: 2, data: data.into() };
        let items: Vec<_> = outer.iter().collect();
        assert_eq!(items, inner.map(Value::Array));
        round_trip(Value::Array(outer));
    }

    #[test]
    fn long_values_are_printed_short() {
        assert_eq!(Value::from(Array::from_i32(0..1000)).to_string(), "[0, 1, 2, 3, ... (1000 i32)]");
        assert_eq!(Value::from(Array::from_strings(["a"])).to_string(), "[\"a\"]");
        assert!(Value::from("é".repeat(500)).to_string().ends_with("(1000 bytes)"));
    }

    #[test]
    fn numbers_convert_only_where_they_fit() {
        assert_eq!(Value::from(-1i32).as_u64(), None);
        assert_eq!(Value::from(u64::MAX).as_i64(), None);
        assert_eq!(Value::from(u64::MAX).as_u64(), Some(u64::MAX));
        assert_eq!(Value::from(7i8).as_u64(), Some(7));
        assert_eq!(Value::from(1.0f32).as_u64(), None);
        assert_eq!(Value::from(1u32).as_f64(), None);
    }
}
