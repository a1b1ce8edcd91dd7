//! What only training needs.

use bitnet_burn_formats::WeightScale;
use bitnet_burn_plugin::sdk::group_length;
use burn::backend::Backend;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{IndexingUpdateOp, Shape};

use super::attention::{causal_weights, rope};
use super::bit_linear::columns_of;
use super::{
    EPSILON, GELU_CUBIC, GELU_FACTOR, concat, dims, normal, quantise, sigmoid, slice, tanh_argument,
};
use crate::extension::{GatedActivation, SelfAttentionArgs};

pub(crate) fn fake_quantise<B: Backend>(x: FloatTensor<B>, group: usize) -> FloatTensor<B> {
    let [m, k] = dims(&x)[..] else { panic!("fake_quantise takes [M, K]") };
    let group = group_length(k, group).min(k);
    // The last group of a row may be shorter.
    let whole = k - k % group;
    let parts = [(0..whole, group), (whole..k, k - whole)].into_iter().filter(|(_, group)| *group > 0);
    let quantised = parts.map(|(columns, group)| {
        let (rows, width) = (m * (columns.len() / group), columns.len());
        let part = B::float_reshape(columns_of::<B>(&x, columns), Shape::new([rows, group]));
        let (q, scale) = quantise::<B>(part);
        B::float_reshape(B::float_mul(q, scale), Shape::new([m, width]))
    });
    concat::<B>(quantised.collect())
}

pub(crate) fn ternarise<B: Backend>(w: FloatTensor<B>, scale: WeightScale) -> FloatTensor<B> {
    let [n, k] = dims(&w)[..] else { panic!("ternarise takes [N, K]") };
    let run = scale.run(n, k);
    let mean = match scale {
        WeightScale::Tensor => B::float_reshape(B::float_mean(B::float_abs(w.clone())), Shape::new([1, 1])),
        WeightScale::Row | WeightScale::Group(_) => {
            let runs = B::float_reshape(w.clone(), Shape::new([n * k / run, run]));
            B::float_mean_dim(B::float_abs(runs), 1)
        }
    };
    let s = B::float_clamp_min(mean, EPSILON.into());
    let w = B::float_reshape(w, Shape::new([n * k / run, run]));
    let codes = B::float_round(B::float_mul(w, B::float_recip(s.clone())));
    let values = B::float_mul(B::float_clamp(codes, (-1f32).into(), 1f32.into()), s);
    B::float_reshape(values, Shape::new([n, k]))
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
    let SelfAttentionArgs { n_heads, n_kv_heads, head_dim: d, length, window } = *args;
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
    let (weights, sums) = causal_weights::<B>(scores, length, 0, window);
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
        GatedActivation::Sigmoid => {
            let sigmoid = sigmoid::<B>(gate);
            let rest = B::float_add_scalar(B::float_neg(sigmoid.clone()), 1f32.into());
            (sigmoid.clone(), B::float_mul(sigmoid, rest))
        }
        GatedActivation::Gelu => {
            // phi + x * density
            let phi = normal::<B>(gate.clone());
            let square = B::float_mul(gate.clone(), gate.clone());
            let density = B::float_exp(B::float_mul_scalar(square, (-0.5f32).into()));
            let density =
                B::float_mul_scalar(density, (std::f32::consts::FRAC_2_SQRT_PI / 8f32.sqrt()).into());
            let value = B::float_mul(gate.clone(), phi.clone());
            (value, B::float_add(phi, B::float_mul(gate, density)))
        }
        GatedActivation::GeluTanh => {
            // sigmoid + x * sigmoid * (1 - sigmoid) * the argument's slope
            let sigmoid = sigmoid::<B>(tanh_argument::<B>(gate.clone()));
            let rest = B::float_add_scalar(B::float_neg(sigmoid.clone()), 1f32.into());
            let square = B::float_mul(gate.clone(), gate.clone());
            let inner =
                B::float_add_scalar(B::float_mul_scalar(square, (3.0 * GELU_CUBIC).into()), 1f32.into());
            let inner = B::float_mul_scalar(inner, GELU_FACTOR.into());
            let value = B::float_mul(gate, sigmoid.clone());
            let slope = B::float_mul(B::float_mul(value.clone(), rest), inner);
            (value, B::float_add(sigmoid, slope))
        }
        GatedActivation::Silu => {
            let sigmoid = sigmoid::<B>(gate.clone());
            let value = B::float_mul(gate, sigmoid.clone());
            // sigmoid + value * (1 - sigmoid)
            let rest = B::float_add_scalar(B::float_neg(sigmoid.clone()), 1f32.into());
            (value.clone(), B::float_add(sigmoid, B::float_mul(value, rest)))
        }
    };
    let d_gate = B::float_mul(B::float_mul(dy.clone(), up), slope);
    B::float_cat(vec![d_gate, B::float_mul(dy, value)], 1)
}
