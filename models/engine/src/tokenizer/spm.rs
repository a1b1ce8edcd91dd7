//! SentencePiece's BPE by scores (Kudo and Richardson, arXiv 1808.06226; `bpe_model.cc` of its code), which
//! the LLaMA 1 and 2 vocabularies were made with.
//!
//! The text's spaces become U+2581, one is put in front, and then, beginning with characters, the two
//! neighbours whose concatenation is the token with the highest score are joined, the leftmost of equals
//! first, until no two neighbours make a token. A character without a token becomes its UTF-8 bytes, each
//! the token `<0xXX>`.
//!
//! This is not the merge list of the other BPE: any two neighbours that make a token may be joined. It is
//! short, so it stands here instead of a merge list derived for the library, which would differ in ties.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use super::decode::byte_token;
use super::vocabulary::{Type, ids_by_text};
use super::{TokenizerError, VocabularyError};

/// What stands for a space in the vocabulary.
pub(super) const SPACE: &str = "\u{2581}";

pub(super) struct SentencePiece {
    tokens: Vec<String>,
    scores: Vec<f32>,
    /// The tokens that text can be joined to.
    joinable: HashMap<String, u32>,
    /// Those that are recognised in a text first: by their first byte, the longest first.
    recognised: HashMap<u8, Vec<u32>>,
    bytes: [Option<u32>; 256],
    unk: Option<u32>,
    add_space: bool,
}

/// A piece of the text, in a list from left to right.
struct Symbol {
    start: usize,
    /// Equal to `start` once it was joined to its left neighbour.
    end: usize,
    left: Option<usize>,
    right: Option<usize>,
}

/// Two neighbours that could be joined, and how long they were together when that was found.
#[derive(PartialEq)]
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    len: usize,
}

impl Eq for Pair {}

impl Ord for Pair {
    /// The highest score first, then the leftmost.
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl SentencePiece {
    pub(super) fn new(
        tokens: &[String],
        scores: &[f32],
        types: &[Type],
        unk: Option<u32>,
        add_space: bool,
    ) -> Result<Self, VocabularyError> {
        if let Some(id) = scores.iter().position(|score| score.is_nan()) {
            return Err(VocabularyError::Score { id, token: tokens[id].clone() });
        }
        // Over all of them, so that no text has two ids.
        let mut joinable = ids_by_text((0u32..).zip(tokens))?;
        let mut recognised: HashMap<u8, Vec<u32>> = HashMap::new();
        let mut bytes = [None; 256];
        for (id, (token, &kind)) in (0u32..).zip(tokens.iter().zip(types)) {
            if let (Type::Byte, Some(byte)) = (kind, byte_token(token)) {
                bytes[usize::from(byte)] = Some(id);
            }
            if kind != Type::Normal {
                joinable.remove(token);
            }
            if let (true, Some(&first)) = (kind.is_recognised(), token.as_bytes().first()) {
                recognised.entry(first).or_default().push(id);
            }
        }
        for ids in recognised.values_mut() {
            ids.sort_by_key(|&id| std::cmp::Reverse(tokens[id as usize].len()));
        }
        // -0 and 0 are the same score.
        let scores = scores.iter().map(|score| score + 0.0).collect();
        Ok(Self { tokens: tokens.to_vec(), scores, joinable, recognised, bytes, unk, add_space })
    }

    pub(super) fn token(&self, id: u32) -> Option<&str> {
        self.tokens.get(id as usize).map(String::as_str)
    }

    pub(super) fn id(&self, token: &str) -> Option<u32> {
        self.joinable.get(token).copied().or_else(|| {
            let place = self.tokens.iter().position(|t| t == token && !t.is_empty());
            place.map(|id| id as u32)
        })
    }

    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        let mut start = 0;
        let mut at = 0;
        while at < text.len() {
            match self.recognise(&text[at..]) {
                Some(id) => {
                    self.encode_plain(&text[start..at], ids)?;
                    ids.push(id);
                    at += self.tokens[id as usize].len();
                    start = at;
                }
                None => at += text[at..].chars().next().map_or(1, char::len_utf8),
            }
        }
        self.encode_plain(&text[start..], ids)
    }

