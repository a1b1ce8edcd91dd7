//! The loops over tiles, written once; an instruction set brings vectors of 16 lanes.
//!
//! Everything here is `#[inline(always)]`: it is compiled into the one function per instruction set that
//! carries `#[target_feature]`, and so with that function's instructions.

use bitnet_burn_formats::dense_tiles::{
    Q6_K_GROUP_BYTES, TILE_ROWS, TiledFormat, VECTOR_BYTES, q6_k_scales_at, q6_k_vectors_at,
};

use super::Row;

/// Bytes ahead to prefetch: what it takes to keep up with memory on one sequential stream.
const PREFETCH: usize = 2048;

/// An instruction set: 16 lanes of four bytes, of i32 and of f32, one for each row of a tile.
pub(super) trait Isa: Copy {
    /// Bytes, or i32.
    type V: Copy;
    /// f32.
    type F: Copy;
    /// What [`dot_signed`](Self::dot_signed) adds to the weights.
    const OFFSET: i32;
    /// Rows of activations side by side: as many as there are registers for, 2 or 4.
    const WIDTH: usize;

    fn load(self, from: &[u8; 64]) -> Self::V;
    /// The same i32, or four bytes, in each lane.
    fn splat(self, x: i32) -> Self::V;
    /// Bits 0..4 of each byte.
    fn low(self, v: Self::V) -> Self::V;
    /// Bits 4..8 of each byte.
    fn high(self, v: Self::V) -> Self::V;
    /// `low` with bits 2 * T and 2 * T + 1 of each byte of `two` as bits 4 and 5.
    fn six<const T: usize>(self, low: Self::V, two: Self::V) -> Self::V;
    /// `acc` plus the four products of a lane's codes up to 63 with a lane's signed bytes.
    fn dot(self, acc: Self::V, codes: Self::V, x: Self::V) -> Self::V;
    /// `acc` plus the four products of a lane's signed bytes, plus `OFFSET` each, with signed bytes that are
    /// not -128.
    fn dot_signed(self, acc: Self::V, w: Self::V, x: Self::V) -> Self::V;
    /// `acc + v * scales`, the scales being i8.
    fn add_scaled(self, acc: Self::V, v: Self::V, scales: &[u8; TILE_ROWS]) -> Self::V;
    /// +0 in each lane.
    fn zero(self) -> Self::F;
    /// `acc + (f32)sums * d`, each operation rounded, d being 16 halves.
    fn accumulate(self, acc: Self::F, sums: Self::V, d: &[u8; 2 * TILE_ROWS]) -> Self::F;
    /// `acc * scale`.
    fn finish(self, acc: Self::F, scale: f32) -> [f32; TILE_ROWS];

    /// Asks for the cache line at `p` (any address is allowed).
    #[inline(always)]
    fn prefetch(self, _p: *const u8) {}
}

/// Checked arguments of [`Level::products`](super::Level::products).
pub(super) struct Job<'a> {
    pub(super) format: TiledFormat,
    pub(super) tile: &'a [u8],
    pub(super) rows: &'a [Row<'a>],
    pub(super) y: &'a mut [[f32; TILE_ROWS]],
}

impl Job<'_> {
    #[inline(always)]
    pub(super) fn run<I: Isa>(self, isa: I) {
        match self.format {
            TiledFormat::Q8_0 => self.of_format::<I, Q8_0>(isa),
            TiledFormat::Q6_K => self.of_format::<I, Q6_K>(isa),
            TiledFormat::Q4_0 => self.of_format::<I, Q4_0>(isa),
        }
    }

    #[inline(always)]
    fn of_format<I: Isa, B: Blocks>(self, isa: I) {
        let Self { tile, rows, y, .. } = self;
        let width = if rows.len() == 1 { 1 } else { I::WIDTH };
        for (rows, y) in rows.chunks(width).zip(y.chunks_mut(width)) {
            match (rows, y) {
                ([a, b, c, d], y @ [..]) => y.copy_from_slice(&B::products(isa, tile, [a, b, c, d])),
                ([a, b, c], y @ [..]) => y.copy_from_slice(&B::products(isa, tile, [a, b, c, c])[..3]),
                ([a, b], y @ [..]) => y.copy_from_slice(&B::products(isa, tile, [a, b])),
                ([a], y @ [..]) => y.copy_from_slice(&B::products(isa, tile, [a])),
                _ => unreachable!("at most four rows are side by side"),
            }
        }
    }
}

