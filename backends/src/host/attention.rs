//! Causal attention with grouped queries over a KV cache, and writing to the cache.
//!
//! out[r, h] = sum over positions p <= first + r of softmax(scale * q[r, h] . k[p]) v[p], where query head h
//! reads kv head h / (heads / kv heads).
//!
//! # Order of computation
//! The softmax is taken in f32 over tiles of [`TILE`] positions that begin at absolute multiples of it, so
//! that it does not depend on how a prompt is cut into chunks. For each (row, head) and tile:
//! - scores q.k by 16 lanes over the head's elements (see [`super`]), times `scale`;
//! - m their maximum, p = exp(score - m) by [`super::simd::exp`], l the sum of p by 16 lanes over the
//!   positions;
//! - for each element of the head, a = fma(p, v, a) over the positions in ascending order, from +0.
//!
//! The first tile is the state (m, l, a); each further one is merged into it in ascending order:
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
//! A single row does a few operations a byte, so its bound is reading the cache. What a step computes with was
//! asked for in the step before it: the values while the scores are computed, the next tile's keys while the
//! values are added. Otherwise each would wait for memory, and memory for each.

use std::cell::Cell;

use bitnet_burn_cpu::quantise::quantise_rows;
use bitnet_burn_manager::pool::Pool;
use half::f16;
use half::slice::HalfFloatSliceExt;

use super::simd::{Isa, Kernel, LANES, Level, exp};
use super::{Shared, rows_fit, run};

/// Positions in a tile of the softmax.
pub(crate) const TILE: usize = 256;

/// Positions whose keys are transposed together.
const RUN: usize = 64;

/// From so many (row, head) per kv head on, keys are transposed.
const TRANSPOSE_FROM: usize = 32;

/// The keys or the values of a sequence: [n_kv_heads][capacity][head_dim].
#[derive(Clone, Copy, Debug)]
pub(crate) enum CacheRef<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Half precision; computed with as the f32 of the same value.
    F16(&'a [f16]),
    /// int8 with a scale for each position and head: computed with as the f32 product.
    Int8 {
        /// [n_kv_heads][capacity][head_dim]
        codes: &'a [i8],
        /// [n_kv_heads][capacity]
        scale: &'a [f32],
    },
}

impl CacheRef<'_> {
    /// Panics if it is of another size than `shape`.
    fn check(&self, shape: Shape) {
        let positions = shape.n_kv_heads * shape.capacity;
        let (len, positions) = match self {
            Self::F32(c) => (c.len(), positions),
            Self::F16(c) => (c.len(), positions),
            Self::Int8 { codes, scale } => {
                assert_eq!(scale.len(), positions, "scales of the cache");
                (codes.len(), positions)
            }
        };
        assert_eq!(len, positions * shape.head_dim, "elements of the cache");
    }
}

/// [`CacheRef`] to write to.
#[derive(Debug)]
pub(crate) enum CacheMut<'a> {
    /// Single precision.
    F32(&'a mut [f32]),
    /// Half precision: rounded to nearest even, infinite beyond the range.
    F16(&'a mut [f16]),
    /// Quantised by absmax, as activations are: each element moves by at most half a step,
    /// max(absmax, 1e-5) / 254 of its position and head, give or take f32's rounding.
    Int8 {
        /// [n_kv_heads][capacity][head_dim]
        codes: &'a mut [i8],
        /// [n_kv_heads][capacity]: absmax / 127; NaN if an element is not finite.
        scale: &'a mut [f32],
    },
}

/// The shape of an attention.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
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
}

