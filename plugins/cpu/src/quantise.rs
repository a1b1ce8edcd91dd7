//! Activation quantisation: absmax int8 per row, as BitNet b1.58 has it, or per group of a row's values; alone or fused
//! with RMSNorm.
//!
//! For a row x of K values, or a group of them,
//!
//! ```text
//! a = max(max |x|, 1e-5)      q = round_half_even(x * (127 / a))      x ~ q * (a / 127)
//! ```
//!
//! in f32, each operation rounded once. The clamp to [-128, 127] of the definition never acts: |x| <= a,
//! and rounding the quotient and the product moves 127 by less than 127 * 2^-22, which is far from 127.5.
//! A row (group) with a NaN or an infinity gets q = 0, scale NaN and sum 0.
//!
//! RMSNorm is y = (x * r) * w with r = 1 / sqrt(mean(x^2) + eps). Its sum of squares is in the order of
//! [`simd`](crate::simd), so every CPU gets the same bits.
//!
//! The loops are written so that compilers vectorise them, and compiled once per instruction set.

use std::ops::Range;

use bitnet_burn_plugin::sdk::{group_length, groups};

use crate::simd::{Isa, Kernel, LANES, Level};
use crate::threads::{Shared, Threads, run};

/// The smallest absmax: a row of zeros has this scale.
const MIN_ABSMAX: f32 = 1e-5;
/// 1.5 * 2^23: adding it rounds a value of magnitude up to 2^22 to an integer, half to even, which is then
/// in the low bits of the sum's representation.
const ROUND: f32 = 12_582_912.0;
/// Rows are shared out to threads from this many values on.
const PARALLEL_FROM: usize = 1 << 15;

/// Quantises rows of `k` values.
///
/// # Arguments
/// * `x`: rows of `k` values, one behind the other.
/// * `q`: rows of `stride` int8 values; those behind `k` become 0.
/// * `scale`: one absmax / 127 per row; their number is the number of rows.
/// * `sum`: the sum of the row's int8 values.
///
/// # Panics
/// If `stride` is smaller than `k`, or a slice has not the length that goes with the others (`q` may be
/// longer).
pub fn quantise_rows(x: &[f32], k: usize, q: &mut [i8], stride: usize, scale: &mut [f32], sum: &mut [i32]) {
    Level::best().run(Quantise(Rows::new(x, k, Quantised { q, stride, group: 0, scale, sum })));
}

/// RMSNorm over rows of `k` values, and quantisation of the result.
///
/// # Arguments
/// * `norm_weight`: `k` weights of the norm.
/// * `eps`: added to the mean square.
///
/// The others are those of [`quantise_rows`], and the result is the one of [`rms_norm_rows`] followed by
/// [`quantise_rows`], without the detour through memory.
///
/// # Panics
/// As [`quantise_rows`], and if `norm_weight` has not `k` elements.
#[allow(clippy::too_many_arguments, reason = "the arguments of two operations in one")]
pub fn rms_norm_quantise_rows(
    x: &[f32],
    norm_weight: &[f32],
    eps: f32,
    k: usize,
    q: &mut [i8],
    stride: usize,
    scale: &mut [f32],
    sum: &mut [i32],
) {
    assert_eq!(norm_weight.len(), k, "norm weights for rows of another length");
    let rows = Rows::new(x, k, Quantised { q, stride, group: 0, scale, sum });
    Level::best().run(NormQuantise { rows, norm_weight, eps });
}

/// Where [`quantise_on`] writes M rows.
#[derive(Debug)]
pub struct Quantised<'a> {
    /// Rows of `stride` int8 values; those behind the row's own become 0.
    pub q: &'a mut [i8],
    /// Values from row to row.
    pub stride: usize,
    /// Values of a row that share a scale; 0 for the whole row. The last group of a row may be shorter.
    pub group: usize,
    /// absmax / 127: [M, groups].
    pub scale: &'a mut [f32],
    /// Sums of the int8 values: [M, groups].
    pub sum: &'a mut [i32],
}

