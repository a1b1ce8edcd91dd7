//! Where a model is written: beside its final place, which it takes when it is complete.

use super::ExportError;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use bitnet_burn_formats::files::{self, UnfinishedDirectory};

/// What is to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Directory,
}

/// The final place of a model, free or to be replaced, and a directory beside it in which the model grows.
/// Dropped before [`commit`](Self::commit), it leaves nothing behind.
pub(super) struct Place {
    out: PathBuf,
    kind: Kind,
    overwrite: bool,
    /// On the same file system, since it is in the same directory.
    temporary: UnfinishedDirectory,
}

impl Place {
    /// Checks that the model may be written to `out`, and makes the directory beside it.
    pub(super) fn new(source: &Path, out: &Path, kind: Kind, overwrite: bool) -> Result<Self, ExportError> {
        check(source, out, kind, overwrite)?;
        let temporary = UnfinishedDirectory::new(files::directory(out))
            .map_err(io_error(out, "create a directory beside it"))?;
        let place = Self { out: out.to_owned(), kind, overwrite, temporary };
        if kind == Kind::Directory {
            std::fs::create_dir(place.path()).map_err(io_error(out, "create a directory beside it"))?;
        }
        Ok(place)
    }

    /// Where to write: the directory, which exists, or the file, which doesn't yet.
    pub(super) fn path(&self) -> PathBuf {
        self.temporary.path().join(self.out.file_name().unwrap_or(OsStr::new("model")))
    }

    /// Puts what was written in its final place.
    pub(super) fn commit(self) -> Result<(), ExportError> {
        let (from, out) = (self.path(), &self.out);
        let old = self.temporary.path().join(".old");
        match self.kind {
            Kind::File if self.overwrite => files::move_to(&from, out),
            Kind::File => {
                let from = tempfile::TempPath::try_from_path(from)
                    .map_err(io_error(out, "find what was written"))?;
                from.persist_noclobber(out).map_err(|e| e.error)
            }
            // A directory with something in it can't be renamed over: it steps aside, and comes back if the
            // new one can't take its place.
            Kind::Directory if self.overwrite && out.exists() => std::fs::rename(out, &old)
                .and_then(|()| std::fs::rename(&from, out).inspect_err(|_| drop(std::fs::rename(&old, out)))),
            Kind::Directory => std::fs::rename(&from, out),
        }
        .map_err(io_error(out, "move what was written to its name"))?;
        let _ = files::sync_directory(files::directory(out));
        Ok(())
    }
}

fn check(source: &Path, out: &Path, kind: Kind, overwrite: bool) -> Result<(), ExportError> {
    if out.file_name().is_none() {
        let problem = "has no name that a model could get".into();
        return Err(ExportError::Place { path: out.to_owned(), problem });
    }
    let wrong = |problem: String| Err(ExportError::Place { path: out.to_owned(), problem });
    // Not `exists`: a link that leads nowhere is something, too.
    let Ok(found) = out.symlink_metadata() else { return Ok(()) };
    if let (Ok(source), Ok(target)) = (source.canonicalize(), out.canonicalize())
        && (source == target || (kind == Kind::Directory && source.starts_with(&target)))
    {
        return wrong("is the source, or has it inside: write to another place".into());
    }
    let is_dir = found.is_dir();
    match kind {
        Kind::File if is_dir => wrong("is a directory: name the file that is to be written".into()),
        Kind::Directory if !is_dir => wrong("is a file, and a directory is to be written".into()),
        Kind::File if !overwrite => Err(ExportError::Exists { path: out.to_owned() }),
        Kind::File => Ok(()),
        Kind::Directory => {
            let entries = std::fs::read_dir(out).map_err(io_error(out, "list"))?;
            for entry in entries {
                let entry = entry.map_err(io_error(out, "list"))?;
                if !overwrite {
                    return Err(ExportError::Exists { path: out.to_owned() });
                }
                // It will be deleted with all that is in it.
                let name = entry.file_name();
                if !entry.file_type().is_ok_and(|t| t.is_file()) || !is_models(&name) {
                    return wrong(format!(
                        "holds {:?}, which is no part of a model: it is not replaced as a whole; choose another \
                         directory, or empty it",
                        name.to_string_lossy()
                    ));
                }
            }
            Ok(())
        }
    }
}

/// Whether a file of this name belongs to a Hugging Face model.
fn is_models(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    let known = ["config.json", "generation_config.json", "model.safetensors.index.json"];
    known.contains(&&*name) || super::TOKENIZER_FILES.contains(&&*name) || name.ends_with(".safetensors")
}

pub(super) fn io_error(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> ExportError {
    move |error| ExportError::Io { path: path.to_owned(), action, error }
}
