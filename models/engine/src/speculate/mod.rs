//! Speculative decoding: the next tokens of an answer are guessed, and checked in one forward pass of several rows.
//!
//! Guesses change no token (on CPUs, where a row of a forward pass has the same bits beside any other rows): each token is
//! drawn from the same logits, with the same random numbers, as without guesses. Where it is the guessed one, the next row's
//! logits hold, too, and a forward pass is saved. A wrong guess costs its row and nothing else.
//!
//! There are two kinds. What repeats itself is looked up in the text so far (`look_up`). Where that finds nothing, or was
//! wrong too often, a smaller model with the same tokenizer continues the text (`draft_model`). How many tokens are guessed
//! follows from what was accepted and from what forward passes took (`costs`).
//! (Leviathan et al., arXiv 2211.17192; prompt look-up: Saxena 2023.)

mod costs;
mod draft_model;
mod look_up;

use serde::{Deserialize, Serialize};

pub(crate) use self::costs::RowCosts;
use self::costs::{Acceptance, best_of_model};
use self::draft_model::{DraftModel, DraftSequence, Wanted};
use self::look_up::look_up;
use crate::engine::{Engine, EngineError};
use crate::generate::GenerateError;
use crate::sampling::Sampler;

/// Tokens that are guessed at once at most, where nothing else was asked for.
pub const DEFAULT_DRAFT: usize = 8;

/// Guessed tokens of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DraftCounts {
    /// Tokens that were guessed.
    pub drafted: u64,
    /// Of these, the ones that were right.
    pub accepted: u64,
}

/// Guessed tokens, by where the guesses come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drafts {
    /// From the text so far.
    pub look_up: DraftCounts,
    /// From the draft model.
    pub model: DraftCounts,
}

impl Drafts {
    /// Of both kinds.
    pub fn total(&self) -> DraftCounts {
        DraftCounts {
            drafted: self.look_up.drafted + self.model.drafted,
            accepted: self.look_up.accepted + self.model.accepted,
        }
    }

    /// The counts since they were `before`.
    pub(crate) fn since(self, before: Self) -> Self {
        let since = |now: DraftCounts, before: DraftCounts| DraftCounts {
            drafted: now.drafted - before.drafted,
            accepted: now.accepted - before.accepted,
        };
        Self { look_up: since(self.look_up, before.look_up), model: since(self.model, before.model) }
    }

    pub(crate) fn add(&mut self, kind: Kind, drafted: usize, accepted: usize) {
        let counts = match kind {
            Kind::LookUp => &mut self.look_up,
            Kind::Model => &mut self.model,
        };
        counts.drafted += drafted as u64;
        counts.accepted += accepted as u64;
    }
}

impl std::ops::AddAssign for Drafts {
    fn add_assign(&mut self, other: Self) {
        let pairs = [(&mut self.look_up, other.look_up), (&mut self.model, other.model)];
        for (counts, more) in pairs {
            counts.drafted += more.drafted;
            counts.accepted += more.accepted;
        }
    }
}

/// Where guesses come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    LookUp,
    Model,
}

/// What makes the guesses for the answers of one model.
#[derive(Debug)]
pub(crate) struct Speculation {
    /// Tokens to guess at once at most.
    most: usize,
    /// Of the model that checks the guesses.
    pub(crate) costs: RowCosts,
    model: Option<DraftModel>,
}

/// The guesses for one answer, and what became of earlier ones.
#[derive(Debug, Default)]
pub(crate) struct Guesses {
    tokens: Vec<u32>,
    of_model: bool,
    look_up: Acceptance,
    model: Acceptance,
    sequence: Option<DraftSequence>,
}

/// An answer that is to be guessed on.
pub(crate) struct Answer<'a> {
    pub guesses: &'a mut Guesses,
    /// The prompt and the answer so far.
    pub history: &'a [u32],
    /// Tokens of the answer among them.
    pub generated: usize,
    /// Tokens to guess at most.
    pub most: usize,
    /// What draws the answer's tokens.
    pub sampler: &'a Sampler,
    /// Tokens that end the answer.
    pub stop_tokens: &'a [u32],
}

