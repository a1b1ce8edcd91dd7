//! The operations in plain Burn operations: what they mean, and how they run on a backend without
//! bodies of its own.

#![allow(clippy::single_range_in_vec_init, reason = "tensors of one dimension are sliced by one range")]

mod attention;
mod bit_linear;
mod delta_net;
mod dense;
mod hadamard;
#[cfg(all(test, any(feature = "flex", feature = "ndarray")))]
mod tests;
mod training;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{FloatDType, Shape, Slice};

pub(crate) use self::attention::{attention, cache_append, cached_attention, rope};
pub(crate) use self::bit_linear::{bit_linear, bit_linear_backward};
#[cfg(any(feature = "flex", feature = "ndarray"))]
pub(crate) use self::bit_linear::{columns_of, scales_by_rows};
pub(crate) use self::delta_net::delta_net;
#[cfg(feature = "cube")]
pub(crate) use self::dense::decoded_linear;
pub(crate) use self::dense::{dense_linear, dense_linear_backward, dense_rows};
pub(crate) use self::hadamard::hadamard;
pub(crate) use self::training::{
    cross_entropy, cross_entropy_backward, fake_quantise, gated_backward, rms_norm_backward,
    rms_norm_backward_weight, self_attention, self_attention_backward, ternarise,
};
use crate::extension::GatedActivation;

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

/// Rows quantised by absmax, as whole numbers, and their scales a / 127 [M, 1].
fn quantise<B: Backend>(x: FloatTensor<B>) -> (FloatTensor<B>, FloatTensor<B>) {
    let a = B::float_clamp_min(B::float_max_abs_dim(x.clone(), 1), EPSILON.into());
    // 127 / a, rounded once: 127 * (1 / a) would break exact ties.
    let steps = B::float_full(a.shape(), 127f32.into(), &a.device(), FloatDType::F32);
    let to_int8 = B::float_div(steps, a.clone());
    let q = B::float_round(B::float_mul(x, to_int8));
    (B::float_clamp(q, (-128f32).into(), 127f32.into()), B::float_div_scalar(a, 127f32.into()))
}

pub(crate) fn concat<B: Backend>(mut tensors: Vec<FloatTensor<B>>) -> FloatTensor<B> {
    if tensors.len() == 1 { tensors.remove(0) } else { B::float_cat(tensors, 1) }
}

/// 1 / (1 + e^-x).
fn sigmoid<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    B::float_recip(B::float_add_scalar(B::float_exp(B::float_neg(x)), 1f32.into()))
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
        GatedActivation::Sigmoid => sigmoid::<B>(gate),
        GatedActivation::Gelu => B::float_mul(normal::<B>(gate.clone()), gate),
        GatedActivation::GeluTanh => B::float_mul(sigmoid::<B>(tanh_argument::<B>(gate.clone())), gate),
    };
    B::float_mul(gate, up)
}

/// The normal distribution, (1 + erf(x / sqrt 2)) / 2.
fn normal<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let erf = B::float_erf(B::float_mul_scalar(x, std::f32::consts::FRAC_1_SQRT_2.into()));
    B::float_mul_scalar(B::float_add_scalar(erf, 1f32.into()), 0.5f32.into())
}

/// The cubic term of the GELU with tanh.
const GELU_CUBIC: f32 = 0.044_715;

/// 2 sqrt(2 / pi).
const GELU_FACTOR: f32 = 1.595_769;

/// 2 sqrt(2 / pi) * (x + 0.044715 x^3), whose sigmoid is (1 + tanh) / 2 of half of it. x counts as 10 at most, and as -10 at
/// least: the sigmoid is 0 or 1 there.
fn tanh_argument<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let x = B::float_clamp(x, (-10f32).into(), 10f32.into());
    let square = B::float_mul(x.clone(), x.clone());
    let inner = B::float_add_scalar(B::float_mul_scalar(square, GELU_CUBIC.into()), 1f32.into());
    B::float_mul_scalar(B::float_mul(x, inner), GELU_FACTOR.into())
}