/// A format's blocks.
trait Blocks {
    /// The results of a tile for C rows.
    fn products<I: Isa, const C: usize>(isa: I, tile: &[u8], rows: [&Row<'_>; C]) -> [[f32; TILE_ROWS]; C];
}

/// 64 bytes of a block, while those that come later are asked for.
#[inline(always)]
fn vector<I: Isa>(isa: I, block: &[u8], at: usize) -> I::V {
    let from: &[u8; 64] = block[at..].first_chunk().expect("within the block");
    isa.prefetch(from.as_ptr().wrapping_add(PREFETCH));
    isa.load(from)
}

/// Four activations, in each lane.
#[inline(always)]
fn four<I: Isa>(isa: I, q: &[i8], at: usize) -> I::V {
    let q: &[i8; 4] = q[at..].first_chunk().expect("within the block's activations");
    isa.splat(i32::from_le_bytes(q.map(|q| q as u8)))
}

#[inline(always)]
fn part<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block[at..].first_chunk().expect("within the block")
}

#[inline(always)]
fn finish<I: Isa, const C: usize>(isa: I, acc: [I::F; C], rows: [&Row<'_>; C]) -> [[f32; TILE_ROWS]; C] {
    let mut y = [[0.0; TILE_ROWS]; C];
    for c in 0..C {
        y[c] = isa.finish(acc[c], rows[c].scale);
    }
    y
}

#[allow(non_camel_case_types, reason = "the names are the formats'")]
struct Q8_0;
#[allow(non_camel_case_types, reason = "the names are the formats'")]
struct Q4_0;
#[allow(non_camel_case_types, reason = "the names are the formats'")]
struct Q6_K;

impl Blocks for Q8_0 {
    #[inline(always)]
    fn products<I: Isa, const C: usize>(isa: I, tile: &[u8], rows: [&Row<'_>; C]) -> [[f32; TILE_ROWS]; C] {
        let mut acc = [isa.zero(); C];
        let blocks = tile.as_chunks::<{ TiledFormat::Q8_0.block_bytes() }>().0;
        for (b, block) in blocks.iter().enumerate() {
            let q = rows.map(|row| part_of::<32, _>(row.q, b));
            let mut sums = [isa.splat(0); C];
            for c in 0..C {
                sums[c] = isa.splat(-I::OFFSET * rows[c].sums[b]);
            }
            for j in 0..8 {
                let w = vector(isa, block, VECTOR_BYTES * j);
                for c in 0..C {
                    sums[c] = isa.dot_signed(sums[c], w, four(isa, q[c], 4 * j));
                }
            }
            for c in 0..C {
                acc[c] = isa.accumulate(acc[c], sums[c], part(block, TiledFormat::Q8_0.halves_at()));
            }
        }
        finish(isa, acc, rows)
    }
}

impl Blocks for Q4_0 {
    #[inline(always)]
    fn products<I: Isa, const C: usize>(isa: I, tile: &[u8], rows: [&Row<'_>; C]) -> [[f32; TILE_ROWS]; C] {
        let mut acc = [isa.zero(); C];
        let blocks = tile.as_chunks::<{ TiledFormat::Q4_0.block_bytes() }>().0;
        for (b, block) in blocks.iter().enumerate() {
            let q = rows.map(|row| part_of::<32, _>(row.q, b));
            let mut sums = [isa.splat(0); C];
            for c in 0..C {
                sums[c] = isa.splat(-8 * rows[c].sums[b]);
            }
            for j in 0..4 {
                let w = vector(isa, block, VECTOR_BYTES * j);
                let (low, high) = (isa.low(w), isa.high(w));
                for c in 0..C {
                    sums[c] = isa.dot(sums[c], low, four(isa, q[c], 8 * j));
                    sums[c] = isa.dot(sums[c], high, four(isa, q[c], 8 * j + 4));
                }
            }
            for c in 0..C {
                acc[c] = isa.accumulate(acc[c], sums[c], part(block, TiledFormat::Q4_0.halves_at()));
            }
        }
        finish(isa, acc, rows)
    }
}

impl Blocks for Q6_K {
    #[inline(always)]
    fn products<I: Isa, const C: usize>(isa: I, tile: &[u8], rows: [&Row<'_>; C]) -> [[f32; TILE_ROWS]; C] {
        let mut acc = [isa.zero(); C];
        let blocks = tile.as_chunks::<{ TiledFormat::Q6_K.block_bytes() }>().0;
        for (b, block) in blocks.iter().enumerate() {
            let q = rows.map(|row| part_of::<256, _>(row.q, b));
            let offsets = rows.map(|row| part_of::<16, _>(row.sums, b));
            let mut sums = [isa.splat(0); C];
            for (group, bytes) in block.as_chunks::<Q6_K_GROUP_BYTES>().0.iter().enumerate() {
                isa.prefetch(bytes.as_ptr().wrapping_add(PREFETCH));
                for s in 0..4 {
                    let at = q6_k_vectors_at(s);
                    let first = vector(isa, bytes, at);
                    let second = vector(isa, bytes, at + VECTOR_BYTES);
                    let two = vector(isa, bytes, at + 2 * VECTOR_BYTES);
                    let codes = [
                        isa.six::<0>(isa.low(first), two),
                        isa.six::<1>(isa.high(first), two),
                        isa.six::<2>(isa.low(second), two),
                        isa.six::<3>(isa.high(second), two),
                    ];
                    for c in 0..C {
                        let mut sum = isa.splat(-32 * offsets[c][4 * group + s]);
                        for (t, &codes) in codes.iter().enumerate() {
                            sum = isa.dot(sum, codes, four(isa, q[c], 64 * group + 16 * s + 4 * t));
                        }
                        sums[c] = isa.add_scaled(sums[c], sum, part(bytes, q6_k_scales_at(s)));
                    }
                }
            }
            for c in 0..C {
                acc[c] = isa.accumulate(acc[c], sums[c], part(block, TiledFormat::Q6_K.halves_at()));
            }
        }
        finish(isa, acc, rows)
    }
}

/// The `N` elements of block `b`.
#[inline(always)]
fn part_of<const N: usize, T>(of: &[T], b: usize) -> &[T; N] {
    of[N * b..].first_chunk().expect("as many as the tile has blocks")
}
