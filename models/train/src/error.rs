//! What can go wrong in training.

use std::path::{Path, PathBuf};

use bitnet_burn::ForwardError;
use bitnet_burn_engine::adapter::AdapterError;
use bitnet_burn_engine::checkpoint::LoadError;
use bitnet_burn_engine::hf::HfWriteError;

/// Why training did not start, or ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The operating system refused.
    #[error("{}: cannot {action}: {error}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// The system's answer.
        error: std::io::Error,
    },
    /// A key or value that a run can't have.
    #[error("{place}: {problem}")]
    Config {
        /// The file, the key or the assignment.
        place: String,
        /// What is wrong.
        problem: String,
    },
    /// A file of text.
    #[error("{}: {problem}", path.display())]
    Text {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        problem: String,
    },
    /// The tokenizer.
    #[error("the tokenizer: {problem}")]
    Tokenizer {
        /// What is wrong.
        problem: String,
    },
    /// A conversation.
    #[error("conversation {number}: {problem}")]
    Conversation {
        /// Which one, from 1.
        number: usize,
        /// What is wrong.
        problem: String,
    },
    /// Too little text.
    #[error("{problem}")]
    TooLittle {
        /// How much there is, and how much is needed.
        problem: String,
    },
    /// The directory of the run.
    #[error("{}: {problem}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A checkpoint that can't be continued from.
    #[error("{}: {problem}", path.display())]
    Checkpoint {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A checkpoint that could not be written.
    #[error("the checkpoint was not written: {0}")]
    Write(#[from] HfWriteError),
    /// An adapter.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// A model to begin with or to learn from.
    #[error("{}: {problem}", path.display())]
    Model {
        /// The model.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A model's files.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The loss is no longer a number.
    #[error(
        "step {step}: the loss is {loss}: training has diverged; {}start again with a lower `optimizer.learning_rate` \
         (it is {learning_rate:e})",
        last_good(checkpoint.as_deref())
    )]
    Diverged {
        /// The step.
        step: u64,
        /// The loss.
        loss: f32,
        /// The learning rate of the step.
        learning_rate: f64,
        /// The newest checkpoint before it.
        checkpoint: Option<PathBuf>,
    },
    /// The forward pass.
    #[error(transparent)]
    Forward(#[from] ForwardError),
}

impl TrainError {
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |error| Self::Io { path: path.to_owned(), action, error }
    }
}

fn last_good(checkpoint: Option<&Path>) -> String {
    match checkpoint {
        Some(path) => format!("the last good checkpoint is {}; resume from it, or ", path.display()),
        None => "there is no checkpoint yet; ".into(),
    }
}
