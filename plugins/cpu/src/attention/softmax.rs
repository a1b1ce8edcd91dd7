//! The softmax of a tile, its weighted values, and how tiles are merged.

use std::ops::Range;

use super::cache::{Cache, Elements};
use crate::simd::{Isa, LANES, exp};

/// Replaces the `seen` (at least one) of a tile's scores by exp(score - m) and returns m, their
/// maximum, and the sum.
#[inline(always)]
pub(super) fn softmax<I: Isa>(isa: I, scores: &mut [f32], seen: Range<usize>) -> (f32, f32) {
    let (start, padded) = (seen.start / LANES * LANES, seen.end.next_multiple_of(LANES));
    scores[start..seen.start].fill(f32::NEG_INFINITY);
    scores[seen.end..padded].fill(f32::NEG_INFINITY);
    let (scores, _) = scores[start..padded].as_chunks_mut::<LANES>();
    let mut max = [f32::NEG_INFINITY; LANES];
    for scores in scores.iter() {
        for l in 0..LANES {
            max[l] = if scores[l] > max[l] { scores[l] } else { max[l] };
        }
    }
    let m = max.into_iter().fold(f32::NEG_INFINITY, |m, v| if v > m { v } else { m });
    let mut sum = isa.splat(0.0);
    for scores in scores {
        for score in scores.iter_mut() {
            *score = exp(isa, *score - m);
        }
        // The padding's zeros change no sum.
        sum = isa.add(sum, isa.load(scores));
    }
    (m, isa.sum(sum))
}

/// Adds each query's weighted values, of the rows from `start` on, to its sums: of query i,
/// `sums[i * stride..]`, a whole number of vectors. Meanwhile as many rows of `next` are asked for, in the order
/// in which they lie, which is what the hardware's own prefetching goes by.
#[allow(clippy::too_many_arguments)]
#[inline(always)]
pub(super) fn weigh<I: Isa, V: Cache, const Q: usize>(
    isa: I,
    p: [&[f32]; Q],
    values: V,
    start: usize,
    head_dim: usize,
    sums: &mut [f32],
    stride: usize,
    next: Option<(V, usize)>,
) {
    let mut at = 0;
    while I::WIDE && at + 4 * LANES <= head_dim {
        weigh_by::<I, V, Q, 4>(isa, p, values, start, head_dim, at, sums, stride, next);
        at += 4 * LANES;
    }
    while !I::WIDE && at + 2 * LANES <= head_dim {
        weigh_by::<I, V, Q, 2>(isa, p, values, start, head_dim, at, sums, stride, next);
        at += 2 * LANES;
    }
    while at < head_dim {
        weigh_by::<I, V, Q, 1>(isa, p, values, start, head_dim, at, sums, stride, next);
        at += LANES;
    }
}

/// [`weigh`] for D vectors of elements from `at` on; the last one may be partial if D is 1.
#[allow(clippy::too_many_arguments)]
#[inline(always)]
fn weigh_by<I: Isa, V: Cache, const Q: usize, const D: usize>(
    isa: I,
    p: [&[f32]; Q],
    values: V,
    start: usize,
    head_dim: usize,
    at: usize,
    sums: &mut [f32],
    stride: usize,
    next: Option<(V, usize)>,
) {
    let mut acc = [[isa.splat(0.0); D]; Q];
    for n in 0..Q {
        for d in 0..D {
            acc[n][d] =
                isa.load(sums[n * stride + at + d * LANES..].first_chunk().expect("a vector of sums"));
        }
    }
    let count = p[0].len();
    let p = p.map(|p| &p[..count]);
    for i in 0..count {
        if let Some((next, row)) = next {
            let from = at * count + i * D * LANES;
            next.ahead(isa, row, head_dim, from, from + D * LANES);
        }
        let value = values.row(start + i, head_dim);
        let mut v = [isa.splat(0.0); D];
        if D > 1 || at + LANES <= head_dim {
            let value = value.part(at, D * LANES);
            for (d, v) in v.iter_mut().enumerate() {
                *v = value.load(isa, d * LANES);
            }
        } else {
            v[0] = value.load_last(isa, at);
        }
        for n in 0..Q {
            let p = isa.splat(p[n][i]);
            for d in 0..D {
                acc[n][d] = isa.fma(p, v[d], acc[n][d]);
            }
        }
    }
    for n in 0..Q {
        for d in 0..D {
            let to = sums[n * stride + at + d * LANES..].first_chunk_mut().expect("a vector of sums");
            isa.store(acc[n][d], to);
        }
    }
}

/// Merges a later tile into the state; both are a head's sums (padded to whole vectors), then m and l.
#[inline(always)]
pub(super) fn merge<I: Isa>(isa: I, state: &mut [f32], part: &[f32]) {
    let padded = state.len() - 2;
    let (sums, ml) = state.split_at_mut(padded);
    let (part, [tile_m, tile_l]) = (&part[..padded], [part[padded], part[padded + 1]]);
    let m = if tile_m > ml[0] { tile_m } else { ml[0] };
    let (c, d) = (exp(isa, ml[0] - m), exp(isa, tile_m - m));
    ml[0] = m;
    ml[1] = isa.fma1(tile_l, d, ml[1] * c);
    let (c, d) = (isa.splat(c), isa.splat(d));
    for (sum, part) in sums.as_chunks_mut().0.iter_mut().zip(part.as_chunks().0) {
        isa.store(isa.fma(isa.load(part), d, isa.mul(isa.load(sum), c)), sum);
    }
}

/// Divides the sums by l.
#[inline(always)]
pub(super) fn finish(state: &[f32], out: &mut [f32]) {
    let l = state[state.len() - 1];
    for (out, sum) in out.iter_mut().zip(state) {
        *out = sum / l;
    }
}
