//! The dense linear layer, for lm_head and other layers that are not ternary: f32 activations times weights
//! in the format that their file stores.
//!
//! The weights are exactly the f32 values of [`DenseFormat::decode_row`]; they are decoded in registers, a
//! few rows at a time (and with many rows of activations, once for a block of them). With one row the layer
//! runs at the speed of memory, so what counts is that the weights are asked for early and in order: a tile
//! of [`ROWS`] adjacent rows is one contiguous run of bytes, and while one tile is computed the next is
//! prefetched, at the same pace. Several rows are needed for their independent chains of multiply-adds: one
//! row's order of summation is fixed, see the numerics of [`super`].

use std::cell::Cell;

use bitnet_burn_formats::DenseFormat;
use bitnet_burn_formats::dense::{Q4_0_BYTES, Q6_K_BYTES, Q8_0_BYTES, QK, QK_K};
use bitnet_burn_manager::pool::Pool;

use super::simd::{Isa, Kernel, LANES, Level};
use super::{Shared, rows_fit, run};

/// Weight rows that are computed together in registers (half as many without wide registers).
const ROWS: usize = 4;

/// Bytes of weights in one task.
const TASK_BYTES: usize = 1 << 18;

/// y[m, n] = sum over k of x[m, k] * w[n, k].
///
/// # Arguments
/// * `w`: N rows of `format.row_bytes(k)` bytes each
/// * `x`: M rows of K activations
/// * `y`: M rows of N results, `y_stride` elements apart; what lies between them is left alone
///
/// # Panics
/// If a slice does not have the length that the shape asks for, or the format has no rows of K weights.
#[allow(clippy::too_many_arguments)]
pub(crate) fn linear(
    format: DenseFormat,
    w: &[u8],
    n: usize,
    k: usize,
    x: &[f32],
    m: usize,
    y: &mut [f32],
    y_stride: usize,
    pool: &Pool,
) {
    linear_at(Level::best(), format, w, n, k, x, m, y, y_stride, pool);
}

/// [`linear`] with a given instruction set.
#[allow(clippy::too_many_arguments)]
pub(crate) fn linear_at(
    level: Level,
    format: DenseFormat,
    w: &[u8],
    n: usize,
    k: usize,
    x: &[f32],
    m: usize,
    y: &mut [f32],
    y_stride: usize,
    pool: &Pool,
) {
    let row_bytes = format.row_bytes(k).expect("a whole number of blocks in a row");
    assert_eq!(Some(w.len()), n.checked_mul(row_bytes), "bytes of weights");
    assert_eq!(Some(x.len()), m.checked_mul(k), "activations");
    assert!(rows_fit(y.len(), m, n, y_stride), "{m} rows of {n} results in {}", y.len());
    if m == 0 || n == 0 {
        return;
    }
    let rows = (TASK_BYTES / row_bytes.max(1)).clamp(1, 4096).next_multiple_of(ROWS);
    let y = Shared::new(y);
    let parallel = n.saturating_mul(k).saturating_mul(m) >= 1 << 18;
    run(pool, parallel, n.div_ceil(rows), &|task| {
        let from = task * rows;
        level.run(Range { format, w, row_bytes, from, to: (from + rows).min(n), k, x, m, y: &y, y_stride });
    });
}

/// Rows of an embedding table: `y[i] = w[ids[i]]`, as f32.
///
/// # Arguments
/// * `w`: rows of `format.row_bytes(k)` bytes each
/// * `ids`: indices of rows
/// * `y`: `ids.len()` rows of K values
///
/// # Panics
/// If an index is not below the number of rows, or a length does not fit.
pub(crate) fn gather_rows(format: DenseFormat, w: &[u8], k: usize, ids: &[u32], y: &mut [f32]) {
    let row_bytes = format.row_bytes(k).expect("a whole number of blocks in a row");
    assert_eq!(Some(y.len()), ids.len().checked_mul(k), "rows of the result");
    if k == 0 {
        return;
    }
    for (&id, y) in ids.iter().zip(y.chunks_exact_mut(k)) {
        let row = (id as usize).checked_mul(row_bytes).and_then(|from| w.get(from..)?.get(..row_bytes));
        let row = row.unwrap_or_else(|| panic!("row {id} of a table of {}", w.len() / row_bytes));
        format.decode_row(row, y).expect("a row of the format's length");
    }
}

