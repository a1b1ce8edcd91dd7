//! One transformer block.

use bitnet_burn_manager::profile::{self, Operation, Part};
use burn::config::Config;
use burn::module::Module;
use burn::nn::RmsNorm;
use burn::tensor::{Device, Tensor};

use crate::bit_linear::{in_dtype, in_f32};
use crate::delta_net::{DeltaNetFloats, values};
use crate::{
    Attention, Batch, BitAttentionConfig, BitDeltaNetConfig, BitExpertsConfig, BitFeedForward,
    BitFeedForwardConfig, BitLinear, DenseMatrix, FeedForward, FloatPart, ForwardError, History, ModelConfig,
    Norm, Projection, SharedExpert, Stage,
};

/// Configuration of a [`BitBlock`].
#[derive(Config, Debug)]
pub struct BitBlockConfig {
    /// The attention.
    pub attention: BitAttentionConfig,
    /// The feed-forward network.
    pub feed_forward: BitFeedForwardConfig,
}

/// x += attention(norm(x)); x += feed_forward(norm(x)), with a gated DeltaNet in place of the attention of some layers.
#[derive(Module, Debug)]
pub struct BitBlock {
    /// The attention or the gated DeltaNet, with its input norm.
    pub attention: Attention,
    /// The feed-forward network or the experts, with their input norm.
    pub feed_forward: FeedForward,
    /// Both contributions are multiplied by this.
    #[module(skip)]
    residual_scale: f32,
}

impl BitBlockConfig {
    /// A block in the training state.
    ///
    /// # Panics
    /// If a projection can't be quantised so, or sizes do not fit together.
    pub fn init(&self, device: &Device) -> BitBlock {
        BitBlock {
            attention: Attention::Softmax(self.attention.init(device)),
            feed_forward: FeedForward::One(self.feed_forward.init(device)),
            residual_scale: 1.0,
        }
    }
}

