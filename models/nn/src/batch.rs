//! The rows of a forward pass, and where attention finds what came before them.

use std::ops::Range;

use burn::tensor::{Device, Tensor};

use crate::seen::Keep;
use crate::{ForwardError, KvCache, RotaryEncoding, SequenceId};

/// One row of a forward pass: a token at the next position of its sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Token id.
    pub token: u32,
    /// The sequence in the KV cache.
    pub sequence: SequenceId,
    /// Position in the sequence: its length in the cache, plus the rows before this one.
    pub position: usize,
}

/// Where attention finds the keys and values of earlier positions.
#[derive(Debug)]
pub enum History<'a> {
    /// In the KV cache, which the rows are appended to.
    Cache(&'a mut KvCache),
    /// Nowhere: the rows are whole sequences.
    None {
        /// Rows of each.
        length: usize,
    },
}

/// The rows of a forward pass, as layers see them.
#[derive(Debug)]
pub struct Batch {
    /// Runs of rows of one sequence, where there is a cache.
    pub(crate) sequences: Vec<SequenceRows>,
    /// The rows' positions; without a cache, one sequence's.
    positions: Vec<usize>,
    /// Positions that a sequence can have.
    context: usize,
    /// Their cosines and sines, on the device of the layer that computes.
    pub(crate) angles: (Tensor<2>, Tensor<2>),
    /// Whether activations are quantised.
    pub(crate) quantise: bool,
    /// Where the layers' values are kept, if they are.
    pub(crate) keep: Keep,
}

/// Consecutive rows of one sequence.
#[derive(Debug)]
pub(crate) struct SequenceRows {
    pub id: SequenceId,
    pub rows: Range<usize>,
    /// Of the first.
    pub position: usize,
}

impl Batch {
    /// Whole sequences of `length` positions each, without a cache.
    pub(crate) fn whole_sequences(
        length: usize,
        rotary: &RotaryEncoding,
        quantise: bool,
        device: &Device,
    ) -> Self {
        let positions: Vec<usize> = (0..length).collect();
        let angles = rotary.angles(&positions, length, device);
        let keep = Keep::default();
        Self { sequences: Vec::new(), context: length, angles, positions, quantise, keep }
    }

    /// Computes the angles on another device.
    pub(crate) fn move_to(&mut self, rotary: &RotaryEncoding, device: &Device) {
        self.angles = rotary.angles(&self.positions, self.context, device);
    }

    /// Rows that continue the sequences of a cache: checks them, makes room in the cache, and computes their angles.
    pub(crate) fn over_cache(
        rows: &[Row],
        cache: &mut KvCache,
        rotary: &RotaryEncoding,
        quantise: bool,
        device: &Device,
    ) -> Result<Self, ForwardError> {
        let mut sequences: Vec<SequenceRows> = Vec::new();
        for (i, row) in rows.iter().enumerate() {
            let fail = |problem: String| Err(ForwardError::Rows { row: i, problem });
            match sequences.last_mut() {
                Some(last) if last.id == row.sequence => {
                    let next = last.position + last.rows.len();
                    if row.position != next {
                        return fail(format!("position {}, the sequence continues at {next}", row.position));
                    }
                    last.rows.end += 1;
                }
                _ => {
                    if sequences.iter().any(|s| s.id == row.sequence) {
                        return fail("rows of one sequence must be consecutive".into());
                    }
                    let next = cache.length(row.sequence)?;
                    if row.position != next {
                        return fail(format!("position {}, the sequence continues at {next}", row.position));
                    }
                    sequences.push(SequenceRows { id: row.sequence, rows: i..i + 1, position: next });
                }
            }
        }
        if sequences.is_empty() {
            return Err(ForwardError::Rows {
                row: 0,
                problem: "a forward pass takes at least one row".into(),
            });
        }
        for sequence in &sequences {
            cache.reserve(sequence.id, sequence.rows.len())?;
        }
        let positions: Vec<usize> = rows.iter().map(|row| row.position).collect();
        let context = cache.capacity();
        let angles = rotary.angles(&positions, context, device);
        Ok(Self { sequences, context, angles, positions, quantise, keep: Keep::default() })
    }
}
