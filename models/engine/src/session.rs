//! A session: prompts, or the turns of a chat, over one KV cache.

mod transcript;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bitnet_burn::{KvCache, SequenceId};

use self::transcript::Transcript;
use crate::chat::{ChatTemplate, Message};
use crate::engine::{Engine, EngineError};
use crate::generate::{GenerateError, GenerateOptions, Generation, Generator, TextGenerator};
use crate::report::RunReport;
use crate::speculate::{DEFAULT_DRAFT, Guesses, Speculation};

/// Prompts, or the turns of a chat, over one KV cache. What a prompt has in common with what the cache holds is not
/// computed again; the results are the same, bit for bit.
#[derive(Debug)]
pub struct Session {
    engine: Engine,
    cache: KvCache,
    sequence: Option<SequenceId>,
    /// The tokens that the cache holds.
    tokens: Vec<u32>,
    messages: Vec<Message>,
    transcript: Transcript,
    template: Option<ChatTemplate>,
    sliding: bool,
    certain: Certain,
    speculation: Option<Speculation>,
    guesses: Guesses,
}

/// Which positions of the cache hold no result of a plugin that nothing compared. They stay when results come into doubt.
#[derive(Clone, Copy, Debug, Default)]
struct Certain {
    /// Positions from the first one on.
    positions: usize,
    /// All that the cache held when the manager's counts were these: unchecked results, and those in doubt.
    held: usize,
    unchecked: u64,
    in_doubt: u64,
}

impl Certain {
    /// Of `length` positions that the cache holds, those that may be kept, now that the counts are these.
    fn keep(&mut self, length: usize, (unchecked, in_doubt): (u64, u64)) -> usize {
        if unchecked == self.unchecked && self.positions == self.held {
            self.positions = length;
        }
        let kept = if in_doubt == self.in_doubt { length } else { self.positions.min(length) };
        (self.unchecked, self.in_doubt) = (unchecked, in_doubt);
        kept
    }

    /// The cache was cut to `length` positions.
    fn cut(&mut self, length: usize) {
        self.positions = self.positions.min(length);
        self.held = length;
    }
}

impl Session {
    pub(crate) fn new(engine: Engine, cache: KvCache) -> Result<Self, EngineError> {
        let draft = if engine.draft_model().is_some() { DEFAULT_DRAFT } else { 0 };
        Self {
            engine,
            cache,
            sequence: None,
            tokens: Vec::new(),
            messages: Vec::new(),
            transcript: Transcript::default(),
            template: None,
            sliding: false,
            certain: Certain::default(),
            speculation: None,
            guesses: Guesses::default(),
        }
        .draft(draft)
    }

    /// Guesses at most so many tokens ahead ([`speculate`](crate::speculate)); 0: none. Without this, a session guesses if its
    /// engine has a draft model. On GPUs, in models with gated DeltaNets and in sliding windows nothing is guessed.
    ///
    /// # Errors
    /// If the device of the draft model does not support its KV cache's type.
    pub fn draft(mut self, most: usize) -> Result<Self, EngineError> {
        let most = if self.sliding || self.cache.needs_snapshots() { 0 } else { most };
        self.speculation = Speculation::new(&self.engine, most)?;
        self.guesses = Guesses::default();
        Ok(self)
    }

    /// Takes the KV cache's memory for the whole context now, so that nothing grows later.
    ///
    /// # Errors
    /// If there is no room for it.
    pub fn preallocated(mut self) -> Result<Self, EngineError> {
        self.engine.check_room(1, self.engine.settings().context)?;
        self.cache = self.cache.preallocated();
        Ok(self)
    }

    /// When the context is full, the oldest eighth is forgotten instead of ending the generation.
    pub fn sliding(mut self) -> Self {
        self.cache = self.cache.sliding();
        self.sliding = true;
        self.speculation = None;
        self
    }

    /// Uses this chat template in place of the model's.
    pub fn with_template(mut self, template: ChatTemplate) -> Self {
        self.template = Some(template);
        self
    }

    /// Bytes of the KV cache.
    pub fn cache_bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// The messages of the chat so far.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Forgets all messages, and what the cache holds with the next prompt.
    pub fn reset(&mut self) {
        self.messages.clear();
    }

    /// Other messages in place of those so far. What they begin with in common is not computed again.
    pub fn replace(&mut self, messages: Vec<Message>) {
        self.messages = messages;
    }

    /// Adds a message that the next answer follows: `system`, say, or an `assistant`'s answer.
    pub fn push(&mut self, message: Message) {
        self.messages.push(message);
    }

