//! A tokenizer from one kind of file to the other: `tokenizer.json` to the `tokenizer.*` keys of GGUF, and
//! back.
//!
//! | | byte-level BPE | SentencePiece's BPE |
//! | --- | --- | --- |
//! | `tokenizer.json` | a pre-tokenizer that ends in `ByteLevel` | `byte_fallback`, spaces become U+2581 |
//! | GGUF | `gpt2`, the pre-tokenizer by name, merges | `llama`, scores |
//!
//! Neither kind of file can say all that the other can. So the two tokenizers are compared on
//! [texts that are hard to agree on](disagreement), and one that differs is refused: a model whose prompts
//! are cut otherwise than in training raises no error, it only gets worse.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::{NormalizedString, Normalizer as _};

use super::decode::byte_token;
use super::spm::SPACE;
use super::vocabulary::{Type, types};
use super::{Encoder, Ends, Tokenizer, TokenizerError, guarded, pre};
use crate::checkpoint::{GgufTokenizer, TokenizerSource};
use bitnet_burn::ModelConfig;

/// Why a tokenizer can't be written in the other kind of file.
#[derive(Debug, thiserror::Error)]
pub enum TranslateError {
    /// It can't be read in the first place.
    #[error(transparent)]
    Read(#[from] TokenizerError),
    /// The other kind of file has no words for it.
    #[error("the tokenizer of {} can't be translated: {problem}", path.display())]
    Inexact {
        /// Where the tokenizer is.
        path: PathBuf,
        /// What the other kind of file can't say.
        problem: String,
    },
}

/// The texts of a Hugging Face directory's tokenizer files.
pub struct HfFiles {
    /// `tokenizer.json`.
    pub tokenizer: String,
    /// `tokenizer_config.json`.
    pub config: Value,
}

/// Numbers in `tokenizer.ggml.token_type`.
mod kind {
    pub(super) const NORMAL: i32 = 1;
    pub(super) const UNKNOWN: i32 = 2;
    pub(super) const CONTROL: i32 = 3;
    pub(super) const USER_DEFINED: i32 = 4;
    pub(super) const UNUSED: i32 = 5;
    pub(super) const BYTE: i32 = 6;
}

/// Whether there is a tokenizer at all.
pub fn is_there(source: &TokenizerSource) -> bool {
    match source {
        TokenizerSource::Gguf(keys) => !keys.is_empty(),
        TokenizerSource::Hf { dir } => {
            ["tokenizer.json", "tokenizer.model"].iter().any(|f| dir.join(f).exists())
        }
    }
}

/// The keys of GGUF for the tokenizer in a Hugging Face directory, for a model of this configuration.
///
/// # Arguments
/// - `pre`: the name of the pre-tokenizer, for one that is not recognised
/// - `notes`: gets what the keys can't say and no text below shows
pub fn to_gguf(
    dir: &Path,
    config: &ModelConfig,
    pre: Option<&str>,
    notes: &mut Vec<String>,
) -> Result<GgufTokenizer, TranslateError> {
    let inexact = |problem: String| TranslateError::Inexact { path: dir.to_owned(), problem };
    let source = TokenizerSource::Hf { dir: dir.to_owned() };
    let tokenizer = Tokenizer::from_source(&source, config.vocab_size)?;
    let Encoder::Library(library) = &tokenizer.encoder else {
        return Err(inexact("it was not read from tokenizer.json".into()));
    };
    let json = serde_json::to_value(library).map_err(|e| inexact(e.to_string()))?;
    let model = &json["model"];
    if model["type"] != "BPE" {
        return Err(inexact(format!(
            "its model is {}; GGUF files of language models hold BPE",
            model["type"]
        )));
    }
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if model[key].as_str().is_some_and(|text| !text.is_empty()) {
            return Err(inexact(format!("its BPE has a `{key}`, which GGUF has no key for")));
        }
    }
    let (tokens, token_types) = vocabulary(&json, config.vocab_size).map_err(inexact)?;
    let merges: Vec<(String, String)> =
        serde_json::from_value(model["merges"].clone()).map_err(|e| inexact(e.to_string()))?;

