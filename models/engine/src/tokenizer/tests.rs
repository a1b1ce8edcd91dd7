use std::path::PathBuf;
use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::chat::{ChatError, ChatTemplate, Message};
use crate::checkpoint::GgufTokenizer;

/// Made by transformers and tokenizers from a vocabulary of 320 tokens in LLaMA 3's manner.
const TOKENIZER_A: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/golden/hf/tokenizer-A");

fn json(path: impl AsRef<Path>) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn get<T: serde::de::DeserializeOwned>(value: &Value, key: &str) -> T {
    serde_json::from_value(value[key].clone()).unwrap()
}

fn goldens_a() -> Value {
    json(Path::new(TOKENIZER_A).join("tokenizer_goldens.json"))
}

fn open(source: TokenizerSource, vocab_size: usize) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::from_source(&source, vocab_size)
}

fn gguf(keys: GgufTokenizer) -> Result<Tokenizer, TokenizerError> {
    let n = keys.tokens.len();
    open(TokenizerSource::Gguf(Box::new(keys)), n)
}

fn problem(keys: GgufTokenizer) -> VocabularyError {
    match gguf(keys) {
        Err(TokenizerError::Invalid { problem, .. }) => problem,
        other => panic!("{other:?}"),
    }
}

/// The vocabulary of [`TOKENIZER_A`] as a GGUF file has it.
fn keys_a() -> GgufTokenizer {
    let file = json(Path::new(TOKENIZER_A).join("tokenizer.json"));
    let config = json(Path::new(TOKENIZER_A).join("tokenizer_config.json"));
    let mut tokens = vec![String::new(); 320];
    let mut token_types = vec![1; 320];
    for (token, id) in file["model"]["vocab"].as_object().unwrap() {
        tokens[id.as_u64().unwrap() as usize] = token.clone();
    }
    for added in file["added_tokens"].as_array().unwrap() {
        let id = added["id"].as_u64().unwrap() as usize;
        tokens[id] = get(added, "content");
        token_types[id] = 3;
    }
    let merges: Vec<(String, String)> = get(&file["model"], "merges");
    GgufTokenizer {
        path: "a.gguf".into(),
        model: Some("gpt2".into()),
        pre: Some("llama-bpe".into()),
        bos: Some(312),
        eos: Some(313),
        tokens,
        token_types,
        merges: merges.into_iter().map(|(a, b)| format!("{a} {b}")).collect(),
        chat_template: Some(get(&config, "chat_template")),
        ..GgufTokenizer::default()
    }
}

/// [`TOKENIZER_A`] through both doors.
fn tokenizers_a() -> [Tokenizer; 2] {
    let hf = open(TokenizerSource::Hf { dir: TOKENIZER_A.into() }, 320).unwrap();
    [hf, gguf(keys_a()).unwrap()]
}

fn streamed(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
    let mut stream = tokenizer.decode_stream(skip_special);
    let mut text = String::new();
    for &id in ids {
        text.extend(stream.push(id).unwrap());
    }
    text.extend(stream.flush().unwrap());
    text
}

#[test]
fn byte_level_goldens() {
    let goldens = goldens_a();
    for tokenizer in tokenizers_a() {
        assert_eq!(tokenizer.warnings(), [""; 0]);
        assert_eq!(tokenizer.vocab_size(), 320);
        assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(312), Some(313)));
        // <|end_of_text|>, <|eom_id|>, <|eot_id|>
        assert_eq!(tokenizer.end_of_generation(), [313, 318, 319]);
        for golden in goldens["encode"].as_array().unwrap() {
            let text: String = get(golden, "text");
            let ids: Vec<u32> = get(golden, "ids");
            let plain: Vec<u32> = get(golden, "ids_no_special");
            assert_eq!(tokenizer.encode(&text, true).unwrap(), ids, "{text:?}");
            assert_eq!(tokenizer.encode(&text, false).unwrap(), plain, "{text:?}");
            let tokens: Vec<_> = plain.iter().map(|&id| tokenizer.token(id).unwrap()).collect();
            assert_eq!(tokens, get::<Vec<String>>(golden, "tokens"), "{text:?}");
            assert!(plain.iter().zip(&tokens).all(|(&id, token)| tokenizer.id(token) == Some(id)));
            for (ids, skip, key) in [
                (&plain, false, "decoded"),
                (&plain, true, "decoded_skip_special"),
                (&ids, false, "decoded_with_bos"),
            ] {
                let expected: String = get(golden, key);
                assert_eq!(tokenizer.decode(ids, skip).unwrap(), expected, "{text:?}");
                assert_eq!(streamed(&tokenizer, ids, skip), expected, "{text:?}");
            }
        }
        for golden in goldens["partial_decode"].as_array().unwrap() {
            let (ids, expected): (Vec<u32>, String) = (get(golden, "ids"), get(golden, "decoded"));
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), expected);
            assert_eq!(streamed(&tokenizer, &ids, false), expected);
        }
        let single: std::collections::BTreeMap<String, String> = get(&goldens, "single_token_decode");
        assert_eq!(single.len(), 320);
        for (id, expected) in single {
            assert_eq!(tokenizer.decode(&[id.parse().unwrap()], false).unwrap(), expected, "{id}");
        }
    }
}

