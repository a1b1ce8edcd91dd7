//! Sixteen `f32` lanes on whatever vectors the machine has.
//!
//! An algorithm is written once, as a [`Kernel`], over the operations of [`Isa`]; [`Level::run`] compiles it
//! for AVX-512, for AVX2 and for the target's baseline, and picks one. Every operation of `Isa` gives the
//! same bits on every instruction set, so the kernels do too. (The scheme of one generic algorithm over a
//! small vector trait is that of the `memchr` crate; the proof by token, that of `pulp`.)
//!
//! A value of [`Avx512`] or [`Avx2`] proves that the CPU has those instructions: only [`Level::available`]
//! makes them.

use bitnet_burn_cpu::dense::half_to_f32;
use half::f16;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// Sixteen lanes of `f32` and the operations on them that the kernels of this module need.
///
/// All methods are `#[inline(always)]`: they have to be compiled into the function that enables the
/// instructions.
pub(crate) trait Isa: Copy + Send + Sync {
    /// Sixteen lanes.
    type F: Copy;
    /// Whether there are registers for a tile of 4 x 4 vectors (else for 2 x 2).
    const WIDE: bool;

    /// All lanes `v`.
    fn splat(self, v: f32) -> Self::F;
    /// All lanes the value of an IEEE half.
    fn splat_f16(self, bits: u16) -> Self::F;
    /// Sixteen values.
    fn load(self, v: &[f32; 16]) -> Self::F;
    /// Sixteen halves.
    fn load_f16(self, v: &[f16; 16]) -> Self::F;
    /// Sixteen little-endian `f32`.
    fn f32_bytes(self, v: &[u8; 64]) -> Self::F;
    /// Sixteen little-endian halves.
    fn f16_bytes(self, v: &[u8; 32]) -> Self::F;
    /// Sixteen little-endian `bf16`.
    fn bf16_bytes(self, v: &[u8; 32]) -> Self::F;
    /// Sixteen signed bytes.
    fn i8_bytes(self, v: &[u8; 16]) -> Self::F;
    /// The low nibbles less 8, and the high nibbles less 8.
    fn nibbles(self, v: &[u8; 16]) -> [Self::F; 2];
    /// Four times sixteen 6-bit values less 32, as Q6_K holds them: the low nibbles of `a` with bits 0..2 of
    /// `high`, those of `b` with bits 2..4, the high nibbles of `a` with bits 4..6, those of `b` with bits
    /// 6..8.
    fn sixes(self, a: &[u8; 16], b: &[u8; 16], high: &[u8; 16]) -> [Self::F; 4];
    /// Writes sixteen values.
    fn store(self, v: Self::F, to: &mut [f32; 16]);

    /// `a + b`.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a * b + c` in the first `n` lanes, `c` in the others.
    fn fma_first(self, n: usize, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The sum of the lanes by the tree of this module's numerics.
    fn sum(self, v: Self::F) -> f32;
    /// The [`sum`](Self::sum) of each of sixteen vectors.
    fn sums(self, v: [Self::F; 16]) -> Self::F;
    /// Transposes sixteen vectors.
    fn transpose(self, v: [Self::F; 16]) -> [Self::F; 16];

    /// `a * b + c` of single values, rounded once.
    fn fma1(self, a: f32, b: f32, c: f32) -> f32;

    /// Asks for the cache line at `p` (any address is allowed), for the second-level cache: what lies behind the
    /// loop's next steps would only push their data out of the first.
    fn prefetch(self, p: *const u8);

    /// Up to sixteen values, zeros in the lanes behind them.
    #[inline(always)]
    fn load_first(self, v: &[f32]) -> Self::F {
        let mut lanes = [0.0; LANES];
        lanes[..v.len()].copy_from_slice(v);
        self.load(&lanes)
    }
}

/// A computation that is compiled for every instruction set.
pub(crate) trait Kernel {
    /// What it returns.
    type Out;
    /// Computes it; must be `#[inline(always)]`, as everything that it calls in its hot loops.
    fn run<I: Isa>(self, isa: I) -> Self::Out;
}

/// An instruction set that this machine has.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Level {
    /// AVX-512 F, BW, VL, DQ.
    #[cfg(target_arch = "x86_64")]
    Avx512(x86::Avx512),
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(x86::Avx2),
    /// What the target's baseline has (on AArch64, NEON).
    Portable(Portable),
}

