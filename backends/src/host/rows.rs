//! What is computed row by row: the norm, the Hadamard transform, and the gate of the feed-forward network.

use bitnet_burn_cpu::{gated, hadamard, quantise};
use burn::backend::tensor::FloatTensor;
use burn::tensor::Shape;

use super::{HostBackend, dims, masked, threads};
use crate::extension::GatedActivation;

pub(crate) fn rms_norm<B: HostBackend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    eps: f32,
) -> FloatTensor<B> {
    masked();
    let [m, k] = dims(&x);
    let mut y = vec![0f32; m * k];
    quantise::rms_norm_rows(&B::floats(&x), &B::floats(&weight), eps, k, &mut y);
    B::tensor(y, Shape::new([m, k]))
}

pub(crate) fn hadamard<B: HostBackend>(
    x: FloatTensor<B>,
    signs: FloatTensor<B>,
    block: usize,
    inverse: bool,
) -> FloatTensor<B> {
    let [m, k] = dims(&x);
    let mut y = B::floats(&x).into_owned();
    hadamard::transform_rows(&mut y, &B::floats(&signs), block, inverse, &threads());
    B::tensor(y, Shape::new([m, k]))
}

pub(crate) fn gated<B: HostBackend>(gate_up: FloatTensor<B>, activation: GatedActivation) -> FloatTensor<B> {
    let [m, width] = dims(&gate_up);
    let f = width / 2;
    let mut out = vec![0f32; m * f];
    let values = B::floats(&gate_up);
    match activation {
        GatedActivation::Relu2 => gated::relu2_mul(&values, f, &mut out, &threads()),
        GatedActivation::Silu => gated::silu_mul(&values, f, &mut out, &threads()),
        GatedActivation::Sigmoid => gated::sigmoid_mul(&values, f, &mut out, &threads()),
        GatedActivation::Gelu => gated::gelu_mul(&values, f, &mut out, &threads()),
        GatedActivation::GeluTanh => gated::gelu_tanh_mul(&values, f, &mut out, &threads()),
    }
    B::tensor(out, Shape::new([m, f]))
}
