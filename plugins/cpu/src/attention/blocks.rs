//! Many rows: each run of keys is transposed, so that the lanes are positions.

use std::cell::Cell;
use std::ops::Range;

use super::cache::{Cache, Elements};
use super::softmax::{finish, merge, softmax, weigh};
use super::{Call, RUN, Shape, TILE};
use crate::simd::{Isa, Kernel, LANES};
use crate::threads::Shared;

thread_local! {
    /// Memory of a [`Block`], kept from one to the next (about half a megabyte, which would be new pages each
    /// time).
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Rows `from..to`, for the heads of one kv head.
pub(super) struct Block<'a, C> {
    pub(super) call: Call<'a>,
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) kv_head: usize,
    pub(super) k: C,
    pub(super) v: C,
    pub(super) out: &'a Shared<'a, f32>,
}

impl<C: Cache> Kernel for Block<'_, C> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let call = self.call;
        let Shape { head_dim, capacity, scale, .. } = call.shape;
        let (group, padded) = (call.group(), head_dim.next_multiple_of(LANES));
        let width = padded + 2;
        // Queries in the order of (row, head of the group).
        let queries = (self.to - self.from) * group;
        let row = |query: usize| self.from + query / group;
        let mut scratch = SCRATCH.take();
        let sizes = [head_dim * RUN, RUN * head_dim, queries * TILE, queries * width, queries * width];
        let total = sizes.iter().sum::<usize>() + queries * head_dim;
        if scratch.len() < total {
            scratch.resize(total, 0.0);
        }
        let (transposed, rest) = scratch.split_at_mut(sizes[0]);
        let (values, rest) = rest.split_at_mut(sizes[1]);
        let (scores, rest) = rest.split_at_mut(sizes[2]);
        let (part, rest) = rest.split_at_mut(sizes[3]);
        let (state, rest) = rest.split_at_mut(sizes[4]);
        let sorted = &mut rest[..queries * head_dim];
        let transposed = transposed.as_chunks_mut::<RUN>().0;
        let mut waiting = [[[isa.splat(0.0); 4]; 4]; 5];
        // The queries, their elements sorted by lane.
        let starts = lane_starts(head_dim);
        for (query, sorted) in sorted.chunks_exact_mut(head_dim).enumerate() {
            for (i, &q) in call.query(row(query), self.kv_head * group + query % group).iter().enumerate() {
                sorted[starts[i % LANES] + i / LANES] = q;
            }
        }
        let (first, last) = (call.first(self.from), call.seen(self.to - 1));
        for tile in (first / TILE * TILE..last).step_by(TILE) {
            // The positions of the tile that a query sees.
            let seen = |query: usize| call.in_tile(row(query), tile);
            // The queries that see some of the positions: the rows in front end before them, and the windows of the last ones
            // begin behind them.
            let seeing = |positions: Range<usize>| {
                let from = (0..queries).find(|&query| seen(query).end > positions.start).unwrap_or(queries);
                let to = (from..queries).find(|&query| seen(query).start >= positions.end).unwrap_or(queries);
                from..to
            };
            // Those of any query, from the beginning of a run.
            let positions = first.saturating_sub(tile) / RUN * RUN..TILE.min(last - tile);
            for at in positions.clone().step_by(RUN) {
                let n = RUN.min(positions.end - at);
                transpose(isa, self.k, self.kv_head * capacity + tile + at, n, head_dim, transposed);
                let Range { start: mut query, end: queries } = seeing(at..at + n);
                while query < queries {
                    let (q, scores) = (&sorted[query * head_dim..], &mut scores[query * TILE + at..]);
                    match queries - query {
                        4.. if I::WIDE => {
                            columns::<I, 4>(isa, q, transposed, scale, &mut waiting, scores);
                            query += 4;
                        }
                        2.. => {
                            columns::<I, 2>(isa, q, transposed, scale, &mut waiting, scores);
                            query += 2;
                        }
                        _ => {
                            columns::<I, 1>(isa, q, transposed, scale, &mut waiting, scores);
                            query += 1;
                        }
                    }
                }
            }
            part.fill(0.0);
            let all = seeing(0..TILE);
            for query in all.clone() {
                let (m, l) = softmax(isa, &mut scores[query * TILE..][..TILE], seen(query));
                part[query * width + padded] = m;
                part[query * width + padded + 1] = l;
            }
            for at in positions.clone().step_by(RUN) {
                let n = RUN.min(positions.end - at);
                widen(
                    isa,
                    self.v,
                    self.kv_head * capacity + tile + at,
                    head_dim,
                    &mut values[..n * head_dim],
                );
                let of_run = |query: usize| {
                    let Range { start, end } = seen(query);
                    start.saturating_sub(at).min(n)..end.saturating_sub(at).min(n)
                };
                let Range { start: mut query, end: queries } = seeing(at..at + n);
                while query < queries {
                    // Four queries that see the same positions; others one by one.
                    let Range { start, end } = of_run(query);
                    let p = |i: usize| &scores[(query + i) * TILE + at..][start..end];
                    let values = &values[start * head_dim..end * head_dim];
                    let sums = &mut part[query * width..];
                    if queries - query >= 4 && of_run(query + 3) == (start..end) {
                        weigh(isa, [p(0), p(1), p(2), p(3)], values, 0, head_dim, sums, width, None);
                        query += 4;
                    } else {
                        weigh(isa, [p(0)], values, 0, head_dim, sums, width, None);
                        query += 1;
                    }
                }
            }
            for query in all {
                let (state, part) = (&mut state[query * width..][..width], &part[query * width..][..width]);
                if tile == call.first(row(query)) / TILE * TILE {
                    state.copy_from_slice(part);
                } else {
                    merge(isa, state, part);
                }
            }
        }
        for (query, state) in state.chunks_exact(width).enumerate() {
            let head = self.kv_head * group + query % group;
            // SAFETY: this task alone writes the results of its rows and its kv head's heads, one at a time.
            let out = unsafe { self.out.part(row(query) * call.out_stride + head * head_dim, head_dim) };
            finish(state, out);
        }
        SCRATCH.set(scratch);
    }
}

