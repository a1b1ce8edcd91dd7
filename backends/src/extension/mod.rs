//! The extension trait.

mod args;
mod autodiff;
#[cfg(feature = "cube")]
mod cube;
mod tensors;

use bitnet_burn_formats::WeightScale;
use burn::backend::backend_extension;
#[cfg(feature = "fusion")]
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::{FloatTensor, IntTensor};
#[cfg(feature = "fusion")]
use burn::tensor::{DType, Shape};

pub use self::args::{
    AttentionArgs, BitLinearArgs, CacheType, DeltaNetArgs, DeltaNetShape, DenseArgs, GatedActivation,
    HostKernels, Matrix, MatrixKernels, NoInt8, SelfAttentionArgs,
};
pub(crate) use self::args::{Faster, Repacked};
pub use self::tensors::{
    CacheTensor, CachedAttention, DeltaNetOutput, DeltaNetTensors, DeltaNetWeights, InputNorm, TernaryWeight,
    WeightGroup,
};
#[cfg(feature = "fusion")]
use self::tensors::{
    CacheTensorMetadata, CachedAttentionMetadata, DeltaNetOutputMetadata, DeltaNetTensorsMetadata,
};
use crate::default;

/// [rows of x, columns]: what an operation gives that computes by rows.
#[cfg(feature = "fusion")]
fn by_rows(x: &Shape, columns: usize) -> Shape {
    Shape::new([x[0], columns])
}

/// What is known of [`TernaryBackend::cached_attention`]'s results before they are there.
#[cfg(feature = "fusion")]
fn cached_attention_metadata(
    qkv: &TensorSpec,
    keys: &CacheTensorMetadata,
    values: &CacheTensorMetadata,
    args: &AttentionArgs,
) -> CachedAttentionMetadata {
    let context = TensorSpec::new(by_rows(&qkv.shape, args.n_heads * args.head_dim), qkv.dtype);
    CachedAttentionMetadata { context, keys: keys.clone(), values: values.clone() }
}

/// What is known of [`TernaryBackend::delta_net`]'s results before they are there.
#[cfg(feature = "fusion")]
fn delta_net_metadata(
    rows: &TensorSpec,
    state: &DeltaNetTensorsMetadata,
    args: &DeltaNetArgs,
) -> DeltaNetOutputMetadata {
    let context = TensorSpec::new(by_rows(&rows.shape, args.shape.values()), rows.dtype);
    DeltaNetOutputMetadata { context, state: state.clone() }
}

/// BitNet's operations. See the [crate].
///
/// With the feature `fusion` an operation on a GPU is registered, and computed when Burn thinks it is time: what
/// `#[fusion]` says of its output is what the caller knows until then.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(feature = "cube"),
    Remote: cfg(feature = "remote"),
    Autodiff,
    Fusion: cfg(feature = "fusion"),
)]
pub trait TernaryBackend: burn::backend::Backend {
    /// y = concat_i(quantise(norm(x)) * W_iᵀ), the BitNet linear layer.
    ///
    /// With a = max(max |x|, 1e-5) of each row of the (normalised) input and
    /// q = clamp(round_half_even(x * (127 / a)), -128, 127):
    /// y[m, n] = (f32)(sum_k q[m, k] * code[n, k]) * (scale * (a / 127)).
    ///
    /// Where matrices have [scales of groups](bitnet_burn_manager::ScaleKind), q and a are those of groups of a row's values,
    /// and y is what [`OPERATION_SCALED_TERNARY_MATMUL`](bitnet_burn_plugin::abi::OPERATION_SCALED_TERNARY_MATMUL) defines:
    /// bodies for host memory compute it to the bit. The default body rounds each product and sum of the groups' exact sums;
    /// it is off by at most G * 2^-23 times the sum of the magnitudes of the G terms.
    ///
    /// # Shapes
    /// x [M, K]; the output is [M, sum of N].
    #[fusion(dtype = x, shape = by_rows(x, args.total_n()))]
    fn bit_linear(
        x: FloatTensor<Self>,
        #[extension_type] norm: InputNorm<Self>,
        #[extension_type] weights: WeightGroup<Self>,
        args: BitLinearArgs,
    ) -> FloatTensor<Self> {
        default::bit_linear::<Self>(x, norm, weights, &args)
    }

