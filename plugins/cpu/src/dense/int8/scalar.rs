//! Plain Rust.

use bitnet_burn_formats::dense_tiles::TILE_ROWS;

use super::generic::Isa;
use crate::simd::half_to_f32;

/// Plain Rust.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scalar;

/// The four bytes of a lane.
#[inline(always)]
fn bytes(lane: i32) -> [i8; 4] {
    lane.to_le_bytes().map(|b| b as i8)
}

#[inline(always)]
fn each(a: [i32; TILE_ROWS], b: [i32; TILE_ROWS], f: impl Fn(i32, i32) -> i32) -> [i32; TILE_ROWS] {
    let mut out = [0; TILE_ROWS];
    for r in 0..TILE_ROWS {
        out[r] = f(a[r], b[r]);
    }
    out
}

impl Isa for Scalar {
    type V = [i32; TILE_ROWS];
    type F = [f32; TILE_ROWS];
    const OFFSET: i32 = 0;
    const WIDTH: usize = 2;

    #[inline(always)]
    fn load(self, from: &[u8; 64]) -> [i32; TILE_ROWS] {
        let mut v = [0; TILE_ROWS];
        for (v, from) in v.iter_mut().zip(from.as_chunks().0) {
            *v = i32::from_le_bytes(*from);
        }
        v
    }
    #[inline(always)]
    fn splat(self, x: i32) -> [i32; TILE_ROWS] {
        [x; TILE_ROWS]
    }
    #[inline(always)]
    fn low(self, v: [i32; TILE_ROWS]) -> [i32; TILE_ROWS] {
        v.map(|v| v & 0x0f0f_0f0f)
    }
    #[inline(always)]
    fn high(self, v: [i32; TILE_ROWS]) -> [i32; TILE_ROWS] {
        v.map(|v| v >> 4 & 0x0f0f_0f0f)
    }
    #[inline(always)]
    fn six<const T: usize>(self, low: [i32; TILE_ROWS], two: [i32; TILE_ROWS]) -> [i32; TILE_ROWS] {
        each(low, two, |low, two| low | (two >> (2 * T) & 0x0303_0303) << 4)
    }
    #[inline(always)]
    fn dot(self, acc: [i32; TILE_ROWS], codes: [i32; TILE_ROWS], x: [i32; TILE_ROWS]) -> [i32; TILE_ROWS] {
        self.dot_signed(acc, codes, x)
    }
    #[inline(always)]
    fn dot_signed(
        self,
        mut acc: [i32; TILE_ROWS],
        w: [i32; TILE_ROWS],
        x: [i32; TILE_ROWS],
    ) -> [i32; TILE_ROWS] {
        for r in 0..TILE_ROWS {
            for (w, x) in bytes(w[r]).into_iter().zip(bytes(x[r])) {
                acc[r] += i32::from(w) * i32::from(x);
            }
        }
        acc
    }
    #[inline(always)]
    fn add_scaled(
        self,
        mut acc: [i32; TILE_ROWS],
        v: [i32; TILE_ROWS],
        scales: &[u8; TILE_ROWS],
    ) -> [i32; TILE_ROWS] {
        for r in 0..TILE_ROWS {
            acc[r] += v[r] * i32::from(scales[r] as i8);
        }
        acc
    }
    #[inline(always)]
    fn zero(self) -> [f32; TILE_ROWS] {
        [0.0; TILE_ROWS]
    }
    #[inline(always)]
    fn accumulate(
        self,
        mut acc: [f32; TILE_ROWS],
        sums: [i32; TILE_ROWS],
        d: &[u8; 2 * TILE_ROWS],
    ) -> [f32; TILE_ROWS] {
        for ((acc, sum), d) in acc.iter_mut().zip(sums).zip(d.as_chunks().0) {
            *acc += sum as f32 * half_to_f32(u16::from_le_bytes(*d));
        }
        acc
    }
    #[inline(always)]
    fn finish(self, acc: [f32; TILE_ROWS], scale: f32) -> [f32; TILE_ROWS] {
        acc.map(|acc| acc * scale)
    }
}