#[test]
fn chat_goldens() {
    let goldens = goldens_a();
    let plain = ChatTemplate::new(goldens["chat_template_plain"].as_str().unwrap()).unwrap();
    for tokenizer in tokenizers_a() {
        let own = ChatTemplate::of(&tokenizer).unwrap();
        for golden in goldens["chat"].as_array().unwrap() {
            let template = match golden["template"].as_str().unwrap() {
                "plain" => &plain,
                _ => &own,
            };
            let messages: Vec<Message> = get(golden, "messages");
            let text = template
                .render(&messages, &tokenizer.template_tokens(), get(golden, "add_generation_prompt"))
                .unwrap();
            assert_eq!(text, get::<String>(golden, "text"));
            assert_eq!(tokenizer.encode(&text, false).unwrap(), get::<Vec<u32>>(golden, "ids"));
        }
    }
}

#[test]
fn characters_come_out_whole_and_in_time() {
    let [tokenizer, _] = tokenizers_a();
    let ids = tokenizer.encode("a😀b", false).unwrap();
    let mut stream = tokenizer.decode_stream(true);
    let pieces: Vec<_> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    let text = |s: &str| Some(s.to_owned());
    assert_eq!(pieces, [text("a"), None, None, None, text("😀"), text("b")]);
    assert_eq!(stream.flush().unwrap(), None);
    stream.push(ids[1]).unwrap();
    assert_eq!(stream.flush().unwrap(), text("\u{fffd}"));
    assert_eq!(stream.flush().unwrap(), None);
}

fn spm_goldens() -> Value {
    serde_json::from_str(include_str!("../../testdata/tokenizer/spm_goldens.json")).unwrap()
}

fn spm_keys() -> GgufTokenizer {
    let goldens = spm_goldens();
    GgufTokenizer {
        path: "spm.gguf".into(),
        model: Some("llama".into()),
        tokens: get(&goldens, "tokens"),
        scores: get(&goldens, "scores"),
        token_types: get(&goldens, "types"),
        bos: get(&goldens, "bos"),
        eos: get(&goldens, "eos"),
        unk: get(&goldens, "unk"),
        ..GgufTokenizer::default()
    }
}

#[test]
fn sentencepiece_goldens() {
    let goldens = spm_goldens();
    let tokenizer = gguf(spm_keys()).unwrap();
    assert_eq!(tokenizer.end_of_generation(), [tokenizer.eos().unwrap()]);
    let encode = goldens["encode"].as_array().unwrap();
    assert!(encode.len() >= 30);
    for golden in encode {
        let (text, ids): (String, Vec<u32>) = (get(golden, "text"), get(golden, "ids"));
        assert_eq!(tokenizer.encode(&text, false).unwrap(), ids, "{text:?}");
        let with_bos = [&[tokenizer.bos().unwrap()], &ids[..]].concat();
        assert_eq!(tokenizer.encode(&text, true).unwrap(), with_bos);
        let expected: String = get(golden, "decoded");
        for ids in [ids, with_bos] {
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), expected, "{text:?}");
            assert_eq!(streamed(&tokenizer, &ids, true), expected, "{text:?}");
        }
    }
    for golden in goldens["decode"].as_array().unwrap() {
        let (ids, expected): (Vec<u32>, String) = (get(golden, "ids"), get(golden, "decoded"));
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), expected, "{ids:?}");
        assert_eq!(streamed(&tokenizer, &ids, true), expected, "{ids:?}");
    }
}

