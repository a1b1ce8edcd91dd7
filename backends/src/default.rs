//! The operations in plain Burn operations: what they mean, and how they run on a backend without
//! bodies of its own.

#![allow(clippy::single_range_in_vec_init, reason = "tensors of one dimension are sliced by one range")]

use bitnet_burn_formats::DenseFormat;
use bitnet_burn_formats::dense_tiles::untile;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{DType, FloatDType, IndexingUpdateOp, IntDType, Shape, Slice, TensorData, try_read_sync};

use crate::extension::{
    Attended, AttentionArgs, BitLinearArgs, CacheTensor, DenseArgs, GatedActivation, InputNorm,
    SelfAttentionArgs, TernaryBackend, TernaryWeight, TernaryWeights,
};

const EPSILON: f32 = 1e-5;

fn dims<T: TensorMetadata>(tensor: &T) -> Vec<usize> {
    tensor.shape().to_vec()
}

fn slice(ranges: &[std::ops::Range<usize>]) -> Vec<Slice> {
    ranges.iter().map(|r| Slice::new(r.start as isize, Some(r.end as isize), 1)).collect()
}

pub(crate) fn rms_norm<B: Backend>(x: FloatTensor<B>, weight: FloatTensor<B>, eps: f32) -> FloatTensor<B> {
    let k = dims(&x)[1];
    let mean = B::float_mean_dim(B::float_mul(x.clone(), x.clone()), 1);
    let root = B::float_sqrt(B::float_add_scalar(mean, eps.into()));
    B::float_mul(B::float_div(x, root), B::float_reshape(weight, Shape::new([1, k])))
}

pub(crate) fn bit_linear<B: Backend>(
    x: FloatTensor<B>,
    norm: InputNorm<B>,
    weights: TernaryWeights<B>,
    args: &BitLinearArgs,
) -> FloatTensor<B> {
    let x = match norm {
        InputNorm::None => x,
        InputNorm::Rms(weight) => rms_norm::<B>(x, weight, args.eps),
    };
    // Products of int8 and -1, 0, 1 are whole numbers, and so are their sums: exact in f32 below 2^24,
    // whatever the order of a backend's matmul.
    let (x, row_scale) = if args.quantise {
        let (q, scale) = quantise::<B>(x);
        (q, Some(scale))
    } else {
        (x, None)
    };
    let outputs = weights
        .into_vec()
        .into_iter()
        .zip(&args.matrices)
        .map(|(weight, matrix)| {
            let codes = codes::<B>(weight.codes, matrix.n, args.k);
            let sums = B::float_matmul(x.clone(), B::float_transpose(codes));
            let scale = B::float_reshape(weight.scale, Shape::new([1, 1]));
            match &row_scale {
                Some(a) => B::float_mul(sums, B::float_mul(a.clone(), scale)),
                None => B::float_mul(sums, scale),
            }
        })
        .collect();
    concat::<B>(outputs)
}

/// Rows quantised by absmax, as whole numbers, and their scales a / 127 [M, 1].
fn quantise<B: Backend>(x: FloatTensor<B>) -> (FloatTensor<B>, FloatTensor<B>) {
    let a = B::float_clamp_min(B::float_max_abs_dim(x.clone(), 1), EPSILON.into());
    // 127 / a, rounded once: 127 * (1 / a) would break exact ties.
    let steps = B::float_full(a.shape(), 127f32.into(), &a.device(), FloatDType::F32);
    let to_int8 = B::float_div(steps, a.clone());
    let q = B::float_round(B::float_mul(x, to_int8));
    (B::float_clamp(q, (-128f32).into(), 127f32.into()), B::float_div_scalar(a, 127f32.into()))
}

pub(crate) fn fake_quantise<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let (q, scale) = quantise::<B>(x);
    B::float_mul(q, scale)
}

pub(crate) fn ternarise<B: Backend>(w: FloatTensor<B>) -> FloatTensor<B> {
    let mean = B::float_mean(B::float_abs(w.clone()));
    let s = B::float_reshape(B::float_clamp_min(mean, EPSILON.into()), Shape::new([1, 1]));
    let codes = B::float_round(B::float_mul(w, B::float_recip(s.clone())));
    B::float_mul(B::float_clamp(codes, (-1f32).into(), 1f32.into()), s)
}

/// Queries, keys and values of [`self_attention`], turned, by (sequence, kv head): q [., group * length, d],
/// k and v [., length, d]; and the softmax of their scores [., group * length, length].
struct SelfAttended<B: Backend> {
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    weights: FloatTensor<B>,
    /// The angles of every row [M, d / 2].
    angles: (FloatTensor<B>, FloatTensor<B>),
}

/// [M, kv * group * d] -> [sequences * kv, group * length, d]
fn split_heads<B: Backend>(x: FloatTensor<B>, group: usize, args: &SelfAttentionArgs) -> FloatTensor<B> {
    let SelfAttentionArgs { n_kv_heads, head_dim: d, length, .. } = *args;
    let sequences = dims(&x)[0] / length;
    let x = B::float_reshape(x, Shape::new([sequences, length, n_kv_heads, group, d]));
    let x = B::float_permute(x, &[0, 2, 3, 1, 4]);
    B::float_reshape(x, Shape::new([sequences * n_kv_heads, group * length, d]))
}

/// The reverse of [`split_heads`].
fn join_heads<B: Backend>(x: FloatTensor<B>, group: usize, args: &SelfAttentionArgs) -> FloatTensor<B> {
    let SelfAttentionArgs { n_kv_heads, head_dim: d, length, .. } = *args;
    let sequences = dims(&x)[0] / n_kv_heads;
    let x = B::float_reshape(x, Shape::new([sequences, n_kv_heads, group, length, d]));
    let x = B::float_permute(x, &[0, 3, 1, 2, 4]);
    B::float_reshape(x, Shape::new([sequences * length, n_kv_heads * group * d]))
}

