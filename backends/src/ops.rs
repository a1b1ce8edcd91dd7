//! [`TernaryBackend`]'s operations over Burn's `Tensor`, on whatever backend
//! the tensors are.

mod delta_net;
mod ternary;

use bitnet_burn_formats::dense::requantise;
use bitnet_burn_formats::{DenseFormat, FormatError, WeightScale, dense_tiles};
use bitnet_burn_manager::memory::PageArena;
use burn::backend::Dispatch;
#[cfg(any(feature = "flex", feature = "ndarray", feature = "cube"))]
use burn::backend::DispatchDevice;
use burn::tensor::{AllocationProperty, Bytes, DType, Device, Int, Tensor, TensorData};

use crate::devices;
use crate::extension::{
    AttentionArgs, CacheTensor, CacheType, CachedAttention, DenseArgs, GatedActivation, SelfAttentionArgs,
    TernaryBackend,
};

pub use self::delta_net::{DeltaNetParameters, DeltaNetState, delta_net};
pub use self::ternary::{BitLinearInput, MatrixScale, Packing, TernaryMatrix, bit_linear, holds_f16};

/// Bytes as a tensor of U32 words, without a copy where they are aligned and whole words.
pub fn words(bytes: bytes::Bytes, shape: [usize; 2], device: &Device) -> Tensor<2, Int> {
    let count = shape[0] * shape[1];
    let aligned = (bytes.as_ptr() as usize).is_multiple_of(4) && bytes.len() == count * 4;
    let bytes = if aligned {
        // Not `Native`: NdArray copies native memory.
        Bytes::from_shared(bytes, AllocationProperty::Other)
    } else {
        let mut words = vec![0u32; count];
        bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(&bytes);
        Bytes::from_elems(words)
    };
    if is_host(device) {
        return Tensor::from_data(TensorData::from_bytes(bytes, shape, DType::U32), (device, DType::U32));
    }
    // In one dimension: rows of a GPU's tensor may have gaps between them, and kernels would get a copy without.
    let data = TensorData::from_bytes(bytes, [count], DType::U32);
    Tensor::<1, Int>::from_data(data, (device, DType::U32)).reshape(shape)
}

/// Whether a device's tensors lie in host memory, where the kernels of plugins run.
pub fn is_host(device: &Device) -> bool {
    match device.clone().without_autodiff().as_dispatch() {
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => true,
        #[cfg(feature = "ndarray")]
        DispatchDevice::NdArray(_) => true,
        #[allow(unreachable_patterns, reason = "without another backend there are only these")]
        _ => false,
    }
}

/// Whether matrices for products with int8 are read in [tiles](DenseArgs::tiled) where a device computes: in host memory,
/// be it a worker's.
pub fn reads_tiles(device: &Device) -> bool {
    #[cfg(feature = "remote")]
    if crate::remote::computes_in_host_memory(device) {
        return true;
    }
    is_host(device)
}

/// Activations [M, K] as the kernels see them: quantised to int8 by absmax, with a scale for each `group` of a row's values
/// (0: for the row; the last group of a row may be shorter), and back to floats. The gradient is the straight-through
/// estimator's.
pub fn fake_quantise(x: Tensor<2>, group: usize) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::fake_quantise(x.into_dispatch(), group))
}

/// Latent weights [N, K] as packing freezes them: -s, 0 or s by absmean, with an s for all, or for each row or group. The
/// gradient is the straight-through estimator's.
///
/// # Panics
/// If the groups do not divide K.
pub fn ternarise(w: Tensor<2>, scale: WeightScale) -> Tensor<2> {
    let [n, k] = w.dims();
    let group = scale.group();
    assert!(group == 0 || k.is_multiple_of(group), "{scale} of weights [{n}, {k}]");
    Tensor::from_dispatch(Dispatch::ternarise(w.into_dispatch(), scale))
}