    /// Whether this is a token that is recognised in a text.
    pub(super) fn is_recognised(&self, token: &str) -> bool {
        self.recognise(token).is_some_and(|id| self.tokens[id as usize] == token)
    }

    /// The longest recognised token that the text begins with.
    fn recognise(&self, text: &str) -> Option<u32> {
        let ids = self.recognised.get(text.as_bytes().first()?)?;
        ids.iter().copied().find(|&id| text.starts_with(&self.tokens[id as usize]))
    }

    /// A text without recognised tokens, at the beginning or after one: LLaMA's reference tokenizers and
    /// llama.cpp put the space in front of each such piece.
    fn encode_plain(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        if text.is_empty() {
            return Ok(());
        }
        let prefix = if self.add_space { SPACE } else { "" };
        let text = format!("{prefix}{}", text.replace(' ', SPACE));

        let mut symbols: Vec<Symbol> = Vec::new();
        for (i, (start, c)) in text.char_indices().enumerate() {
            let right = (start + c.len_utf8() < text.len()).then_some(i + 1);
            symbols.push(Symbol { start, end: start + c.len_utf8(), left: i.checked_sub(1), right });
        }
        let mut pairs = BinaryHeap::new();
        for right in 1..symbols.len() {
            self.consider(&text, &symbols, Some(right - 1), Some(right), &mut pairs);
        }
        while let Some(Pair { left, right, len, .. }) = pairs.pop() {
            let (start, end) = (symbols[left].start, symbols[right].end);
            let gone = |s: &Symbol| s.start == s.end;
            // Both only ever grow or go, so the same length means that neither changed.
            if gone(&symbols[left]) || gone(&symbols[right]) || end.wrapping_sub(start) != len {
                continue;
            }
            symbols[left].end = end;
            symbols[right].end = symbols[right].start;
            let next = symbols[right].right;
            symbols[left].right = next;
            if let Some(next) = next {
                symbols[next].left = Some(left);
            }
            self.consider(&text, &symbols, symbols[left].left, Some(left), &mut pairs);
            self.consider(&text, &symbols, Some(left), next, &mut pairs);
        }

        let mut unknown_before = false;
        let mut at = Some(0);
        while let Some(symbol) = at.and_then(|i| symbols.get(i)) {
            let piece = &text[symbol.start..symbol.end];
            let unknown = !self.push_piece(piece, ids)?;
            if unknown {
                // SentencePiece makes one unknown token of a run of them.
                match self.unk {
                    Some(unk) if !unknown_before => ids.push(unk),
                    Some(_) => {}
                    None => return Err(TokenizerError::Unencodable(piece.to_owned())),
                }
            }
            unknown_before = unknown;
            at = symbol.right;
        }
        Ok(())
    }

    /// Whether there is a token for the piece, or one for each of its bytes.
    fn push_piece(&self, piece: &str, ids: &mut Vec<u32>) -> Result<bool, TokenizerError> {
        if let Some(&id) = self.joinable.get(piece) {
            ids.push(id);
            return Ok(true);
        }
        let bytes: Option<Vec<u32>> = piece.bytes().map(|byte| self.bytes[usize::from(byte)]).collect();
        Ok(bytes.map(|bytes| ids.extend(bytes)).is_some())
    }

    /// Adds the pair if it makes a token.
    fn consider(
        &self,
        text: &str,
        symbols: &[Symbol],
        left: Option<usize>,
        right: Option<usize>,
        pairs: &mut BinaryHeap<Pair>,
    ) {
        let (Some(left), Some(right)) = (left, right) else { return };
        let joined = &text[symbols[left].start..symbols[right].end];
        if let Some(&id) = self.joinable.get(joined) {
            pairs.push(Pair { score: self.scores[id as usize], left, right, len: joined.len() });
        }
    }
}
