//! From tokens to text, as it becomes certain.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::{Finish, GenerateError, Generation, Generator, Step};
use crate::sampling::StopMatcher;
use crate::tokenizer::{DecodeStream, Tokenizer};

/// The text of a generation, as it becomes certain: never half a character, and never a part of what turns out to be a
/// stop string. Special tokens are not shown.
///
/// It is an iterator over pieces of text. [`next_async`](Self::next_async) is for asynchronous callers.
#[derive(Debug)]
pub struct TextGenerator<'a> {
    tokens: Generator<'a>,
    decoder: DecodeStream<'a>,
    stops: StopMatcher,
    /// The end of the text was given, or an error.
    over: bool,
    /// Ends the generation when it is set.
    cancelled: Option<Arc<AtomicBool>>,
}

impl<'a> TextGenerator<'a> {
    /// The text of a generation; `prompt` is what that continues.
    ///
    /// # Errors
    /// If a stop string is empty, or the prompt has a token that the tokenizer lacks.
    pub fn new(
        tokens: Generator<'a>,
        tokenizer: &'a Tokenizer,
        prompt: &[u32],
    ) -> Result<Self, GenerateError> {
        let decoder = tokenizer.decode_stream_after(prompt, true)?;
        let stops = StopMatcher::new(&tokens.options.stop_strings)?;
        Ok(Self { tokens, decoder, stops, over: false, cancelled: None })
    }

    /// The text that a step makes certain, which may be none.
    fn text_of(&mut self, step: &Step) -> Result<Option<String>, GenerateError> {
        let (text, last) = match step {
            Step::Prompt { .. } => return Ok(None),
            Step::Token(token) => (self.decoder.push(*token)?, false),
            Step::Finished(Finish::Cancelled | Finish::StopString) => {
                self.over = true;
                return Ok(None);
            }
            Step::Finished(_) => (self.decoder.flush()?, true),
        };
        self.over = last;
        let mut shown = String::new();
        if let Some(text) = text {
            let output = self.stops.push(&text);
            shown = output.text;
            if output.stopped.is_some() {
                self.tokens.finish(Finish::StopString);
                self.over = true;
            }
        }
        if last && self.stops.stopped().is_none() {
            shown.push_str(&self.stops.flush());
        }
        Ok(Some(shown).filter(|text| !text.is_empty()))
    }

    /// The next piece of text; `None` at the end.
    ///
    /// # Errors
    /// If the model or the sampler fails, or a token can't be decoded. Nothing follows then.
    pub async fn next_async(&mut self) -> Option<Result<String, GenerateError>> {
        while !self.over {
            self.heed_flag();
            let step = self.tokens.step_async().await;
            if let Some(text) = self.take(step) {
                return Some(text);
            }
        }
        None
    }

    fn take(&mut self, step: Result<Step, GenerateError>) -> Option<Result<String, GenerateError>> {
        let clock = Instant::now();
        let text = step.and_then(|step| self.text_of(&step)).transpose();
        *self.tokens.generation.detokenisation.get_or_insert_default() += clock.elapsed();
        self.over |= matches!(text, Some(Err(_)));
        text
    }

    /// Ends the generation. What was generated stays.
    pub fn cancel(&mut self) {
        self.tokens.cancel();
    }

    /// Ends the generation before the next step once this is set.
    pub(crate) fn cancel_when(&mut self, flag: Arc<AtomicBool>) {
        self.cancelled = Some(flag);
    }

    fn heed_flag(&mut self) {
        if self.cancelled.as_ref().is_some_and(|flag| flag.load(Ordering::Relaxed)) {
            self.tokens.cancel();
        }
    }

    /// What was generated so far.
    pub fn generation(&self) -> &Generation {
        self.tokens.generation()
    }

    /// What was generated.
    pub fn into_generation(self) -> Generation {
        self.tokens.into_generation()
    }
}

impl Iterator for TextGenerator<'_> {
    type Item = Result<String, GenerateError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.over {
            self.heed_flag();
            let step = self.tokens.step();
            if let Some(text) = self.take(step) {
                return Some(text);
            }
        }
        None
    }
}