/// Quantises rows of `k` values, after an RMSNorm with the weights and epsilon of `norm`, shared out to threads where that
/// pays: [`quantise_rows`] and [`rms_norm_quantise_rows`], for groups, too.
///
/// # Panics
/// As those.
pub fn quantise_on(
    threads: &dyn Threads,
    x: &[f32],
    k: usize,
    norm: Option<(&[f32], f32)>,
    out: Quantised<'_>,
) {
    let rows = |x: &[f32], out: Quantised<'_>| match norm {
        None => Level::best().run(Quantise(Rows::new(x, k, out))),
        Some((norm_weight, eps)) => {
            assert_eq!(norm_weight.len(), k, "norm weights for rows of another length");
            Level::best().run(NormQuantise { rows: Rows::new(x, k, out), norm_weight, eps });
        }
    };
    // Before the parts of the tasks are taken from them.
    let m = check_rows(x, k, &out);
    let tasks = (threads.threads() * 4).min(m);
    if x.len() < PARALLEL_FROM || tasks < 2 {
        return rows(x, out);
    }
    let Quantised { q, stride, group, scale, sum } = out;
    let groups = groups(k, group);
    let (q, scale, sum) = (Shared::new(q), Shared::new(scale), Shared::new(sum));
    run(threads, true, tasks, &|task| {
        let (from, to) = (m * task / tasks, m * (task + 1) / tasks);
        let count = to - from;
        // SAFETY: the tasks' ranges of rows are disjoint.
        let (q, scale, sum) = unsafe {
            let of_groups = (from * groups, count * groups);
            (
                q.part(from * stride, count * stride),
                scale.part(of_groups.0, of_groups.1),
                sum.part(of_groups.0, of_groups.1),
            )
        };
        rows(&x[from * k..to * k], Quantised { q, stride, group, scale, sum });
    });
}

/// RMSNorm over rows of `k` values: `y` = x / sqrt(mean(x^2) + `eps`) * `norm_weight`.
///
/// # Panics
/// If `x` and `y` differ in length, `k` does not divide it, or `norm_weight` has not `k` elements.
pub fn rms_norm_rows(x: &[f32], norm_weight: &[f32], eps: f32, k: usize, y: &mut [f32]) {
    assert_eq!(norm_weight.len(), k, "norm weights for rows of another length");
    assert_eq!(x.len(), y.len(), "a norm's result has the shape of its argument");
    assert!(x.len().checked_rem(k).unwrap_or(x.len()) == 0, "{} values are not rows of {k}", x.len());
    Level::best().run(Norm { x, norm_weight, eps, y });
}

/// The number of rows.
///
/// # Panics
/// If the arguments of a quantisation do not fit together.
fn check_rows(x: &[f32], k: usize, out: &Quantised) -> usize {
    let Quantised { q, stride, group, scale, sum } = out;
    assert!(k >= 1 && *stride >= k, "rows of {k} values with a stride of {stride}");
    let groups = groups(k, *group);
    let m = scale.len() / groups;
    assert_eq!(m * groups, scale.len(), "{groups} scales a row");
    assert_eq!(Some(x.len()), m.checked_mul(k), "{} values are not {m} rows of {k}", x.len());
    assert!(m.checked_mul(*stride).is_some_and(|n| n <= q.len()), "too few int8 values for {m} rows");
    assert_eq!(sum.len(), scale.len(), "as many sums as scales");
    m
}

/// Checked arguments of a quantisation.
struct Rows<'a> {
    x: &'a [f32],
    k: usize,
    out: Quantised<'a>,
}

impl<'a> Rows<'a> {
    fn new(x: &'a [f32], k: usize, out: Quantised<'a>) -> Self {
        check_rows(x, k, &out);
        Self { x, k, out }
    }

    /// Calls `quantise` with each row and its outputs.
    #[inline(always)]
    fn each(self, mut quantise: impl FnMut(&[f32], Groups<'_>)) {
        let Self { x, k, out: Quantised { q, stride, group, scale, sum } } = self;
        let (length, groups) = (group_length(k, group), groups(k, group));
        let rows = x.chunks_exact(k).zip(q.chunks_exact_mut(stride));
        let outputs = scale.chunks_exact_mut(groups).zip(sum.chunks_exact_mut(groups));
        for ((x, q), (scale, sum)) in rows.zip(outputs) {
            let (q, padding) = q.split_at_mut(k);
            quantise(x, Groups { length, q, scale, sum });
            padding.fill(0);
        }
    }
}

/// The outputs of a row.
struct Groups<'a> {
    /// Values of a group.
    length: usize,
    q: &'a mut [i8],
    scale: &'a mut [f32],
    sum: &'a mut [i32],
}

