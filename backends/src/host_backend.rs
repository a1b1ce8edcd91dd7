//! The fast bodies, over host memory: Flex and NdArray.
//!
//! They differ only in how a tensor's memory is reached ([`HostBackend`]). Nothing is copied that lies
//! contiguous, least of all weights, which may be a memory-mapped file's.

use std::borrow::Cow;
use std::sync::{Arc, Mutex};

use bitnet_burn_formats::quant;
use bitnet_burn_manager::memory::{Activations, ActivationsMut};
use bitnet_burn_manager::{CpuKernels, Job, KernelManager, LayoutPolicy, ManagerError};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::Shape;

use crate::default;
use crate::extension::{
    AttentionArgs, BitLinearArgs, CacheTensor, DenseArgs, GatedActivation, InputNorm, Kernels,
    SelfAttentionArgs, TernaryWeight, TernaryWeights,
};
use crate::host::attention::{self as host_attention, CacheMut, CacheRef};
use crate::host::{Shared, dense, dense_int8, elementwise, training};
use crate::manager::{leave_error, manager};

/// Rows of a tensor [M, K] in host memory.
pub(crate) struct Rows<'a> {
    values: Cow<'a, [f32]>,
    /// Elements from row to row.
    stride: usize,
}

/// A backend whose tensors lie in host memory.
pub(crate) trait HostBackend: Backend {
    /// A float tensor's values in row-major order.
    fn floats(tensor: &FloatTensor<Self>) -> Cow<'_, [f32]>;

    /// The rows of a tensor [M, K], which may be a view of wider rows.
    fn rows(tensor: &FloatTensor<Self>) -> Rows<'_>;

    /// A U32 tensor's words.
    fn words(tensor: &IntTensor<Self>) -> Cow<'_, [u32]>;

    /// An int tensor's values, whatever its type.
    fn indices(tensor: &IntTensor<Self>) -> Vec<u32>;

    /// A new tensor.
    fn tensor(values: Vec<f32>, shape: Shape) -> FloatTensor<Self>;

    /// A KV cache to read.
    fn cache(tensor: &CacheTensor<Self>) -> CacheRef<'_>;

    /// A KV cache changed by `write`, in place if `tensor` is its only owner.
    fn update_cache(tensor: CacheTensor<Self>, write: impl FnOnce(CacheMut)) -> CacheTensor<Self>;
}

#[cfg(feature = "flex")]
mod flex {
    use std::borrow::Cow;

    use burn::backend::Flex;
    use burn::tensor::{Bytes, DType, Element, Shape, bf16, f16};
    use burn_flex::{FlexTensor, Layout};

    use super::{CacheMut, CacheRef, CacheTensor, HostBackend, Rows};

