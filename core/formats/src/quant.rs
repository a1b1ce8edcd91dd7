//! The quantisers of BitNet b1.58 (arXiv 2402.17764, section 2; arXiv 2310.11453, equations 1 to 5
//! for the activations), as plain scalar code.
//!
//! Weights, absmean, with W all weights of the tensor, or those of a row or a group of it where
//! [these have scales of their own](crate::WeightScale):
//!
//! ```text
//! s = max(mean(|W|), 1e-5)        q = clamp(round(W * (1/s)), -1, 1)        W ~ q * s
//! ```
//!
//! Activations, absmax, with x a row (token), or a group of its values:
//!
//! ```text
//! a = max(max(|x|), 1e-5)         q = clamp(round(x * (127/a)), -128, 127)  x ~ q * (a/127)
//! ```
//!
//! Both round half to even. The order of the operations is part of the definition: every kernel
//! and every backend must come to the same integers.
#![forbid(unsafe_code)]

use crate::{FormatError, canonical, check_values};

/// The smallest scale, so that a tensor or row of zeros does not divide by zero.
pub const EPSILON: f32 = 1e-5;

/// The absmean scale s of a weight tensor of any shape.
///
/// |W| is summed in f64 in the order of the indices, so that the result does not depend on a vector
/// width or a number of threads; the mean is rounded once to f32. A NaN among the weights gives NaN;
/// no weights at all give [`EPSILON`].
pub fn absmean_scale(weights: &[f32]) -> f32 {
    if weights.is_empty() {
        return EPSILON;
    }
    let n = weights.len() as f64;
    let mean = |sum: f64| (sum / n) as f32;
    // One addition waits for the other in that order. Sums in any other are off by at most n half units of the
    // last place of an f64, as is this one: where all that lies between rounds to one f32, that is the mean.
    let sum = lane_sum(weights);
    let off = sum * ((2.0 * n + 32.0) * (f64::EPSILON / 2.0));
    let (low, high) = (mean(sum - off), mean(sum + off));
    let mean = if low == high { low } else { mean(weights.iter().map(|w| f64::from(w.abs())).sum()) };
    if mean < EPSILON { EPSILON } else { mean }
}

/// The sum of |W| in f64, in lanes: as fast as memory.
fn lane_sum(weights: &[f32]) -> f64 {
    const LANES: usize = 16;
    let mut sums = [0f64; LANES];
    let (chunks, rest) = weights.as_chunks::<LANES>();
    for chunk in chunks {
        for (sum, w) in sums.iter_mut().zip(chunk) {
            *sum += f64::from(w.abs());
        }
    }
    sums.iter().sum::<f64>() + rest.iter().map(|w| f64::from(w.abs())).sum::<f64>()
}

/// The ternary weights (-1, 0, 1) for a scale from [`absmean_scale`]; a NaN gives 0.
///
/// ```
/// use bitnet_burn_formats::quant::{absmean_quantise, absmean_scale};
///
/// let weights = [0.9, -0.7, 0.05, -0.35];
/// let scale = absmean_scale(&weights);
/// assert_eq!(scale, 0.5);
/// assert_eq!(absmean_quantise(&weights, scale), [1, -1, 0, -1]);
/// ```
pub fn absmean_quantise(weights: &[f32], scale: f32) -> Vec<i8> {
    let mut codes = vec![0; weights.len()];
    quantise_row(weights, 1.0 / scale, &mut codes);
    codes
}

/// The values of [`absmean_quantise`], as floats: -s, 0 or s, with s the [scale](absmean_scale) of each `run` of weights,
/// the last of which may be shorter.
///
/// ```
/// use bitnet_burn_formats::quant::absmean_values;
///
/// let weights = [0.75, -0.75, 0.125, -0.375];
/// assert_eq!(absmean_values(&weights, 4), [0.5, -0.5, 0.0, -0.5]);
/// assert_eq!(absmean_values(&weights, 2), [0.75, -0.75, 0.0, -0.25]);
/// ```
pub fn absmean_values(weights: &[f32], run: usize) -> Vec<f32> {
    let mut values = vec![0f32; weights.len()];
    let run = run.max(1);
    for (weights, values) in weights.chunks(run).zip(values.chunks_mut(run)) {
        let scale = absmean_scale(weights);
        let inverse = 1.0 / scale;
        for (value, &w) in values.iter_mut().zip(weights) {
            let w = w * inverse;
            *value = (f32::from(u8::from(w > 0.5)) - f32::from(u8::from(w < -0.5))) * scale;
        }
    }
    values
}

