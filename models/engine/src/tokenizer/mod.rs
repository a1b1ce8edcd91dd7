//! Text to token ids and back.
//!
//! | source | encoding |
//! | --- | --- |
//! | `tokenizer.json` of a Hugging Face directory | the `tokenizers` crate, as the file says |
//! | GGUF, `tokenizer.ggml.model = gpt2` | the crate's byte-level BPE, with the pre-tokenizer that the file names |
//! | GGUF, `tokenizer.ggml.model = llama` | SentencePiece's BPE by scores, written out here |
//!
//! Special tokens in a text are recognised as such, in a chat template's output as in a user's text: whoever
//! must not let users write them checks before.
//!
//! Decoding is the same code in one go and token by token, so a stream is what `decode` returns, cut into
//! pieces that are whole characters.

mod decode;
mod error;
mod gguf;
mod hf;
mod pre;
mod spm;
pub mod translate;
mod vocabulary;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

pub use decode::DecodeStream;
pub use error::{TokenizerError, VocabularyError};
pub use translate::TranslateError;

use crate::checkpoint::TokenizerSource;
use decode::Decoder;

/// A tokenizer; see the [module](self).
///
/// ```no_run
/// # use bitnet_burn_engine::{checkpoint::TokenizerSource, tokenizer::Tokenizer};
/// let source = TokenizerSource::Hf { dir: "models/bitnet-b1.58-2B-4T".into() };
/// let tokenizer = Tokenizer::from_source(&source, 128_256)?;
/// let ids = tokenizer.encode("Hello, world!", true)?;
/// assert_eq!(tokenizer.decode(&ids, true)?, "Hello, world!");
/// # Ok::<(), bitnet_burn_engine::tokenizer::TokenizerError>(())
/// ```
pub struct Tokenizer {
    encoder: Encoder,
    decoder: Decoder,
    vocab_size: usize,
    special: Special,
    /// What `encode` puts around a text, where that isn't the library's post-processor's business.
    ends: Ends,
    end_of_generation: Vec<u32>,
    chat_template: Option<String>,
    warnings: Vec<String>,
}

enum Encoder {
    Library(Box<tokenizers::Tokenizer>),
    SentencePiece(Box<spm::SentencePiece>),
}

/// The texts of the special tokens, as variables of a chat template; one that is `None` is undefined there.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct TemplateTokens {
    /// Begins a text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bos_token: Option<String>,
    /// Ends a text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eos_token: Option<String>,
    /// Stands for what the vocabulary lacks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unk_token: Option<String>,
    /// Fills up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pad_token: Option<String>,
}

/// The ids of the tokens with a role.
#[derive(Debug, Clone, Copy, Default)]
struct Special {
    bos: Option<u32>,
    eos: Option<u32>,
    unk: Option<u32>,
    pad: Option<u32>,
}

#[derive(Debug, Clone, Copy)]
enum Ends {
    /// `tokenizer.json` has a post-processor for that.
    Library,
    /// GGUF: `add_bos_token` and `add_eos_token`.
    Ids(Option<u32>, Option<u32>),
}

impl Tokenizer {
    /// Reads and builds the tokenizer of a checkpoint.
    ///
    /// # Arguments
    /// - `vocab_size`: the number of the model's tokens (rows of its embedding). Where the tokenizer has more
    ///   or fewer there is a [warning](Self::warnings); ids beyond the model's are never returned.
    ///
    /// # Errors
    /// [`TokenizerError::Invalid`] with the file and what is wrong with it.
    pub fn from_source(source: &TokenizerSource, vocab_size: usize) -> Result<Self, TokenizerError> {
        let (path, built): (&Path, _) = match source {
            TokenizerSource::Gguf(keys) => (&keys.path, gguf::build(keys, vocab_size)),
            TokenizerSource::Hf { dir } => (dir, hf::build(dir, vocab_size)),
        };
        let tokenizer =
            built.map_err(|problem| TokenizerError::Invalid { path: path.to_path_buf(), problem })?;
        for warning in &tokenizer.warnings {
            tracing::warn!("{}: {warning}", path.display());
        }
        Ok(tokenizer)
    }