/// Causal attention of whole sequences over themselves, with rotary position embedding.
///
/// # Shapes
/// qkv [sequences * length, (heads + 2 * kv heads) * d]; cos and sin [length, d / 2]; the output is
/// [sequences * length, heads * d].
///
/// # Panics
/// If the shapes do not fit, or the window has no row.
pub fn self_attention(qkv: Tensor<2>, cos: Tensor<2>, sin: Tensor<2>, args: SelfAttentionArgs) -> Tensor<2> {
    let [m, width] = qkv.dims();
    let SelfAttentionArgs { n_heads, n_kv_heads, head_dim, length, window } = args;
    assert!(window != Some(0), "a window of no rows");
    assert_eq!(width, (n_heads + 2 * n_kv_heads) * head_dim, "queries, keys and values");
    assert!(n_kv_heads > 0 && n_heads.is_multiple_of(n_kv_heads), "{n_heads} heads over {n_kv_heads}");
    assert!(head_dim.is_multiple_of(2) && length > 0 && m.is_multiple_of(length), "{m} rows by {length}");
    assert_eq!((cos.dims(), sin.dims()), ([length, head_dim / 2], [length, head_dim / 2]), "angles");
    let (qkv, cos, sin) = (qkv.into_dispatch(), cos.into_dispatch(), sin.into_dispatch());
    Tensor::from_dispatch(Dispatch::self_attention(qkv, cos, sin, args))
}

/// `-ln softmax(logits)[target]`, `[M]`, by rows of logits [M, N].
///
/// # Panics
/// If there is not one target a row, below N.
pub fn cross_entropy(logits: Tensor<2>, targets: &[u32]) -> Tensor<1> {
    let [m, n] = logits.dims();
    assert!(targets.len() == m && targets.iter().all(|&t| (t as usize) < n), "{m} targets below {n}");
    let data = TensorData::new(targets.iter().map(|&id| id as i32).collect(), [m]);
    let targets = Tensor::<1, Int>::from_data(data, (&logits.device(), DType::I32));
    Tensor::from_dispatch(Dispatch::cross_entropy(logits.into_dispatch(), targets.into_dispatch()))
}

/// x / sqrt(mean(x^2) + eps) * weight, by rows of x [M, K].
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, eps: f32) -> Tensor<2> {
    assert_eq!(weight.dims(), [x.dims()[1]], "the norm's weight");
    Tensor::from_dispatch(Dispatch::rms_norm(x.into_dispatch(), weight.into_dispatch(), eps))
}

/// The Walsh-Hadamard transform of each run of `block` values of the rows of x [M, K]: H(s * x) with the signs s `[K]`, or
/// s * H(x) where `inverse` is set.
///
/// # Panics
/// If there are not K signs, or `block` is no power of two that divides K.
pub fn hadamard(x: Tensor<2>, signs: Tensor<1>, block: usize, inverse: bool) -> Tensor<2> {
    let [_, k] = x.dims();
    assert_eq!(signs.dims(), [k], "a sign for each column");
    assert!(block.is_power_of_two() && k.is_multiple_of(block), "runs of {block} values in rows of {k}");
    Tensor::from_dispatch(Dispatch::hadamard(x.into_dispatch(), signs.into_dispatch(), block, inverse))
}

/// Rotary position embedding by half rotation. x [M, heads * d]; cos and sin [M, d / 2].
pub fn rope(x: Tensor<2>, cos: Tensor<2>, sin: Tensor<2>, head_dim: usize) -> Tensor<2> {
    let [m, width] = x.dims();
    assert!(head_dim.is_multiple_of(2) && width.is_multiple_of(head_dim), "heads of {head_dim} in {width}");
    assert_eq!((cos.dims(), sin.dims()), ([m, head_dim / 2], [m, head_dim / 2]), "angles of the rows");
    let (x, cos, sin) = (x.into_dispatch(), cos.into_dispatch(), sin.into_dispatch());
    Tensor::from_dispatch(Dispatch::rope(x, cos, sin, head_dim))
}