fn attended<B: Backend>(
    qkv: FloatTensor<B>,
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
    args: &SelfAttentionArgs,
) -> SelfAttended<B> {
    let SelfAttentionArgs { n_heads, n_kv_heads, head_dim: d, length } = *args;
    let m = dims(&qkv)[0];
    let (sequences, group) = (m / length, n_heads / n_kv_heads);
    let repeat = |angles: FloatTensor<B>| {
        let angles = B::float_reshape(angles, Shape::new([1, length, d / 2]));
        let all = B::float_expand(angles, Shape::new([sequences, length, d / 2]));
        B::float_reshape(all, Shape::new([m, d / 2]))
    };
    let (cos, sin) = (repeat(cos), repeat(sin));
    let part = |from: usize, heads: usize| {
        B::float_slice(qkv.clone(), &slice(&[0..m, from * d..(from + heads) * d]))
    };
    let q = rope::<B>(part(0, n_heads), cos.clone(), sin.clone(), d);
    let k = rope::<B>(part(n_heads, n_kv_heads), cos.clone(), sin.clone(), d);
    let v = part(n_heads + n_kv_heads, n_kv_heads);
    let q = split_heads::<B>(q, group, args);
    let (k, v) = (split_heads::<B>(k, 1, args), split_heads::<B>(v, 1, args));
    let scores = B::float_matmul(q.clone(), B::float_transpose(k.clone()));
    let scores = B::float_mul_scalar(scores, (1.0 / (d as f32).sqrt()).into());
    let (weights, sums) = causal_weights::<B>(scores, length, 0);
    SelfAttended { q, k, v, weights: B::float_div(weights, sums), angles: (cos, sin) }
}

pub(crate) fn self_attention<B: Backend>(
    qkv: FloatTensor<B>,
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
    args: &SelfAttentionArgs,
) -> FloatTensor<B> {
    let SelfAttended { v, weights, .. } = attended::<B>(qkv, cos, sin, args);
    join_heads::<B>(B::float_matmul(weights, v), args.n_heads / args.n_kv_heads, args)
}

pub(crate) fn self_attention_backward<B: Backend>(
    qkv: FloatTensor<B>,
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
    dy: FloatTensor<B>,
    args: &SelfAttentionArgs,
) -> FloatTensor<B> {
    let (d, group) = (args.head_dim, args.n_heads / args.n_kv_heads);
    let SelfAttended { q, k, v, weights, angles } = attended::<B>(qkv, cos, sin, args);
    let dy = split_heads::<B>(dy, group, args);
    let d_v = B::float_matmul(B::float_transpose(weights.clone()), dy.clone());
    let d_weights = B::float_matmul(dy, B::float_transpose(v));
    let mean = B::float_sum_dim(B::float_mul(d_weights.clone(), weights.clone()), 2);
    let d_scores = B::float_mul(weights, B::float_sub(d_weights, mean));
    let d_scores = B::float_mul_scalar(d_scores, (1.0 / (d as f32).sqrt()).into());
    let d_q = B::float_matmul(d_scores.clone(), k);
    let d_k = B::float_matmul(B::float_transpose(d_scores), q);
    // Turning by the opposite angle is the gradient of turning.
    let (cos, back) = (angles.0, B::float_neg(angles.1));
    let turn = |x: FloatTensor<B>| rope::<B>(x, cos.clone(), back.clone(), d);
    let parts = vec![
        turn(join_heads::<B>(d_q, group, args)),
        turn(join_heads::<B>(d_k, 1, args)),
        join_heads::<B>(d_v, 1, args),
    ];
    B::float_cat(parts, 1)
}

pub(crate) fn cross_entropy<B: Backend>(logits: FloatTensor<B>, targets: IntTensor<B>) -> FloatTensor<B> {
    let m = dims(&logits)[0];
    let logits = B::float_sub(logits.clone(), B::float_max_dim(logits, 1));
    let total = B::float_log(B::float_sum_dim(B::float_exp(logits.clone()), 1));
    let target = B::float_gather(1, logits, B::int_reshape(targets, Shape::new([m, 1])));
    B::float_reshape(B::float_sub(total, target), Shape::new([m]))
}

pub(crate) fn cross_entropy_backward<B: Backend>(
    logits: FloatTensor<B>,
    targets: IntTensor<B>,
    d: FloatTensor<B>,
) -> FloatTensor<B> {
    let m = dims(&logits)[0];
    let weights = B::float_exp(B::float_sub(logits.clone(), B::float_max_dim(logits, 1)));
    let sums = B::float_sum_dim(weights.clone(), 1);
    let d = B::float_reshape(d, Shape::new([m, 1]));
    let dx = B::float_mul(B::float_div(weights, sums), d.clone());
    let targets = B::int_reshape(targets, Shape::new([m, 1]));
    B::float_scatter(1, dx, targets, B::float_neg(d), IndexingUpdateOp::Add)
}

/// 1 / sqrt(mean(x^2) + eps) of each row [M, 1].
fn inverse_root<B: Backend>(x: FloatTensor<B>, eps: f32) -> FloatTensor<B> {
    let mean = B::float_mean_dim(B::float_mul(x.clone(), x), 1);
    B::float_recip(B::float_sqrt(B::float_add_scalar(mean, eps.into())))
}

pub(crate) fn rms_norm_backward<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    dy: FloatTensor<B>,
    eps: f32,
) -> FloatTensor<B> {
    let k = dims(&x)[1];
    let r = inverse_root::<B>(x.clone(), eps);
    let g = B::float_mul(dy, B::float_reshape(weight, Shape::new([1, k])));
    let mean = B::float_mean_dim(B::float_mul(g.clone(), x.clone()), 1);
    let factor = B::float_mul(B::float_mul(r.clone(), r.clone()), mean);
    B::float_mul(B::float_sub(g, B::float_mul(x, factor)), r)
}

pub(crate) fn rms_norm_backward_weight<B: Backend>(
    x: FloatTensor<B>,
    dy: FloatTensor<B>,
    eps: f32,
) -> FloatTensor<B> {
    let k = dims(&x)[1];
    let r = inverse_root::<B>(x.clone(), eps);
    let sum = B::float_sum_dim(B::float_mul(dy, B::float_mul(x, r)), 0);
    B::float_reshape(sum, Shape::new([k]))
}

