//! The rows of a file: lines, JSON objects, or rows of a Parquet table.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::schema::types::Type;
use serde_json::Value;

use super::files::{Compression, Content, Kind, kind};
use crate::TrainError;
use crate::config::{DataOptions, Documents, Task};

/// Takes a document, or what is wrong with a row.
type Sink<'a> = dyn FnMut(Result<String, String>) -> Result<(), TrainError> + 'a;

/// Reads all documents of a file.
pub(super) fn read(path: &Path, options: &DataOptions, sink: &mut Sink<'_>) -> Result<(), TrainError> {
    let Kind { content, compression } = kind(path);
    let file = File::open(path).map_err(TrainError::io(path, "read"))?;
    if content == Content::Parquet {
        if compression != Compression::None {
            let problem = "Parquet files are compressed inside; decompress this one first".into();
            return Err(TrainError::Text { path: path.to_owned(), problem });
        }
        return parquet(path, file, options, sink);
    }
    let input: Box<dyn Read> = match compression {
        Compression::None => Box::new(file),
        Compression::Gzip => Box::new(flate2::read::MultiGzDecoder::new(BufReader::new(file))),
        Compression::Zstd => {
            Box::new(zstd::stream::read::Decoder::new(file).map_err(TrainError::io(path, "read"))?)
        }
    };
    match content {
        Content::Text if options.task == Task::Sft => {
            let problem = "conversations are rows of JSON Lines or Parquet, not plain text".into();
            Err(TrainError::Text { path: path.to_owned(), problem })
        }
        Content::JsonLines => json_lines(path, BufReader::new(input), options, sink),
        _ => plain(path, input, options.documents, sink),
    }
}

fn plain(
    path: &Path,
    mut input: impl Read,
    documents: Documents,
    sink: &mut Sink<'_>,
) -> Result<(), TrainError> {
    let mut bytes = Vec::new();
    input.read_to_end(&mut bytes).map_err(TrainError::io(path, "read"))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = error.as_bytes()[..at].iter().filter(|&&b| b == b'\n').count() + 1;
        let problem = format!("not UTF-8: byte {at}, on line {line}, is 0x{:02x}", error.as_bytes()[at]);
        TrainError::Text { path: path.to_owned(), problem }
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text).replace("\r\n", "\n");
    match documents {
        Documents::File => sink(Ok(text)),
        Documents::Line => text.lines().try_for_each(|line| sink(Ok(line.to_owned()))),
        Documents::Paragraph => paragraphs(&text).into_iter().try_for_each(|text| sink(Ok(text))),
    }
}

fn paragraphs(text: &str) -> Vec<String> {
    let mut all = vec![String::new()];
    for line in text.lines() {
        let last = all.last_mut().expect("one at least");
        if line.trim().is_empty() {
            all.push(String::new());
        } else {
            if !last.is_empty() {
                last.push('\n');
            }
            last.push_str(line);
        }
    }
    all
}

fn json_lines(
    path: &Path,
    mut input: impl BufRead,
    options: &DataOptions,
    sink: &mut Sink<'_>,
) -> Result<(), TrainError> {
    let column = options.column();
    let mut line = Vec::new();
    for number in 1u64.. {
        line.clear();
        if input.read_until(b'\n', &mut line).map_err(TrainError::io(path, "read"))? == 0 {
            break;
        }
        let text = if number == 1 { line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&line) } else { &line };
        if text.trim_ascii().is_empty() {
            continue;
        }
        let wrong = |problem: String| format!("line {number} is no object with a `{column}`: {problem}");
        let row = serde_json::from_slice::<Value>(text).map_err(|error| wrong(error.to_string()));
        let row = row.and_then(|mut row| match row.get_mut(column).map(Value::take) {
            Some(value) => document(value, options.task).map_err(|found| wrong(format!("it is {found}"))),
            None if row.is_object() => Err(wrong("its keys are others".into())),
            None => Err(wrong("it is none".into())),
        });
        sink(row)?;
    }
    Ok(())
}

/// A document: a text, or a conversation's messages as JSON. Else what was found in its place.
fn document(value: Value, task: Task) -> Result<String, &'static str> {
    match (value, task) {
        (Value::String(text), Task::Text) => Ok(text),
        (list @ Value::Array(_), Task::Sft) => Ok(list.to_string()),
        (value, _) => Err(kind_of(&value)),
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::Object(_) => "an object",
    }
}

/// One row after the other: a page of the file is in memory at a time, not the table.
fn parquet(path: &Path, file: File, options: &DataOptions, sink: &mut Sink<'_>) -> Result<(), TrainError> {
    let column = options.column();
    let damaged = |problem: String| TrainError::Text {
        path: path.to_owned(),
        problem: format!("it can't be read as Parquet: {problem}"),
    };
    let reader = guarded(|| SerializedFileReader::new(file)).map_err(damaged)?;
    let schema = reader.metadata().file_metadata().schema();
    let Some(field) = schema.get_fields().iter().find(|field| field.name() == column) else {
        let names: Vec<_> = schema.get_fields().iter().map(|field| field.name()).collect();
        let problem = format!(
            "there is no column `{column}`; its columns: {}; name one with `data.column`",
            names.join(", ")
        );
        return Err(TrainError::Text { path: path.to_owned(), problem });
    };
    let only = Type::group_type_builder(schema.name()).with_fields(vec![Arc::clone(field)]).build();
    let only = only.map_err(|error| damaged(error.to_string()))?;
    let mut rows = guarded(|| reader.get_row_iter(Some(only))).map_err(damaged)?;
    for number in 1u64.. {
        let Some(row) = guarded(|| rows.next().transpose()).map_err(damaged)? else { break };
        let field = row.get_column_iter().next().map(|(_, field)| field);
        let wrong = |found: &str| format!("row {number}: its `{column}` is {found}");
        sink(match field {
            Some(Field::Str(text)) if options.task == Task::Text => Ok(text.clone()),
            // Text of programs that do not say that it is such.
            Some(Field::Bytes(bytes)) if options.task == Task::Text => {
                String::from_utf8(bytes.data().to_vec()).map_err(|_| wrong("bytes that are not UTF-8"))
            }
            Some(field) => document(field.to_json_value(), options.task).map_err(wrong),
            None => Err(wrong("missing")),
        })?;
    }
    Ok(())
}

/// The library's errors, also those that it reports by a panic: files are not trusted.
fn guarded<T>(call: impl FnOnce() -> parquet::errors::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("its pages contradict each other".into()),
    }
}
