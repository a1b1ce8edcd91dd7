//! Rotary embedding, KV caches, and attention over them.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{DType, FloatDType, IntDType, Shape, TensorData};

use super::{dims, quantise, slice};
use crate::extension::{AttentionArgs, CacheTensor, CachedAttention, TernaryBackend};

pub(crate) fn rope<B: Backend>(
    x: FloatTensor<B>,
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
    head_dim: usize,
) -> FloatTensor<B> {
    let [m, width] = dims(&x)[..] else { panic!("rope takes [M, heads * head_dim]") };
    let (heads, half) = (width / head_dim, head_dim / 2);
    let x = B::float_reshape(x, Shape::new([m, heads, head_dim]));
    let low = B::float_slice(x.clone(), &slice(&[0..m, 0..heads, 0..half]));
    let high = B::float_slice(x, &slice(&[0..m, 0..heads, half..head_dim]));
    let cos = B::float_reshape(cos, Shape::new([m, 1, half]));
    let sin = B::float_reshape(sin, Shape::new([m, 1, half]));
    let new_low =
        B::float_sub(B::float_mul(low.clone(), cos.clone()), B::float_mul(high.clone(), sin.clone()));
    let new_high = B::float_add(B::float_mul(high, cos), B::float_mul(low, sin));
    B::float_reshape(B::float_cat(vec![new_low, new_high], 2), Shape::new([m, width]))
}

pub(crate) fn cached_attention<B: TernaryBackend>(
    qkv: FloatTensor<B>,
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
    keys: CacheTensor<B>,
    values: CacheTensor<B>,
    args: AttentionArgs,
) -> CachedAttention<B> {
    let AttentionArgs { n_heads, n_kv_heads, head_dim, position, .. } = args;
    let m = dims(&qkv)[0];
    let (q_size, kv_size) = (n_heads * head_dim, n_kv_heads * head_dim);
    let part = |from: usize, to: usize| B::float_slice(qkv.clone(), &slice(&[0..m, from..to]));
    let q = B::rope(part(0, q_size), cos.clone(), sin.clone(), head_dim);
    let k = B::rope(part(q_size, q_size + kv_size), cos, sin, head_dim);
    let v = part(q_size + kv_size, q_size + 2 * kv_size);
    let keys = B::cache_append(keys, k, position);
    let values = B::cache_append(values, v, position);
    let context = <B as TernaryBackend>::attention(q, keys.clone(), values.clone(), args);
    CachedAttention { context, keys, values }
}

pub(crate) fn cache_append<B: Backend>(
    cache: CacheTensor<B>,
    rows: FloatTensor<B>,
    position: usize,
) -> CacheTensor<B> {
    let [heads, _, d] = cache.shape()[..] else { panic!("a cache is [kv heads, capacity, head_dim]") };
    let m = dims(&rows)[0];
    let whole = slice(&[0..heads, position..position + m, 0..d]);
    match cache {
        CacheTensor::Float(cache) => {
            let rows = B::float_permute(B::float_reshape(rows, Shape::new([m, heads, d])), &[1, 0, 2]);
            let rows =
                if cache.dtype() == rows.dtype() { rows } else { B::float_cast(rows, cache.dtype().into()) };
            CacheTensor::Float(B::float_slice_assign(cache, &whole, rows))
        }
        CacheTensor::Int8 { codes, scale } => {
            let (q, a) = quantise::<B>(B::float_reshape(rows, Shape::new([m * heads, d])));
            let q = B::float_permute(B::float_reshape(q, Shape::new([m, heads, d])), &[1, 0, 2]);
            let a = B::float_permute(B::float_reshape(a, Shape::new([m, heads])), &[1, 0]);
            CacheTensor::Int8 {
                codes: B::int_slice_assign(codes, &whole, B::float_into_int(q, IntDType::I8)),
                scale: B::float_slice_assign(scale, &whole[..2], a),
            }
        }
    }
}

pub(crate) fn attention<B: Backend>(
    q: FloatTensor<B>,
    keys: CacheTensor<B>,
    values: CacheTensor<B>,
    args: &AttentionArgs,
) -> FloatTensor<B> {
    let AttentionArgs { n_heads, n_kv_heads, head_dim, position, window } = *args;
    let m = dims(&q)[0];
    let (group, length) = (n_heads / n_kv_heads, position + m);
    let whole = slice(&[0..n_kv_heads, 0..length, 0..head_dim]);
    let seen = |cache: CacheTensor<B>| match cache {
        CacheTensor::Float(cache) => {
            let part = B::float_slice(cache, &whole);
            if part.dtype() == DType::F32 { part } else { B::float_cast(part, FloatDType::F32) }
        }
        CacheTensor::Int8 { codes, scale } => {
            let codes = B::int_into_float(B::int_slice(codes, &whole), FloatDType::F32);
            let scale = B::float_slice(scale, &whole[..2]);
            B::float_mul(codes, B::float_reshape(scale, Shape::new([n_kv_heads, length, 1])))
        }
    };
    // [M, kv, group, d] -> [kv, group * M, d]
    let q = B::float_reshape(q, Shape::new([m, n_kv_heads, group, head_dim]));
    let q =
        B::float_reshape(B::float_permute(q, &[1, 2, 0, 3]), Shape::new([n_kv_heads, group * m, head_dim]));
    let scores = B::float_matmul(q, B::float_transpose(seen(keys)));
    let scores = B::float_mul_scalar(scores, (1.0 / (head_dim as f32).sqrt()).into());
    let (weights, sums) = causal_weights::<B>(scores, m, position, window);
    let out = B::float_div(B::float_matmul(weights, seen(values)), sums);
    let out = B::float_reshape(out, Shape::new([n_kv_heads, group, m, head_dim]));
    B::float_reshape(B::float_permute(out, &[2, 0, 1, 3]), Shape::new([m, n_heads * head_dim]))
}

/// exp of scores [., group * rows, length] less each row's largest, zero behind the row's own position and before its
/// window, and their sums: the softmax before its division. Row r is at `position + r % rows`.
pub(super) fn causal_weights<B: Backend>(
    scores: FloatTensor<B>,
    rows: usize,
    position: usize,
    window: Option<usize>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let [_, all, length] = dims(&scores)[..] else { panic!("scores are [., group * rows, length]") };
    let seen = |row: usize| {
        let end = position + row % rows + 1;
        window.map_or(0, |window| end.saturating_sub(window))..end
    };
    let mask: Vec<f32> = (0..all)
        .flat_map(|row| {
            let seen = seen(row);
            (0..length).map(move |p| if seen.contains(&p) { 0.0 } else { -1e30 })
        })
        .collect();
    let mask = B::float_from_data(TensorData::new(mask, [1, all, length]), &scores.device());
    let scores = B::float_add(scores, mask);
    let weights = B::float_exp(B::float_sub(scores.clone(), B::float_max_dim(scores, 2)));
    let sums = B::float_sum_dim(weights.clone(), 2);
    (weights, sums)
}