pub(crate) fn gated_backward<B: Backend>(
    gate_up: FloatTensor<B>,
    dy: FloatTensor<B>,
    activation: GatedActivation,
) -> FloatTensor<B> {
    let [m, width] = dims(&gate_up)[..] else { panic!("gated takes [M, 2 * F]") };
    let gate = B::float_slice(gate_up.clone(), &slice(&[0..m, 0..width / 2]));
    let up = B::float_slice(gate_up, &slice(&[0..m, width / 2..width]));
    let (value, slope) = match activation {
        GatedActivation::Relu2 => {
            let relu = B::float_clamp_min(gate, 0f32.into());
            (B::float_mul(relu.clone(), relu.clone()), B::float_mul_scalar(relu, 2f32.into()))
        }
        GatedActivation::Silu => {
            let e = B::float_exp(B::float_neg(gate.clone()));
            let sigmoid = B::float_recip(B::float_add_scalar(e, 1f32.into()));
            let value = B::float_mul(gate, sigmoid.clone());
            // sigmoid + value * (1 - sigmoid)
            let rest = B::float_add_scalar(B::float_neg(sigmoid.clone()), 1f32.into());
            (value.clone(), B::float_add(sigmoid, B::float_mul(value, rest)))
        }
    };
    let d_gate = B::float_mul(B::float_mul(dy.clone(), up), slope);
    B::float_cat(vec![d_gate, B::float_mul(dy, value)], 1)
}

pub(crate) fn concat<B: Backend>(mut tensors: Vec<FloatTensor<B>>) -> FloatTensor<B> {
    if tensors.len() == 1 { tensors.remove(0) } else { B::float_cat(tensors, 1) }
}

pub(crate) fn bit_linear_backward<B: Backend>(
    dy: FloatTensor<B>,
    weights: TernaryWeights<B>,
    args: &BitLinearArgs,
) -> FloatTensor<B> {
    let m = dims(&dy)[0];
    let mut from = 0;
    let mut sum: Option<FloatTensor<B>> = None;
    for (weight, matrix) in weights.into_vec().into_iter().zip(&args.matrices) {
        let TernaryWeight { codes: words, scale } = weight;
        let part = B::float_slice(dy.clone(), &slice(&[0..m, from..from + matrix.n]));
        from += matrix.n;
        let dx = B::float_matmul(part, codes::<B>(words, matrix.n, args.k));
        let dx = B::float_mul(dx, B::float_reshape(scale, Shape::new([1, 1])));
        sum = Some(match sum {
            None => dx,
            Some(sum) => B::float_add(sum, dx),
        });
    }
    sum.expect("TernaryWeights holds one to three matrices")
}

/// The weights -1, 0, 1 as floats [n, k] from canonical words [n, ceil(k / 128) * 8].
///
/// Block b's byte 4 w + i is byte i of its word w, and holds in its bit pairs, from the highest down,
/// the weights g * 32 + 4 w + i for g in 0..4.
fn codes<B: Backend>(words: IntTensor<B>, n: usize, k: usize) -> FloatTensor<B> {
    let blocks = k.div_ceil(128);
    let words = B::int_reshape(words, Shape::new([n, blocks, 1, 8]));
    let shifts = (0..4).flat_map(|g| (0..4).map(move |i| 8 * i + 6 - 2 * g));
    let parts = shifts
        .map(|shift| {
            let shifted = B::bitwise_right_shift_scalar(words.clone(), (shift as i64).into());
            B::bitwise_and_scalar(shifted, 3i64.into())
        })
        .collect();
    // [n, blocks, g * 4 + i, w] -> [n, blocks, g, w, i]
    let all = B::int_reshape(B::int_cat(parts, 2), Shape::new([n, blocks, 4, 4, 8]));
    let ordered = B::int_reshape(B::int_permute(all, &[0, 1, 2, 4, 3]), Shape::new([n, blocks * 128]));
    let values = B::int_into_float(ordered, FloatDType::F32);
    let values = B::float_sub_scalar(values, 1f32.into());
    if k == blocks * 128 { values } else { B::float_slice(values, &slice(&[0..n, 0..k])) }
}

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

pub(crate) fn attend<B: TernaryBackend>(
    qkv: FloatTensor<B>,
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
    keys: CacheTensor<B>,
    values: CacheTensor<B>,
    args: AttentionArgs,
) -> Attended<B> {
    let AttentionArgs { n_heads, n_kv_heads, head_dim, position } = args;
    let m = dims(&qkv)[0];
    let (q_size, kv_size) = (n_heads * head_dim, n_kv_heads * head_dim);
    let part = |from: usize, to: usize| B::float_slice(qkv.clone(), &slice(&[0..m, from..to]));
    let q = B::rope(part(0, q_size), cos.clone(), sin.clone(), head_dim);
    let k = B::rope(part(q_size, q_size + kv_size), cos, sin, head_dim);
    let v = part(q_size + kv_size, q_size + 2 * kv_size);
    let keys = B::cache_append(keys, k, position);
    let values = B::cache_append(values, v, position);
    let context = <B as TernaryBackend>::attention(q, keys.clone(), values.clone(), args);
    Attended { context, keys, values }
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
    let AttentionArgs { n_heads, n_kv_heads, head_dim, position } = *args;
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
    let (weights, sums) = causal_weights::<B>(scores, m, position);
    let out = B::float_div(B::float_matmul(weights, seen(values)), sums);
    let out = B::float_reshape(out, Shape::new([n_kv_heads, group, m, head_dim]));
    B::float_reshape(B::float_permute(out, &[2, 0, 1, 3]), Shape::new([m, n_heads * head_dim]))
}

/// exp of scores [., group * rows, length] less each row's largest, zero behind the row's own position, and
/// their sums: the softmax before its division. Row r is at `position + r % rows`.
fn causal_weights<B: Backend>(
    scores: FloatTensor<B>,
    rows: usize,
    position: usize,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let [_, all, length] = dims(&scores)[..] else { panic!("scores are [., group * rows, length]") };
    let mask: Vec<f32> = (0..all)
        .flat_map(|row| (0..length).map(move |p| if p <= position + row % rows { 0.0 } else { -1e30 }))
        .collect();
    let mask = B::float_from_data(TensorData::new(mask, [1, all, length]), &scores.device());
    let scores = B::float_add(scores, mask);
    let weights = B::float_exp(B::float_sub(scores.clone(), B::float_max_dim(scores, 2)));
    let sums = B::float_sum_dim(weights.clone(), 2);
    (weights, sums)
}

