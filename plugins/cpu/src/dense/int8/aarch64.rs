//! Four vectors of 128 bits for 16 lanes: NEON, with the dot-product extension or without. Little-endian only.

use std::arch::aarch64::*;
use std::arch::asm;

use bitnet_burn_formats::dense_tiles::TILE_ROWS;
use bitnet_burn_plugin::features::{self, Features};

use super::generic::{Isa, Job};
use crate::simd::half_to_f32;

/// Calls an intrinsic inside a method of a token.
macro_rules! by_token {
    ($($body:tt)*) => {
        // SAFETY: `self` is or has a token, which only `new` makes, after detecting the instructions; memory
        // is reached through references to arrays of the size that is read or written.
        unsafe { $($body)* }
    };
}

/// Proof that the CPU has the dot-product extension, and NEON.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dotprod(());

/// Proof that the CPU has NEON.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plain(());

/// NEON, with the multiply-adds of `D`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Neon<D>(D);

impl Dotprod {
    pub(super) fn new() -> Option<Neon<Self>> {
        const NEEDED: Features = Features::of("neon,dotprod");
        features::has(NEEDED).then_some(Neon(Self(())))
    }
}

impl Plain {
    pub(super) fn new() -> Option<Neon<Self>> {
        const NEEDED: Features = Features::of("neon");
        features::has(NEEDED).then_some(Neon(Self(())))
    }
}

pub(super) fn run_dotprod(isa: Neon<Dotprod>, job: Job<'_>) {
    #[target_feature(enable = "neon,dotprod")]
    fn compiled(isa: Neon<Dotprod>, job: Job<'_>) {
        job.run(isa);
    }
    // SAFETY: the token proves that the CPU has the instructions.
    unsafe { compiled(isa, job) }
}

pub(super) fn run_neon(isa: Neon<Plain>, job: Job<'_>) {
    #[target_feature(enable = "neon")]
    fn compiled(isa: Neon<Plain>, job: Job<'_>) {
        job.run(isa);
    }
    // SAFETY: the token proves that the CPU has the instructions.
    unsafe { compiled(isa, job) }
}