    fn contiguous<E: Element + bytemuck::Pod>(tensor: &FlexTensor) -> Cow<'_, [E]> {
        match tensor.layout().contiguous_offsets() {
            Some((from, to)) => Cow::Borrowed(&tensor.storage::<E>()[from..to]),
            None => Cow::Owned(tensor.to_contiguous().as_slice::<E>().expect("contiguous now").to_vec()),
        }
    }

    fn whole<E: Element + bytemuck::Pod>(cache: &FlexTensor) -> &[E] {
        cache.as_slice().expect("a cache is contiguous")
    }

    fn whole_mut<E: Element + bytemuck::Pod>(cache: &mut FlexTensor) -> &mut [E] {
        let (from, to) = cache.layout().contiguous_offsets().expect("a cache is contiguous");
        &mut cache.storage_mut()[from..to]
    }

    impl HostBackend for Flex {
        fn floats(tensor: &FlexTensor) -> Cow<'_, [f32]> {
            match tensor.dtype() {
                DType::F32 => contiguous::<f32>(tensor),
                DType::F16 => Cow::Owned(contiguous::<f16>(tensor).iter().map(|v| v.to_f32()).collect()),
                DType::BF16 => Cow::Owned(contiguous::<bf16>(tensor).iter().map(|v| v.to_f32()).collect()),
                DType::F64 => Cow::Owned(contiguous::<f64>(tensor).iter().map(|&v| v as f32).collect()),
                other => panic!("bitnet-burn's operations take f32, f16, bf16 or f64 tensors, not {other:?}"),
            }
        }

        fn rows(tensor: &FlexTensor) -> Rows<'_> {
            let layout = tensor.layout();
            if tensor.dtype() == DType::F32
                && let [stride, 1] = layout.strides()
                && let Ok(stride) = usize::try_from(*stride)
            {
                let [m, k] = layout.shape()[..] else { panic!("rows of a tensor of rank 2") };
                let from = layout.start_offset();
                let length = if m == 0 { 0 } else { (m - 1) * stride + k };
                return Rows { values: Cow::Borrowed(&tensor.storage::<f32>()[from..from + length]), stride };
            }
            let stride = layout.shape()[1];
            Rows { values: Self::floats(tensor), stride }
        }

        fn words(tensor: &FlexTensor) -> Cow<'_, [u32]> {
            assert_eq!(tensor.dtype(), DType::U32, "packed weights are U32 words");
            contiguous::<u32>(tensor)
        }

        fn indices(tensor: &FlexTensor) -> Vec<u32> {
            let data = tensor.clone().into_data();
            data.iter::<i64>().map(|i| u32::try_from(i).unwrap_or(u32::MAX)).collect()
        }

        fn tensor(values: Vec<f32>, shape: Shape) -> FlexTensor {
            FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(shape), DType::F32)
        }

        fn cache(cache: &CacheTensor<Self>) -> CacheRef<'_> {
            match cache {
                CacheTensor::Float(tensor) => match tensor.dtype() {
                    DType::F16 => CacheRef::F16(whole(tensor)),
                    DType::F32 => CacheRef::F32(whole(tensor)),
                    other => panic!("a KV cache of floats is f32 or f16, not {other:?}"),
                },
                CacheTensor::Int8 { codes, scale } => {
                    CacheRef::Int8 { codes: whole(codes), scale: whole(scale) }
                }
            }
        }

        fn update_cache(mut cache: CacheTensor<Self>, write: impl FnOnce(CacheMut)) -> CacheTensor<Self> {
            match &mut cache {
                CacheTensor::Float(tensor) => match tensor.dtype() {
                    DType::F16 => write(CacheMut::F16(whole_mut(tensor))),
                    DType::F32 => write(CacheMut::F32(whole_mut(tensor))),
                    other => panic!("a KV cache of floats is f32 or f16, not {other:?}"),
                },
                CacheTensor::Int8 { codes, scale } => {
                    write(CacheMut::Int8 { codes: whole_mut(codes), scale: whole_mut(scale) });
                }
            }
            cache
        }
    }
}

#[cfg(feature = "ndarray")]
mod ndarray {
    use std::borrow::Cow;

    use burn::backend::{NdArray, TensorMetadata};
    use burn::tensor::{Shape, TensorData};
    use burn_ndarray::NdArrayTensor;

    use super::{CacheMut, CacheRef, CacheTensor, HostBackend, Rows};

    impl HostBackend for NdArray {
        fn floats(tensor: &NdArrayTensor) -> Cow<'_, [f32]> {
            match tensor {
                NdArrayTensor::F32(storage) => match storage.view().to_slice() {
                    Some(values) => Cow::Borrowed(values),
                    None => Cow::Owned(storage.view().iter().copied().collect()),
                },
                NdArrayTensor::F64(storage) => Cow::Owned(storage.view().iter().map(|&v| v as f32).collect()),
                other => panic!("bitnet-burn's operations take f32 or f64 tensors, not {:?}", other.dtype()),
            }
        }

