//! Gated DeltaNet with BitLinear projections (Yang et al., "Gated Delta Networks", arXiv 2412.06464), as in Qwen3.5: linear
//! attention whose memory of a sequence has one size, however long the sequence is.

use bitnet_burn_backends::ops::{self, DeltaNetParameters, DeltaNetState};
use bitnet_burn_backends::{DeltaNetArgs, DeltaNetShape};
use burn::config::Config;
use burn::module::{Initializer, Module, Param, ParamId};
use burn::nn::{RmsNorm, RmsNormConfig};
use burn::tensor::{Device, Distribution, Tensor};

use crate::bit_linear::side_by_side;
use crate::{
    ActivationRule, Batch, BitLinear, BitLinearConfig, DeltaNet, DenseMatrix, DenseWeight, ForwardError,
    History, WeightScale,
};

/// Configuration of a [`BitDeltaNet`].
#[derive(Config, Debug)]
pub struct BitDeltaNetConfig {
    /// Size of the residual stream.
    pub hidden_size: usize,
    /// Heads of queries and of keys.
    pub key_heads: usize,
    /// Heads of values: a multiple of `key_heads`.
    pub value_heads: usize,
    /// Values of a query or key head.
    pub key_dim: usize,
    /// Values of a value head.
    pub value_dim: usize,
    /// Rows that the convolution sees: its own, and those before it. At least 2.
    #[config(default = 4)]
    pub taps: usize,
    /// Whether value head j reads key head j % key_heads. Otherwise it reads j / (value_heads / key_heads).
    #[config(default = false)]
    pub tiled: bool,
    /// Of a tiled one: whether the output projection takes the value heads in the order of one that is not.
    #[config(default = false)]
    pub grouped_output: bool,
    /// Weights of a projection that share a scale.
    #[config(default = "WeightScale::Tensor")]
    pub scale: WeightScale,
    /// How the projections' activations are quantised.
    #[config(default = "ActivationRule::Model")]
    pub activations: ActivationRule,
    /// Epsilon of the norms.
    #[config(default = 1e-6)]
    pub eps: f64,
}

/// out_proj(rms_norm(o) * silu(gate_proj(x))) with x = norm(input), and o the answers of a memory to queries.
///
/// Queries, keys and values are silu(convolution(qkv_proj(x))), over the last `taps` rows and channel by channel; queries and
/// keys are divided by their lengths, queries also by sqrt(key_dim). Each value head has a memory S, which is zero at the
/// beginning of a sequence, and for each row, with g = exp(rate * softplus(decay_proj(x) + bias)) and
/// b = sigmoid(strength_proj(x)): S = g S; S = S + k (b (v - S^T k))^T; o = S^T q.
///
/// Made by [`BitDeltaNetConfig`], or from a checkpoint.
#[derive(Module, Debug)]
pub struct BitDeltaNet {
    /// Norm of the input, shared by all projections.
    pub input_norm: RmsNorm,
    /// Queries, keys and values.
    pub qkv_proj: BitLinear,
    /// The output's gates.
    pub gate_proj: BitLinear,
    /// Output.
    pub out_proj: BitLinear,
    /// Logits of the decays [value_heads, hidden_size]; it sees float activations.
    pub decay_proj: DenseMatrix,
    /// Logits of the write strengths [value_heads, hidden_size]; it sees float activations.
    pub strength_proj: DenseMatrix,
    /// [taps, channels], the oldest row first.
    pub convolution: Param<Tensor<2>>,
    /// Rates of decay [1, value_heads]: not positive.
    pub rate: Param<Tensor<2>>,
    /// Added to the logits of the decays [1, value_heads].
    pub bias: Param<Tensor<2>>,
    /// Norm of each value head's output.
    pub norm: RmsNorm,
    #[module(skip)]
    args: DeltaNetArgs,
    grouped_output: bool,
}

/// The parts of a [`BitDeltaNet`] that are floats in every model.
#[derive(Debug)]
pub struct DeltaNetFloats {
    /// [value_heads, hidden_size].
    pub decay_proj: DenseMatrix,
    /// [value_heads, hidden_size].
    pub strength_proj: DenseMatrix,
    /// [taps, channels].
    pub convolution: Param<Tensor<2>>,
    /// [1, value_heads].
    pub rate: Param<Tensor<2>>,
    /// [1, value_heads].
    pub bias: Param<Tensor<2>>,
}

impl BitDeltaNetConfig {
    /// That of a model's layer.
    pub fn of(hidden_size: usize, delta: &DeltaNet) -> Self {
        let DeltaNet { key_heads, value_heads, key_dim, value_dim, taps, tiled, grouped_output, .. } = *delta;
        Self::new(hidden_size, key_heads, value_heads, key_dim, value_dim)
            .with_taps(taps)
            .with_tiled(tiled)
            .with_grouped_output(grouped_output)
    }

    fn shape(&self) -> DeltaNetShape {
        let Self { key_heads, value_heads, key_dim, value_dim, taps, tiled, .. } = *self;
        DeltaNetShape { key_heads, value_heads, key_dim, value_dim, taps, tiled }
    }

