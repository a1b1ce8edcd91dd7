//! Causal attention with grouped queries over a KV cache, and writing to the cache.
//!
//! `out[r, h]` = sum over positions p <= first + r of `softmax(scale * q[r, h] . k[p]) v[p]`, where query head h
//! reads kv head h / (heads / kv heads). With a window of w positions the sum begins at first + r - w + 1.
//!
//! # Order of computation
//! The softmax is taken in f32 over tiles of 256 positions that begin at absolute multiples of 256, so
//! that it does not depend on how a prompt is cut into chunks. For each (row, head) and tile:
//! - scores q.k by 16 lanes over the head's elements (see [`simd`](crate::simd)), times `scale`; minus infinity before
//!   the window;
//! - m their maximum, p = exp(score - m) by `simd::exp`, l the sum of p by 16 lanes over the
//!   positions;
//! - for each element of the head, a = fma(p, v, a) over the positions in ascending order, from +0; not over those before
//!   the window.
//!
//! The first tile (with a window, that of the row's first position) is the state (m, l, a); each further one is merged into it in ascending order:
//! m' = max(m, m_tile), c = exp(m - m'), d = exp(m_tile - m'), l = fma(l_tile, d, l * c),
//! a = fma(a_tile, d, a * c). The result is a / l. Tiles are independent before the merge, so a single row over
//! a long cache occupies many threads. (This is the split of Flash-Decoding,
//! <https://crfm.stanford.edu/2023/10/12/flashdecoding.html>, at fixed places.)
//!
//! What a cache of another type holds is read as f32: a half as its value, an int8 as code * scale, one
//! rounded product. Nothing else depends on the type, so attention over such a cache is attention over the f32
//! cache of those values.
//!
//! There are two ways to the same bits: a few rows read keys and values where they lie, once for all heads of
//! a group; many rows transpose each run of keys, so that the lanes are positions and a score needs no sum
//! across lanes.
//!
//! # Memory
//! A single row does a few operations a byte, so its bound is reading the cache. Each step prefetches what
//! the next one reads: the values while the scores are computed, the next tile's keys while the values are added.
//! Otherwise computing and reading would take turns.

mod blocks;
mod cache;
mod rows;
mod softmax;
#[cfg(test)]
mod tests;

use std::ops::Range;

use half::slice::HalfFloatSliceExt;

use self::blocks::Block;
use self::cache::{Cache, Int8};
pub use self::cache::{CacheMut, CacheRef};
use self::rows::{Merge, Row};
use crate::quantise::quantise_rows;
use crate::simd::{LANES, Level};
use crate::threads::{Shared, Threads, rows_fit, run};

/// Positions in a tile of the softmax.
const TILE: usize = 256;

/// Positions whose keys are transposed together.
const RUN: usize = 64;

/// Keys are transposed for at least this many (row, head) per kv head.
const TRANSPOSE_FROM: usize = 32;

/// The shape of an attention.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Query heads, a multiple of `n_kv_heads`.
    pub n_heads: usize,
    /// Heads of the cache.
    pub n_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Positions that the cache has room for.
    pub capacity: usize,
    /// What scores are multiplied by: head_dim^-0.5.
    pub scale: f32,
    /// Positions that a row sees, up to its own; `None`: all of them.
    pub window: Option<usize>,
}

impl Shape {
    /// Positions of all heads of a cache, and its elements.
    ///
    /// # Panics
    /// If they are more than a machine can address.
    fn cache(self) -> (usize, usize) {
        let positions = self.n_kv_heads.checked_mul(self.capacity);
        let size = positions.and_then(|positions| positions.checked_mul(self.head_dim));
        positions.zip(size).unwrap_or_else(|| panic!("a cache of {self:?} exceeds the memory of any machine"))
    }

    /// Elements of a row of `heads` heads.
    ///
    /// # Panics
    /// If they are more than a machine can address.
    fn width(self, heads: usize) -> usize {
        let width = heads.checked_mul(self.head_dim);
        width
            .unwrap_or_else(|| panic!("a row of {heads} heads of {self:?} exceeds the memory of any machine"))
    }
}

