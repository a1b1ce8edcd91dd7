//! What can be wrong with a tokenizer, and with what it is given.

use super::pre;
use std::path::PathBuf;

/// Why there is no tokenizer, or why it can't convert what it was given.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The tokenizer's files or keys are missing or wrong.
    #[error("the tokenizer in {}: {problem}", path.display())]
    Invalid {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong.
        problem: VocabularyError,
    },
    /// A token id that the model does not have.
    #[error("token id {id} is not in the vocabulary of {vocab_size} tokens")]
    UnknownId {
        /// The id.
        id: u32,
        /// How many tokens the model has.
        vocab_size: usize,
    },
    /// A text needs a token that the tokenizer has and the model has not.
    #[error("the text needs token {id} ({token:?}), but the model has {vocab_size} tokens only")]
    BeyondModel {
        /// The token's id.
        id: u32,
        /// Its text.
        token: String,
        /// How many tokens the model has.
        vocab_size: usize,
    },
    /// The vocabulary has neither a token for a character, nor for its bytes, nor one for the unknown.
    #[error("the vocabulary has no token for {0:?}, none for its bytes and no unknown token")]
    Unencodable(String),
    /// The tokenizer library failed.
    #[error("the tokenizer failed: {0}")]
    Library(String),
}

/// Each way in which a tokenizer's files or keys can be wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VocabularyError {
    /// A file can't be read.
    #[error("{file} can't be read: {error}")]
    Read {
        /// The file's name.
        file: String,
        /// Why.
        error: std::io::Error,
    },
    /// A file is not the JSON that it should be.
    #[error("{file} is not valid: {message}")]
    Json {
        /// The file's name.
        file: String,
        /// Where and why.
        message: String,
    },
    /// The directory has no `tokenizer.json`.
    #[error("there is no tokenizer.json{}", if *.sentencepiece {
        " (tokenizer.model alone is not supported: transformers' AutoTokenizer.from_pretrained(...) \
         .save_pretrained(...) writes a tokenizer.json from it)"
    } else { "" })]
    NoTokenizerJson {
        /// There is a SentencePiece `tokenizer.model` instead.
        sentencepiece: bool,
    },
    /// A GGUF key is missing.
    #[error("the key {0} is missing or empty")]
    Missing(&'static str),
    /// A GGUF tokenizer model that isn't supported.
    #[error(
        "tokenizer.ggml.model is {0:?}; supported are \"gpt2\" (byte-level BPE) and \"llama\" (SentencePiece)"
    )]
    Model(String),
    /// The pre-tokenizer is not named and can't be told.
    #[error(
        "tokenizer.ggml.pre is missing, and a vocabulary of {tokens} tokens doesn't tell which pre-tokenizer \
         it was made with: --pre names it, one of {}",
        pre::names()
    )]
    MissingPre {
        /// The size of the vocabulary.
        tokens: usize,
    },
    /// A pre-tokenizer that isn't supported.
    #[error(
        "the pre-tokenizer (tokenizer.ggml.pre or --pre) is {pre:?}; supported are {}; {}",
        pre::names(),
        match same {
            Some(name) => format!("the file's tokenizer.huggingface.json has the expressions of {name}: pass --pre {name}"),
            None => "--pre names the one with the expressions of the model's tokenizer.json".into(),
        }
    )]
    UnknownPre {
        /// Its name.
        pre: String,
        /// The one that does the same, where the file tells.
        same: Option<&'static str>,
    },
    /// An array has another length than the vocabulary.
    #[error("{key} has {found} entries for {tokens} tokens")]
    Length {
        /// The key.
        key: &'static str,
        /// Its length.
        found: usize,
        /// The size of the vocabulary.
        tokens: usize,
    },
    /// Two ids have the same text.
    #[error("tokens {first} and {second} are both {token:?}")]
    Duplicate {
        /// The text.
        token: String,
        /// The lower id.
        first: u32,
        /// The higher id.
        second: u32,
    },
    /// A merge is not two tokens that make a third.
    #[error("merge {rank}, {merge:?}: {reason}")]
    Merge {
        /// Its place in `tokenizer.ggml.merges`.
        rank: usize,
        /// Its text.
        merge: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A score is NaN.
    #[error("the score of token {id} ({token:?}) is not a number")]
    Score {
        /// The token's id.
        id: usize,
        /// Its text.
        token: String,
    },
    /// A token of type 6 (byte) is not of the form `<0xXX>`.
    #[error("token {id} is of type byte, but {token:?} is not of the form <0xXX>")]
    Byte {
        /// The token's id.
        id: usize,
        /// Its text.
        token: String,
    },
    /// `add_bos_token` or `add_eos_token` is set and there is no such token.
    #[error("{flag} is true, but there is no {key}, or it isn't in the vocabulary")]
    NoEnd {
        /// The flag.
        flag: &'static str,
        /// The missing key.
        key: &'static str,
    },
    /// The tokenizer library refused the vocabulary.
    #[error("{0}")]
    Library(String),
}