/// Keys or values [kv heads, capacity, d] of one sequence and layer.
#[allow(clippy::large_enum_variant, reason = "a few of them for each layer; a box would cost a token more")]
#[derive(Clone, Debug)]
pub enum CacheLayer {
    /// F32 or F16.
    Float(Tensor<3>),
    /// A value is code * scale, rounded to f32.
    Int8 {
        /// I8 [kv heads, capacity, d]; on GPUs, U32 [kv heads, capacity, d / 4], of four codes each.
        codes: Tensor<3, Int>,
        /// [kv heads, capacity]: absmax / 127.
        scale: Tensor<2>,
    },
}

impl CacheLayer {
    /// Whether a device can hold caches of a type, with heads of `head_dim` values.
    pub fn supported(cache_type: CacheType, head_dim: usize, device: &Device) -> bool {
        match device.clone().without_autodiff().as_dispatch() {
            #[cfg(feature = "cube")]
            DispatchDevice::Cube(_) if cache_type == CacheType::Int8 => {
                // Gradients are of Burn's operations, which know nothing of words of four codes.
                !device.is_autodiff() && crate::gpu::int8_supported(head_dim)
            }
            _ => {
                let _ = head_dim;
                let supported = || device.supports_dtype(cache_type.dtype());
                match devices::is_remote(device) {
                    // A worker is asked; one that is gone says so when something is read.
                    true => devices::catching_panics(supported).unwrap_or(true),
                    false => supported(),
                }
            }
        }
    }

    /// The shape and type of int8 codes [kv heads, capacity, d] on a device.
    fn codes_on([heads, capacity, d]: [usize; 3], device: &Device) -> ([usize; 3], DType) {
        match device.clone().without_autodiff().as_dispatch() {
            #[cfg(feature = "cube")]
            DispatchDevice::Cube(_) => ([heads, capacity, d / 4], DType::U32),
            #[allow(unreachable_patterns, reason = "without another backend there is only this")]
            _ => ([heads, capacity, d], DType::I8),
        }
    }

    /// Zeros, on Flex in the memory of `arena`.
    pub fn zeros(cache_type: CacheType, shape: [usize; 3], device: &Device, arena: &PageArena) -> Self {
        let [heads, capacity, _] = shape;
        match cache_type {
            CacheType::F32 | CacheType::F16 => {
                Self::Float(match zeros_in(arena, &shape, cache_type.dtype(), device) {
                    Some(data) => Tensor::from_data(data, (device, cache_type.dtype())),
                    None => flat_zeros(shape, cache_type.dtype(), device),
                })
            }
            CacheType::Int8 => Self::Int8 {
                codes: {
                    let (shape, dtype) = Self::codes_on(shape, device);
                    match zeros_in(arena, &shape, dtype, device) {
                        Some(data) => Tensor::from_data(data, (device, dtype)),
                        None => {
                            let count = shape.iter().product::<usize>();
                            Tensor::<1, Int>::zeros([count], (device, dtype)).reshape(shape)
                        }
                    }
                },
                scale: match zeros_in(arena, &[heads, capacity], DType::F32, device) {
                    Some(data) => Tensor::from_data(data, (device, DType::F32)),
                    None => flat_zeros([heads, capacity], DType::F32, device),
                },
            },
        }
    }

    /// [kv heads, capacity, d].
    pub fn dims(&self) -> [usize; 3] {
        match self {
            Self::Float(tensor) => tensor.dims(),
            Self::Int8 { codes, .. } => {
                let [heads, capacity, width] = codes.dims();
                [heads, capacity, if self.in_words() { width * 4 } else { width }]
            }
        }
    }

    /// Whether codes lie four in a word, as on GPUs.
    fn in_words(&self) -> bool {
        matches!(self, Self::Int8 { codes, .. } if codes.dtype() == DType::U32)
    }

    /// The range of the tensor's last dimension.
    fn width(&self) -> std::ops::Range<usize> {
        match self {
            Self::Float(tensor) => 0..tensor.dims()[2],
            Self::Int8 { codes, .. } => 0..codes.dims()[2],
        }
    }

