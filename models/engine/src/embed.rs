//! Embeddings: one vector for each text.
//!
//! The hidden states of a text's tokens behind the model's last norm are pooled: the last token's, or the mean of all. The
//! vector is then divided by its L2 norm, so that a scalar product of two vectors is their cosine. This is what
//! sentence-transformers computes with models that are decoders, such as Qwen3-Embedding.
//!
//! A text's vector has the same bits with every number of threads, beside any other texts, and however many rows are
//! computed at once: each row of a forward pass has them, and the sums over tokens are taken in f64, in the order of the
//! tokens.
//!
//! ```
//! use bitnet_burn_engine::Engine;
//! use bitnet_burn_engine::embed::{EmbedOptions, cosine};
//!
//! # #[cfg(feature = "default-model")] {
//! let engine = Engine::options().open_built_in()?;
//! let vectors = engine.embed(&["A fox ran.", "A fox was running."], &EmbedOptions::default())?;
//! println!("{:.3}", cosine(&vectors[0].values, &vectors[1].values));
//! # }
//! # Ok::<(), bitnet_burn_engine::EngineError>(())
//! ```

use bitnet_burn::{KvCache, Row, SequenceId};
use serde::Serialize;

pub use crate::checkpoint::Pooling;
use crate::engine::{Engine, EngineError};
use crate::generate::{GenerateError, values};

/// How texts become vectors. What is `None` is as the model's files say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EmbedOptions {
    /// What is pooled; the last token's state, where the files do not say it.
    pub pooling: Option<Pooling>,
    /// Whether vectors are divided by their L2 norm; they are, where the files do not say it.
    pub normalise: Option<bool>,
    /// What goes in front of each text.
    pub prompt: Option<Prompt>,
}

/// What goes in front of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// This text. Empty for nothing.
    Text(String),
    /// The prompt of this name in the model's files.
    Named(String),
    /// What E5's kin, such as BitNet's embedding models, expect in front of a question: `Instruct: TASK\nQuery: `.
    Instruction(String),
}

/// The vector of a text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Embedding {
    /// As many as the model's hidden size.
    pub values: Vec<f32>,
    /// The text's tokens, with its prompt's and those that the tokenizer puts at the ends.
    pub tokens: usize,
}

/// Turns texts into vectors in one way. Made by [`Engine::embedder`].
#[derive(Clone, Debug)]
pub struct Embedder {
    engine: Engine,
    pooling: Pooling,
    normalise: bool,
    prompt: String,
}

impl Engine {
    /// What turns texts into vectors, by these options and the model's files.
    ///
    /// # Errors
    /// If the files say what is not computed here, or have no prompt of the name that was asked for.
    pub fn embedder(&self, options: &EmbedOptions) -> Result<Embedder, EngineError> {
        let defaults = self.checkpoint().embed_defaults(options.pooling)?;
        let named = |name: &String| {
            let known = || defaults.prompts.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            let prompt = defaults.prompts.get(name).cloned();
            prompt.ok_or_else(|| EngineError::NoSuchPrompt { name: name.clone(), known: known() })
        };
        let prompt = match (&options.prompt, &defaults.default_prompt) {
            (Some(Prompt::Text(text)), _) => text.clone(),
            (Some(Prompt::Instruction(task)), _) => format!("Instruct: {task}\nQuery: "),
            (Some(Prompt::Named(name)), _) | (None, Some(name)) => named(name)?,
            (None, None) => String::new(),
        };
        let pooling = options.pooling.or(defaults.pooling).unwrap_or(Pooling::Last);
        if defaults.mean_without_prompt && pooling == Pooling::Mean && !prompt.is_empty() {
            return Err(EngineError::PromptInMean);
        }
        let normalise = options.normalise.or(defaults.normalise).unwrap_or(true);
        Ok(Embedder { engine: self.clone(), pooling, normalise, prompt })
    }

    /// The vectors of texts: [`Embedder::embed`] of an [`embedder`](Self::embedder).
    ///
    /// # Errors
    /// As there.
    pub fn embed(
        &self,
        texts: &[impl AsRef<str>],
        options: &EmbedOptions,
    ) -> Result<Vec<Embedding>, EngineError> {
        self.embedder(options)?.embed(texts)
    }
}

impl Embedder {
    /// What is pooled.
    pub fn pooling(&self) -> Pooling {
        self.pooling
    }

    /// Whether vectors are divided by their L2 norm.
    pub fn normalises(&self) -> bool {
        self.normalise
    }

    /// What goes in front of each text.
    pub fn prompt(&self) -> &str {
        &self.prompt
    }

    /// The vectors of texts, in their order. The tokenizer puts the tokens around each text that the model expects there:
    /// the end of text for most embedding models.
    ///
    /// # Errors
    /// If there is no tokenizer, a text has no tokens or more than the context holds, or the model fails.
    pub fn embed(&self, texts: &[impl AsRef<str>]) -> Result<Vec<Embedding>, EngineError> {
        let encode = |text: &dyn AsRef<str>| self.engine.encode(&(self.prompt.clone() + text.as_ref()), true);
        let tokens: Vec<Vec<u32>> = texts.iter().map(|text| encode(text)).collect::<Result<_, _>>()?;
        self.embed_tokens(&tokens)
    }