    let (bos, eos) = ends(&tokenizer)?;
    let mut keys = GgufTokenizer {
        path: dir.join("tokenizer.json"),
        token_types,
        bos: bos.or(tokenizer.bos()).or(config.bos_token),
        eos: eos.or(config.eos_tokens.first().copied()).or(tokenizer.eos()),
        unk: tokenizer.special.unk,
        pad: tokenizer.special.pad,
        add_bos: Some(bos.is_some()),
        add_eos: Some(eos.is_some()),
        chat_template: tokenizer.chat_template().map(str::to_owned),
        ..GgufTokenizer::default()
    };
    let candidates = match (patterns(&json["pre_tokenizer"]), pre) {
        (None, None) if model["byte_fallback"] == true => {
            sentencepiece_keys(&json, tokens, &merges, &mut keys).map_err(inexact)?;
            vec!["default"]
        }
        (found, asked) => {
            match library.get_normalizer() {
                None => {}
                Some(NormalizerWrapper::NFC(_)) => notes.push(
                    "tokenizer.json normalises texts to Unicode's NFC, which a GGUF file can't say: a text that \
                     is not in that form is cut into other tokens"
                        .into(),
                ),
                Some(_) => {
                    return Err(inexact(format!("its normalizer is {}, and GGUF has none", json["normalizer"])));
                }
            }
            keys.model = Some("gpt2".into());
            keys.tokens = tokens;
            keys.merges = merges.into_iter().map(|(a, b)| format!("{a} {b}")).collect();
            let ignore_merges = model["ignore_merges"] == true;
            let found = found.and_then(|patterns| pre::with_patterns(&patterns, ignore_merges));
            // One that GGUF knows by no expression of its own may still be one of those that it knows.
            match asked.or(found) {
                Some(name) => vec![name],
                None => pre::all(ignore_merges),
            }
        }
    };
    let alone = candidates.len() == 1;
    let mut problem = String::new();
    for name in candidates {
        keys.pre = Some(name.to_owned());
        let copy = Tokenizer::from_source(&TokenizerSource::Gguf(Box::new(keys.clone())), config.vocab_size)?;
        match disagreement(&tokenizer, &copy)? {
            None => {
                if !alone {
                    notes.push(format!(
                        "tokenizer.json's pre-tokenizer is none that GGUF has a name for; `{name}` is written, \
                         which cuts all texts that were tried into the same tokens"
                    ));
                }
                return Ok(keys);
            }
            Some(text) if alone => problem = format!("with the pre-tokenizer `{name}`, {text}"),
            Some(_) => {
                problem = "its pre-tokenizer is none that GGUF has a name for (--pre tries one)".into()
            }
        }
    }
    Err(inexact(problem))
}

/// Texts and types of all tokens of the model, by id. Ids without a token are filled up.
fn vocabulary(json: &Value, vocab_size: usize) -> Result<(Vec<String>, Vec<i32>), String> {
    let id = |value: &Value| value.as_u64().and_then(|id| usize::try_from(id).ok());
    let mut known: BTreeMap<usize, (String, i32)> = BTreeMap::new();
    for (token, value) in json["model"]["vocab"].as_object().into_iter().flatten() {
        let kind = match byte_token(token) {
            Some(_) if json["model"]["byte_fallback"] == true => kind::BYTE,
            _ => kind::NORMAL,
        };
        known.extend(id(value).map(|id| (id, (token.clone(), kind))));
    }
    let unknown = json["model"]["unk_token"].as_str();
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let Some(content) = added["content"].as_str() else { continue };
        let kind = match () {
            () if unknown == Some(content) => kind::UNKNOWN,
            () if added["special"] == true => kind::CONTROL,
            () => kind::USER_DEFINED,
        };
        known.extend(id(&added["id"]).map(|id| (id, (content.to_owned(), kind))));
    }
    if let Some((last, (token, _))) = known.last_key_value().filter(|(id, _)| **id >= vocab_size) {
        return Err(format!(
            "it has a token {last} ({token:?}), but the model has {vocab_size} tokens, and a GGUF file has one \
             number for both"
        ));
    }
    let taken: HashSet<String> = known.values().map(|(token, _)| token.clone()).collect();
    let fill = |id: usize| {
        let mut name = format!("[PAD{id}]");
        while taken.contains(&name) {
            name.insert(0, '[');
        }
        (name, kind::UNUSED)
    };
    Ok((0..vocab_size).map(|id| known.remove(&id).unwrap_or_else(|| fill(id))).unzip())
}