pub(crate) fn gated<B: Backend>(gate_up: FloatTensor<B>, activation: GatedActivation) -> FloatTensor<B> {
    let [m, width] = dims(&gate_up)[..] else { panic!("gated takes [M, 2 * F]") };
    let gate = B::float_slice(gate_up.clone(), &slice(&[0..m, 0..width / 2]));
    let up = B::float_slice(gate_up, &slice(&[0..m, width / 2..width]));
    let gate = match activation {
        GatedActivation::Relu2 => {
            let relu = B::float_clamp_min(gate, 0f32.into());
            B::float_mul(relu.clone(), relu)
        }
        GatedActivation::Silu => {
            let e = B::float_exp(B::float_neg(gate.clone()));
            B::float_div(gate, B::float_add_scalar(e, 1f32.into()))
        }
    };
    B::float_mul(gate, up)
}

pub(crate) fn dense_linear<B: Backend>(
    x: FloatTensor<B>,
    words: IntTensor<B>,
    args: &DenseArgs,
) -> FloatTensor<B> {
    let words = if args.tiled { rows_of_tiles::<B>(words, args) } else { words };
    decoded_linear::<B>(x, decode::<B>(words, args), args)
}

/// [`dense_linear`] with weights [N, K] that are decoded.
pub(crate) fn decoded_linear<B: Backend>(
    x: FloatTensor<B>,
    weights: FloatTensor<B>,
    args: &DenseArgs,
) -> FloatTensor<B> {
    let weights = B::float_transpose(weights);
    if !args.int8 {
        return B::float_matmul(x, weights);
    }
    let (q, scale) = quantise::<B>(x);
    B::float_mul(B::float_matmul(q, weights), scale)
}

pub(crate) fn dense_rows<B: Backend>(
    words: IntTensor<B>,
    ids: IntTensor<B>,
    args: &DenseArgs,
) -> FloatTensor<B> {
    let row = args.format.row_bytes(args.k).expect("checked when the tensor was made");
    let words = flat::<B>(words);
    if !row.is_multiple_of(4) {
        return B::float_select(decode::<B>(words, args), 0, ids);
    }
    let words = B::int_slice(words, &slice(&[0..args.n * row / 4]));
    let rows = B::int_select(B::int_reshape(words, Shape::new([args.n, row / 4])), 0, ids);
    let m = dims(&rows)[0];
    decode::<B>(B::int_reshape(rows, Shape::new([m * row / 4])), &DenseArgs { n: m, ..*args })
}

/// Rows of what lies in tiles, by way of the host: tiles are for the bodies that host memory has.
fn rows_of_tiles<B: Backend>(words: IntTensor<B>, args: &DenseArgs) -> IntTensor<B> {
    let device = words.device();
    let data = try_read_sync(B::int_into_data(words)).expect("a device that is read at once");
    let words: Vec<u32> = data.expect("a tensor's data").iter::<i64>().map(|word| word as u32).collect();
    let tiles = &bytemuck::cast_slice(&words)[..args.bytes().expect("checked when the tensor was made")];
    let size = DenseArgs { tiled: false, ..*args }.bytes().expect("tiles are no smaller");
    let mut rows = vec![0u32; size.div_ceil(4)];
    let out = &mut bytemuck::cast_slice_mut(&mut rows)[..size];
    untile(args.format, tiles, (args.n, args.k), out).expect("tiles of that size");
    let count = rows.len();
    B::int_from_data(TensorData::new(rows, [count]), &device)
}

/// Words in one dimension, whatever shape they are kept in.
fn flat<B: Backend>(words: IntTensor<B>) -> IntTensor<B> {
    let count = words.shape().num_elements();
    B::int_reshape(words, Shape::new([count]))
}

/// W [n, k] as f32.
fn decode<B: Backend>(words: IntTensor<B>, args: &DenseArgs) -> FloatTensor<B> {
    let DenseArgs { format, n, k, .. } = *args;
    let size = n * format.row_bytes(k).expect("checked when the tensor was made");
    let block = format.block_bytes();
    let blocks = size / block;
    let bits = |tensor: IntTensor<B>, shift: i64, width: i64| {
        let shifted = if shift == 0 { tensor } else { B::bitwise_right_shift_scalar(tensor, shift.into()) };
        B::bitwise_and_scalar(shifted, ((1i64 << width) - 1).into())
    };
    let words = flat::<B>(words);
    let count = dims(&words)[0];
    let float = |tensor: IntTensor<B>| B::int_into_float(tensor, FloatDType::F32);
    let whole = Shape::new([n, k]);
    if format == DenseFormat::F32 {
        return B::float_reshape(from_bits::<B>(B::int_slice(words, &slice(&[0..n * k])), 8, 23), whole);
    }
    // [words, 4] bytes, cut off at the tensor's end: [blocks, bytes of a block].
    let words = B::int_reshape(words, Shape::new([count, 1]));
    let bytes = B::int_cat((0..4).map(|i| bits(words.clone(), 8 * i, 8)).collect(), 1);
    let bytes = B::int_reshape(bytes, Shape::new([4 * count]));
    let bytes = B::int_reshape(B::int_slice(bytes, &slice(&[0..size])), Shape::new([blocks, block]));
    let part = |from: usize, to: usize| B::int_slice(bytes.clone(), &slice(&[0..blocks, from..to]));
    let half = |at: usize| {
        let high = B::bitwise_left_shift_scalar(part(at + 1, at + 2), 8i64.into());
        B::bitwise_or(part(at, at + 1), high)
    };
    // Two's complement: (b ^ 128) - 128.
    let signed = |tensor: IntTensor<B>| {
        B::float_sub_scalar(float(B::bitwise_xor_scalar(tensor, 128i64.into())), 128f32.into())
    };
    let values = match format {
        DenseFormat::F32 => unreachable!("returned above"),
        DenseFormat::F16 => from_bits::<B>(half(0), 5, 10),
        DenseFormat::BF16 => from_bits::<B>(half(0), 8, 7),
        DenseFormat::Q8_0 => B::float_mul(signed(part(2, 34)), from_bits::<B>(half(0), 5, 10)),
        DenseFormat::Q4_0 => {
            let nibbles = B::int_cat(vec![bits(part(2, 18), 0, 4), bits(part(2, 18), 4, 4)], 1);
            B::float_mul(B::float_sub_scalar(float(nibbles), 8f32.into()), from_bits::<B>(half(0), 5, 10))
        }
        DenseFormat::Q6_K => {
            // ql [0, 128), qh [128, 192), scales [192, 208), d [208, 210); two halves of 128 weights.
            let quarters = (0..2).flat_map(|h| (0..4).map(move |q| (h, q))).map(|(h, q)| {
                let low = part(64 * h + 32 * (q % 2), 64 * h + 32 * (q % 2) + 32);
                let low = bits(low, 4 * (q as i64 / 2), 4);
                let high = bits(part(128 + 32 * h, 160 + 32 * h), 2 * q as i64, 2);
                B::bitwise_or(low, B::bitwise_left_shift_scalar(high, 4i64.into()))
            });
            let q = B::float_sub_scalar(float(B::int_cat(quarters.collect(), 1)), 32f32.into());
            let scales = B::float_mul(signed(part(192, 208)), from_bits::<B>(half(208), 5, 10));
            B::float_mul(
                B::float_reshape(q, Shape::new([blocks, 16, 16])),
                B::float_reshape(scales, Shape::new([blocks, 16, 1])),
            )
        }
    };
    B::float_reshape(values, whole)
}