impl Level {
    /// The instruction sets that this machine has, best first.
    pub(crate) fn available() -> impl Iterator<Item = Self> {
        let levels: [Option<Self>; 3] = [
            #[cfg(target_arch = "x86_64")]
            x86::Avx512::new().map(Self::Avx512),
            #[cfg(target_arch = "x86_64")]
            x86::Avx2::new().map(Self::Avx2),
            Some(Self::Portable(Portable)),
            #[cfg(not(target_arch = "x86_64"))]
            None,
            #[cfg(not(target_arch = "x86_64"))]
            None,
        ];
        levels.into_iter().flatten()
    }

    /// The best of them.
    pub(crate) fn best() -> Self {
        static BEST: std::sync::OnceLock<Level> = std::sync::OnceLock::new();
        *BEST.get_or_init(|| Self::available().next().unwrap_or(Self::Portable(Portable)))
    }

    /// Runs a kernel with these instructions.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Out {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(isa) => x86::run_avx512(isa, kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(isa) => x86::run_avx2(isa, kernel),
            Self::Portable(isa) => kernel.run(isa),
        }
    }
}

/// Plain Rust, and the specification of the other instruction sets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

/// `a * b + c` rounded once, without the instruction for it.
///
/// The product of two `f32` is exact in `f64`. The sum is rounded to odd there (the error of the addition,
/// which is exact, tells the direction), after which rounding to `f32` is right, since `f64` has more than
/// two bits to spare (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).
#[cfg_attr(any(target_feature = "fma", not(target_arch = "x86_64")), allow(dead_code))]
#[inline(always)]
fn emulated_fma(a: f32, b: f32, c: f32) -> f32 {
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
        x86::prefetch(p);
        #[cfg(not(target_arch = "x86_64"))]
        let _ = p;
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    //! The same operations in AVX-512 and AVX2.
    //!
    //! Small integers become floats without a conversion: put into the low bits of a power of two's mantissa,
    //! they are that power plus the integer times the last bit's weight, and subtracting the power is exact.

    use std::arch::x86_64::*;

    use super::{Isa, Kernel, f16};

    /// Proof that the CPU has AVX-512 F, BW, VL, DQ.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Avx512(());

    /// Proof that the CPU has AVX2, FMA and F16C.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Avx2(());

    /// Calls an intrinsic inside a method of a token.
    macro_rules! by_token {
        ($($body:tt)*) => {
            // SAFETY: `self` is a token, which only `new` makes, after detecting the instructions; memory is
            // reached through references to arrays of the size that is read or written, by unaligned loads
            // and stores.
            unsafe { $($body)* }
        };
    }

    impl Avx512 {
        pub(super) fn new() -> Option<Self> {
            (is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && Avx2::new().is_some())
            .then_some(Self(()))
        }
    }

    impl Avx2 {
        pub(super) fn new() -> Option<Self> {
            (is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c"))
            .then_some(Self(()))
        }
    }

    pub(super) fn run_avx512<K: Kernel>(isa: Avx512, kernel: K) -> K::Out {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
        fn compiled<K: Kernel>(isa: Avx512, kernel: K) -> K::Out {
            kernel.run(isa)
        }
        // SAFETY: the token proves that the CPU has the instructions.
        unsafe { compiled(isa, kernel) }
    }

    pub(super) fn run_avx2<K: Kernel>(isa: Avx2, kernel: K) -> K::Out {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn compiled<K: Kernel>(isa: Avx2, kernel: K) -> K::Out {
            kernel.run(isa)
        }
        // SAFETY: the token proves that the CPU has the instructions.
        unsafe { compiled(isa, kernel) }
    }

    #[inline(always)]
    pub(super) fn prefetch(p: *const u8) {
        // SAFETY: SSE is part of x86-64, and prefetching is a hint that touches no memory and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }

    impl Isa for Avx512 {
        type F = __m512;
        const WIDE: bool = true;

        #[inline(always)]
        fn splat(self, v: f32) -> __m512 {
            by_token!(_mm512_set1_ps(v))
        }
        #[inline(always)]
        fn splat_f16(self, bits: u16) -> __m512 {
            by_token!(_mm512_cvtph_ps(_mm256_set1_epi16(bits as i16)))
        }
        #[inline(always)]
        fn load(self, v: &[f32; 16]) -> __m512 {
            by_token!(_mm512_loadu_ps(v.as_ptr()))
        }
        #[inline(always)]
        fn load_f16(self, v: &[f16; 16]) -> __m512 {
            by_token!(_mm512_cvtph_ps(_mm256_loadu_si256(v.as_ptr().cast())))
        }
        #[inline(always)]
        fn f32_bytes(self, v: &[u8; 64]) -> __m512 {
            by_token!(_mm512_loadu_ps(v.as_ptr().cast()))
        }
        #[inline(always)]
        fn f16_bytes(self, v: &[u8; 32]) -> __m512 {
            by_token!(_mm512_cvtph_ps(_mm256_loadu_si256(v.as_ptr().cast())))
        }
        #[inline(always)]
        fn bf16_bytes(self, v: &[u8; 32]) -> __m512 {
            by_token!({
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(v.as_ptr().cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            })
        }
        #[inline(always)]
        fn i8_bytes(self, v: &[u8; 16]) -> __m512 {
            by_token!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(v.as_ptr().cast()))))
        }
        #[inline(always)]
        fn nibbles(self, v: &[u8; 16]) -> [__m512; 2] {
            by_token!({
                let wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(v.as_ptr().cast()));
                // (wide & mask) | power
                let low = _mm512_ternarylogic_epi32::<0xEA>(
                    wide,
                    _mm512_set1_epi32(0x0f),
                    _mm512_set1_epi32(0x4b00_0000),
                );
                let high = _mm512_ternarylogic_epi32::<0xEA>(
                    wide,
                    _mm512_set1_epi32(0xf0),
                    _mm512_set1_epi32(0x4900_0000),
                );
                [
                    _mm512_sub_ps(_mm512_castsi512_ps(low), _mm512_set1_ps(8_388_608.0 + 8.0)),
                    _mm512_sub_ps(_mm512_castsi512_ps(high), _mm512_set1_ps(524_288.0 + 8.0)),
                ]
            })
        }
        #[inline(always)]
        fn sixes(self, a: &[u8; 16], b: &[u8; 16], high: &[u8; 16]) -> [__m512; 4] {
            by_token!({
                let a = _mm512_cvtepu8_epi32(_mm_loadu_si128(a.as_ptr().cast()));
                let b = _mm512_cvtepu8_epi32(_mm_loadu_si128(b.as_ptr().cast()));
                let h = _mm512_cvtepu8_epi32(_mm_loadu_si128(high.as_ptr().cast()));
                // Bits 0..2 and 4..6 of `high` to 4..6 and 8..10; bits 2..4 and 6..8 to the same places.
                let (even, odd) = (_mm512_slli_epi32::<4>(h), _mm512_slli_epi32::<2>(h));
                // The last bit of 2^23 weighs 1; bit 4 of 2^19 weighs 1.
                let (p23, p19) = (_mm512_set1_epi32(0x4b00_0000), _mm512_set1_epi32(0x4900_0000));
                let (m0, m4) = (_mm512_set1_epi32(0x0f), _mm512_set1_epi32(0xf0));
                let (h4, h8) = (_mm512_set1_epi32(0x30), _mm512_set1_epi32(0x300));
                // 0xEA: (x & y) | z.
                let q0 = _mm512_ternarylogic_epi32::<0xEA>(a, m0, p23);
                let q1 = _mm512_ternarylogic_epi32::<0xEA>(b, m0, p23);
                let q2 = _mm512_ternarylogic_epi32::<0xEA>(a, m4, p19);
                let q3 = _mm512_ternarylogic_epi32::<0xEA>(b, m4, p19);
                let q0 = _mm512_ternarylogic_epi32::<0xEA>(even, h4, q0);
                let q1 = _mm512_ternarylogic_epi32::<0xEA>(odd, h4, q1);
                let q2 = _mm512_ternarylogic_epi32::<0xEA>(even, h8, q2);
                let q3 = _mm512_ternarylogic_epi32::<0xEA>(odd, h8, q3);
                let (s23, s19) = (_mm512_set1_ps(8_388_608.0 + 32.0), _mm512_set1_ps(524_288.0 + 32.0));
                [
                    _mm512_sub_ps(_mm512_castsi512_ps(q0), s23),
                    _mm512_sub_ps(_mm512_castsi512_ps(q1), s23),
                    _mm512_sub_ps(_mm512_castsi512_ps(q2), s19),
                    _mm512_sub_ps(_mm512_castsi512_ps(q3), s19),
                ]
            })
        }
        #[inline(always)]
        fn store(self, v: __m512, to: &mut [f32; 16]) {
            by_token!(_mm512_storeu_ps(to.as_mut_ptr(), v))
        }

        #[inline(always)]
        fn add(self, a: __m512, b: __m512) -> __m512 {
            by_token!(_mm512_add_ps(a, b))
        }
        #[inline(always)]
        fn mul(self, a: __m512, b: __m512) -> __m512 {
            by_token!(_mm512_mul_ps(a, b))
        }
        #[inline(always)]
        fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
            by_token!(_mm512_fmadd_ps(a, b, c))
        }
        #[inline(always)]
        fn fma_first(self, n: usize, a: __m512, b: __m512, c: __m512) -> __m512 {
            by_token!(_mm512_mask3_fmadd_ps(a, b, c, ((1u32 << n.min(16)) - 1) as u16))
        }
        #[inline(always)]
        fn sum(self, v: __m512) -> f32 {
            by_token!({
                let v = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
                sum8(v)
            })
        }
        #[inline(always)]
        fn sums(self, v: [__m512; 16]) -> __m512 {
            by_token!({
                // Each step joins two vectors into one, whose halves then hold what is left of each; in this
                // order the sums come out in that of the vectors.
                let order = [0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15];
                let (mut r, mut s, mut t) = ([v[0]; 8], [v[0]; 4], [v[0]; 2]);
                for i in 0..8 {
                    let (a, b) = (v[order[i]], v[order[i + 8]]);
                    r[i] =
                        _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
                }
                for i in 0..4 {
                    s[i] = _mm512_add_ps(
                        _mm512_shuffle_f32x4::<0x88>(r[i], r[i + 4]),
                        _mm512_shuffle_f32x4::<0xdd>(r[i], r[i + 4]),
                    );
                }
                for i in 0..2 {
                    t[i] = _mm512_add_ps(
                        _mm512_shuffle_ps::<0x44>(s[i], s[i + 2]),
                        _mm512_shuffle_ps::<0xee>(s[i], s[i + 2]),
                    );
                }
                _mm512_add_ps(_mm512_shuffle_ps::<0x88>(t[0], t[1]), _mm512_shuffle_ps::<0xdd>(t[0], t[1]))
            })
        }
        #[inline(always)]
        fn transpose(self, r: [__m512; 16]) -> [__m512; 16] {
            by_token!({
                let (mut t, mut u) = (r, r);
                for i in 0..8 {
                    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
                }
                // u[4i + j]: in its 128-bit lane c, column 4c + j of the rows 4i..4i+4.
                for i in 0..4 {
                    let (a, b) = (_mm512_castps_pd(t[4 * i]), _mm512_castps_pd(t[4 * i + 1]));
                    let (c, e) = (_mm512_castps_pd(t[4 * i + 2]), _mm512_castps_pd(t[4 * i + 3]));
                    u[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
                    u[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
                    u[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, e));
                    u[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, e));
                }
                for j in 0..4 {
                    let a = _mm512_shuffle_f32x4::<0x88>(u[j], u[4 + j]);
                    let b = _mm512_shuffle_f32x4::<0xdd>(u[j], u[4 + j]);
                    let c = _mm512_shuffle_f32x4::<0x88>(u[8 + j], u[12 + j]);
                    let d = _mm512_shuffle_f32x4::<0xdd>(u[8 + j], u[12 + j]);
                    t[j] = _mm512_shuffle_f32x4::<0x88>(a, c);
                    t[8 + j] = _mm512_shuffle_f32x4::<0xdd>(a, c);
                    t[4 + j] = _mm512_shuffle_f32x4::<0x88>(b, d);
                    t[12 + j] = _mm512_shuffle_f32x4::<0xdd>(b, d);
                }
                t
            })
        }

        #[inline(always)]
        fn fma1(self, a: f32, b: f32, c: f32) -> f32 {
            a.mul_add(b, c)
        }
        #[inline(always)]
        fn prefetch(self, p: *const u8) {
            prefetch(p)
        }
    }

    /// The tree from eight lanes on.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn sum8(v: __m256) -> f32 {
        let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
    }

    /// `f` of the lower and the upper eight lanes.
    macro_rules! halves {
        (|$h:ident| $body:expr) => {
            [
                {
                    let $h = 0usize;
                    $body
                },
                {
                    let $h = 1usize;
                    $body
                },
            ]
        };
    }

    impl Isa for Avx2 {
        type F = [__m256; 2];
        const WIDE: bool = false;

        #[inline(always)]
        fn splat(self, v: f32) -> [__m256; 2] {
            by_token!([_mm256_set1_ps(v); 2])
        }
        #[inline(always)]
        fn splat_f16(self, bits: u16) -> [__m256; 2] {
            by_token!([_mm256_cvtph_ps(_mm_set1_epi16(bits as i16)); 2])
        }
        #[inline(always)]
        fn load(self, v: &[f32; 16]) -> [__m256; 2] {
            by_token!(halves!(|h| _mm256_loadu_ps(v.as_ptr().add(8 * h))))
        }
        #[inline(always)]
        fn load_f16(self, v: &[f16; 16]) -> [__m256; 2] {
            by_token!(halves!(|h| _mm256_cvtph_ps(_mm_loadu_si128(v.as_ptr().add(8 * h).cast()))))
        }
        #[inline(always)]
        fn f32_bytes(self, v: &[u8; 64]) -> [__m256; 2] {
            by_token!(halves!(|h| _mm256_loadu_ps(v.as_ptr().add(32 * h).cast())))
        }
        #[inline(always)]
        fn f16_bytes(self, v: &[u8; 32]) -> [__m256; 2] {
            by_token!(halves!(|h| _mm256_cvtph_ps(_mm_loadu_si128(v.as_ptr().add(16 * h).cast()))))
        }
        #[inline(always)]
        fn bf16_bytes(self, v: &[u8; 32]) -> [__m256; 2] {
            by_token!(halves!(|h| {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(v.as_ptr().add(16 * h).cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            }))
        }
        #[inline(always)]
        fn i8_bytes(self, v: &[u8; 16]) -> [__m256; 2] {
            by_token!(halves!(|h| {
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(v.as_ptr().add(8 * h).cast())))
            }))
        }
        #[inline(always)]
        fn nibbles(self, v: &[u8; 16]) -> [[__m256; 2]; 2] {
            by_token!({
                let wide = halves!(|h| _mm256_cvtepu8_epi32(_mm_loadl_epi64(v.as_ptr().add(8 * h).cast())));
                let eight = _mm256_set1_epi32(8);
                [
                    halves!(|h| {
                        let q = _mm256_and_si256(wide[h], _mm256_set1_epi32(15));
                        _mm256_cvtepi32_ps(_mm256_sub_epi32(q, eight))
                    }),
                    halves!(|h| {
                        _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32::<4>(wide[h]), eight))
                    }),
                ]
            })
        }
        #[inline(always)]
        fn sixes(self, a: &[u8; 16], b: &[u8; 16], high: &[u8; 16]) -> [[__m256; 2]; 4] {
            by_token!({
                // In bytes, all sixteen at once.
                let a = _mm_loadu_si128(a.as_ptr().cast());
                let b = _mm_loadu_si128(b.as_ptr().cast());
                let h = _mm_loadu_si128(high.as_ptr().cast());
                let (low, two) = (_mm_set1_epi8(0x0f), _mm_set1_epi8(0x30));
                [
                    sixes16(_mm_and_si128(a, low), _mm_and_si128(_mm_slli_epi16::<4>(h), two)),
                    sixes16(_mm_and_si128(b, low), _mm_and_si128(_mm_slli_epi16::<2>(h), two)),
                    sixes16(_mm_and_si128(_mm_srli_epi16::<4>(a), low), _mm_and_si128(h, two)),
                    sixes16(
                        _mm_and_si128(_mm_srli_epi16::<4>(b), low),
                        _mm_and_si128(_mm_srli_epi16::<2>(h), two),
                    ),
                ]
            })
        }
        #[inline(always)]
        fn store(self, v: [__m256; 2], to: &mut [f32; 16]) {
            by_token!({
                _mm256_storeu_ps(to.as_mut_ptr(), v[0]);
                _mm256_storeu_ps(to.as_mut_ptr().add(8), v[1]);
            })
        }

        #[inline(always)]
        fn add(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
            by_token!(halves!(|h| _mm256_add_ps(a[h], b[h])))
        }
        #[inline(always)]
        fn mul(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
            by_token!(halves!(|h| _mm256_mul_ps(a[h], b[h])))
        }
        #[inline(always)]
        fn fma(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
            by_token!(halves!(|h| _mm256_fmadd_ps(a[h], b[h], c[h])))
        }
        #[inline(always)]
        fn fma_first(self, n: usize, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
            by_token!(halves!(|h| {
                let lane = _mm256_add_epi32(
                    _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                    _mm256_set1_epi32(8 * h as i32),
                );
                let inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(n.min(16) as i32), lane);
                _mm256_blendv_ps(c[h], _mm256_fmadd_ps(a[h], b[h], c[h]), _mm256_castsi256_ps(inside))
            }))
        }
        #[inline(always)]
        fn sum(self, v: [__m256; 2]) -> f32 {
            by_token!(sum8(_mm256_add_ps(v[0], v[1])))
        }
        #[inline(always)]
        fn sums(self, v: [[__m256; 2]; 16]) -> [__m256; 2] {
            by_token!(halves!(|h| {
                let mut first = [v[0][0]; 8];
                for i in 0..8 {
                    first[i] = _mm256_add_ps(v[8 * h + i][0], v[8 * h + i][1]);
                }
                sums8(first)
            }))
        }
        #[inline(always)]
        fn transpose(self, r: [[__m256; 2]; 16]) -> [[__m256; 2]; 16] {
            let mut out = r;
            for rows in 0..2 {
                for columns in 0..2 {
                    let mut block = [r[0][0]; 8];
                    for (i, v) in block.iter_mut().enumerate() {
                        *v = r[8 * rows + i][columns];
                    }
                    let block = by_token!(transpose8(block));
                    for (i, v) in block.into_iter().enumerate() {
                        out[8 * columns + i][rows] = v;
                    }
                }
            }
            out
        }

        #[inline(always)]
        fn fma1(self, a: f32, b: f32, c: f32) -> f32 {
            a.mul_add(b, c)
        }
        #[inline(always)]
        fn prefetch(self, p: *const u8) {
            prefetch(p)
        }
    }

    /// [`sum8`] of each of eight vectors, as in `Avx512::sums`.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn sums8(v: [__m256; 8]) -> __m256 {
        let order = [0, 2, 1, 3, 4, 6, 5, 7];
        let (mut s, mut t) = ([v[0]; 4], [v[0]; 2]);
        for i in 0..4 {
            let (a, b) = (v[order[i]], v[order[i + 4]]);
            s[i] = _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
        }
        for i in 0..2 {
            t[i] = _mm256_add_ps(
                _mm256_shuffle_ps::<0x44>(s[i], s[i + 2]),
                _mm256_shuffle_ps::<0xee>(s[i], s[i + 2]),
            );
        }
        _mm256_add_ps(_mm256_shuffle_ps::<0x88>(t[0], t[1]), _mm256_shuffle_ps::<0xdd>(t[0], t[1]))
    }

    /// Sixteen 6-bit values less 32 from their parts. (Not a closure, which would not have the instructions.)
    #[inline]
    #[target_feature(enable = "avx2")]
    fn sixes16(low: __m128i, high: __m128i) -> [__m256; 2] {
        let q = _mm_sub_epi8(_mm_or_si128(low, high), _mm_set1_epi8(32));
        [
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(q, q))),
        ]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn transpose8(r: [__m256; 8]) -> [__m256; 8] {
        let (mut t, mut u) = (r, r);
        for i in 0..4 {
            t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        for i in 0..2 {
            u[4 * i] = _mm256_shuffle_ps::<0x44>(t[4 * i], t[4 * i + 2]);
            u[4 * i + 1] = _mm256_shuffle_ps::<0xee>(t[4 * i], t[4 * i + 2]);
            u[4 * i + 2] = _mm256_shuffle_ps::<0x44>(t[4 * i + 1], t[4 * i + 3]);
            u[4 * i + 3] = _mm256_shuffle_ps::<0xee>(t[4 * i + 1], t[4 * i + 3]);
        }
        for j in 0..4 {
            t[j] = _mm256_permute2f128_ps::<0x20>(u[j], u[4 + j]);
            t[4 + j] = _mm256_permute2f128_ps::<0x31>(u[j], u[4 + j]);
        }
        t
    }
}