/// The tokens that it puts in front of a text and behind it.
fn ends(tokenizer: &Tokenizer) -> Result<(Option<u32>, Option<u32>), TokenizerError> {
    let text = "a";
    let [plain, with] = [false, true].map(|special| tokenizer.encode(text, special));
    let (plain, with) = (plain?, with?);
    let start = with.windows(plain.len().max(1)).position(|window| window == plain);
    let Some(start) = start else { return Ok((None, None)) };
    let before = start.checked_sub(1).map(|i| with[i]);
    Ok((before, with.get(start + plain.len()).copied()))
}

/// The expressions of a pre-tokenizer that cuts by expressions and ends in `ByteLevel`.
pub(super) fn patterns(json: &Value) -> Option<Vec<String>> {
    let alone = std::slice::from_ref(json);
    let steps = if json["type"] == "Sequence" { json["pretokenizers"].as_array()? } else { alone };
    let (last, steps) = steps.split_last()?;
    if last["type"] != "ByteLevel" || last["add_prefix_space"] != false {
        return None;
    }
    let mut patterns = Vec::new();
    for step in steps {
        patterns.push(match step["type"].as_str()? {
            "Split" if step["behavior"] == "Isolated" && step["invert"] == false => {
                step["pattern"]["Regex"].as_str()?.to_owned()
            }
            "Digits" if step["individual_digits"] == true => r"\p{N}".to_owned(),
            _ => return None,
        });
    }
    if last["use_regex"] == true {
        patterns.push(pre::GPT2.to_owned());
    }
    Some(patterns)
}

/// The keys of a SentencePiece vocabulary: a token's score is the rank of the first merge that makes it,
/// negative, which is how `tokenizer.json`'s merges come from scores.
fn sentencepiece_keys(
    json: &Value,
    tokens: Vec<String>,
    merges: &[(String, String)],
    keys: &mut GgufTokenizer,
) -> Result<(), String> {
    let prepends = |step: &Value| {
        step["type"] == "Prepend" && step["prepend"] == SPACE
            || step["type"] == "Metaspace" && step["prepend_scheme"] != "never"
    };
    let (normalizer, pre_tokenizer) = (&json["normalizer"], &json["pre_tokenizer"]);
    if !pre_tokenizer.is_null() && pre_tokenizer["type"] != "Metaspace" {
        return Err(format!("its pre-tokenizer is {pre_tokenizer}, and SentencePiece has none"));
    }
    let steps = normalizer["normalizers"].as_array().map_or(std::slice::from_ref(normalizer), Vec::as_slice);
    let mut ranks: HashMap<String, usize> = HashMap::new();
    for (rank, (a, b)) in merges.iter().enumerate() {
        ranks.entry(format!("{a}{b}")).or_insert(rank);
    }
    keys.model = Some("llama".into());
    keys.add_space_prefix = Some(steps.iter().any(prepends) || prepends(pre_tokenizer));
    keys.scores = (tokens.iter().zip(&keys.token_types))
        .map(|(token, &kind)| match kind {
            kind::NORMAL => -(ranks.get(token).copied().unwrap_or(merges.len()) as f32),
            _ => 0.0,
        })
        .collect();
    let unknown = keys.token_types.iter().position(|&kind| kind == kind::UNKNOWN);
    keys.unk = keys.unk.or(unknown.and_then(|id| u32::try_from(id).ok()));
    keys.tokens = tokens;
    Ok(())
}

/// The files of a Hugging Face directory for the tokenizer in a GGUF file.
pub fn to_hf(keys: &GgufTokenizer, config: &ModelConfig) -> Result<HfFiles, TranslateError> {
    let inexact = |problem: String| TranslateError::Inexact { path: keys.path.clone(), problem };
    let source = TokenizerSource::Gguf(Box::new(keys.clone()));
    let tokenizer = Tokenizer::from_source(&source, config.vocab_size)?;
    let mut library = match &tokenizer.encoder {
        Encoder::Library(library) => (**library).clone(),
        Encoder::SentencePiece(_) => {
            let json = sentencepiece_json(keys, tokenizer.special.unk).to_string();
            guarded(|| tokenizers::Tokenizer::from_bytes(json)).map_err(inexact)?
        }
    };
    if let Ends::Ids(bos, eos) = tokenizer.ends {
        let processor = post_processor(&tokenizer, bos, eos);
        let processor = serde_json::from_value::<tokenizers::PostProcessorWrapper>(processor);
        if bos.or(eos).is_some() {
            library.with_post_processor(Some(processor.map_err(|e| inexact(e.to_string()))?));
        }
    }
    let tokens = tokenizer.template_tokens();
    let mut config = json!({
        "clean_up_tokenization_spaces": false,
        "model_max_length": config.context_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    });
    for (key, text) in [
        ("bos_token", tokens.bos_token),
        ("eos_token", tokens.eos_token),
        ("unk_token", tokens.unk_token),
        ("pad_token", tokens.pad_token),
        ("chat_template", tokenizer.chat_template().map(str::to_owned)),
    ] {
        if let Some(text) = text {
            config[key] = text.into();
        }
    }
    Ok(HfFiles { tokenizer: library.to_string(true).map_err(|e| inexact(e.to_string()))?, config })
}

