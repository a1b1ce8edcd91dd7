//! What the user says: lines of a terminal, with editing and a history, or lines of any other stdin.

use std::io::{self, BufRead as _, StdinLock};
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{Behavior, Config, Editor, Helper};

use crate::output;

/// Begins and ends a message of several lines.
const QUOTES: &str = r#"""""#;

/// Lines that are remembered between conversations.
const HISTORY_LINES: usize = 1000;

/// One or more lines that belong together.
#[derive(Debug, PartialEq, Eq)]
pub enum Input {
    /// For the model.
    Message(String),
    /// For the program: it begins with a slash.
    Command(String),
}

impl Input {
    /// `None` if more lines belong to these.
    fn parse(lines: &str) -> Option<Self> {
        if let Some(block) = lines.trim_start().strip_prefix(QUOTES) {
            let text = block.trim_end().strip_suffix(QUOTES)?;
            let text = text.strip_prefix('\n').unwrap_or(text);
            return Some(Self::Message(text.strip_suffix('\n').unwrap_or(text).to_owned()));
        }
        if lines.ends_with('\\') {
            return None;
        }
        let text = lines.replace("\\\n", "\n");
        Some(match text.starts_with('/') {
            true => Self::Command(text.trim_end().to_owned()),
            false => Self::Message(text.trim().to_owned()),
        })
    }
}

/// What comes next.
#[derive(Debug)]
pub enum Next {
    Input(Input),
    /// A line that is no text.
    NoText,
    /// Ctrl-C, where nothing was being answered.
    Interrupted,
    End,
}

/// Where inputs come from.
pub enum Lines {
    Terminal(Box<Terminal>),
    Script(io::Split<StdinLock<'static>>),
}

/// A terminal with its line editor.
pub struct Terminal {
    editor: Editor<Multiline, FileHistory>,
    /// The history's file, if one is kept.
    history: Option<PathBuf>,
}

impl Lines {
    /// Lines of stdin.
    pub fn script() -> Self {
        Self::Script(io::stdin().lock().split(b'\n'))
    }

    /// Lines of the terminal. Its history is kept in this file, if there is one.
    pub fn terminal(history: Option<PathBuf>) -> anyhow::Result<Self> {
        // Stdout may be another file, and the program has moved it.
        let config = Config::builder().max_history_size(HISTORY_LINES)?.behavior(Behavior::PreferTerm);
        let mut editor = Editor::with_config(config.build())?;
        editor.set_helper(Some(Multiline));
        let mut terminal = Terminal { editor, history };
        terminal.keep_history(|editor, path| {
            path.parent().map_or(Ok(()), std::fs::create_dir_all)?;
            match editor.load_history(path) {
                Err(ReadlineError::Io(error)) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                loaded => loaded,
            }
        });
        Ok(Self::Terminal(Box::new(terminal)))
    }

    /// The next input.
    ///
    /// # Errors
    /// If it can't be read, or a script ends within a message.
    pub fn next(&mut self) -> anyhow::Result<Next> {
        let mut lines = String::new();
        loop {
            match self {
                Self::Terminal(terminal) => match terminal.editor.readline("> ") {
                    Ok(line) => lines.push_str(&line),
                    Err(ReadlineError::Interrupted) => return Ok(Next::Interrupted),
                    Err(ReadlineError::Eof) => return Ok(Next::End),
                    Err(ReadlineError::Io(error)) if error.kind() == io::ErrorKind::InvalidData => {
                        return Ok(Next::NoText);
                    }
                    Err(error) => return Err(error).context("cannot read from the terminal"),
                },
                Self::Script(stdin) => match stdin.next() {
                    Some(line) => match String::from_utf8(line.context("cannot read from stdin")?) {
                        Ok(line) => lines.push_str(line.strip_suffix('\r').unwrap_or(&line)),
                        Err(_) => return Ok(Next::NoText),
                    },
                    None if lines.is_empty() => return Ok(Next::End),
                    None => {
                        bail!("stdin ends within a message: after a backslash, or before the second {QUOTES}")
                    }
                },
            }
            if let Some(input) = Input::parse(&lines) {
                if let Self::Terminal(terminal) = self {
                    terminal.remember(&lines);
                }
                return Ok(Next::Input(input));
            }
            lines.push('\n');
        }
    }
}

impl Terminal {
    fn remember(&mut self, lines: &str) {
        self.keep_history(|editor, path| {
            if editor.add_history_entry(lines)? {
                editor.append_history(path)?;
            }
            Ok(())
        });
    }

    /// Does this with the history's file. A conversation goes on without one.
    fn keep_history(
        &mut self,
        action: impl FnOnce(&mut Editor<Multiline, FileHistory>, &PathBuf) -> rustyline::Result<()>,
    ) {
        let Some(path) = &self.history else { return };
        if let Err(error) = action(&mut self.editor, path) {
            output::warning(format_args!(
                "the history of lines can't be kept in {}: {error}",
                path.display()
            ));
            self.history = None;
        }
    }
}

/// Enter ends an input only where no more lines belong to it.
struct Multiline;

impl Validator for Multiline {
    fn validate(&self, context: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        Ok(match Input::parse(context.input()) {
            Some(_) => ValidationResult::Valid(None),
            None => ValidationResult::Incomplete,
        })
    }
}

impl Completer for Multiline {
    type Candidate = String;
}

impl Hinter for Multiline {
    type Hint = String;
}

impl Highlighter for Multiline {}

impl Helper for Multiline {}

#[cfg(test)]
mod tests {
    use super::Input;

    #[test]
    fn lines_that_belong_together() {
        let message = |text: &str| Some(Input::Message(text.to_owned()));
        let command = |text: &str| Some(Input::Command(text.to_owned()));
        for (lines, expected) in [
            ("Hello", message("Hello")),
            ("  Hello ", message("Hello")),
            ("", message("")),
            // What was pasted.
            ("one\ntwo", message("one\ntwo")),
            ("one\\", None),
            ("one\\\ntwo", message("one\ntwo")),
            ("one\\\ntwo\\", None),
            (r#"""""#, None),
            ("\"\"\"one\n  two\\", None),
            ("\"\"\"\n  one\\\n/two\n\"\"\"", message("  one\\\n/two")),
            (" \"\"\"one\ntwo\"\"\" ", message("one\ntwo")),
            (r#""""one""""#, message("one")),
            (r#"say """"#, message(r#"say """"#)),
            ("/undo ", command("/undo")),
            ("/system one\\", None),
            ("/system one\\\ntwo", command("/system one\ntwo")),
            (" /etc is a directory", message("/etc is a directory")),
        ] {
            assert_eq!(Input::parse(lines), expected, "{lines:?}");
        }
    }
}
