//! Plain Rust.

use super::generic::Isa;
use super::{ROWS, half_to_f32};

/// Plain Rust.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scalar;

/// The four bytes of a lane.
#[inline(always)]
fn bytes(lane: i32) -> [i8; 4] {
    lane.to_le_bytes().map(|b| b as i8)
}

#[inline(always)]
fn each(a: [i32; ROWS], b: [i32; ROWS], f: impl Fn(i32, i32) -> i32) -> [i32; ROWS] {
    let mut out = [0; ROWS];
    for r in 0..ROWS {
        out[r] = f(a[r], b[r]);
    }
    out
}

impl Isa for Scalar {
    type V = [i32; ROWS];
    type F = [f32; ROWS];
    const OFFSET: i32 = 0;
    const WIDTH: usize = 2;

    #[inline(always)]
    fn load(self, from: &[u8; 64]) -> [i32; ROWS] {
        let mut v = [0; ROWS];
        for (v, from) in v.iter_mut().zip(from.as_chunks().0) {
            *v = i32::from_le_bytes(*from);
        }
        v
    }
    #[inline(always)]
    fn splat(self, x: i32) -> [i32; ROWS] {
        [x; ROWS]
    }
    #[inline(always)]
    fn low(self, v: [i32; ROWS]) -> [i32; ROWS] {
        v.map(|v| v & 0x0f0f_0f0f)
    }
    #[inline(always)]
    fn high(self, v: [i32; ROWS]) -> [i32; ROWS] {
        v.map(|v| v >> 4 & 0x0f0f_0f0f)
    }
    #[inline(always)]
    fn six<const T: usize>(self, low: [i32; ROWS], two: [i32; ROWS]) -> [i32; ROWS] {
        each(low, two, |low, two| low | (two >> (2 * T) & 0x0303_0303) << 4)
    }
    #[inline(always)]
    fn dot(self, acc: [i32; ROWS], codes: [i32; ROWS], x: [i32; ROWS]) -> [i32; ROWS] {
        self.dot_signed(acc, codes, x)
    }
    #[inline(always)]
    fn dot_signed(self, mut acc: [i32; ROWS], w: [i32; ROWS], x: [i32; ROWS]) -> [i32; ROWS] {
        for r in 0..ROWS {
            for (w, x) in bytes(w[r]).into_iter().zip(bytes(x[r])) {
                acc[r] += i32::from(w) * i32::from(x);
            }
        }
        acc
    }
    #[inline(always)]
    fn add_scaled(self, mut acc: [i32; ROWS], v: [i32; ROWS], scales: &[u8; ROWS]) -> [i32; ROWS] {
        for r in 0..ROWS {
            acc[r] += v[r] * i32::from(scales[r] as i8);
        }
        acc
    }
    #[inline(always)]
    fn zero(self) -> [f32; ROWS] {
        [0.0; ROWS]
    }
    #[inline(always)]
    fn accumulate(self, mut acc: [f32; ROWS], sums: [i32; ROWS], d: &[u8; 2 * ROWS]) -> [f32; ROWS] {
        for ((acc, sum), d) in acc.iter_mut().zip(sums).zip(d.as_chunks().0) {
            *acc += sum as f32 * half_to_f32(u16::from_le_bytes(*d));
        }
        acc
    }
    #[inline(always)]
    fn finish(self, acc: [f32; ROWS], scale: f32) -> [f32; ROWS] {
        acc.map(|acc| acc * scale)
    }
}