impl Groups<'_> {
    /// Quantises the groups of the row; `values` gives those of a part of it.
    #[inline(always)]
    fn quantise<X: Iterator<Item = f32> + Clone>(self, values: impl Fn(Range<usize>) -> X) {
        let outputs = self.scale.iter_mut().zip(self.sum);
        for (g, (q, (scale, sum))) in self.q.chunks_mut(self.length).zip(outputs).enumerate() {
            let from = g * self.length;
            (*scale, *sum) = quantise_row(values(from..from + q.len()), q);
        }
    }
}

struct Quantise<'a>(Rows<'a>);

impl Kernel for Quantise<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, _: I) {
        self.0.each(|x, out| out.quantise(|part| x[part].iter().copied()));
    }
}

struct NormQuantise<'a> {
    rows: Rows<'a>,
    norm_weight: &'a [f32],
    eps: f32,
}

impl Kernel for NormQuantise<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (w, eps) = (self.norm_weight, self.eps);
        self.rows.each(|x, out| {
            let r = inverse_rms(isa, x, eps);
            // Computed anew in each pass over the row: cheaper than keeping the result.
            out.quantise(|part| x[part.clone()].iter().zip(&w[part]).map(move |(x, w)| (x * r) * w));
        });
    }
}

struct Norm<'a> {
    x: &'a [f32],
    norm_weight: &'a [f32],
    eps: f32,
    y: &'a mut [f32],
}

impl Kernel for Norm<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (w, k) = (self.norm_weight, self.norm_weight.len());
        if k == 0 {
            return;
        }
        for (x, y) in self.x.chunks_exact(k).zip(self.y.chunks_exact_mut(k)) {
            let r = inverse_rms(isa, x, self.eps);
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                *y = (x * r) * w;
            }
        }
    }
}