/// Writes `rows` rows of keys or values to the positions from `position` on.
///
/// # Arguments
/// * `cache`: [n_kv_heads][capacity][head_dim]
/// * `x`: rows of n_kv_heads * head_dim values, `x_stride` elements apart
///
/// # Panics
/// If the positions or the slices do not fit.
pub(crate) fn append(
    cache: CacheMut,
    shape: Shape,
    position: usize,
    rows: usize,
    x: &[f32],
    x_stride: usize,
) {
    let Shape { n_kv_heads, head_dim, capacity, .. } = shape;
    assert!(rows <= capacity && position <= capacity - rows, "{position}+{rows} positions of {capacity}");
    assert!(rows_fit(x.len(), rows, n_kv_heads * head_dim, x_stride), "{rows} rows in {} elements", x.len());
    let size = n_kv_heads * capacity * head_dim;
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
            assert_eq!((codes.len(), scale.len()), (size, n_kv_heads * capacity), "elements of the cache");
            pieces.for_each(|(to, x)| {
                let scale = &mut scale[to.start / head_dim..][..1];
                quantise_rows(x, head_dim, &mut codes[to], head_dim, scale, &mut [0]);
            });
        }
    }
}

/// Attention of `rows` rows of queries, of which row r is at position `first_position + r` and sees the
/// positions up to its own, over one sequence's cache.
///
/// # Arguments
/// * `q`: rows of n_heads * head_dim values, `q_stride` elements apart
/// * `keys`, `values`: the cache, which holds the positions before `first_position + rows`
/// * `out`: rows of n_heads * head_dim values, `out_stride` elements apart
///
/// # Panics
/// If the heads do not divide, the positions or the slices do not fit, or keys and values are of different types.
#[allow(clippy::too_many_arguments)]
pub(crate) fn attention(
    q: &[f32],
    q_stride: usize,
    rows: usize,
    keys: CacheRef,
    values: CacheRef,
    shape: Shape,
    first_position: usize,
    out: &mut [f32],
    out_stride: usize,
    pool: &Pool,
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
        pool,
    );
}

/// [`attention`] with a given instruction set.
#[allow(clippy::too_many_arguments)]
pub(crate) fn attention_at(
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
    pool: &Pool,
) {
    let Shape { n_heads, n_kv_heads, head_dim, capacity, .. } = shape;
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
    let width = n_heads * head_dim;
    assert!(rows_fit(q.len(), rows, width, q_stride), "{rows} rows of queries in {}", q.len());
    assert!(rows_fit(out.len(), rows, width, out_stride), "{rows} rows of results in {}", out.len());
    let call = Call { q, q_stride, rows, shape, first_position, out_stride };
    match (keys, values) {
        (CacheRef::F32(k), CacheRef::F32(v)) => call.over(level, k, v, out, pool),
        (CacheRef::F16(k), CacheRef::F16(v)) => call.over(level, k, v, out, pool),
        (CacheRef::Int8 { codes: k, scale: k_scale }, CacheRef::Int8 { codes: v, scale: v_scale }) => {
            call.over(level, Int8::new(k, k_scale), Int8::new(v, v_scale), out, pool);
        }
        _ => panic!("keys and values of different types"),
    }
}

/// A cache of some type.
trait Cache: Copy + Send + Sync {
    /// Elements of one position and head.
    type Row: Elements;
    /// The row `kv head * capacity + position`.
    fn row(self, row: usize, head_dim: usize) -> Self::Row;
    /// Prefetches the elements `from..to`, counted from that row's first; there need not be any.
    fn ahead<I: Isa>(self, isa: I, row: usize, head_dim: usize, from: usize, to: usize);
}

/// Some elements of a row.
trait Elements: Copy {
    /// The elements `from..from + len` of them.
    fn part(self, from: usize, len: usize) -> Self;
    /// Sixteen from `from` on.
    fn load<I: Isa>(self, isa: I, from: usize) -> I::F;
    /// The last ones, from `from` on: fewer than sixteen, and zeros.
    fn load_last<I: Isa>(self, isa: I, from: usize) -> I::F;
}

impl<'a> Cache for &'a [f32] {
    type Row = &'a [f32];
    #[inline(always)]
    fn row(self, row: usize, head_dim: usize) -> &'a [f32] {
        &self[row * head_dim..][..head_dim]
    }
    #[inline(always)]
    fn ahead<I: Isa>(self, isa: I, row: usize, head_dim: usize, from: usize, to: usize) {
        prefetch(isa, self, row * head_dim + from, to - from);
    }
}