/// Rows of activations for which weights are decoded once: with K in the thousands they stay in the L2 cache.
const BLOCK: usize = 32;

thread_local! {
    /// Decoded rows of a tile, kept from one range to the next.
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// A range of rows of the weights, for all rows of the activations.
struct Range<'a> {
    format: DenseFormat,
    w: &'a [u8],
    row_bytes: usize,
    from: usize,
    to: usize,
    k: usize,
    x: &'a [f32],
    m: usize,
    y: &'a Shared<'a, f32>,
    y_stride: usize,
}

impl Kernel for Range<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        match self.format {
            DenseFormat::F32 => self.decoded_by::<I, F32, 4>(isa),
            DenseFormat::F16 => self.decoded_by::<I, F16, 4>(isa),
            DenseFormat::BF16 => self.decoded_by::<I, BF16, 4>(isa),
            DenseFormat::Q8_0 => self.decoded_by::<I, Q8_0, 2>(isa),
            DenseFormat::Q6_K => self.decoded_by::<I, Q6K, 8>(isa),
            DenseFormat::Q4_0 => self.decoded_by::<I, Q4_0, 2>(isa),
        }
    }
}

impl Range<'_> {
    #[inline(always)]
    fn decoded_by<I: Isa, D: Decoder<V, Unit = u8>, const V: usize>(&self, isa: I) {
        match (I::WIDE, self.m) {
            (true, 1) => self.tiles::<I, D, V, ROWS, 1>(isa),
            (true, _) => self.tiles::<I, D, V, ROWS, 4>(isa),
            (false, 1) => self.tiles::<I, D, V, { ROWS / 2 }, 1>(isa),
            (false, _) => self.tiles::<I, D, V, { ROWS / 2 }, 2>(isa),
        }
    }

    /// Tiles of R rows of weights by C rows of activations. A tile of fewer rows repeats its last one.
    #[inline(always)]
    fn tiles<I: Isa, D: Decoder<V, Unit = u8>, const V: usize, const R: usize, const C: usize>(
        &self,
        isa: I,
    ) {
        // With more activations than a tile, weights are decoded once for a block of them.
        let blocked = C > 1 && (D::DECODED_ONCE || self.m > C);
        let mut scratch = if blocked { SCRATCH.take() } else { Vec::new() };
        if blocked && scratch.len() < R * self.k {
            scratch.resize(R * self.k, 0.0);
        }
        let block = if blocked { BLOCK } else { C };
        for from in (0..self.m).step_by(block) {
            for n in (self.from..self.to).step_by(R) {
                let mut w = [&self.w[..0]; R];
                for (r, w) in w.iter_mut().enumerate() {
                    let start = (n + r).min(self.to - 1) * self.row_bytes;
                    *w = &self.w[start..start + self.row_bytes];
                }
                // Only the first pass over the rows finds them in memory. (The address may lie behind the
                // weights.)
                let next = (from == 0).then(|| w[0].as_ptr().wrapping_add(R * self.row_bytes));
                if !blocked {
                    let sums = tile::<I, D, V, R, C>(isa, w, self.activations(from), self.k, next);
                    self.write(n, from, sums);
                    continue;
                }
                for (r, w) in w.into_iter().enumerate() {
                    let next = next.map(|next| next.wrapping_add(r * self.row_bytes));
                    decode_row::<I, D, V>(isa, w, &mut scratch[r * self.k..][..self.k], next);
                }
                let mut w = [&scratch[..0]; R];
                for (r, w) in w.iter_mut().enumerate() {
                    *w = &scratch[r * self.k..][..self.k];
                }
                for m in (from..(from + block).min(self.m)).step_by(C) {
                    let sums = tile::<I, Decoded, 2, R, C>(isa, w, self.activations(m), self.k, None);
                    self.write(n, m, sums);
                }
            }
        }
        if blocked {
            SCRATCH.set(scratch);
        }
    }

    /// C rows of activations from row `m` on.
    #[inline(always)]
    fn activations<const C: usize>(&self, m: usize) -> [&[f32]; C] {
        let mut x = [&self.x[..0]; C];
        for (c, x) in x.iter_mut().enumerate() {
            let from = (m + c).min(self.m - 1) * self.k;
            *x = &self.x[from..from + self.k];
        }
        x
    }

    #[inline(always)]
    fn write<const R: usize, const C: usize>(&self, n: usize, m: usize, sums: [[f32; C]; R]) {
        let count = R.min(self.to - n);
        for c in m..self.m.min(m + C) {
            // SAFETY: the task of this range is the only one that writes its columns, one part at a time.
            let y = unsafe { self.y.part(c * self.y_stride + n, count) };
            for (r, y) in y.iter_mut().enumerate() {
                *y = sums[r][c - m];
            }
        }
    }
}

