//! The ternary linear layer.

use burn::backend::Backend;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{FloatDType, Shape};

use super::{concat, dims, quantise, rms_norm, slice};
use crate::extension::{BitLinearArgs, InputNorm, TernaryWeight, WeightGroup};

pub(crate) fn bit_linear<B: Backend>(
    x: FloatTensor<B>,
    norm: InputNorm<B>,
    weights: WeightGroup<B>,
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

pub(crate) fn bit_linear_backward<B: Backend>(
    dy: FloatTensor<B>,
    weights: WeightGroup<B>,
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
    sum.expect("WeightGroup holds one to three matrices")
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
