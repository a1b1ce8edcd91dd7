//! The ternary matmul, as plainly as it can be written: what every kernel is compared with, and the
//! last resort where none works.
//!
//! ```text
//! y[m, n] = (f32)(sum_k q[m, k] * w[n, k]) * (scale * a[m])
//! ```
//!
//! with q the int8 activations, w the weights -1, 0, 1, `scale` the weights' scale and a the scale of
//! each row of activations: an exact i32 sum, then two f32 products in this order, not fused.
#![forbid(unsafe_code)]

use bitnet_burn_plugin::abi::SCALE_ROWS;
use bitnet_burn_plugin::canonical;
use bitnet_burn_plugin::sdk::{Scales, group_length, groups};

/// The largest K whose sums can't overflow: 128 * 2^23 < 2^31.
pub const MAX_K: usize = 1 << 23;

/// One output before scaling: the sum over k of `q[k] * w[k]`, for K = `q.len()` up to [`MAX_K`].
///
/// # Panics
/// If `row`, a canonical row, is shorter than K weights.
pub fn row_sum_products(row: &[u8], q: &[i8]) -> i32 {
    let weights = canonical::Row(row);
    (0..q.len()).map(|k| i32::from(q[k]) * i32::from(weights.weight(k))).sum()
}

/// y [m, n] of activations [m, k] and weights [n, k].
///
/// # Arguments
/// * `canonical`: the weights, n canonical rows without the code 3
///   ([`check_canonical`](crate::check_canonical))
/// * `k`: up to [`MAX_K`]
/// * `scale`: the weights' scale
/// * `q`: the int8 activations; row i begins at `i * q_stride`
/// * `row_scale`: a/127 of each row, m values
/// * `y`: the outputs; row i begins at `i * y_stride`. What lies between the rows is left alone
///
/// ```
/// use bitnet_burn_formats::{quant, reference};
///
/// let (weights, scale) = quant::absmean_to_canonical(&[0.5, 0.0, -1.0, 0.5], 2, 2)?;
/// let mut q = [0; 2];
/// let (a, _) = quant::absmax_row(&[127.0, -2.0], &mut q);
/// let mut y = [0.0; 2];
/// reference::matmul(&weights, 2, 2, scale, &q, 2, &[a], 1, &mut y, 2);
/// assert_eq!(y, [127.0 * 0.5, (-127.0 - 2.0) * 0.5]);
/// # Ok::<(), bitnet_burn_formats::FormatError>(())
/// ```
///
/// # Panics
/// If a slice is too short for the shape and the strides.
#[allow(clippy::too_many_arguments)] // the shape of the problem: three matrices
pub fn matmul(
    canonical: &[u8],
    n: usize,
    k: usize,
    scale: f32,
    q: &[i8],
    q_stride: usize,
    row_scale: &[f32],
    m: usize,
    y: &mut [f32],
    y_stride: usize,
) {
    let row_bytes = canonical::row_bytes(k);
    // All places are within the slices, so that none is computed beyond what a usize holds.
    let fits = |len: usize, rows: usize, stride: usize, width: usize| match rows.checked_sub(1) {
        None => true,
        Some(last) => {
            last.checked_mul(stride).and_then(|from| from.checked_add(width)).is_some_and(|end| end <= len)
        }
    };
    assert!(
        fits(canonical.len(), n, row_bytes, row_bytes),
        "weights [{n}, {k}] in {} bytes",
        canonical.len()
    );
    assert!(fits(q.len(), m, q_stride, k), "{m} rows of {k} activations, {q_stride} apart, in {}", q.len());
    assert!(fits(y.len(), m, y_stride, n), "{m} rows of {n} results, {y_stride} apart, in {}", y.len());
    let mut weights = vec![0i8; k];
    for n in 0..n {
        canonical::unpack_row(&canonical[n * row_bytes..][..row_bytes], &mut weights);
        for m in 0..m {
            let x = &q[m * q_stride..][..k];
            let sum: i32 = x.iter().zip(&weights).map(|(&q, &w)| i32::from(q) * i32::from(w)).sum();
            y[m * y_stride + n] = sum as f32 * (scale * row_scale[m]);
        }
    }
}