        fn rows(tensor: &NdArrayTensor) -> Rows<'_> {
            Rows { values: Self::floats(tensor), stride: tensor.shape()[1] }
        }

        fn words(tensor: &NdArrayTensor) -> Cow<'_, [u32]> {
            match tensor {
                NdArrayTensor::U32(storage) => match storage.view().to_slice() {
                    Some(values) => Cow::Borrowed(values),
                    None => Cow::Owned(storage.view().iter().copied().collect()),
                },
                other => panic!("packed weights are U32 words, not {:?}", other.dtype()),
            }
        }

        fn indices(tensor: &NdArrayTensor) -> Vec<u32> {
            macro_rules! convert {
                ($($variant:ident),+) => {
                    match tensor {
                        $(NdArrayTensor::$variant(s) => {
                            s.view().iter().map(|&i| u32::try_from(i).unwrap_or(u32::MAX)).collect()
                        })+
                        other => panic!("indices are integers, not {:?}", other.dtype()),
                    }
                };
            }
            convert!(I64, I32, I16, I8, U64, U32, U16, U8)
        }

        fn tensor(values: Vec<f32>, shape: Shape) -> NdArrayTensor {
            NdArrayTensor::from_data(TensorData::new(values, shape))
        }

        fn cache(cache: &CacheTensor<Self>) -> CacheRef<'_> {
            match cache {
                CacheTensor::Float(NdArrayTensor::F32(storage)) => {
                    CacheRef::F32(storage.view().to_slice().expect("a cache is contiguous"))
                }
                CacheTensor::Int8 { codes: NdArrayTensor::I8(codes), scale: NdArrayTensor::F32(scale) } => {
                    CacheRef::Int8 {
                        codes: codes.view().to_slice().expect("a cache is contiguous"),
                        scale: scale.view().to_slice().expect("a cache is contiguous"),
                    }
                }
                _ => panic!("a KV cache on NdArray is f32, or int8 with scales of f32"),
            }
        }

        fn update_cache(mut cache: CacheTensor<Self>, write: impl FnOnce(CacheMut)) -> CacheTensor<Self> {
            match &mut cache {
                CacheTensor::Float(NdArrayTensor::F32(storage)) => {
                    let array = storage.ensure_owned();
                    write(CacheMut::F32(array.as_slice_mut().expect("a cache is contiguous")));
                }
                CacheTensor::Int8 { codes: NdArrayTensor::I8(codes), scale: NdArrayTensor::F32(scale) } => {
                    write(CacheMut::Int8 {
                        codes: codes.ensure_owned().as_slice_mut().expect("a cache is contiguous"),
                        scale: scale.ensure_owned().as_slice_mut().expect("a cache is contiguous"),
                    });
                }
                _ => panic!("a KV cache on NdArray is f32, or int8 with scales of f32"),
            }
            cache
        }
    }
}

fn dims<T: TensorMetadata>(tensor: &T) -> [usize; 2] {
    let shape = tensor.shape();
    let [m, k] = shape[..] else { panic!("an operand of rank 2, not {shape:?}") };
    [m, k]
}

/// Quantised activations are as large as the activations and used for a moment: kept from call to call.
static ACTIVATIONS: Mutex<Vec<Activations>> = Mutex::new(Vec::new());

fn with_activations<R>(f: impl FnOnce(&mut Activations) -> R) -> R {
    let free = || ACTIVATIONS.lock().unwrap_or_else(|e| e.into_inner());
    let mut activations = free().pop().unwrap_or_default();
    let result = f(&mut activations);
    free().push(activations);
    result
}

/// Rows are shared out to the pool from so many values on.
const PARALLEL: usize = 1 << 15;