impl Elements for &[f32] {
    #[inline(always)]
    fn part(self, from: usize, len: usize) -> Self {
        &self[from..from + len]
    }
    #[inline(always)]
    fn load<I: Isa>(self, isa: I, from: usize) -> I::F {
        isa.load(self[from..].first_chunk().expect("16 elements"))
    }
    #[inline(always)]
    fn load_last<I: Isa>(self, isa: I, from: usize) -> I::F {
        isa.load_first(&self[from..])
    }
}

impl<'a> Cache for &'a [f16] {
    type Row = &'a [f16];
    #[inline(always)]
    fn row(self, row: usize, head_dim: usize) -> &'a [f16] {
        &self[row * head_dim..][..head_dim]
    }
    #[inline(always)]
    fn ahead<I: Isa>(self, isa: I, row: usize, head_dim: usize, from: usize, to: usize) {
        prefetch(isa, self, row * head_dim + from, to - from);
    }
}

impl Elements for &[f16] {
    #[inline(always)]
    fn part(self, from: usize, len: usize) -> Self {
        &self[from..from + len]
    }
    #[inline(always)]
    fn load<I: Isa>(self, isa: I, from: usize) -> I::F {
        isa.load_f16(self[from..].first_chunk().expect("16 elements"))
    }
    #[inline(always)]
    fn load_last<I: Isa>(self, isa: I, from: usize) -> I::F {
        let mut all = [f16::ZERO; LANES];
        all[..self.len() - from].copy_from_slice(&self[from..]);
        isa.load_f16(&all)
    }
}

/// An int8 cache, or elements of one of its rows.
#[derive(Clone, Copy)]
struct Int8<'a, S> {
    codes: &'a [u8],
    scale: S,
}

impl<'a> Int8<'a, &'a [f32]> {
    fn new(codes: &'a [i8], scale: &'a [f32]) -> Self {
        Self { codes: bytemuck::cast_slice(codes), scale }
    }
}

impl<'a> Cache for Int8<'a, &'a [f32]> {
    type Row = Int8<'a, f32>;
    #[inline(always)]
    fn row(self, row: usize, head_dim: usize) -> Int8<'a, f32> {
        Int8 { codes: &self.codes[row * head_dim..][..head_dim], scale: self.scale[row] }
    }
    #[inline(always)]
    fn ahead<I: Isa>(self, isa: I, row: usize, head_dim: usize, from: usize, to: usize) {
        prefetch(isa, self.codes, row * head_dim + from, to - from);
        // The scales are few, and lie one behind the other.
        prefetch(isa, self.scale, row, 1);
    }
}

impl Elements for Int8<'_, f32> {
    #[inline(always)]
    fn part(self, from: usize, len: usize) -> Self {
        Self { codes: &self.codes[from..from + len], scale: self.scale }
    }
    #[inline(always)]
    fn load<I: Isa>(self, isa: I, from: usize) -> I::F {
        let codes = isa.i8_bytes(self.codes[from..].first_chunk().expect("16 elements"));
        isa.mul(codes, isa.splat(self.scale))
    }
    #[inline(always)]
    fn load_last<I: Isa>(self, isa: I, from: usize) -> I::F {
        let mut all = [0; LANES];
        all[..self.codes.len() - from].copy_from_slice(&self.codes[from..]);
        isa.mul(isa.i8_bytes(&all), isa.splat(self.scale))
    }
}