/// What puts these tokens around a text.
fn post_processor(tokenizer: &Tokenizer, bos: Option<u32>, eos: Option<u32>) -> Value {
    let mut special = serde_json::Map::new();
    let mut single = Vec::new();
    let mut pair = Vec::new();
    let mut add = |id: Option<u32>, type_ids: &[u32], to: &mut [&mut Vec<Value>]| {
        let Some((id, token)) = id.and_then(|id| Some((id, tokenizer.token(id)?))) else { return };
        for (to, type_id) in to.iter_mut().zip(type_ids) {
            to.push(json!({"SpecialToken": {"id": token, "type_id": type_id}}));
        }
        special.insert(token.clone(), json!({"id": token, "ids": [id], "tokens": [token]}));
    };
    let text = |name: &str, type_id: u32| json!({"Sequence": {"id": name, "type_id": type_id}});
    add(bos, &[0, 0], &mut [&mut single, &mut pair]);
    single.push(text("A", 0));
    pair.push(text("A", 0));
    add(eos, &[0, 0], &mut [&mut single, &mut pair]);
    add(bos, &[1], &mut [&mut pair]);
    pair.push(text("B", 1));
    add(eos, &[1], &mut [&mut pair]);
    json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special})
}

/// `tokenizer.json` of a SentencePiece vocabulary, as transformers makes it: any two tokens that make a
/// third are a merge, the one with the highest score first.
fn sentencepiece_json(keys: &GgufTokenizer, unk: Option<u32>) -> Value {
    let types = types(keys);
    let joinable: HashMap<&str, usize> = (keys.tokens.iter().enumerate())
        .filter(|(id, token)| types[*id] == Type::Normal && !token.is_empty())
        .map(|(id, token)| (token.as_str(), id))
        .collect();
    let mut merges: Vec<(usize, &str, &str)> = Vec::new();
    for (&token, &id) in &joinable {
        for (place, _) in token.char_indices().skip(1) {
            let (a, b) = token.split_at(place);
            if joinable.contains_key(a) && joinable.contains_key(b) {
                merges.push((id, a, b));
            }
        }
    }
    let score = |id: usize| keys.scores.get(id).copied().unwrap_or(0.0) + 0.0;
    merges.sort_by(|&(i, a, _), &(j, b, _)| {
        score(j).total_cmp(&score(i)).then(i.cmp(&j)).then(joinable[a].cmp(&joinable[b]))
    });
    let merges: Vec<[&str; 2]> = merges.into_iter().map(|(_, a, b)| [a, b]).collect();
    let vocab: serde_json::Map<String, Value> = (keys.tokens.iter().enumerate())
        .filter(|(_, token)| !token.is_empty())
        .map(|(id, token)| (token.clone(), id.into()))
        .collect();
    let added: Vec<Value> = (keys.tokens.iter().zip(&types).enumerate())
        .filter(|(_, (token, kind))| kind.is_recognised() && !token.is_empty())
        .map(|(id, (token, kind))| {
            json!({
                "id": id, "content": token, "special": kind.is_special(), "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false,
            })
        })
        .collect();
    let space = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let back = json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "});
    let mut normalizers = vec![space];
    let mut decoders = vec![back, json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    if keys.add_space_prefix.unwrap_or(true) {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": unk.and_then(|id| keys.tokens.get(id as usize)),
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": vocab,
            "merges": merges,
        },
    })
}