/// Norm (if any) and quantisation of rows, on the pool where that pays.
fn quantise(manager: &KernelManager, x: &[f32], k: usize, norm: Option<(&[f32], f32)>, out: ActivationsMut) {
    let rows = |x: &[f32], q: &mut [i8], scale: &mut [f32], sum: &mut [i32]| match norm {
        None => bitnet_burn_cpu::quantise::quantise_rows(x, k, q, out.stride, scale, sum),
        Some((weight, eps)) => {
            bitnet_burn_cpu::quantise::rms_norm_quantise_rows(x, weight, eps, k, q, out.stride, scale, sum);
        }
    };
    let m = out.scale.len();
    let tasks = (manager.pool().threads() * 4).min(m);
    if x.len() < PARALLEL || tasks < 2 {
        return rows(x, out.q, out.scale, out.sum);
    }
    let (q, scale, sum) = (Shared::new(out.q), Shared::new(out.scale), Shared::new(out.sum));
    let stride = out.stride;
    manager.pool().run(tasks, &|task| {
        let (from, to) = (m * task / tasks, m * (task + 1) / tasks);
        let count = to - from;
        // SAFETY: the tasks' ranges of rows are disjoint.
        let (q, scale, sum) = unsafe {
            (q.part(from * stride, count * stride), scale.part(from, count), sum.part(from, count))
        };
        rows(&x[from * k..to * k], q, scale, sum);
    });
}

/// The kernels that were chosen for the matrices, or now are.
fn choices(manager: &KernelManager, args: &BitLinearArgs) -> Result<Vec<Arc<CpuKernels>>, ManagerError> {
    args.matrices
        .iter()
        .map(|matrix| match &matrix.choice {
            Some(Kernels::Host(choice)) => Ok(choice.clone()),
            // Weights that were packed for a GPU are canonical when they come here (`ops::bit_linear`).
            _ => manager.choose(matrix.n, args.k, LayoutPolicy::Canonical),
        })
        .collect()
}

pub(crate) fn bit_linear<B: HostBackend>(
    x: FloatTensor<B>,
    norm: InputNorm<B>,
    weights: TernaryWeights<B>,
    args: BitLinearArgs,
) -> FloatTensor<B> {
    let [m, k] = dims(&x);
    let weights = weights.into_vec();
    let total = args.total_n();
    let manager = manager();
    let choices = match choices(manager, &args) {
        Ok(choices) => choices,
        Err(error) => return failed::<B>(error, m, total),
    };
    if !args.quantise {
        // Float activations: a reference, in plain operations.
        return match canonical_weights::<B>(manager, weights, &choices, args.k) {
            Ok(weights) => default::bit_linear::<B>(x, norm, weights, &args),
            Err(error) => failed::<B>(error, m, total),
        };
    }
    let mut y = vec![0f32; m * total];
    let words: Vec<_> = weights.iter().map(|w| B::words(&w.codes)).collect();
    let mut column = 0;
    let jobs: Vec<Job> = weights
        .iter()
        .zip(&words)
        .zip(&choices)
        .map(|((weight, words), choice)| {
            let bytes: &[u8] = bytemuck::cast_slice(words);
            let job = Job {
                choice,
                // Words are whole; a private packing may end within one.
                weights: bytes.get(..choice.weight_bytes()).unwrap_or(bytes),
                scale: B::floats(&weight.scale)[0],
                column,
            };
            column += choice.shape().0;
            job
        })
        .collect();
    let result = with_activations(|activations| {
        let values = B::floats(&x);
        let weight = match &norm {
            InputNorm::None => None,
            InputNorm::Rms(weight) => Some(B::floats(weight)),
        };
        let norm = weight.as_deref().map(|weight| (weight, args.eps));
        quantise(manager, &values, k, norm, activations.resize(m, k));
        manager.matmul(&jobs, activations, &mut y, total)
    });
    match result {
        Ok(()) => B::tensor(y, Shape::new([m, total])),
        Err(error) => failed::<B>(error, m, total),
    }
}

/// Leaves the error for the caller, and NaN for whoever does not ask.
fn failed<B: HostBackend>(error: ManagerError, m: usize, n: usize) -> FloatTensor<B> {
    leave_error(error);
    B::tensor(vec![f32::NAN; m * n], Shape::new([m, n]))
}

