//! The dense linear layer, for lm_head and other layers that are not ternary: f32 activations times weights
//! in the format that their file stores.
//!
//! The weights are exactly the f32 values of [`DenseFormat::decode_row`]; they are decoded in registers, a
//! few rows at a time (and with many rows of activations, once for a block of them; rows of formats whose decoding is
//! long, always as a whole). With one row the layer
//! runs at the speed of memory, so what counts is that the weights are asked for early and in order: a tile
//! of four adjacent rows is one contiguous run of bytes, and while one tile is computed the next is
//! prefetched, at the same pace. Several rows are needed for their independent chains of multiply-adds: one
//! row's order of summation is fixed, see the numerics of [`simd`](crate::simd).

mod decode;
#[cfg(test)]
mod tests;

use std::cell::Cell;

use bitnet_burn_formats::DenseFormat;

use self::decode::{
    BF16, Decoded, Decoder, F16, F32, IQ4_NL, PQ2_0, PTQ1_0, Q2_0, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6K,
    Q8_0, TQ1_0, TQ2_0, decode_row,
};
use crate::simd::{Isa, Kernel, LANES, Level};
use crate::threads::{Shared, Threads, rows_fit, run};

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
pub fn linear(
    format: DenseFormat,
    w: &[u8],
    n: usize,
    k: usize,
    x: &[f32],
    m: usize,
    y: &mut [f32],
    y_stride: usize,
    threads: &dyn Threads,
) {
    linear_at(Level::best(), format, w, n, k, x, m, y, y_stride, threads);
}

/// [`linear`] with a given instruction set.
#[allow(clippy::too_many_arguments)]
fn linear_at(
    level: Level,
    format: DenseFormat,
    w: &[u8],
    n: usize,
    k: usize,
    x: &[f32],
    m: usize,
    y: &mut [f32],
    y_stride: usize,
    threads: &dyn Threads,
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
    run(threads, parallel, n.div_ceil(rows), &|task| {
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
pub fn gather_rows(format: DenseFormat, w: &[u8], k: usize, ids: &[u32], y: &mut [f32]) {
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
            DenseFormat::Q4_1 => self.decoded_by::<I, Q4_1, 2>(isa),
            DenseFormat::Q5_0 => self.decoded_by::<I, Q5_0, 2>(isa),
            DenseFormat::Q5_1 => self.decoded_by::<I, Q5_1, 2>(isa),
            DenseFormat::Q4_K => self.decoded_by::<I, Q4_K, 16>(isa),
            DenseFormat::Q5_K => self.decoded_by::<I, Q5_K, 16>(isa),
            DenseFormat::IQ4_NL => self.decoded_by::<I, IQ4_NL, 2>(isa),
            DenseFormat::Q2_0 => self.decoded_by::<I, Q2_0, 4>(isa),
            DenseFormat::PQ2_0 => self.decoded_by::<I, PQ2_0, 4>(isa),
            DenseFormat::PTQ1_0 => self.decoded_by::<I, PTQ1_0, 8>(isa),
            DenseFormat::TQ1_0 => self.decoded_by::<I, TQ1_0, 16>(isa),
            DenseFormat::TQ2_0 => self.decoded_by::<I, TQ2_0, 8>(isa),
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
        let blocked = D::ROW_FIRST || C > 1 && (D::DECODED_ONCE || self.m > C);
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
                if D::ROW_FIRST {
                    // Decoded below. (A constant by itself, for which no tile is compiled.)
                } else if !blocked {
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