/// `e^x` in `f32`, within 2 ulp for -87 <= x <= 88; zero below that, infinite above; NaN for NaN.
///
/// Range reduction by Cody and Waite, then a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2] with Cephes'
/// coefficients (`expf`), all by fused multiply-adds, so the same bits everywhere; branch-free, so that loops
/// over it vectorise.
#[inline(always)]
pub(crate) fn exp<I: Isa>(isa: I, x: f32) -> f32 {
    /// 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = isa.fma1(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // ln 2 in two parts, the first with few enough bits that n times it is exact.
    let r = isa.fma1(n, -355.0 / 512.0, x);
    let r = isa.fma1(n, 2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4;
    p = isa.fma1(p, r, 1.398_2e-3);
    p = isa.fma1(p, r, 8.333_452e-3);
    p = isa.fma1(p, r, 4.166_579_6e-2);
    p = isa.fma1(p, r, 1.666_666_5e-1);
    p = isa.fma1(p, r, 0.5);
    let p = isa.fma1(p, r * r, r) + 1.0;
    // 2^n, -126 <= n <= 127 within the range.
    let y = p * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    let y = if x < -87.0 { 0.0 } else { y };
    if x > 88.0 { f32::INFINITY } else { y }
}

#[cfg(test)]
pub(crate) mod tests {
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
        let special =
            [0.0, -0.0, 1.0, -1.0, f32::MIN_POSITIVE, 1e-45, -1e-45, f32::MAX, f32::MIN, f32::INFINITY];
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
}