/// Sums of four products of signed bytes.
pub(super) trait Dot: Copy {
    /// `acc` plus the products of each lane's bytes.
    fn dot(self, acc: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t;
}

impl Dot for Dotprod {
    #[inline(always)]
    fn dot(self, acc: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        by_token!(sdot(acc, w, x))
    }
}

#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot(acc: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    let mut sum = acc;
    // SAFETY: the CPU has the instruction, and it does nothing but compute `sum`.
    unsafe {
        asm!(
            "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
            inout(vreg) sum, in(vreg) w, in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

impl Dot for Plain {
    /// A pair of products is at most 2 * 128 * 127 < 2^15, since no activation is -128.
    #[inline(always)]
    fn dot(self, acc: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        by_token!({
            let low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
            let high = vmull_high_s8(w, x);
            // Pairs in 16 bits, then pairs of pairs in 32.
            vpadalq_s16(acc, vpaddq_s16(low, high))
        })
    }
}

/// Bytes as `Isa` passes them: in registers of i32.
#[inline(always)]
fn bytes(v: int32x4_t) -> uint8x16_t {
    // SAFETY: NEON is part of the targets that this is compiled for.
    unsafe { vreinterpretq_u8_s32(v) }
}

#[inline(always)]
fn lanes(v: uint8x16_t) -> int32x4_t {
    // SAFETY: as above.
    unsafe { vreinterpretq_s32_u8(v) }
}

#[inline(always)]
fn signed(v: int32x4_t) -> int8x16_t {
    // SAFETY: as above.
    unsafe { vreinterpretq_s8_s32(v) }
}

impl<D: Dot> Isa for Neon<D> {
    type V = [int32x4_t; 4];
    type F = [float32x4_t; 4];
    const OFFSET: i32 = 0;
    const WIDTH: usize = 2;

    #[inline(always)]
    fn load(self, from: &[u8; 64]) -> [int32x4_t; 4] {
        let (quarters, _) = from.as_chunks::<16>();
        let mut v = by_token!([vdupq_n_s32(0); 4]);
        for (v, quarter) in v.iter_mut().zip(quarters) {
            *v = lanes(by_token!(vld1q_u8(quarter.as_ptr())));
        }
        v
    }
    #[inline(always)]
    fn splat(self, x: i32) -> [int32x4_t; 4] {
        by_token!([vdupq_n_s32(x); 4])
    }
    #[inline(always)]
    fn low(self, mut v: [int32x4_t; 4]) -> [int32x4_t; 4] {
        for v in &mut v {
            *v = lanes(by_token!(vandq_u8(bytes(*v), vdupq_n_u8(15))));
        }
        v
    }
    #[inline(always)]
    fn high(self, mut v: [int32x4_t; 4]) -> [int32x4_t; 4] {
        for v in &mut v {
            *v = lanes(by_token!(vshrq_n_u8::<4>(bytes(*v))));
        }
        v
    }
    #[inline(always)]
    fn six<const T: usize>(self, mut low: [int32x4_t; 4], two: [int32x4_t; 4]) -> [int32x4_t; 4] {
        for i in 0..4 {
            low[i] = lanes(by_token!({
                let two = bytes(two[i]);
                let shifted = match T {
                    0 => vshlq_n_u8::<4>(two),
                    1 => vshlq_n_u8::<2>(two),
                    2 => two,
                    _ => vshrq_n_u8::<2>(two),
                };
                vorrq_u8(bytes(low[i]), vandq_u8(shifted, vdupq_n_u8(0x30)))
            }));
        }
        low
    }
    /// Codes up to 63 are signed bytes too.
    #[inline(always)]
    fn dot(self, acc: [int32x4_t; 4], codes: [int32x4_t; 4], x: [int32x4_t; 4]) -> [int32x4_t; 4] {
        self.dot_signed(acc, codes, x)
    }
    #[inline(always)]
    fn dot_signed(self, acc: [int32x4_t; 4], w: [int32x4_t; 4], x: [int32x4_t; 4]) -> [int32x4_t; 4] {
        let mut sums = acc;
        for i in 0..4 {
            sums[i] = self.0.dot(acc[i], signed(w[i]), signed(x[i]));
        }
        sums
    }
    #[inline(always)]
    fn add_scaled(self, acc: [int32x4_t; 4], v: [int32x4_t; 4], scales: &[u8; TILE_ROWS]) -> [int32x4_t; 4] {
        by_token!({
            let scales = vreinterpretq_s8_u8(vld1q_u8(scales.as_ptr()));
            let (low, high) = (vmovl_s8(vget_low_s8(scales)), vmovl_high_s8(scales));
            [
                vmlaq_s32(acc[0], v[0], vmovl_s16(vget_low_s16(low))),
                vmlaq_s32(acc[1], v[1], vmovl_high_s16(low)),
                vmlaq_s32(acc[2], v[2], vmovl_s16(vget_low_s16(high))),
                vmlaq_s32(acc[3], v[3], vmovl_high_s16(high)),
            ]
        })
    }
    #[inline(always)]
    fn zero(self) -> [float32x4_t; 4] {
        by_token!([vdupq_n_f32(0.0); 4])
    }
    /// Halves are converted one by one: the instruction for it takes a type that Rust does not have yet.
    #[inline(always)]
    fn accumulate(
        self,
        mut acc: [float32x4_t; 4],
        sums: [int32x4_t; 4],
        d: &[u8; 2 * TILE_ROWS],
    ) -> [float32x4_t; 4] {
        for (i, d) in d.as_chunks::<8>().0.iter().enumerate() {
            let (halves, _) = d.as_chunks::<2>();
            let d = [0, 1, 2, 3].map(|r: usize| half_to_f32(u16::from_le_bytes(halves[r])));
            acc[i] = by_token!(vaddq_f32(acc[i], vmulq_f32(vcvtq_f32_s32(sums[i]), vld1q_f32(d.as_ptr()))));
        }
        acc
    }
    #[inline(always)]
    fn finish(self, acc: [float32x4_t; 4], scale: f32) -> [f32; TILE_ROWS] {
        let mut out = [0.0; TILE_ROWS];
        for (out, acc) in out.as_chunks_mut::<4>().0.iter_mut().zip(acc) {
            by_token!(vst1q_f32(out.as_mut_ptr(), vmulq_f32(acc, vdupq_n_f32(scale))));
        }
        out
    }
}