    /// Generates text behind a text.
    ///
    /// # Errors
    /// If there is no tokenizer, or the prompt is empty or too long.
    pub fn generate<'s>(
        &'s mut self,
        prompt: &str,
        options: &'s GenerateOptions,
    ) -> Result<Text<'s>, EngineError> {
        let prompt = self.engine.encode(prompt, true)?;
        self.generate_text(&prompt, options)
    }

    /// Answers a message of the user, behind the messages so far. When the answer is complete, [`push`](Self::push) it, so
    /// that the next turn follows it. That turn computes neither the prompt nor the answer again, also where the tokenizer
    /// would cut the answer's text into other tokens than those that were generated.
    ///
    /// # Errors
    /// If there is no chat template or it refuses the messages, or the chat is too long for the context. The message is not
    /// added then.
    pub fn chat<'s>(
        &'s mut self,
        message: &str,
        options: &'s GenerateOptions,
    ) -> Result<Text<'s>, EngineError> {
        let prompt = self.chat_prompt(message)?;
        self.generate_text(&prompt, options)
    }

    /// The tokens that [`chat`](Self::chat) continues, with the user's message added.
    ///
    /// # Errors
    /// As [`chat`](Self::chat). The message is not added then.
    pub fn chat_prompt(&mut self, message: &str) -> Result<Vec<u32>, EngineError> {
        if self.template.is_none() {
            self.template = Some(self.engine.chat_template()?);
        }
        let (Some(template), Some(tokenizer)) = (&self.template, self.engine.tokenizer()) else {
            return Err(EngineError::NoTokenizer);
        };
        self.messages.push(Message::new("user", message));
        let prompt = match template.render(&self.messages, &tokenizer.template_tokens(), true) {
            Ok(text) => {
                let said = self.messages.iter().rev().nth(1).map(|message| &*message.content);
                let prompt = self.transcript.prompt(&text, &self.tokens, said, tokenizer);
                let prompt = prompt.map_err(EngineError::from);
                prompt.and_then(|prompt| self.check_length(&prompt).map(|()| prompt))
            }
            Err(error) => Err(error.into()),
        };
        if prompt.is_err() {
            self.messages.pop();
        }
        prompt
    }

    /// That there is a prompt, and that it fits the context.
    fn check_length(&self, prompt: &[u32]) -> Result<(), EngineError> {
        let context = self.cache.capacity();
        if prompt.is_empty() {
            return Err(GenerateError::EmptyPrompt.into());
        }
        if prompt.len() > context && !self.sliding {
            return Err(EngineError::PromptTooLong { tokens: prompt.len(), context });
        }
        Ok(())
    }

    /// Generates text behind token ids.
    ///
    /// # Errors
    /// If there is no tokenizer, or the prompt is empty or too long.
    pub fn generate_text<'s>(
        &'s mut self,
        prompt: &[u32],
        options: &'s GenerateOptions,
    ) -> Result<Text<'s>, EngineError> {
        let constrained = self.engine.constrain(options.constraint.as_ref())?;
        let sequence = self.resume(prompt, options)?;
        let Self { engine, cache, tokens, speculation, guesses, .. } = self;
        let tokenizer = engine.tokenizer().ok_or(EngineError::NoTokenizer)?;
        let generator = Generator::new(engine.model(), prompt, sequence, cache, options)?;
        let generator = generator.reading(engine.checkpoint()).constrained(constrained);
        let generator = generator.guessing(speculation.as_mut().map(|speculation| (speculation, guesses)));
        let text = TextGenerator::new(generator, tokenizer, prompt)?;
        Ok(Text { engine, tokens, text })
    }

    /// Generates token ids behind token ids.
    ///
    /// # Errors
    /// If the prompt is empty or too long.
    pub fn generate_tokens<'s>(
        &'s mut self,
        prompt: &[u32],
        options: &'s GenerateOptions,
    ) -> Result<Generator<'s>, EngineError> {
        let constrained = self.engine.constrain(options.constraint.as_ref())?;
        let sequence = self.resume(prompt, options)?;
        let Self { engine, cache, speculation, guesses, .. } = self;
        let generator = Generator::new(engine.model(), prompt, sequence, cache, options)?;
        let generator = generator.reading(engine.checkpoint()).constrained(constrained);
        Ok(generator.guessing(speculation.as_mut().map(|speculation| (speculation, guesses))))
    }

    /// A sequence whose cache holds the longest beginning of `prompt` that is at hand and not in doubt.
    fn resume(&mut self, prompt: &[u32], options: &GenerateOptions) -> Result<SequenceId, EngineError> {
        self.check_length(prompt)?;
        let held = std::mem::take(&mut self.tokens);
        let manager = self.engine.manager();
        let counts = (manager.unchecked_results(), manager.results_in_doubt());
        if let Some(sequence) = self.sequence {
            // A generation that was dropped may have appended less than it drew.
            let length = self.cache.length(sequence)?.min(held.len());
            let kept = self.certain.keep(length, counts);
            let common = held[..kept].iter().zip(prompt).take_while(|(a, b)| a == b).count();
            // The last token is computed again: its logits are needed.
            let common = common.min(prompt.len() - 1);
            if let Ok(common) = self.cache.truncate(sequence, common) {
                self.certain.cut(common);
                self.tokens = prompt.to_vec();
                return Ok(sequence);
            }
            self.cache.remove(sequence)?;
        }
        self.certain.keep(0, counts);
        self.certain.cut(0);
        let sequence = self.cache.add_sequence(prompt.len().saturating_add(options.max_new_tokens));
        self.sequence = Some(sequence);
        self.tokens = prompt.to_vec();
        Ok(sequence)
    }
}

