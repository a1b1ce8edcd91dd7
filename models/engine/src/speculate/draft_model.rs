//! Guesses by a smaller model with the same tokenizer.
//!
//! It draws its tokens with a copy of the answer's own random numbers. So where both models find the same tokens likely, the
//! guess is right, for sampled answers, too. Its KV cache follows the text: what it holds beyond that is cut off, and what
//! it lacks is computed, a chunk each time.

use std::time::Instant;

use bitnet_burn::{ForwardError, KvCache, SequenceId};

use super::costs::RowCosts;
use crate::engine::{Engine, EngineError};
use crate::generate::{GenerateError, rows, values};
use crate::kept::{KeptSequences, common};
use crate::sampling::Sampler;

/// Texts that are over whose cache is kept at most.
const MOST_KEPT: usize = 64;

/// Answers' steps until guesses that did not pay are tried again, at first. Each time it takes twice as many.
const RETRY: usize = 64;

/// The model and its cache.
#[derive(Debug)]
pub(super) struct DraftModel {
    engine: Engine,
    cache: KvCache,
    kept: KeptSequences,
    /// Tokens of the model that checks the guesses.
    vocabulary: usize,
    costs: RowCosts,
    /// Steps until the next try, and between tries.
    retry: (usize, usize),
}

/// A text that it follows.
#[derive(Debug)]
pub(super) struct DraftSequence {
    id: SequenceId,
    /// The tokens that the cache holds.
    tokens: Vec<u32>,
    sampler: Sampler,
}

/// A text that is to be guessed on.
pub(super) struct Wanted<'a> {
    pub sequence: &'a mut Option<DraftSequence>,
    pub history: &'a [u32],
    /// Tokens of the answer among them.
    pub generated: usize,
    /// Tokens to guess at most: 1 or more.
    pub most: usize,
    pub sampler: &'a Sampler,
    pub stop_tokens: &'a [u32],
    /// Gets the guesses.
    pub tokens: &'a mut Vec<u32>,
}

impl DraftModel {
    /// `draft` guesses for `target`.
    pub(super) fn new(draft: &Engine, target: &Engine) -> Result<Self, EngineError> {
        Ok(Self {
            engine: draft.clone(),
            cache: draft.cache()?,
            kept: KeptSequences::default(),
            vocabulary: target.checkpoint().config().vocab_size,
            costs: RowCosts::default(),
            retry: (RETRY, RETRY),
        })
    }

    /// Seconds of its forward passes.
    pub(super) fn costs(&self) -> &RowCosts {
        &self.costs
    }

    /// Whether it guesses now, where `worth` guesses pay. It also does now and then where none do: the first measurements
    /// may have been slow ones.
    pub(super) fn is_due(&mut self, worth: usize) -> bool {
        let (left, between) = &mut self.retry;
        if worth > 0 {
            *left = *between;
            return true;
        }
        *left = left.saturating_sub(1);
        if *left == 0 {
            *between = between.saturating_mul(2);
            *left = *between;
            return true;
        }
        false
    }

    /// Guesses for these texts: each pass computes a token of each.
    pub(super) fn guess(&mut self, wanted: Vec<Wanted<'_>>) -> Result<(), GenerateError> {
        let config = self.engine.checkpoint().config();
        let (own_vocabulary, capacity) = (config.vocab_size, self.cache.capacity());
        let mut room = self.engine.settings().rows;
        let mut all_rows = Vec::new();
        // Those whose text is complete, with the row of its last token.
        let mut ready: Vec<(Wanted<'_>, usize)> = Vec::new();
        for wanted in wanted {
            let history = wanted.history;
            if room == 0 || history.len() > capacity {
                continue;
            }
            let have = match wanted.sequence {
                Some(sequence) => {
                    // The last token is computed again, if need be: its logits are needed.
                    let same = common(&sequence.tokens, &history[..history.len() - 1]);
                    let left = self.cache.truncate(sequence.id, same).map_err(ForwardError::from)?;
                    sequence.tokens.truncate(left);
                    left
                }
                None => self.begin(wanted.sequence, history, wanted.sampler)?,
            };
            let Some(sequence) = wanted.sequence else { continue };
            let next = &history[have..history.len().min(have + room)];
            if next.iter().any(|&token| token as usize >= own_vocabulary) {
                continue;
            }
            room -= next.len();
            all_rows.extend(rows(next, sequence.id, have));
            sequence.tokens.extend_from_slice(next);
            if sequence.tokens.len() == history.len() {
                sequence.sampler.follow(wanted.sampler);
                ready.push((wanted, all_rows.len() - 1));
            }
        }
        let mut first = true;
        while !all_rows.is_empty() {
            // A pass without a complete text has no logits to read, but gives some.
            let asked: Vec<usize> = match ready.is_empty() {
                true => vec![all_rows.len() - 1],
                false => ready.iter().map(|&(_, row)| row).collect(),
            };
            let began = Instant::now();
            let logits = self.engine.model().forward(&all_rows, &asked, &mut self.cache)?;
            let logits = values(logits)?;
            self.engine.checkpoint().intact()?;
            self.costs.learn(all_rows.len(), began.elapsed().as_secs_f64());
            let vocabulary = logits.len() / asked.len();
            all_rows.clear();
            let mut going = Vec::with_capacity(ready.len());
            for ((wanted, _), logits) in ready.into_iter().zip(logits.chunks_exact(vocabulary)) {
                let Some(sequence) = wanted.sequence else { continue };
                if first {
                    // Where a model can't go back by itself.
                    self.cache.snapshot(sequence.id).map_err(ForwardError::from)?;
                }
                let generated = wanted.generated + wanted.tokens.len();
                // What can't be drawn here, such as from NaN, is no guess.
                let Ok(token) = sequence.sampler.sample(logits, &sequence.tokens, generated) else {
                    continue;
                };
                if token as usize >= self.vocabulary || wanted.stop_tokens.contains(&token) {
                    continue;
                }
                wanted.tokens.push(token);
                let position = sequence.tokens.len();
                if wanted.tokens.len() < wanted.most && position < capacity {
                    all_rows.extend(rows(&[token], sequence.id, position));
                    sequence.tokens.push(token);
                    going.push((wanted, all_rows.len() - 1));
                }
            }
            ready = going;
            first = false;
        }
        Ok(())
    }

    /// Begins to follow a text, from what the cache has of it, and gives how much that is.
    fn begin(
        &mut self,
        sequence: &mut Option<DraftSequence>,
        history: &[u32],
        sampler: &Sampler,
    ) -> Result<usize, GenerateError> {
        let before = &history[..history.len() - 1];
        let (id, have) = match self.kept.find(before) {
            Some((length, index)) => {
                let id = self.kept.take(index, before, &mut self.cache)?;
                (id, self.cache.truncate(id, length).map_err(ForwardError::from)?)
            }
            None => (self.cache.add_sequence(history.len()), 0),
        };
        let sampler = Sampler::new(sampler.config().clone())?;
        *sequence = Some(DraftSequence { id, tokens: history[..have].to_vec(), sampler });
        Ok(have)
    }

    /// The text is over.
    pub(super) fn keep(&mut self, DraftSequence { id, tokens, .. }: DraftSequence) {
        let bytes = self.engine.sequence_bytes(tokens.len().next_power_of_two());
        self.kept.keep(id, tokens, bytes);
    }

    pub(super) fn kept_bytes(&self) -> u64 {
        self.kept.bytes()
    }

    pub(super) fn shrink(&mut self, bytes: u64) -> Result<(), GenerateError> {
        self.kept.shrink(bytes, MOST_KEPT, &mut self.cache)
    }
}
