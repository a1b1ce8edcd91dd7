//! One transformer block.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{Device, Tensor};

use super::{
    BitAttention, BitAttentionConfig, BitFeedForward, BitFeedForwardConfig, BitLinear, GatedActivation,
};
use crate::bitnet::{Batch, ForwardError, History};

/// Configuration of a [`BitBlock`].
#[derive(Config, Debug)]
pub struct BitBlockConfig {
    /// The attention.
    pub attention: BitAttentionConfig,
    /// The feed-forward network.
    pub feed_forward: BitFeedForwardConfig,
}

/// x += attention(norm(x)); x += feed_forward(norm(x)).
#[derive(Module, Debug)]
pub struct BitBlock {
    /// The attention, with its input norm.
    pub attention: BitAttention,
    /// The feed-forward network, with its input norm.
    pub feed_forward: BitFeedForward,
}

impl BitBlockConfig {
    /// A block in the training state.
    pub fn init(&self, activation: GatedActivation, device: &Device) -> BitBlock {
        BitBlock {
            attention: self.attention.init(device),
            feed_forward: self.feed_forward.init(activation, device),
        }
    }
}

impl BitBlock {
    /// The ternary layers, in the order of [`Projection::ALL`](crate::checkpoint::Projection::ALL).
    pub(crate) fn projections(&self) -> [&BitLinear; 7] {
        let (a, f) = (&self.attention, &self.feed_forward);
        [&a.q_proj, &a.k_proj, &a.v_proj, &a.o_proj, &f.gate_proj, &f.up_proj, &f.down_proj]
    }

    /// The same, to change them.
    pub(crate) fn projections_mut(&mut self) -> [&mut BitLinear; 7] {
        let (a, f) = (&mut self.attention, &mut self.feed_forward);
        [
            &mut a.q_proj,
            &mut a.k_proj,
            &mut a.v_proj,
            &mut a.o_proj,
            &mut f.gate_proj,
            &mut f.up_proj,
            &mut f.down_proj,
        ]
    }

    /// The device that it computes on.
    pub fn device(&self) -> Device {
        self.attention.input_norm.gamma.val().device()
    }

    /// The residual stream after this block. Input and output: [rows of the batch, hidden_size].
    ///
    /// # Errors
    /// If a kernel or the cache refuses.
    pub fn forward(
        &self,
        x: Tensor<2>,
        layer: usize,
        batch: &Batch,
        history: &mut History<'_>,
    ) -> Result<Tensor<2>, ForwardError> {
        let x = x.clone() + self.attention.forward(x, layer, batch, history)?;
        Ok(x.clone() + self.feed_forward.forward(x, batch.quantise)?)
    }
}
