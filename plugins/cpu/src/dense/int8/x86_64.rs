//! Vectors of 256 bits (AVX2, with AVX-VNNI or without) and of 512 (AVX-512 with VNNI).

use std::arch::x86_64::*;

use bitnet_burn_formats::dense_tiles::TILE_ROWS;
use bitnet_burn_plugin::features::{self, Features};

use super::generic::{Isa, Job};

/// Calls an intrinsic inside a method of a token.
macro_rules! by_token {
    ($($body:tt)*) => {
        // SAFETY: `self` is or has a token, which only `new` makes, after detecting the instructions; memory
        // is reached through references to arrays of the size that is read or written, by unaligned loads
        // and stores; a prefetch may have any address.
        unsafe { $($body)* }
    };
}

/// Proof that the CPU has AVX-512 F, BW and VNNI, and what [`Avx2`] proves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx512(());

/// Proof that the CPU has AVX-VNNI, and what [`Avx2`] proves.
#[derive(Clone, Copy, Debug)]
pub(super) struct AvxVnni(());

/// Proof that the CPU has AVX2 and F16C.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx2(());

/// Two vectors of 256 bits for 16 lanes, with the multiply-adds of `D`.
#[derive(Clone, Copy, Debug)]
pub(super) struct By256<D>(D);

impl Avx512 {
    pub(super) fn new() -> Option<Self> {
        const NEEDED: Features = Features::of("avx512f,avx512bw,avx512vnni");
        (features::has(NEEDED) && Avx2::new().is_some()).then_some(Self(()))
    }
}

impl AvxVnni {
    pub(super) fn new() -> Option<By256<Self>> {
        const NEEDED: Features = Features::of("avxvnni");
        (features::has(NEEDED) && Avx2::new().is_some()).then_some(By256(Self(())))
    }
}

impl Avx2 {
    pub(super) fn new() -> Option<By256<Self>> {
        const NEEDED: Features = Features::of("avx2,f16c");
        features::has(NEEDED).then_some(By256(Self(())))
    }
}

pub(super) fn run_avx512(isa: Avx512, job: Job<'_>) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,f16c")]
    fn compiled(isa: Avx512, job: Job<'_>) {
        job.run(isa);
    }
    // SAFETY: the token proves that the CPU has the instructions.
    unsafe { compiled(isa, job) }
}

pub(super) fn run_avx_vnni(isa: By256<AvxVnni>, job: Job<'_>) {
    #[target_feature(enable = "avxvnni,avx2,f16c")]
    fn compiled(isa: By256<AvxVnni>, job: Job<'_>) {
        job.run(isa);
    }
    // SAFETY: the token proves that the CPU has the instructions.
    unsafe { compiled(isa, job) }
}

pub(super) fn run_avx2(isa: By256<Avx2>, job: Job<'_>) {
    #[target_feature(enable = "avx2,f16c")]
    fn compiled(isa: By256<Avx2>, job: Job<'_>) {
        job.run(isa);
    }
    // SAFETY: the token proves that the CPU has the instructions.
    unsafe { compiled(isa, job) }
}

impl Isa for Avx512 {
    type V = __m512i;
    type F = __m512;
    const OFFSET: i32 = 128;
    const WIDTH: usize = 4;

