//! The extension trait and its arguments.

use std::sync::Arc;

use bitnet_burn_formats::DenseFormat;
use bitnet_burn_formats::dense_tiles::tiled_bytes;
use bitnet_burn_manager::Choice;
#[cfg(feature = "fusion")]
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{ExtensionType, TensorMetadata, backend_extension};
use burn::tensor::{DType, Shape};
use serde::{Deserialize, Serialize};

use crate::default;

/// One packed ternary matrix.
#[derive(ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub struct TernaryWeight<B: burn::backend::Backend> {
    /// U32 words: canonical rows [N, ceil(K / 128) * 8], or a kernel's private packing.
    pub codes: IntTensor<B>,
    /// `[1]`: weight = code * scale.
    pub scale: FloatTensor<B>,
}

/// One to three matrices that share their activations (q/k/v, gate/up).
#[derive(ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub enum TernaryWeights<B: burn::backend::Backend> {
    /// One matrix.
    One(#[extension_type] TernaryWeight<B>),
    /// Two.
    Two(#[extension_type] TernaryWeight<B>, #[extension_type] TernaryWeight<B>),
    /// Three.
    Three(
        #[extension_type] TernaryWeight<B>,
        #[extension_type] TernaryWeight<B>,
        #[extension_type] TernaryWeight<B>,
    ),
}

impl<B: burn::backend::Backend> TernaryWeights<B> {
    /// The matrices in order.
    pub fn into_vec(self) -> Vec<TernaryWeight<B>> {
        match self {
            Self::One(a) => vec![a],
            Self::Two(a, b) => vec![a, b],
            Self::Three(a, b, c) => vec![a, b, c],
        }
    }

    /// Matrices in order.
    ///
    /// # Panics
    /// If there are not one to three.
    pub fn from_vec(matrices: Vec<TernaryWeight<B>>) -> Self {
        let mut matrices = matrices.into_iter();
        match (matrices.next(), matrices.next(), matrices.next(), matrices.next()) {
            (Some(a), None, None, None) => Self::One(a),
            (Some(a), Some(b), None, None) => Self::Two(a, b),
            (Some(a), Some(b), Some(c), None) => Self::Three(a, b, c),
            _ => panic!("bit_linear takes one to three matrices"),
        }
    }
}

/// What is done to the input before it is quantised.
#[derive(ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub enum InputNorm<B: burn::backend::Backend> {
    /// Nothing.
    None,
    /// RMSNorm with this weight `[K]`.
    Rms(FloatTensor<B>),
}

/// Shape and kernels of one of a bit_linear's matrices.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// Output features.
    pub n: usize,
    /// The chosen kernels, which also say how the codes are laid out; `None`: canonical, and chosen at
    /// the first use.
    pub choice: Option<Kernels>,
}

/// The kernels that were chosen for a matrix, and the layout that its codes are in.
#[derive(Clone, Debug)]
pub enum Kernels {
    /// Those of the CPU.
    Host(Arc<Choice>),
    /// Those of plugins that are GPU source.
    #[cfg(feature = "cube")]
    Gpu(Arc<crate::gpu::GpuMatrix>),
}

impl Kernels {
    /// Private layout (`plugin/layout`) that the codes are in, or `None` for canonical.
    pub fn layout(&self) -> Option<&str> {
        match self {
            Self::Host(choice) => choice.layout(),
            #[cfg(feature = "cube")]
            Self::Gpu(matrix) => matrix.layout(),
        }
    }
}

/// Arguments of [`TernaryBackend::bit_linear`] that are no tensors.
#[derive(Clone, Debug)]
pub struct BitLinearArgs {
    /// Input features.
    pub k: usize,
    /// The matrices.
    pub matrices: Vec<Matrix>,
    /// Epsilon of the RMSNorm.
    pub eps: f32,
    /// Whether activations are quantised to int8 (BitNet does; a float reference does not).
    pub quantise: bool,
}