/// The weights with their codes in the canonical layout.
fn canonical_weights<B: HostBackend>(
    manager: &KernelManager,
    weights: Vec<TernaryWeight<B>>,
    choices: &[Arc<CpuKernels>],
    k: usize,
) -> Result<TernaryWeights<B>, ManagerError> {
    let mut canonical = Vec::with_capacity(weights.len());
    for (weight, choice) in weights.into_iter().zip(choices) {
        let TernaryWeight { codes, scale } = weight;
        let codes = if choice.layout().is_none() {
            codes
        } else {
            let n = choice.shape().0;
            let words = B::words(&codes);
            let bytes = manager.unpack(choice, &bytemuck::cast_slice(&words)[..choice.weight_bytes()])?;
            let words: Vec<u32> =
                bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
            let device = codes.device();
            B::int_from_data(burn::tensor::TensorData::new(words, [n, k.div_ceil(128) * 8]), &device)
        };
        canonical.push(TernaryWeight { codes, scale });
    }
    Ok(TernaryWeights::from_vec(canonical))
}

pub(crate) fn bit_linear_backward<B: HostBackend>(
    dy: FloatTensor<B>,
    weights: TernaryWeights<B>,
    args: BitLinearArgs,
) -> FloatTensor<B> {
    let manager = manager();
    let m = dims(&dy)[0];
    match choices(manager, &args)
        .and_then(|choices| canonical_weights::<B>(manager, weights.into_vec(), &choices, args.k))
    {
        Ok(weights) => default::bit_linear_backward::<B>(dy, weights, &args),
        Err(error) => failed::<B>(error, m, args.k),
    }
}

pub(crate) fn fake_quantise<B: HostBackend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let [m, k] = dims(&x);
    let mut y = vec![0f32; m * k];
    with_activations(|activations| {
        let manager = manager();
        let out = activations.resize(m, k);
        let stride = out.stride;
        quantise(manager, &B::floats(&x), k, None, out);
        let (q, scale) = (activations.q(), activations.scale());
        for (row, (y, scale)) in y.chunks_exact_mut(k).zip(scale).enumerate() {
            for (y, &q) in y.iter_mut().zip(&q[row * stride..]) {
                *y = f32::from(q) * scale;
            }
        }
    });
    B::tensor(y, Shape::new([m, k]))
}

pub(crate) fn ternarise<B: HostBackend>(w: FloatTensor<B>) -> FloatTensor<B> {
    let shape = w.shape();
    let w = B::floats(&w);
    let scale = quant::absmean_scale(&w);
    B::tensor(quant::absmean_values(&w, scale), shape)
}

fn attention_shape(args: &SelfAttentionArgs) -> training::Shape {
    let SelfAttentionArgs { n_heads, n_kv_heads, head_dim, length } = *args;
    training::Shape { n_heads, n_kv_heads, head_dim, length }
}

pub(crate) fn self_attention<B: HostBackend>(
    qkv: FloatTensor<B>,
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
    args: &SelfAttentionArgs,
) -> FloatTensor<B> {
    let (m, width) = (dims(&qkv)[0], args.n_heads * args.head_dim);
    let (qkv, cos, sin) = (B::floats(&qkv), B::floats(&cos), B::floats(&sin));
    let mut out = vec![0f32; m * width];
    training::self_attention(&qkv, &cos, &sin, attention_shape(args), &mut out, manager().pool());
    B::tensor(out, Shape::new([m, width]))
}

pub(crate) fn self_attention_backward<B: HostBackend>(
    qkv: FloatTensor<B>,
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
    dy: FloatTensor<B>,
    args: &SelfAttentionArgs,
) -> FloatTensor<B> {
    let shape = qkv.shape();
    let (qkv, cos, sin, dy) = (B::floats(&qkv), B::floats(&cos), B::floats(&sin), B::floats(&dy));
    let mut out = vec![0f32; qkv.len()];
    let pool = manager().pool();
    training::self_attention_backward(&qkv, &cos, &sin, &dy, attention_shape(args), &mut out, pool);
    B::tensor(out, shape)
}

