//! The tokens of a chat, turn by turn.
//!
//! A template renders the whole chat for each turn. The same text has many spellings in tokens, and a model may have answered
//! in another one than the tokenizer's. What the KV cache holds is the model's spelling, so that one is kept: otherwise each
//! turn would compute the answers before it again.

use crate::generate::GenerateError;
use crate::tokenizer::Tokenizer;

/// A chat's rendered text and its tokens.
#[derive(Debug, Default)]
pub(super) struct Transcript {
    text: String,
    tokens: Vec<u32>,
    /// Places, ascending, at which a beginning of `text` ends and so many of `tokens` spell it: prompts and answers.
    marks: Vec<Mark>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Mark {
    bytes: usize,
    tokens: usize,
}

impl Transcript {
    /// The tokens of `rendered`. What it has in common with the chat so far keeps its spelling.
    ///
    /// # Arguments
    /// - `held`: the tokens of the last generation, prompt and answer
    /// - `said`: the last message of the chat but the new one, which may be that answer
    pub(super) fn prompt(
        &mut self,
        rendered: &str,
        held: &[u32],
        said: Option<&str>,
        tokenizer: &Tokenizer,
    ) -> Result<Vec<u32>, GenerateError> {
        if let (Some(rest), Some(answer)) =
            (rendered.strip_prefix(&*self.text), held.strip_prefix(&*self.tokens))
        {
            let spelled = self.spelled(rest, answer, said, tokenizer)?;
            self.text.push_str(&rest[..spelled.bytes]);
            self.tokens.extend_from_slice(&answer[..spelled.tokens]);
            self.mark();
        }
        let whole = tokenizer.encode(rendered, false)?;
        let mut common = Mark::default();
        let mut new = &whole[..];
        while let Some(&mark) = self.marks.last() {
            // A token may reach over the place: then it is none to cut at.
            if rendered.starts_with(&self.text[..mark.bytes])
                && let Some(rest) = whole.strip_prefix(&*tokenizer.encode(&rendered[..mark.bytes], false)?)
            {
                (common, new) = (mark, rest);
                break;
            }
            self.marks.pop();
        }
        self.text.truncate(common.bytes);
        self.text.push_str(&rendered[common.bytes..]);
        self.tokens.truncate(common.tokens);
        self.tokens.extend_from_slice(new);
        self.mark();
        Ok(self.tokens.clone())
    }

    /// How much of `rest`, the text behind the last prompt, the first tokens of its answer spell.
    fn spelled(
        &self,
        rest: &str,
        answer: &[u32],
        said: Option<&str>,
        tokenizer: &Tokenizer,
    ) -> Result<Mark, GenerateError> {
        let mut decoder = tokenizer.decode_stream_after(&self.tokens, false)?;
        let mut text = String::new();
        let mut longest = Mark::default();
        for (i, &token) in answer.iter().enumerate() {
            if let Some(piece) = decoder.push(token)? {
                text.push_str(&piece);
                if rest.starts_with(&*text) {
                    longest = Mark { bytes: text.len(), tokens: i + 1 };
                }
            }
        }
        text.extend(decoder.flush()?);
        // Many templates trim an answer.
        let trimmed = text.trim();
        let is_said = !trimmed.is_empty() && said.is_some_and(|said| said.trim() == trimmed);
        let bytes = match () {
            () if rest.starts_with(&*text) => text.len(),
            () if is_said && rest.starts_with(trimmed) => trimmed.len(),
            () => return Ok(longest),
        };
        Ok(Mark { bytes, tokens: answer.len() })
    }

    /// Marks the end.
    fn mark(&mut self) {
        self.marks.push(Mark { bytes: self.text.len(), tokens: self.tokens.len() });
    }
}
