//! Gated DeltaNet, a row at a time.

use burn::backend::Backend;
use burn::backend::tensor::FloatTensor;
use burn::tensor::Shape;

use super::{dims, rms_norm, sigmoid, slice};
use crate::extension::{DeltaNetArgs, DeltaNetOutput, DeltaNetShape, DeltaNetTensors, DeltaNetWeights};

/// Added to the sum of squares of a query or key.
const EPSILON: f32 = 1e-6;

pub(crate) fn delta_net<B: Backend>(
    rows: FloatTensor<B>,
    weights: DeltaNetWeights<B>,
    state: DeltaNetTensors<B>,
    args: &DeltaNetArgs,
) -> DeltaNetOutput<B> {
    let DeltaNetShape { key_heads, value_heads, key_dim, value_dim, taps, .. } = args.shape;
    let (m, channels, values) = (dims(&rows)[0], args.shape.channels(), args.shape.values());
    let columns = |from: usize, to: usize| B::float_slice(rows.clone(), &slice(&[0..m, from..to]));
    let heads = |x: FloatTensor<B>, dim: usize| B::float_reshape(x, Shape::new([m, value_heads, dim]));

    // The convolution sees the rows of the state, and behind them these.
    let inputs = B::float_cat(vec![state.inputs, columns(0, channels)], 0);
    let tap = |j: usize| {
        let input = B::float_slice(inputs.clone(), &slice(&[j..j + m, 0..channels]));
        B::float_mul(input, B::float_slice(weights.convolution.clone(), &slice(&[j..j + 1, 0..channels])))
    };
    let u = silu::<B>((1..taps).fold(tap(0), |sum, j| B::float_add(sum, tap(j))));
    let part = |from: usize, to: usize| B::float_slice(u.clone(), &slice(&[0..m, from..to]));
    let keys = key_heads * key_dim;
    let q =
        B::float_div_scalar(of_value_heads::<B>(part(0, keys), &args.shape), (key_dim as f32).sqrt().into());
    let k = of_value_heads::<B>(part(keys, 2 * keys), &args.shape);
    let v = heads(part(2 * keys, channels), value_dim);

    let bias = B::float_reshape(weights.time_bias, Shape::new([1, value_heads]));
    let rate = B::float_reshape(weights.decay, Shape::new([1, value_heads]));
    let logits = channels + values;
    let a = softplus::<B>(B::float_add(columns(logits, logits + value_heads), bias));
    let decay = B::float_exp(B::float_mul(a, rate));
    let strength = sigmoid::<B>(columns(logits + value_heads, logits + 2 * value_heads));

    let (mut memory, mut contexts) = (state.memory, Vec::with_capacity(m));
    for row in 0..m {
        let of = |x: &FloatTensor<B>, shape: [usize; 3]| {
            let ranges: Vec<_> =
                std::iter::once(row..row + 1).chain(dims(x)[1..].iter().map(|&d| 0..d)).collect();
            B::float_reshape(B::float_slice(x.clone(), &slice(&ranges)), Shape::new(shape))
        };
        let (across, down) = ([value_heads, 1, key_dim], [value_heads, key_dim, 1]);
        memory = B::float_mul(memory, of(&decay, [value_heads, 1, 1]));
        let known = B::float_matmul(of(&k, across), memory.clone());
        let learned = B::float_sub(of(&v, [value_heads, 1, value_dim]), known);
        let learned = B::float_mul(learned, of(&strength, [value_heads, 1, 1]));
        memory = B::float_add(memory, B::float_mul(of(&k, down), learned));
        contexts.push(B::float_reshape(
            B::float_matmul(of(&q, across), memory.clone()),
            Shape::new([value_heads, value_dim]),
        ));
    }
    let context = rms_norm::<B>(B::float_cat(contexts, 0), weights.norm, args.eps);
    let context = B::float_reshape(context, Shape::new([m, values]));
    let context = B::float_mul(context, silu::<B>(columns(channels, channels + values)));
    let last = B::float_slice(inputs, &slice(&[m..m + taps - 1, 0..channels]));
    DeltaNetOutput { context, state: DeltaNetTensors { inputs: last, memory } }
}

/// Queries or keys [M, key_heads * key_dim], divided by their lengths, as each value head sees them
/// [M, value_heads, key_dim].
fn of_value_heads<B: Backend>(x: FloatTensor<B>, shape: &DeltaNetShape) -> FloatTensor<B> {
    let DeltaNetShape { key_heads, value_heads, key_dim, tiled, .. } = *shape;
    let (m, each) = (dims(&x)[0], value_heads / key_heads);
    let x = B::float_reshape(x, Shape::new([m, key_heads, key_dim]));
    let squares = B::float_sum_dim(B::float_mul(x.clone(), x.clone()), 2);
    let x = B::float_div(x, B::float_sqrt(B::float_add_scalar(squares, EPSILON.into())));
    let (apart, expanded) = match tiled {
        true => ([m, 1, key_heads, key_dim], [m, each, key_heads, key_dim]),
        false => ([m, key_heads, 1, key_dim], [m, key_heads, each, key_dim]),
    };
    let x = B::float_expand(B::float_reshape(x, Shape::new(apart)), Shape::new(expanded));
    B::float_reshape(x, Shape::new([m, value_heads, key_dim]))
}

fn silu<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    B::float_mul(x.clone(), sigmoid::<B>(x))
}

/// ln(1 + e^x), as max(x, 0) + ln(1 + e^-|x|).
fn softplus<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let small = B::float_log1p(B::float_exp(B::float_neg(B::float_abs(x.clone()))));
    B::float_add(B::float_clamp_min(x, 0f32.into()), small)
}
