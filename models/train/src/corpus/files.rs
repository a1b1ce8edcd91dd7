//! Files by a path, a directory or a pattern.

use std::path::{Path, PathBuf};

use crate::TrainError;

/// What the name of a file says about its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    pub content: Content,
    pub compression: Compression,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    Text,
    JsonLines,
    Parquet,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gzip,
    Zstd,
}

/// The extensions of files that a directory stands for.
const EXTENSIONS: [(&str, Content); 5] = [
    ("txt", Content::Text),
    ("md", Content::Text),
    ("jsonl", Content::JsonLines),
    ("ndjson", Content::JsonLines),
    ("parquet", Content::Parquet),
];

fn extension(path: &Path) -> Option<String> {
    Some(path.extension()?.to_str()?.to_ascii_lowercase())
}

/// The kind of a file, if its extension is a known one.
fn known(path: &Path) -> Option<Kind> {
    let compression = match extension(path).as_deref() {
        Some("gz") => Compression::Gzip,
        Some("zst" | "zstd") => Compression::Zstd,
        _ => Compression::None,
    };
    let inner = if compression == Compression::None { path.to_owned() } else { path.with_extension("") };
    let found = extension(&inner)?;
    let (_, content) = EXTENSIONS.into_iter().find(|(extension, _)| *extension == found)?;
    Some(Kind { content, compression })
}

/// The kind of a file: plain text where its extension says nothing.
pub(super) fn kind(path: &Path) -> Kind {
    known(path).unwrap_or_else(|| Kind {
        content: Content::Text,
        compression: match extension(path).as_deref() {
            Some("gz") => Compression::Gzip,
            Some("zst" | "zstd") => Compression::Zstd,
            _ => Compression::None,
        },
    })
}

/// The files that a source stands for, in the order of their paths.
pub(super) fn find(source: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let nothing = |problem: &str| TrainError::Text { path: source.to_owned(), problem: problem.to_owned() };
    if source.is_dir() {
        let mut found = Vec::new();
        walk(source, &mut found)?;
        found.sort();
        if found.is_empty() {
            return Err(nothing("no file of text in this directory (.txt, .md, .jsonl, .ndjson, .parquet)"));
        }
        return Ok(found);
    }
    let pattern = source.to_str().filter(|text| !source.exists() && text.contains(['*', '?', '[']));
    let Some(pattern) = pattern else { return Ok(vec![source.to_owned()]) };
    // As a shell does it: hidden files have to be named.
    let options = glob::MatchOptions { require_literal_leading_dot: true, ..glob::MatchOptions::new() };
    let paths =
        glob::glob_with(pattern, options).map_err(|error| nothing(&format!("not a pattern: {error}")))?;
    let mut found = Vec::new();
    for path in paths {
        let path = path.map_err(|error| {
            let path = error.path().to_owned();
            TrainError::io(&path, "list")(error.into())
        })?;
        if path.is_file() {
            found.push(path);
        }
    }
    if found.is_empty() {
        return Err(nothing("no file has a path of this pattern"));
    }
    Ok(found)
}

/// All files of text in a directory and in those below it; hidden ones are left out.
fn walk(dir: &Path, found: &mut Vec<PathBuf>) -> Result<(), TrainError> {
    for entry in std::fs::read_dir(dir).map_err(TrainError::io(dir, "list"))? {
        let entry = entry.map_err(TrainError::io(dir, "list"))?;
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        let (path, kind) = (entry.path(), entry.file_type().map_err(TrainError::io(dir, "list"))?);
        // A link to a directory is not followed, so that there is no way back up.
        if kind.is_dir() {
            walk(&path, found)?;
        } else if known(&path).is_some() && path.is_file() {
            found.push(path);
        }
    }
    Ok(())
}