    #[inline(always)]
    fn load(self, from: &[u8; 64]) -> __m512i {
        by_token!(_mm512_loadu_si512(from.as_ptr().cast()))
    }
    #[inline(always)]
    fn splat(self, x: i32) -> __m512i {
        by_token!(_mm512_set1_epi32(x))
    }
    #[inline(always)]
    fn low(self, v: __m512i) -> __m512i {
        by_token!(_mm512_and_si512(v, _mm512_set1_epi8(15)))
    }
    #[inline(always)]
    fn high(self, v: __m512i) -> __m512i {
        by_token!(_mm512_and_si512(_mm512_srli_epi16::<4>(v), _mm512_set1_epi8(15)))
    }
    #[inline(always)]
    fn six<const T: usize>(self, low: __m512i, two: __m512i) -> __m512i {
        by_token!({
            let shifted = match T {
                0 => _mm512_slli_epi16::<4>(two),
                1 => _mm512_slli_epi16::<2>(two),
                2 => two,
                _ => _mm512_srli_epi16::<2>(two),
            };
            // (shifted & 0x30) | low
            _mm512_ternarylogic_epi32::<0xEA>(shifted, _mm512_set1_epi8(0x30), low)
        })
    }
    #[inline(always)]
    fn dot(self, acc: __m512i, codes: __m512i, x: __m512i) -> __m512i {
        by_token!(_mm512_dpbusd_epi32(acc, codes, x))
    }
    /// With its sign bit turned, w is w + 128.
    #[inline(always)]
    fn dot_signed(self, acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
        by_token!(_mm512_dpbusd_epi32(acc, _mm512_xor_si512(w, _mm512_set1_epi8(-128)), x))
    }
    #[inline(always)]
    fn add_scaled(self, acc: __m512i, v: __m512i, scales: &[u8; TILE_ROWS]) -> __m512i {
        by_token!({
            let scales = _mm512_cvtepi8_epi32(_mm_loadu_si128(scales.as_ptr().cast()));
            _mm512_add_epi32(acc, _mm512_mullo_epi32(v, scales))
        })
    }
    #[inline(always)]
    fn zero(self) -> __m512 {
        by_token!(_mm512_setzero_ps())
    }
    #[inline(always)]
    fn accumulate(self, acc: __m512, sums: __m512i, d: &[u8; 2 * TILE_ROWS]) -> __m512 {
        by_token!({
            let d = _mm512_cvtph_ps(_mm256_loadu_si256(d.as_ptr().cast()));
            _mm512_add_ps(acc, _mm512_mul_ps(_mm512_cvtepi32_ps(sums), d))
        })
    }
    #[inline(always)]
    fn finish(self, acc: __m512, scale: f32) -> [f32; TILE_ROWS] {
        let mut out = [0.0; TILE_ROWS];
        by_token!(_mm512_storeu_ps(out.as_mut_ptr(), _mm512_mul_ps(acc, _mm512_set1_ps(scale))));
        out
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        by_token!(_mm_prefetch::<_MM_HINT_T0>(p.cast()));
    }
}

/// Sums of four products of bytes, in 256 bits.
pub(super) trait Dot: Copy {
    /// What [`Dot::signed`] adds to the weights.
    const OFFSET: i32;
    /// `acc` plus products of unsigned bytes up to 63 with signed ones.
    fn unsigned(self, acc: __m256i, w: __m256i, x: __m256i) -> __m256i;
    /// `acc` plus products of the signed bytes `w` plus `OFFSET` with signed ones that are not -128.
    fn signed(self, acc: __m256i, w: __m256i, x: __m256i) -> __m256i;
}

impl Dot for Avx2 {
    const OFFSET: i32 = 0;

    /// No pair of products is more than 2 * 63 * 128 < 2^15.
    #[inline(always)]
    fn unsigned(self, acc: __m256i, w: __m256i, x: __m256i) -> __m256i {
        by_token!({
            let sums = _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1));
            _mm256_add_epi32(acc, sums)
        })
    }
    /// |w| times x with w's sign: no pair of products is more than 2 * 128 * 127 < 2^15.
    #[inline(always)]
    fn signed(self, acc: __m256i, w: __m256i, x: __m256i) -> __m256i {
        by_token!({
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
            _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        })
    }
}

impl Dot for AvxVnni {
    const OFFSET: i32 = 128;

    #[inline(always)]
    fn unsigned(self, acc: __m256i, w: __m256i, x: __m256i) -> __m256i {
        by_token!(_mm256_dpbusd_avx_epi32(acc, w, x))
    }
    /// With its sign bit turned, w is w + 128.
    #[inline(always)]
    fn signed(self, acc: __m256i, w: __m256i, x: __m256i) -> __m256i {
        by_token!(_mm256_dpbusd_avx_epi32(acc, _mm256_xor_si256(w, _mm256_set1_epi8(-128)), x))
    }
}

impl<D: Dot> Isa for By256<D> {
    type V = [__m256i; 2];
    type F = [__m256; 2];
    const OFFSET: i32 = D::OFFSET;
    const WIDTH: usize = 2;

