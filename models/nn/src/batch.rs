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

/// The rows of a forward pass, as layers see them: which positions they have, and whether activations are quantised.
///
/// [`BitNet`](crate::BitNet) makes its own. For layers in a model of yours:
///
/// ```
/// use bitnet_burn::{Batch, BitAttentionConfig, CacheType, History, KvCache, RotaryEncodingConfig, Row};
/// use burn::tensor::{Device, Distribution, Tensor};
///
/// let device = Device::flex();
/// let attention = BitAttentionConfig::new(64, 4, 2, 16).init(&device);
/// let rotary = RotaryEncodingConfig::new(16).init();
///
/// // Two sequences of three rows each, as in training.
/// let x = Tensor::<2>::random([6, 64], Distribution::Default, &device);
/// let batch = Batch::whole_sequences(3, &rotary, true, &device);
/// let y = attention.forward(x.clone(), 0, &batch, &mut History::None { length: 3 })?;
/// assert_eq!(y.dims(), [6, 64]);
///
/// // Three rows of one sequence over a cache of one layer with 2 key heads of 16 values.
/// let mut cache = KvCache::new([1, 2, 16], 100, CacheType::F32, &device)?;
/// let sequence = cache.add_sequence(3);
/// let rows: Vec<Row> = (0..3).map(|position| Row { token: 0, sequence, position }).collect();
/// let batch = Batch::over_cache(&rows, &mut cache, &rotary, true, &device)?;
/// let x = x.slice([0..3, 0..64]);
/// let y = attention.forward(x, 0, &batch, &mut History::Cache(&mut cache))?;
/// batch.finish(&mut cache)?;
/// assert_eq!((y.dims(), cache.length(sequence)?), ([3, 64], 3));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
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
    /// Whole sequences of `length` positions each, without a cache. Layers take it with
    /// [`History::None`] of the same length, and any number of sequences.
    ///
    /// # Arguments
    /// * `quantise`: whether weights and activations are quantised; `false` is the float twin of layers in the training state
    pub fn whole_sequences(length: usize, rotary: &RotaryEncoding, quantise: bool, device: &Device) -> Self {
        let positions: Vec<usize> = (0..length).collect();
        let angles = rotary.angles(&positions, length, device);
        let keep = Keep::default();
        Self { sequences: Vec::new(), context: length, angles, positions, quantise, keep }
    }

    /// Computes the angles on another device.
    pub(crate) fn move_to(&mut self, rotary: &RotaryEncoding, device: &Device) {
        self.angles = rotary.angles(&self.positions, self.context, device);
    }

    /// Rows that continue the sequences of a cache: checks them, makes room in the cache, and computes their angles. (Layers
    /// do not look at the rows' tokens.) After the last layer, [`finish`](Self::finish) counts them.
    ///
    /// # Errors
    /// If there is no row, rows do not continue their sequences, or the context is full.
    pub fn over_cache(
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

    /// Counts the rows in their cache, once all layers have computed.
    ///
    /// # Errors
    /// If a sequence is not in the cache.
    pub fn finish(&self, cache: &mut KvCache) -> Result<(), ForwardError> {
        for sequence in &self.sequences {
            cache.advance(sequence.id, sequence.rows.len())?;
        }
        Ok(())
    }

    /// Checks that a layer's input of `m` rows and its history are those of the batch. `heads`: key heads and values of each,
    /// for attention.
    pub(crate) fn check(
        &self,
        m: usize,
        layer: usize,
        heads: Option<[usize; 2]>,
        history: &History<'_>,
    ) -> Result<(), ForwardError> {
        let rows = self.positions.len();
        let fail = |problem: String| Err(ForwardError::Rows { row: 0, problem });
        match history {
            History::Cache(_) if self.sequences.is_empty() => {
                fail("a batch of whole sequences has no cache; use History::None".into())
            }
            History::Cache(_) if m != rows => fail(format!("an input of {m} rows for a batch of {rows}")),
            History::Cache(cache) => Ok(cache.check(layer, heads)?),
            History::None { .. } if !self.sequences.is_empty() => {
                fail("a batch over a cache needs it; use History::Cache".into())
            }
            History::None { length } if *length != rows => {
                fail(format!("sequences of {length} rows for a batch of sequences of {rows}"))
            }
            History::None { length } if *length == 0 || !m.is_multiple_of(*length) => {
                fail(format!("an input of {m} rows, which are no whole sequences of {length}"))
            }
            History::None { .. } => Ok(()),
        }
    }
}