/// clamp(round_half_even(w * inverse), -1, 1). Between -1 and 1 that is two comparisons: 0.5 is a tie
/// and goes to the even 0, everything beyond it to 1.
fn quantise_row(weights: &[f32], inverse: f32, codes: &mut [i8]) {
    for (code, &w) in codes.iter_mut().zip(weights) {
        let w = w * inverse;
        *code = i8::from(w > 0.5) - i8::from(w < -0.5);
    }
}

/// Canonical rows and the scale of the absmean quantisation of float masters [n, k].
///
/// For tensors that hold ternary values already use [`formats::ternary`](crate::ternary):
/// absmean would change their scale.
///
/// # Errors
/// [`FormatError::Empty`], [`TooLarge`](FormatError::TooLarge), [`Length`](FormatError::Length), or
/// [`NotFinite`](FormatError::NotFinite) with the position of the first NaN or infinity.
pub fn absmean_to_canonical(weights: &[f32], n: usize, k: usize) -> Result<(Vec<u8>, f32), FormatError> {
    let mut rows = vec![0; check_values("absmean", n, k, weights.len())?];
    let scale = absmean_scale(weights);
    // The mean of finite weights is finite.
    if !scale.is_finite()
        && let Some(at) = weights.iter().position(|w| !w.is_finite())
    {
        return Err(FormatError::NotFinite { row: at / k, column: at % k, value: weights[at] });
    }
    let mut codes = vec![0; k];
    for (values, row) in weights.chunks_exact(k).zip(rows.chunks_exact_mut(canonical::row_bytes(k))) {
        quantise_row(values, 1.0 / scale, &mut codes);
        canonical::pack_row(&codes, row);
    }
    Ok((rows, scale))
}