/// int8 activations with a scale for each group of a row's values.
#[derive(Clone, Copy, Debug)]
pub struct ScaledActivations<'a> {
    /// Rows.
    pub m: usize,
    /// The values; row i begins at `i * stride`.
    pub q: &'a [i8],
    /// Values from row to row.
    pub stride: usize,
    /// Values that share a scale; 0 for the whole row.
    pub group: usize,
    /// The scales, [m, groups].
    pub scale: &'a [f32],
}

/// y [m, n] of activations [m, k] and weights [n, k] with many scales, as
/// [`OPERATION_SCALED_TERNARY_MATMUL`](bitnet_burn_plugin::abi::OPERATION_SCALED_TERNARY_MATMUL) defines it.
///
/// # Arguments
/// * `canonical`: n canonical rows without the code 3
/// * `k`: up to [`MAX_K`]
/// * `y`: the outputs; row i begins at `i * y_stride`. What lies between the rows is left alone
///
/// # Panics
/// If a slice is too short for the shape and the strides, or a group of weights is not a whole number of groups of
/// activations.
pub fn scaled_matmul(
    canonical: &[u8],
    (n, k): (usize, usize),
    scales: Scales<'_>,
    x: ScaledActivations<'_>,
    y: &mut [f32],
    y_stride: usize,
) {
    for n in 0..n {
        let row = &canonical[n * canonical::row_bytes(k)..][..canonical::row_bytes(k)];
        for (m, value) in scaled_row(row, (n, k), scales, x).into_iter().enumerate() {
            y[m * y_stride + n] = value;
        }
    }
}