/// IEEE-like floats (finite) from their bits: sign, `exponent` bits, `mantissa` bits.
fn from_bits<B: Backend>(bits: IntTensor<B>, exponent: u32, mantissa: u32) -> FloatTensor<B> {
    let shape = bits.shape();
    let device = bits.device();
    let count = shape.num_elements();
    let field = |shift: u32, width: u32| {
        let shifted = B::bitwise_right_shift_scalar(bits.clone(), i64::from(shift).into());
        let field = B::bitwise_and_scalar(shifted, ((1i64 << width) - 1).into());
        B::int_reshape(field, Shape::new([count]))
    };
    let table = |values: Vec<f32>, index: IntTensor<B>| {
        let length = values.len();
        let table = B::float_from_data(TensorData::new(values, [length]), &device);
        B::float_select(table, 0, B::int_cast(index, IntDType::I32))
    };
    let e = field(mantissa, exponent);
    let bias = (1i32 << (exponent - 1)) - 1;
    let exponents = 0..1i32 << exponent;
    // Powers down to 2^-149 in two factors, each a normal number.
    let power = |e: i32| e.max(1) - bias;
    let first = table(exponents.clone().map(|e| 2f32.powi(power(e) / 2)).collect(), e.clone());
    let second = table(exponents.clone().map(|e| 2f32.powi(power(e) - power(e) / 2)).collect(), e.clone());
    let implicit = table(exponents.map(|e| f32::from(e > 0)).collect(), e);
    let fraction = B::float_mul_scalar(
        B::int_into_float(field(0, mantissa), FloatDType::F32),
        2f32.powi(-(mantissa as i32)).into(),
    );
    let sign = table(vec![1.0, -1.0], field(mantissa + exponent, 1));
    let magnitude = B::float_mul(B::float_mul(B::float_add(implicit, fraction), first), second);
    B::float_reshape(B::float_mul(magnitude, sign), shape)
}

/// The packed linear layer against the fast bodies. (The other operations are compared in the tests
/// package, where a device with autodiff has default bodies for them.)
#[cfg(all(test, any(feature = "flex", feature = "ndarray")))]
mod tests {
    use bitnet_burn_formats::dense_tiles::tile;
    use bitnet_burn_formats::quant;
    use burn::backend::tensor::FloatTensor;
    use burn::backend::{Autodiff, AutodiffBackend};
    use burn::tensor::TensorData;

    use super::*;
    use crate::extension::{Matrix, TernaryBackend};

