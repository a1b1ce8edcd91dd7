//! The tokenizer inside a GGUF file: the `tokenizer.ggml.*` keys.

use tokenizers::AddedToken;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, Vocab};

use super::VocabularyError as Error;
use super::decode::{Decoder, Kind, Malformed, Pieces, byte_token};
use super::pre::PreTokenizer;
use super::spm::SentencePiece;
use super::vocabulary::{Type, types};
use super::{Encoder, Ends, Special, Tokenizer, VocabularyError, guarded, pre, size_warning, translate};
use crate::checkpoint::{GgufTokenizer, end_of_generation};

/// The size of LLaMA 3's vocabulary, which BitNet b1.58 2B-4T shares: some of its files name no pre-tokenizer.
const LLAMA3_TOKENS: usize = 128_256;

pub(super) fn build(keys: &GgufTokenizer, vocab_size: usize) -> Result<Tokenizer, VocabularyError> {
    if keys.is_empty() {
        return Err(Error::Missing("tokenizer.ggml.model"));
    }
    let model = keys.model.as_deref().unwrap_or_default();
    let tokens = &keys.tokens;
    if tokens.is_empty() {
        return Err(Error::Missing("tokenizer.ggml.tokens"));
    }
    let lengths =
        [("tokenizer.ggml.token_type", keys.token_types.len()), ("tokenizer.ggml.scores", keys.scores.len())];
    for (key, found) in lengths {
        if found != 0 && found != tokens.len() {
            return Err(Error::Length { key, found, tokens: tokens.len() });
        }
    }
    let types = types(keys);
    for (id, token) in tokens.iter().enumerate() {
        if types[id] == Type::Byte && byte_token(token).is_none() {
            return Err(Error::Byte { id, token: token.clone() });
        }
    }

    let mut warnings: Vec<_> = size_warning(tokens.len(), vocab_size).into_iter().collect();
    let mut special_id = |key: &str, id: Option<u32>| {
        let valid = id.filter(|&id| (id as usize) < tokens.len().min(vocab_size));
        if let (Some(id), None) = (id, valid) {
            warnings.push(format!("tokenizer.ggml.{key} is {id}, which is not in the vocabulary: ignored"));
        }
        valid
    };
    let special = Special {
        bos: special_id("bos_token_id", keys.bos),
        eos: special_id("eos_token_id", keys.eos),
        unk: special_id("unknown_token_id", keys.unk),
        pad: special_id("padding_token_id", keys.pad),
    };
    let eot = special_id("eot_token_id", keys.eot);

    let (encoder, pieces, add_bos) = match model {
        "gpt2" => {
            let pre = pre_tokenizer(keys, &mut warnings)?;
            (byte_level_bpe(keys, &types, pre)?, byte_level_pieces(tokens, &types), pre.add_bos)
        }
        "llama" => {
            if keys.scores.is_empty() {
                return Err(Error::Missing("tokenizer.ggml.scores"));
            }
            let add_space = keys.add_space_prefix.unwrap_or(true);
            let spm = SentencePiece::new(tokens, &keys.scores, &types, special.unk, add_space)?;
            (Encoder::SentencePiece(Box::new(spm)), sentencepiece_pieces(tokens, &types, add_space), true)
        }
        other => return Err(Error::Model(other.to_owned())),
    };

    let bos = end(keys.add_bos, add_bos, special.bos, "tokenizer.ggml.add_bos_token", "bos_token_id")?;
    let eos = end(keys.add_eos, false, special.eos, "tokenizer.ggml.add_eos_token", "eos_token_id")?;
    let by_name = (0u32..).zip(tokens).filter(|(_, token)| end_of_generation(token).is_some());
    let mut end_of_generation: Vec<u32> = by_name.map(|(id, _)| id).collect();
    end_of_generation.extend(special.eos.into_iter().chain(eot));
    end_of_generation.retain(|&id| (id as usize) < vocab_size);
    end_of_generation.sort_unstable();
    end_of_generation.dedup();

    let mut tokenizer = Tokenizer {
        encoder,
        decoder: Decoder::Pieces(pieces),
        vocab_size,
        special,
        ends: Ends::Ids(bos, eos),
        end_of_generation,
        chat_template: keys.chat_template.clone(),
        warnings,
    };
    let warnings = [by_text(keys, &types), markers(keys, &types, &tokenizer)];
    tokenizer.warnings.extend(warnings.into_iter().flatten());
    Ok(tokenizer)
}