    /// The first `length` positions of `from`, written over those of this one, of the same type.
    ///
    /// # Panics
    /// If they do not fit, or the types differ.
    pub fn with_positions(self, from: Self, length: usize) -> Self {
        let [heads, _, _] = self.dims();
        let (whole, scales) = ([0..heads, 0..length, self.width()], [0..heads, 0..length]);
        match (self, from) {
            (Self::Float(to), Self::Float(from)) => {
                Self::Float(to.slice_assign(whole.clone(), from.slice(whole)))
            }
            (Self::Int8 { codes, scale }, Self::Int8 { codes: old_codes, scale: old_scale }) => Self::Int8 {
                codes: codes.slice_assign(whole.clone(), old_codes.slice(whole)),
                scale: scale.slice_assign(scales.clone(), old_scale.slice(scales)),
            },
            (to, from) => panic!("a cache {to:?} from a cache {from:?}"),
        }
    }

    /// The positions from `start` on.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn from_position(self, start: usize) -> Self {
        let [heads, capacity, _] = self.dims();
        let (whole, scales) = ([0..heads, start..capacity, self.width()], [0..heads, start..capacity]);
        match self {
            Self::Float(tensor) => Self::Float(tensor.slice(whole)),
            Self::Int8 { codes, scale } => {
                Self::Int8 { codes: codes.slice(whole), scale: scale.slice(scales) }
            }
        }
    }

    fn into_dispatch(self) -> CacheTensor<Dispatch> {
        match self {
            Self::Float(tensor) => CacheTensor::Float(tensor.into_dispatch()),
            Self::Int8 { codes, scale } => {
                CacheTensor::Int8 { codes: codes.into_dispatch(), scale: scale.into_dispatch() }
            }
        }
    }

    fn from_dispatch(tensor: CacheTensor<Dispatch>) -> Self {
        match tensor {
            CacheTensor::Float(tensor) => Self::Float(Tensor::from_dispatch(tensor)),
            CacheTensor::Int8 { codes, scale } => {
                Self::Int8 { codes: Tensor::from_dispatch(codes), scale: Tensor::from_dispatch(scale) }
            }
        }
    }
}

/// Zeros without gaps between rows, as a GPU's tensors of several dimensions may have.
fn flat_zeros<const D: usize>(shape: [usize; D], dtype: DType, device: &Device) -> Tensor<D> {
    Tensor::<1>::zeros([shape.iter().product::<usize>()], (device, dtype)).reshape(shape)
}

/// Zeros in an arena's memory, if the device's tensors can be written to there, and there is memory.
fn zeros_in(arena: &PageArena, shape: &[usize], dtype: DType, device: &Device) -> Option<TensorData> {
    match device.clone().without_autodiff().as_dispatch() {
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => {
            let size = shape.iter().product::<usize>() * dtype.size();
            let bytes = crate::host::cache_memory::zeros(arena, size).ok()?;
            Some(TensorData::from_bytes(bytes, shape, dtype))
        }
        #[allow(unreachable_patterns, reason = "without another backend there is only this")]
        _ => {
            let _ = (arena, shape, dtype);
            None
        }
    }
}

/// Writes rows [M, kv heads * d] into a cache from `position` on, in place while `cache` is its only owner.
///
/// # Panics
/// If the rows do not fit the cache, or that is one of int8 on a GPU, which only [`cached_attention`] knows.
pub fn cache_append(cache: CacheLayer, rows: Tensor<2>, position: usize) -> CacheLayer {
    assert!(!cache.in_words(), "int8 on a GPU is appended to by `cached_attention`");
    let ([heads, capacity, d], [m, width]) = (cache.dims(), rows.dims());
    assert_eq!(width, heads * d, "rows of {heads} heads of {d}");
    assert!(position + m <= capacity, "rows {position}..{} of a cache of {capacity}", position + m);
    CacheLayer::from_dispatch(Dispatch::cache_append(cache.into_dispatch(), rows.into_dispatch(), position))
}