impl Speculation {
    /// Guesses for answers of `engine`, with its draft model if it has one; at most `most` tokens at once. `None` if there
    /// are to be none. On GPUs, where rows may differ in their last bits, there are none.
    ///
    /// # Errors
    /// If the draft model's device does not support its KV cache's type.
    pub(crate) fn new(engine: &Engine, most: usize) -> Result<Option<Self>, EngineError> {
        if most == 0 || !engine.model().is_host() {
            return Ok(None);
        }
        let model = engine.draft_model().map(|draft| DraftModel::new(draft, engine)).transpose()?;
        Ok(Some(Self { most, costs: RowCosts::default(), model }))
    }

    /// Guesses for these answers, which have `rows` rows without them. What is left over of earlier ones is dropped.
    ///
    /// # Errors
    /// If the draft model fails.
    pub(crate) fn guess(&mut self, rows: usize, answers: Vec<Answer<'_>>) -> Result<(), GenerateError> {
        let mut wanted = Vec::new();
        for answer in answers {
            let most = answer.most.min(self.most);
            let Guesses { tokens, of_model, look_up: of_look_up, model: acceptance, sequence } =
                answer.guesses;
            tokens.clear();
            *of_model = false;
            if most == 0 {
                continue;
            }
            let found = look_up(answer.history, most);
            let worth = self.costs.best(rows, *of_look_up, found.len());
            if worth > 0 {
                tokens.extend_from_slice(&found[..worth]);
                continue;
            }
            if !found.is_empty() {
                of_look_up.idle();
            }
            let Some(model) = &mut self.model else { continue };
            let worth = best_of_model(&self.costs, model.costs(), rows, *acceptance, most);
            if model.is_due(worth) {
                *of_model = true;
                wanted.push(Wanted {
                    sequence,
                    history: answer.history,
                    generated: answer.generated,
                    most: worth.max(1),
                    sampler: answer.sampler,
                    stop_tokens: answer.stop_tokens,
                    tokens,
                });
            } else {
                acceptance.idle();
            }
        }
        match &mut self.model {
            Some(model) if !wanted.is_empty() => model.guess(wanted),
            _ => Ok(()),
        }
    }

    /// As on a machine on which more rows take no more time.
    #[cfg(test)]
    pub(crate) fn rows_cost_nothing(&mut self) {
        self.costs = RowCosts::default();
        (1..=16).for_each(|rows| self.costs.learn(rows, 1.0));
    }

    /// The answer is over: what the draft model's cache holds of it is kept for texts that begin the same.
    pub(crate) fn end(&mut self, guesses: &mut Guesses) {
        if let (Some(model), Some(sequence)) = (&mut self.model, guesses.sequence.take()) {
            model.keep(sequence);
        }
    }

    /// Keeps at most `bytes` bytes of the draft model's caches of answers that are over.
    ///
    /// # Errors
    /// If a cache is not there.
    pub(crate) fn shrink(&mut self, bytes: u64) -> Result<(), GenerateError> {
        self.model.as_mut().map_or(Ok(()), |model| model.shrink(bytes))
    }

    /// Bytes of the draft model's caches of answers that are over.
    pub(crate) fn kept_bytes(&self) -> u64 {
        self.model.as_ref().map_or(0, DraftModel::kept_bytes)
    }
}

impl Guesses {
    /// The guesses of this step.
    pub(crate) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Drops the guesses of this step.
    pub(crate) fn forget(&mut self) {
        self.tokens.clear();
    }

    /// The first `accepted` guesses were right, and the next one, if there is one, was not. They are used up. Gives their
    /// kind.
    pub(crate) fn learn(&mut self, accepted: usize) -> Kind {
        let (kind, acceptance) = match self.of_model {
            true => (Kind::Model, &mut self.model),
            false => (Kind::LookUp, &mut self.look_up),
        };
        acceptance.learn(self.tokens.len(), accepted);
        self.tokens.clear();
        kind
    }
}