/// Asks for the lines of `count` elements from `from` on.
#[inline(always)]
fn prefetch<I: Isa, T>(isa: I, v: &[T], from: usize, count: usize) {
    let start = v.as_ptr().wrapping_add(from).cast::<u8>();
    for line in (0..count * size_of::<T>()).step_by(64) {
        isa.prefetch(start.wrapping_add(line));
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

    /// Number of positions that a row sees.
    #[inline(always)]
    fn seen(&self, row: usize) -> usize {
        self.first_position + row + 1
    }

    #[inline(always)]
    fn query(&self, row: usize, head: usize) -> &'a [f32] {
        &self.q[row * self.q_stride + head * self.shape.head_dim..][..self.shape.head_dim]
    }

    fn over<C: Cache>(self, level: Level, k: C, v: C, out: &mut [f32], pool: &Pool) {
        let Shape { n_heads, n_kv_heads, head_dim, .. } = self.shape;
        let last = self.seen(self.rows - 1);
        let out = &Shared::new(out);
        let parallel = n_heads * head_dim * self.rows * last >= 1 << 18;
        if self.rows * self.group() >= TRANSPOSE_FROM {
            // Blocks large enough that transposing does not show, and enough of them for all threads.
            let queries = if self.rows * n_heads >= 128 * 4 * pool.threads() { 128 } else { 64 };
            let block = (queries / self.group()).clamp(1, self.rows);
            let blocks = self.rows.div_ceil(block);
            run(pool, parallel, blocks * n_kv_heads, &|task| {
                // Late rows see more positions: they go first.
                let (from, kv_head) = ((blocks - 1 - task / n_kv_heads) * block, task % n_kv_heads);
                level.run(Block { call: self, from, to: (from + block).min(self.rows), kv_head, k, v, out });
            });
            return;
        }
        let padded = head_dim.next_multiple_of(LANES);
        for row in 0..self.rows {
            let tiles = self.seen(row).div_ceil(TILE);
            // Per (kv head, tile, head of the group): the sums, then m and l.
            let mut parts = vec![0.0; tiles * n_heads * (padded + 2)];
            let shared = &Shared::new(&mut parts);
            // Runs of units, since each asks for the memory of the next.
            let units = n_kv_heads * tiles;
            let tasks = if pool.threads() == 1 { 1 } else { units.min(4 * pool.threads()) };
            run(pool, parallel, tasks, &|task| {
                let (from, to) = (units * task / tasks, units * (task + 1) / tasks);
                level.run(Row { call: self, row, tiles, from, to, k, v, parts: shared });
            });
            level.run(Merge { call: self, row, tiles, parts: &mut parts, out });
        }
    }
}

/// One row over the tiles `from..to` of all kv heads' tiles, for the heads of their groups.
struct Row<'a, C> {
    call: Call<'a>,
    row: usize,
    tiles: usize,
    from: usize,
    to: usize,
    k: C,
    v: C,
    parts: &'a Shared<'a, f32>,
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
    /// Row of the cache that a tile begins with.
    #[inline(always)]
    fn start(&self, unit: usize) -> usize {
        unit / self.tiles * self.call.shape.capacity + unit % self.tiles * TILE
    }

    /// H heads of the group from `head` on.
    #[inline(always)]
    fn heads<I: Isa, const H: usize>(&self, isa: I, unit: usize, head: usize) {
        let Shape { head_dim, scale, .. } = self.call.shape;
        let (kv_head, group) = (unit / self.tiles, self.call.group());
        let count = TILE.min(self.call.seen(self.row) - unit % self.tiles * TILE);
        let start = self.start(unit);
        let q: [&[f32]; H] = std::array::from_fn(|h| self.call.query(self.row, kv_head * group + head + h));
        let mut scores = [[0.0; TILE]; H];
        let mut p = 0;
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
            let (m, l) = softmax(isa, scores, count);
            part[width - 2] = m;
            part[width - 1] = l;
        }
        // Before the next keys, the rest of this tile's, if there are more heads to the group.
        let next = if head + H < group { start } else { self.start((unit + 1).min(self.to - 1)) };
        for from in (0..count).step_by(RUN) {
            let to = (from + RUN).min(count);
            let p: [&[f32]; H] = std::array::from_fn(|h| &scores[h][from..to]);
            let next = Some((self.k, next + from));
            weigh(isa, p, self.v, start + from, head_dim, parts, width, next);
        }
    }
}