/// What attention does with rows qkv [M, (heads + 2 * kv heads) * d] of one sequence, the first of which is at
/// `args.position`: queries and keys are turned by the angles cos and sin [M, d / 2], keys and values appended to the
/// caches, in place while those have no other owner, and attended to. The context [M, heads * d], and the caches.
///
/// # Panics
/// If the shapes do not fit, the window has no position, or the caches differ in type.
pub fn cached_attention(
    qkv: Tensor<2>,
    (cos, sin): (Tensor<2>, Tensor<2>),
    (keys, values): (CacheLayer, CacheLayer),
    args: AttentionArgs,
) -> (Tensor<2>, (CacheLayer, CacheLayer)) {
    let [m, width] = qkv.dims();
    let AttentionArgs { n_heads, n_kv_heads, head_dim, position, window } = args;
    assert!(window != Some(0), "a window of no positions");
    assert_eq!(width, (n_heads + 2 * n_kv_heads) * head_dim, "queries, keys and values");
    assert!(n_kv_heads > 0 && n_heads.is_multiple_of(n_kv_heads), "{n_heads} heads over {n_kv_heads}");
    assert_eq!((cos.dims(), sin.dims()), ([m, head_dim / 2], [m, head_dim / 2]), "angles of the rows");
    let dtype = |cache: &CacheLayer| match cache {
        CacheLayer::Float(tensor) => tensor.dtype(),
        CacheLayer::Int8 { codes, .. } => codes.dtype(),
    };
    assert_eq!((keys.dims(), dtype(&keys)), (values.dims(), dtype(&values)), "keys and values");
    let [heads, capacity, d] = keys.dims();
    assert_eq!((heads, d), (n_kv_heads, head_dim), "the cache's heads");
    assert!(position + m <= capacity, "positions up to {} of a cache of {capacity}", position + m);
    let (qkv, cos, sin) = (qkv.into_dispatch(), cos.into_dispatch(), sin.into_dispatch());
    let (keys, values) = (keys.into_dispatch(), values.into_dispatch());
    let CachedAttention { context, keys, values } =
        Dispatch::cached_attention(qkv, cos, sin, keys, values, args);
    let caches = (CacheLayer::from_dispatch(keys), CacheLayer::from_dispatch(values));
    (Tensor::from_dispatch(context), caches)
}

/// Causal attention of the rows q [M, heads * d] of one sequence over its cache.
///
/// # Panics
/// If the shapes do not fit, the window has no position, or the cache is one of int8 on a GPU, which only
/// [`cached_attention`] knows.
pub fn attention(q: Tensor<2>, keys: CacheLayer, values: CacheLayer, args: AttentionArgs) -> Tensor<2> {
    let [m, width] = q.dims();
    let AttentionArgs { n_heads, n_kv_heads, head_dim, position, window } = args;
    assert!(window != Some(0), "a window of no positions");
    assert_eq!(width, n_heads * head_dim, "queries of {n_heads} heads of {head_dim}");
    assert!(n_kv_heads > 0 && n_heads.is_multiple_of(n_kv_heads), "{n_heads} heads over {n_kv_heads}");
    for cache in [&keys, &values] {
        assert!(!cache.in_words(), "int8 on a GPU is read by `cached_attention`");
        let [heads, capacity, d] = cache.dims();
        assert_eq!((heads, d), (n_kv_heads, head_dim), "the cache's heads");
        assert!(position + m <= capacity, "positions up to {} of a cache of {capacity}", position + m);
    }
    let (keys, values) = (keys.into_dispatch(), values.into_dispatch());
    Tensor::from_dispatch(Dispatch::attention(q.into_dispatch(), keys, values, args))
}

/// activation(gate) * up, of rows [M, 2 * F] that hold gate and up side by side.
///
/// # Panics
/// If the rows have no two halves.
pub fn gated(gate_up: Tensor<2>, activation: GatedActivation) -> Tensor<2> {
    assert!(gate_up.dims()[1].is_multiple_of(2), "gate and up side by side in {}", gate_up.dims()[1]);
    Tensor::from_dispatch(Dispatch::gated(gate_up.into_dispatch(), activation))
}