/// The absmax quantisation of one row of activations: the reference that faster ones are tested
/// against.
///
/// # Returns
/// The scale a/127 and the sum of the q. A row with a NaN or an infinity gives q = 0, scale NaN and
/// sum 0, so that what is computed from it is NaN and not garbage.
///
/// ```
/// use bitnet_burn_formats::quant::absmax_row;
///
/// let mut q = [0; 2];
/// assert_eq!(absmax_row(&[62.5, -127.0], &mut q), (1.0, 62 - 127));
/// assert_eq!(q, [62, -127]); // 62.5 is a tie: to even
/// ```
///
/// # Panics
/// If `q` is not as long as `x`.
pub fn absmax_row(x: &[f32], q: &mut [i8]) -> (f32, i32) {
    assert_eq!(x.len(), q.len(), "a row of activations and its int8 values differ in length");
    if !x.iter().all(|v| v.is_finite()) {
        q.fill(0);
        return (f32::NAN, 0);
    }
    let a = x.iter().fold(EPSILON, |a, v| a.max(v.abs()));
    let factor = 127.0 / a;
    let mut sum = 0;
    for (q, &v) in q.iter_mut().zip(x) {
        *q = (v * factor).round_ties_even().clamp(-128.0, 127.0) as i8;
        sum += i32::from(*q);
    }
    (a / 127.0, sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::canonical_rows;
    use proptest::prelude::*;

    #[test]
    fn transformers_worked_example() {
        let example: serde_json::Value =
            serde_json::from_slice(include_bytes!("../testdata/packing_example.json")).unwrap();
        let flat = |name: &str| -> Vec<f32> {
            let rows = example[name].as_array().unwrap().iter();
            rows.flat_map(|row| row.as_array().unwrap()).map(|v| v.as_f64().unwrap() as f32).collect()
        };
        let number = |name: &str| example[name].as_f64().unwrap() as f32;

        let weights = flat("weight");
        let scale = absmean_scale(&weights);
        assert_eq!(scale, number("absmean"));
        assert_eq!(1.0 / scale, number("inverse"));
        let codes: Vec<i8> = flat("codes").iter().map(|&v| v as i8).collect();
        assert_eq!(absmean_quantise(&weights, scale), codes);
        assert_eq!(absmean_to_canonical(&weights, 8, 2), Ok((canonical_rows(&codes, 2), scale)));

        let mut q = [0; 2];
        assert_eq!(absmax_row(&flat("x"), &mut q), (number("x_scale"), -65));
        assert_eq!(q.map(f32::from).as_slice(), flat("x_int8"));
    }

    #[test]
    fn ties_go_to_even_in_both_quantisers() {
        assert_eq!(
            absmean_quantise(&[0.5, -0.5, 0.50000006, -0.50000006, 1.5, 9.0], 1.0),
            [0, 0, 1, -1, 1, 1]
        );
        let x = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.5];
        let mut q = [9; 8];
        absmax_row(&x, &mut q);
        assert_eq!(q, [127, 0, 2, 2, 0, -2, 126, -126]);
    }

    #[test]
    fn zeros_and_what_is_not_finite() {
        assert_eq!(absmean_scale(&[0.0; 9]), 1e-5);
        assert_eq!(absmean_scale(&[]), 1e-5);
        assert!(absmean_scale(&[1.0, f32::NAN]).is_nan());
        assert_eq!(absmean_to_canonical(&[0.0; 6], 2, 3), Ok((canonical_rows(&[0; 6], 3), 1e-5)));
        let bad = absmean_to_canonical(&[0.0, 1.0, 2.0, 3.0, f32::INFINITY, f32::NAN], 2, 3);
        assert_eq!(bad, Err(FormatError::NotFinite { row: 1, column: 1, value: f32::INFINITY }));
        assert!(matches!(absmean_to_canonical(&[0.0; 6], 2, 4), Err(FormatError::Length { .. })));

        let mut q = [9; 3];
        assert_eq!(absmax_row(&[0.0; 3], &mut q), (1e-5 / 127.0, 0));
        assert_eq!(q, [0; 3]);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut q = [9; 3];
            let (scale, sum) = absmax_row(&[1.0, bad, 2.0], &mut q);
            assert!(scale.is_nan());
            assert_eq!((q, sum), ([0; 3], 0));
        }
        let mut q = [9; 2];
        assert_eq!(absmax_row(&[f32::MAX, -f32::MAX], &mut q).1, 0);
        assert_eq!(q, [127, -127]);
    }

    /// The definition.
    fn in_order(weights: &[f32]) -> f32 {
        let sum: f64 = weights.iter().map(|w| f64::from(w.abs())).sum();
        let mean = (sum / weights.len() as f64) as f32;
        if mean < EPSILON { EPSILON } else { mean }
    }

    #[test]
    fn means_between_two_floats_are_summed_in_order() {
        let above = f32::from_bits(1f32.to_bits() + 1);
        // Half way between two floats, and a little to either side.
        for weights in
            [vec![1.0, above], vec![above, 1.0, above, 1.0], [vec![1.0; 40], vec![above; 40]].concat()]
        {
            for nudge in [0.0f32, 1e-20, -1e-20, 1e-9] {
                let mut weights = weights.clone();
                weights.push(nudge);
                assert_eq!(absmean_scale(&weights).to_bits(), in_order(&weights).to_bits());
                weights.pop();
                weights[0] += nudge;
                assert_eq!(absmean_scale(&weights).to_bits(), in_order(&weights).to_bits());
            }
        }
        for weights in [vec![f32::MAX; 100], vec![f32::MIN_POSITIVE; 100], vec![f32::INFINITY, 1.0]] {
            assert_eq!(absmean_scale(&weights), in_order(&weights));
        }
        assert!(absmean_scale(&[1.0, f32::NAN]).is_nan());
    }

    proptest! {
        #[test]
        fn absmean_is_the_sum_in_order(
            weights in prop::collection::vec(prop_oneof![-1f32..1.0, any::<f32>().prop_map(|w| w % 1e30)], 1..700)
        ) {
            let (got, want) = (absmean_scale(&weights), in_order(&weights));
            prop_assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan());
        }


        #[test]
        fn comparisons_are_the_formula(weights in proptest::collection::vec(any::<f32>(), 1..50), scale in 1e-5f32..9.0) {
            let formula = |w: &f32| (w * (1.0 / scale)).round_ties_even().clamp(-1.0, 1.0) as i8;
            let expected: Vec<i8> = weights.iter().map(formula).collect();
            prop_assert_eq!(absmean_quantise(&weights, scale), expected);
        }

        #[test]
        fn activations_are_within_half_a_step(x in proptest::collection::vec(-1e3f32..1e3, 1..80)) {
            let mut q = vec![0; x.len()];
            let (scale, sum) = absmax_row(&x, &mut q);
            prop_assert_eq!(sum, q.iter().map(|&q| i32::from(q)).sum::<i32>());
            for (x, q) in x.iter().zip(q) {
                prop_assert!(q != -128 && (x - f32::from(q) * scale).abs() <= scale * 0.50002);
            }
        }
    }
}