    /// The gradient of [`bit_linear`](Self::bit_linear) (without its norm) for its input, by the
    /// straight-through estimator: concat(dy_i) * concat(W_i).
    ///
    /// # Shapes
    /// dy [M, sum of N]; the output is [M, K].
    #[fusion(dtype = dy, shape = by_rows(dy, args.k))]
    fn bit_linear_backward(
        dy: FloatTensor<Self>,
        #[extension_type] weights: WeightGroup<Self>,
        args: BitLinearArgs,
    ) -> FloatTensor<Self> {
        default::bit_linear_backward::<Self>(dy, weights, &args)
    }

    /// Activations as the kernels see them: q * (a / 127), with a and q as for [`bit_linear`](Self::bit_linear), of each
    /// `group` of a row's values (0: of the row). Its gradient is the straight-through estimator's: that of the
    /// output, unchanged (Bengio et al., arXiv 1308.3432).
    ///
    /// # Shapes
    /// x [M, K]; the output is like x.
    #[fusion(dtype = x, shape = x)]
    fn fake_quantise(x: FloatTensor<Self>, group: usize) -> FloatTensor<Self> {
        default::fake_quantise::<Self>(x, group)
    }

    /// Latent weights as packing freezes them, absmean: clamp(round(w / s), -1, 1) * s with
    /// s = max(mean |w|, 1e-5) of the weights that share a [scale](WeightScale). Its gradient is the straight-through
    /// estimator's: that of the output, unchanged.
    ///
    /// Bodies for host memory add |w| in f64 in the order of the indices, as
    /// [`quant::absmean_scale`](bitnet_burn_formats::quant::absmean_scale) does; other devices may come to an s
    /// that differs in its last bit.
    ///
    /// # Shapes
    /// w [N, K]; the output is like w.
    #[fusion(dtype = w, shape = w)]
    fn ternarise(w: FloatTensor<Self>, scale: WeightScale) -> FloatTensor<Self> {
        default::ternarise::<Self>(w, scale)
    }

    /// Causal attention of whole sequences over themselves, with rotary position embedding: row m of a
    /// sequence is at position m and sees the rows up to itself, or the last of them that its
    /// [window](SelfAttentionArgs::window) has room for. Scores are scaled by 1 / sqrt(d).
    ///
    /// # Shapes
    /// qkv [sequences * length, (heads + 2 * kv heads) * d]: queries, keys and values side by side; cos and
    /// sin [length, d / 2]; the output is [sequences * length, heads * d].
    #[fusion(dtype = qkv, shape = by_rows(qkv, args.n_heads * args.head_dim))]
    fn self_attention(
        qkv: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        args: SelfAttentionArgs,
    ) -> FloatTensor<Self> {
        default::self_attention::<Self>(qkv, cos, sin, &args)
    }

    /// The gradient of [`self_attention`](Self::self_attention) for qkv.
    ///
    /// # Shapes
    /// dy like the output of that; the output is like qkv.
    #[fusion(dtype = qkv, shape = qkv)]
    fn self_attention_backward(
        qkv: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        args: SelfAttentionArgs,
    ) -> FloatTensor<Self> {
        default::self_attention_backward::<Self>(qkv, cos, sin, dy, &args)
    }

    /// `-ln softmax(logits)[target]`, by rows.
    ///
    /// # Shapes
    /// logits [M, N], targets `[M]`; the output is `[M]`.
    #[fusion(dtype = logits, shape = Shape::new([logits[0]]))]
    fn cross_entropy(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        default::cross_entropy::<Self>(logits, targets)
    }

    /// The gradient of [`cross_entropy`](Self::cross_entropy) for the logits:
    /// d * (softmax(logits) - 1 at the target).
    ///
    /// # Shapes
    /// d `[M]`; the output is like the logits.
    #[fusion(dtype = logits, shape = logits)]
    fn cross_entropy_backward(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        d: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        default::cross_entropy_backward::<Self>(logits, targets, d)
    }

