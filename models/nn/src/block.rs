//! One transformer block.

use burn::config::Config;
use burn::module::Module;
use burn::nn::RmsNorm;
use burn::tensor::{Device, Tensor};

use super::{
    BitAttention, BitAttentionConfig, BitFeedForward, BitFeedForwardConfig, BitLinear, GatedActivation,
};
use crate::{Batch, ForwardError, History, ModelConfig, Norm, Projection};

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
    /// Both contributions are multiplied by this.
    #[module(skip)]
    residual_scale: f32,
}

impl BitBlockConfig {
    /// A block in the training state.
    pub fn init(&self, activation: GatedActivation, device: &Device) -> BitBlock {
        BitBlock {
            attention: self.attention.init(device),
            feed_forward: self.feed_forward.init(activation, device),
            residual_scale: 1.0,
        }
    }
}

impl BitBlock {
    /// Block `layer` of a model, of given parts: `norm` and `linear` are asked for the norms and the projections (with
    /// their biases) that the configuration names.
    ///
    /// # Errors
    /// Those of `norm` and `linear`.
    pub fn assemble<E>(
        config: &ModelConfig,
        layer: usize,
        norm: impl Fn(Norm) -> Result<RmsNorm, E>,
        linear: impl Fn(usize, Projection) -> Result<BitLinear, E>,
    ) -> Result<Self, E> {
        let with_norm = |linear: BitLinear, which: Norm| -> Result<BitLinear, E> {
            if config.sub_norms { Ok(linear.with_norm(norm(which)?)) } else { Ok(linear) }
        };
        let attention =
            BitAttentionConfig::new(config.hidden_size, config.n_heads, config.n_kv_heads, config.head_dim);
        let qk_norms = match config.options.qk_norms {
            true => Some([norm(Norm::Query(layer))?, norm(Norm::Key(layer))?]),
            false => None,
        };
        let projections = [
            linear(layer, Projection::Q)?,
            linear(layer, Projection::K)?,
            linear(layer, Projection::V)?,
            with_norm(linear(layer, Projection::O)?, Norm::AttentionSub(layer))?,
        ];
        let feed_forward = [
            linear(layer, Projection::Gate)?,
            linear(layer, Projection::Up)?,
            with_norm(linear(layer, Projection::Down)?, Norm::FeedForwardSub(layer))?,
        ];
        Ok(Self {
            attention: attention.assemble(norm(Norm::Attention(layer))?, qk_norms, projections),
            feed_forward: BitFeedForward::assemble(
                norm(Norm::FeedForward(layer))?,
                feed_forward,
                config.activation,
            ),
            residual_scale: config.options.residual_scale,
        })
    }

    /// The projections, in the order of [`Projection::ALL`](crate::Projection::ALL).
    pub fn projections(&self) -> [&BitLinear; 7] {
        let (a, f) = (&self.attention, &self.feed_forward);
        [&a.q_proj, &a.k_proj, &a.v_proj, &a.o_proj, &f.gate_proj, &f.up_proj, &f.down_proj]
    }

    /// [`projections`](Self::projections), mutable.
    pub fn projections_mut(&mut self) -> [&mut BitLinear; 7] {
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
        let scaled = |y: Tensor<2>| if self.residual_scale == 1.0 { y } else { y * self.residual_scale };
        let x = x.clone() + scaled(self.attention.forward(x, layer, batch, history)?);
        Ok(x.clone() + scaled(self.feed_forward.forward(x, batch.quantise)?))
    }
}
