//! Supervised fine-tuning: conversations, of which a model learns the assistant's part alone.

use std::ops::Range;

use bitnet_burn_engine::chat::{ChatTemplate, Message};
use bitnet_burn_engine::checkpoint::TokenizerSource;
use bitnet_burn_engine::tokenizer::{TemplateTokens, Tokenizer};

use crate::origin::TokenizerFiles;
use crate::{TrainError, Window};

/// How a model writes conversations.
pub(crate) struct Chat {
    template: ChatTemplate,
    tokens: TemplateTokens,
    tokenizer: tokenizers::Tokenizer,
}

impl Chat {
    /// The template among a tokenizer's files.
    pub fn of(files: &TokenizerFiles, vocab_size: usize) -> Result<Self, TrainError> {
        let wrong = |problem: String| TrainError::Tokenizer { problem };
        let dir =
            tempfile::tempdir().map_err(TrainError::io(&std::env::temp_dir(), "make a directory in it"))?;
        for (name, bytes) in files {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).map_err(TrainError::io(&path, "write"))?;
        }
        let source = TokenizerSource::Hf { dir: dir.path().to_owned() };
        let tokenizer =
            Tokenizer::from_source(&source, vocab_size).map_err(|error| wrong(error.to_string()))?;
        let template = ChatTemplate::of(&tokenizer).map_err(|error| {
            wrong(format!("{error}; conversations need one: give a file with `data.chat_template`"))
        })?;
        let json = files.first().map(|(_, bytes)| &bytes[..]).unwrap_or_default();
        let library = tokenizers::Tokenizer::from_bytes(json).map_err(|error| wrong(error.to_string()))?;
        Ok(Self { template, tokens: tokenizer.template_tokens(), tokenizer: library })
    }

    /// A conversation as a sequence, cut at `length` tokens, in which the assistant's tokens count; `None` if nothing of them
    /// is left. `number` is the conversation's, for errors.
    pub fn window(&self, json: &str, number: usize, length: usize) -> Result<Option<Window>, TrainError> {
        let wrong = |problem: String| TrainError::Conversation { number, problem };
        let messages: Vec<Message> = serde_json::from_str(json).map_err(|error| {
            wrong(format!("its messages are no list of objects with the texts `role` and `content`: {error}"))
        })?;
        let (text, spans) = self.text(&messages).map_err(wrong)?;
        let encoding = self.tokenizer.encode(text, false).map_err(|error| wrong(error.to_string()))?;
        let counts: Vec<bool> = encoding
            .get_offsets()
            .iter()
            .map(|&(start, end)| {
                spans.iter().any(|span| span.start <= start && end <= span.end && start < end)
            })
            .collect();
        let ids = encoding.get_ids();
        if ids.len() < 2 {
            return Ok(None);
        }
        let end = (ids.len() - 1).min(length);
        let mut inputs = ids[..end].to_vec();
        inputs.resize(length, ids[0]);
        let window = Window { inputs, targets: ids[1..=end].to_vec(), counts: counts[1..=end].to_vec() };
        Ok(window.counts.contains(&true).then_some(window))
    }

    /// The text of a conversation, and where in it the assistant speaks: from behind what begins its answer to the end of
    /// its turn.
    fn text(&self, messages: &[Message]) -> Result<(String, Vec<Range<usize>>), String> {
        let render = |messages: &[Message], answer: bool| {
            self.template.render(messages, &self.tokens, answer).map_err(|error| error.to_string())
        };
        let text = render(messages, false)?;
        let mut spans = Vec::new();
        for (i, message) in messages.iter().enumerate() {
            if message.role != "assistant" {
                continue;
            }
            let (before, behind) = (render(&messages[..i], true)?, render(&messages[..=i], false)?);
            if !behind.starts_with(&before) || !text.starts_with(&behind) {
                return Err(format!(
                    "the template writes the messages before message {} in another way when more follow, so that the \
                     assistant's part can't be told apart",
                    i + 1
                ));
            }
            spans.push(before.len()..behind.len());
        }
        if spans.is_empty() {
            return Err("the assistant says nothing in it".into());
        }
        Ok((text, spans))
    }
}