    /// The gradient of [`rms_norm`](Self::rms_norm) for x: with r = 1 / sqrt(mean(x^2) + eps) and
    /// g = dy * weight, r * (g - x * r^2 * mean(g * x)).
    ///
    /// # Shapes
    /// dy and the output are like x.
    #[fusion(dtype = x, shape = x)]
    fn rms_norm_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        eps: f32,
    ) -> FloatTensor<Self> {
        default::rms_norm_backward::<Self>(x, weight, dy, eps)
    }

    /// The gradient of [`rms_norm`](Self::rms_norm) for its weight: the sum of dy * x * r over the rows.
    ///
    /// # Shapes
    /// dy like x; the output is `[K]`.
    #[fusion(dtype = x, shape = Shape::new([x[1]]))]
    fn rms_norm_backward_weight(x: FloatTensor<Self>, dy: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        default::rms_norm_backward_weight::<Self>(x, dy, eps)
    }

    /// The gradient of [`gated`](Self::gated).
    ///
    /// # Shapes
    /// dy [M, F]; gate_up and the output are [M, 2 * F].
    #[fusion(dtype = gate_up, shape = gate_up)]
    fn gated_backward(
        gate_up: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        activation: GatedActivation,
    ) -> FloatTensor<Self> {
        default::gated_backward::<Self>(gate_up, dy, activation)
    }

    /// x / sqrt(mean(x^2) + eps) * weight, by rows.
    ///
    /// # Shapes
    /// x `[M, K]`, weight `[K]`; the output is `[M, K]`.
    #[fusion(dtype = x, shape = x)]
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        default::rms_norm::<Self>(x, weight, eps)
    }

    /// The Walsh-Hadamard transform of each run of `block` values of a row x: H(s * x), or s * H(x) where `inverse` is set,
    /// with `H[i][j] = (-1)^popcount(i & j) / sqrt(block)`.
    ///
    /// # Shapes
    /// x [M, K], signs s `[K]`; the output is like x. `block` is a power of two that divides K.
    #[fusion(dtype = x, shape = x)]
    fn hadamard(
        x: FloatTensor<Self>,
        signs: FloatTensor<Self>,
        block: usize,
        inverse: bool,
    ) -> FloatTensor<Self> {
        default::hadamard::<Self>(x, signs, block, inverse)
    }

    /// Rotary position embedding by half rotation: element j of a head pairs with j + d / 2.
    ///
    /// # Shapes
    /// x [M, heads * d], cos and sin [M, d / 2]; the output is like x.
    #[fusion(dtype = x, shape = x)]
    fn rope(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        head_dim: usize,
    ) -> FloatTensor<Self> {
        default::rope::<Self>(x, cos, sin, head_dim)
    }

    /// Writes rows into a KV cache from `position` on: in place while the cache is uniquely owned. An int8
    /// cache quantises each position and head as [`fake_quantise`](Self::fake_quantise) does a row.
    ///
    /// # Shapes
    /// cache [kv heads, capacity, d], rows [M, kv heads * d]; the output is the cache.
    #[fusion(meta = |cache, _rows, _position| cache.clone())]
    fn cache_append(
        #[extension_type] cache: CacheTensor<Self>,
        rows: FloatTensor<Self>,
        position: usize,
    ) -> CacheTensor<Self> {
        default::cache_append::<Self>(cache, rows, position)
    }

    /// Causal attention of the rows of one sequence over its cache: row m is at `position + m` and sees
    /// the positions up to its own, or the last of them that its [window](AttentionArgs::window) has room for. Scores are
    /// scaled by 1 / sqrt(d).
    ///
    /// # Shapes
    /// q [M, heads * d], keys and values [kv heads, capacity, d]; the output is like q.
    #[fusion(dtype = q, shape = q)]
    fn attention(
        q: FloatTensor<Self>,
        #[extension_type] keys: CacheTensor<Self>,
        #[extension_type] values: CacheTensor<Self>,
        args: AttentionArgs,
    ) -> FloatTensor<Self> {
        default::attention::<Self>(q, keys, values, &args)
    }

    /// What attention does with rows of one sequence, from projections to context:
    /// [`rope`](Self::rope) for queries and keys, [`cache_append`](Self::cache_append) for keys and values, and
    /// [`attention`](Self::attention).
    ///
    /// # Shapes
    /// qkv [M, (heads + 2 * kv heads) * d]: queries, keys and values side by side; cos and sin [M, d / 2]; keys and
    /// values [kv heads, capacity, d]; the context is [M, heads * d].
    #[fusion(meta = |qkv, _cos, _sin, keys, values, args| cached_attention_metadata(qkv, keys, values, args))]
    fn cached_attention(
        qkv: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        #[extension_type] keys: CacheTensor<Self>,
        #[extension_type] values: CacheTensor<Self>,
        args: AttentionArgs,
    ) -> CachedAttention<Self> {
        default::cached_attention::<Self>(qkv, cos, sin, keys, values, args)
    }

    /// Gated DeltaNet (arXiv 2412.06464) of the next rows of a sequence: linear attention over a memory S for each value
    /// head, of which [`delta_net`](bitnet_burn_cpu::delta_net::delta_net) has the formula.
    ///
    /// # Shapes
    /// rows [M, channels + value_heads * value_dim + 2 * value_heads]: queries, keys, values and gates side by side, then the
    /// logits of the decays and those of the write strengths; the context is [M, value_heads * value_dim].
    #[fusion(meta = |rows, _weights, state, args| delta_net_metadata(rows, state, args))]
    fn delta_net(
        rows: FloatTensor<Self>,
        #[extension_type] weights: DeltaNetWeights<Self>,
        #[extension_type] state: DeltaNetTensors<Self>,
        args: DeltaNetArgs,
    ) -> DeltaNetOutput<Self> {
        default::delta_net::<Self>(rows, weights, state, &args)
    }

    /// The gated activation of a feed-forward network.
    ///
    /// # Shapes
    /// gate_up [M, 2 * F]; the output is [M, F].
    #[fusion(dtype = gate_up, shape = by_rows(gate_up, gate_up[1] / 2))]
    fn gated(gate_up: FloatTensor<Self>, activation: GatedActivation) -> FloatTensor<Self> {
        default::gated::<Self>(gate_up, activation)
    }

    /// y = x * Wᵀ with W in its file's format, decoded to f32.
    ///
    /// With [`args.int8`](DenseArgs::int8), x is quantised by rows first, as for
    /// [`bit_linear`](Self::bit_linear): x ~ q * (a / 127). Bodies for host memory, given tiles, then add the
    /// exact integer sums of the format's blocks (32 weights, of Q6_K 256) times their scales in ascending order, each
    /// product and sum rounded to f32, and multiply by a / 127: the same bits on every CPU. The default body
    /// multiplies q by the decoded weights, and differs from that by f32's rounding only (at most 1e-5 of
    /// the sum of the products' magnitudes).
    ///
    /// # Shapes
    /// x [M, K], words: the raw bytes as U32 words, in rows or in [tiles](DenseArgs::tiled); the output is
    /// [M, N].
    #[fusion(dtype = x, shape = by_rows(x, args.n))]
    fn dense_linear(x: FloatTensor<Self>, words: IntTensor<Self>, args: DenseArgs) -> FloatTensor<Self> {
        default::dense_linear::<Self>(x, words, &args)
    }

    /// The gradient of [`dense_linear`](Self::dense_linear) for its input, with quantisation passed as if it were not there:
    /// dy * W.
    ///
    /// # Shapes
    /// dy [M, N]; the output is [M, K].
    #[fusion(dtype = dy, shape = by_rows(dy, args.k))]
    fn dense_linear_backward(
        dy: FloatTensor<Self>,
        words: IntTensor<Self>,
        args: DenseArgs,
    ) -> FloatTensor<Self> {
        default::dense_linear_backward::<Self>(dy, words, &args)
    }

    /// Rows of W, decoded to f32: an embedding.
    ///
    /// # Shapes
    /// words: the raw bytes as U32 words, in rows, ids `[M]`; the output is `[M, K]`.
    #[fusion(dtype = DType::F32, shape = by_rows(ids, args.k))]
    fn dense_rows(words: IntTensor<Self>, ids: IntTensor<Self>, args: DenseArgs) -> FloatTensor<Self> {
        default::dense_rows::<Self>(words, ids, &args)
    }
}
