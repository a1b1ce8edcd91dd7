//! KV caches of every type, as the loops over them read them.

use half::f16;

use super::Shape;
use crate::simd::{Isa, LANES};

/// The keys or the values of a sequence: `[n_kv_heads][capacity][head_dim]`.
#[derive(Clone, Copy, Debug)]
pub enum CacheRef<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Half precision; computed with as the f32 of the same value.
    F16(&'a [f16]),
    /// int8 with a scale for each position and head: computed with as the f32 product.
    Int8 {
        /// `[n_kv_heads][capacity][head_dim]`
        codes: &'a [i8],
        /// `[n_kv_heads][capacity]`
        scale: &'a [f32],
    },
}

impl CacheRef<'_> {
    /// Panics if it is of another size than `shape`.
    pub(super) fn check(&self, shape: Shape) {
        let (positions, size) = shape.cache();
        let len = match self {
            Self::F32(c) => c.len(),
            Self::F16(c) => c.len(),
            Self::Int8 { codes, scale } => {
                assert_eq!(scale.len(), positions, "scales of the cache");
                codes.len()
            }
        };
        assert_eq!(len, size, "elements of the cache");
    }
}

/// [`CacheRef`] to write to.
#[derive(Debug)]
pub enum CacheMut<'a> {
    /// Single precision.
    F32(&'a mut [f32]),
    /// Half precision: rounded to nearest even, infinite beyond the range.
    F16(&'a mut [f16]),
    /// Quantised by absmax, as activations are: each element moves by at most half a step,
    /// max(absmax, 1e-5) / 254 of its position and head, give or take f32's rounding.
    Int8 {
        /// `[n_kv_heads][capacity][head_dim]`
        codes: &'a mut [i8],
        /// `[n_kv_heads][capacity]`: absmax / 127; NaN if an element is not finite.
        scale: &'a mut [f32],
    },
}

/// A cache of some type.
pub(super) trait Cache: Copy + Send + Sync {
    /// Elements of one position and head.
    type Row: Elements;
    /// The row `kv head * capacity + position`.
    fn row(self, row: usize, head_dim: usize) -> Self::Row;
    /// Prefetches the elements `from..to`, counted from that row's first; there need not be any.
    fn ahead<I: Isa>(self, isa: I, row: usize, head_dim: usize, from: usize, to: usize);
}

/// Some elements of a row.
pub(super) trait Elements: Copy {
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
pub(super) struct Int8<'a, S> {
    pub(super) codes: &'a [u8],
    pub(super) scale: S,
}

impl<'a> Int8<'a, &'a [f32]> {
    pub(super) fn new(codes: &'a [i8], scale: &'a [f32]) -> Self {
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
