//! What the layers compute on the way, kept for comparisons of two models.

use std::cell::RefCell;

use burn::tensor::Tensor;

/// A place in a block where values are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// The residual stream in front of the block; behind the last block with the number of blocks as the layer.
    Input,
    /// Queries, keys and values side by side, as projected: before their norms, RoPE, and gates of the output.
    Qkv,
    /// What attention found: the input of o_proj, before its norm.
    Context,
    /// What attention, or what is in its place, adds to the residual stream, before its factor.
    Attention,
    /// The residual stream in front of the feed-forward network.
    Middle,
    /// Gate and up side by side, as projected.
    GateUp,
    /// activation(gate) * up: the input of down_proj, before its norm.
    Gated,
    /// What the feed-forward network, or what is in its place, adds to the residual stream, before its factor.
    FeedForward,
}

/// The values of one stage, of all rows of a forward pass.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The block.
    pub layer: usize,
    /// The place in it.
    pub stage: Stage,
    /// [rows, features of the stage].
    pub values: Tensor<2>,
}

/// Where a forward pass keeps what it computes, if anywhere.
#[derive(Debug, Default)]
pub(crate) struct Keep(Option<RefCell<Vec<Seen>>>);

impl Keep {
    /// Keeps everything.
    pub fn all() -> Self {
        Self(Some(RefCell::default()))
    }

    /// Keeps the values, if values are kept.
    pub fn see(&self, layer: usize, stage: Stage, values: &Tensor<2>) {
        if let Some(seen) = &self.0 {
            seen.borrow_mut().push(Seen { layer, stage, values: values.clone() });
        }
    }

    /// What was kept, in the order of the computation.
    pub fn into_seen(self) -> Vec<Seen> {
        self.0.map(RefCell::into_inner).unwrap_or_default()
    }
}