/// The values of a row.
#[inline(always)]
fn decode_row<I: Isa, D: Decoder<V>, const V: usize>(
    isa: I,
    w: &[D::Unit],
    values: &mut [f32],
    next: Option<*const u8>,
) {
    let (steps, rest) = (values.len() / D::LEN, values.len() % D::LEN);
    for step in 0..steps {
        if let Some(next) = next {
            for line in (0..D::UNITS * size_of::<D::Unit>()).step_by(64) {
                isa.prefetch(next.wrapping_add(step * D::UNITS * size_of::<D::Unit>() + line));
            }
        }
        for part in 0..D::PARTS {
            let to = &mut values[step * D::LEN + part * V * LANES..][..V * LANES];
            let decoded = D::decode(isa, &w[step * D::UNITS..][..D::UNITS], part);
            for (&v, to) in decoded.iter().zip(to.as_chunks_mut().0) {
                isa.store(v, to);
            }
        }
    }
    let from = values.len() - rest;
    for (i, value) in values[from..].iter_mut().enumerate() {
        *value = D::single(isa, w, from + i);
    }
}

/// The dot products of R rows of weights and C rows of activations.
#[inline(always)]
fn tile<I: Isa, D: Decoder<V>, const V: usize, const R: usize, const C: usize>(
    isa: I,
    w: [&[D::Unit]; R],
    x: [&[f32]; C],
    k: usize,
    next: Option<*const u8>,
) -> [[f32; C]; R] {
    let mut acc = [[isa.splat(0.0); C]; R];
    let steps = k / D::LEN;
    let mut asked = 0;
    for step in 0..steps {
        if let Some(next) = next {
            while asked < (step + 1) * R * D::UNITS * size_of::<D::Unit>() {
                isa.prefetch(next.wrapping_add(asked));
                asked += 64;
            }
        }
        for part in 0..D::PARTS {
            let at = step * D::LEN + part * V * LANES;
            let x: [&[f32]; C] = std::array::from_fn(|c| &x[c][at..at + V * LANES]);
            // Unrolled by hand, which keeps the sums in registers.
            for r in (0..R).step_by(4) {
                multiply::<I, D, V, C>(isa, w[r], step, part, x, &mut acc[r]);
                if r + 1 < R {
                    multiply::<I, D, V, C>(isa, w[r + 1], step, part, x, &mut acc[r + 1]);
                }
                if r + 3 < R {
                    multiply::<I, D, V, C>(isa, w[r + 2], step, part, x, &mut acc[r + 2]);
                    multiply::<I, D, V, C>(isa, w[r + 3], step, part, x, &mut acc[r + 3]);
                }
            }
        }
    }
    // The formats that hold single numbers may have a last partial step.
    for from in (steps * D::LEN..k).step_by(LANES) {
        let count = LANES.min(k - from);
        for r in 0..R {
            let mut weights = [0.0; LANES];
            for (i, weight) in weights[..count].iter_mut().enumerate() {
                *weight = D::single(isa, w[r], from + i);
            }
            for c in 0..C {
                let x = isa.load_first(&x[c][from..from + count]);
                acc[r][c] = isa.fma_first(count, isa.load(&weights), x, acc[r][c]);
            }
        }
    }
    let mut sums = [[0.0; C]; R];
    for r in 0..R {
        for c in 0..C {
            sums[r][c] = isa.sum(acc[r][c]);
        }
    }
    sums
}