    /// The vectors of texts that are tokens already, with all that belongs around them. Texts share forward passes of as
    /// many rows as the engine computes at once.
    ///
    /// # Errors
    /// As [`embed`](Self::embed).
    pub fn embed_tokens(&self, texts: &[Vec<u32>]) -> Result<Vec<Embedding>, EngineError> {
        let context = self.engine.settings().context;
        for (index, tokens) in texts.iter().enumerate() {
            let problem = match tokens.len() {
                0 => "it has no tokens".to_owned(),
                n if n > context => {
                    format!(
                        "it has {n} tokens, the context {context}: shorten it, or open with a larger context"
                    )
                }
                _ => continue,
            };
            return Err(EngineError::Text { index, problem });
        }
        let (engine, model) = (&self.engine, self.engine.model());
        // Each text of a pass has a state in the gated DeltaNets.
        let together = MOST_STATES.checked_div(model.config().state_bytes()).map_or(usize::MAX, |n| n.max(1));
        let mut cache = engine.cache()?;
        let mut texts = texts.iter().enumerate();
        let mut unfinished: Option<Reading> = None;
        let mut embeddings = Vec::new();
        loop {
            let mut rows = Vec::new();
            let mut parts = Vec::new();
            while rows.len() < engine.settings().rows.max(1) && parts.len() < together {
                let next = || texts.next().map(|(index, tokens)| Reading::new(index, tokens, &mut cache));
                let Some(reading) = unfinished.take().or_else(next) else { break };
                let part = reading.rows(engine.settings().rows.max(1) - rows.len());
                parts.push((reading, part.len()));
                rows.extend(part);
            }
            if rows.is_empty() {
                return Ok(embeddings);
            }
            let wanted: Vec<usize> = match self.pooling {
                Pooling::Mean => (0..rows.len()).collect(),
                Pooling::Last => parts
                    .iter()
                    .scan(0, |end, (_, rows)| {
                        *end += rows;
                        Some(*end - 1)
                    })
                    .collect(),
            };
            let states = values(model.forward_states(&rows, &wanted, &mut cache)?)?;
            engine.checkpoint().intact().map_err(GenerateError::from)?;
            let mut states = states.chunks_exact(model.config().hidden_size);
            for (mut reading, rows) in parts {
                match self.pooling {
                    Pooling::Mean => states.by_ref().take(rows).for_each(|state| reading.add(state)),
                    Pooling::Last => states.by_ref().take(1).for_each(|state| reading.set(state)),
                }
                reading.done += rows;
                if reading.done < reading.tokens.len() {
                    unfinished = Some(reading);
                    continue;
                }
                cache.remove(reading.sequence)?;
                embeddings.push(self.vector(reading)?);
            }
        }
    }

    fn vector(&self, reading: Reading<'_>) -> Result<Embedding, EngineError> {
        let Reading { index, tokens, mut pooled, .. } = reading;
        if self.pooling == Pooling::Mean {
            pooled.iter_mut().for_each(|value| *value /= tokens.len() as f64);
        }
        if self.normalise {
            let norm = pooled.iter().map(|value| value * value).sum::<f64>().sqrt();
            // A vector of zeros stays one.
            pooled.iter_mut().for_each(|value| *value /= norm.max(f64::MIN_POSITIVE));
        }
        let values: Vec<f32> = pooled.into_iter().map(|value| value as f32).collect();
        if values.iter().any(|value| !value.is_finite()) {
            let problem = "its vector is not finite: the model's output is not usable".into();
            return Err(EngineError::Text { index, problem });
        }
        Ok(Embedding { values, tokens: tokens.len() })
    }
}

/// The most bytes of states that the texts of a pass have together.
const MOST_STATES: usize = 1 << 28;

/// A text whose tokens are on their way through the model.
struct Reading<'t> {
    index: usize,
    tokens: &'t [u32],
    sequence: SequenceId,
    done: usize,
    /// The last state, or the sum of all so far. Empty before the first.
    pooled: Vec<f64>,
}

impl<'t> Reading<'t> {
    fn new(index: usize, tokens: &'t [u32], cache: &mut KvCache) -> Self {
        Self { index, tokens, sequence: cache.add_sequence(tokens.len()), done: 0, pooled: Vec::new() }
    }

    /// The next rows, `most` of them at most.
    fn rows(&self, most: usize) -> Vec<Row> {
        let rest = self.tokens.iter().enumerate().skip(self.done).take(most);
        rest.map(|(position, &token)| Row { token, sequence: self.sequence, position }).collect()
    }

    fn set(&mut self, state: &[f32]) {
        self.pooled = state.iter().copied().map(f64::from).collect();
    }

    fn add(&mut self, state: &[f32]) {
        match self.pooled.is_empty() {
            true => self.set(state),
            false => self.pooled.iter_mut().zip(state).for_each(|(sum, &value)| *sum += f64::from(value)),
        }
    }
}

/// The cosine of the angle between two vectors; 0 if one of them is all zeros.
///
/// # Panics
/// If they have different lengths.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "vectors of one model");
    let product =
        |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    product(a, b) / (product(a, a) * product(b, b)).sqrt().max(f64::MIN_POSITIVE)
}
