//! The ternary linear layer.

use std::ops::Range;

use burn::backend::Backend;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{FloatDType, Shape};

use bitnet_burn_manager::ScaleKind;
use bitnet_burn_plugin::abi::SCALE_ROWS;
use bitnet_burn_plugin::sdk::{group_length, groups};

use super::{concat, dims, quantise, rms_norm, slice};
use crate::extension::{BitLinearArgs, InputNorm, Matrix, TernaryWeight, WeightGroup};

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
    if !args.quantise {
        let product =
            |(weight, matrix)| float_product::<B>(x.clone(), weight, matrix, args.k, B::float_transpose);
        return concat::<B>(weights.into_vec().into_iter().zip(&args.matrices).map(product).collect());
    }
    // Products of int8 and -1, 0, 1 are whole numbers, and so are their sums: exact in f32 below 2^24,
    // whatever the order of a backend's matmul.
    let group = args.activation_group();
    let x = columns(args.k, group).map(|part| quantise::<B>(columns_of::<B>(&x, part))).collect::<Vec<_>>();
    let output = |(weight, matrix): (TernaryWeight<B>, &Matrix)| {
        let codes = codes::<B>(weight.codes, matrix.n, args.k);
        let ScaleKind::Groups { weights, .. } = matrix.scales else {
            let [(q, a)] = &x[..] else { panic!("one scale for each row of activations") };
            let sums = B::float_matmul(q.clone(), B::float_transpose(codes));
            let scale = B::float_reshape(weight.scale, Shape::new([1, 1]));
            return B::float_mul(sums, B::float_mul(a.clone(), scale));
        };
        let scales = scales_by_rows::<B>(weight.scale, matrix.n);
        let mut parts = columns(args.k, group).zip(&x);
        let terms = columns(args.k, weights).enumerate().map(|(g, columns)| {
            let within = parts.by_ref().take(groups(columns.len(), group));
            let sums = within.map(|(part, (q, a))| {
                let codes = columns_of::<B>(&codes, part);
                B::float_mul(B::float_matmul(q.clone(), B::float_transpose(codes)), a.clone())
            });
            let scale = B::float_transpose(columns_of::<B>(&scales, g..g + 1));
            B::float_mul(sums.reduce(B::float_add).expect("a group has columns"), scale)
        });
        terms.reduce(B::float_add).expect("a row has groups")
    };
    concat::<B>(weights.into_vec().into_iter().zip(&args.matrices).map(output).collect())
}

/// The columns of each group of a row.
fn columns(k: usize, group: usize) -> impl Iterator<Item = Range<usize>> {
    let group = group_length(k, group);
    (0..k).step_by(group).map(move |from| from..k.min(from + group))
}

/// Columns of a matrix.
pub(crate) fn columns_of<B: Backend>(x: &FloatTensor<B>, columns: Range<usize>) -> FloatTensor<B> {
    let [rows, width] = dims(x)[..] else { panic!("a matrix") };
    if columns == (0..width) {
        return x.clone();
    }
    B::float_slice(x.clone(), &slice(&[0..rows, columns]))
}

/// Scales in blocks of 32 rows as [n, groups] in f32.
pub(crate) fn scales_by_rows<B: Backend>(scales: FloatTensor<B>, n: usize) -> FloatTensor<B> {
    let (count, blocks) = (dims(&scales)[0], n.div_ceil(SCALE_ROWS));
    let groups = count / (blocks * SCALE_ROWS);
    let scales = B::float_cast(scales, FloatDType::F32);
    let scales = B::float_reshape(scales, Shape::new([blocks, groups, SCALE_ROWS]));
    let scales = B::float_swap_dims(scales, 1, 2);
    let scales = B::float_reshape(scales, Shape::new([blocks * SCALE_ROWS, groups]));
    B::float_slice(scales, &slice(&[0..n, 0..groups]))
}

/// x times the weights [n, k], turned by `turn`.
fn float_product<B: Backend>(
    x: FloatTensor<B>,
    weight: TernaryWeight<B>,
    matrix: &Matrix,
    k: usize,
    turn: impl Fn(FloatTensor<B>) -> FloatTensor<B>,
) -> FloatTensor<B> {
    let (n, codes) = (matrix.n, codes::<B>(weight.codes, matrix.n, k));
    let ScaleKind::Groups { weights, .. } = matrix.scales else {
        let scale = B::float_reshape(weight.scale, Shape::new([1, 1]));
        return B::float_mul(B::float_matmul(x, turn(codes)), scale);
    };
    let scales = scales_by_rows::<B>(weight.scale, n);
    let (count, group) = (dims(&scales)[1], group_length(k, weights));
    let scales =
        B::float_expand(B::float_reshape(scales, Shape::new([n, count, 1])), Shape::new([n, count, group]));
    let scales = B::float_reshape(scales, Shape::new([n, count * group]));
    let weights = B::float_mul(codes, B::float_slice(scales, &slice(&[0..n, 0..k])));
    B::float_matmul(x, turn(weights))
}

pub(crate) fn bit_linear_backward<B: Backend>(
    dy: FloatTensor<B>,
    weights: WeightGroup<B>,
    args: &BitLinearArgs,
) -> FloatTensor<B> {
    let mut from = 0;
    let parts = weights.into_vec().into_iter().zip(&args.matrices).map(|(weight, matrix)| {
        let part = columns_of::<B>(&dy, from..from + matrix.n);
        from += matrix.n;
        float_product::<B>(part, weight, matrix, args.k, |weights| weights)
    });
    parts.reduce(B::float_add).expect("WeightGroup holds one to three matrices")
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