impl BitLinearArgs {
    /// Output features of all matrices.
    pub fn total_n(&self) -> usize {
        self.matrices.iter().map(|m| m.n).sum()
    }
}

/// Type of a KV cache's values. They are always read back through it, so results do not depend on how a
/// prompt was cut into chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheType {
    /// 4 bytes a value.
    #[default]
    F32,
    /// 2 bytes a value: rounded to nearest even, 11 bits.
    F16,
    /// 1 byte a value, and 4 for the scale of each position and head: quantised by absmax, as activations are.
    /// A value moves by at most half a step, max(absmax, 1e-5) / 254, give or take f32's rounding.
    Int8,
}

impl CacheType {
    /// Its name: `f32`, `f16` or `int8`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Int8 => "int8",
        }
    }

    /// Bytes of a position's keys, or of its values, in a head of `head_dim`.
    pub const fn row_bytes(self, head_dim: usize) -> usize {
        match self {
            Self::F32 => head_dim.saturating_mul(4),
            Self::F16 => head_dim.saturating_mul(2),
            Self::Int8 => head_dim.saturating_add(4),
        }
    }

    /// What the device has to support.
    pub(crate) const fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Int8 => DType::I8,
        }
    }
}

/// Keys or values of one sequence and layer.
#[allow(clippy::large_enum_variant, reason = "a few of them for each layer; a box would cost a token more")]
#[derive(ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub enum CacheTensor<B: burn::backend::Backend> {
    /// F32 or F16 [kv heads, capacity, d].
    Float(FloatTensor<B>),
    /// A value is code * scale, rounded to f32.
    Int8 {
        /// I8 [kv heads, capacity, d]; on GPUs, U32 [kv heads, capacity, d / 4], of four codes each.
        codes: IntTensor<B>,
        /// [kv heads, capacity]: absmax / 127.
        scale: FloatTensor<B>,
    },
}

impl<B: burn::backend::Backend> CacheTensor<B> {
    /// [kv heads, capacity, d].
    pub fn shape(&self) -> Shape {
        match self {
            Self::Float(tensor) => tensor.shape(),
            Self::Int8 { codes, .. } => codes.shape(),
        }
    }
}

impl<B: burn::backend::Backend> Clone for CacheTensor<B> {
    fn clone(&self) -> Self {
        match self {
            Self::Float(tensor) => Self::Float(tensor.clone()),
            Self::Int8 { codes, scale } => Self::Int8 { codes: codes.clone(), scale: scale.clone() },
        }
    }
}

/// What [`TernaryBackend::attend`] gives.
#[derive(ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub struct Attended<B: burn::backend::Backend> {
    /// [M, heads * d].
    pub context: FloatTensor<B>,
    /// The caches, with the rows' keys and values.
    #[extension_type]
    pub keys: CacheTensor<B>,
    /// As `keys`.
    #[extension_type]
    pub values: CacheTensor<B>,
}

/// Arguments of [`TernaryBackend::attend`] and [`TernaryBackend::attention`].
#[derive(Clone, Copy, Debug)]
pub struct AttentionArgs {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; query head h reads kv head h / (n_heads / n_kv_heads).
    pub n_kv_heads: usize,
    /// Values a head.
    pub head_dim: usize,
    /// Position of the first query row in its sequence.
    pub position: usize,
}

/// Arguments of [`TernaryBackend::self_attention`].
#[derive(Clone, Copy, Debug)]
pub struct SelfAttentionArgs {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; query head h reads kv head h / (n_heads / n_kv_heads).
    pub n_kv_heads: usize,
    /// Values a head.
    pub head_dim: usize,
    /// Rows of each sequence.
    pub length: usize,
}

