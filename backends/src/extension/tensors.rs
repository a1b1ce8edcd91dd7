//! Arguments and results of the operations that hold tensors.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{ExtensionType, TensorMetadata};
use burn::tensor::Shape;

/// One packed ternary matrix.
#[derive(ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub struct TernaryWeight<B: burn::backend::Backend> {
    /// U32 words: canonical rows [N, ceil(K / 128) * 8], or a kernel's private packing.
    pub codes: IntTensor<B>,
    /// weight = code * scale: `[1]`, or many in blocks of 32 rows, as
    /// [`Weights::scales`](bitnet_burn_plugin::abi::Weights::scales) has them.
    pub scale: FloatTensor<B>,
}

/// One to three matrices that share their activations (q/k/v, gate/up).
#[derive(ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub enum WeightGroup<B: burn::backend::Backend> {
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

impl<B: burn::backend::Backend> WeightGroup<B> {
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

/// What [`TernaryBackend::cached_attention`](crate::TernaryBackend::cached_attention) gives.
#[derive(ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub struct CachedAttention<B: burn::backend::Backend> {
    /// [M, heads * d].
    pub context: FloatTensor<B>,
    /// The caches, with the rows' keys and values.
    #[extension_type]
    pub keys: CacheTensor<B>,
    /// As `keys`.
    #[extension_type]
    pub values: CacheTensor<B>,
}

/// What a gated DeltaNet has learned.
#[derive(ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub struct DeltaNetWeights<B: burn::backend::Backend> {
    /// [taps, channels], the oldest input first.
    pub convolution: FloatTensor<B>,
    /// By value head, `[value_heads]`: the rate of decay, which is not positive.
    pub decay: FloatTensor<B>,
    /// By value head, `[value_heads]`: added to the logit of the decay.
    pub time_bias: FloatTensor<B>,
    /// The norm of a value head's output, `[value_dim]`.
    pub norm: FloatTensor<B>,
}

/// What a gated DeltaNet remembers of a sequence.
#[derive(ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub struct DeltaNetTensors<B: burn::backend::Backend> {
    /// The last inputs of the convolution [taps - 1, channels], the oldest first.
    pub inputs: FloatTensor<B>,
    /// [value_heads, key_dim, value_dim].
    pub memory: FloatTensor<B>,
}

/// What [`TernaryBackend::delta_net`](crate::TernaryBackend::delta_net) gives.
#[derive(ExtensionType)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub struct DeltaNetOutput<B: burn::backend::Backend> {
    /// [M, value_heads * value_dim].
    pub context: FloatTensor<B>,
    /// The state behind the rows.
    #[extension_type]
    pub state: DeltaNetTensors<B>,
}
