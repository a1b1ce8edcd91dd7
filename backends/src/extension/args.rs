//! Arguments of the operations that hold no tensors: shapes, kernels, types.

use std::fmt;
use std::ops::Deref;
use std::sync::atomic::AtomicBool;
#[cfg(any(feature = "flex", feature = "ndarray"))]
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

pub use bitnet_burn_cpu::delta_net::Shape as DeltaNetShape;
use bitnet_burn_formats::DenseFormat;
use bitnet_burn_formats::dense_tiles::{TiledFormat, tiled_bytes};
use bitnet_burn_manager::{CpuKernels, Packed, ScaleKind};
use burn::tensor::DType;
use serde::{Deserialize, Serialize};

/// Shape and kernels of one of a bit_linear's matrices.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// Output features.
    pub n: usize,
    /// Which weights share a scale, and which activations do. All matrices of an operation share their activations.
    pub scales: ScaleKind,
    /// The chosen kernels, which also say how the codes are laid out; `None`: canonical, and chosen at
    /// the first use.
    pub choice: Option<MatrixKernels>,
}

/// The kernels that were chosen for a matrix, and the layout that its codes are in.
#[derive(Clone, Debug)]
pub enum MatrixKernels {
    /// Those of the CPU.
    Host(HostKernels),
    /// Those of plugins that are GPU source.
    #[cfg(feature = "cube")]
    Gpu(Arc<crate::gpu::GpuMatrix>),
}

/// The CPU's kernels for a matrix: those that its codes are laid out for, and, once they have packed it too, faster ones.
#[derive(Clone, Debug)]
pub struct HostKernels {
    choice: Arc<CpuKernels>,
    faster: Option<Arc<Faster>>,
}

/// Faster kernels of a matrix that computes already.
#[derive(Debug, Default)]
pub(crate) struct Faster {
    /// The matrix, once they have packed it.
    pub packed: OnceLock<Repacked>,
    /// Whether the matrix has been asked for in a call.
    pub called: AtomicBool,
}

/// A matrix in the layout of other kernels.
#[derive(Debug)]
pub(crate) struct Repacked {
    pub choice: Arc<CpuKernels>,
    #[cfg_attr(
        not(any(feature = "flex", feature = "ndarray")),
        allow(dead_code, reason = "nothing computes here")
    )]
    pub weights: Packed,
}

impl HostKernels {
    /// Kernels that read canonical codes, until faster ones have packed them. (Clones share those.)
    pub(crate) fn until(choice: Arc<CpuKernels>, faster: Arc<Faster>) -> Self {
        Self { choice, faster: Some(faster) }
    }

    /// The kernels that compute the next call.
    pub fn computing(&self) -> &Arc<CpuKernels> {
        self.repacked().map_or(&self.choice, |repacked| &repacked.choice)
    }

    /// The matrix as faster kernels packed it, if they have.
    pub(crate) fn repacked(&self) -> Option<&Repacked> {
        self.faster.as_ref()?.packed.get()
    }

    /// The same for a call that begins.
    #[cfg(any(feature = "flex", feature = "ndarray"))]
    pub(crate) fn called(&self) -> Option<&Repacked> {
        let faster = self.faster.as_ref()?;
        faster.called.store(true, Ordering::Relaxed);
        faster.packed.get()
    }
}

impl From<Arc<CpuKernels>> for HostKernels {
    fn from(choice: Arc<CpuKernels>) -> Self {
        Self { choice, faster: None }
    }
}

/// Those that the codes are laid out for.
impl Deref for HostKernels {
    type Target = Arc<CpuKernels>;

    fn deref(&self) -> &Arc<CpuKernels> {
        &self.choice
    }
}

impl MatrixKernels {
    /// Private layout (`plugin/layout`) that the codes are in, or `None` for canonical.
    pub fn layout(&self) -> Option<&str> {
        match self {
            Self::Host(choice) => choice.layout(),
            #[cfg(feature = "cube")]
            Self::Gpu(matrix) => matrix.layout(),
        }
    }
}