#[test]
fn sentencepiece_special_tokens() {
    let mut keys = spm_keys();
    let joined = keys.tokens.iter().position(|t| t == "ing").unwrap();
    keys.token_types[joined] = 4;
    let tokenizer = gguf(keys.clone()).unwrap();
    let encode = |text: &str| tokenizer.encode(text, false).unwrap();
    let (bos, eos) = (tokenizer.bos().unwrap(), tokenizer.eos().unwrap());
    assert_eq!(
        encode("<s>river</s></s> the"),
        [&[bos], &encode("river")[..], &[eos, eos], &encode(" the")].concat()
    );
    assert_eq!(tokenizer.decode(&encode("<s>river</s>"), false).unwrap(), "<s> river</s>");
    assert_eq!(tokenizer.decode(&encode("<s>river</s>"), true).unwrap(), "river");
    // A user-defined token is cut out first and never joined, and it is part of the text.
    assert_eq!(encode("rising"), [&encode("ris")[..], &[joined as u32]].concat());
    assert_eq!(tokenizer.decode(&encode("rising"), true).unwrap(), "rising");

    keys.add_bos = Some(false);
    keys.add_eos = Some(true);
    keys.add_space_prefix = Some(false);
    let tokenizer = gguf(keys.clone()).unwrap();
    let ids = tokenizer.encode("the", true).unwrap();
    assert_eq!(ids.last(), tokenizer.eos().as_ref());
    assert!("the".starts_with(&tokenizer.token(ids[0]).unwrap()));
    assert_eq!(tokenizer.decode(&tokenizer.encode(" the", false).unwrap(), true).unwrap(), " the");

    // Without bytes, a run of unknown characters is one unknown token; without that, an error.
    for token in keys.token_types.iter_mut().filter(|kind| **kind == 6) {
        *token = 5;
    }
    let tokenizer = gguf(keys.clone()).unwrap();
    assert_eq!(
        tokenizer.encode("日本 日", false).unwrap().iter().filter(|&&id| Some(id) == keys.unk).count(),
        2
    );
    keys.unk = None;
    let error = gguf(keys).unwrap().encode("日", false).unwrap_err();
    assert!(matches!(error, TokenizerError::Unencodable(_)), "{error}");
}

#[test]
fn a_continuation_keeps_its_first_space() {
    let tokenizer = gguf(spm_keys()).unwrap();
    let prompt = tokenizer.encode("The river", true).unwrap();
    let answer = tokenizer.encode("rises", false).unwrap();
    let mut stream = tokenizer.decode_stream_after(&prompt, true).unwrap();
    let text: String = answer.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(text, " rises");
    assert_eq!(streamed(&tokenizer, &answer, true), "rises");
    // A character begun by the prompt is ended by the answer.
    let bytes: Vec<u32> = "é".bytes().map(|b| tokenizer.id(&format!("<0x{b:02X}>")).unwrap()).collect();
    let mut stream = tokenizer.decode_stream_after(&bytes[..1], true).unwrap();
    assert_eq!(stream.push(bytes[1]).unwrap().as_deref(), Some("é"));
    assert!(tokenizer.decode_stream_after(&[u32::MAX], true).is_err());
}