/// A warning about tokens that are taken as control tokens although the file says otherwise.
fn by_text(keys: &GgufTokenizer, types: &[Type]) -> Option<String> {
    let stated = |id: usize| Type::new(keys.token_types.get(id).copied().unwrap_or(1));
    let differs = |id: &usize| types[*id] != stated(*id);
    let found: Vec<_> = (0..types.len()).filter(differs).map(|id| format!("`{}`", keys.tokens[id])).collect();
    (!found.is_empty()).then(|| {
        format!(
            "{} not of type control in tokenizer.ggml.token_type; taken as such by the text: generation ends there",
            if found.len() == 1 { format!("{} is", found[0]) } else { format!("{} are", found.join(", ")) }
        )
    })
}

/// A warning about tokens that the chat template writes, and that a text with them is not encoded to: the
/// model was trained on the tokens, not on the pieces that their texts are cut into.
fn markers(keys: &GgufTokenizer, types: &[Type], tokenizer: &Tokenizer) -> Option<String> {
    let template = keys.chat_template.as_deref()?;
    let is_marker = |token: &str| match token.as_bytes() {
        [b'<', .., b'>'] | [b'[', .., b']'] => template.contains(token),
        _ => false,
    };
    let by_role = [("bos_token", keys.bos), ("eos_token", keys.eos)];
    let has_role =
        |id: usize| by_role.iter().any(|(name, of)| *of == Some(id as u32) && template.contains(name));
    let is_lost = |id: usize, token: &str| {
        let ids = tokenizer.encode(token, false);
        ids.is_ok_and(|ids| !ids.iter().any(|&other| other as usize == id))
    };
    let lost: Vec<_> = (keys.tokens.iter().enumerate())
        .filter(|&(id, token)| !types[id].is_recognised() && (has_role(id) || is_marker(token)))
        .filter(|&(id, token)| is_lost(id, token))
        .map(|(_, token)| format!("`{token}`"))
        .collect();
    (!lost.is_empty()).then(|| {
        format!(
            "the chat template writes {}, which tokenizer.ggml.token_type has as ordinary text: the model gets \
             several tokens for each instead of the one that it was trained on",
            lost.join(", ")
        )
    })
}

/// The token at one end of a text, if there is to be one.
fn end(
    flag: Option<bool>,
    default: bool,
    id: Option<u32>,
    name: &'static str,
    key: &'static str,
) -> Result<Option<u32>, VocabularyError> {
    match (flag, id) {
        (Some(true), None) => Err(Error::NoEnd { flag: name, key }),
        (flag, id) => Ok(id.filter(|_| flag.unwrap_or(default))),
    }
}

fn pre_tokenizer(
    keys: &GgufTokenizer,
    warnings: &mut Vec<String>,
) -> Result<&'static PreTokenizer, VocabularyError> {
    let tokens = keys.tokens.len();
    let name = match keys.pre.as_deref() {
        Some(name) if !name.is_empty() => name,
        _ if tokens == LLAMA3_TOKENS => {
            warnings.push(format!(
                "tokenizer.ggml.pre is missing; llama-bpe is assumed, because there are {tokens} tokens as in \
                 LLaMA 3 (--pre names another)"
            ));
            "llama-bpe"
        }
        _ => return Err(Error::MissingPre { tokens }),
    };
    pre::find(name).ok_or_else(|| Error::UnknownPre { pre: name.to_owned(), same: same_as_json(keys) })
}

