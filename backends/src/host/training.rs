//! What only training needs.

use bitnet_burn_cpu::training;
use bitnet_burn_formats::{WeightScale, quant};
use bitnet_burn_plugin::sdk::{group_length, groups};
use burn::backend::TensorMetadata;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::Shape;

use super::{HostBackend, dims, quantise, threads, with_activations};
use crate::extension::{GatedActivation, SelfAttentionArgs};

pub(crate) fn fake_quantise<B: HostBackend>(x: FloatTensor<B>, group: usize) -> FloatTensor<B> {
    let [m, k] = dims(&x);
    let mut y = vec![0f32; m * k];
    with_activations(|activations| {
        let out = activations.resize_groups(m, k, group);
        let stride = out.stride;
        quantise(&B::floats(&x), k, None, out);
        let (q, scales) = (activations.q(), activations.scale().chunks_exact(groups(k, group)));
        for (row, (y, scales)) in y.chunks_exact_mut(k).zip(scales).enumerate() {
            let parts =
                y.chunks_mut(group_length(k, group)).zip(q[row * stride..].chunks(group_length(k, group)));
            for ((y, q), scale) in parts.zip(scales) {
                y.iter_mut().zip(q).for_each(|(y, &q)| *y = f32::from(q) * scale);
            }
        }
    });
    B::tensor(y, Shape::new([m, k]))
}

pub(crate) fn ternarise<B: HostBackend>(w: FloatTensor<B>, scale: WeightScale) -> FloatTensor<B> {
    let [n, k] = dims(&w);
    B::tensor(quant::absmean_values(&B::floats(&w), scale.run(n, k)), Shape::new([n, k]))
}

fn attention_shape(args: &SelfAttentionArgs) -> training::Shape {
    let SelfAttentionArgs { n_heads, n_kv_heads, head_dim, length, window } = *args;
    training::Shape { n_heads, n_kv_heads, head_dim, length, window }
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
    training::self_attention(&qkv, &cos, &sin, attention_shape(args), &mut out, &threads());
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
    training::self_attention_backward(&qkv, &cos, &sin, &dy, attention_shape(args), &mut out, &threads());
    B::tensor(out, shape)
}

pub(crate) fn cross_entropy<B: HostBackend>(logits: FloatTensor<B>, targets: IntTensor<B>) -> FloatTensor<B> {
    let [m, n] = dims(&logits);
    let mut out = vec![0f32; m];
    training::cross_entropy(&B::floats(&logits), &B::indices(&targets), n, &mut out, &threads());
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
    training::cross_entropy_backward(&logits, &targets, &d, n, &mut out, &threads());
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
    training::rms_norm_backward(&x, &weight, &dy, eps, &mut dx, &threads());
    B::tensor(dx, shape)
}

pub(crate) fn rms_norm_backward_weight<B: HostBackend>(
    x: FloatTensor<B>,
    dy: FloatTensor<B>,
    eps: f32,
) -> FloatTensor<B> {
    let k = dims(&x)[1];
    let mut dw = vec![0f32; k];
    training::rms_norm_backward_weight(&B::floats(&x), &B::floats(&dy), eps, &mut dw, &threads());
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
            training::relu2_mul_backward(&values, &dy, f, &mut out, &threads());
        }
        GatedActivation::Silu => training::silu_mul_backward(&values, &dy, f, &mut out, &threads()),
        GatedActivation::Sigmoid => training::sigmoid_mul_backward(&values, &dy, f, &mut out, &threads()),
        GatedActivation::Gelu => training::gelu_mul_backward(&values, &dy, f, &mut out, &threads()),
        GatedActivation::GeluTanh => training::gelu_tanh_mul_backward(&values, &dy, f, &mut out, &threads()),
    }
    B::tensor(out, Shape::new([m, width]))
}
