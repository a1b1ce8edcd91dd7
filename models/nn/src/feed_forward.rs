//! The gated feed-forward network with BitLinear projections, and what may stand in its place.

use bitnet_burn_backends::{GatedActivation, ops};
use burn::config::Config;
use burn::module::Module;
use burn::nn::{RmsNorm, RmsNormConfig};
use burn::tensor::{Device, Tensor};

use crate::bit_linear::{check_features, in_dtype, in_f32, side_by_side};
use crate::seen::Keep;
use crate::{ActivationRule, BitExperts, BitLinear, BitLinearConfig, ForwardError, Stage, WeightScale};

/// Configuration of a [`BitFeedForward`].
#[derive(Config, Debug)]
pub struct BitFeedForwardConfig {
    /// Size of the residual stream.
    pub hidden_size: usize,
    /// Size between the projections.
    pub intermediate_size: usize,
    /// What joins gate and up. Default: BitNet's squared ReLU.
    #[config(default = "GatedActivation::Relu2")]
    pub activation: GatedActivation,
    /// Gates are at most this, and what they are multiplied by lies between minus this and this.
    pub clamp: Option<f32>,
    /// Whether the projections have a bias.
    #[config(default = false)]
    pub bias: bool,
    /// Whether the gated activation passes an RMSNorm before the down projection.
    #[config(default = true)]
    pub sub_norm: bool,
    /// Weights of a projection that share a scale.
    #[config(default = "WeightScale::Tensor")]
    pub scale: WeightScale,
    /// How the projections' activations are quantised.
    #[config(default = "ActivationRule::Model")]
    pub activations: ActivationRule,
    /// Epsilon of the norms.
    #[config(default = 1e-5)]
    pub eps: f64,
}

/// The feed-forward network of a block.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "one for each layer; boxing would only be one more hop")]
pub enum FeedForward {
    /// One for all rows.
    One(BitFeedForward),
    /// Experts, some of them for each row.
    Experts(BitExperts),
}

impl FeedForward {
    /// The layer's contribution to the residual stream. Input and output: [rows, hidden_size].
    ///
    /// # Errors
    /// If a kernel refuses, or a device fails.
    pub fn forward(&self, x: Tensor<2>, quantise: bool) -> Result<Tensor<2>, ForwardError> {
        self.forward_keeping(x, quantise, 0, &Keep::default())
    }

    /// [`forward`](Self::forward) as a part of block `layer`.
    pub(crate) fn forward_keeping(
        &self,
        x: Tensor<2>,
        quantise: bool,
        layer: usize,
        keep: &Keep,
    ) -> Result<Tensor<2>, ForwardError> {
        match self {
            Self::One(network) => network.forward_keeping(x, quantise, layer, keep),
            Self::Experts(experts) => experts.forward(x, quantise),
        }
    }

    /// The norm of its input.
    pub fn input_norm(&self) -> &RmsNorm {
        match self {
            Self::One(network) => &network.input_norm,
            Self::Experts(experts) => &experts.input_norm,
        }
    }
}

/// down_proj(sub_norm(activation(gate_proj(norm(x))) * up_proj(norm(x)))).
///
/// Made by [`BitFeedForwardConfig`], or from a checkpoint.
#[derive(Module, Debug)]
pub struct BitFeedForward {
    /// Norm of the input, shared by gate and up.
    pub input_norm: RmsNorm,
    /// Gate.
    pub gate_proj: BitLinear,
    /// Up.
    pub up_proj: BitLinear,
    /// Down; its norm is `ffn_sub_norm`.
    pub down_proj: BitLinear,
    #[module(skip)]
    gate: Gate,
}

/// What joins gate and up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Gate {
    pub activation: GatedActivation,
    /// Gates are at most this, and up lies between minus this and this.
    pub clamp: Option<f32>,
}