/// The pre-tokenizer with the expressions of the model's own `tokenizer.json`, where the file has it.
fn same_as_json(keys: &GgufTokenizer) -> Option<&'static str> {
    let json: serde_json::Value = serde_json::from_str(keys.tokenizer_json.as_deref()?).ok()?;
    let patterns = translate::patterns(&json["pre_tokenizer"])?;
    pre::with_patterns(&patterns, json["model"]["ignore_merges"] == true)
}

fn byte_level_bpe(
    keys: &GgufTokenizer,
    types: &[Type],
    pre: &PreTokenizer,
) -> Result<Encoder, VocabularyError> {
    let mut vocab = Vocab::with_capacity(keys.tokens.len());
    for (id, token) in (0u32..).zip(&keys.tokens) {
        // An empty token (padding of some conversions) can't be written.
        if token.is_empty() {
            continue;
        }
        if let Some(first) = vocab.insert(token.clone(), id) {
            return Err(Error::Duplicate { token: token.clone(), first, second: id });
        }
    }

    // The library would find a merge's faults too, or panic over them, but not say which merge it was.
    let mut merges = Vec::with_capacity(keys.merges.len());
    let mut joined = String::new();
    for (rank, merge) in keys.merges.iter().enumerate() {
        let wrong = |reason| Error::Merge { rank, merge: merge.clone(), reason };
        // The first character of a part may be a space itself only in vocabularies that aren't byte-level.
        let (a, b) = merge.split_once(' ').ok_or(wrong("there is no space between two parts"))?;
        joined.clear();
        joined.push_str(a);
        joined.push_str(b);
        if !vocab.contains_key(a) || !vocab.contains_key(b) {
            return Err(wrong("a part is not in the vocabulary"));
        }
        if !vocab.contains_key(&joined) {
            return Err(wrong("the two parts together are not in the vocabulary"));
        }
        merges.push((a.to_owned(), b.to_owned()));
    }

    let added: Vec<_> = (keys.tokens.iter().zip(types))
        .filter(|(token, kind)| kind.is_recognised() && !token.is_empty())
        .map(|(token, kind)| AddedToken::from(token.clone(), kind.is_special()).normalized(false))
        .collect();

    let library = guarded(|| {
        let bpe = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(pre.ignore_merges).build()?;
        let mut library = tokenizers::Tokenizer::new(bpe);
        library.with_pre_tokenizer(Some(pre.build()?));
        library.with_decoder(Some(ByteLevel::default()));
        library.add_tokens(added)?;
        Ok(library)
    });
    Ok(Encoder::Library(Box::new(library.map_err(Error::Library)?)))
}

fn byte_level_pieces(tokens: &[String], types: &[Type]) -> Pieces {
    let mut pieces = Pieces::new(false, Malformed::Longest);
    for (token, &kind) in tokens.iter().zip(types) {
        match (kind, byte_token(token)) {
            (Type::Byte, Some(byte)) => pieces.push(&[byte], Kind::Byte),
            (Type::Normal | Type::Byte, _) => pieces.push_byte_level(token, Kind::Normal),
            _ => pieces.push(token.as_bytes(), written(kind)),
        }
    }
    pieces
}

fn sentencepiece_pieces(tokens: &[String], types: &[Type], strip_space: bool) -> Pieces {
    let mut pieces = Pieces::new(strip_space, Malformed::Byte);
    for (token, &kind) in tokens.iter().zip(types) {
        match (kind, byte_token(token)) {
            (Type::Byte, Some(byte)) => pieces.push(&[byte], Kind::Byte),
            (Type::Normal | Type::Byte, _) => {
                pieces.push(token.replace(super::spm::SPACE, " ").as_bytes(), Kind::Normal);
            }
            _ => pieces.push(token.as_bytes(), written(kind)),
        }
    }
    pieces
}

/// The kind of a token that is written as it stands in the vocabulary.
fn written(kind: Type) -> Kind {
    if kind.is_special() { Kind::Special } else { Kind::Normal }
}
