//! Token ids to text, in one go or token by token.
//!
//! A token stands for bytes, not for characters: a character may be spread over several tokens. So every
//! token's bytes are looked up in one table, which is made when the tokenizer is loaded, and put through an
//! incremental UTF-8 decoder, which lets only whole characters through.

use super::{Tokenizer, TokenizerError};

/// How ids become text.
pub(super) enum Decoder {
    /// By the table.
    Pieces(Pieces),
    /// By the decoder of a `tokenizer.json` that the table can't express, over all ids again and again.
    Library,
}

/// What a token is to the decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    /// Left out on request.
    Special,
    /// One byte of a character (SentencePiece's byte fallback).
    Byte,
}

/// The bytes of every token, by id.
pub(super) struct Pieces {
    bytes: Vec<u8>,
    /// `bytes[..ends[id]]` ends with the token's; its own begin where those of the one before end.
    ends: Vec<usize>,
    kinds: Vec<Kind>,
    /// The encoder puts a space in front of the first word, and the decoder takes it away.
    strip_space: bool,
    malformed: Malformed,
}

/// How many U+FFFD stand for malformed UTF-8.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Malformed {
    /// One for the longest beginning of a character, as Unicode recommends and the standard library does.
    Longest,
    /// One for each byte, as SentencePiece does.
    Byte,
}

impl Pieces {
    pub(super) fn new(strip_space: bool, malformed: Malformed) -> Self {
        Self { bytes: Vec::new(), ends: Vec::new(), kinds: Vec::new(), strip_space, malformed }
    }

    /// The next id's token.
    pub(super) fn push(&mut self, bytes: &[u8], kind: Kind) {
        self.bytes.extend_from_slice(bytes);
        self.ends.push(self.bytes.len());
        self.kinds.push(kind);
    }

    /// The next id's token, whose characters stand for bytes as in GPT-2, if all of them do; otherwise they
    /// stand for themselves (a token that was added to the vocabulary later).
    pub(super) fn push_byte_level(&mut self, token: &str, kind: Kind) {
        let start = self.bytes.len();
        for c in token.chars() {
            match byte_level(c) {
                Some(byte) => self.bytes.push(byte),
                None => {
                    self.bytes.truncate(start);
                    return self.push(token.as_bytes(), kind);
                }
            }
        }
        self.push(&[], kind);
    }

    /// The bytes of each of the first `count` ids' tokens; none for special tokens, and for ids without a token.
    pub(super) fn texts(&self, count: usize) -> Vec<Vec<u8>> {
        let of = |id| match self.get(id) {
            Some((bytes, Kind::Normal | Kind::Byte)) => bytes.to_vec(),
            _ => Vec::new(),
        };
        (0..count as u32).map(of).collect()
    }

    /// A token's bytes, and what it is.
    pub(super) fn get(&self, id: u32) -> Option<(&[u8], Kind)> {
        let id = id as usize;
        let start = match id.checked_sub(1) {
            None => 0,
            Some(before) => *self.ends.get(before)?,
        };
        Some((self.bytes.get(start..*self.ends.get(id)?)?, *self.kinds.get(id)?))
    }
}

