//! The types and the texts of a vocabulary's tokens.

use std::collections::HashMap;

use super::VocabularyError as Error;
use crate::checkpoint::{GgufTokenizer, end_of_generation};

/// `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Type {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Byte,
}

impl Type {
    pub(super) fn new(number: i32) -> Self {
        match number {
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            6 => Self::Byte,
            // 1 is normal; 0 (undefined) and 5 (unused) are encoded like that.
            _ => Self::Normal,
        }
    }

    /// Recognised in a text before anything else is done to it.
    pub(super) fn is_recognised(self) -> bool {
        matches!(self, Self::Unknown | Self::Control | Self::UserDefined)
    }

    /// Left out of a text on request.
    pub(super) fn is_special(self) -> bool {
        matches!(self, Self::Unknown | Self::Control)
    }
}

/// The types of all tokens by id. Tokens that are known to end a turn are control tokens whatever the file
/// says, as in llama.cpp.
pub(super) fn types(keys: &GgufTokenizer) -> Vec<Type> {
    let stated = |id: usize| Type::new(keys.token_types.get(id).copied().unwrap_or(1));
    let of = |(id, token): (usize, &String)| match stated(id) {
        Type::Normal if end_of_generation(token).is_some() => Type::Control,
        kind => kind,
    };
    keys.tokens.iter().enumerate().map(of).collect()
}

/// Texts to ids, where each text must be there once only. Empty ones are left out.
pub(super) fn ids_by_text<'a>(
    tokens: impl Iterator<Item = (u32, &'a String)>,
) -> Result<HashMap<String, u32>, Error> {
    let mut ids = HashMap::new();
    for (id, token) in tokens.filter(|(_, token)| !token.is_empty()) {
        if let Some(first) = ids.insert(token.clone(), id) {
            return Err(Error::Duplicate { token: token.clone(), first, second: id });
        }
    }
    Ok(ids)
}
