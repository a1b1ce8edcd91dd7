//! Attention over a KV cache that stays on the device.

use bitnet_burn_cube::attention::{self, Cache, Cached, Shape};
use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, Slice};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

use super::body::params_on;
use super::rows::{dims, tensor};
use crate::default;
use crate::extension::{AttentionArgs, CacheTensor, CachedAttention};

type B = CubeBackend;

/// Whether caches of int8 can be had: they are words of four, which Burn's operations know nothing of.
pub(crate) fn int8_supported(head_dim: usize) -> bool {
    let shape =
        Shape { n_heads: 1, n_kv_heads: 1, head_dim, capacity: 1, cached: Cached::Int8, window: None };
    shape.supported(1)
}

/// Shape of a cache and its heads, if the kernels take it.
fn shape(cache: &CacheTensor<B>, m: usize, args: &AttentionArgs) -> Option<Shape> {
    let cached = match cache {
        CacheTensor::Int8 { .. } => Cached::Int8,
        CacheTensor::Float(tensor) if tensor.dtype == DType::F16 => Cached::F16,
        CacheTensor::Float(tensor) if tensor.dtype == DType::F32 => Cached::F32,
        CacheTensor::Float(_) => return None,
    };
    let AttentionArgs { n_heads, n_kv_heads, head_dim, window, .. } = *args;
    let shape = Shape { n_heads, n_kv_heads, head_dim, capacity: cache.shape()[1], cached, window };
    shape.supported(m).then_some(shape)
}

/// A tensor that may be written to in place. (A copy may have gaps between its rows.)
fn owned(tensor: CubeTensor) -> CubeTensor {
    into_contiguous(if tensor.can_mut() { tensor } else { tensor.copy() })
}

fn owned_cache(cache: CacheTensor<B>) -> CacheTensor<B> {
    match cache {
        CacheTensor::Float(tensor) => CacheTensor::Float(owned(tensor)),
        CacheTensor::Int8 { codes, scale } => CacheTensor::Int8 { codes: owned(codes), scale: owned(scale) },
    }
}

fn handles(cache: &CacheTensor<B>) -> Cache {
    match cache {
        CacheTensor::Float(tensor) => Cache { words: tensor.handle.clone(), scale: None },
        CacheTensor::Int8 { codes, scale } => {
            Cache { words: codes.handle.clone(), scale: Some(scale.handle.clone()) }
        }
    }
}

pub(crate) fn cached_attention(
    qkv: CubeTensor,
    cos: CubeTensor,
    sin: CubeTensor,
    keys: CacheTensor<B>,
    values: CacheTensor<B>,
    args: AttentionArgs,
) -> CachedAttention<B> {
    let [m, _] = dims(&qkv);
    let floats = [&qkv, &cos, &sin].iter().all(|tensor| tensor.dtype == DType::F32);
    let Some(shape) = shape(&keys, m, &args).filter(|_| floats) else {
        if floats && m > 1 && shape(&keys, 1, &args).is_some() {
            return in_halves([qkv, cos, sin], keys, values, args);
        }
        return default::cached_attention::<B>(qkv, cos, sin, keys, values, args);
    };
    let [qkv, cos, sin] = [qkv, cos, sin].map(into_contiguous);
    let (keys, values) = (owned_cache(keys), owned_cache(values));
    let params = params_on(&qkv.device, &qkv.client, shape.params(m, args.position));
    let inputs = (qkv.handle.clone(), cos.handle, sin.handle);
    let caches = (&handles(&keys), &handles(&values));
    // SAFETY: contiguous f32 of the shapes that the operation's caller checked; caches of the shape's type, which are
    // nobody else's; the parameters for them.
    let context =
        unsafe { attention::attend(&qkv.client, &shape, inputs, caches, params, (m, args.position)) };
    CachedAttention { context: tensor(&qkv, context, [m, args.n_heads * args.head_dim]), keys, values }
}

/// More rows than a launch takes.
fn in_halves(
    rows: [CubeTensor; 3],
    keys: CacheTensor<B>,
    values: CacheTensor<B>,
    args: AttentionArgs,
) -> CachedAttention<B> {
    let [m, _] = dims(&rows[0]);
    let half = |tensor: &CubeTensor, from: usize, to: usize| {
        let range = Slice::new(from as isize, Some(to as isize), 1);
        B::float_slice(tensor.clone(), &[range])
    };
    let [first, second] =
        [(0, m / 2), (m / 2, m)].map(|(from, to)| [0, 1, 2].map(|i| half(&rows[i], from, to)));
    let ([qkv, cos, sin], position) = (first, args.position);
    let first = cached_attention(qkv, cos, sin, keys, values, args);
    let [qkv, cos, sin] = second;
    let args = AttentionArgs { position: position + m / 2, ..args };
    let second = cached_attention(qkv, cos, sin, first.keys, first.values, args);
    CachedAttention { context: B::float_cat(vec![first.context, second.context], 0), ..second }
}