/// transformers' conversion of a SentencePiece model to a `tokenizer.json`, and other decoders.
#[test]
fn sentencepiece_as_tokenizer_json() {
    let goldens = spm_goldens();
    let tokens: Vec<String> = get(&goldens, "tokens");
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), id.into())).collect();
    let added = |id: usize| {
        serde_json::json!({"id": id, "content": tokens[id], "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    };
    let replace = serde_json::json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
    let strip = serde_json::json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
    let (fallback, fuse) = (serde_json::json!({"type": "ByteFallback"}), serde_json::json!({"type": "Fuse"}));
    let dir = tempfile::tempdir().unwrap();
    let write = |decoder: Value| {
        let file = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [added(0), added(1), added(2)],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "decoder": decoder,
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab, "merges": []},
        });
        std::fs::write(dir.path().join("tokenizer.json"), file.to_string()).unwrap();
        open(TokenizerSource::Hf { dir: dir.path().into() }, tokens.len()).unwrap()
    };
    let llama = write(serde_json::json!({"type": "Sequence", "decoders": [replace, fallback, fuse, strip]}));
    assert!(matches!(llama.decoder, Decoder::Pieces(_)));
    for golden in ["encode", "decode"].iter().flat_map(|key| goldens[key].as_array().unwrap()) {
        let (ids, expected): (Vec<u32>, String) = (get(golden, "ids"), get(golden, "decoded"));
        assert_eq!(llama.decode(&ids, true).unwrap(), expected);
        assert_eq!(streamed(&llama, &ids, true), expected);
    }
    assert_eq!(llama.bos(), None);
    assert_eq!(llama.end_of_generation(), [2]);

    // A decoder that the table can't express: the library's.
    for decoder in [
        serde_json::json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}),
        Value::Null,
    ] {
        let other = write(decoder);
        assert!(matches!(other.decoder, Decoder::Library));
        for golden in goldens["encode"].as_array().unwrap() {
            let ids: Vec<u32> = get(golden, "ids");
            assert_eq!(streamed(&other, &ids, true), other.decode(&ids, true).unwrap());
        }
        assert!(matches!(other.decode(&[u32::MAX], true), Err(TokenizerError::UnknownId { .. })));
    }
}

#[test]
fn chat_templates_and_ends_of_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let open = || open(TokenizerSource::Hf { dir: dir.path().into() }, 320);
    std::fs::copy(Path::new(TOKENIZER_A).join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();

    let bare = open().unwrap();
    assert_eq!((bare.bos(), bare.eos(), bare.chat_template()), (None, None, None));
    assert_eq!(bare.end_of_generation(), [313, 318, 319]);
    assert!(matches!(ChatTemplate::of(&bare), Err(ChatError::NoTemplate)));
    // The post-processor still puts BOS in front.
    assert_eq!(bare.encode("", true).unwrap(), [312]);

    write("config.json", r#"{"eos_token_id": 315}"#);
    write("generation_config.json", r#"{"eos_token_id": [313, 317, 99999, -1, "x"]}"#);
    write(
        "special_tokens_map.json",
        r#"{"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot_id|>"}}"#,
    );
    write(
        "tokenizer_config.json",
        r#"{"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]}"#,
    );
    let full = open().unwrap();
    assert_eq!((full.bos(), full.eos(), full.chat_template()), (Some(312), Some(319), Some("d")));
    assert_eq!(full.end_of_generation(), [313, 315, 317, 318, 319]);

    write("chat_template.jinja", "file");
    assert_eq!(open().unwrap().chat_template(), Some("file"));

    write("tokenizer_config.json", "{");
    assert!(open().unwrap_err().to_string().contains("tokenizer_config.json"));
}

#[test]
fn what_is_wrong_with_a_directory_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let message = |text: Option<&str>| {
        let file = dir.path().join("tokenizer.json");
        match text {
            Some(text) => std::fs::write(file, text).unwrap(),
            None => drop(std::fs::remove_file(file)),
        }
        open(TokenizerSource::Hf { dir: dir.path().into() }, 320).unwrap_err().to_string()
    };
    assert!(message(None).ends_with("there is no tokenizer.json"));
    std::fs::write(dir.path().join("tokenizer.model"), "").unwrap();
    assert!(message(None).contains("tokenizer.model alone is not supported"));
    for text in ["", "{}", "[]", "\u{fffd}", r#"{"version": "2.0"}"#] {
        let message = message(Some(text));
        assert!(message.contains("tokenizer.json is not valid"), "{message}");
    }
    // The library panics over a merge that is longer than every token, and over what else we don't know.
    let long = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
        "pre_tokenizer":null,"post_processor":null,"decoder":null,
        "model":{"type":"BPE","vocab":{"aa":0,"bb":1},"merges":[["aa","bb"]]}}"#;
    assert!(message(Some(long)).contains("tokenizer.json is not valid"));
}

