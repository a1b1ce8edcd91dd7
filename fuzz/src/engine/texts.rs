//! Tokenizers and chat templates of any bytes.

use bitnet_burn_engine::chat::{ChatTemplate, Message, TemplateTokens};
use bitnet_burn_engine::checkpoint::TokenizerSource;
use bitnet_burn_engine::tokenizer::Tokenizer;

/// Encodes and decodes: ids are the model's, and token by token the text is the same as at once.
pub fn speak(tokenizer: &Tokenizer) {
    for text in ["Hello world", "  a\u{df}\n1234 \u{1f600}</s>", ""] {
        let Ok(ids) = tokenizer.encode(text, true) else { continue };
        assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
        for skip_special in [false, true] {
            let Ok(whole) = tokenizer.decode(&ids, skip_special) else { continue };
            let mut stream = tokenizer.decode_stream(skip_special);
            let mut parts = String::new();
            for &id in &ids {
                parts.extend(stream.push(id).expect("the ids decode at once"));
            }
            parts.extend(stream.flush().expect("the ids decode at once"));
            assert_eq!(parts, whole);
        }
    }
    tokenizer.template_tokens();
}

/// Whether the bytes are a `tokenizer.json`.
pub fn tokenizer(data: &[u8]) -> bool {
    let dir = tempfile::tempdir().expect("a temporary directory");
    std::fs::write(dir.path().join("tokenizer.json"), data).expect("the file is written");
    let source = TokenizerSource::Hf { dir: dir.path().to_owned() };
    Tokenizer::from_source(&source, 512).inspect(speak).is_ok()
}

/// Whether the bytes are a chat template that renders.
pub fn template(data: &[u8]) -> bool {
    let Ok(source) = std::str::from_utf8(data) else { return false };
    let messages = [
        Message::new("system", "Be <brief>."),
        Message::new("user", "Hi \"there\"\n"),
        Message::new("assistant", "42"),
        Message::new("user", ""),
    ];
    let tokens = TemplateTokens { bos_token: Some("<s>".into()), ..TemplateTokens::default() };
    let rendered = ChatTemplate::new(source).and_then(|template| template.render(&messages, &tokens, true));
    if let Err(error) = &rendered {
        // A panic on the template's own thread is an error with these words.
        assert!(!error.to_string().contains("panicked"), "{error}");
    }
    rendered.is_ok()
}
