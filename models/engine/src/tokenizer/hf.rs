//! The tokenizer of a Hugging Face directory: `tokenizer.json`, and beside it what transformers reads from
//! `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja` and, for the ids at which
//! generation ends, `generation_config.json` and `config.json`.

use std::path::Path;

use serde_json::Value;
use tokenizers::decoders::DecoderWrapper;

use super::decode::{Decoder, Kind, Malformed, Pieces, byte_token};
use super::spm::SPACE;
use super::{Encoder, Ends, Special, Tokenizer, VocabularyError, guarded, size_warning};
use crate::checkpoint::END_OF_GENERATION;

pub(super) fn build(dir: &Path, vocab_size: usize) -> Result<Tokenizer, VocabularyError> {
    let Some(json) = read(dir, "tokenizer.json")? else {
        return Err(VocabularyError::NoTokenizerJson { sentencepiece: dir.join("tokenizer.model").exists() });
    };
    let mut library = guarded(|| tokenizers::Tokenizer::from_bytes(&json))
        .map_err(|message| VocabularyError::Json { file: "tokenizer.json".into(), message })?;
    // Left over from training; transformers ignores both as well.
    library.with_padding(None);
    library.with_truncation(None).map_err(|e| VocabularyError::Library(e.to_string()))?;

    let config = read_json(dir, "tokenizer_config.json")?;
    let map = read_json(dir, "special_tokens_map.json")?;
    let special_id = |key: &str| {
        let entry = [&config, &map].into_iter().find_map(|file| token_text(file.get(key)?))?;
        library.token_to_id(entry).filter(|&id| (id as usize) < vocab_size)
    };
    let special = Special {
        bos: special_id("bos_token"),
        eos: special_id("eos_token"),
        unk: special_id("unk_token"),
        pad: special_id("pad_token"),
    };

    let added = library.get_added_vocabulary();
    let by_name = END_OF_GENERATION.iter().filter(|name| added.is_special_token(name));
    let mut end_of_generation: Vec<u32> = by_name.filter_map(|name| library.token_to_id(name)).collect();
    end_of_generation.extend(special.eos);
    for file in ["generation_config.json", "config.json"] {
        end_of_generation.extend(ids(&read_json(dir, file)?["eos_token_id"]));
    }
    end_of_generation.retain(|&id| (id as usize) < vocab_size);
    end_of_generation.sort_unstable();
    end_of_generation.dedup();

    let tokens = library.get_vocab(true).values().max().map_or(0, |&max| max as usize + 1);
    let decoder = decoder(&library, tokens.min(vocab_size));
    Ok(Tokenizer {
        chat_template: chat_template(dir, &config)?,
        encoder: Encoder::Library(Box::new(library)),
        decoder,
        vocab_size,
        special,
        ends: Ends::Library,
        end_of_generation,
        warnings: size_warning(tokens, vocab_size).into_iter().collect(),
    })
}

/// The file's bytes; `None` if there is no such file.
fn read(dir: &Path, name: &str) -> Result<Option<Vec<u8>>, VocabularyError> {
    match std::fs::read(dir.join(name)) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(VocabularyError::Read { file: name.into(), error }),
    }
}

/// The file's JSON; null if there is no such file.
fn read_json(dir: &Path, name: &str) -> Result<Value, VocabularyError> {
    let Some(bytes) = read(dir, name)? else { return Ok(Value::Null) };
    serde_json::from_slice(&bytes)
        .map_err(|e| VocabularyError::Json { file: name.into(), message: e.to_string() })
}

/// A token of a configuration: its text, or an object with its text.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// One id, or several.
fn ids(value: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(values) => values.iter().filter_map(id).collect(),
        value => id(value).into_iter().collect(),
    }
}

/// The template's own file, else the configuration: a text, or several of which one is named `default`.
fn chat_template(dir: &Path, config: &Value) -> Result<Option<String>, VocabularyError> {
    const FILE: &str = "chat_template.jinja";
    if let Some(bytes) = read(dir, FILE)? {
        let invalid = |e: std::string::FromUtf8Error| VocabularyError::Json {
            file: FILE.into(),
            message: e.to_string(),
        };
        return String::from_utf8(bytes).map(Some).map_err(invalid);
    }
    Ok(match &config["chat_template"] {
        Value::String(template) => Some(template.clone()),
        Value::Array(templates) => templates
            .iter()
            .find(|template| template["name"] == "default")
            .and_then(|template| template["template"].as_str())
            .map(str::to_owned),
        _ => None,
    })
}

/// The table of the first `tokens` ids, where the file's decoder can be put that way: GPT-2's byte level, or
/// SentencePiece's U+2581 and byte fallback as transformers converts it.
fn decoder(library: &tokenizers::Tokenizer, tokens: usize) -> Decoder {
    let style = match library.get_decoder() {
        Some(DecoderWrapper::ByteLevel(_)) => Style::ByteLevel,
        Some(other) => match sentencepiece(&serde_json::to_value(other).unwrap_or_default()) {
            Some(strip_space) => Style::SentencePiece { strip_space },
            None => return Decoder::Library,
        },
        None => return Decoder::Library,
    };
    let mut pieces = match style {
        Style::ByteLevel => Pieces::new(false, Malformed::Longest),
        Style::SentencePiece { strip_space } => Pieces::new(strip_space, Malformed::Byte),
    };
    let added = library.get_added_vocabulary();
    for id in (0u32..).take(tokens) {
        // Added tokens may be kept in a normalised form, which is the one that the decoder gets.
        let token = added.simple_id_to_token(id).or_else(|| library.id_to_token(id)).unwrap_or_default();
        let kind = if added.is_special_token(&token) { Kind::Special } else { Kind::Normal };
        match (style, byte_token(&token)) {
            (Style::ByteLevel, _) => pieces.push_byte_level(&token, kind),
            (_, Some(byte)) => pieces.push(&[byte], Kind::Byte),
            _ => pieces.push(token.replace(SPACE, " ").as_bytes(), kind),
        }
    }
    Decoder::Pieces(pieces)
}

#[derive(Clone, Copy)]
enum Style {
    ByteLevel,
    SentencePiece { strip_space: bool },
}

/// Whether the decoder is the sequence that stands for SentencePiece, and if so, whether it takes the first
/// space away.
fn sentencepiece(decoder: &Value) -> Option<bool> {
    let steps = decoder["decoders"].as_array()?;
    let is = |step: &Value, name: &str| step["type"] == name;
    let [replace, fallback, fuse, rest @ ..] = &steps[..] else { return None };
    let spaces = is(replace, "Replace") && replace["pattern"]["String"] == SPACE && replace["content"] == " ";
    if !(spaces && is(fallback, "ByteFallback") && is(fuse, "Fuse")) {
        return None;
    }
    match rest {
        [] => Some(false),
        [strip] if is(strip, "Strip") => {
            (strip["content"] == " " && strip["start"] == 1 && strip["stop"] == 0).then_some(true)
        }
        _ => None,
    }
}
