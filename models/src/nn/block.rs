//! One transformer block.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{Device, Tensor};

use super::{BitAttention, BitAttentionConfig, BitFeedForward, BitFeedForwardConfig, GatedActivation};
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
