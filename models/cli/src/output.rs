//! What people and machines get to see: stdout, stderr, errors, logs, progress, files.

use bitnet_burn::DenseMatrixError;
use std::fmt::Display;
use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal as _, Write};
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::Context as _;
use bitnet_burn::ForwardError;
use bitnet_burn::backends::manager::SetupError;
use bitnet_burn_engine::checkpoint::LoadError;
use bitnet_burn_engine::generate::GenerateError;
use bitnet_burn_engine::load::ModelError;
use bitnet_burn_engine::tokenizer::{TokenizerError, VocabularyError};
use bitnet_burn_formats::FileError;
use bitnet_burn_formats::files;
use bitnet_burn_manager::ManagerError;
use bitnet_burn_train::export::ExportError;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use tracing_subscriber::EnvFilter;

/// Logs go to stderr: warnings, or what `RUST_LOG` asks for.
pub fn start_logging() {
    // What Burn's remote backend warns of, a session that ended, is told as an error where it is one.
    const DEFAULT: &str = "warn,wgpu_core=error,wgpu_hal=error,naga=error,burn_remote=error";
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Log)
        .with_ansi(io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()))
        .without_time()
        .with_target(false)
        .init();
}

/// Log messages that wait, while text is being streamed to a terminal.
static HELD: Mutex<Option<Vec<u8>>> = Mutex::new(None);

/// Where log messages go: to stderr, or into the messages that wait.
struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut *HELD.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(held) => held.write(bytes),
            None => io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Keeps log messages out of a text that is being streamed. They are written when this is dropped.
#[must_use]
pub struct HeldLog(());

impl HeldLog {
    pub fn new() -> Self {
        HELD.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default();
        Self(())
    }
}

impl Drop for HeldLog {
    fn drop(&mut self) {
        let held = HELD.lock().unwrap_or_else(PoisonError::into_inner).take();
        let _ = io::stderr().write_all(&held.unwrap_or_default());
    }
}

/// Writes a line to stderr, if it is open. Control characters are escaped: the line may hold names and texts from files, and a
/// terminal would obey them.
pub fn note(message: impl Display) {
    let _ = writeln!(io::stderr(), "{}", printable(&message.to_string(), &['\n', '\t']));
}

/// A text with its control characters escaped, but for some.
fn printable(text: &str, kept: &[char]) -> String {
    let escape = |c: char| c.is_control() && !kept.contains(&c);
    if !text.contains(escape) {
        return text.to_owned();
    }
    let one = |c: char| if escape(c) { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(one).collect()
}

/// `warning: ...` on stderr.
pub fn warning(message: impl Display) {
    note(format_args!("warning: {message}"));
}

/// Stdout, which nothing else in the process writes to: a plugin's print does not get into our output.
static STDOUT: OnceLock<File> = OnceLock::new();

/// Takes stdout. To be called once, after the command line was read: clap writes help itself.
pub fn take_stdout() {
    // Without a stdout, writing to it says so.
    if let Ok(own) = bitnet_burn_manager::take_stdout() {
        let _ = STDOUT.set(own);
    }
}

/// Writes to stdout, at once.
pub fn write(text: &str) -> io::Result<()> {
    match STDOUT.get() {
        Some(mut own) => own.write_all(text.as_bytes()),
        None => io::stdout().lock().write_all(text.as_bytes()),
    }
}

/// Writes what a model generated to stdout, at once. A terminal does not get its control characters to obey.
pub fn write_generated(text: &str) -> io::Result<()> {
    let is_terminal = STDOUT.get().map_or_else(|| io::stdout().is_terminal(), File::is_terminal);
    if is_terminal { write(&printable(text, &['\n', '\t'])) } else { write(text) }
}

/// A line on stdout.
pub fn print(message: impl Display) -> anyhow::Result<()> {
    write(&format!("{message}\n")).context("cannot write to stdout")
}

/// A line of JSON on stdout.
pub fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    print(serde_json::to_string(value).context("cannot write JSON")?)
}

/// Whether an error is that nobody reads our output any more.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let broken = |e: &io::Error| e.kind() == ErrorKind::BrokenPipe;
    error.chain().any(|cause| cause.downcast_ref::<io::Error>().is_some_and(broken))
}

/// `error: ...`, its causes, and what to do about it where that is known.
pub fn print_error(error: &anyhow::Error) {
    let mut causes = causes(error).into_iter();
    note(format_args!("error: {}", causes.next().unwrap_or_default()));
    for cause in causes {
        note(format_args!("  caused by: {cause}"));
    }
    if let Some(hint) = error.chain().find_map(hint) {
        note(format_args!("  hint: {hint}"));
    }
}