/// The text of an answer as it becomes certain: an iterator over its pieces. [`finish`](Self::finish) gives the report.
#[derive(Debug)]
pub struct Text<'s> {
    engine: &'s Engine,
    tokens: &'s mut Vec<u32>,
    text: TextGenerator<'s>,
}

/// What an answer became.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The tokens, why they ended, and how long they took.
    pub generation: Generation,
    /// The same for people and programs, with the kernels that computed.
    pub report: RunReport,
}

impl Text<'_> {
    /// The next piece of text; `None` at the end.
    ///
    /// # Errors
    /// If the model or the sampler fails, or a token can't be decoded. Nothing follows then.
    pub async fn next_async(&mut self) -> Option<Result<String, EngineError>> {
        Some(self.text.next_async().await?.map_err(EngineError::from))
    }

    /// Ends the answer. What was generated stays.
    pub fn cancel(&mut self) {
        self.text.cancel();
    }

    /// Ends the answer before the next forward pass once this is set, by another thread or a signal. So an answer ends while
    /// a long prompt is computed, too.
    pub fn cancel_when(mut self, flag: Arc<AtomicBool>) -> Self {
        self.text.cancel_when(flag);
        self
    }

    /// What was generated so far.
    pub fn generation(&self) -> &Generation {
        self.text.generation()
    }

    /// The answer's tokens and its report. An answer that is not complete is cancelled.
    pub fn finish(mut self) -> Answer {
        self.text.cancel();
        let engine = self.engine.clone();
        let generation = self.text.generation().clone();
        drop(self);
        let mut report = RunReport::new(engine.summary().clone(), &generation, engine.execution());
        report.load_seconds = Some(engine.load_time().as_secs_f64());
        Answer { generation, report }
    }
}

impl Iterator for Text<'_> {
    type Item = Result<String, EngineError>;

    fn next(&mut self) -> Option<Self::Item> {
        Some(self.text.next()?.map_err(EngineError::from))
    }
}

impl Drop for Text<'_> {
    /// The cache holds the generated tokens, too: the next prompt may continue them.
    fn drop(&mut self) {
        self.tokens.extend_from_slice(&self.text.generation().tokens);
    }
}

#[cfg(test)]
mod tests {
    use super::Certain;

    #[test]
    fn what_was_computed_without_unchecked_results_survives_a_doubt() {
        let mut certain = Certain::default();
        // 10 positions of compared results, 5 of unchecked ones, 5 of compared ones again.
        assert_eq!(certain.keep(0, (0, 0)), 0);
        certain.cut(0);
        assert_eq!(certain.keep(10, (0, 0)), 10);
        certain.cut(10);
        assert_eq!(certain.keep(15, (7, 0)), 15);
        certain.cut(15);
        assert_eq!(certain.keep(20, (7, 0)), 20, "nothing is in doubt");
        certain.cut(20);
        assert_eq!(certain.keep(22, (7, 7)), 10);
        certain.cut(10);
        // All that is left is certain, and so is what kernels that are linked in add.
        assert_eq!(certain.keep(30, (7, 7)), 30);
        certain.cut(30);
        assert_eq!(certain.keep(30, (8, 9)), 30);
        // A shorter prompt.
        certain.cut(4);
        assert_eq!((certain.positions, certain.held), (4, 4));
    }
}
