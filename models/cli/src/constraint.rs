//! The flags that give an answer a form.

use std::path::PathBuf;

use bitnet_burn_engine::Constraint;
use clap::Args;

use crate::args::read_text;

/// The form of the answer.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub struct ConstraintArgs {
    /// Answer with JSON that is valid by the schema in this file (- for stdin)
    #[arg(long, value_name = "FILE", help_heading = "Form of the answer")]
    json_schema: Option<PathBuf>,
    /// Answer with a text that this regular expression matches as a whole
    #[arg(long, value_name = "REGEX", help_heading = "Form of the answer")]
    regex: Option<String>,
    /// Answer with this text, or with that of another --choice
    #[arg(long, value_name = "TEXT", help_heading = "Form of the answer")]
    choice: Vec<String>,
    /// Answer with a text of the grammar in this file, in the Lark syntax of llguidance (- for stdin)
    #[arg(long, value_name = "FILE", help_heading = "Form of the answer")]
    grammar: Option<PathBuf>,
}

impl ConstraintArgs {
    /// The constraint, if a flag asks for one.
    pub fn constraint(&self) -> anyhow::Result<Option<Constraint>> {
        Ok(match self {
            Self { json_schema: Some(path), .. } => Some(Constraint::JsonSchema(read_text(path)?)),
            Self { grammar: Some(path), .. } => Some(Constraint::Grammar(read_text(path)?)),
            Self { regex: Some(regex), .. } => Some(Constraint::Regex(regex.clone())),
            Self { choice, .. } if !choice.is_empty() => Some(Constraint::Choice(choice.clone())),
            _ => None,
        })
    }
}
