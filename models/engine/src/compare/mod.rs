//! Compares two models, or a model and a file of logits, on the same tokens.
//!
//! [`compare`] takes both sides a few positions at a time, so that memory does not grow with the text. [`Figures`] say how far
//! the logits are apart. Where both sides are models of one shape, [`Layers`] says where their values part first, and
//! whether the rounding of an activation to int8 explains it.

mod examine;
mod figures;
mod file;
mod layers;
mod tolerance;

use std::ops::Range;

use bitnet_burn::{ForwardError, KvCache, Seen, SequenceId};
use bitnet_burn_formats::FileError;
use serde::Serialize;

pub use self::figures::{Figures, LogitPlace, Parting, negative_log_likelihood};
pub use self::file::LogitsFile;
pub use self::layers::{Layers, Outcome, Place, Rounding};
pub use self::tolerance::{Tolerance, Verdict};
use crate::engine::{Engine, EngineError};
use crate::generate::{GenerateError, logits, rows, values};

/// Why a comparison failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompareError {
    /// A file can't be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file of logits is not what it should be.
    #[error("{file}: {problem}")]
    Logits {
        /// The file, with the tensor's name.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// A model failed.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// The sides have other numbers of logits.
    #[error(
        "the vocabularies differ: {name_a} has {a} logits a position, and {name_b} has {b}; logits of other tokens can't be \
         compared"
    )]
    Vocabulary {
        /// A's name.
        name_a: String,
        /// A's logits.
        a: usize,
        /// B's name.
        name_b: String,
        /// B's logits.
        b: usize,
    },
    /// The sides have other numbers of positions.
    #[error(
        "{file} has the logits of {found} positions, and {expected} are compared; give both sides the same tokens"
    )]
    Positions {
        /// The file.
        file: String,
        /// Its positions.
        found: usize,
        /// The tokens, or the positions of the other file.
        expected: usize,
    },
    /// Two models without tokens.
    #[error("a model computes logits of tokens: give it some")]
    NoTokens,
    /// Not a number, or infinite.
    #[error("{name}: the logit of token {token} at position {position} is {value}: it can't be compared")]
    NotFinite {
        /// The side.
        name: String,
        /// The position.
        position: usize,
        /// The token.
        token: usize,
        /// The value.
        value: f32,
    },
}

/// One side of a comparison.
pub enum Side {
    /// A model, which computes the logits.
    Model(Box<ModelSide>),
    /// A file that has them.
    Logits(LogitsFile),
}

/// A model with its KV cache.
pub struct ModelSide {
    engine: Engine,
    cache: KvCache,
    sequence: SequenceId,
}

impl Side {
    /// A model, with a KV cache for `tokens` tokens.
    ///
    /// # Errors
    /// If a device does not support the KV cache's type.
    pub fn model(engine: Engine, tokens: usize) -> Result<Self, EngineError> {
        let mut cache = engine.cache()?;
        let sequence = cache.add_sequence(tokens);
        Ok(Self::Model(Box::new(ModelSide { engine, cache, sequence })))
    }

    /// What messages call it.
    pub fn name(&self) -> String {
        match self {
            Self::Model(side) => side.engine.checkpoint().path().display().to_string(),
            Self::Logits(file) => file.name(),
        }
    }

    /// Logits of a position.
    pub fn vocabulary(&self) -> usize {
        match self {
            Self::Model(side) => side.engine.checkpoint().config().vocab_size,
            Self::Logits(file) => file.shape()[1],
        }
    }

    /// The positions of a file; a model has those of the tokens.
    pub fn positions(&self) -> Option<usize> {
        match self {
            Self::Model(_) => None,
            Self::Logits(file) => Some(file.shape()[0]),
        }
    }

    /// The logits of some positions, which follow those before; with what the layers computed, if it is asked for.
    fn next(
        &mut self,
        positions: Range<usize>,
        tokens: Option<&[u32]>,
        seen: bool,
    ) -> Result<(Vec<f32>, Vec<Seen>), CompareError> {
        let (start, vocabulary) = (positions.start, self.vocabulary());
        let (found, seen) = match self {
            Self::Logits(file) => (file.rows(positions)?, Vec::new()),
            Self::Model(side) => {
                let tokens = &tokens.ok_or(CompareError::NoTokens)?[positions];
                side.compute(tokens, start, seen)?
            }
        };
        match found.iter().position(|value| !value.is_finite()) {
            None => Ok((found, seen)),
            Some(at) => Err(CompareError::NotFinite {
                name: self.name(),
                position: start + at / vocabulary,
                token: at % vocabulary,
                value: found[at],
            }),
        }
    }
}

