//! Every instruction set against the portable operations, and those against the standard library.

use half::f16;

use super::portable::{emulated_fma, half_to_f32};
use super::*;

/// A generator for tests (SplitMix64).
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// In [-1, 1).
    pub(crate) fn f32(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
    pub(crate) fn f32s(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.f32()).collect()
    }
    pub(crate) fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }
}

pub(crate) fn bits(v: &[f32]) -> Vec<u32> {
    v.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn emulated_fma_is_fma() {
    let mut rng = Rng(1);
    let special = [0.0, -0.0, 1.0, -1.0, f32::MIN_POSITIVE, 1e-45, -1e-45, f32::MAX, f32::MIN, f32::INFINITY];
    let check = |a: f32, b: f32, c: f32| {
        let (want, got) = (a.mul_add(b, c), emulated_fma(a, b, c));
        assert!(
            want.to_bits() == got.to_bits() || want.is_nan() && got.is_nan(),
            "{a:e} * {b:e} + {c:e}: {want:e}, got {got:e}"
        );
    };
    for a in special {
        for b in special {
            for c in special {
                check(a, b, c);
            }
        }
    }
    // Squares, with sums of a like magnitude, near ties, and anything positive.
    for i in 0..2_000_000u32 {
        let x = f32::from_bits(rng.next() as u32);
        let sum = match i % 3 {
            0 => x * x * (rng.f32() + 1.0),
            1 => f32::from_bits(
                ((x * x).to_bits() & 0xff80_0000).wrapping_sub((rng.next() % 30) as u32 * 0x0080_0000)
                    & 0x7fff_ffff,
            ),
            _ => f32::from_bits(rng.next() as u32 & 0x7fff_ffff),
        };
        check(x, x, sum);
    }
    for i in 0..300_000 {
        let (a, b) = (f32::from_bits(rng.next() as u32), f32::from_bits(rng.next() as u32));
        check(a, b, f32::from_bits(rng.next() as u32));
        // Operands of like size, and sums that nearly cancel or nearly tie.
        let (a, b, c) = (rng.f32(), rng.f32(), rng.f32());
        check(a, b, c);
        check(a, b, -(a * b));
        check(a, b, c * 2f32.powi(i % 60 - 30));
        check(a, f32::from_bits(b.to_bits() & !0xfff), c * 2f32.powi(-24));
    }
}

#[test]
fn half_conversion_is_exact() {
    for bits in 0..=u16::MAX {
        let (want, got) = (f16::from_bits(bits).to_f32(), half_to_f32(bits));
        assert!(want.to_bits() == got.to_bits() || want.is_nan() && got.is_nan(), "{bits:#x}");
    }
}

#[test]
fn exp_is_accurate() {
    let at = |x: f32| exp(Portable, x);
    let mut worst = 0f64;
    for i in 0..=1_000_000u32 {
        let x = -87.0 + i as f32 * (175.0 / 1_000_000.0);
        let (want, got) = (f64::from(x).exp(), f64::from(at(x)));
        let ulp = f64::from((want as f32).next_up()) - f64::from(want as f32);
        worst = worst.max((got - want).abs() / ulp);
    }
    assert!(worst <= 2.0, "{worst} ulp");
    assert_eq!(at(0.0), 1.0);
    assert_eq!(at(-87.01), 0.0);
    assert_eq!(at(f32::NEG_INFINITY), 0.0);
    assert_eq!(at(89.0), f32::INFINITY);
    assert!(at(f32::NAN).is_nan());
}

/// All operations on one set of inputs.
struct Everything<'a> {
    f: &'a [f32],
    b: &'a [u8],
}

impl Kernel for Everything<'_> {
    type Out = Vec<f32>;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> Vec<f32> {
        let (f, _) = self.f.as_chunks::<16>();
        let (b, _) = self.b.as_chunks::<16>();
        let mut v: Vec<I::F> = Vec::new();
        v.extend([isa.splat(f[0][3]), isa.splat_f16(0x3555), isa.splat_f16(0x8001), isa.load(&f[0])]);
        v.push(isa.load_f16(&std::array::from_fn(|l| f16::from_f32(f[0][l]))));
        v.push(isa.f32_bytes(self.b[..64].try_into().unwrap()));
        let pair = self.b[..32].try_into().unwrap();
        v.extend([isa.f16_bytes(pair), isa.bf16_bytes(pair), isa.i8_bytes(&b[0])]);
        v.extend(isa.nibbles(&b[0]));
        v.extend(isa.sixes(&b[0], &b[1], &b[2]));
        for d in [0x3555, 0xb001, 0x8000] {
            let d = isa.splat_f16(d);
            v.push(isa.ternary_pairs(b[0].first_chunk().unwrap(), d));
            v.extend(isa.ternary_quarters(&b[0], d));
            v.push(isa.ternary_digits(
                &b[0],
                &[256, 768, 2304, 6912, 20736, 256, 768, 2304, 6912, 20736, 256, 768, 2304, 6912, 20736, 256],
                d,
            ));
        }
        let (x, y, z) = (isa.load(&f[0]), isa.load(&f[1]), isa.load(&f[2]));
        v.extend([isa.add(x, y), isa.mul(x, y), isa.fma(x, y, z), isa.load_first(&f[0][..5])]);
        for n in 0..=16 {
            v.push(isa.fma_first(n, x, y, z));
        }
        v.extend(isa.transpose(std::array::from_fn(|i| isa.load(&f[i]))));
        v.push(isa.splat(isa.sum(x)));
        v.push(isa.sums(std::array::from_fn(|i| isa.load(&f[i]))));
        v.push(isa.splat(isa.fma1(f[0][0], f[0][1], f[0][2])));
        let mut e = [0.0; 16];
        for (e, x) in e.iter_mut().zip(f[3]) {
            *e = exp(isa, x * 100.0);
        }
        v.push(isa.load(&e));
        let mut out = Vec::new();
        for v in v {
            let mut to = [0.0; 16];
            isa.store(v, &mut to);
            out.extend(to);
        }
        out
    }
}

#[test]
fn operations_agree() {
    let mut rng = Rng(2);
    for _ in 0..200 {
        let f = rng.f32s(256);
        // No NaN among the bytes read as floats.
        let b: Vec<u8> =
            rng.bytes(64).into_iter().map(|b| if b & 0x7c == 0x7c { b ^ 0x40 } else { b }).collect();
        let want = bits(&Level::Portable(Portable).run(Everything { f: &f, b: &b }));
        for level in Level::available() {
            assert_eq!(bits(&level.run(Everything { f: &f, b: &b })), want, "{level:?}");
        }
    }
}
