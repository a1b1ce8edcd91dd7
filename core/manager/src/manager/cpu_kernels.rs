//! What was chosen for the weights of one shape.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use bitnet_burn_plugin::canonical;

use super::matrices::Matrices;
use super::slot::Slot;
use super::{BUCKETS, Entry, Job, Packed, WeightShape, bucket, lock, packing};

/// Which kernels multiply by the weights of one shape, and in which layout the weights are kept.
#[derive(Debug)]
pub struct CpuKernels {
    pub(super) of: WeightShape,
    /// The private layout, with a kernel that packs it; `None` for canonical weights in place.
    pub(super) packer: Option<Arc<Entry>>,
    /// Whether kernels may be measured for it.
    pub(super) measures: bool,
    weight_bytes: usize,
    /// Without what the manager keeps behind the packing.
    own_bytes: usize,
    slots: [Slot; BUCKETS.len()],
    /// Weights whose packing is that of a plugin that is in quarantine or became slow, packed anew, by their
    /// checksum. They live as long as the users of the weights, which hold this choice.
    pub(super) fallback_weights: Mutex<HashMap<u64, Arc<FallbackWeights>>>,
    /// What kernels from files compute with.
    pub(super) matrices: Matrices,
}

/// Weights that were packed anew.
#[derive(Debug)]
pub(super) struct FallbackWeights {
    pub choice: Arc<CpuKernels>,
    /// The canonical bytes, where the choice reads those.
    pub canonical: Vec<u8>,
    pub packed: Packed,
}

/// The name of weights that a plugin from a file packed: their checksum, which is the same at any address. They have
/// one at their end.
pub(super) fn seal_of(weights: &[u8]) -> Option<u64> {
    weights.last_chunk().map(|seal| u64::from_le_bytes(*seal))
}

impl FallbackWeights {
    pub fn job<'a>(&'a self, of: &Job<'a>) -> Job<'a> {
        let weights = match &self.packed {
            Packed::Canonical => &self.canonical,
            Packed::Private(buffer) => buffer.as_slice(),
        };
        Job { choice: &self.choice, weights, ..*of }
    }
}

impl CpuKernels {
    pub(super) fn new(of: WeightShape, packer: Option<Arc<Entry>>) -> Self {
        let WeightShape { n, k, .. } = of;
        let (weight_bytes, own_bytes) = match &packer {
            Some(entry) => {
                let stored = packing::stored_bytes(entry, n, k);
                stored.zip(entry.kernel.weight_bytes(n, k)).expect("a candidate can pack the shape")
            }
            None => (n * canonical::row_bytes(k), n * canonical::row_bytes(k)),
        };
        Self {
            of,
            packer,
            measures: true,
            weight_bytes,
            own_bytes,
            slots: Default::default(),
            fallback_weights: Mutex::default(),
            matrices: Matrices::default(),
        }
    }

    /// Canonical weights, whose kernels are not measured.
    pub(super) fn unmeasured(of: WeightShape) -> Self {
        Self { measures: false, ..Self::new(of, None) }
    }

    /// Output and input features.
    pub fn shape(&self) -> (usize, usize) {
        (self.of.n, self.of.k)
    }

    /// The same with the kind of the scales.
    pub fn weight_shape(&self) -> WeightShape {
        self.of
    }

    /// Private layout (`plugin/layout`) that the weights are packed in, or `None` for canonical.
    pub fn layout(&self) -> Option<&str> {
        self.packer.as_ref().and_then(|entry| entry.kernel.layout())
    }

    /// Whether the weights are canonical or packed by a kernel that is linked in, whose packing needs no check.
    pub fn is_built_in(&self) -> bool {
        self.packer.as_ref().is_none_or(|entry| entry.watch.is_none())
    }

    /// Bytes of the weights in the chosen layout, with what the manager keeps behind them.
    pub fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    /// Whether a kernel reads the weights as they are.
    pub(super) fn is_read_by(&self, entry: &Entry) -> bool {
        entry.kernel.layout() == self.layout()
            && entry.kernel.weight_bytes(self.of.n, self.of.k) == Some(self.own_bytes)
    }

    /// The part of stored weights that a kernel reads.
    pub(super) fn own_bytes<'a>(&self, stored: &'a [u8]) -> &'a [u8] {
        &stored[..self.own_bytes]
    }

    /// Drops weights that were packed anew.
    pub(super) fn forget_fallback_weights(&self, stored: &[u8]) {
        let mut known = lock(&self.fallback_weights);
        seal_of(stored).and_then(|seal| known.remove(&seal));
    }

    pub(super) fn slot(&self, m: usize) -> &Slot {
        &self.slots[bucket(m)]
    }

    pub(super) fn slots(&self) -> impl Iterator<Item = (usize, &Slot)> {
        BUCKETS.iter().map(|(_, rows)| *rows).zip(&self.slots)
    }
}