impl BitBlock {
    /// Block `layer` of a model, of given parts: `norm`, `linear` and `float` are asked for the norms, the projections (with
    /// their biases) and the parts that are floats in every model, as the configuration names them.
    ///
    /// # Errors
    /// Those of `norm`, `linear` and `float`.
    pub fn assemble<E>(
        config: &ModelConfig,
        layer: usize,
        norm: impl Fn(Norm) -> Result<RmsNorm, E>,
        linear: impl Fn(usize, Projection) -> Result<BitLinear, E>,
        float: impl Fn(usize, FloatPart) -> Result<DenseMatrix, E>,
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
        let attention = match config.delta_net(layer) {
            None => {
                let attention = BitAttentionConfig::new(
                    config.hidden_size,
                    config.n_heads,
                    config.n_kv_heads,
                    config.head_dim,
                )
                .with_window(config.window(layer))
                .with_rope(config.has_rope(layer))
                .with_rope_dim(config.options.rope_dim)
                .with_gate(config.options.attention_gate);
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
                Attention::Softmax(attention.assemble(norm(Norm::Attention(layer))?, qk_norms, projections))
            }
            Some(delta) => {
                let [qkv, gate, out] = Projection::DELTA_NET.map(|which| linear(layer, which));
                let of = |part| float(layer, part);
                let floats = DeltaNetFloats {
                    decay_proj: of(FloatPart::DeltaDecay)?,
                    strength_proj: of(FloatPart::DeltaStrength)?,
                    convolution: values(of(FloatPart::DeltaConvolution)?),
                    rate: values(of(FloatPart::DeltaRate)?),
                    bias: values(of(FloatPart::DeltaBias)?),
                };
                let norms = [norm(Norm::Attention(layer))?, norm(Norm::Delta(layer))?];
                let config = BitDeltaNetConfig::of(config.hidden_size, delta);
                Attention::DeltaNet(config.assemble(norms, [qkv?, gate?, out?], floats))
            }
        };
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
                let shared = match of.shared {
                    Some(_) => {
                        let [gate, up, down] = Projection::SHARED.map(|which| linear(layer, which));
                        let gate_of = float(layer, FloatPart::SharedRouter)?;
                        Some(SharedExpert::assemble([gate?, up?, down?], gate_of))
                    }
                    None => None,
                };
                let norm = norm(Norm::FeedForward(layer))?;
                let config_of =
                    BitExpertsConfig::new(config.hidden_size, of.intermediate_size, of.count, of.used)
                        .with_renormalise(of.renormalise)
                        .with_activation(config.activation)
                        .with_clamp(clamp);
                let router = float(layer, FloatPart::Router)?;
                let experts = config_of.assemble(norm, router, experts);
                FeedForward::Experts(experts.with_shared(shared))
            }
        };
        Ok(Self { attention, feed_forward, residual_scale: config.options.residual_scale })
    }

    /// The projections, in the order of [`Projection::of_layer`].
    pub fn projections(&self) -> Vec<(Projection, &BitLinear)> {
        let mut all = match &self.attention {
            Attention::Softmax(a) => vec![
                (Projection::Q, &a.q_proj),
                (Projection::K, &a.k_proj),
                (Projection::V, &a.v_proj),
                (Projection::O, &a.o_proj),
            ],
            Attention::DeltaNet(a) => vec![
                (Projection::DeltaQkv, &a.qkv_proj),
                (Projection::DeltaGate, &a.gate_proj),
                (Projection::DeltaOut, &a.out_proj),
            ],
        };
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
                }));
                all.extend(f.shared.iter().flat_map(|SharedExpert { expert, .. }| {
                    [
                        (Projection::SharedGate, &expert.gate_proj),
                        (Projection::SharedUp, &expert.up_proj),
                        (Projection::SharedDown, &expert.down_proj),
                    ]
                }));
            }
        }
        all
    }

    /// [`projections`](Self::projections), mutable.
    pub fn projections_mut(&mut self) -> Vec<(Projection, &mut BitLinear)> {
        let mut all = match &mut self.attention {
            Attention::Softmax(a) => vec![
                (Projection::Q, &mut a.q_proj),
                (Projection::K, &mut a.k_proj),
                (Projection::V, &mut a.v_proj),
                (Projection::O, &mut a.o_proj),
            ],
            Attention::DeltaNet(a) => vec![
                (Projection::DeltaQkv, &mut a.qkv_proj),
                (Projection::DeltaGate, &mut a.gate_proj),
                (Projection::DeltaOut, &mut a.out_proj),
            ],
        };
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
                }));
                all.extend(f.shared.iter_mut().flat_map(|SharedExpert { expert, .. }| {
                    [
                        (Projection::SharedGate, &mut expert.gate_proj),
                        (Projection::SharedUp, &mut expert.up_proj),
                        (Projection::SharedDown, &mut expert.down_proj),
                    ]
                }));
            }
        }
        all
    }

    /// The matrices that are floats in every model.
    pub fn float_matrices(&self) -> Vec<(FloatPart, &DenseMatrix)> {
        let mut all = Vec::new();
        if let Attention::DeltaNet(delta) = &self.attention {
            all.push((FloatPart::DeltaDecay, &delta.decay_proj));
            all.push((FloatPart::DeltaStrength, &delta.strength_proj));
        }
        if let FeedForward::Experts(experts) = &self.feed_forward {
            all.push((FloatPart::Router, &experts.router));
            all.extend(experts.shared.iter().map(|shared| (FloatPart::SharedRouter, &shared.gate)));
        }
        all
    }

    /// The device that it computes on.
    pub fn device(&self) -> Device {
        self.attention.input_norm().gamma.val().device()
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
        let dtype = x.dtype();
        let x = in_f32(x);
        let scaled = |y: Tensor<2>| if self.residual_scale == 1.0 { y } else { y * self.residual_scale };
        batch.keep.see(layer, Stage::Input, &x);
        let attention = {
            let _part = profile::part(Part::Attention);
            self.attention.forward(x.clone(), layer, batch, history)?
        };
        batch.keep.see(layer, Stage::Attention, &attention);
        let x = {
            let _span = profile::span(Operation::Residual);
            x + scaled(attention)
        };
        batch.keep.see(layer, Stage::Middle, &x);
        let (keep, quantise) = (&batch.keep, batch.quantise);
        let feed_forward = {
            let _part = profile::part(Part::FeedForward);
            self.feed_forward.forward_keeping(x.clone(), quantise, layer, keep)?
        };
        batch.keep.see(layer, Stage::FeedForward, &feed_forward);
        let _span = profile::span(Operation::Residual);
        Ok(in_dtype(x + scaled(feed_forward), dtype))
    }
}