impl Gate {
    /// activation(gate) * up, of rows [M, 2 * F] that hold gate and up side by side: [M, F].
    pub fn apply(self, gate_up: Tensor<2>) -> Tensor<2> {
        let Some(clamp) = self.clamp else { return ops::gated(gate_up, self.activation) };
        let halves = gate_up.chunk(2, 1);
        let [gate, up] = halves.try_into().expect("two halves");
        let limited = vec![gate.clamp_max(clamp), up.clamp(-clamp, clamp)];
        ops::gated(Tensor::cat(limited, 1), self.activation)
    }
}

impl BitFeedForwardConfig {
    /// A layer in the training state.
    ///
    /// # Panics
    /// If a projection can't be quantised so, or has no features.
    pub fn init(&self, device: &Device) -> BitFeedForward {
        let linear = |d_in, d_out| {
            let config = BitLinearConfig::new(d_in, d_out).with_bias(self.bias);
            config.with_scale(self.scale).with_activations(self.activations)
        };
        let up = || linear(self.hidden_size, self.intermediate_size).init(device);
        let down = linear(self.intermediate_size, self.hidden_size)
            .with_norm(self.sub_norm)
            .with_norm_eps(self.eps)
            .init(device);
        let norm = RmsNormConfig::new(self.hidden_size).with_epsilon(self.eps).init(device);
        BitFeedForward::assemble(norm, [up(), up(), down], self.activation).with_clamp(self.clamp)
    }
}

impl BitFeedForward {
    /// A layer of given parts: gate, up and down (with its norm).
    ///
    /// # Panics
    /// If their sizes do not fit together.
    pub fn assemble(input_norm: RmsNorm, projections: [BitLinear; 3], activation: GatedActivation) -> Self {
        let [gate_proj, up_proj, down_proj] = projections;
        let shape = |layer: &BitLinear| [layer.d_output(), layer.d_input()];
        let [f, k] = shape(&gate_proj);
        assert!(
            shape(&up_proj) == [f, k] && shape(&down_proj) == [k, f],
            "BitFeedForward: gate_proj is [{f}, {k}], so up_proj must be too, and down_proj [{k}, {f}]; they are {:?} and {:?}",
            shape(&up_proj),
            shape(&down_proj)
        );
        Self { input_norm, gate_proj, up_proj, down_proj, gate: Gate { activation, clamp: None } }
    }

    /// The same with gates of at most `clamp`, and what they are multiplied by between minus `clamp` and `clamp`.
    pub fn with_clamp(self, clamp: Option<f32>) -> Self {
        Self { gate: Gate { clamp, ..self.gate }, ..self }
    }

    /// The layer's contribution to the residual stream. Input and output: [rows, hidden_size]. With `quantise` set to false,
    /// weights and activations stay floats: the float twin of a layer in the training state.
    ///
    /// # Errors
    /// If a kernel refuses.
    ///
    /// # Panics
    /// If the input has other features.
    pub fn forward(&self, x: Tensor<2>, quantise: bool) -> Result<Tensor<2>, ForwardError> {
        self.forward_keeping(x, quantise, 0, &Keep::default())
    }

    fn forward_keeping(
        &self,
        x: Tensor<2>,
        quantise: bool,
        layer: usize,
        keep: &Keep,
    ) -> Result<Tensor<2>, ForwardError> {
        let [rows, _] = x.dims();
        check_features("BitFeedForward", self.gate_proj.d_input(), &x.dims());
        if rows == 0 {
            return Ok(x);
        }
        let dtype = x.dtype();
        let (x, norm) = (in_f32(x), (in_f32(self.input_norm.gamma.val()), self.input_norm.epsilon as f32));
        let gate_up = side_by_side(x, Some(norm), quantise, &[&self.gate_proj, &self.up_proj])?;
        keep.see(layer, Stage::GateUp, &gate_up);
        let gated = self.gate.apply(gate_up);
        keep.see(layer, Stage::Gated, &gated);
        Ok(in_dtype(self.down_proj.forward_rows(gated, quantise)?, dtype))
    }
}