/// The byte that a character stands for in GPT-2's vocabulary (`bytes_to_unicode` of its `encoder.py`):
/// printable Latin-1 stands for itself, the other bytes are in order U+0100 and after.
fn byte_level(c: char) -> Option<u8> {
    match u32::from(c) {
        c @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(c as u8),
        c @ 0x100..=0x120 => Some((c - 0x100) as u8),
        c @ 0x121..=0x142 => Some((c - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// The byte of a token `<0xXX>`.
pub(super) fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let valid = digits.len() == 2 && digits.bytes().all(|d| d.is_ascii_hexdigit());
    if valid { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// Bytes in any pieces to whole characters.
struct Utf8 {
    malformed: Malformed,
    /// The beginning of a character, at most 3 bytes between calls.
    pending: Vec<u8>,
}

impl Utf8 {
    fn push(&mut self, bytes: &[u8], text: &mut String) {
        self.pending.extend_from_slice(bytes);
        let mut rest = &self.pending[..];
        loop {
            let (valid, malformed) = match std::str::from_utf8(rest) {
                Ok(valid) => (valid.len(), 0),
                Err(e) => (e.valid_up_to(), e.error_len().unwrap_or(0)),
            };
            // Nothing is lost in the second check of what the first found valid.
            text.push_str(std::str::from_utf8(&rest[..valid]).unwrap_or_default());
            rest = &rest[valid..];
            if malformed == 0 {
                break;
            }
            replace(self.malformed, malformed, text);
            rest = &rest[malformed..];
        }
        let done = self.pending.len() - rest.len();
        self.pending.drain(..done);
    }

    /// No more bytes follow.
    fn flush(&mut self, text: &mut String) {
        replace(self.malformed, self.pending.len(), text);
        self.pending.clear();
    }
}

fn replace(malformed: Malformed, bytes: usize, text: &mut String) {
    let n = if malformed == Malformed::Byte { bytes } else { bytes.min(1) };
    text.extend(std::iter::repeat_n('\u{fffd}', n));
}

/// Decodes token by token; from [`Tokenizer::decode_stream`].
///
/// What comes out is whole characters, and all of it together is what [`Tokenizer::decode`] makes of the
/// same ids.
pub struct DecodeStream<'t> {
    tokenizer: &'t Tokenizer,
    skip_special: bool,
    state: State,
}

enum State {
    Pieces {
        utf8: Utf8,
        /// Nothing has come out yet.
        at_start: bool,
    },
    Library {
        ids: Vec<u32>,
        /// How many bytes of their text came out.
        shown: usize,
    },
}

impl<'t> DecodeStream<'t> {
    pub(super) fn new(tokenizer: &'t Tokenizer, skip_special: bool) -> Self {
        let state = match &tokenizer.decoder {
            Decoder::Pieces(pieces) => {
                let utf8 = Utf8 { malformed: pieces.malformed, pending: Vec::new() };
                State::Pieces { utf8, at_start: true }
            }
            Decoder::Library => State::Library { ids: Vec::new(), shown: 0 },
        };
        Self { tokenizer, skip_special, state }
    }

    /// The next token. Returns the text that is certain now, if any.
    ///
    /// # Errors
    /// [`TokenizerError::UnknownId`] for an id that the model does not have.
    pub fn push(&mut self, id: u32) -> Result<Option<String>, TokenizerError> {
        let mut text = String::new();
        self.push_into(id, &mut text)?;
        Ok((!text.is_empty()).then_some(text))
    }

    /// No more tokens follow. Returns U+FFFD for a character that isn't complete, if there is one.
    ///
    /// # Errors
    /// If the tokenizer library fails, which it can only for a decoder that this crate does not know itself.
    pub fn flush(&mut self) -> Result<Option<String>, TokenizerError> {
        let mut text = String::new();
        self.flush_into(&mut text)?;
        Ok((!text.is_empty()).then_some(text))
    }

    pub(super) fn push_into(&mut self, id: u32, text: &mut String) -> Result<(), TokenizerError> {
        self.tokenizer.check(&[id])?;
        match (&mut self.state, &self.tokenizer.decoder) {
            (State::Pieces { utf8, at_start }, Decoder::Pieces(pieces)) => {
                // An id without a token (padding of the embedding) stands for nothing.
                let Some((mut bytes, kind)) = pieces.get(id) else { return Ok(()) };
                if bytes.is_empty() || (self.skip_special && kind == Kind::Special) {
                    return Ok(());
                }
                if *at_start && pieces.strip_space && kind == Kind::Normal {
                    bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
                }
                *at_start = false;
                utf8.push(bytes, text);
            }
            (State::Library { ids, shown }, _) => {
                ids.push(id);
                let all = self.tokenizer.library_decode(ids, self.skip_special)?;
                // U+FFFD at the end may be a character that isn't complete.
                let certain = all.trim_end_matches('\u{fffd}');
                if let Some(new) = certain.get(*shown..) {
                    text.push_str(new);
                    *shown = certain.len();
                }
            }
            (State::Pieces { .. }, Decoder::Library) => {}
        }
        Ok(())
    }

    pub(super) fn flush_into(&mut self, text: &mut String) -> Result<(), TokenizerError> {
        match &mut self.state {
            State::Pieces { utf8, .. } => utf8.flush(text),
            State::Library { ids, shown } => {
                let all = self.tokenizer.library_decode(ids, self.skip_special)?;
                text.push_str(all.get(*shown..).unwrap_or_default());
                *shown = all.len().max(*shown);
            }
        }
        Ok(())
    }

    /// Takes tokens whose text is not to come out.
    pub(super) fn prime(&mut self, context: &[u32]) -> Result<(), TokenizerError> {
        self.tokenizer.check(context)?;
        if let State::Library { ids, shown } = &mut self.state {
            ids.extend_from_slice(context);
            let all = self.tokenizer.library_decode(ids, self.skip_special)?;
            *shown = all.trim_end_matches('\u{fffd}').len();
            return Ok(());
        }
        let mut discarded = String::new();
        context.iter().try_for_each(|&id| self.push_into(id, &mut discarded))
    }
}

impl std::fmt::Debug for DecodeStream<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DecodeStream").field("skip_special", &self.skip_special).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode(malformed: Malformed, chunks: &[Vec<u8>]) -> String {
        let mut utf8 = Utf8 { malformed, pending: Vec::new() };
        let mut text = String::new();
        for chunk in chunks {
            utf8.push(chunk, &mut text);
            assert!(utf8.pending.len() < 4);
        }
        utf8.flush(&mut text);
        text
    }

    proptest! {
        #[test]
        fn streamed_utf8_is_lossy_utf8(chunks in prop::collection::vec(
            prop::collection::vec(prop_oneof![
                any::<u8>(),
                prop::sample::select("aß日😀".as_bytes().to_vec()),
            ], 0..4),
            0..30,
        )) {
            let all = chunks.concat();
            prop_assert_eq!(decode(Malformed::Longest, &chunks), String::from_utf8_lossy(&all));
            let by_byte: String = all.utf8_chunks().map(|c| {
                format!("{}{}", c.valid(), "\u{fffd}".repeat(c.invalid().len()))
            }).collect();
            prop_assert_eq!(decode(Malformed::Byte, &chunks), by_byte);
        }

        #[test]
        fn cut_text_comes_out_whole(text in "\\PC{0,20}", cut in 1usize..5) {
            let chunks: Vec<_> = text.as_bytes().chunks(cut).map(<[u8]>::to_vec).collect();
            prop_assert_eq!(decode(Malformed::Longest, &chunks), text);
        }
    }

    #[test]
    fn byte_level_characters_are_a_permutation_of_the_bytes() {
        let mut bytes: Vec<u8> = (0..0x200).filter_map(char::from_u32).filter_map(byte_level).collect();
        assert_eq!(bytes.len(), 256);
        bytes.sort_unstable();
        bytes.dedup();
        assert_eq!(bytes.len(), 256);
        assert_eq!(byte_level('Ġ'), Some(b' '));
        assert_eq!(byte_level('Ċ'), Some(b'\n'));
        assert_eq!(byte_level('ł'), Some(0xa0));
    }

    #[test]
    fn byte_tokens() {
        assert_eq!(byte_token("<0x0A>"), Some(10));
        assert_eq!(byte_token("<0xff>"), Some(255));
        for token in ["", "<0x>", "<0x0>", "<0x+1>", "<0x0G>", "<0x0A", "0x0A>", "<0x00A>", "<0xé>"] {
            assert_eq!(byte_token(token), None, "{token}");
        }
    }
}