    /// The ids of a text.
    ///
    /// # Arguments
    /// - `add_special`: put the tokens around it that the model expects at the ends of a text (usually BOS in
    ///   front). Not for the output of a chat template, which has them already.
    ///
    /// # Errors
    /// If the vocabulary can't express the text, or needs a token for it that the model does not have.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::new();
        if let (true, Ends::Ids(Some(bos), _)) = (add_special, self.ends) {
            ids.push(bos);
        }
        match &self.encoder {
            Encoder::SentencePiece(spm) => spm.encode(text, &mut ids)?,
            Encoder::Library(library) => {
                let post_process = add_special && matches!(self.ends, Ends::Library);
                let encoding = guarded(|| library.encode_fast(text, post_process));
                ids.extend_from_slice(encoding.map_err(TokenizerError::Library)?.get_ids());
            }
        }
        if let (true, Ends::Ids(_, Some(eos))) = (add_special, self.ends) {
            ids.push(eos);
        }
        match ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            None => Ok(ids),
            Some(&id) => {
                let token = self.token(id).unwrap_or_default();
                Err(TokenizerError::BeyondModel { id, token, vocab_size: self.vocab_size })
            }
        }
    }

    /// The text of these ids. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Arguments
    /// - `skip_special`: leave out special tokens (BOS, end of turn ...) instead of writing their names
    ///
    /// # Errors
    /// [`TokenizerError::UnknownId`] for an id that the model does not have.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        if let Decoder::Library = self.decoder {
            self.check(ids)?;
            return self.library_decode(ids, skip_special);
        }
        let mut stream = self.decode_stream(skip_special);
        let mut text = String::new();
        for &id in ids {
            stream.push_into(id, &mut text)?;
        }
        stream.flush_into(&mut text)?;
        Ok(text)
    }

    /// Decodes token by token. What comes out adds up to [`decode`](Self::decode) of all of them.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special)
    }

    /// Decodes token by token, as the continuation of `context` (a prompt), whose text does not come out
    /// again. It matters where the first word of a text has no space in front of it (SentencePiece).
    ///
    /// # Errors
    /// [`TokenizerError::UnknownId`] for an id of the context that the model does not have.
    pub fn decode_stream_after(
        &self,
        context: &[u32],
        skip_special: bool,
    ) -> Result<DecodeStream<'_>, TokenizerError> {
        let mut stream = DecodeStream::new(self, skip_special);
        stream.prime(context)?;
        Ok(stream)
    }

    /// The token's text as it stands in the vocabulary (`Ġworld`, `▁world`, `<0x0A>`).
    pub fn token(&self, id: u32) -> Option<String> {
        match &self.encoder {
            Encoder::Library(library) => library.id_to_token(id),
            Encoder::SentencePiece(spm) => spm.token(id).map(str::to_owned),
        }
    }

    /// The id of the token with this text in the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        match &self.encoder {
            Encoder::Library(library) => library.token_to_id(token),
            Encoder::SentencePiece(spm) => spm.id(token),
        }
    }

    /// The token at the beginning of a text.
    pub fn bos(&self) -> Option<u32> {
        self.special.bos
    }

    /// The token at the end of a text that the file names. Generation ends at any of
    /// [`end_of_generation`](Self::end_of_generation).
    pub fn eos(&self) -> Option<u32> {
        self.special.eos
    }

    /// All tokens at which generation ends, ascending: the end of text, of a turn, of a message. Where a
    /// vocabulary has a well-known one of them, generation ends there, whether or not the file names it.
    pub fn end_of_generation(&self) -> &[u32] {
        &self.end_of_generation
    }

    /// The bytes that each token stands for in a text, by id; none for special tokens. `None` if the tokenizer's decoder
    /// is one in which tokens have no bytes of their own.
    pub(crate) fn token_bytes(&self) -> Option<Vec<Vec<u8>>> {
        match &self.decoder {
            Decoder::Pieces(pieces) => Some(pieces.texts(self.vocab_size)),
            Decoder::Library => None,
        }
    }

    /// The bytes that a token stands for; of a special token, its name's. They may be a part of a character. `None` for an id
    /// without a token, and if the tokenizer's decoder is one in which tokens have no bytes of their own.
    pub fn bytes(&self, id: u32) -> Option<&[u8]> {
        match &self.decoder {
            Decoder::Pieces(pieces) => pieces.get(id).map(|(bytes, _)| bytes),
            Decoder::Library => None,
        }
    }

    /// How many tokens the model has.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The chat template (Jinja) that came with the tokenizer.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// The texts of the special tokens, as chat templates want them.
    pub fn template_tokens(&self) -> TemplateTokens {
        let text = |id: Option<u32>| id.and_then(|id| self.token(id));
        TemplateTokens {
            bos_token: text(self.special.bos),
            eos_token: text(self.special.eos),
            unk_token: text(self.special.unk),
            pad_token: text(self.special.pad),
        }
    }

    /// What was odd about the files, in words; also logged while loading.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn check(&self, ids: &[u32]) -> Result<(), TokenizerError> {
        match ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            None => Ok(()),
            Some(&id) => Err(TokenizerError::UnknownId { id, vocab_size: self.vocab_size }),
        }
    }

    fn library_decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        match &self.encoder {
            Encoder::Library(library) => {
                guarded(|| library.decode(ids, skip_special)).map_err(TokenizerError::Library)
            }
            Encoder::SentencePiece(_) => Err(TokenizerError::Library("there is none to decode with".into())),
        }
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size)
            .field("special", &self.special)
            .field("end_of_generation", &self.end_of_generation)
            .finish_non_exhaustive()
    }
}

/// Calls the tokenizer library. It panics on some malformed files and texts; here that is an error like
/// any other.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.to_string()),
        Err(panic) => {
            let message = panic.downcast_ref::<&str>().map(|s| s.to_string());
            Err(message.or_else(|| panic.downcast_ref().cloned()).unwrap_or_else(|| "it panicked".into()))
        }
    }
}

/// A warning where the tokenizer and the model differ in size.
fn size_warning(tokens: usize, vocab_size: usize) -> Option<String> {
    (tokens > vocab_size).then(|| {
        format!("the tokenizer has {tokens} tokens, the model {vocab_size}: a text that needs the others is refused")
    })
}

#[cfg(test)]
mod tests;
