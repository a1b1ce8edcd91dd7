//! A few rows: keys and values are read where they lie, once for all heads of a group.

use std::ops::Range;

use super::cache::{Cache, Elements};
use super::softmax::{finish, merge, softmax, weigh};
use super::{Call, RUN, Shape, TILE};
use crate::simd::{Isa, Kernel, LANES};
use crate::threads::Shared;

/// One row over the tiles `from..to` of all kv heads' tiles, for the heads of their groups. The first tile is that of the
/// row's first position.
pub(super) struct Row<'a, C> {
    pub(super) call: Call<'a>,
    pub(super) row: usize,
    pub(super) tiles: usize,
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) k: C,
    pub(super) v: C,
    pub(super) parts: &'a Shared<'a, f32>,
}

impl<C: Cache> Kernel for Row<'_, C> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let group = self.call.group();
        for unit in self.from..self.to {
            let mut head = 0;
            while head + 4 <= group {
                self.heads::<I, 4>(isa, unit, head);
                head += 4;
            }
            while head < group {
                self.heads::<I, 1>(isa, unit, head);
                head += 1;
            }
        }
    }
}

impl<C: Cache> Row<'_, C> {
    /// The position that a tile begins with.
    #[inline(always)]
    fn position(&self, unit: usize) -> usize {
        (self.call.first(self.row) / TILE + unit % self.tiles) * TILE
    }

    /// Row of the cache that a tile begins with.
    #[inline(always)]
    fn start(&self, unit: usize) -> usize {
        unit / self.tiles * self.call.shape.capacity + self.position(unit)
    }

    /// H heads of the group from `head` on.
    #[inline(always)]
    fn heads<I: Isa, const H: usize>(&self, isa: I, unit: usize, head: usize) {
        let Shape { head_dim, scale, .. } = self.call.shape;
        let (kv_head, group) = (unit / self.tiles, self.call.group());
        let Range { start: first, end: count } = self.call.in_tile(self.row, self.position(unit));
        let start = self.start(unit);
        let q: [&[f32]; H] = std::array::from_fn(|h| self.call.query(self.row, kv_head * group + head + h));
        let mut scores = [[0.0; TILE]; H];
        let mut p = first;
        // Several keys at a time: they share the loads of the queries, and their chains overlap.
        while I::WIDE && H == 4 && p + 4 <= count {
            let keys = std::array::from_fn(|i| self.k.row(start + p + i, head_dim));
            for i in 0..4 {
                self.v.ahead(isa, start + p + i, head_dim, 0, head_dim);
            }
            let acc = products::<I, C::Row, H, 4>(isa, q, keys, head_dim);
            let mut all = [isa.splat(0.0); LANES];
            for (all, &acc) in all.iter_mut().zip(acc.as_flattened()) {
                *all = acc;
            }
            let mut sums = [0.0; LANES];
            isa.store(isa.mul(isa.sums(all), isa.splat(scale)), &mut sums);
            for h in 0..H {
                scores[h][p..p + 4].copy_from_slice(&sums[4 * h..][..4]);
            }
            p += 4;
        }
        while p < count {
            let keys =
                [self.k.row(start + p, head_dim), self.k.row(start + (p + 1).min(count - 1), head_dim)];
            for i in 0..2 {
                self.v.ahead(isa, start + p + i, head_dim, 0, head_dim);
            }
            let acc = products::<I, C::Row, H, 2>(isa, q, keys, head_dim);
            for h in 0..H {
                for i in 0..2.min(count - p) {
                    scores[h][p + i] = isa.sum(acc[h][i]) * scale;
                }
            }
            p += 2;
        }
        let width = head_dim.next_multiple_of(LANES) + 2;
        // SAFETY: this task alone writes the parts of its tiles, one group of heads at a time.
        let parts = unsafe { self.parts.part((unit * group + head) * width, H * width) };
        for (scores, part) in scores.iter_mut().zip(parts.chunks_exact_mut(width)) {
            let (m, l) = softmax(isa, scores, first..count);
            part[width - 2] = m;
            part[width - 1] = l;
        }
        // Before the next keys, the rest of this tile's, if there are more heads to the group.
        let next = if head + H < group { start } else { self.start((unit + 1).min(self.to - 1)) };
        for from in (first..count).step_by(RUN) {
            let to = (from + RUN).min(count);
            let p: [&[f32]; H] = std::array::from_fn(|h| &scores[h][from..to]);
            let next = Some((self.k, next + from));
            weigh(isa, p, self.v, start + from, head_dim, parts, width, next);
        }
    }
}

/// The dot products of H queries and P keys, before their lanes are added.
#[inline(always)]
fn products<I: Isa, K: Elements, const H: usize, const P: usize>(
    isa: I,
    q: [&[f32]; H],
    k: [K; P],
    head_dim: usize,
) -> [[I::F; P]; H] {
    let mut acc = [[isa.splat(0.0); P]; H];
    let q = q.map(|q| &q[..head_dim]);
    let mut at = 0;
    while at + LANES <= head_dim {
        let mut key = [isa.splat(0.0); P];
        for p in 0..P {
            key[p] = k[p].load(isa, at);
        }
        for h in 0..H {
            let query = isa.load(q[h][at..at + LANES].first_chunk().expect("16 elements"));
            for p in 0..P {
                acc[h][p] = isa.fma(query, key[p], acc[h][p]);
            }
        }
        at += LANES;
    }
    if at < head_dim {
        for h in 0..H {
            for p in 0..P {
                let (query, key) = (isa.load_first(&q[h][at..]), k[p].load_last(isa, at));
                acc[h][p] = isa.fma_first(head_dim - at, query, key, acc[h][p]);
            }
        }
    }
    acc
}

/// Merges the tiles of one row.
pub(super) struct Merge<'a> {
    pub(super) call: Call<'a>,
    pub(super) row: usize,
    pub(super) tiles: usize,
    pub(super) parts: &'a mut [f32],
    pub(super) out: &'a Shared<'a, f32>,
}

impl Kernel for Merge<'_> {
    type Out = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let head_dim = self.call.shape.head_dim;
        let width = head_dim.next_multiple_of(LANES) + 2;
        let group = self.call.group();
        for (kv_head, parts) in self.parts.chunks_exact_mut(self.tiles * group * width).enumerate() {
            let (first, others) = parts.split_at_mut(group * width);
            for (head, state) in first.chunks_exact_mut(width).enumerate() {
                for tile in others.chunks_exact(group * width) {
                    merge(isa, state, &tile[head * width..][..width]);
                }
                let to = self.row * self.call.out_stride + (kv_head * group + head) * head_dim;
                // SAFETY: the calling thread alone writes the results of a row, one head at a time.
                finish(state, unsafe { self.out.part(to, head_dim) });
            }
        }
    }
}