#[test]
fn what_is_wrong_with_gguf_keys_is_said() {
    use VocabularyError as E;
    let edit = |edit: fn(&mut GgufTokenizer)| {
        let mut keys = keys_a();
        edit(&mut keys);
        problem(keys)
    };
    assert!(matches!(edit(|k| k.model = None), E::Missing("tokenizer.ggml.model")));
    assert!(matches!(edit(|k| k.model = Some("bert".into())), E::Model(m) if m == "bert"));
    assert!(matches!(edit(|k| k.tokens.clear()), E::Missing("tokenizer.ggml.tokens")));
    assert!(matches!(edit(|k| k.token_types.truncate(9)), E::Length { found: 9, tokens: 320, .. }));
    assert!(matches!(edit(|k| k.scores = vec![0.0; 321]), E::Length { found: 321, .. }));
    assert!(matches!(edit(|k| k.tokens[7] = "!".into()), E::Duplicate { first: 0, second: 7, .. }));
    assert!(matches!(edit(|k| k.token_types[5] = 6), E::Byte { id: 5, .. }));
    assert!(matches!(edit(|k| k.merges[3] = "nospace".into()), E::Merge { rank: 3, .. }));
    assert!(matches!(edit(|k| k.merges[3] = "a zzz".into()), E::Merge { rank: 3, .. }));
    assert!(matches!(edit(|k| k.merges[3] = "z z".into()), E::Merge { rank: 3, .. }));
    assert!(matches!(edit(|k| k.merges[3] = String::new()), E::Merge { rank: 3, .. }));
    assert!(matches!(edit(|k| (k.add_bos, k.bos) = (Some(true), None)), E::NoEnd { .. }));
    assert!(matches!(edit(|k| (k.add_eos, k.eos) = (Some(true), Some(320))), E::NoEnd { .. }));
    let missing = edit(|k| k.pre = None);
    assert!(matches!(missing, E::MissingPre { tokens: 320 }) && missing.to_string().contains("--pre"));
    let unknown = edit(|k| k.pre = Some("no-such".into()));
    assert!(matches!(&unknown, E::UnknownPre { pre: name, same: None } if name == "no-such"));
    assert!(unknown.to_string().contains("llama-bpe") && unknown.to_string().contains("qwen2"));
    let message = gguf(GgufTokenizer { pre: None, ..keys_a() }).unwrap_err().to_string();
    assert!(message.starts_with("the tokenizer in a.gguf: "), "{message}");

    let spm = |edit: fn(&mut GgufTokenizer)| {
        let mut keys = spm_keys();
        edit(&mut keys);
        problem(keys)
    };
    assert!(matches!(spm(|k| k.scores.clear()), E::Missing("tokenizer.ggml.scores")));
    assert!(matches!(spm(|k| k.scores[300] = f32::NAN), E::Score { id: 300, .. }));
    assert!(matches!(spm(|k| k.tokens[301] = k.tokens[300].clone()), E::Duplicate { .. }));
}

/// The name that Falcon-E's own files and bitnet.cpp's converter write.
#[test]
fn falcon_e_is_llama_bpe() {
    let [_, llama] = tokenizers_a();
    let falcon = gguf(GgufTokenizer { pre: Some("falcon_e".into()), ..keys_a() }).unwrap();
    assert_eq!(falcon.encode("Hello", true).unwrap(), [312, 39, 68, 75, 75, 78]);
    for golden in goldens_a()["encode"].as_array().unwrap() {
        let text: String = get(golden, "text");
        assert_eq!(falcon.encode(&text, true).unwrap(), llama.encode(&text, true).unwrap(), "{text:?}");
    }
}

#[test]
fn an_unknown_pre_tokenizer_is_told_by_the_models_own_file() {
    let file = json(Path::new(TOKENIZER_A).join("tokenizer.json")).to_string();
    let mut keys = GgufTokenizer { pre: Some("new".into()), tokenizer_json: Some(file), ..keys_a() };
    let error = problem(keys.clone());
    assert!(matches!(&error, VocabularyError::UnknownPre { same: Some("llama-bpe"), .. }));
    assert!(error.to_string().ends_with("pass --pre llama-bpe"), "{error}");
    // Who does that has the tokens.
    keys.pre = Some("llama-bpe".into());
    assert_eq!(gguf(keys.clone()).unwrap().encode("Hello", true).unwrap(), [312, 39, 68, 75, 75, 78]);
    keys.pre = Some("new".into());
    for other in ["", "{", "{}", r#"{"pre_tokenizer": {"type": "Whitespace"}}"#] {
        keys.tokenizer_json = Some(other.into());
        let error = problem(keys.clone());
        assert!(matches!(&error, VocabularyError::UnknownPre { same: None, .. }), "{other}: {error}");
    }
}