/// A matrix for [`dense_linear`], copied where `args` differ from the rows: decoded and encoded again for another format,
/// and for products with int8 activations put into tiles on a device that [reads them](reads_tiles), at the speed of memory
/// there.
///
/// # Arguments
/// * `rows`: the format that the rows have, and N rows of K weights
/// * `args`: format and shape of the result, and whether it is [for int8](DenseArgs::with_int8)
///
/// # Errors
/// If the format can't hold the values or the shape, or memory is short.
pub fn dense_matrix(
    rows: (DenseFormat, bytes::Bytes),
    args: DenseArgs,
    device: &Device,
) -> Result<(Tensor<2, Int>, DenseArgs), DenseError> {
    let args = DenseArgs { tiled: args.int8 && reads_tiles(device), ..args };
    let ((from, data), shape) = (rows, (args.n, args.k));
    let words = |data: bytes::Bytes| {
        let count = data.len().div_ceil(4);
        words(data, [1, count], device)
    };
    if !args.tiled && from == args.format {
        return Ok((words(data), args));
    }
    // Without a size, the conversion says why.
    let mut out = PageArena::default().allocate(args.bytes().unwrap_or(0), 64).map_err(DenseError::Memory)?;
    if args.tiled {
        dense_tiles::tile((from, &data), shape, (args.format, out.as_mut_slice()))?;
    } else {
        requantise(from, &data, args.format, out.as_mut_slice(), shape)?;
    }
    Ok((words(bytes::Bytes::from_owner(out)), args))
}

/// A matrix that [`dense_matrix`] put into tiles before, for a device in host memory.
///
/// # Panics
/// If the tiles have another size than the shape's.
pub fn tiled_matrix(tiles: bytes::Bytes, args: DenseArgs, device: &Device) -> (Tensor<2, Int>, DenseArgs) {
    let args = DenseArgs { tiled: true, ..args };
    assert_eq!(Some(tiles.len()), args.bytes(), "bytes of tiles");
    let count = tiles.len().div_ceil(4);
    (words(tiles, [1, count], device), args)
}

/// A dense matrix that can't be brought into another form.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DenseError {
    /// The format can't hold it.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The system has no memory for it.
    #[error("there is no memory for the copy")]
    Memory(#[source] std::io::Error),
}

/// y = x * Wᵀ; `words` holds W's raw bytes. With [`int8`](DenseArgs::int8), x is quantised.
///
/// # Panics
/// If the shapes do not fit, or the format has no products with int8.
pub fn dense_linear(x: Tensor<2>, words: Tensor<2, Int>, args: DenseArgs) -> Tensor<2> {
    assert_eq!(x.dims()[1], args.k, "input features");
    assert!(!args.int8 || DenseArgs::INT8_FORMATS.contains(&args.format), "int8 activations for {args:?}");
    check_dense(&words, &args);
    Tensor::from_dispatch(Dispatch::dense_linear(x.into_dispatch(), words.into_dispatch(), args))
}

/// Rows `ids` of W [N, K]; `words` holds W's raw bytes, in rows.
///
/// # Panics
/// If an id is not below N, or the words are tiles.
pub fn dense_rows(words: Tensor<2, Int>, ids: &[u32], args: DenseArgs) -> Tensor<2> {
    assert!(ids.iter().all(|&id| (id as usize) < args.n), "a row that the table of {} lacks", args.n);
    assert!(!args.tiled, "rows are looked up in tiles: {args:?}");
    check_dense(&words, &args);
    let device = words.device();
    let ids: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
    let count = ids.len();
    let ids = Tensor::<1, Int>::from_data(TensorData::new(ids, [count]), (&device, DType::I32));
    Tensor::from_dispatch(Dispatch::dense_rows(words.into_dispatch(), ids.into_dispatch(), args))
}

fn check_dense(words: &Tensor<2, Int>, args: &DenseArgs) {
    let size = args.bytes();
    let has = words.shape().num_elements() * 4;
    assert!(size.is_some_and(|size| size <= has), "{:?} takes {size:?} bytes, not {has}", args);
}
