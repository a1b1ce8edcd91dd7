//! Where a model's tokenizer is.

use std::path::PathBuf;

/// Tokens that end a turn or a text in the vocabularies of published models, the end of a turn first.
/// llama.cpp knows them by these texts too, because files often name only one of theirs.
pub(crate) const END_OF_GENERATION: [&str; 15] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<｜end▁of▁sentence｜>",
    "[EOS]",
    "<eos>",
    "</s>",
];

/// The place of a token's text among those that end a turn or a text; `None` for all others.
pub(crate) fn end_of_generation(text: &str) -> Option<usize> {
    // Asked of every token of a vocabulary.
    let is_possible = matches!(text.as_bytes().first(), Some(b'<' | b'[' | b'_'));
    END_OF_GENERATION.iter().position(|end| is_possible && *end == text)
}

/// Where the tokenizer is; reading it is the tokenizer's business.
#[derive(Clone, Debug)]
pub enum TokenizerSource {
    /// Inside the GGUF file.
    Gguf(Box<GgufTokenizer>),
    /// `tokenizer.json` and its companions in this directory.
    Hf {
        /// The model's directory.
        dir: PathBuf,
    },
}

/// The `tokenizer.*` keys of a GGUF file as they stand there; an absent key is `None` or empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufTokenizer {
    /// The file, for messages.
    pub path: PathBuf,
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE), `llama` (SentencePiece) ...
    pub model: Option<String>,
    /// The pre-tokenizer: [`OpenOptions::pre`](super::OpenOptions::pre), else `tokenizer.ggml.pre`.
    pub pre: Option<String>,
    /// Token texts by id.
    pub tokens: Vec<String>,
    /// Scores by id (SentencePiece); as long as `tokens`, or empty.
    pub scores: Vec<f32>,
    /// Token types by id: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte; as long as
    /// `tokens`, or empty.
    pub token_types: Vec<i32>,
    /// BPE merges in order of rank, the two parts separated by a space.
    pub merges: Vec<String>,
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `eos_token_id`.
    pub eos: Option<u32>,
    /// `eot_token_id`.
    pub eot: Option<u32>,
    /// `unknown_token_id`.
    pub unk: Option<u32>,
    /// `padding_token_id`.
    pub pad: Option<u32>,
    /// `seperator_token_id` (spelt so in the format).
    pub sep: Option<u32>,
    /// `add_bos_token`.
    pub add_bos: Option<bool>,
    /// `add_eos_token`.
    pub add_eos: Option<bool>,
    /// `add_space_prefix`.
    pub add_space_prefix: Option<bool>,
    /// `remove_extra_whitespaces`.
    pub remove_extra_whitespaces: Option<bool>,
    /// `tokenizer.chat_template`: Jinja.
    pub chat_template: Option<String>,
    /// `tokenizer.huggingface.json`: the model's own `tokenizer.json`.
    pub tokenizer_json: Option<String>,
}

impl GgufTokenizer {
    /// Whether the file has none: no `tokenizer.ggml.model`, or one that says so.
    pub fn is_empty(&self) -> bool {
        matches!(self.model.as_deref(), None | Some("no_vocab" | "none"))
    }
}