/// The 16 lanes in the order in which the tree joins them: neighbours first, then neighbouring pairs, …
const ORDER: [usize; LANES] = [0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15];

/// Where the elements of each lane begin, if the elements of a head are sorted by lane in [`ORDER`]; by lane.
fn lane_starts(head_dim: usize) -> [usize; LANES] {
    let (mut starts, mut start) = ([0; LANES], 0);
    for lane in ORDER {
        starts[lane] = start;
        start += (head_dim + LANES - 1 - lane) / LANES;
    }
    starts
}

/// Writes the keys of up to [`RUN`] positions as [head_dim][RUN], the elements sorted by lane; what stands
/// for the positions after them is arbitrary.
#[inline(always)]
fn transpose<I: Isa, K: Cache>(
    isa: I,
    keys: K,
    start: usize,
    count: usize,
    head_dim: usize,
    to: &mut [[f32; RUN]],
) {
    let starts = lane_starts(head_dim);
    for block in (0..count).step_by(LANES) {
        for at in (0..head_dim).step_by(LANES) {
            let mut v = [isa.splat(0.0); LANES];
            for (i, v) in v.iter_mut().enumerate().take(count - block) {
                keys.ahead(isa, start + block + i + LANES, head_dim, at, at + 1);
                let key = keys.row(start + block + i, head_dim);
                *v = if at + LANES <= head_dim { key.load(isa, at) } else { key.load_last(isa, at) };
            }
            for (lane, v) in isa.transpose(v).into_iter().enumerate().take(head_dim - at) {
                let to = &mut to[starts[lane] + at / LANES][block..];
                isa.store(v, to.first_chunk_mut().expect("16 of 64 positions"));
            }
        }
    }
}

/// Writes rows of values as f32.
#[inline(always)]
fn widen<I: Isa, V: Cache>(isa: I, values: V, start: usize, head_dim: usize, to: &mut [f32]) {
    for (i, to) in to.chunks_exact_mut(head_dim).enumerate() {
        values.ahead(isa, start + i + LANES, head_dim, 0, head_dim);
        let row = values.row(start + i, head_dim);
        let (chunks, rest) = to.as_chunks_mut();
        let whole = chunks.len() * LANES;
        for (i, to) in chunks.iter_mut().enumerate() {
            isa.store(row.load(isa, i * LANES), to);
        }
        if !rest.is_empty() {
            let mut last = [0.0; LANES];
            isa.store(row.load_last(isa, whole), &mut last);
            rest.copy_from_slice(&last[..rest.len()]);
        }
    }
}

/// The scores of Q queries (sorted by lane, one after the other) for the [`RUN`] transposed positions; query
/// i's are written at `i * TILE`.
#[inline(always)]
fn columns<I: Isa, const Q: usize>(
    isa: I,
    q: &[f32],
    keys: &[[f32; RUN]],
    scale: f32,
    waiting: &mut Waiting<I>,
    scores: &mut [f32],
) {
    if I::WIDE {
        columns_by::<I, Q, 4>(isa, q, keys, scale, waiting, scores);
    } else {
        columns_by::<I, Q, 2>(isa, q, keys, scale, waiting, scores);
    }
}

/// Sums of 1, 2, 4, 8 lanes that wait for their other half, and last the whole; for up to 4 queries and 4
/// vectors.
type Waiting<I> = [[[<I as Isa>::F; 4]; 4]; 5];

/// [`columns`], P vectors of positions at a time.
#[inline(always)]
fn columns_by<I: Isa, const Q: usize, const P: usize>(
    isa: I,
    q: &[f32],
    keys: &[[f32; RUN]],
    scale: f32,
    waiting: &mut Waiting<I>,
    scores: &mut [f32],
) {
    let head_dim = keys.len();
    for from in (0..RUN).step_by(P * LANES) {
        let mut start = 0;
        for (step, &lane) in ORDER.iter().enumerate() {
            let end = start + (head_dim + LANES - 1 - lane) / LANES;
            let mut acc = [[isa.splat(0.0); P]; Q];
            let mut queries = [&q[..0]; Q];
            for n in 0..Q {
                queries[n] = &q[n * head_dim + start..][..end - start];
            }
            for (i, keys) in keys[start..end].iter().enumerate() {
                let mut k = [isa.splat(0.0); P];
                for p in 0..P {
                    k[p] = isa.load(keys[from + p * LANES..].first_chunk().expect("16 of 64 positions"));
                }
                for n in 0..Q {
                    let q = isa.splat(queries[n][i]);
                    for p in 0..P {
                        acc[n][p] = isa.fma(q, k[p], acc[n][p]);
                    }
                }
            }
            start = end;
            let level = step.trailing_ones() as usize;
            for waiting in &waiting[..level] {
                for n in 0..Q {
                    for p in 0..P {
                        acc[n][p] = isa.add(waiting[n][p], acc[n][p]);
                    }
                }
            }
            for n in 0..Q {
                waiting[level][n][..P].copy_from_slice(&acc[n]);
            }
        }
        for n in 0..Q {
            for p in 0..P {
                let to = scores[n * TILE + from + p * LANES..].first_chunk_mut().expect("16 of 64 positions");
                isa.store(isa.mul(waiting[4][n][p], isa.splat(scale)), to);
            }
        }
    }
}