/// Adds the products of one part of a step of a row.
#[inline(always)]
fn multiply<I: Isa, D: Decoder<V>, const V: usize, const C: usize>(
    isa: I,
    w: &[D::Unit],
    step: usize,
    part: usize,
    x: [&[f32]; C],
    acc: &mut [I::F; C],
) {
    let weights = D::decode(isa, &w[step * D::UNITS..][..D::UNITS], part);
    for (v, &weight) in weights.iter().enumerate() {
        for c in 0..C {
            let x = x[c][v * LANES..].first_chunk().expect("16 of V * 16 activations");
            acc[c] = isa.fma(weight, isa.load(x), acc[c]);
        }
    }
}

/// How to get at the weights of a format: steps of `LEN` weights in `UNITS` units (mostly bytes), each in
/// `PARTS` parts of V vectors.
trait Decoder<const V: usize> {
    /// What a row is a slice of.
    type Unit: Copy;
    const LEN: usize;
    const UNITS: usize;
    const PARTS: usize = 1;
    /// Whether a part takes so many registers that a tile with several activations has too few.
    const DECODED_ONCE: bool = false;

    /// The vectors of one part of a step.
    fn decode<I: Isa>(isa: I, step: &[Self::Unit], part: usize) -> [I::F; V];

    /// Weight `i` of a row; only where `LEN` is more than one block of the format.
    #[inline(always)]
    fn single<I: Isa>(_isa: I, _row: &[Self::Unit], _i: usize) -> f32 {
        unreachable!("rows are whole blocks")
    }
}

/// `N` bytes at `at`.
#[inline(always)]
fn bytes<const N: usize>(from: &[u8], at: usize) -> &[u8; N] {
    from[at..].first_chunk().expect("within the block")
}

struct F32;
struct F16;
struct BF16;
#[allow(non_camel_case_types)]
struct Q8_0;
#[allow(non_camel_case_types)]
struct Q4_0;
struct Q6K;
/// Values decoded before.
struct Decoded;

impl Decoder<2> for Decoded {
    type Unit = f32;
    const LEN: usize = 32;
    const UNITS: usize = 32;

    #[inline(always)]
    fn decode<I: Isa>(isa: I, step: &[f32], _part: usize) -> [I::F; 2] {
        let (vectors, _) = step.as_chunks();
        [isa.load(&vectors[0]), isa.load(&vectors[1])]
    }
    #[inline(always)]
    fn single<I: Isa>(_isa: I, row: &[f32], i: usize) -> f32 {
        row[i]
    }
}

impl Decoder<4> for F32 {
    type Unit = u8;
    const LEN: usize = 64;
    const UNITS: usize = 256;

    #[inline(always)]
    fn decode<I: Isa>(isa: I, step: &[u8], _part: usize) -> [I::F; 4] {
        let mut v = [isa.splat(0.0); 4];
        for (i, v) in v.iter_mut().enumerate() {
            *v = isa.f32_bytes(bytes(step, 64 * i));
        }
        v
    }
    #[inline(always)]
    fn single<I: Isa>(_isa: I, row: &[u8], i: usize) -> f32 {
        f32::from_le_bytes(*bytes(row, 4 * i))
    }
}

impl Decoder<4> for F16 {
    type Unit = u8;
    const LEN: usize = 64;
    const UNITS: usize = 128;

    #[inline(always)]
    fn decode<I: Isa>(isa: I, step: &[u8], _part: usize) -> [I::F; 4] {
        let mut v = [isa.splat(0.0); 4];
        for (i, v) in v.iter_mut().enumerate() {
            *v = isa.f16_bytes(bytes(step, 32 * i));
        }
        v
    }
    #[inline(always)]
    fn single<I: Isa>(isa: I, row: &[u8], i: usize) -> f32 {
        let mut lanes = [0.0; LANES];
        isa.store(isa.splat_f16(u16::from_le_bytes(*bytes(row, 2 * i))), &mut lanes);
        lanes[0]
    }
}

impl Decoder<4> for BF16 {
    type Unit = u8;
    const LEN: usize = 64;
    const UNITS: usize = 128;

    #[inline(always)]
    fn decode<I: Isa>(isa: I, step: &[u8], _part: usize) -> [I::F; 4] {
        let mut v = [isa.splat(0.0); 4];
        for (i, v) in v.iter_mut().enumerate() {
            *v = isa.bf16_bytes(bytes(step, 32 * i));
        }
        v
    }
    #[inline(always)]
    fn single<I: Isa>(_isa: I, row: &[u8], i: usize) -> f32 {
        f32::from_bits(u32::from(u16::from_le_bytes(*bytes(row, 2 * i))) << 16)
    }
}

