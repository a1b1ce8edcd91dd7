//! One transformer block.

use burn::config::Config;
use burn::module::Module;
use burn::nn::RmsNorm;
use burn::tensor::{Device, Tensor};

use super::{
    BitAttention, BitAttentionConfig, BitExperts, BitExpertsConfig, BitFeedForward, BitFeedForwardConfig,
    BitLinear, FeedForward, GatedActivation,
};
use crate::{Batch, DenseMatrix, ForwardError, History, ModelConfig, Norm, Projection};

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
    /// The feed-forward network or the experts, with their input norm.
    pub feed_forward: FeedForward,
    /// Both contributions are multiplied by this.
    #[module(skip)]
    residual_scale: f32,
}

impl BitBlockConfig {
    /// A block in the training state.
    pub fn init(&self, activation: GatedActivation, device: &Device) -> BitBlock {
        BitBlock {
            attention: self.attention.init(device),
            feed_forward: FeedForward::One(self.feed_forward.init(activation, device)),
            residual_scale: 1.0,
        }
    }
}

impl BitBlock {
    /// Block `layer` of a model, of given parts: `norm`, `linear` and `router` are asked for the norms, the projections
    /// (with their biases) and the router to experts [experts, hidden_size] that the configuration names.
    ///
    /// # Errors
    /// Those of `norm`, `linear` and `router`.
    pub fn assemble<E>(
        config: &ModelConfig,
        layer: usize,
        norm: impl Fn(Norm) -> Result<RmsNorm, E>,
        linear: impl Fn(usize, Projection) -> Result<BitLinear, E>,
        router: impl Fn(usize) -> Result<DenseMatrix, E>,
    ) -> Result<Self, E> {
        let with_norm = |linear: BitLinear, which: Norm| -> Result<BitLinear, E> {
            if config.sub_norms { Ok(linear.with_norm(norm(which)?)) } else { Ok(linear) }
        };
        let linear = |layer: usize, which: Projection| -> Result<BitLinear, E> {
            let linear = linear(layer, which)?;
            match config.options.projection_norms {
                true => Ok(linear.with_norm(norm(Norm::Input(layer, which))?)),
                false => Ok(linear),
            }
        };
        let attention =
            BitAttentionConfig::new(config.hidden_size, config.n_heads, config.n_kv_heads, config.head_dim)
                .with_window(config.window(layer))
                .with_rope(config.has_rope(layer));
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
        let clamp = config.swiglu_clamp(layer);
        let feed_forward = match config.experts(layer) {
            None => {
                let projections = [
                    linear(layer, Projection::Gate)?,
                    linear(layer, Projection::Up)?,
                    with_norm(linear(layer, Projection::Down)?, Norm::FeedForwardSub(layer))?,
                ];
                let input_norm = norm(Norm::FeedForward(layer))?;
                let network = BitFeedForward::assemble(input_norm, projections, config.activation);
                FeedForward::One(network.with_clamp(clamp))
            }
            Some(of) => {
                let expert = |number: usize| -> Result<[BitLinear; 3], E> {
                    let [gate, up, down] = Projection::of_expert(number).map(|which| linear(layer, which));
                    Ok([gate?, up?, down?])
                };
                let experts = (0..of.count).map(expert).collect::<Result<_, E>>()?;
                let norm = norm(Norm::FeedForward(layer))?;
                let config_of =
                    BitExpertsConfig::new(config.hidden_size, of.intermediate_size, of.count, of.used)
                        .with_renormalise(of.renormalise)
                        .with_clamp(clamp);
                FeedForward::Experts(config_of.assemble(norm, router(layer)?, experts, config.activation))
            }
        };
        Ok(Self {
            attention: attention.assemble(norm(Norm::Attention(layer))?, qk_norms, projections),
            feed_forward,
            residual_scale: config.options.residual_scale,
        })
    }

    /// The projections, in the order of [`Projection::of_layer`].
    pub fn projections(&self) -> Vec<(Projection, &BitLinear)> {
        let a = &self.attention;
        let mut all = vec![
            (Projection::Q, &a.q_proj),
            (Projection::K, &a.k_proj),
            (Projection::V, &a.v_proj),
            (Projection::O, &a.o_proj),
        ];
        match &self.feed_forward {
            FeedForward::One(f) => all.extend([
                (Projection::Gate, &f.gate_proj),
                (Projection::Up, &f.up_proj),
                (Projection::Down, &f.down_proj),
            ]),
            FeedForward::Experts(f) => {
                all.extend(f.experts.iter().enumerate().flat_map(|(number, expert)| {
                    let [gate, up, down] = Projection::of_expert(number);
                    [(gate, &expert.gate_proj), (up, &expert.up_proj), (down, &expert.down_proj)]
                }))
            }
        }
        all
    }

    /// [`projections`](Self::projections), mutable.
    pub fn projections_mut(&mut self) -> Vec<(Projection, &mut BitLinear)> {
        let a = &mut self.attention;
        let mut all = vec![
            (Projection::Q, &mut a.q_proj),
            (Projection::K, &mut a.k_proj),
            (Projection::V, &mut a.v_proj),
            (Projection::O, &mut a.o_proj),
        ];
        match &mut self.feed_forward {
            FeedForward::One(f) => all.extend([
                (Projection::Gate, &mut f.gate_proj),
                (Projection::Up, &mut f.up_proj),
                (Projection::Down, &mut f.down_proj),
            ]),
            FeedForward::Experts(f) => {
                all.extend(f.experts.iter_mut().enumerate().flat_map(|(number, expert)| {
                    let [gate, up, down] = Projection::of_expert(number);
                    [(gate, &mut expert.gate_proj), (up, &mut expert.up_proj), (down, &mut expert.down_proj)]
                }))
            }
        }
        all
    }

    /// The router to its experts, where it has some.
    pub fn router(&self) -> Option<&DenseMatrix> {
        match &self.feed_forward {
            FeedForward::One(_) => None,
            FeedForward::Experts(BitExperts { router, .. }) => Some(router),
        }
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