/// A dense matrix [n, k] in the format of its file.
///
/// ```
/// use bitnet_burn_backends::DenseArgs;
/// use bitnet_burn_formats::DenseFormat;
///
/// let head = DenseArgs::new(DenseFormat::Q6_K, 128256, 2560).with_int8()?;
/// assert!(head.int8);
/// assert!(DenseArgs::new(DenseFormat::F16, 128256, 2560).with_int8().is_err());
/// # Ok::<(), bitnet_burn_backends::NoInt8>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DenseArgs {
    /// The format.
    pub format: DenseFormat,
    /// Rows: output features, or vocabulary.
    pub n: usize,
    /// Columns: input features, or hidden size.
    pub k: usize,
    /// Whether [`dense_linear`](TernaryBackend::dense_linear) quantises its activations to int8. Only the
    /// formats of [`DenseArgs::INT8_FORMATS`] can, see [`with_int8`](Self::with_int8). Looking rows up does
    /// not depend on it.
    pub int8: bool,
    /// Whether the words are not rows but tiles of 16 rows
    /// ([`dense_tiles`](bitnet_burn_formats::dense_tiles)), which bodies for host memory multiply by int8
    /// activations; [`ops::dense_matrix`](crate::ops::dense_matrix) makes them.
    pub tiled: bool,
}

/// A format whose products with int8 activations are not integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} weights can't be multiplied by int8 activations; Q8_0, Q6_K and Q4_0 can", .format.name())]
#[non_exhaustive]
pub struct NoInt8 {
    /// The format.
    pub format: DenseFormat,
}

impl DenseArgs {
    /// The formats that hold integers and scales.
    pub const INT8_FORMATS: [DenseFormat; 3] = [DenseFormat::Q8_0, DenseFormat::Q6_K, DenseFormat::Q4_0];

    /// A matrix that is multiplied by f32 activations.
    pub const fn new(format: DenseFormat, n: usize, k: usize) -> Self {
        Self { format, n, k, int8: false, tiled: false }
    }

    /// Bytes of the weights; `None` where the format has no such rows, or that is too large.
    pub fn bytes(&self) -> Option<usize> {
        match self.tiled {
            true => tiled_bytes(self.format, self.n, self.k),
            false => self.format.row_bytes(self.k).and_then(|row| row.checked_mul(self.n)),
        }
    }

    /// The same, multiplied by activations that are quantised to int8, by absmax and row.
    ///
    /// # Errors
    /// If the format holds floats.
    pub fn with_int8(self) -> Result<Self, NoInt8> {
        let format = self.format;
        if Self::INT8_FORMATS.contains(&format) {
            Ok(Self { int8: true, ..self })
        } else {
            Err(NoInt8 { format })
        }
    }
}

/// What the feed-forward network does with gate and up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GatedActivation {
    /// relu(gate)^2 * up
    Relu2,
    /// silu(gate) * up
    Silu,
}

/// [rows of x, columns]: what an operation gives that computes by rows.
#[cfg(feature = "fusion")]
fn by_rows(x: &Shape, columns: usize) -> Shape {
    Shape::new([x[0], columns])
}

