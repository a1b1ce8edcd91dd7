//! One request while it is computed: what its next rows are, and what becomes of their logits.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bitnet_burn::{ForwardError, KvCache, Row, SequenceId};

use super::{Event, LogProbs, RequestError, Submitted};
use crate::engine::Engine;
use crate::generate::{Finish, GenerateError, Generation, rows};
use crate::speculate::{self, Drafts, Guesses, Speculation};
use crate::tokenizer::DecodeStream;

/// A request while it is computed.
pub(super) struct Running<'e> {
    submitted: Box<Submitted>,
    pub(super) sequence: SequenceId,
    /// The prompt and the tokens behind it.
    history: Vec<u32>,
    /// Of these, the tokens that the cache holds.
    computed: usize,
    /// Guessed tokens of this step, which the cache is to hold for a moment.
    guesses: Guesses,
    decoder: Option<DecodeStream<'e>>,
    generation: Generation,
    admitted: Instant,
    last_token: Instant,
    /// The manager's count of results in doubt, at the beginning.
    in_doubt: u64,
}

/// The rows of a request in a step, and those whose logits it wants, counted from its first.
pub(super) struct Rows {
    pub rows: Vec<Row>,
    pub wanted: usize,
}

impl<'e> Running<'e> {
    /// Begins a request with a sequence whose cache holds the first `computed` tokens of the prompt. `decoder` continues
    /// the prompt.
    pub(super) fn new(
        engine: &'e Engine,
        submitted: Box<Submitted>,
        (sequence, computed): (SequenceId, usize),
        decoder: Option<DecodeStream<'e>>,
    ) -> Self {
        let prompt = &submitted.request.prompt;
        let now = Instant::now();
        Self {
            sequence,
            history: prompt.clone(),
            computed,
            guesses: Guesses::default(),
            decoder,
            generation: Generation { cached_tokens: computed, ..Generation::empty(prompt.len()) },
            admitted: now,
            last_token: now,
            in_doubt: engine.manager().results_in_doubt(),
            submitted,
        }
    }

    /// Bytes of KV cache that it may need.
    pub(super) fn bytes(&self) -> u64 {
        self.submitted.bytes
    }

    /// Whether the prompt is not complete yet.
    pub(super) fn in_prompt(&self) -> bool {
        self.computed < self.generation.prompt_tokens
    }

    /// The tokens so far, and how many of them the cache holds.
    pub(super) fn tokens(&self) -> (&[u32], usize) {
        (&self.history, self.computed)
    }

    pub(super) fn generated(&self) -> usize {
        self.generation.tokens.len()
    }

    /// Tokens that were guessed so far.
    pub(super) fn drafts(&self) -> Drafts {
        self.generation.drafts
    }

    /// The tokens that the cache holds.
    pub(super) fn into_computed(mut self) -> Vec<u32> {
        self.history.truncate(self.computed);
        self.history
    }

    /// Why it must end before the next step, if it must.
    pub(super) fn due(&self, now: Instant, cache: &KvCache) -> Result<Option<Finish>, RequestError> {
        if self.submitted.cancelled.load(Ordering::Relaxed) {
            return Ok(Some(Finish::Cancelled));
        }
        if self.submitted.request.deadline.is_some_and(|deadline| deadline <= now) {
            return Err(RequestError::Deadline { tokens: self.generated() });
        }
        if !self.in_prompt() && self.computed >= cache.capacity() {
            return Ok(Some(Finish::Context));
        }
        Ok(None)
    }

    /// The next `most` rows of the prompt.
    pub(super) fn prompt_rows(&mut self, most: usize, cache: &mut KvCache) -> Result<Rows, ForwardError> {
        let prompt = self.generation.prompt_tokens;
        let mut end = (self.computed + most).min(prompt);
        if cache.needs_snapshots() {
            // Before the last token of the prompt, so that the same prompt can go on from there.
            if self.computed + 1 == prompt {
                cache.snapshot(self.sequence)?;
            } else {
                end = end.min(prompt - 1);
            }
        }
        Ok(Rows { rows: self.rows(end), wanted: usize::from(end == prompt) })
    }