impl Decoder<2> for Q8_0 {
    type Unit = u8;
    const LEN: usize = QK;
    const UNITS: usize = Q8_0_BYTES;

    #[inline(always)]
    fn decode<I: Isa>(isa: I, step: &[u8], _part: usize) -> [I::F; 2] {
        let d = isa.splat_f16(u16::from_le_bytes(*bytes(step, 0)));
        [isa.mul(isa.i8_bytes(bytes(step, 2)), d), isa.mul(isa.i8_bytes(bytes(step, 18)), d)]
    }
}

impl Decoder<2> for Q4_0 {
    type Unit = u8;
    const LEN: usize = QK;
    const UNITS: usize = Q4_0_BYTES;

    #[inline(always)]
    fn decode<I: Isa>(isa: I, step: &[u8], _part: usize) -> [I::F; 2] {
        let d = isa.splat_f16(u16::from_le_bytes(*bytes(step, 0)));
        let [low, high] = isa.nibbles(bytes(step, 2));
        [isa.mul(low, d), isa.mul(high, d)]
    }
}

impl Decoder<8> for Q6K {
    type Unit = u8;
    const LEN: usize = QK_K;
    const UNITS: usize = Q6_K_BYTES;
    const PARTS: usize = 2;
    const DECODED_ONCE: bool = true;