/// Files of converters that do not know the added tokens, or that write no types at all.
#[test]
fn control_tokens_of_type_normal_are_recognised_or_named() {
    let chat = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>";
    let [_, right] = tokenizers_a();
    let expected = right.encode(chat, false).unwrap();
    assert_eq!((expected[0], expected.last()), (316, Some(&319)));

    let mut keys = keys_a();
    for id in [316, 317, 319] {
        keys.token_types[id] = 1;
    }
    let tokenizer = gguf(keys.clone()).unwrap();
    // The end of a turn is known by its text, as in llama.cpp ...
    assert_eq!(tokenizer.end_of_generation(), [313, 318, 319]);
    let ids = tokenizer.encode(chat, false).unwrap();
    assert_eq!(ids.last(), Some(&319));
    assert_eq!(tokenizer.decode(&[64, 319], true).unwrap(), "a");
    // ... the others are not, and the template has them.
    assert_ne!(ids[0], 316);
    let [by_text, markers] = tokenizer.warnings() else { panic!("{:?}", tokenizer.warnings()) };
    assert!(by_text.starts_with("`<|eot_id|>` is not of type control"), "{by_text}");
    assert!(markers.contains("writes `<|start_header_id|>`, `<|end_header_id|>`, which"), "{markers}");

    keys.token_types.clear();
    let tokenizer = gguf(keys.clone()).unwrap();
    assert_eq!(tokenizer.end_of_generation(), [313, 318, 319]);
    let [by_text, markers] = tokenizer.warnings() else { panic!("{:?}", tokenizer.warnings()) };
    assert!(by_text.contains("`<|end_of_text|>`, `<|eom_id|>`, `<|eot_id|>` are not"), "{by_text}");
    // The template writes its `bos_token`, too.
    for marker in ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"] {
        assert!(markers.contains(&format!("`{marker}`")), "{markers}");
    }
    // The copy in the other kind of file cuts the same text into the same tokens.
    let config = crate::synth::shape("tiny").unwrap();
    let config = bitnet_burn::ModelConfig { vocab_size: 320, ..config };
    let files = translate::to_hf(&keys, &config).unwrap();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), files.tokenizer).unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), files.config.to_string()).unwrap();
    let copy = open(TokenizerSource::Hf { dir: dir.path().into() }, 320).unwrap();
    assert_eq!(translate::disagreement(&tokenizer, &copy).unwrap(), None);

    // Without a template nothing is written that could be lost, and what merges make whole is not.
    keys.chat_template = None;
    assert_eq!(gguf(keys.clone()).unwrap().warnings().len(), 1);
    keys.chat_template = Some("{{ messages[0]['content'] }}[]<>".into());
    assert_eq!(gguf(keys).unwrap().warnings().len(), 1);
}

#[test]
fn sizes_that_differ() {
    let small = open(TokenizerSource::Gguf(Box::new(keys_a())), 300).unwrap();
    assert_eq!(small.warnings().len(), 3, "{:?}", small.warnings());
    assert_eq!(small.encode("a", true).unwrap(), [64]);
    let error = small.encode("<|eot_id|>", false).unwrap_err();
    assert!(matches!(error, TokenizerError::BeyondModel { id: 319, .. }), "{error}");
    assert!(matches!(small.decode(&[300], false), Err(TokenizerError::UnknownId { id: 300, .. })));
    let small = open(TokenizerSource::Hf { dir: TOKENIZER_A.into() }, 300).unwrap();
    assert_eq!((small.bos(), small.warnings().len()), (None, 1));
    assert!(small.encode("a", true).is_err());

    // Rows of the embedding without a token.
    for source in [TokenizerSource::Gguf(Box::new(keys_a())), TokenizerSource::Hf { dir: TOKENIZER_A.into() }]
    {
        let large = open(source, 400).unwrap();
        assert_eq!(large.decode(&[64, 399, 64], false).unwrap(), "aa");
        assert_eq!(large.token(399), None);
    }
    let mut keys = keys_a();
    keys.tokens.extend([String::new(), String::new()]);
    keys.token_types.extend([1, 4]);
    assert_eq!(gguf(keys).unwrap().decode(&[64, 320, 321], false).unwrap(), "a");
}