    /// The answer, to be guessed on.
    pub(super) fn guessable(&mut self, cache: &KvCache) -> speculate::Answer<'_> {
        let room = cache.capacity().saturating_sub(self.computed + 1);
        let generated = self.generation.tokens.len();
        let options = &self.submitted.request.options;
        // The last token of the answer is drawn, but not computed.
        let left = options.max_new_tokens.saturating_sub(generated + 1);
        speculate::Answer {
            guesses: &mut self.guesses,
            history: &self.history,
            generated,
            most: room.min(left),
            sampler: &self.submitted.sampler,
            stop_tokens: &options.stop_tokens,
        }
    }

    /// The last token, and the guesses of what follows.
    pub(super) fn answer_rows(&self) -> Rows {
        let mut all = self.rows(self.history.len());
        all.extend(rows(self.guesses.tokens(), self.sequence, self.history.len()));
        Rows { wanted: all.len(), rows: all }
    }

    fn rows(&self, end: usize) -> Vec<Row> {
        rows(&self.history[self.computed..end], self.sequence, self.computed)
    }

    /// Takes the logits of a step, [wanted, vocabulary] row by row, and draws from them. The cache is cut to the tokens that
    /// were drawn. Gives why the answer is over, if it is.
    pub(super) fn take(
        &mut self,
        rows: usize,
        logits: &[f32],
        vocabulary: usize,
        cache: &mut KvCache,
    ) -> Result<Option<Finish>, GenerateError> {
        let guessed = self.guesses.tokens().len();
        self.computed += rows - guessed;
        let (mut accepted, mut finish) = (0, None);
        for (i, logits) in logits.chunks_exact(vocabulary).enumerate() {
            finish = self.draw(logits, i == 0)?;
            // The next row's logits hold only if its token is what was drawn.
            if finish.is_some() || self.guesses.tokens().get(i) != self.history.last() {
                break;
            }
            accepted += 1;
        }
        if guessed > 0 {
            let kind = self.guesses.learn(accepted);
            self.generation.drafts.add(kind, guessed, accepted);
            self.computed += accepted;
            cache.truncate(self.sequence, self.computed).map_err(ForwardError::from)?;
        }
        Ok(finish)
    }

    fn draw(&mut self, logits: &[f32], first_of_step: bool) -> Result<Option<Finish>, GenerateError> {
        let Submitted { request, sampler, constrained, at, .. } = &mut *self.submitted;
        let options = &request.options;
        let generation = &mut self.generation;
        let now = Instant::now();
        if generation.tokens.is_empty() && generation.prefill.is_zero() {
            generation.prefill = now - self.admitted;
        } else {
            // Tokens that come in one step took its time together.
            generation.steps.push(if first_of_step { now - self.last_token } else { Duration::ZERO });
        }
        self.last_token = now;
        if options.max_new_tokens == 0 {
            return Ok(Some(Finish::Length));
        }
        let allowed = match constrained {
            None => Some(logits),
            Some(constrained) => constrained.mask(logits, &options.stop_tokens)?,
        };
        let Some(allowed) = allowed else { return Ok(Some(Finish::Constraint)) };
        let token = sampler.sample(allowed, &self.history, generation.tokens.len())?;
        generation.first_token.get_or_insert(now - *at);
        generation.end_to_end = now - *at;
        if options.stop_tokens.contains(&token) {
            return Ok(Some(Finish::StopToken));
        }
        let complete = match constrained {
            None => false,
            Some(constrained) => constrained.take(token)?,
        };
        generation.tokens.push(token);
        self.history.push(token);
        let logprobs = request.logprobs.map(|top| log_probs(logits, token, top));
        let decoded = match &mut self.decoder {
            Some(decoder) => decoder.push(token)?.unwrap_or_default(),
            None => String::new(),
        };
        let output = self.submitted.stops.push(&decoded);
        let length = self.generation.tokens.len() >= self.submitted.request.options.max_new_tokens;
        (self.submitted.on_event)(Event::Token { token, text: output.text, logprobs });
        Ok(match output.stopped {
            Some(_) => Some(Finish::StopString),
            None if complete => Some(Finish::Constraint),
            None => length.then_some(Finish::Length),
        })
    }

    /// Ends the request with its answer.
    pub(super) fn finish(&mut self, mut finish: Finish, in_doubt: u64) {
        let mut text = String::new();
        if !matches!(finish, Finish::StopString | Finish::Cancelled) {
            // What is not a whole character is one that can't be read; a decoder's error has nothing to add to it.
            let rest = self.decoder.as_mut().and_then(|decoder| decoder.flush().ok().flatten());
            let output = self.submitted.stops.push(&rest.unwrap_or_default());
            text = output.text;
            match output.stopped {
                Some(_) => finish = Finish::StopString,
                None => text.push_str(&self.submitted.stops.flush()),
            }
        }
        self.generation.finish = finish;
        let generation = self.generation.clone();
        (self.submitted.on_event)(Event::Finished { text, generation, in_doubt: in_doubt != self.in_doubt });
    }

    /// Leaves what the draft model's cache has of the text.
    pub(super) fn leave(&mut self, speculation: &mut Speculation) {
        speculation.end(&mut self.guesses);
    }

    /// Ends the request with an error.
    pub(super) fn fail(&mut self, error: RequestError) {
        (self.submitted.on_event)(Event::Failed(error));
    }
}

/// The logarithms of the softmax of these logits: the token's, and the `top` largest.
fn log_probs(logits: &[f32], token: u32, top: usize) -> LogProbs {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    let of = |logit: f32| (f64::from(logit) - f64::from(max) - sum.ln()) as f32;
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let top = top.min(order.len());
    let by_rank = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if top > 0 {
        order.select_nth_unstable_by(top - 1, by_rank);
    }
    order.truncate(top);
    order.sort_unstable_by(by_rank);
    LogProbs {
        chosen: of(logits[token as usize]),
        top: order.into_iter().map(|id| (id, of(logits[id as usize]))).collect(),
    }
}

impl From<GenerateError> for RequestError {
    fn from(error: GenerateError) -> Self {
        Self::Generate(Arc::new(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probs_are_those_of_the_softmax() {
        let weights = [0.125f32, 0.5, 0.25, 0.125];
        let logits = weights.map(|w| w.ln() + 3.0);
        let probs = log_probs(&logits, 3, 3);
        assert!((probs.chosen - 0.125f32.ln()).abs() < 1e-6);
        let expected = [(1, 0.5f32.ln()), (2, 0.25f32.ln()), (0, 0.125f32.ln())];
        for ((id, p), (expected_id, expected)) in probs.top.iter().zip(expected) {
            assert_eq!(*id, expected_id, "the lower id first among equals");
            assert!((p - expected).abs() < 1e-6);
        }
        assert_eq!(log_probs(&logits, 0, 0).top, []);
        assert_eq!(log_probs(&logits, 0, 9).top.len(), 4);
        // The logits that exclude a token.
        assert_eq!(log_probs(&[0.0, f32::NEG_INFINITY], 0, 2).top, [(0, 0.0), (1, f32::NEG_INFINITY)]);
    }
}
