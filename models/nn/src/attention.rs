//! Grouped-query attention with BitLinear projections, and what may stand in its place.

use std::ops::Range;

use bitnet_burn_backends::ops;
use bitnet_burn_backends::{GatedActivation, SelfAttentionArgs};
use burn::config::Config;
use burn::module::Module;
use burn::nn::{RmsNorm, RmsNormConfig};
use burn::tensor::{Device, Tensor};

use crate::bit_linear::{check_features, in_dtype, in_f32, side_by_side};
use crate::{
    ActivationRule, Batch, BitDeltaNet, BitLinear, BitLinearConfig, ForwardError, History, KvCache, Stage,
    WeightScale,
};

/// How a block's rows see the rows before them.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "one for each layer; boxing would only be one more hop")]
pub enum Attention {
    /// Attention over all keys.
    Softmax(BitAttention),
    /// A gated DeltaNet.
    DeltaNet(BitDeltaNet),
}

impl Attention {
    /// The layer's contribution to the residual stream. Input and output: [rows of the batch, hidden_size].
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
        match self {
            Self::Softmax(attention) => attention.forward(x, layer, batch, history),
            Self::DeltaNet(delta) => delta.forward(x, layer, batch, history),
        }
    }

    /// The norm of its input.
    pub fn input_norm(&self) -> &RmsNorm {
        match self {
            Self::Softmax(attention) => &attention.input_norm,
            Self::DeltaNet(delta) => &delta.input_norm,
        }
    }

    /// The attention over all keys, if it is that.
    pub fn softmax(&self) -> Option<&BitAttention> {
        match self {
            Self::Softmax(attention) => Some(attention),
            Self::DeltaNet(_) => None,
        }
    }
}

/// Configuration of a [`BitAttention`].
#[derive(Config, Debug)]
pub struct BitAttentionConfig {
    /// Size of the residual stream.
    pub hidden_size: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Values a head.
    pub head_dim: usize,
    /// Whether the heads' output passes an RMSNorm before the output projection.
    #[config(default = true)]
    pub sub_norm: bool,
    /// Whether every query and key head passes an RMSNorm before RoPE (Qwen3).
    #[config(default = false)]
    pub qk_norms: bool,
    /// Positions that a row sees, its own and those right before it; `None`: all up to its own.
    pub window: Option<usize>,
    /// Whether queries and keys are turned by RoPE. Without, the layer knows no positions (but for the window's).
    #[config(default = true)]
    pub rope: bool,
    /// Values of a head that RoPE turns, the first ones; `None`: all.
    pub rope_dim: Option<usize>,
    /// Whether the context is multiplied by the sigmoid of gates, which q_proj has behind the queries of each head.
    #[config(default = false)]
    pub gate: bool,
    /// Whether q_proj, k_proj and v_proj have a bias.
    #[config(default = false)]
    pub qkv_bias: bool,
    /// Whether o_proj has one.
    #[config(default = false)]
    pub output_bias: bool,
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

/// o_proj(sub_norm(attention(q, k, v))) with q, k, v = projections of norm(x).
///
/// Made by [`BitAttentionConfig`], or from a checkpoint.
#[derive(Module, Debug)]
pub struct BitAttention {
    /// Norm of the input, shared by q, k and v.
    pub input_norm: RmsNorm,
    /// Queries.
    pub q_proj: BitLinear,
    /// Keys.
    pub k_proj: BitLinear,
    /// Values.
    pub v_proj: BitLinear,
    /// Output; its norm is `attn_sub_norm`.
    pub o_proj: BitLinear,
    /// Norm of every query head, before RoPE.
    pub q_norm: Option<RmsNorm>,
    /// Norm of every key head, before RoPE.
    pub k_norm: Option<RmsNorm>,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    #[module(skip)]
    window: Option<usize>,
    rope: bool,
    #[module(skip)]
    rope_dim: Option<usize>,
    gate: bool,
}

impl BitAttentionConfig {
    /// A layer in the training state.
    ///
    /// # Panics
    /// If a projection can't be quantised so, or has no features; or as [`assemble`](Self::assemble).
    pub fn init(&self, device: &Device) -> BitAttention {
        let (q, kv) = (self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim);
        let linear = |d_in, d_out| {
            BitLinearConfig::new(d_in, d_out).with_scale(self.scale).with_activations(self.activations)
        };
        let projections = [
            linear(self.hidden_size, if self.gate { 2 * q } else { q }).with_bias(self.qkv_bias).init(device),
            linear(self.hidden_size, kv).with_bias(self.qkv_bias).init(device),
            linear(self.hidden_size, kv).with_bias(self.qkv_bias).init(device),
            linear(q, self.hidden_size)
                .with_bias(self.output_bias)
                .with_norm(self.sub_norm)
                .with_norm_eps(self.eps)
                .init(device),
        ];
        let norm = |size| RmsNormConfig::new(size).with_epsilon(self.eps).init(device);
        let qk_norms = self.qk_norms.then(|| [norm(self.head_dim), norm(self.head_dim)]);
        self.assemble(norm(self.hidden_size), qk_norms, projections)
    }