/// Writes `rows` rows of keys or values to the positions from `position` on.
///
/// # Arguments
/// * `cache`: `[n_kv_heads][capacity][head_dim]`
/// * `x`: rows of n_kv_heads * head_dim values, `x_stride` elements apart
///
/// # Panics
/// If the positions or the slices do not fit.
pub fn append(cache: CacheMut, shape: Shape, position: usize, rows: usize, x: &[f32], x_stride: usize) {
    let Shape { n_kv_heads, head_dim, capacity, .. } = shape;
    assert!(rows <= capacity && position <= capacity - rows, "{position}+{rows} positions of {capacity}");
    let width = shape.width(n_kv_heads);
    assert!(rows_fit(x.len(), rows, width, x_stride), "{rows} rows in {} elements", x.len());
    let (positions, size) = shape.cache();
    let pieces = (0..rows).flat_map(|r| (0..n_kv_heads).map(move |h| (r, h))).map(|(r, h)| {
        let from = (h * capacity + position + r) * head_dim;
        (from..from + head_dim, &x[r * x_stride + h * head_dim..][..head_dim])
    });
    match cache {
        CacheMut::F32(cache) => {
            assert_eq!(cache.len(), size, "elements of the cache");
            pieces.for_each(|(to, x)| cache[to].copy_from_slice(x));
        }
        CacheMut::F16(cache) => {
            assert_eq!(cache.len(), size, "elements of the cache");
            pieces.for_each(|(to, x)| cache[to].convert_from_f32_slice(x));
        }
        CacheMut::Int8 { codes, scale } => {
            assert_eq!((codes.len(), scale.len()), (size, positions), "elements of the cache");
            pieces.for_each(|(to, x)| {
                let scale = &mut scale[to.start / head_dim..][..1];
                quantise_rows(x, head_dim, &mut codes[to], head_dim, scale, &mut [0]);
            });
        }
    }
}

/// Attention of `rows` rows of queries, of which row r is at position `first_position + r` and sees the
/// positions up to its own (of those, the last ones that its window has room for), over one sequence's cache.
///
/// # Arguments
/// * `q`: rows of n_heads * head_dim values, `q_stride` elements apart
/// * `keys`, `values`: the cache, which holds the positions before `first_position + rows`
/// * `out`: rows of n_heads * head_dim values, `out_stride` elements apart
///
/// # Panics
/// If the heads do not divide, the positions or the slices do not fit, the window has no position, or keys and values are
/// of different types.
#[allow(clippy::too_many_arguments)]
pub fn attention(
    q: &[f32],
    q_stride: usize,
    rows: usize,
    keys: CacheRef,
    values: CacheRef,
    shape: Shape,
    first_position: usize,
    out: &mut [f32],
    out_stride: usize,
    threads: &dyn Threads,
) {
    attention_at(
        Level::best(),
        q,
        q_stride,
        rows,
        keys,
        values,
        shape,
        first_position,
        out,
        out_stride,
        threads,
    );
}

/// [`attention`] with a given instruction set.
#[allow(clippy::too_many_arguments)]
fn attention_at(
    level: Level,
    q: &[f32],
    q_stride: usize,
    rows: usize,
    keys: CacheRef,
    values: CacheRef,
    shape: Shape,
    first_position: usize,
    out: &mut [f32],
    out_stride: usize,
    threads: &dyn Threads,
) {
    let Shape { n_heads, n_kv_heads, head_dim, capacity, window, .. } = shape;
    assert!(window != Some(0), "a window of no positions");
    if rows == 0 || n_heads == 0 || head_dim == 0 {
        return;
    }
    assert!(n_kv_heads > 0 && n_heads.is_multiple_of(n_kv_heads), "{n_heads} heads over {n_kv_heads}");
    assert!(
        rows <= capacity && first_position <= capacity - rows,
        "{first_position}+{rows} positions of {capacity}"
    );
    keys.check(shape);
    values.check(shape);
    let width = shape.width(n_heads);
    assert!(rows_fit(q.len(), rows, width, q_stride), "{rows} rows of queries in {}", q.len());
    assert!(rows_fit(out.len(), rows, width, out_stride), "{rows} rows of results in {}", out.len());
    let call = Call { q, q_stride, rows, shape, first_position, out_stride };
    match (keys, values) {
        (CacheRef::F32(k), CacheRef::F32(v)) => call.over(level, k, v, out, threads),
        (CacheRef::F16(k), CacheRef::F16(v)) => call.over(level, k, v, out, threads),
        (CacheRef::Int8 { codes: k, scale: k_scale }, CacheRef::Int8 { codes: v, scale: v_scale }) => {
            call.over(level, Int8::new(k, k_scale), Int8::new(v, v_scale), out, threads);
        }
        _ => panic!("keys and values of different types"),
    }
}