    /// A half of the block: 128 weights. Its layout is in the formats' `q6_k_block`.
    #[inline(always)]
    fn decode<I: Isa>(isa: I, block: &[u8], part: usize) -> [I::F; 8] {
        let block: &[u8; Q6_K_BYTES] = bytes(block, 0);
        let d = isa.splat_f16(u16::from_le_bytes(*bytes(block, 208)));
        let mut scales = [0.0; LANES];
        isa.store(isa.mul(d, isa.i8_bytes(bytes(block, 192))), &mut scales);
        // Through memory, from where a scale is broadcast by the multiplication itself; else the compiler
        // would shuffle each out of the register.
        let scales = std::hint::black_box(&scales);
        let mut v = [isa.splat(0.0); 8];
        for i in 0..2 {
            let at = 64 * part + 16 * i;
            let high = bytes(block, 128 + 32 * part + 16 * i);
            let sixes = isa.sixes(bytes(block, at), bytes(block, at + 32), high);
            for (j, &q) in sixes.iter().enumerate() {
                v[2 * j + i] = isa.mul(isa.splat(scales[8 * part + 2 * j + i]), q);
            }
        }
        v
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::tests::{Rng, bits};
    use super::*;

    fn weights(rng: &mut Rng, format: DenseFormat, n: usize, k: usize) -> Vec<u8> {
        let mut w = Vec::new();
        for _ in 0..n {
            let mut row = vec![0; format.row_bytes(k).unwrap()];
            format.encode_row(&rng.f32s(k), &mut row).unwrap();
            w.extend(row);
        }
        w
    }

    /// The numerics of the module above, written down once more, over decoded rows.
    fn specification(format: DenseFormat, w: &[u8], n: usize, k: usize, x: &[f32], m: usize) -> Vec<f32> {
        let mut y = Vec::new();
        for m in 0..m {
            for n in 0..n {
                let bytes = format.row_bytes(k).unwrap();
                let mut row = vec![0.0; k];
                format.decode_row(&w[n * bytes..(n + 1) * bytes], &mut row).unwrap();
                let mut lanes = [0f32; 16];
                for i in 0..k {
                    lanes[i % 16] = row[i].mul_add(x[m * k + i], lanes[i % 16]);
                }
                for half in [8, 4, 2, 1] {
                    for l in 0..half {
                        lanes[l] += lanes[l + half];
                    }
                }
                y.push(lanes[0]);
            }
        }
        y
    }

    #[test]
    fn every_instruction_set_and_thread_count_computes_the_specification() {
        let mut rng = Rng(3);
        let pools = [1, 2, 3].map(|threads| Pool::new(threads).unwrap());
        for format in DenseFormat::ALL {
            let ks: &[usize] = match format.block_len() {
                1 => &[1, 5, 16, 63, 64, 100, 320],
                32 => &[32, 96, 320],
                _ => &[256, 768],
            };
            for &k in ks {
                for (n, m) in
                    [(1, 1), (3, 1), (4, 2), (7, 3), (10, 4), (37, 9), (2 * TASK_BYTES / 4 / k / 64, 1)]
                {
                    let n = n.max(1);
                    let w = weights(&mut rng, format, n, k);
                    let x = rng.f32s(m * k);
                    let want = specification(format, &w, n, k, &x, m);
                    for level in Level::available() {
                        for pool in &pools {
                            let stride = n + 3;
                            let mut y = vec![7.0; m * stride];
                            linear_at(level, format, &w, n, k, &x, m, &mut y, stride, pool);
                            for (m, y) in y.chunks(stride).enumerate() {
                                assert_eq!(
                                    bits(&y[..n]),
                                    bits(&want[m * n..(m + 1) * n]),
                                    "{} {level:?}: row {m} of {m}x{n}x{k}",
                                    format.name()
                                );
                                assert_eq!(y[n..], [7.0; 3]);
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn several_tasks_agree_with_one() {
        let mut rng = Rng(4);
        let (n, k, m) = (2001, 256, 3);
        let w = weights(&mut rng, DenseFormat::F32, n, k);
        let x = rng.f32s(m * k);
        let want = specification(DenseFormat::F32, &w, n, k, &x, m);
        for threads in [1, 2, 3] {
            let mut y = vec![0.0; m * n];
            linear(DenseFormat::F32, &w, n, k, &x, m, &mut y, n, &Pool::new(threads).unwrap());
            assert_eq!(bits(&y), bits(&want));
        }
    }

    #[test]
    fn close_to_double_precision() {
        let mut rng = Rng(5);
        let (n, k) = (64, 2560);
        for format in DenseFormat::ALL {
            let w = weights(&mut rng, format, n, k);
            let x = rng.f32s(k);
            let mut y = vec![0.0; n];
            linear(format, &w, n, k, &x, 1, &mut y, n, &Pool::new(1).unwrap());
            let mut row = vec![0.0; k];
            for (y, w) in y.iter().zip(w.chunks(format.row_bytes(k).unwrap())) {
                format.decode_row(w, &mut row).unwrap();
                let products = || row.iter().zip(&x).map(|(&w, &x)| f64::from(w) * f64::from(x));
                let (want, size) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
                // A lane adds 160 products and the tree 4 times; in fact the error is far smaller.
                assert!((f64::from(*y) - want).abs() <= 1e-6 * size, "{}: {y} {want}", format.name());
            }
        }
    }

    #[test]
    fn special_values_of_blocks() {
        // Extreme scales and codes, negative scales, subnormal halves: arbitrary bytes with a finite d.
        let mut rng = Rng(6);
        let pool = Pool::new(1).unwrap();
        for (format, d_at) in [(DenseFormat::Q8_0, 0), (DenseFormat::Q4_0, 0), (DenseFormat::Q6_K, 208)] {
            let (n, k) = (16, 512);
            let mut w = rng.bytes(n * format.row_bytes(k).unwrap());
            for block in w.chunks_mut(format.block_bytes()) {
                if block[d_at + 1] & 0x7c == 0x7c {
                    block[d_at + 1] &= 0x83;
                }
            }
            let x = rng.f32s(k);
            let want = specification(format, &w, n, k, &x, 1);
            for level in Level::available() {
                let mut y = vec![0.0; n];
                linear_at(level, format, &w, n, k, &x, 1, &mut y, n, &pool);
                assert_eq!(bits(&y), bits(&want), "{} {level:?}", format.name());
            }
        }
    }

    #[test]
    fn gathered_rows_are_decoded_rows() {
        let mut rng = Rng(7);
        let (n, k) = (9, 256);
        for format in DenseFormat::ALL {
            let w = weights(&mut rng, format, n, k);
            let ids = [8, 0, 3, 3];
            let mut y = vec![0.0; ids.len() * k];
            gather_rows(format, &w, k, &ids, &mut y);
            let bytes = format.row_bytes(k).unwrap();
            for (&id, y) in ids.iter().zip(y.chunks(k)) {
                let mut row = vec![0.0; k];
                format.decode_row(&w[id as usize * bytes..][..bytes], &mut row).unwrap();
                assert_eq!(bits(y), bits(&row));
            }
        }
    }
}