    /// Small pseudo-random numbers in 0..n.
    fn numbers(seed: u32, count: usize, n: u32) -> impl Iterator<Item = u32> {
        let mut state = seed.wrapping_mul(2_654_435_761) | 1;
        (0..count).map(move |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) % n
        })
    }

    fn floats<B: Backend>(values: Vec<f32>, shape: &[usize]) -> FloatTensor<B> {
        B::float_from_data(TensorData::new(values, shape.to_vec()), &Default::default())
    }

    fn values<B: Backend>(tensor: FloatTensor<B>) -> Vec<f32> {
        let data = ready(B::float_into_data(tensor));
        data.try_to_vec().expect("f32")
    }

    /// What a future gives, which is there already.
    fn ready<T, E: std::fmt::Debug>(future: impl Future<Output = Result<T, E>>) -> T {
        let mut future = std::pin::pin!(future);
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match future.as_mut().poll(&mut context) {
            std::task::Poll::Ready(result) => result.expect("host memory"),
            std::task::Poll::Pending => unreachable!("host memory answers at once"),
        }
    }

    /// Weights of one to three matrices: as the operations take them, and -1, 0, 1 with the scales.
    type Weights<B> = (TernaryWeights<B>, Vec<(Vec<i8>, f32)>);

    fn weights<B: Backend>(ns: &[usize], k: usize) -> Weights<B> {
        let plain: Vec<(Vec<i8>, f32)> = ns
            .iter()
            .map(|&n| (numbers(n as u32, n * k, 3).map(|c| c as i8 - 1).collect(), 0.03 + n as f32 / 100.0))
            .collect();
        let mut matrices = plain.iter().map(|(codes, scale)| {
            let words: Vec<u32> = codes
                .chunks_exact(k)
                .flat_map(|row| {
                    let mut bytes = vec![0; bitnet_burn_plugin::canonical::row_bytes(k)];
                    bitnet_burn_plugin::canonical::pack_row(row, &mut bytes);
                    bytes
                        .chunks_exact(4)
                        .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                        .collect::<Vec<_>>()
                })
                .collect();
            let shape = [codes.len() / k, k.div_ceil(128) * 8];
            let codes = B::int_from_data(TensorData::new(words, shape), &Default::default());
            TernaryWeight { codes, scale: floats::<B>(vec![*scale], &[1]) }
        });
        let weights = match (matrices.next(), matrices.next(), matrices.next()) {
            (Some(a), Some(b), Some(c)) => TernaryWeights::Three(a, b, c),
            (Some(a), Some(b), None) => TernaryWeights::Two(a, b),
            (Some(a), _, _) => TernaryWeights::One(a),
            _ => panic!("one to three matrices"),
        };
        (weights, plain)
    }

    fn close(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
        assert_eq!(got.len(), want.len(), "{what}");
        let largest = want.iter().fold(0f32, |a, v| a.max(v.abs()));
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            assert!((got - want).abs() <= tolerance * largest, "{what}, value {i}: {got:e} and {want:e}");
        }
    }

    fn bit_linear_is_the_same<B: TernaryBackend>() {
        for (m, ns, k) in [(1, &[5][..], 128), (3, &[7, 7], 784), (9, &[16, 3, 5], 100), (2, &[64], 513)] {
            let what = format!("[{m}, {k}] x {ns:?}");
            let total: usize = ns.iter().sum();
            let x: Vec<f32> = numbers(m as u32, m * k, 2001).map(|v| v as f32 / 1000.0 - 1.0).collect();
            let norm: Vec<f32> = (0..k).map(|i| 0.5 + (i % 7) as f32 / 7.0).collect();
            let args = |quantise| BitLinearArgs {
                k,
                matrices: ns.iter().map(|&n| Matrix { n, choice: None }).collect(),
                eps: 1e-5,
                quantise,
            };
            let (weights, plain) = weights::<B>(ns, k);
            let again = || match &weights {
                TernaryWeights::One(a) => TernaryWeights::One(copy(a)),
                TernaryWeights::Two(a, b) => TernaryWeights::Two(copy(a), copy(b)),
                TernaryWeights::Three(a, b, c) => TernaryWeights::Three(copy(a), copy(b), copy(c)),
            };
            fn copy<B: Backend>(w: &TernaryWeight<B>) -> TernaryWeight<B> {
                TernaryWeight { codes: w.codes.clone(), scale: w.scale.clone() }
            }
            let input = || floats::<B>(x.clone(), &[m, k]);
            for quantise in [true, false] {
                for with_norm in [false, true] {
                    let norm = || match with_norm {
                        true => InputNorm::Rms(floats::<B>(norm.clone(), &[k])),
                        false => InputNorm::None,
                    };
                    let fast = values::<B>(B::bit_linear(input(), norm(), again(), args(quantise)));
                    let plain = values::<B>(bit_linear::<B>(input(), norm(), again(), &args(quantise)));
                    // Nothing but the last bits of the scales and, with the norm, of the input.
                    close(&fast, &plain, 1e-6, &format!("{what} quantise {quantise} norm {with_norm}"));
                }
            }
            // The sums are exact: with a row scale of one and weights' scales of one they are integers.
            let whole: Vec<f32> = numbers(7, m * k, 255).map(|v| v as f32 - 127.0).collect();
            let whole: Vec<f32> =
                whole.chunks_exact(k).flat_map(|row| [&[127.0], &row[1..]].concat()).collect();
            let ones = |w: TernaryWeights<B>| {
                let mut w = w
                    .into_vec()
                    .into_iter()
                    .map(|w| TernaryWeight { scale: floats::<B>(vec![1.0], &[1]), ..w });
                match (w.next(), w.next(), w.next()) {
                    (Some(a), Some(b), Some(c)) => TernaryWeights::Three(a, b, c),
                    (Some(a), Some(b), None) => TernaryWeights::Two(a, b),
                    (Some(a), _, _) => TernaryWeights::One(a),
                    _ => panic!("one to three matrices"),
                }
            };
            let mut sums = vec![0f32; m * total];
            for (row, out) in whole.chunks_exact(k).zip(sums.chunks_exact_mut(total)) {
                let mut q = vec![0; k];
                assert_eq!(quant::absmax_row(row, &mut q).0, 1.0);
                let all = plain.iter().flat_map(|(codes, _)| codes.chunks_exact(k));
                for (out, codes) in out.iter_mut().zip(all) {
                    *out =
                        codes.iter().zip(&q).map(|(&c, &q)| i32::from(c) * i32::from(q)).sum::<i32>() as f32;
                }
            }
            let x = || floats::<B>(whole.clone(), &[m, k]);
            let fast = values::<B>(B::bit_linear(x(), InputNorm::None, ones(again()), args(true)));
            let default = values::<B>(bit_linear::<B>(x(), InputNorm::None, ones(again()), &args(true)));
            assert_eq!((&fast, &default), (&sums, &sums), "{what}");

            let dy: Vec<f32> = numbers(11, m * total, 2001).map(|v| v as f32 / 1000.0 - 1.0).collect();
            let dy = || floats::<B>(dy.clone(), &[m, total]);
            let fast = values::<B>(B::bit_linear_backward(dy(), again(), args(true)));
            let default = values::<B>(bit_linear_backward::<B>(dy(), again(), &args(true)));
            close(&fast, &default, 1e-6, &format!("{what} backward"));
        }
    }

    fn random(seed: u32, count: usize) -> Vec<f32> {
        numbers(seed, count, 4001).map(|v| v as f32 / 1000.0 - 2.0).collect()
    }

    /// The gradients of sum(f(inputs) * dy) for the inputs, by Burn's own differentiation.
    fn differentiated<A: AutodiffBackend>(
        inputs: &[(Vec<f32>, Vec<usize>)],
        dy: &[f32],
        f: impl Fn(Vec<FloatTensor<A>>) -> FloatTensor<A>,
    ) -> Vec<Vec<f32>> {
        let inputs: Vec<FloatTensor<A>> = inputs
            .iter()
            .map(|(values, shape)| A::float_set_require_grad(floats::<A>(values.clone(), shape), true))
            .collect();
        let y = f(inputs.clone());
        let dy = floats::<A>(dy.to_vec(), &dims(&y));
        let grads = A::backward(A::float_sum(A::float_mul(y, dy)));
        inputs.iter().map(|x| values::<A::InnerBackend>(A::grad(x, &grads).expect("a gradient"))).collect()
    }

    /// What training adds: each fast body and each gradient against the default forward body, which Burn
    /// differentiates.
    fn training_is_the_same<B: TernaryBackend>() {
        for (m, k) in [(1, 1), (3, 17), (130, 96)] {
            let (x, w, dy) = (random(1, m * k), random(2, k), random(3, m * k));
            let shape = [m, k];
            let tensor = |v: &[f32]| floats::<B>(v.to_vec(), &shape);
            let weight = || floats::<B>(w.clone(), &[k]);
            let plain = rms_norm::<B>(tensor(&x), weight(), 1e-3);
            close(
                &values::<B>(B::rms_norm(tensor(&x), weight(), 1e-3)),
                &values::<B>(plain),
                1e-6,
                "rms_norm",
            );
            let inputs = [(x.clone(), shape.to_vec()), (w.clone(), vec![k])];
            let want = differentiated::<Autodiff<B>>(&inputs, &dy, |mut v| {
                let w = v.remove(1);
                rms_norm::<Autodiff<B>>(v.remove(0), w, 1e-3)
            });
            let whole = differentiated::<Autodiff<B>>(&inputs, &dy, |mut v| {
                let w = v.remove(1);
                Autodiff::<B>::rms_norm(v.remove(0), w, 1e-3)
            });
            for (name, dx) in [
                ("fast", B::rms_norm_backward(tensor(&x), weight(), tensor(&dy), 1e-3)),
                ("default", rms_norm_backward::<B>(tensor(&x), weight(), tensor(&dy), 1e-3)),
                ("autodiff", floats::<B>(whole[0].clone(), &shape)),
            ] {
                close(&values::<B>(dx), &want[0], 1e-5, &format!("rms_norm dx {name}"));
            }
            for (name, dw) in [
                ("fast", B::rms_norm_backward_weight(tensor(&x), tensor(&dy), 1e-3)),
                ("default", rms_norm_backward_weight::<B>(tensor(&x), tensor(&dy), 1e-3)),
                ("autodiff", floats::<B>(whole[1].clone(), &[k])),
            ] {
                close(&values::<B>(dw), &want[1], 1e-5, &format!("rms_norm dw {name}"));
            }
        }
        for (m, f) in [(1, 3), (130, 40)] {
            let (x, dy) = (random(4, m * 2 * f), random(5, m * f));
            let tensor = || floats::<B>(x.clone(), &[m, 2 * f]);
            let d = || floats::<B>(dy.clone(), &[m, f]);
            for activation in [GatedActivation::Relu2, GatedActivation::Silu] {
                let plain = values::<B>(gated::<B>(tensor(), activation));
                close(&values::<B>(B::gated(tensor(), activation)), &plain, 1e-6, "gated");
                let inputs = [(x.clone(), vec![m, 2 * f])];
                let want = differentiated::<Autodiff<B>>(&inputs, &dy, |mut v| {
                    gated::<Autodiff<B>>(v.remove(0), activation)
                });
                let whole = differentiated::<Autodiff<B>>(&inputs, &dy, |mut v| {
                    Autodiff::<B>::gated(v.remove(0), activation)
                });
                for (name, dx) in [
                    ("fast", values::<B>(B::gated_backward(tensor(), d(), activation))),
                    ("default", values::<B>(gated_backward::<B>(tensor(), d(), activation))),
                    ("autodiff", whole[0].clone()),
                ] {
                    close(&dx, &want[0], 1e-5, &format!("{activation:?} {name}"));
                }
            }
        }
        for (m, n) in [(1, 2), (130, 75)] {
            let (x, d) = (random(6, m * n), random(7, m));
            let ids: Vec<i32> = numbers(8, m, n as u32).map(|v| v as i32).collect();
            let targets = || B::int_from_data(TensorData::new(ids.clone(), [m]), &Default::default());
            let logits = || floats::<B>(x.clone(), &[m, n]);
            let fast = values::<B>(B::cross_entropy(logits(), targets()));
            close(&fast, &values::<B>(cross_entropy::<B>(logits(), targets())), 1e-6, "cross_entropy");
            for (row, (&got, &target)) in fast.iter().zip(&ids).enumerate() {
                let row = &x[row * n..][..n];
                let total: f64 = row.iter().map(|&v| f64::from(v).exp()).sum();
                let want = total.ln() - f64::from(row[target as usize]);
                assert!((f64::from(got) - want).abs() < 1e-5 * want.max(1.0), "{got} {want}");
            }
            let inputs = [(x.clone(), vec![m, n])];
            let want = differentiated::<Autodiff<B>>(&inputs, &d, |mut v| {
                cross_entropy::<Autodiff<B>>(v.remove(0), targets())
            });
            let whole = differentiated::<Autodiff<B>>(&inputs, &d, |mut v| {
                Autodiff::<B>::cross_entropy(v.remove(0), targets())
            });
            let d = || floats::<B>(d.clone(), &[m]);
            for (name, dx) in [
                ("fast", values::<B>(B::cross_entropy_backward(logits(), targets(), d()))),
                ("default", values::<B>(cross_entropy_backward::<B>(logits(), targets(), d()))),
                ("autodiff", whole[0].clone()),
            ] {
                close(&dx, &want[0], 1e-5, &format!("cross_entropy {name}"));
            }
        }
        for (sequences, length, n_heads, n_kv_heads, head_dim) in
            [(1, 1, 1, 1, 2), (2, 5, 2, 1, 8), (3, 70, 6, 2, 16), (1, 129, 2, 2, 4)]
        {
            let args = SelfAttentionArgs { n_heads, n_kv_heads, head_dim, length };
            let (m, width) = (sequences * length, (n_heads + 2 * n_kv_heads) * head_dim);
            let (x, dy) = (random(9, m * width), random(10, m * n_heads * head_dim));
            let angles: Vec<f32> = (0..length * head_dim / 2)
                .map(|i| (i % (head_dim / 2) + 1) as f32 * 0.1 * i as f32)
                .collect();
            let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
            let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
            let shape = [length, head_dim / 2];
            let of = |v: &[f32]| floats::<B>(v.to_vec(), &shape);
            let lifted = |v: &[f32]| floats::<Autodiff<B>>(v.to_vec(), &shape);
            let qkv = || floats::<B>(x.clone(), &[m, width]);
            let d = || floats::<B>(dy.clone(), &[m, n_heads * head_dim]);
            let plain = values::<B>(self_attention::<B>(qkv(), of(&cos), of(&sin), &args));
            let fast = values::<B>(B::self_attention(qkv(), of(&cos), of(&sin), args));
            close(&fast, &plain, 2e-6, &format!("{args:?}"));
            let inputs = [(x.clone(), vec![m, width])];
            let want = differentiated::<Autodiff<B>>(&inputs, &dy, |mut v| {
                self_attention::<Autodiff<B>>(v.remove(0), lifted(&cos), lifted(&sin), &args)
            });
            let whole = differentiated::<Autodiff<B>>(&inputs, &dy, |mut v| {
                Autodiff::<B>::self_attention(v.remove(0), lifted(&cos), lifted(&sin), args)
            });
            for (name, dx) in [
                ("fast", values::<B>(B::self_attention_backward(qkv(), of(&cos), of(&sin), d(), args))),
                ("default", values::<B>(self_attention_backward::<B>(qkv(), of(&cos), of(&sin), d(), &args))),
                ("autodiff", whole[0].clone()),
            ] {
                close(&dx, &want[0], 1e-5, &format!("{args:?} {name}"));
            }
        }
        for (m, k) in [(1, 1), (3, 40), (70, 33)] {
            let x = || floats::<B>(random(11, m * k), &[m, k]);
            let want = values::<B>(fake_quantise::<B>(x()));
            close(&values::<B>(B::fake_quantise(x())), &want, 1e-6, "fake_quantise");
            let scale = quant::absmean_scale(&random(11, m * k));
            let got = values::<B>(B::ternarise(x()));
            assert_eq!(got, quant::absmean_values(&random(11, m * k), scale));
            close(&got, &values::<B>(ternarise::<B>(x())), 1e-6, "ternarise");
        }
    }

    fn int8_activations_are_the_same<B: TernaryBackend>() {
        for format in DenseArgs::INT8_FORMATS {
            for (n, blocks, m) in [(5, 1, 1), (19, 3, 2), (33, 8, 5)] {
                let k = blocks * format.block_len();
                let row_bytes = format.row_bytes(k).expect("whole blocks");
                let small = |v: u32| v as f32 / 1000.0 - 1.0;
                let weights: Vec<f32> = numbers(5, n * k, 2001).map(small).collect();
                let mut bytes = vec![0; (n * row_bytes).next_multiple_of(4)];
                let mut decoded = vec![0.0; n * k];
                let rows = weights.chunks_exact(k).zip(bytes.chunks_exact_mut(row_bytes));
                for ((values, row), decoded) in rows.zip(decoded.chunks_exact_mut(k)) {
                    format.encode_row(values, row).expect("small values");
                    format.decode_row(row, decoded).expect("a whole row");
                }
                let args = DenseArgs::new(format, n, k).with_int8().expect("one of the formats that can");
                let tiled = DenseArgs { tiled: true, ..args };
                let mut tiles = vec![0; tiled.bytes().expect("whole blocks").next_multiple_of(4)];
                let (rows, out) =
                    (&bytes[..n * row_bytes], &mut tiles[..tiled.bytes().expect("whole blocks")]);
                tile((format, rows), (n, k), (format, out)).expect("whole blocks");
                let words = |bytes: &[u8]| {
                    let words: Vec<u32> =
                        bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
                    let count = words.len();
                    B::int_from_data(TensorData::new(words, [1, count]), &Default::default())
                };
                let x: Vec<f32> = numbers(m as u32, m * k, 2001).map(small).collect();
                let input = || floats::<B>(x.clone(), &[m, k]);
                let results = [
                    values::<B>(B::dense_linear(input(), words(&tiles), tiled)),
                    values::<B>(B::dense_linear(input(), words(&bytes), args)),
                    values::<B>(dense_linear::<B>(input(), words(&tiles), &tiled)),
                    values::<B>(dense_linear::<B>(input(), words(&bytes), &args)),
                ];
                assert_eq!(results[1..], [&results[1]; 3].map(Vec::clone), "tiles are the same weights");
                for (row, x) in x.chunks_exact(k).enumerate() {
                    let mut q = vec![0; k];
                    let (scale, _) = quant::absmax_row(x, &mut q);
                    for (column, w) in decoded.chunks_exact(k).enumerate() {
                        let terms = || {
                            w.iter().zip(&q).map(|(&w, &q)| f64::from(w) * f64::from(q) * f64::from(scale))
                        };
                        let (want, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                        for got in results.iter().map(|y| y[row * n + column]) {
                            let error = (f64::from(got) - want).abs();
                            assert!(
                                error <= 1e-5 * size,
                                "{}, [{m}, {k}] x {n}: {got} and {want}",
                                format.name()
                            );
                        }
                    }
                }
            }
        }
    }

    /// 62.5 steps are 62 (half to even), and 127 * (1 / a) instead of 127 / a would miss such ties.
    fn ties_are_rounded_to_even<B: TernaryBackend>() {
        for a in [127.0f32, 3.0, 0.7, 1.1, 41.0] {
            let x: Vec<f32> = (0..64).map(|i| a * (i as f32 + 0.5) / 127.0).chain([-a]).collect();
            let mut q = vec![0i8; 65];
            let (scale, _) = quant::absmax_row(&x, &mut q);
            let (codes, one) = (vec![1i8; 65], 1.0);
            let mut bytes = vec![0; bitnet_burn_plugin::canonical::row_bytes(65)];
            bitnet_burn_plugin::canonical::pack_row(&codes, &mut bytes);
            let words: Vec<u32> =
                bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
            let codes = B::int_from_data(TensorData::new(words, [1, 8]), &Default::default());
            let weights = TernaryWeights::One(TernaryWeight { codes, scale: floats::<B>(vec![one], &[1]) });
            let args = BitLinearArgs {
                k: 65,
                matrices: vec![Matrix { n: 1, choice: None }],
                eps: 0.0,
                quantise: true,
            };
            let got =
                values::<B>(bit_linear::<B>(floats::<B>(x, &[1, 65]), InputNorm::None, weights, &args))[0];
            let want = q.iter().map(|&q| i32::from(q)).sum::<i32>() as f32 * scale;
            assert!((got - want).abs() <= want.abs() * 1e-6, "a = {a}: {got} and {want}");
        }
    }

    #[cfg(feature = "flex")]
    #[test]
    fn flex() {
        bit_linear_is_the_same::<burn::backend::Flex>();
        int8_activations_are_the_same::<burn::backend::Flex>();
        ties_are_rounded_to_even::<burn::backend::Flex>();
        training_is_the_same::<burn::backend::Flex>();
    }

    #[cfg(feature = "ndarray")]
    #[test]
    fn ndarray() {
        bit_linear_is_the_same::<burn::backend::NdArray>();
        int8_activations_are_the_same::<burn::backend::NdArray>();
        ties_are_rounded_to_even::<burn::backend::NdArray>();
        training_is_the_same::<burn::backend::NdArray>();
    }
}