/// The arguments of a call that do not depend on the cache's type.
#[derive(Clone, Copy)]
struct Call<'a> {
    q: &'a [f32],
    q_stride: usize,
    rows: usize,
    shape: Shape,
    first_position: usize,
    out_stride: usize,
}

impl<'a> Call<'a> {
    fn group(&self) -> usize {
        self.shape.n_heads / self.shape.n_kv_heads
    }

    /// The end of the positions that a row sees.
    #[inline(always)]
    fn seen(&self, row: usize) -> usize {
        self.first_position + row + 1
    }

    /// The first position that a row sees.
    #[inline(always)]
    fn first(&self, row: usize) -> usize {
        self.shape.window.map_or(0, |window| self.seen(row).saturating_sub(window))
    }

    /// The positions of the tile that begins at `tile` that a row sees, counted from there; empty (though perhaps not
    /// `0..0`) if it sees none. Both ends ascend with the row.
    #[inline(always)]
    fn in_tile(&self, row: usize, tile: usize) -> Range<usize> {
        self.first(row).saturating_sub(tile).min(TILE)..self.seen(row).saturating_sub(tile).min(TILE)
    }

    #[inline(always)]
    fn query(&self, row: usize, head: usize) -> &'a [f32] {
        &self.q[row * self.q_stride + head * self.shape.head_dim..][..self.shape.head_dim]
    }

    fn over<C: Cache>(self, level: Level, k: C, v: C, out: &mut [f32], threads: &dyn Threads) {
        let Shape { n_heads, n_kv_heads, head_dim, .. } = self.shape;
        let last = self.rows - 1;
        let most = self.seen(last) - self.first(last);
        let out = &Shared::new(out);
        let parallel = n_heads * head_dim * self.rows * most >= 1 << 18;
        if self.rows * self.group() >= TRANSPOSE_FROM {
            // Blocks large enough that transposing does not show, and enough of them for all threads.
            let queries = if self.rows * n_heads >= 128 * 4 * threads.threads() { 128 } else { 64 };
            let block = (queries / self.group()).clamp(1, self.rows);
            let blocks = self.rows.div_ceil(block);
            run(threads, parallel, blocks * n_kv_heads, &|task| {
                // Late rows see more positions: they go first.
                let (from, kv_head) = ((blocks - 1 - task / n_kv_heads) * block, task % n_kv_heads);
                level.run(Block { call: self, from, to: (from + block).min(self.rows), kv_head, k, v, out });
            });
            return;
        }
        let padded = head_dim.next_multiple_of(LANES);
        for row in 0..self.rows {
            let tiles = self.seen(row).div_ceil(TILE) - self.first(row) / TILE;
            // Per (kv head, tile, head of the group): the sums, then m and l.
            let mut parts = vec![0.0; tiles * n_heads * (padded + 2)];
            let shared = &Shared::new(&mut parts);
            // Runs of units, since each asks for the memory of the next.
            let units = n_kv_heads * tiles;
            let tasks = if threads.threads() == 1 { 1 } else { units.min(4 * threads.threads()) };
            run(threads, parallel, tasks, &|task| {
                let (from, to) = (units * task / tasks, units * (task + 1) / tasks);
                level.run(Row { call: self, row, tiles, from, to, k, v, parts: shared });
            });
            level.run(Merge { call: self, row, tiles, parts: &mut parts, out });
        }
    }
}
