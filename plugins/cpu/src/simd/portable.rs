//! Plain Rust.

use half::f16;

#[cfg(target_arch = "x86_64")]
use super::x86_64;
use super::{Isa, LANES};

/// Plain Rust: the specification of the other instruction sets.
#[derive(Clone, Copy, Debug)]
pub struct Portable;

/// `a * b + c` rounded once, without the instruction for it.
///
/// The product of two `f32` is exact in `f64`. The sum is rounded to odd there (the error of the addition,
/// which is exact, tells the direction), after which rounding to `f32` is right, since `f64` has more than
/// two bits to spare (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).
#[cfg_attr(any(target_feature = "fma", not(target_arch = "x86_64")), allow(dead_code))]
#[inline(always)]
pub(super) fn emulated_fma(a: f32, b: f32, c: f32) -> f32 {
    let (p, c) = (f64::from(a) * f64::from(b), f64::from(c));
    let s = p + c;
    let t = s - p;
    let error = (p - (s - t)) + (c - t);
    let bits = s.to_bits();
    // A NaN (infinite operands) compares as neither.
    let inexact = (error > 0.0) | (error < 0.0);
    let away = (error > 0.0) == (s > 0.0);
    let step = if away { 1 } else { u64::MAX };
    let odd = if inexact & (bits & 1 == 0) { bits.wrapping_add(step) } else { bits };
    f64::from_bits(odd) as f32
}

#[inline(always)]
fn portable_fma(a: f32, b: f32, c: f32) -> f32 {
    #[cfg(all(target_arch = "x86_64", not(target_feature = "fma")))]
    return emulated_fma(a, b, c);
    #[cfg(not(all(target_arch = "x86_64", not(target_feature = "fma"))))]
    return a.mul_add(b, c);
}

#[inline(always)]
fn lanes(f: impl Fn(usize) -> f32) -> [f32; 16] {
    let mut v = [0.0; LANES];
    for (l, v) in v.iter_mut().enumerate() {
        *v = f(l);
    }
    v
}

impl Isa for Portable {
    type F = [f32; 16];
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, v: f32) -> [f32; 16] {
        [v; 16]
    }
    #[inline(always)]
    fn splat_f16(self, bits: u16) -> [f32; 16] {
        [half_to_f32(bits); 16]
    }
    #[inline(always)]
    fn load(self, v: &[f32; 16]) -> [f32; 16] {
        *v
    }
    #[inline(always)]
    fn load_f16(self, v: &[f16; 16]) -> [f32; 16] {
        lanes(|l| half_to_f32(v[l].to_bits()))
    }
    #[inline(always)]
    fn f32_bytes(self, v: &[u8; 64]) -> [f32; 16] {
        lanes(|l| f32::from_le_bytes([v[4 * l], v[4 * l + 1], v[4 * l + 2], v[4 * l + 3]]))
    }
    #[inline(always)]
    fn f16_bytes(self, v: &[u8; 32]) -> [f32; 16] {
        lanes(|l| half_to_f32(u16::from_le_bytes([v[2 * l], v[2 * l + 1]])))
    }
    #[inline(always)]
    fn bf16_bytes(self, v: &[u8; 32]) -> [f32; 16] {
        lanes(|l| f32::from_bits(u32::from(u16::from_le_bytes([v[2 * l], v[2 * l + 1]])) << 16))
    }
    #[inline(always)]
    fn i8_bytes(self, v: &[u8; 16]) -> [f32; 16] {
        lanes(|l| f32::from(v[l] as i8))
    }
    #[inline(always)]
    fn nibbles(self, v: &[u8; 16]) -> [[f32; 16]; 2] {
        [lanes(|l| f32::from((v[l] & 15) as i8 - 8)), lanes(|l| f32::from((v[l] >> 4) as i8 - 8))]
    }
    #[inline(always)]
    fn sixes(self, a: &[u8; 16], b: &[u8; 16], high: &[u8; 16]) -> [[f32; 16]; 4] {
        [
            lanes(|l| f32::from((a[l] & 15 | high[l] << 4 & 0x30) as i8 - 32)),
            lanes(|l| f32::from((b[l] & 15 | high[l] << 2 & 0x30) as i8 - 32)),
            lanes(|l| f32::from((a[l] >> 4 | high[l] & 0x30) as i8 - 32)),
            lanes(|l| f32::from((b[l] >> 4 | high[l] >> 2 & 0x30) as i8 - 32)),
        ]
    }
    #[inline(always)]
    fn ternary_pairs(self, v: &[u8; 4], d: [f32; 16]) -> [f32; 16] {
        let word = u32::from_le_bytes(*v);
        lanes(|l| ((word >> (2 * l) & 3) as i32 - 1) as f32 * d[l])
    }
    #[inline(always)]
    fn ternary_quarters(self, v: &[u8; 16], d: [f32; 16]) -> [[f32; 16]; 4] {
        [0, 2, 4, 6].map(|shift| lanes(|l| f32::from((v[l] >> shift & 3) as i8 - 1) * d[l]))
    }
    #[inline(always)]
    fn ternary_digits(self, v: &[u8; 16], powers: &[u16; 16], d: [f32; 16]) -> [f32; 16] {
        lanes(|l| {
            let fraction = u16::from(v[l]).wrapping_mul(powers[l]);
            f32::from(((u32::from(fraction) * 3) >> 16) as i8 - 1) * d[l]
        })
    }
    #[inline(always)]
    fn store(self, v: [f32; 16], to: &mut [f32; 16]) {
        *to = v;
    }

    #[inline(always)]
    fn add(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        lanes(|l| a[l] + b[l])
    }
    #[inline(always)]
    fn mul(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        lanes(|l| a[l] * b[l])
    }
    #[inline(always)]
    fn fma(self, a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        lanes(|l| portable_fma(a[l], b[l], c[l]))
    }
    #[inline(always)]
    fn fma_first(self, n: usize, a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        lanes(|l| if l < n { portable_fma(a[l], b[l], c[l]) } else { c[l] })
    }
    #[inline(always)]
    fn sum(self, mut v: [f32; 16]) -> f32 {
        for half in [8, 4, 2, 1] {
            for l in 0..half {
                v[l] += v[l + half];
            }
        }
        v[0]
    }
    #[inline(always)]
    fn sums(self, v: [[f32; 16]; 16]) -> [f32; 16] {
        lanes(|i| self.sum(v[i]))
    }
    #[inline(always)]
    fn transpose(self, v: [[f32; 16]; 16]) -> [[f32; 16]; 16] {
        let mut t = [[0.0; 16]; 16];
        for (i, row) in v.iter().enumerate() {
            for (j, &x) in row.iter().enumerate() {
                t[j][i] = x;
            }
        }
        t
    }

    #[inline(always)]
    fn fma1(self, a: f32, b: f32, c: f32) -> f32 {
        portable_fma(a, b, c)
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        #[cfg(target_arch = "x86_64")]
        x86_64::prefetch(p);
        #[cfg(not(target_arch = "x86_64"))]
        let _ = p;
    }
}

/// `f32` from the bits of a half: the exponent is re-biased by an exact multiplication, which also
/// normalises.
#[inline(always)]
pub(crate) fn half_to_f32(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let scaled = (f32::from_bits(magnitude) * f32::from_bits(0x7780_0000)).to_bits();
    let special = if magnitude >= 0x0f80_0000 { 0x7f80_0000 } else { 0 };
    let quiet = if magnitude > 0x0f80_0000 { 0x0040_0000 } else { 0 };
    f32::from_bits(scaled | special | quiet | (u32::from(bits & 0x8000) << 16))
}