    #[inline(always)]
    fn load(self, from: &[u8; 64]) -> [__m256i; 2] {
        let (halves, _) = from.as_chunks::<32>();
        by_token!([
            _mm256_loadu_si256(halves[0].as_ptr().cast()),
            _mm256_loadu_si256(halves[1].as_ptr().cast()),
        ])
    }
    #[inline(always)]
    fn splat(self, x: i32) -> [__m256i; 2] {
        by_token!([_mm256_set1_epi32(x); 2])
    }
    #[inline(always)]
    fn low(self, v: [__m256i; 2]) -> [__m256i; 2] {
        let low = by_token!(_mm256_set1_epi8(15));
        by_token!([_mm256_and_si256(v[0], low), _mm256_and_si256(v[1], low)])
    }
    #[inline(always)]
    fn high(self, v: [__m256i; 2]) -> [__m256i; 2] {
        self.low(by_token!([_mm256_srli_epi16::<4>(v[0]), _mm256_srli_epi16::<4>(v[1])]))
    }
    #[inline(always)]
    fn six<const T: usize>(self, low: [__m256i; 2], two: [__m256i; 2]) -> [__m256i; 2] {
        let mut codes = low;
        for h in 0..2 {
            codes[h] = by_token!({
                let shifted = match T {
                    0 => _mm256_slli_epi16::<4>(two[h]),
                    1 => _mm256_slli_epi16::<2>(two[h]),
                    2 => two[h],
                    _ => _mm256_srli_epi16::<2>(two[h]),
                };
                _mm256_or_si256(low[h], _mm256_and_si256(shifted, _mm256_set1_epi8(0x30)))
            });
        }
        codes
    }
    #[inline(always)]
    fn dot(self, acc: [__m256i; 2], codes: [__m256i; 2], x: [__m256i; 2]) -> [__m256i; 2] {
        [self.0.unsigned(acc[0], codes[0], x[0]), self.0.unsigned(acc[1], codes[1], x[1])]
    }
    #[inline(always)]
    fn dot_signed(self, acc: [__m256i; 2], w: [__m256i; 2], x: [__m256i; 2]) -> [__m256i; 2] {
        [self.0.signed(acc[0], w[0], x[0]), self.0.signed(acc[1], w[1], x[1])]
    }
    #[inline(always)]
    fn add_scaled(self, acc: [__m256i; 2], v: [__m256i; 2], scales: &[u8; TILE_ROWS]) -> [__m256i; 2] {
        by_token!({
            let scales = _mm_loadu_si128(scales.as_ptr().cast());
            let halves =
                [_mm256_cvtepi8_epi32(scales), _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(scales, scales))];
            [
                _mm256_add_epi32(acc[0], _mm256_mullo_epi32(v[0], halves[0])),
                _mm256_add_epi32(acc[1], _mm256_mullo_epi32(v[1], halves[1])),
            ]
        })
    }
    #[inline(always)]
    fn zero(self) -> [__m256; 2] {
        by_token!([_mm256_setzero_ps(); 2])
    }
    #[inline(always)]
    fn accumulate(self, mut acc: [__m256; 2], sums: [__m256i; 2], d: &[u8; 2 * TILE_ROWS]) -> [__m256; 2] {
        for (h, d) in d.as_chunks::<16>().0.iter().enumerate() {
            acc[h] = by_token!({
                let d = _mm256_cvtph_ps(_mm_loadu_si128(d.as_ptr().cast()));
                _mm256_add_ps(acc[h], _mm256_mul_ps(_mm256_cvtepi32_ps(sums[h]), d))
            });
        }
        acc
    }
    #[inline(always)]
    fn finish(self, acc: [__m256; 2], scale: f32) -> [f32; TILE_ROWS] {
        let mut out = [0.0; TILE_ROWS];
        for (out, acc) in out.as_chunks_mut::<8>().0.iter_mut().zip(acc) {
            by_token!(_mm256_storeu_ps(out.as_mut_ptr(), _mm256_mul_ps(acc, _mm256_set1_ps(scale))));
        }
        out
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        by_token!(_mm_prefetch::<_MM_HINT_T0>(p.cast()));
    }
}
