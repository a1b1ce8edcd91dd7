//! Rotary embedding, KV caches and attention over them, and linear attention.

use bitnet_burn_cpu::{attention, delta_net, rope};
use burn::backend::tensor::FloatTensor;
use burn::tensor::Shape;

use super::{HostBackend, dims, masked, threads};
use crate::extension::{
    AttentionArgs, CacheTensor, DeltaNetArgs, DeltaNetOutput, DeltaNetTensors, DeltaNetWeights,
};

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
    rope::rope(&rows.values, rows.stride, m, width / head_dim, head_dim, &cos, &sin, &mut y, width);
    B::tensor(y, Shape::new([m, width]))
}

fn cache_shape<B: HostBackend>(
    cache: &CacheTensor<B>,
    n_heads: usize,
    window: Option<usize>,
) -> attention::Shape {
    let shape = cache.shape();
    let [n_kv_heads, capacity, head_dim] = shape[..] else {
        panic!("a cache is [kv heads, capacity, head_dim], not {shape:?}")
    };
    let scale = 1.0 / (head_dim as f32).sqrt();
    attention::Shape { n_heads, n_kv_heads, head_dim, capacity, scale, window }
}

pub(crate) fn cache_append<B: HostBackend>(
    cache: CacheTensor<B>,
    rows: FloatTensor<B>,
    position: usize,
) -> CacheTensor<B> {
    // An int8 cache is quantised.
    masked();
    let shape = cache_shape(&cache, 0, None);
    let m = dims(&rows)[0];
    let rows = B::rows(&rows);
    B::update_cache(cache, |cache| {
        attention::append(cache, shape, position, m, &rows.values, rows.stride);
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
    attention::attention(
        &rows.values,
        rows.stride,
        m,
        B::cache(&keys),
        B::cache(&values),
        cache_shape(&keys, args.n_heads, args.window),
        args.position,
        &mut out,
        width,
        &threads(),
    );
    B::tensor(out, Shape::new([m, width]))
}

pub(crate) fn delta_net<B: HostBackend>(
    rows: FloatTensor<B>,
    weights: DeltaNetWeights<B>,
    state: DeltaNetTensors<B>,
    args: &DeltaNetArgs,
) -> DeltaNetOutput<B> {
    let [m, _] = dims(&rows);
    let &DeltaNetArgs { shape, eps } = args;
    let (convolution, norm) = (B::floats(&weights.convolution), B::floats(&weights.norm));
    let (decay, time_bias) = (B::floats(&weights.decay), B::floats(&weights.time_bias));
    let of = delta_net::Weights {
        convolution: &convolution,
        decay: &decay,
        time_bias: &time_bias,
        norm: &norm,
        eps,
    };
    let mut inputs = B::floats(&state.inputs).into_owned();
    let mut memory = B::floats(&state.memory).into_owned();
    let mut out = vec![0f32; m * shape.values()];
    let after = delta_net::State { inputs: &mut inputs, memory: &mut memory };
    delta_net::delta_net(shape, of, &B::floats(&rows), after, &mut out, &threads());
    let state = DeltaNetTensors {
        inputs: B::tensor(inputs, Shape::new([shape.taps - 1, shape.channels()])),
        memory: B::tensor(memory, Shape::new([shape.value_heads, shape.key_dim, shape.value_dim])),
    };
    DeltaNetOutput { context: B::tensor(out, Shape::new([m, shape.values()])), state }
}