/// What is known of [`TernaryBackend::attend`]'s results before they are there.
#[cfg(feature = "fusion")]
fn attended(
    qkv: &TensorSpec,
    keys: &CacheTensorMetadata,
    values: &CacheTensorMetadata,
    args: &AttentionArgs,
) -> AttendedMetadata {
    let context = TensorSpec::new(by_rows(&qkv.shape, args.n_heads * args.head_dim), qkv.dtype);
    AttendedMetadata { context, keys: keys.clone(), values: values.clone() }
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
    /// # Shapes
    /// x [M, K]; the output is [M, sum of N].
    #[fusion(dtype = x, shape = by_rows(x, args.total_n()))]
    fn bit_linear(
        x: FloatTensor<Self>,
        #[extension_type] norm: InputNorm<Self>,
        #[extension_type] weights: TernaryWeights<Self>,
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
        #[extension_type] weights: TernaryWeights<Self>,
        args: BitLinearArgs,
    ) -> FloatTensor<Self> {
        default::bit_linear_backward::<Self>(dy, weights, &args)
    }

    /// Activations as the kernels see them, by rows: q * (a / 127), with a and q as for
    /// [`bit_linear`](Self::bit_linear). Its gradient is the straight-through estimator's: that of the
    /// output, unchanged (Bengio et al., arXiv 1308.3432).
    ///
    /// # Shapes
    /// x [M, K]; the output is like x.
    #[fusion(dtype = x, shape = x)]
    fn fake_quantise(x: FloatTensor<Self>) -> FloatTensor<Self> {
        default::fake_quantise::<Self>(x)
    }

    /// Latent weights as packing freezes them, absmean: clamp(round(w / s), -1, 1) * s with
    /// s = max(mean |w|, 1e-5). Its gradient is the straight-through estimator's: that of the output,
    /// unchanged.
    ///
    /// Bodies for host memory add |w| in f64 in the order of the indices, as
    /// [`quant::absmean_scale`](bitnet_burn_formats::quant::absmean_scale) does; other devices may come to an s
    /// that differs in its last bit.
    ///
    /// # Shapes
    /// w [N, K]; the output is like w.
    #[fusion(dtype = w, shape = w)]
    fn ternarise(w: FloatTensor<Self>) -> FloatTensor<Self> {
        default::ternarise::<Self>(w)
    }

    /// Causal attention of whole sequences over themselves, with rotary position embedding: row m of a
    /// sequence is at position m and sees the rows up to itself. Scores are scaled by 1 / sqrt(d).
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
    /// the positions up to its own. Scores are scaled by 1 / sqrt(d).
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
    #[fusion(meta = |qkv, _cos, _sin, keys, values, args| attended(qkv, keys, values, args))]
    fn attend(
        qkv: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        #[extension_type] keys: CacheTensor<Self>,
        #[extension_type] values: CacheTensor<Self>,
        args: AttentionArgs,
    ) -> Attended<Self> {
        default::attend::<Self>(qkv, cos, sin, keys, values, args)
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

    /// Rows of W, decoded to f32: an embedding.
    ///
    /// # Shapes
    /// words: the raw bytes as U32 words, in rows, ids `[M]`; the output is `[M, K]`.
    #[fusion(dtype = DType::F32, shape = by_rows(ids, args.k))]
    fn dense_rows(words: IntTensor<Self>, ids: IntTensor<Self>, args: DenseArgs) -> FloatTensor<Self> {
        default::dense_rows::<Self>(words, ids, &args)
    }
}

#[cfg(feature = "cube")]
impl TernaryBackend for burn_cubecl::CubeBackend {
    fn bit_linear(
        x: FloatTensor<Self>,
        norm: InputNorm<Self>,
        weights: TernaryWeights<Self>,
        args: BitLinearArgs,
    ) -> FloatTensor<Self> {
        crate::gpu::bit_linear(x, norm, weights, args)
    }

    fn bit_linear_backward(
        dy: FloatTensor<Self>,
        weights: TernaryWeights<Self>,
        args: BitLinearArgs,
    ) -> FloatTensor<Self> {
        crate::gpu::bit_linear_backward(dy, weights, args)
    }

    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        crate::gpu::rms_norm(x, weight, eps)
    }

    fn attend(
        qkv: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        keys: CacheTensor<Self>,
        values: CacheTensor<Self>,
        args: AttentionArgs,
    ) -> Attended<Self> {
        crate::gpu::attend(qkv, cos, sin, keys, values, args)
    }

    fn gated(gate_up: FloatTensor<Self>, activation: GatedActivation) -> FloatTensor<Self> {
        crate::gpu::gated(gate_up, activation)
    }

    fn dense_linear(x: FloatTensor<Self>, words: IntTensor<Self>, args: DenseArgs) -> FloatTensor<Self> {
        crate::gpu::dense_linear(x, words, args)
    }

    fn dense_rows(words: IntTensor<Self>, ids: IntTensor<Self>, args: DenseArgs) -> FloatTensor<Self> {
        crate::gpu::dense_rows(words, ids, args)
    }
}