/// Merges the tiles of one row.
struct Merge<'a> {
    call: Call<'a>,
    row: usize,
    tiles: usize,
    parts: &'a mut [f32],
    out: &'a Shared<'a, f32>,
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

thread_local! {
    /// Memory of a [`Block`], kept from one to the next (about half a megabyte, which would be new pages each
    /// time).
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Rows `from..to`, for the heads of one kv head.
struct Block<'a, C> {
    call: Call<'a>,
    from: usize,
    to: usize,
    kv_head: usize,
    k: C,
    v: C,
    out: &'a Shared<'a, f32>,
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
        let last = call.seen(self.to - 1);
        for tile in (0..last).step_by(TILE) {
            // The positions of the tile that a query sees: ascending with the row.
            let count = |query: usize| call.seen(row(query)).saturating_sub(tile).min(TILE);
            let positions = TILE.min(last - tile);
            for at in (0..positions).step_by(RUN) {
                let n = RUN.min(positions - at);
                transpose(isa, self.k, self.kv_head * capacity + tile + at, n, head_dim, transposed);
                // Rows that see nothing of the run stand in front.
                let mut query = (0..queries).find(|&query| count(query) > at).unwrap_or(queries);
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
            let first = (0..queries).find(|&query| count(query) > 0).unwrap_or(queries);
            for query in first..queries {
                let (m, l) = softmax(isa, &mut scores[query * TILE..][..TILE], count(query));
                part[query * width + padded] = m;
                part[query * width + padded + 1] = l;
            }
            for at in (0..positions).step_by(RUN) {
                let n = RUN.min(positions - at);
                widen(
                    isa,
                    self.v,
                    self.kv_head * capacity + tile + at,
                    head_dim,
                    &mut values[..n * head_dim],
                );
                let seen = |query: usize| count(query).saturating_sub(at).min(n);
                let mut query = (0..queries).find(|&query| seen(query) > 0).unwrap_or(queries);
                while query < queries {
                    // Four queries that see the same positions; others one by one.
                    let n = seen(query);
                    let p = |i: usize| &scores[(query + i) * TILE + at..][..n];
                    let (values, sums) = (&values[..n * head_dim], &mut part[query * width..]);
                    if queries - query >= 4 && seen(query + 3) == n {
                        weigh(isa, [p(0), p(1), p(2), p(3)], values, 0, head_dim, sums, width, None);
                        query += 4;
                    } else {
                        weigh(isa, [p(0)], values, 0, head_dim, sums, width, None);
                        query += 1;
                    }
                }
            }
            for query in first..queries {
                let (state, part) = (&mut state[query * width..][..width], &part[query * width..][..width]);
                if tile == 0 {
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

/// Replaces the first `count` (at least one) of a tile's scores by exp(score - m) and returns m, their
/// maximum, and the sum.
#[inline(always)]
fn softmax<I: Isa>(isa: I, scores: &mut [f32], count: usize) -> (f32, f32) {
    let padded = count.next_multiple_of(LANES);
    scores[count..padded].fill(f32::NEG_INFINITY);
    let (scores, _) = scores[..padded].as_chunks_mut::<LANES>();
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
fn weigh<I: Isa, V: Cache, const Q: usize>(
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
fn merge<I: Isa>(isa: I, state: &mut [f32], part: &[f32]) {
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
fn finish(state: &[f32], out: &mut [f32]) {
    let l = state[state.len() - 1];
    for (out, sum) in out.iter_mut().zip(state) {
        *out = sum / l;
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::tests::{Rng, bits};
    use super::*;

    struct Case {
        shape: Shape,
        k: Vec<f32>,
        v: Vec<f32>,
        q: Vec<f32>,
        q_stride: usize,
    }

    impl Case {
        /// A cache that holds `positions`, garbage behind them, and a query at each position.
        fn new(seed: u64, n_heads: usize, n_kv_heads: usize, head_dim: usize, positions: usize) -> Self {
            let mut rng = Rng(seed);
            let capacity = positions + 9;
            let scale = 1.0 / (head_dim as f32).sqrt();
            let shape = Shape { n_heads, n_kv_heads, head_dim, capacity, scale };
            let mut cache = || {
                let mut cache = vec![f32::NAN; n_kv_heads * capacity * head_dim];
                let x = rng.f32s(positions * n_kv_heads * head_dim);
                append(CacheMut::F32(&mut cache), shape, 0, positions, &x, n_kv_heads * head_dim);
                cache
            };
            let (k, v) = (cache(), cache());
            let q_stride = n_heads * head_dim + 5;
            let q = rng.f32s(positions * q_stride).into_iter().map(|q| q * 4.0).collect();
            Self { shape, k, v, q, q_stride }
        }

        fn run(&self, level: Level, rows: std::ops::Range<usize>, pool: &Pool) -> Vec<f32> {
            self.run_with(level, rows, pool, CacheRef::F32(&self.k), CacheRef::F32(&self.v))
        }

        fn run_with(
            &self,
            level: Level,
            rows: std::ops::Range<usize>,
            pool: &Pool,
            k: CacheRef,
            v: CacheRef,
        ) -> Vec<f32> {
            let width = self.shape.n_heads * self.shape.head_dim;
            let stride = width + 3;
            let mut out = vec![7.0; rows.len() * stride];
            let q = &self.q[rows.start * self.q_stride..];
            let n = rows.len();
            attention_at(level, q, self.q_stride, n, k, v, self.shape, rows.start, &mut out, stride, pool);
            assert!(out.chunks(stride).all(|row| row[width..] == [7.0; 3]));
            out.chunks(stride).flat_map(|row| &row[..width]).copied().collect()
        }

        fn in_f64(&self, row: usize) -> Vec<f64> {
            let Shape { n_heads, n_kv_heads, head_dim, capacity, scale } = self.shape;
            let mut out = Vec::new();
            for head in 0..n_heads {
                let q = &self.q[row * self.q_stride + head * head_dim..][..head_dim];
                let at = |p: usize| (head / (n_heads / n_kv_heads) * capacity + p) * head_dim;
                let scores: Vec<f64> = (0..=row)
                    .map(|p| {
                        let k = &self.k[at(p)..][..head_dim];
                        q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>()
                            * f64::from(scale)
                    })
                    .collect();
                let m = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let l: f64 = scores.iter().map(|s| (s - m).exp()).sum();
                for d in 0..head_dim {
                    let sum: f64 =
                        (0..=row).map(|p| (scores[p] - m).exp() * f64::from(self.v[at(p) + d])).sum();
                    out.push(sum / l);
                }
            }
            out
        }
    }

    const SHAPES: [(usize, usize, usize, usize); 6] = [
        (4, 1, 16, 70),
        (8, 2, 64, 300),
        (3, 3, 100, 140),
        (5, 1, 24, 530),
        (12, 2, 32, 257),
        (20, 5, 128, 66),
    ];

    #[test]
    fn close_to_double_precision() {
        let pool = Pool::new(2).unwrap();
        for (i, (heads, kv_heads, head_dim, positions)) in SHAPES.into_iter().enumerate() {
            let case = Case::new(i as u64, heads, kv_heads, head_dim, positions);
            let got = case.run(Level::best(), 0..positions, &pool);
            for row in [0, 1, 15, 63, 64, positions / 2, positions - 1] {
                for (got, want) in got[row * heads * head_dim..].iter().zip(case.in_f64(row)) {
                    assert!(
                        (f64::from(*got) - want).abs() < 2e-6,
                        "{heads}x{head_dim}, row {row}: {got} {want}"
                    );
                }
            }
        }
    }

    #[test]
    fn instruction_sets_threads_and_chunks_agree() {
        let pools = [1, 2, 3].map(|threads| Pool::new(threads).unwrap());
        for (i, (heads, kv_heads, head_dim, positions)) in SHAPES.into_iter().enumerate() {
            let case = Case::new(i as u64 + 50, heads, kv_heads, head_dim, positions);
            let want = bits(&case.run(Level::best(), 0..positions, &pools[0]));
            for level in Level::available() {
                for (pool, chunk) in pools.iter().zip([1, 7, 3]) {
                    let by_chunks: Vec<f32> = (0..positions)
                        .step_by(chunk)
                        .flat_map(|from| case.run(level, from..(from + chunk).min(positions), pool))
                        .collect();
                    assert!(bits(&by_chunks) == want, "{level:?}, chunks of {chunk}, {heads}x{head_dim}");
                }
                for (pool, chunk) in pools.iter().rev().zip([positions, 64, 41]) {
                    let by_chunks: Vec<f32> = (0..positions)
                        .step_by(chunk)
                        .flat_map(|from| case.run(level, from..(from + chunk).min(positions), pool))
                        .collect();
                    assert!(bits(&by_chunks) == want, "{level:?}, chunks of {chunk}, {heads}x{head_dim}");
                }
            }
        }
    }

    /// A cache and the f32 cache of its values give the same bits, by one call, by threads and in chunks.
    fn same_as_its_values(case: &Case, k: CacheRef, v: CacheRef, what: &str) {
        let positions = case.shape.capacity - 9;
        let pools = [1, 3].map(|threads| Pool::new(threads).unwrap());
        let want = bits(&case.run(Level::best(), 0..positions, &pools[0]));
        for level in Level::available() {
            assert!(bits(&case.run_with(level, 0..positions, &pools[1], k, v)) == want, "{what}, {level:?}");
            for (pool, chunk) in pools.iter().zip([1, 7]) {
                let by_chunks: Vec<f32> = (0..positions)
                    .step_by(chunk)
                    .flat_map(|from| case.run_with(level, from..(from + chunk).min(positions), pool, k, v))
                    .collect();
                assert!(bits(&by_chunks) == want, "{what}, {level:?}, chunks of {chunk}");
            }
        }
    }

    #[test]
    fn half_precision_is_the_same_computation_on_rounded_values() {
        for (i, (heads, kv_heads, head_dim, positions)) in SHAPES.into_iter().enumerate() {
            let mut case = Case::new(i as u64 + 90, heads, kv_heads, head_dim, positions);
            let round = |v: &[f32]| v.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>();
            let (k, v) = (round(&case.k), round(&case.v));
            case.k = k.iter().map(|k| k.to_f32()).collect();
            case.v = v.iter().map(|v| v.to_f32()).collect();
            let (k, v) = (CacheRef::F16(&k), CacheRef::F16(&v));
            same_as_its_values(&case, k, v, &format!("f16, {heads}x{head_dim}"));
        }
    }

    #[test]
    fn int8_is_the_same_computation_on_codes_times_scales() {
        for (i, (heads, kv_heads, head_dim, positions)) in SHAPES.into_iter().enumerate() {
            let mut case = Case::new(i as u64 + 130, heads, kv_heads, head_dim, positions);
            // Quantises the cache in place; what no position holds stays NaN.
            let shape = case.shape;
            let quantise = |values: &mut [f32]| {
                let mut codes = vec![77; values.len()];
                let mut scale = vec![f32::NAN; values.len() / head_dim];
                for position in 0..positions {
                    let heads = (0..kv_heads).map(|h| (h * shape.capacity + position) * head_dim);
                    let x: Vec<f32> = heads.flat_map(|at| values[at..at + head_dim].to_vec()).collect();
                    let cache = CacheMut::Int8 { codes: &mut codes, scale: &mut scale };
                    append(cache, shape, position, 1, &x, x.len());
                }
                for ((value, &code), row) in values.iter_mut().zip(&codes).zip(0..) {
                    *value = f32::from(code) * scale[row / head_dim];
                }
                (codes, scale)
            };
            let ((k, k_scale), (v, v_scale)) = (quantise(&mut case.k), quantise(&mut case.v));
            let k = CacheRef::Int8 { codes: &k, scale: &k_scale };
            let v = CacheRef::Int8 { codes: &v, scale: &v_scale };
            same_as_its_values(&case, k, v, &format!("int8, {heads}x{head_dim}"));
        }
    }

    #[test]
    fn appending_int8_keeps_a_scale_for_each_position_and_head() {
        let shape = Shape { n_heads: 2, n_kv_heads: 2, head_dim: 3, capacity: 4, scale: 1.0 };
        // [row][head][element]: of an absmax of 127 and of 254, of zeros, and with a value that is no number.
        let x = [127.0, -3.5, 2.5, 254.0, -127.0, 1.0, 0.0, 0.0, 0.0, f32::INFINITY, 1.0, 2.0];
        let (mut codes, mut scale) = ([9i8; 24], [9.0; 8]);
        append(CacheMut::Int8 { codes: &mut codes, scale: &mut scale }, shape, 1, 2, &x, 6);
        // Ties go to the even code; zeros have the smallest scale.
        assert_eq!(codes[..12], [9, 9, 9, 127, -4, 2, 0, 0, 0, 9, 9, 9]);
        assert_eq!(codes[12..18], [9, 9, 9, 127, -64, 0]);
        assert_eq!(codes[21..], [9, 9, 9]);
        assert_eq!((scale[..2].to_vec(), scale[3..6].to_vec()), (vec![9.0, 1.0], vec![9.0, 9.0, 2.0]));
        assert_eq!((scale[2], scale[7]), (1e-5 / 127.0, 9.0));
        assert!(scale[6].is_nan());
    }

    #[test]
    #[should_panic = "of different types"]
    fn keys_and_values_are_of_one_type() {
        let case = Case::new(1, 2, 1, 16, 3);
        let v = vec![f16::ZERO; case.v.len()];
        case.run_with(Level::best(), 0..3, &Pool::new(1).unwrap(), CacheRef::F32(&case.k), CacheRef::F16(&v));
    }

    #[test]
    fn appending_rounds_and_touches_nothing_else() {
        let shape = Shape { n_heads: 2, n_kv_heads: 2, head_dim: 3, capacity: 4, scale: 1.0 };
        let x = [1.0, 2.0, 3.0, 4.0, 5.0, 1e6, 0.0, 1.0 / 3.0, -2049.0, 8.0, 9.0, 1e-9, 2051.0, 11.0];
        let mut cache = [-1.0; 24];
        append(CacheMut::F32(&mut cache), shape, 1, 2, &x, 8);
        let untouched = [-1.0; 3];
        let want = [untouched, [1.0, 2.0, 3.0], [-2049.0, 8.0, 9.0], untouched];
        assert_eq!(cache[..12], want.concat());
        let want = [untouched, [4.0, 5.0, 1e6], [1e-9, 2051.0, 11.0], untouched];
        assert_eq!(cache[12..], want.concat());
        let mut halves = [f16::NEG_ONE; 24];
        append(CacheMut::F16(&mut halves), shape, 1, 2, &x, 8);
        for (half, cached) in halves.iter().zip(cache) {
            assert_eq!(*half, f16::from_f32(cached));
        }
        assert_eq!(halves[12 + 5], f16::INFINITY);
        assert_eq!((halves[6].to_f32(), halves[12 + 7].to_f32()), (-2048.0, 2052.0));
    }

    #[test]
    fn a_nan_stays_in_its_rows() {
        let pool = Pool::new(1).unwrap();
        let mut case = Case::new(7, 4, 2, 32, 40);
        case.q[20 * case.q_stride] = f32::NAN;
        let out = case.run(Level::best(), 0..40, &pool);
        for (row, out) in out.chunks(4 * 32).enumerate() {
            assert_eq!(out[..32].iter().all(|v| v.is_nan()), row == 20);
            assert!(out[32..].iter().all(|v| v.is_finite()));
        }
    }
}