    /// A layer of given parts: the norms of queries and keys where they have some; q, k, v and o (with its norm).
    ///
    /// # Panics
    /// If the key heads do not divide the query heads, or the projections have other sizes.
    pub fn assemble(
        &self,
        input_norm: RmsNorm,
        qk_norms: Option<[RmsNorm; 2]>,
        projections: [BitLinear; 4],
    ) -> BitAttention {
        let (heads, kv_heads, d) = (self.n_heads, self.n_kv_heads, self.head_dim);
        assert!(
            kv_heads > 0 && heads.is_multiple_of(kv_heads),
            "BitAttention: {heads} query heads over {kv_heads} key heads"
        );
        let (hidden, q) = (self.hidden_size, heads * d);
        let q_rows = if self.gate { 2 * q } else { q };
        let expected = [[q_rows, hidden], [kv_heads * d, hidden], [kv_heads * d, hidden], [hidden, q]];
        for ((layer, expected), name) in projections.iter().zip(expected).zip(["q", "k", "v", "o"]) {
            let found = [layer.d_output(), layer.d_input()];
            assert!(found == expected, "BitAttention: {name}_proj must be {expected:?}; it is {found:?}");
        }
        let [q_proj, k_proj, v_proj, o_proj] = projections;
        let [q_norm, k_norm] = qk_norms.map_or([None, None], |norms| norms.map(Some));
        BitAttention {
            q_norm,
            k_norm,
            input_norm,
            q_proj,
            k_proj,
            v_proj,
            o_proj,
            n_heads: self.n_heads,
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
            window: self.window,
            rope: self.rope,
            rope_dim: self.rope_dim.filter(|&dim| dim != self.head_dim),
            gate: self.gate,
        }
    }
}

impl BitAttention {
    /// The layer's contribution to the residual stream.
    ///
    /// # Shapes
    /// x and output: [rows of the batch, hidden_size].
    ///
    /// # Errors
    /// If rows, batch and history do not fit together, or a kernel or the cache refuses.
    ///
    /// # Panics
    /// If the input has other features, or the batch was made with a rotary encoding of another size.
    pub fn forward(
        &self,
        x: Tensor<2>,
        layer: usize,
        batch: &Batch,
        history: &mut History<'_>,
    ) -> Result<Tensor<2>, ForwardError> {
        let (m, dtype) = (x.dims()[0], x.dtype());
        check_features("BitAttention", self.q_proj.d_input(), &x.dims());
        batch.check(m, layer, Some([self.n_kv_heads, self.head_dim]), history)?;
        if m == 0 {
            return Ok(x);
        }
        if self.rope {
            let (turned, found) = (self.rope_dim.unwrap_or(self.head_dim), 2 * batch.angles.0.dims()[1]);
            assert!(
                turned == found,
                "BitAttention: RoPE turns {turned} values of a head; the batch's rotary encoding is for {found}"
            );
        }
        let (x, norm) = (in_f32(x), (in_f32(self.input_norm.gamma.val()), self.input_norm.epsilon as f32));
        let qkv = side_by_side(x, Some(norm), batch.quantise, &[&self.q_proj, &self.k_proj, &self.v_proj])?;
        batch.keep.see(layer, Stage::Qkv, &qkv);
        let (qkv, gates) = self.without_gates(qkv);
        let qkv = self.normed(qkv);
        let turned_here = self.rope && self.rope_dim.is_some();
        let qkv = if turned_here { self.turned(qkv, batch, history) } else { qkv };
        let (cos, sin) = match self.rope && !turned_here {
            true => batch.angles.clone(),
            false => self.no_angles(batch),
        };
        let context = match history {
            History::Cache(cache) => self.attend(qkv, layer, (batch, &(cos, sin)), cache)?,
            History::None { length } => {
                let args = SelfAttentionArgs {
                    n_heads: self.n_heads,
                    n_kv_heads: self.n_kv_heads,
                    head_dim: self.head_dim,
                    length: *length,
                    window: self.window,
                };
                ops::self_attention(qkv, cos, sin, args)
            }
        };
        let context = match gates {
            Some(gates) => ops::gated(Tensor::cat(vec![gates, context], 1), GatedActivation::Sigmoid),
            None => context,
        };
        batch.keep.see(layer, Stage::Context, &context);
        Ok(in_dtype(self.o_proj.forward_rows(context, batch.quantise)?, dtype))
    }