/// Arguments of [`TernaryBackend::bit_linear`](crate::TernaryBackend::bit_linear) that are no tensors.
#[derive(Clone, Debug)]
pub struct BitLinearArgs {
    /// Input features.
    pub k: usize,
    /// The matrices.
    pub matrices: Vec<Matrix>,
    /// Epsilon of the RMSNorm.
    pub eps: f32,
    /// Whether activations are quantised to int8, by the groups that the matrices ask for. (A float reference does not.)
    pub quantise: bool,
}

impl BitLinearArgs {
    /// Output features of all matrices.
    pub fn total_n(&self) -> usize {
        self.matrices.iter().map(|m| m.n).sum()
    }

    /// Activations of a row that share a scale; 0 for the whole row.
    pub fn activation_group(&self) -> usize {
        self.matrices.first().map_or(0, |matrix| matrix.scales.activation_group())
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

/// Arguments of [`TernaryBackend::cached_attention`](crate::TernaryBackend::cached_attention) and
/// [`TernaryBackend::attention`](crate::TernaryBackend::attention).
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
    /// Sliding window: a row sees this many positions, its own and those right before it. `None`: all up to its own.
    pub window: Option<usize>,
}

/// Arguments of [`TernaryBackend::delta_net`](crate::TernaryBackend::delta_net).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeltaNetArgs {
    /// Heads, sizes and taps.
    pub shape: DeltaNetShape,
    /// Epsilon of the output's norm.
    pub eps: f32,
}

/// Arguments of [`TernaryBackend::self_attention`](crate::TernaryBackend::self_attention).
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
    /// Sliding window: a row sees this many rows, itself and those right before it. `None`: all up to itself.
    pub window: Option<usize>,
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
    /// Whether [`dense_linear`](crate::TernaryBackend::dense_linear) quantises its activations to int8. Only the
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
pub struct NoInt8 {
    /// The format.
    pub format: DenseFormat,
}

impl DenseArgs {
    /// The formats that hold integers and scales.
    pub const INT8_FORMATS: [DenseFormat; 3] = {
        let [a, b, c] = TiledFormat::ALL;
        [a.rows(), b.rows(), c.rows()]
    };

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
        match TiledFormat::of(self.format) {
            Some(_) => Ok(Self { int8: true, ..self }),
            None => Err(NoInt8 { format: self.format }),
        }
    }
}

/// The non-linearity of a gated feed-forward network, `down(f(gate(x)) * up(x))`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GatedActivation {
    /// Squared ReLU, `max(x, 0)^2`: BitNet b1.58 2B-4T (arXiv 2504.12285).
    Relu2,
    /// `x * sigmoid(x)`: the older BitNet checkpoints and everything shaped like Llama.
    Silu,
    /// `sigmoid(x)`: the gates of an attention's output (Qwen3.5). No feed-forward network that is read has it.
    Sigmoid,
    /// `x * (1 + erf(x / sqrt(2))) / 2` (arXiv 1606.08415): transformers' `gelu`.
    Gelu,
    /// `x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2`, its approximation: transformers' `gelu_pytorch_tanh` and
    /// `gelu_new`.
    #[serde(rename = "gelu_pytorch_tanh")]
    GeluTanh,
}

impl GatedActivation {
    /// All of them. A remote device knows them by their place.
    pub const ALL: [Self; 5] = [Self::Relu2, Self::Silu, Self::Sigmoid, Self::Gelu, Self::GeluTanh];

    /// The name in configuration files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Relu2 => "relu2",
            Self::Silu => "silu",
            Self::Sigmoid => "sigmoid",
            Self::Gelu => "gelu",
            Self::GeluTanh => "gelu_pytorch_tanh",
        }
    }

    /// The activation of that name, or `None`. Spellings in use: `relu2`, `relu_squared`, `silu`, `swish`, `gelu`,
    /// `gelu_new`, `gelu_pytorch_tanh`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "relu2" | "relu_squared" => Some(Self::Relu2),
            "silu" | "swish" => Some(Self::Silu),
            "gelu" => Some(Self::Gelu),
            "gelu_new" | "gelu_pytorch_tanh" => Some(Self::GeluTanh),
            _ => None,
        }
    }
}

impl fmt::Display for GatedActivation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