/// Quantises one row, or a group of one, into `q`; returns scale and sum.
///
/// Both reductions are over integers, so that compilers may vectorise them in any order.
#[inline(always)]
fn quantise_row(x: impl Iterator<Item = f32> + Clone, q: &mut [i8]) -> (f32, i32) {
    // The bits of |x| order as integers, NaN and infinity above everything finite.
    let max = x.clone().fold(0, |max: i32, v| max.max((v.to_bits() & 0x7fff_ffff) as i32));
    let max = f32::from_bits(max as u32);
    if !max.is_finite() {
        q.fill(0);
        return (f32::NAN, 0);
    }
    let a = max.max(MIN_ABSMAX);
    let factor = 127.0 / a;
    let mut sum = 0i32;
    for (q, v) in q.iter_mut().zip(x) {
        // The integer is the distance from ROUND in units of the last place.
        let integer = (v * factor + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i32;
        *q = integer as i8;
        sum = sum.wrapping_add(integer);
    }
    (a / 127.0, sum)
}

/// 1 / sqrt(mean(x^2) + eps).
#[inline(always)]
pub(crate) fn inverse_rms<I: Isa>(isa: I, x: &[f32], eps: f32) -> f32 {
    1.0 / (sum_of_squares(isa, x) / x.len() as f32 + eps).sqrt()
}

/// The sum of x^2 in the order of [`simd`](crate::simd).
#[inline(always)]
pub(crate) fn sum_of_squares<I: Isa>(isa: I, x: &[f32]) -> f32 {
    let mut sums = [0.0; LANES];
    let (chunks, tail) = x.as_chunks::<LANES>();
    for v in chunks {
        for l in 0..LANES {
            sums[l] = isa.fma1(v[l], v[l], sums[l]);
        }
    }
    for (sum, v) in sums.iter_mut().zip(tail) {
        *sum = isa.fma1(*v, *v, *sum);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            sums[l] += sums[l + width];
        }
        width /= 2;
    }
    sums[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::threads::tests::Scoped;

    /// xorshift64*, enough for test data.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
        }

        /// In [-1, 1).
        fn value(&mut self) -> f32 {
            (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
        }
    }

    /// The definition, one operation after the other.
    fn reference(x: &[f32], stride: usize) -> (Vec<i8>, f32, i32) {
        let mut q = vec![0; stride];
        if x.iter().any(|v| !v.is_finite()) {
            return (q, f32::NAN, 0);
        }
        let a = x.iter().fold(0f32, |a, v| a.max(v.abs())).max(1e-5);
        let mut sum = 0;
        for (q, &x) in q.iter_mut().zip(x) {
            *q = (x * (127.0 / a)).round_ties_even().clamp(-128.0, 127.0) as i8;
            sum += i32::from(*q);
        }
        (q, a / 127.0, sum)
    }

    fn norm_reference(x: &[f32], w: &[f32], eps: f32) -> Vec<f32> {
        let mut lanes = [0f32; 16];
        for (i, &v) in x.iter().enumerate() {
            lanes[i % 16] = v.mul_add(v, lanes[i % 16]);
        }
        for width in [8, 4, 2, 1] {
            for l in 0..width {
                lanes[l] += lanes[l + width];
            }
        }
        let r = 1.0 / (lanes[0] / x.len() as f32 + eps).sqrt();
        x.iter().zip(w).map(|(x, w)| (x * r) * w).collect()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        // All NaNs are one: which one comes out is up to the CPU.
        values.iter().map(|v| if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() }).collect()
    }

    /// Runs all versions on rows of `k` and compares them with the references.
    fn check(x: &[f32], k: usize, w: &[f32], eps: f32) {
        let m = x.len() / k;
        let stride = k.next_multiple_of(64);
        let mut plain = (Vec::new(), Vec::new(), Vec::new());
        let mut fused = (Vec::new(), Vec::new(), Vec::new());
        let mut normed = Vec::new();
        for row in x.chunks_exact(k) {
            let norm = norm_reference(row, w, eps);
            for (all, row) in [(&mut plain, row), (&mut fused, &norm[..])] {
                let (q, scale, sum) = reference(row, stride);
                all.0.extend(q);
                all.1.push(scale);
                all.2.push(sum);
            }
            normed.extend(norm);
        }
        // The public functions, then every instruction set.
        for level in [None].into_iter().chain(Level::available().map(Some)) {
            for (what, expected) in [("plain", &plain), ("fused", &fused)] {
                // One byte more than needed, which must stay.
                let mut q = vec![99i8; m * stride + 1];
                let (mut scale, mut sum) = (vec![9.0; m], vec![9; m]);
                match (level, what) {
                    (None, "plain") => quantise_rows(x, k, &mut q, stride, &mut scale, &mut sum),
                    (None, _) => {
                        rms_norm_quantise_rows(x, w, eps, k, &mut q, stride, &mut scale, &mut sum);
                    }
                    (Some(level), _) => {
                        let out = Quantised { q: &mut q, stride, group: 0, scale: &mut scale, sum: &mut sum };
                        let rows = Rows::new(x, k, out);
                        match what {
                            "plain" => level.run(Quantise(rows)),
                            _ => level.run(NormQuantise { rows, norm_weight: w, eps }),
                        }
                    }
                }
                assert_eq!(q.pop(), Some(99));
                assert_eq!(q, expected.0, "{level:?} {what} k {k}");
                assert_eq!(bits(&scale), bits(&expected.1), "{level:?} {what} k {k}");
                assert_eq!(sum, expected.2, "{level:?} {what} k {k}");
            }
            let mut y = vec![9.0; x.len()];
            match level {
                None => rms_norm_rows(x, w, eps, k, &mut y),
                Some(level) => level.run(Norm { x, norm_weight: w, eps, y: &mut y }),
            }
            assert_eq!(bits(&y), bits(&normed), "{level:?} norm k {k}");
        }
    }

    #[test]
    fn every_version_equals_the_definition_on_random_rows() {
        let mut random = Random(7);
        for k in [1, 2, 15, 16, 17, 31, 63, 64, 65, 100, 127, 128, 129, 640, 1000, 2560, 6912] {
            for magnitude in [1.0, 1e-30, 1e-6, 3e4, 1e18, 3e38] {
                let x: Vec<f32> = (0..3 * k).map(|_| random.value() * magnitude).collect();
                let w: Vec<f32> = (0..k).map(|_| random.value() + 1.0).collect();
                check(&x, k, &w, 1e-5);
            }
        }
    }

    #[test]
    fn ties_round_to_even() {
        // With an absmax of 127 the factor is 1 and every half is a tie.
        let x: Vec<f32> = (-254..=254).map(|i| i as f32 / 2.0).collect();
        let (mut q, mut scale, mut sum) = (vec![0; 512], [0.0], [0]);
        quantise_rows(&x, x.len(), &mut q, 512, &mut scale, &mut sum);
        let at = |v: f32| q[((v + 127.0) * 2.0) as usize];
        assert_eq!([at(62.5), at(63.5), at(-62.5), at(0.5), at(-0.5), at(1.5)], [62, 64, -62, 0, 0, 2]);
        assert_eq!([at(127.0), at(-127.0), at(126.5)], [127, -127, 126]);
        check(&x, x.len(), &vec![1.0; x.len()], 1e-5);
    }

    #[test]
    fn special_rows() {
        let w: Vec<f32> = (0..40).map(|i| i as f32 / 8.0).collect();
        let mut x = vec![0.0; 40 * 12];
        x[45] = f32::NAN;
        x[80] = f32::INFINITY;
        x[159] = f32::NEG_INFINITY;
        x[160] = f32::MAX;
        x[161] = -f32::MAX;
        x[240] = f32::MIN_POSITIVE / 8.0;
        x[280] = -1e-5;
        x[320..360].fill(-0.0);
        x[360..400].fill(-3.0);
        x[400..440].fill(f32::NAN);
        x[440..].fill(1e-38);
        check(&x, 40, &w, 1e-6);
        check(&x, 40, &w, 0.0);
        let (mut q, mut scale, mut sum) = (vec![1; 64 * 12], [0.0; 12], [1; 12]);
        quantise_rows(&x, 40, &mut q, 64, &mut scale, &mut sum);
        assert!(scale[1].is_nan() && sum[1] == 0 && q[64..128].iter().all(|&q| q == 0));
        assert_eq!((scale[0], sum[0]), (1e-5 / 127.0, 0));
    }

    #[test]
    fn groups_are_quantised_like_rows_of_their_own() {
        let mut random = Random(5);
        for (k, group) in
            [(1, 32usize), (31, 32), (64, 32), (100usize, 32), (640, 64), (1000, 128), (300, 256)]
        {
            let (m, stride, groups) = (3, k.next_multiple_of(64), k.div_ceil(group));
            let x: Vec<f32> = (0..m * k).map(|i| random.value() * [1.0, 30.0, 1e-3][i / 32 % 3]).collect();
            let w: Vec<f32> = (0..k).map(|_| random.value() + 1.0).collect();
            let mut want = (Vec::new(), Vec::new(), Vec::new());
            let mut normed = (Vec::new(), Vec::new(), Vec::new());
            for row in x.chunks_exact(k) {
                for (out, row) in [(&mut want, row), (&mut normed, &norm_reference(row, &w, 1e-5)[..])] {
                    for part in row.chunks(group) {
                        let (q, scale, sum) = reference(part, part.len());
                        out.0.extend(q);
                        out.1.push(scale);
                        out.2.push(sum);
                    }
                    out.0.resize(out.0.len() + stride - k, 0);
                }
            }
            for level in [None].into_iter().chain(Level::available().map(Some)) {
                for (norm, want) in [(None, &want), (Some((&w[..], 1e-5)), &normed)] {
                    let (mut q, mut scale, mut sum) =
                        (vec![7; m * stride], vec![7.0; m * groups], vec![7; m * groups]);
                    let out = Quantised { q: &mut q, stride, group, scale: &mut scale, sum: &mut sum };
                    match (level, norm) {
                        (None, norm) => quantise_on(&Scoped(1), &x, k, norm, out),
                        (Some(level), None) => level.run(Quantise(Rows::new(&x, k, out))),
                        (Some(level), Some((norm_weight, eps))) => {
                            level.run(NormQuantise { rows: Rows::new(&x, k, out), norm_weight, eps });
                        }
                    }
                    assert_eq!(q, want.0, "{level:?} k {k} group {group}");
                    assert_eq!(
                        (bits(&scale), &sum),
                        (bits(&want.1), &want.2),
                        "{level:?} k {k} group {group}"
                    );
                }
            }
        }
    }

    #[test]
    fn threads_give_the_same_rows() {
        let mut random = Random(11);
        for (m, k, group) in [(1, 70, 0), (2, 40_000, 0), (37, 1000, 0), (37, 1000, 32), (9, 4096usize, 128)]
        {
            let groups = groups(k, group);
            let stride = k.next_multiple_of(64);
            let x: Vec<f32> = (0..m * k).map(|_| random.value()).collect();
            let w: Vec<f32> = (0..k).map(|_| random.value()).collect();
            for norm in [None, Some((&w[..], 1e-5))] {
                let [want, got @ ..] = [1, 2, 3].map(|threads| {
                    let (mut q, mut scale, mut sum) =
                        (vec![7; m * stride], vec![7.0; m * groups], vec![7; m * groups]);
                    let out = Quantised { q: &mut q, stride, group, scale: &mut scale, sum: &mut sum };
                    quantise_on(&Scoped(threads), &x, k, norm, out);
                    (q, bits(&scale), sum)
                });
                assert!(got.iter().all(|got| *got == want), "{m} x {k}");
            }
        }
    }
}