/// The m outputs of one row of [`scaled_matmul`].
///
/// # Arguments
/// * `row`: the canonical row `n` of `k` weights
/// * `scales`: those of the whole matrix
///
/// # Panics
/// As there.
pub fn scaled_row(
    row: &[u8],
    (n, k): (usize, usize),
    scales: Scales<'_>,
    x: ScaledActivations<'_>,
) -> Vec<f32> {
    let (weight_group, group) = (group_length(k, scales.group()), group_length(k, x.group));
    assert!(weight_group == k || weight_group.is_multiple_of(group), "groups of {weight_group} and {group}");
    let (weight_groups, activation_groups) = (groups(k, scales.group()), groups(k, x.group));
    let mut weights = vec![0i8; k];
    canonical::unpack_row(row, &mut weights);
    let of_row = |m: usize| {
        let q = &x.q[m * x.stride..][..k];
        let mut total = 0f32;
        for g in 0..weight_groups {
            let mut part = 0f32;
            let end = k.min((g + 1) * weight_group);
            for from in (g * weight_group..end).step_by(group) {
                let terms = q[from..end.min(from + group)].iter().zip(&weights[from..]);
                let sum: i32 = terms.map(|(&q, &w)| i32::from(q) * i32::from(w)).sum();
                part = (sum as f32).mul_add(x.scale[m * activation_groups + from / group], part);
            }
            let block = n / SCALE_ROWS * SCALE_ROWS;
            total = scales.block(block, g, weight_groups)[n % SCALE_ROWS].mul_add(part, total);
        }
        total
    };
    (0..x.m).map(of_row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{canonical_rows, matrix};
    use proptest::prelude::*;

    #[test]
    fn transformers_worked_example() {
        let example: serde_json::Value =
            serde_json::from_slice(include_bytes!("../testdata/packing_example.json")).unwrap();
        let flat = |name: &str| -> Vec<f64> {
            let rows = example[name].as_array().unwrap().iter();
            rows.flat_map(|row| row.as_array().unwrap()).map(|v| v.as_f64().unwrap()).collect()
        };
        let codes: Vec<i8> = flat("codes").iter().map(|&v| v as i8).collect();
        let q: Vec<i8> = flat("x_int8").iter().map(|&v| v as i8).collect();
        let scale = example["absmean"].as_f64().unwrap() as f32;
        let mut y = [0.0; 8];
        matmul(&canonical_rows(&codes, 2), 8, 2, scale, &q, 2, &[1.0], 1, &mut y, 8);
        // The multiplying convention with the activations' scale at 1: the same product, to the bit or next to it.
        for (y, expected) in y.iter().zip(flat("y_autobitlinear_offline")) {
            assert!((f64::from(*y) - expected).abs() <= 1e-5, "{y} {expected}");
        }
    }

    #[test]
    fn scaled_products_by_hand() {
        // Two rows of 96 weights in groups of 64 and 32, activations in groups of 32.
        let codes: Vec<i8> = (0..2 * 96).map(|i| [1, 0, -1][(i / 2 + i / 96) % 3]).collect();
        let q: Vec<i8> = (0..96).map(|i| (i * 5 % 23) as i8 - 11).collect();
        let scales = crate::Scales::from_rows(&[0.5, -0.25, 3.0, 0.0], 2, 96, 64).unwrap();
        let a = [0.1, 0.7, 1e-3];
        let x = ScaledActivations { m: 1, q: &q, stride: 96, group: 32, scale: &a };
        let mut y = [0.0; 2];
        scaled_matmul(&canonical_rows(&codes, 96), (2, 96), scales.as_sdk(), x, &mut y, 2);
        let sum = |n: usize, g: usize| -> f32 {
            (32 * g..32 * (g + 1)).map(|k| i32::from(q[k]) * i32::from(codes[n * 96 + k])).sum::<i32>() as f32
        };
        for (n, [first, second]) in [[0.5f32, -0.25], [3.0, 0.0]].into_iter().enumerate() {
            let t = sum(n, 1).mul_add(a[1], sum(n, 0) * a[0]);
            assert_eq!(y[n], second.mul_add(sum(n, 2) * a[2], first * t));
        }
    }

    #[test]
    fn the_largest_k_does_not_overflow() {
        let row = vec![0u8; canonical::row_bytes(MAX_K)]; // all -1
        let q = vec![-128i8; MAX_K];
        assert_eq!(row_sum_products(&row, &q), 1 << 30);
        let mut y = [0.0];
        matmul(&row, 1, MAX_K, 1.0, &q, MAX_K, &[1.0], 1, &mut y, 1);
        assert_eq!(y, [(1 << 30) as f32]);
    }

    #[test]
    fn strides_that_wrap_around_are_refused() {
        let weights = [canonical::ZERO_BYTE; 32];
        for (q_stride, y_stride) in [(1 << 63, 1), (2, 1 << 63), (usize::MAX, 1), (2, usize::MAX)] {
            // Three rows: twice the stride is 0 or -2.
            let result = std::panic::catch_unwind(|| {
                matmul(&weights, 1, 2, 1.0, &[0; 6], q_stride, &[1.0; 3], 3, &mut [0.0; 3], y_stride);
            });
            let panic = *result.unwrap_err().downcast::<String>().unwrap();
            assert!(panic.starts_with("3 rows of"), "{panic}");
        }
    }

    proptest! {
        #[test]
        fn strides_and_both_functions_agree(
            (n, k, weights) in matrix(1, 9, 1, 300), m in 1usize..4, gap in 0usize..70, seed in any::<u32>(),
        ) {
            let rows = canonical_rows(&weights, k);
            let (q_stride, y_stride) = (k + gap, n + gap);
            let q: Vec<i8> = (0..m * q_stride)
                .map(|i| ((i as u32 ^ seed).wrapping_mul(2654435761) >> 24) as i8).collect();
            let row_scale: Vec<f32> = (0..m).map(|m| 0.01 + m as f32 / 7.0).collect();
            let mut y = vec![f32::NAN; m * y_stride];
            matmul(&rows, n, k, 0.37, &q, q_stride, &row_scale, m, &mut y, y_stride);
            for i in 0..m {
                for j in 0..y_stride {
                    let value = y[i * y_stride + j];
                    if j >= n {
                        prop_assert!(value.is_nan());
                        continue;
                    }
                    let x = &q[i * q_stride..][..k];
                    let naive: i64 = (0..k).map(|c| i64::from(x[c]) * i64::from(weights[j * k + c])).sum();
                    let sum = row_sum_products(&rows[j * canonical::row_bytes(k)..], x);
                    prop_assert_eq!(i64::from(sum), naive);
                    prop_assert_eq!(value.to_bits(), (sum as f32 * (0.37 * row_scale[i])).to_bits());
                }
            }
        }
    }
}