#[test]
fn a_missing_pre_tokenizer_is_guessed_for_llama_3_only() {
    let mut keys = keys_a();
    keys.pre = None;
    keys.tokens.extend((320..128_256).map(|id| format!("<|reserved_{id}|>")));
    keys.token_types.resize(128_256, 3);
    let tokenizer = gguf(keys.clone()).unwrap();
    assert!(tokenizer.warnings()[0].contains("llama-bpe"), "{:?}", tokenizer.warnings());
    assert_eq!(tokenizer.encode("Hello", true).unwrap()[0], 312);
    // Named, it is not guessed; "default" adds no BOS unless the file says so.
    keys.pre = Some("default".into());
    let tokenizer = gguf(keys).unwrap();
    assert_eq!(tokenizer.warnings(), [""; 0]);
    assert_eq!(tokenizer.encode("a", true).unwrap(), [64]);
}

static A: LazyLock<[Tokenizer; 2]> = LazyLock::new(tokenizers_a);
static SPM: LazyLock<Tokenizer> = LazyLock::new(|| gguf(spm_keys()).unwrap());

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn text_survives(text in "(\\PC|[ \n\t]|<\\|eot_id\\|>|</s>|▁){0,30}") {
        for tokenizer in &*A {
            let ids = tokenizer.encode(&text, false).unwrap();
            prop_assert_eq!(&tokenizer.decode(&ids, false).unwrap(), &text);
            prop_assert_eq!(&streamed(tokenizer, &ids, false), &text);
        }
    }

    #[test]
    fn streams_are_decode_in_pieces(ids in prop::collection::vec(0u32..320, 0..40), skip in any::<bool>(), cut in 0usize..40) {
        for tokenizer in A.iter().chain([&*SPM]) {
            let whole = tokenizer.decode(&ids, skip).unwrap();
            prop_assert_eq!(&streamed(tokenizer, &ids, skip), &whole);
            let (before, after) = ids.split_at(cut.min(ids.len()));
            let mut stream = tokenizer.decode_stream_after(before, skip).unwrap();
            let mut text = String::new();
            for &id in after {
                text.extend(stream.push(id).unwrap());
            }
            text.extend(stream.flush().unwrap());
            prop_assert!(whole.ends_with(&text));
        }
    }
}

/// A vocabulary of LLaMA 3's size is built in well under a second (release; printed, not asserted).
#[test]
#[ignore = "a measurement"]
fn building_a_large_vocabulary() {
    let mut keys = keys_a();
    let letters: Vec<char> = ('a'..='z').collect();
    let mut last = vec![String::new()];
    let known: std::collections::HashSet<String> = keys.tokens.iter().cloned().collect();
    while keys.tokens.len() < 128_256 {
        let mut next = Vec::new();
        for prefix in &last {
            for c in &letters {
                let token = format!("{prefix}{c}");
                for at in 1..token.len().min(4) {
                    keys.merges.push(format!("{} {}", &token[..at], &token[at..]));
                }
                if !known.contains(&token) && keys.tokens.len() < 128_256 {
                    keys.tokens.push(token.clone());
                    keys.token_types.push(1);
                }
                next.push(token);
            }
        }
        last = next;
    }
    let have: std::collections::HashSet<&String> = keys.tokens.iter().collect();
    keys.merges.retain(|m| have.contains(&m.replace(' ', "")));
    keys.merges.truncate(280_147);
    let start = std::time::Instant::now();
    let tokenizer = gguf(keys.clone()).unwrap();
    println!("{} tokens, {} merges: {:?}", keys.tokens.len(), keys.merges.len(), start.elapsed());
    let text = "the quick brown fox jumps over the lazy dog ".repeat(2000);
    let start = std::time::Instant::now();
    let ids = tokenizer.encode(&text, true).unwrap();
    println!("{} bytes to {} tokens: {:?}", text.len(), ids.len(), start.elapsed());
}

#[test]
fn tokenizers_can_be_shared() {
    fn shared<T: Send + Sync>(_: &T) {}
    let [tokenizer, _] = tokenizers_a();
    shared(&tokenizer);
    shared(&tokenizer.decode_stream(true));
    let path = PathBuf::from(TOKENIZER_A);
    assert!(format!("{tokenizer:?}").contains("320"), "{path:?}");
}