pub(crate) fn cross_entropy<B: HostBackend>(logits: FloatTensor<B>, targets: IntTensor<B>) -> FloatTensor<B> {
    let [m, n] = dims(&logits);
    let mut out = vec![0f32; m];
    training::cross_entropy(&B::floats(&logits), &B::indices(&targets), n, &mut out, manager().pool());
    B::tensor(out, Shape::new([m]))
}

pub(crate) fn cross_entropy_backward<B: HostBackend>(
    logits: FloatTensor<B>,
    targets: IntTensor<B>,
    d: FloatTensor<B>,
) -> FloatTensor<B> {
    let [m, n] = dims(&logits);
    let (logits, targets, d) = (B::floats(&logits), B::indices(&targets), B::floats(&d));
    let mut out = vec![0f32; m * n];
    training::cross_entropy_backward(&logits, &targets, &d, n, &mut out, manager().pool());
    B::tensor(out, Shape::new([m, n]))
}

pub(crate) fn rms_norm_backward<B: HostBackend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    dy: FloatTensor<B>,
    eps: f32,
) -> FloatTensor<B> {
    let shape = x.shape();
    let (x, weight, dy) = (B::floats(&x), B::floats(&weight), B::floats(&dy));
    let mut dx = vec![0f32; x.len()];
    training::rms_norm_backward(&x, &weight, &dy, eps, &mut dx, manager().pool());
    B::tensor(dx, shape)
}

pub(crate) fn rms_norm_backward_weight<B: HostBackend>(
    x: FloatTensor<B>,
    dy: FloatTensor<B>,
    eps: f32,
) -> FloatTensor<B> {
    let k = dims(&x)[1];
    let mut dw = vec![0f32; k];
    training::rms_norm_backward_weight(&B::floats(&x), &B::floats(&dy), eps, &mut dw, manager().pool());
    B::tensor(dw, Shape::new([k]))
}

pub(crate) fn gated_backward<B: HostBackend>(
    gate_up: FloatTensor<B>,
    dy: FloatTensor<B>,
    activation: GatedActivation,
) -> FloatTensor<B> {
    let [m, width] = dims(&gate_up);
    let mut out = vec![0f32; m * width];
    let (values, dy, f) = (B::floats(&gate_up), B::floats(&dy), width / 2);
    match activation {
        GatedActivation::Relu2 => {
            training::relu2_mul_backward(&values, &dy, f, &mut out, manager().pool());
        }
        GatedActivation::Silu => training::silu_mul_backward(&values, &dy, f, &mut out, manager().pool()),
    }
    B::tensor(out, Shape::new([m, width]))
}

pub(crate) fn rms_norm<B: HostBackend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    eps: f32,
) -> FloatTensor<B> {
    let [m, k] = dims(&x);
    let mut y = vec![0f32; m * k];
    bitnet_burn_cpu::quantise::rms_norm_rows(&B::floats(&x), &B::floats(&weight), eps, k, &mut y);
    B::tensor(y, Shape::new([m, k]))
}

pub(crate) fn rope<B: HostBackend>(
    x: FloatTensor<B>,
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
    head_dim: usize,
) -> FloatTensor<B> {
    let [m, width] = dims(&x);
    let rows = B::rows(&x);
    let (cos, sin) = (B::floats(&cos), B::floats(&sin));
    let mut y = vec![0f32; m * width];
    elementwise::rope(&rows.values, rows.stride, m, width / head_dim, head_dim, &cos, &sin, &mut y, width);
    B::tensor(y, Shape::new([m, width]))
}

fn cache_shape<B: HostBackend>(cache: &CacheTensor<B>, n_heads: usize) -> host_attention::Shape {
    let shape = cache.shape();
    let [n_kv_heads, capacity, head_dim] = shape[..] else {
        panic!("a cache is [kv heads, capacity, head_dim], not {shape:?}")
    };
    let scale = 1.0 / (head_dim as f32).sqrt();
    host_attention::Shape { n_heads, n_kv_heads, head_dim, capacity, scale }
}

