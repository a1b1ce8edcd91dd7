//! A session: prompts, or the turns of a chat, over one KV cache.

use bitnet_burn::{KvCache, SequenceId};

use crate::chat::{ChatTemplate, Message};
use crate::engine::{Engine, EngineError};
use crate::generate::{GenerateError, GenerateOptions, Generation, Generator, TextGenerator};
use crate::report::RunReport;

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
    template: Option<ChatTemplate>,
    sliding: bool,
}

impl Session {
    pub(crate) fn new(engine: Engine, cache: KvCache) -> Self {
        Self {
            engine,
            cache,
            sequence: None,
            tokens: Vec::new(),
            messages: Vec::new(),
            template: None,
            sliding: false,
        }
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
    /// that the next turn follows it.
    ///
    /// # Errors
    /// If there is no chat template or it refuses the messages, or the chat is too long for the context.
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
        let text = template.render(&self.messages, &tokenizer.template_tokens(), true);
        let prompt = text.map_err(EngineError::from).and_then(|text| self.engine.encode(&text, false));
        if prompt.is_err() {
            self.messages.pop();
        }
        prompt
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
        let sequence = self.resume(prompt, options)?;
        let Self { engine, cache, tokens, .. } = self;
        let tokenizer = engine.tokenizer().ok_or(EngineError::NoTokenizer)?;
        let generator = Generator::new(engine.model(), prompt, sequence, cache, options)?;
        let generator = generator.reading(engine.checkpoint());
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
        let sequence = self.resume(prompt, options)?;
        let generator = Generator::new(self.engine.model(), prompt, sequence, &mut self.cache, options)?;
        Ok(generator.reading(self.engine.checkpoint()))
    }

    /// A sequence whose cache holds the longest beginning of `prompt` that is at hand.
    fn resume(&mut self, prompt: &[u32], options: &GenerateOptions) -> Result<SequenceId, EngineError> {
        let context = self.cache.capacity();
        if prompt.is_empty() {
            return Err(GenerateError::EmptyPrompt.into());
        }
        if prompt.len() > context && !self.sliding {
            return Err(EngineError::PromptTooLong { tokens: prompt.len(), context });
        }
        let held = std::mem::take(&mut self.tokens);
        if let Some(sequence) = self.sequence {
            // A generation that was dropped may have appended less than it drew.
            let length = self.cache.length(sequence)?.min(held.len());
            let common = held[..length].iter().zip(prompt).take_while(|(a, b)| a == b).count();
            // The last token is computed again: its logits are needed.
            if self.cache.truncate(sequence, common.min(prompt.len() - 1)).is_ok() {
                self.tokens = prompt.to_vec();
                return Ok(sequence);
            }
            self.cache.remove(sequence)?;
        }
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