mod autodiff {
    use burn::backend::autodiff::checkpoint::base::Checkpointer;
    use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
    use burn::backend::autodiff::grads::Gradients;
    use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
    use burn::backend::tensor::{FloatTensor, IntTensor};
    use burn::backend::{Autodiff, Backend};

    use super::{
        BitLinearArgs, GatedActivation, InputNorm, SelfAttentionArgs, TernaryBackend, TernaryWeight,
        TernaryWeights,
    };

    #[derive(Debug)]
    struct BitLinearBackward;

    /// Codes and scales of the inner backend.
    type Saved<B> = Vec<(IntTensor<B>, FloatTensor<B>)>;

    fn weights<B: TernaryBackend>(saved: Saved<B>) -> TernaryWeights<B> {
        let matrices = saved.into_iter().map(|(codes, scale)| TernaryWeight { codes, scale });
        TernaryWeights::from_vec(matrices.collect())
    }

    impl<B: TernaryBackend> Backward<B, 1> for BitLinearBackward {
        type State = (Saved<B>, BitLinearArgs);

        fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
            let [node_x] = ops.parents;
            let dy = grads.consume::<B>(&ops.node);
            let (saved, args) = ops.state;
            if let Some(node) = node_x {
                grads.register::<B>(node.id, B::bit_linear_backward(dy, weights(saved), args));
            }
        }
    }

    #[derive(Debug)]
    struct StraightThrough;

    impl<B: Backend> Backward<B, 1> for StraightThrough {
        type State = ();

        fn backward(self, ops: Ops<(), 1>, grads: &mut Gradients, _: &mut Checkpointer) {
            let [node_x] = ops.parents;
            let dy = grads.consume::<B>(&ops.node);
            if let Some(node) = node_x {
                grads.register::<B>(node.id, dy);
            }
        }
    }

    #[derive(Debug)]
    struct RmsNormBackward;

    impl<B: TernaryBackend> Backward<B, 2> for RmsNormBackward {
        type State = (FloatTensor<B>, FloatTensor<B>, f32);

        fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
            let [node_x, node_weight] = ops.parents;
            let dy = grads.consume::<B>(&ops.node);
            let (x, weight, eps) = ops.state;
            if let Some(node) = node_weight {
                let dw = B::rms_norm_backward_weight(x.clone(), dy.clone(), eps);
                grads.register::<B>(node.id, dw);
            }
            if let Some(node) = node_x {
                grads.register::<B>(node.id, B::rms_norm_backward(x, weight, dy, eps));
            }
        }
    }

    #[derive(Debug)]
    struct GatedBackward;

    impl<B: TernaryBackend> Backward<B, 1> for GatedBackward {
        type State = (FloatTensor<B>, GatedActivation);

        fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
            let [node_x] = ops.parents;
            let dy = grads.consume::<B>(&ops.node);
            let (gate_up, activation) = ops.state;
            if let Some(node) = node_x {
                grads.register::<B>(node.id, B::gated_backward(gate_up, dy, activation));
            }
        }
    }

    #[derive(Debug)]
    struct SelfAttentionBackward;

    impl<B: TernaryBackend> Backward<B, 1> for SelfAttentionBackward {
        type State = (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>, SelfAttentionArgs);

        fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
            let [node_x] = ops.parents;
            let dy = grads.consume::<B>(&ops.node);
            let (qkv, cos, sin, args) = ops.state;
            if let Some(node) = node_x {
                grads.register::<B>(node.id, B::self_attention_backward(qkv, cos, sin, dy, args));
            }
        }
    }

    #[derive(Debug)]
    struct CrossEntropyBackward;

    impl<B: TernaryBackend> Backward<B, 1> for CrossEntropyBackward {
        type State = (FloatTensor<B>, IntTensor<B>);

        fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
            let [node_x] = ops.parents;
            let d = grads.consume::<B>(&ops.node);
            let (logits, targets) = ops.state;
            if let Some(node) = node_x {
                grads.register::<B>(node.id, B::cross_entropy_backward(logits, targets, d));
            }
        }
    }

    /// Gradients that differ from those of the default bodies, or are cheaper. A packed layer's codes and
    /// scales are constants; the gradient for its input is the straight-through estimator's.
    impl<B: TernaryBackend, C: CheckpointStrategy> TernaryBackend for Autodiff<B, C> {
        fn bit_linear(
            x: FloatTensor<Self>,
            norm: InputNorm<Self>,
            matrices: TernaryWeights<Self>,
            args: BitLinearArgs,
        ) -> FloatTensor<Self> {
            // The norm differentiates by itself.
            let x = match norm {
                InputNorm::None => x,
                InputNorm::Rms(weight) => Self::rms_norm(x, weight, args.eps),
            };
            let saved: Saved<B> =
                matrices.into_vec().into_iter().map(|w| (w.codes, w.scale.into_primitive())).collect();
            let forward = |x, saved| B::bit_linear(x, InputNorm::None, weights(saved), args.clone());
            match BitLinearBackward.prepare::<C>([x.node()]).compute_bound().stateful() {
                OpsKind::Tracked(prep) => {
                    let y = forward(x.into_primitive(), saved.clone());
                    prep.finish((saved, args), y)
                }
                OpsKind::UnTracked(prep) => prep.finish(forward(x.into_primitive(), saved)),
            }
        }

        fn fake_quantise(x: FloatTensor<Self>) -> FloatTensor<Self> {
            let prep = StraightThrough.prepare::<C>([x.node()]).compute_bound();
            prep.stateless(B::fake_quantise(x.into_primitive()))
        }

        fn ternarise(w: FloatTensor<Self>) -> FloatTensor<Self> {
            let prep = StraightThrough.prepare::<C>([w.node()]).compute_bound();
            prep.stateless(B::ternarise(w.into_primitive()))
        }

        fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
            let prep = RmsNormBackward.prepare::<C>([x.node(), weight.node()]).compute_bound();
            let (x, weight) = (x.into_primitive(), weight.into_primitive());
            let y = B::rms_norm(x.clone(), weight.clone(), eps);
            match prep.stateful() {
                OpsKind::Tracked(prep) => prep.finish((x, weight, eps), y),
                OpsKind::UnTracked(prep) => prep.finish(y),
            }
        }

        fn gated(gate_up: FloatTensor<Self>, activation: GatedActivation) -> FloatTensor<Self> {
            let prep = GatedBackward.prepare::<C>([gate_up.node()]).compute_bound();
            let gate_up = gate_up.into_primitive();
            let y = B::gated(gate_up.clone(), activation);
            match prep.stateful() {
                OpsKind::Tracked(prep) => prep.finish((gate_up, activation), y),
                OpsKind::UnTracked(prep) => prep.finish(y),
            }
        }

        fn self_attention(
            qkv: FloatTensor<Self>,
            cos: FloatTensor<Self>,
            sin: FloatTensor<Self>,
            args: SelfAttentionArgs,
        ) -> FloatTensor<Self> {
            let prep = SelfAttentionBackward.prepare::<C>([qkv.node()]).compute_bound();
            // The angles are constants.
            let (qkv, cos, sin) = (qkv.into_primitive(), cos.into_primitive(), sin.into_primitive());
            let y = B::self_attention(qkv.clone(), cos.clone(), sin.clone(), args);
            match prep.stateful() {
                OpsKind::Tracked(prep) => prep.finish((qkv, cos, sin, args), y),
                OpsKind::UnTracked(prep) => prep.finish(y),
            }
        }

        fn cross_entropy(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
            let prep = CrossEntropyBackward.prepare::<C>([logits.node()]).compute_bound();
            let logits = logits.into_primitive();
            let y = B::cross_entropy(logits.clone(), targets.clone());
            match prep.stateful() {
                OpsKind::Tracked(prep) => prep.finish((logits, targets), y),
                OpsKind::UnTracked(prep) => prep.finish(y),
            }
        }
    }
}