pub(crate) fn cache_append<B: HostBackend>(
    cache: CacheTensor<B>,
    rows: FloatTensor<B>,
    position: usize,
) -> CacheTensor<B> {
    let shape = cache_shape(&cache, 0);
    let m = dims(&rows)[0];
    let rows = B::rows(&rows);
    B::update_cache(cache, |cache| {
        host_attention::append(cache, shape, position, m, &rows.values, rows.stride);
    })
}

pub(crate) fn attention<B: HostBackend>(
    q: FloatTensor<B>,
    keys: CacheTensor<B>,
    values: CacheTensor<B>,
    args: AttentionArgs,
) -> FloatTensor<B> {
    let [m, width] = dims(&q);
    let rows = B::rows(&q);
    let mut out = vec![0f32; m * width];
    host_attention::attention(
        &rows.values,
        rows.stride,
        m,
        B::cache(&keys),
        B::cache(&values),
        cache_shape(&keys, args.n_heads),
        args.position,
        &mut out,
        width,
        manager().pool(),
    );
    B::tensor(out, Shape::new([m, width]))
}

pub(crate) fn gated<B: HostBackend>(gate_up: FloatTensor<B>, activation: GatedActivation) -> FloatTensor<B> {
    let [m, width] = dims(&gate_up);
    let f = width / 2;
    let mut out = vec![0f32; m * f];
    let values = B::floats(&gate_up);
    match activation {
        GatedActivation::Relu2 => elementwise::relu2_mul(&values, f, &mut out, manager().pool()),
        GatedActivation::Silu => elementwise::silu_mul(&values, f, &mut out, manager().pool()),
    }
    B::tensor(out, Shape::new([m, f]))
}

fn raw<'a>(words: &'a [u32], args: &DenseArgs) -> &'a [u8] {
    &bytemuck::cast_slice(words)[..args.bytes().expect("checked when the tensor was made")]
}

pub(crate) fn dense_linear<B: HostBackend>(
    x: FloatTensor<B>,
    words: IntTensor<B>,
    args: DenseArgs,
) -> FloatTensor<B> {
    let DenseArgs { format, n, k, int8, tiled } = args;
    if int8 != tiled {
        static SLOW: std::sync::Once = std::sync::Once::new();
        SLOW.call_once(|| tracing::warn!(?args, "weights for int8 activations that are not in tiles: slow"));
        return default::dense_linear::<B>(x, words, &args);
    }
    let m = dims(&x)[0];
    let words = B::words(&words);
    let mut y = vec![0f32; m * n];
    let (weights, values) = (raw(&words, &args), B::floats(&x));
    let manager = manager();
    if int8 {
        with_activations(|activations| {
            quantise(manager, &values, k, None, activations.resize(m, k));
            dense_int8::linear(format, weights, n, activations, &mut y, n, manager.pool());
        });
    } else {
        dense::linear(format, weights, n, k, &values, m, &mut y, n, manager.pool());
    }
    B::tensor(y, Shape::new([m, args.n]))
}

pub(crate) fn dense_rows<B: HostBackend>(
    words: IntTensor<B>,
    ids: IntTensor<B>,
    args: DenseArgs,
) -> FloatTensor<B> {
    let (words, ids) = (B::words(&words), B::indices(&ids));
    let mut y = vec![0f32; ids.len() * args.k];
    dense::gather_rows(args.format, raw(&words, &args), args.k, &ids, &mut y);
    B::tensor(y, Shape::new([ids.len(), args.k]))
}