    /// Queries, keys and values, and the gates, which lie behind the queries of each head.
    fn without_gates(&self, qkv: Tensor<2>) -> (Tensor<2>, Option<Tensor<2>>) {
        if !self.gate {
            return (qkv, None);
        }
        let ([m, width], h, d) = (qkv.dims(), self.n_heads, self.head_dim);
        let of_heads = qkv.clone().slice([0..m, 0..2 * h * d]).reshape([m, h, 2 * d]);
        let part = |from: usize| of_heads.clone().slice([0..m, 0..h, from..from + d]).reshape([m, h * d]);
        let rest = qkv.slice([0..m, 2 * h * d..width]);
        (Tensor::cat(vec![part(0), rest], 1), Some(part(d)))
    }

    /// qkv with the first values of each query and key head turned by RoPE.
    fn turned(&self, qkv: Tensor<2>, batch: &Batch, history: &History<'_>) -> Tensor<2> {
        let ([m, width], d) = (qkv.dims(), self.head_dim);
        let (heads, turned) = (self.n_heads + self.n_kv_heads, self.rope_dim.unwrap_or(d));
        let (cos, sin) = match history {
            History::Cache(_) => batch.angles.clone(),
            // Those of one sequence, for each.
            History::None { length } => {
                let repeat = |angles: &Tensor<2>| angles.clone().repeat_dim(0, m / length);
                (repeat(&batch.angles.0), repeat(&batch.angles.1))
            }
        };
        let of_heads = qkv.clone().slice([0..m, 0..heads * d]).reshape([m, heads, d]);
        let first = of_heads.clone().slice([0..m, 0..heads, 0..turned]).reshape([m, heads * turned]);
        let first = ops::rope(first, cos, sin, turned).reshape([m, heads, turned]);
        let of_heads = Tensor::cat(vec![first, of_heads.slice([0..m, 0..heads, turned..d])], 2);
        Tensor::cat(vec![of_heads.reshape([m, heads * d]), qkv.slice([0..m, heads * d..width])], 1)
    }

    /// Angles that turn nothing.
    fn no_angles(&self, batch: &Batch) -> (Tensor<2>, Tensor<2>) {
        let (rows, device) = (batch.angles.0.dims()[0], batch.angles.0.device());
        let shape = [rows, self.head_dim / 2];
        (Tensor::ones(shape, &device), Tensor::zeros(shape, &device))
    }

    /// qkv with the norms of queries and keys applied to every head.
    fn normed(&self, qkv: Tensor<2>) -> Tensor<2> {
        let (None, None) = (&self.q_norm, &self.k_norm) else {
            let d = self.head_dim;
            let [m, width] = qkv.dims();
            let (keys, values) = (self.n_heads * d, (self.n_heads + self.n_kv_heads) * d);
            let part = |columns: Range<usize>, norm: Option<&RmsNorm>| {
                let (part, size) = (qkv.clone().slice([0..m, columns.clone()]), columns.len());
                let Some(norm) = norm else { return part };
                let heads = part.reshape([m * size / d, d]);
                ops::rms_norm(heads, in_f32(norm.gamma.val()), norm.epsilon as f32).reshape([m, size])
            };
            let parts = [
                part(0..keys, self.q_norm.as_ref()),
                part(keys..values, self.k_norm.as_ref()),
                part(values..width, None),
            ];
            return Tensor::cat(parts.into(), 1);
        };
        qkv
    }

    /// Attention of every sequence's rows over what its cache holds, and themselves.
    fn attend(
        &self,
        qkv: Tensor<2>,
        layer: usize,
        (batch, (cos, sin)): (&Batch, &(Tensor<2>, Tensor<2>)),
        cache: &mut KvCache,
    ) -> Result<Tensor<2>, ForwardError> {
        let mut outputs = Vec::with_capacity(batch.sequences.len());
        for sequence in &batch.sequences {
            let of = |tensor: &Tensor<2>| match batch.sequences.len() {
                1 => tensor.clone(),
                _ => tensor.clone().slice([sequence.rows.clone(), 0..tensor.dims()[1]]),
            };
            let shape = (self.n_heads, self.window);
            outputs.push(cache.attend(sequence.id, layer, of(&qkv), (of(cos), of(sin)), shape)?);
        }
        Ok(if outputs.len() == 1 { outputs.remove(0) } else { Tensor::cat(outputs, 0) })
    }
}
