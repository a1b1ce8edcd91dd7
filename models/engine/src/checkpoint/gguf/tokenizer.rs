//! The `tokenizer.*` keys of a GGUF file.

use super::super::error::LoadError;
use super::super::tokenizer_source::GgufTokenizer;
use super::keys::{string, token, wrong_value};
use bitnet_burn_formats::gguf::{GgufFile, Value, ValueType};

const TOKENIZER_STRINGS: [&str; 4] =
    ["tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template", "tokenizer.huggingface.json"];
const TOKENIZER_BOOLS: [&str; 4] = [
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.remove_extra_whitespaces",
];
const TOKENIZER_IDS: [&str; 6] = [
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.seperator_token_id",
];

/// Checks the types of the tokenizer's keys, so that [`tokenizer`] has nothing left to refuse.
pub(super) fn check_tokenizer(file: &GgufFile) -> Result<(), LoadError> {
    for key in TOKENIZER_STRINGS {
        string(file, key)?;
    }
    for key in TOKENIZER_IDS {
        token(file, key)?;
    }
    for key in TOKENIZER_BOOLS {
        if let Some(value) = file.value(key).filter(|v| v.as_bool().is_none()) {
            return Err(wrong_value(file, key.to_owned(), value, "a bool"));
        }
    }
    let mut n_tokens = None;
    for (key, allowed, expected) in [
        ("tokenizer.ggml.tokens", &[ValueType::String][..], "an array of strings"),
        ("tokenizer.ggml.merges", &[ValueType::String], "an array of strings"),
        (
            "tokenizer.ggml.scores",
            &[ValueType::F32, ValueType::F64],
            "an array of floats, one for each token",
        ),
        (
            "tokenizer.ggml.token_type",
            &[ValueType::I32, ValueType::U32],
            "an array of i32, one for each token",
        ),
    ] {
        let Some(value) = file.value(key) else { continue };
        let array = value.as_array().filter(|a| allowed.contains(&a.element_type()));
        let len = array.map(|a| a.len());
        let per_token = key.ends_with("scores") || key.ends_with("token_type");
        if len.is_none() || (per_token && len != n_tokens) {
            return Err(wrong_value(file, key.to_owned(), value, expected));
        }
        if key.ends_with("tokens") {
            n_tokens = len;
        }
    }
    Ok(())
}

/// The tokenizer's keys; [`check_tokenizer`] has seen them.
pub(super) fn tokenizer(file: &GgufFile, pre: Option<String>) -> GgufTokenizer {
    let text = |key| string(file, key).ok().flatten();
    let id = |key| token(file, key).ok().flatten();
    let flag = |key| file.value(key).and_then(Value::as_bool);
    let array = |key| file.value(key).and_then(Value::as_array);
    let strings = |key| array(key).map(|a| a.strings().map(str::to_owned).collect()).unwrap_or_default();
    let [model, file_pre, chat_template, tokenizer_json] = TOKENIZER_STRINGS.map(text);
    let [add_bos, add_eos, add_space_prefix, remove_extra_whitespaces] = TOKENIZER_BOOLS.map(flag);
    let [bos, eos, eot, unk, pad, sep] = TOKENIZER_IDS.map(id);
    let types = array("tokenizer.ggml.token_type").and_then(|a| a.to_i64()).unwrap_or_default();
    GgufTokenizer {
        path: file.path().to_owned(),
        model,
        pre: pre.or(file_pre),
        tokens: strings("tokenizer.ggml.tokens"),
        scores: array("tokenizer.ggml.scores").and_then(|a| a.to_f32()).unwrap_or_default(),
        // Out of range is as good as undefined, which is 0.
        token_types: types.into_iter().map(|t| i32::try_from(t).unwrap_or(0)).collect(),
        merges: strings("tokenizer.ggml.merges"),
        bos,
        eos,
        eot,
        unk,
        pad,
        sep,
        add_bos,
        add_eos,
        add_space_prefix,
        remove_extra_whitespaces,
        chat_template,
        tokenizer_json,
    }
}