/// Texts on which tokenizers disagree: white space of all kinds, contractions, numbers, scripts, marks that
/// combine, emoji, code.
const HARD: [&str; 30] = [
    "",
    " ",
    "  ",
    "a",
    " a",
    "a ",
    "Hello, world!",
    "   three spaces before, two after  ",
    "\n",
    "\n\n\n two lines\r\nand\ttabs\t\t\tand \u{a0}\u{3000}\u{2003}\u{200b}others\u{feff}",
    "don't DON'T we'll I'M you've he'd it's 'tis 'S",
    "0 12 123 1234 12345 3.14159 1,000,000 ٣٤٥ Ⅷ ½ 10²",
    "naïve café Straße ŁÓDŹ Ärger",
    "cafe\u{301} A\u{30a} \u{301}alone n\u{303}n\u{303}",
    "Привет, мир! Ελληνικά γράμματα; שלום עולם مرحبا بالعالم",
    "你好，世界。日本語のテキスト、カタカナ　한국어 문장",
    "नमस्ते दुनिया ภาษาไทย ქართული",
    "😀😃 👩‍👩‍👧‍👦 🇩🇪🏳️‍🌈 ❤️",
    "fn main() { println!(\"{:?}\", a[0] != b && c <= 1e-5); } // done",
    "https://example.com/a_b-c?d=%20e&f=g#h user@example.org",
    "C:\\path\\to\\file <html> &amp; $x_1 = \\frac{1}{2}$ ~~~ ### ***",
    "________ ======== -------- ........ !!!!???",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "CamelCaseWords snake_case_words kebab-case-words SCREAMING_CASE",
    "\u{0}\u{1}\u{7f}\u{85}",
    "▁already ▁marked▁ Ġand Ċthis",
    "<0x0A> <unk> <s> </s> <pad>",
    "a\u{200d}b \u{fffd} \u{10ffff} \u{e000}",
    "I\u{307} İstanbul ſ ﬁ ǅ",
    "A sentence. Another one! A third? (In brackets) [or these] {or those} \"quoted\" ‘so’ “so” «so»",
];
/// Tokens whose own texts are tried too, at most.
const TRIED_TOKENS: usize = 20_000;

/// What two tokenizers of one model disagree on: ids of hard texts, of every token's text, and of
/// the tokens with a role between words, each with and without the tokens at the ends; and the texts of
/// these ids. `None` if there is nothing.
pub fn disagreement(a: &Tokenizer, b: &Tokenizer) -> Result<Option<String>, TokenizerError> {
    let size = a.vocab_size() as u32;
    let step = (size as usize).div_ceil(TRIED_TOKENS).max(1);
    let mut texts: Vec<String> = HARD.map(str::to_owned).into();
    for id in (0..size).step_by(step) {
        // Rows of the embedding beyond the vocabulary are no tokens.
        texts.extend(a.decode(&[id], false));
    }
    for (id, token) in (0..size).filter_map(|id| Some((id, a.token(id)?))) {
        if a.is_recognised(&token) {
            texts.push(format!("before {token} after{token}{token}\n{token}"));
            texts.extend(a.decode(&[id], true));
        }
    }
    for text in texts.iter().filter(|text| a.keeps(text) && b.keeps(text)) {
        for special in [false, true] {
            let [ids, other] = [a, b].map(|tokenizer| tokenizer.encode(text, special));
            let (ids, other) = match (ids, other) {
                (Ok(ids), Ok(other)) => (ids, other),
                (Err(_), Err(_)) => continue,
                (Err(e), _) | (_, Err(e)) => return Ok(Some(format!("{text:?} fails: {e}"))),
            };
            if ids != other {
                return Ok(Some(format!("{text:?} would become the tokens {other:?} instead of {ids:?}")));
            }
            let (back, other) = (a.decode(&ids, special)?, b.decode(&ids, special)?);
            if back != other {
                return Ok(Some(format!("the tokens {ids:?} would become {other:?} instead of {back:?}")));
            }
        }
    }
    Ok(None)
}

impl Tokenizer {
    /// Whether a text is not changed before it is cut, but for SentencePiece's spaces.
    fn keeps(&self, text: &str) -> bool {
        let Encoder::Library(library) = &self.encoder else { return true };
        let Some(normalizer @ NormalizerWrapper::NFC(_)) = library.get_normalizer() else { return true };
        let mut normalized = NormalizedString::from(text);
        normalizer.normalize(&mut normalized).is_ok() && normalized.get() == text
    }

    /// Whether a text is recognised as a token before anything else is done to it.
    fn is_recognised(&self, token: &str) -> bool {
        match &self.encoder {
            Encoder::Library(library) => library.get_added_vocabulary().get_vocab().contains_key(token),
            Encoder::SentencePiece(spm) => spm.is_recognised(token),
        }
    }
}
