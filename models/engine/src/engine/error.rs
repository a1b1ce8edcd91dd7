//! What can go wrong with an engine.

use bitnet_burn::{CacheError, ForwardError};
use bitnet_burn_backends::manager;

use crate::adapter::AdapterError;
use crate::chat::ChatError;
use crate::checkpoint::LoadError;
use crate::device::DeviceError;
use crate::generate::GenerateError;
use crate::load::{HeadMode, ModelError};
use crate::plan::PlanError;
use crate::plausible::FigureError;
use crate::text::{count, human_bytes};
use crate::tokenizer::TokenizerError;

/// Why an engine did not open, or could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The model's files.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The adapter.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The kernels.
    #[error(transparent)]
    Kernels(Box<manager::SetupError>),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The KV cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The generation.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// The chat template.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// A figure that can't be right.
    #[error(transparent)]
    Figure(#[from] FigureError),
    /// Text for a model without a tokenizer.
    #[error("the model has no tokenizer: give token ids instead of text")]
    NoTokenizer,
    /// A larger context than the model's.
    #[error("a context of {asked} positions was asked for: the model was trained for {trained}")]
    Context {
        /// Positions asked for.
        asked: usize,
        /// Positions of the model.
        trained: usize,
    },
    /// A prompt that does not fit.
    #[error(
        "the prompt has {tokens} tokens, the context {context}: shorten the prompt, or open with a larger context"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Positions of the context.
        context: usize,
    },
    /// A text that has no embedding.
    #[error("text {}: {problem}", index + 1)]
    Text {
        /// Which one, from 0.
        index: usize,
        /// Why.
        problem: String,
    },
    /// A prompt that the model's files do not have.
    #[error("the model's files have no prompt named {name:?}; they have: {known}")]
    NoSuchPrompt {
        /// The name asked for.
        name: String,
        /// The names that there are.
        known: String,
    },
    /// A mean without the prompt's tokens.
    #[error(
        "the model's files take the mean without the tokens of the prompt (`include_prompt` in 1_Pooling/config.json), which \
         is not computed: embed without a prompt, or pool the last token"
    )]
    PromptInMean,
    /// An output projection with int8 activations in a model whose activations are floats.
    #[error("the output projection can't quantise activations ({head:?}) where the others are not quantised")]
    HeadOfFloats {
        /// How the output projection was to be computed.
        head: HeadMode,
    },
    /// Layers on a GPU that can't be there.
    #[error("{layers} layers on the GPU: {problem}")]
    GpuLayers {
        /// Layers asked for.
        layers: usize,
        /// Why not.
        problem: String,
    },
    /// A draft model with other tokens.
    #[error(
        "the draft model has another tokenizer: token {id} is {model:?} in the model, and {draft:?} in the draft model; it \
         must have the same tokens"
    )]
    DraftTokenizer {
        /// The first token that differs.
        id: u32,
        /// Its text in the model.
        model: String,
        /// Its text in the draft model.
        draft: String,
    },
    /// Tokens that can't be compared.
    #[error(
        "a draft model must have the model's tokens, and the {of} has no tokenizer that says which they are"
    )]
    DraftNoTokenizer {
        /// Which of the two.
        of: &'static str,
    },
    /// A draft model for a GPU.
    #[error(
        "a draft model works on the CPU alone: on a GPU, rows that are computed together may differ from single ones, and \
         so might the tokens"
    )]
    DraftDevice,
    /// The operating system gave no thread.
    #[error("the system gives the program no thread: {error}")]
    Thread {
        /// What the system said.
        error: std::io::Error,
    },
    /// A plan that can't be followed, in strict mode.
    #[error("strict mode (no-fallback): the plan can't be followed")]
    StrictPlan(#[source] DeviceError),
    /// More sequences than there is memory for.
    #[error(
        "there is memory for {} of {positions} positions beside the model, of {} each, and {asked} were asked for: a KV \
         cache of f16 or int8 takes less, and so do fewer positions",
        count(*.room, "sequence"), human_bytes(*.bytes)
    )]
    NoRoom {
        /// Sequences asked for.
        asked: usize,
        /// Sequences that there is memory for.
        room: u64,
        /// Positions of each.
        positions: usize,
        /// Bytes of each.
        bytes: u64,
    },
}

impl From<ForwardError> for EngineError {
    fn from(error: ForwardError) -> Self {
        GenerateError::from(error).into()
    }
}

impl From<manager::SetupError> for EngineError {
    fn from(error: manager::SetupError) -> Self {
        Self::Kernels(Box::new(error))
    }
}