macro_rules! fast_bodies {
    ($backend:ty) => {
        impl crate::TernaryBackend for $backend {
            fn bit_linear(
                x: FloatTensor<Self>,
                norm: InputNorm<Self>,
                weights: TernaryWeights<Self>,
                args: BitLinearArgs,
            ) -> FloatTensor<Self> {
                bit_linear::<Self>(x, norm, weights, args)
            }

            fn bit_linear_backward(
                dy: FloatTensor<Self>,
                weights: TernaryWeights<Self>,
                args: BitLinearArgs,
            ) -> FloatTensor<Self> {
                bit_linear_backward::<Self>(dy, weights, args)
            }

            fn fake_quantise(x: FloatTensor<Self>) -> FloatTensor<Self> {
                fake_quantise::<Self>(x)
            }

            fn ternarise(w: FloatTensor<Self>) -> FloatTensor<Self> {
                ternarise::<Self>(w)
            }

            fn self_attention(
                qkv: FloatTensor<Self>,
                cos: FloatTensor<Self>,
                sin: FloatTensor<Self>,
                args: SelfAttentionArgs,
            ) -> FloatTensor<Self> {
                self_attention::<Self>(qkv, cos, sin, &args)
            }

            fn self_attention_backward(
                qkv: FloatTensor<Self>,
                cos: FloatTensor<Self>,
                sin: FloatTensor<Self>,
                dy: FloatTensor<Self>,
                args: SelfAttentionArgs,
            ) -> FloatTensor<Self> {
                self_attention_backward::<Self>(qkv, cos, sin, dy, &args)
            }

            fn cross_entropy(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
                cross_entropy::<Self>(logits, targets)
            }

            fn cross_entropy_backward(
                logits: FloatTensor<Self>,
                targets: IntTensor<Self>,
                d: FloatTensor<Self>,
            ) -> FloatTensor<Self> {
                cross_entropy_backward::<Self>(logits, targets, d)
            }

            fn rms_norm_backward(
                x: FloatTensor<Self>,
                weight: FloatTensor<Self>,
                dy: FloatTensor<Self>,
                eps: f32,
            ) -> FloatTensor<Self> {
                rms_norm_backward::<Self>(x, weight, dy, eps)
            }

            fn rms_norm_backward_weight(
                x: FloatTensor<Self>,
                dy: FloatTensor<Self>,
                eps: f32,
            ) -> FloatTensor<Self> {
                rms_norm_backward_weight::<Self>(x, dy, eps)
            }

            fn gated_backward(
                gate_up: FloatTensor<Self>,
                dy: FloatTensor<Self>,
                activation: GatedActivation,
            ) -> FloatTensor<Self> {
                gated_backward::<Self>(gate_up, dy, activation)
            }

            fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
                rms_norm::<Self>(x, weight, eps)
            }

            fn rope(
                x: FloatTensor<Self>,
                cos: FloatTensor<Self>,
                sin: FloatTensor<Self>,
                head_dim: usize,
            ) -> FloatTensor<Self> {
                rope::<Self>(x, cos, sin, head_dim)
            }

            fn cache_append(
                cache: CacheTensor<Self>,
                rows: FloatTensor<Self>,
                position: usize,
            ) -> CacheTensor<Self> {
                cache_append::<Self>(cache, rows, position)
            }

            fn attention(
                q: FloatTensor<Self>,
                keys: CacheTensor<Self>,
                values: CacheTensor<Self>,
                args: AttentionArgs,
            ) -> FloatTensor<Self> {
                attention::<Self>(q, keys, values, args)
            }

            fn gated(gate_up: FloatTensor<Self>, activation: GatedActivation) -> FloatTensor<Self> {
                gated::<Self>(gate_up, activation)
            }

            fn dense_linear(
                x: FloatTensor<Self>,
                words: IntTensor<Self>,
                args: DenseArgs,
            ) -> FloatTensor<Self> {
                dense_linear::<Self>(x, words, args)
            }

            fn dense_rows(
                words: IntTensor<Self>,
                ids: IntTensor<Self>,
                args: DenseArgs,
            ) -> FloatTensor<Self> {
                dense_rows::<Self>(words, ids, args)
            }
        }
    };
}

#[cfg(feature = "flex")]
fast_bodies!(burn::backend::Flex);

#[cfg(feature = "ndarray")]
mod ndarray_bodies {
    use super::*;
    fast_bodies!(burn::backend::NdArray);
}