impl ModelSide {
    fn compute(
        &mut self,
        tokens: &[u32],
        position: usize,
        seen: bool,
    ) -> Result<(Vec<f32>, Vec<Seen>), GenerateError> {
        let (model, cache) = (self.engine.model(), &mut self.cache);
        if seen {
            let rows = rows(tokens, self.sequence, position);
            let (logits, seen) = model.forward_seen(&rows, cache)?;
            let logits = values(logits)?;
            self.engine.checkpoint().intact()?;
            return Ok((logits, seen));
        }
        let mut all = Vec::new();
        logits(model, tokens, self.sequence, cache, tokens.len(), &mut |_, rows| {
            all.extend_from_slice(rows)
        })?;
        self.engine.checkpoint().intact()?;
        Ok((all, Vec::new()))
    }
}

/// What a comparison found.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// How far the logits are apart.
    #[serde(flatten)]
    pub figures: Figures,
    /// Where the models' values part; `None` if they were not looked at.
    pub layers: Option<Layers>,
    /// Why they were not looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_absent: Option<String>,
}

/// Compares the logits of A and B: of each token, or of each position where both are files. The perplexities need tokens.
/// At most `chunk` positions are computed at once. `progress` gets the number of positions that are done.
///
/// # Errors
/// If a side can't be computed or read, the vocabularies or the numbers of positions differ, or a logit is not finite.
pub fn compare(
    a: &mut Side,
    b: &mut Side,
    tokens: Option<&[u32]>,
    chunk: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Comparison, CompareError> {
    let vocabulary = a.vocabulary();
    if b.vocabulary() != vocabulary {
        let (name_a, name_b) = (a.name(), b.name());
        return Err(CompareError::Vocabulary { name_a, a: vocabulary, name_b, b: b.vocabulary() });
    }
    if let Some(&token) = tokens.iter().copied().flatten().find(|&&token| token as usize >= vocabulary) {
        return Err(ForwardError::Token { token, vocabulary }.into());
    }
    let positions = tokens.map(<[u32]>::len).or(a.positions()).ok_or(CompareError::NoTokens)?;
    for side in [&*a, &*b] {
        if let Some(found) = side.positions().filter(|&found| found != positions) {
            return Err(CompareError::Positions { file: side.name(), found, expected: positions });
        }
    }
    let mut examiner = match (&*a, &*b) {
        (Side::Model(a), Side::Model(b)) => examine::Examiner::new(a, b),
        _ => Err("a file of logits has no layers".to_owned()),
    };
    let mut sums = figures::Sums::default();
    let mut at = 0;
    while at < positions {
        let examine = examiner.as_mut().ok().filter(|examiner| !examiner.is_done());
        let rows = examine.as_ref().map_or(chunk, |examiner| chunk.min(examiner.rows())).max(1);
        let range = at..(at + rows).min(positions);
        let (rows_a, seen_a) = a.next(range.clone(), tokens, examine.is_some())?;
        let (rows_b, seen_b) = b.next(range.clone(), tokens, examine.is_some())?;
        if let Some(examiner) = examine {
            examiner.examine(range.clone(), [seen_a, seen_b], [&rows_a, &rows_b])?;
        }
        let pairs = rows_a.chunks_exact(vocabulary).zip(rows_b.chunks_exact(vocabulary));
        for (position, (row_a, row_b)) in range.clone().zip(pairs) {
            sums.push(row_a, row_b, tokens.and_then(|tokens| tokens.get(position + 1).copied()));
        }
        at = range.end;
        progress(at);
    }
    let figures = sums.finish(vocabulary).ok_or(CompareError::NoTokens)?;
    let (layers, layers_absent) = match examiner {
        Ok(examiner) => (Some(examiner.finish()), None),
        Err(reason) => (None, Some(reason)),
    };
    Ok(Comparison { figures, layers, layers_absent })
}

impl From<ForwardError> for CompareError {
    fn from(error: ForwardError) -> Self {
        Self::Generate(error.into())
    }
}