/// An error and its causes, without those that the one before says itself.
fn causes(error: &anyhow::Error) -> Vec<String> {
    let mut causes: Vec<String> = Vec::new();
    for cause in error.chain().map(ToString::to_string) {
        if causes.last().is_none_or(|before| !before.contains(&cause)) {
            causes.push(cause);
        }
    }
    causes
}

/// An error with its causes, on one line.
pub fn in_one_line(error: impl Into<anyhow::Error>) -> String {
    causes(&error.into()).join(": ")
}

/// What would help. Errors that are another one's transparent skin are not in a chain themselves.
fn hint(cause: &(dyn std::error::Error + 'static)) -> Option<&'static str> {
    if let Some(error) = cause.downcast_ref::<ModelError>() {
        return match error {
            ModelError::Load(error) => of_load(error),
            ModelError::Kernel(error) => of_manager(error),
            ModelError::Head(DenseMatrixError::Int8 { .. }) => {
                Some("--lm-head file computes with weights of any type, --lm-head q8_0 with a copy of them")
            }
            ModelError::Dense { .. } => {
                Some("BITNET_STRICT_MODE=no-fallback,gated-plugins,plausible-figures allows f32 activations")
            }
            ModelError::Head(_) => Some("--lm-head file computes with weights of any type"),
            ModelError::Placement { .. } => {
                Some("--gpu-layers says how many, or --context and --chunk leave the GPU more room")
            }
            ModelError::Row { .. } => {
                Some("--activations model quantises by the groups that the weights have")
            }
            ModelError::Worker { .. } | ModelError::Devices { .. } | ModelError::Scales(_) => None,
        };
    }
    if let Some(GenerateError::Forward(error)) = cause.downcast_ref() {
        return match error {
            ForwardError::Kernel(error) => of_manager(error),
            ForwardError::Cache(_) => Some(
                "--context gives the KV cache more positions, up to those that the model was trained for",
            ),
            _ => None,
        };
    }
    if let Some(SetupError::Manager(error)) = cause.downcast_ref() {
        return of_manager(error);
    }
    if let Some(TokenizerError::Invalid { problem, .. }) = cause.downcast_ref() {
        return match problem {
            // They say what to do themselves.
            VocabularyError::MissingPre { .. } | VocabularyError::UnknownPre { .. } => None,
            _ => Some("`bitnet run --tokens-file FILE --print-ids` needs no tokenizer"),
        };
    }
    if let Some(error) = cause.downcast_ref::<ExportError>() {
        return match error {
            ExportError::Exists { .. } => Some("--force replaces it, --out writes to another place"),
            ExportError::Tokenizer(_) => Some("--no-tokenizer writes the model without it"),
            ExportError::Load(error) => of_load(error),
            _ => None,
        };
    }
    cause.downcast_ref().and_then(of_load).or_else(|| cause.downcast_ref().and_then(of_manager))
}

fn of_load(error: &LoadError) -> Option<&'static str> {
    match error {
        LoadError::File(FileError::Io { error, .. }) if error.kind() == ErrorKind::NotFound => {
            Some("a model is a GGUF file or a directory with config.json and safetensors")
        }
        LoadError::NotTernary { .. } => Some("`bitnet inspect` shows the types of all tensors"),
        _ => None,
    }
}

fn of_manager(error: &ManagerError) -> Option<&'static str> {
    match error {
        ManagerError::UnknownKernel { .. } => Some("`bitnet kernels` shows what there is"),
        ManagerError::NoKernel { .. } => Some(
            "`bitnet kernels` shows each kernel's status; without BITNET_STRICT_MODE the (slow) reference computes",
        ),
        _ => None,
    }
}

/// A progress bar on stderr, where that is a terminal.
pub fn bar(total: u64, template: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

/// Writes a file as a whole or not at all: under a temporary name beside it, then renamed.
pub fn write_file(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    files::replace(path, write).map_err(|error: anyhow::Error| match error.downcast::<io::Error>() {
        Ok(error) => anyhow::Error::new(error).context(format!("cannot write {}", path.display())),
        Err(error) => error,
    })
}

/// Columns of text, each as wide as its widest cell, the last one open. Control characters are escaped, so that a cell is on its
/// line.
pub fn columns(rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| printable(cell, &[])).collect()).collect();
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..count).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:<width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(printable("a\u{1b}[31mb\nc", &['\n']), "a\\u{1b}[31mb\nc");
        let cell = |text: &str| vec!["name".to_owned(), text.to_owned()];
        assert_eq!(
            columns(&[cell("syn\u{1b}]0;x\u{7}\nlayers  9")]),
            "name  syn\\u{1b}]0;x\\u{7}\\nlayers  9\n"
        );
        assert_eq!(columns(&[cell("Grüße, 世界")]), "name  Grüße, 世界\n");
    }
}