    /// A layer in the training state: rates of decay between -16 and 0, biases of 1, as in Qwen3.5.
    pub fn init(&self, device: &Device) -> BitDeltaNet {
        let (shape, hidden) = (self.shape(), self.hidden_size);
        let linear = |d_in, d_out| {
            let linear = BitLinearConfig::new(d_in, d_out).with_scale(self.scale);
            linear.with_activations(self.activations).init(device)
        };
        let projections = [
            linear(hidden, shape.channels()),
            linear(hidden, shape.values()),
            linear(shape.values(), hidden),
        ];
        let initializer = Initializer::KaimingUniform { gain: 1.0 / 3f64.sqrt(), fan_out_only: false };
        let matrix = |[n, k]: [usize; 2]| initializer.init_with([n, k], Some(k), Some(n), device);
        let uniform = |dims: [usize; 2], low, high| {
            let values = Tensor::random(dims, Distribution::Uniform(low, high), device);
            Param::initialized(ParamId::new(), values.require_grad())
        };
        let bound = 1.0 / (self.taps as f64).sqrt();
        let floats = DeltaNetFloats {
            decay_proj: DenseMatrix::trainable(matrix([self.value_heads, hidden])),
            strength_proj: DenseMatrix::trainable(matrix([self.value_heads, hidden])),
            convolution: uniform([self.taps, shape.channels()], -bound, bound),
            rate: uniform([1, self.value_heads], -16.0, -1e-3),
            bias: Param::initialized(
                ParamId::new(),
                Tensor::ones([1, self.value_heads], device).require_grad(),
            ),
        };
        let norm = |size| RmsNormConfig::new(size).with_epsilon(self.eps).init(device);
        self.assemble([norm(hidden), norm(self.value_dim)], projections, floats)
    }

    /// A layer of given parts: the norms of its input and of the value heads' outputs; qkv, gate and out.
    pub fn assemble(
        &self,
        [input_norm, norm]: [RmsNorm; 2],
        [qkv_proj, gate_proj, out_proj]: [BitLinear; 3],
        floats: DeltaNetFloats,
    ) -> BitDeltaNet {
        let DeltaNetFloats { decay_proj, strength_proj, convolution, rate, bias } = floats;
        BitDeltaNet {
            input_norm,
            qkv_proj,
            gate_proj,
            out_proj,
            decay_proj,
            strength_proj,
            convolution,
            rate,
            bias,
            args: DeltaNetArgs { shape: self.shape(), eps: norm.epsilon as f32 },
            norm,
            grouped_output: self.grouped_output,
        }
    }
}

impl BitDeltaNet {
    /// The layer's contribution to the residual stream.
    ///
    /// # Shapes
    /// x and output: [rows of the batch, hidden_size].
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
        batch.check(x.dims()[0], layer, None, history)?;
        let normed = ops::rms_norm(x, self.input_norm.gamma.val(), self.input_norm.epsilon as f32);
        let projections = [&self.qkv_proj, &self.gate_proj];
        let projected = side_by_side(normed.clone(), None, batch.quantise, &projections)?;
        let logits = [self.decay_proj.forward(normed.clone()), self.strength_proj.forward(normed)];
        let [decays, strengths] = logits;
        let rows = Tensor::cat(vec![projected, decays, strengths], 1);
        let (m, width) = (rows.dims()[0], rows.dims()[1]);
        let mut contexts = Vec::new();
        match history {
            History::Cache(cache) => {
                for sequence in &batch.sequences {
                    let rows = rows.clone().slice([sequence.rows.clone(), 0..width]);
                    let state = cache.delta_net(sequence.id, layer, &self.args.shape)?;
                    let (context, state) = ops::delta_net(rows, self.parameters(), state, self.args);
                    cache.set_delta_net(sequence.id, layer, state)?;
                    contexts.push(context);
                }
            }
            History::None { length } => {
                for from in (0..m).step_by(*length) {
                    let rows = rows.clone().slice([from..from + *length, 0..width]);
                    let state = DeltaNetState::zeros(&self.args.shape, &rows.device());
                    contexts.push(ops::delta_net(rows, self.parameters(), state, self.args).0);
                }
            }
        }
        let context = if contexts.len() == 1 { contexts.remove(0) } else { Tensor::cat(contexts, 0) };
        Ok(self.out_proj.forward_rows(self.ordered(context), batch.quantise)?)
    }

    fn parameters(&self) -> DeltaNetParameters {
        let heads = [self.args.shape.value_heads];
        DeltaNetParameters {
            convolution: self.convolution.val(),
            // (Training may move it; a memory that grows is none.)
            decay: self.rate.val().clamp_max(0.0).reshape(heads),
            time_bias: self.bias.val().reshape(heads),
            norm: self.norm.gamma.val(),
        }
    }

    /// The value heads in the order that the output projection takes them in.
    fn ordered(&self, context: Tensor<2>) -> Tensor<2> {
        if !self.grouped_output {
            return context;
        }
        let DeltaNetShape { key_heads, value_heads, value_dim, .. } = self.args.shape;
        let [m, width] = context.dims();
        let tiles = context.reshape([m, value_heads / key_heads, key_heads, value_dim]);
        tiles.swap_dims(1, 2).reshape([m, width])
    }

    /// The same with its matrices of floats frozen.
    pub(crate) fn into_stored(mut self) -> Self {
        self.decay_proj = self.decay_proj.into_stored();
        self.strength_proj = self.strength_proj.into_stored();
        self
    }
}

/// The values of a matrix, as a parameter of a layer that computes with them.
pub(crate) fn values(matrix: DenseMatrix) -> Param<Tensor<2>> {
    match matrix.weight {
        DenseWeight::Float(values) => values,
        DenseWeight::Stored(_) => {
            let rows: Vec<u32> = (0..matrix.args().n as u32).collect();
            Param::initialized(ParamId::new(), matrix.rows(&rows))
        }
    }
}
