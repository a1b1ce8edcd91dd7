//! AVX2 with FMA and F16C: sixteen lanes are two registers.

use std::arch::x86_64::*;

use bitnet_burn_plugin::features::{self, Features};
use half::f16;

use super::{by_token, digits, prefetch, sum8};
use crate::simd::{Isa, Kernel};

/// Proof that the CPU has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub struct Avx2(());

impl Avx2 {
    pub(in crate::simd) fn new() -> Option<Self> {
        const NEEDED: Features = Features::of("avx2,fma,f16c");
        features::has(NEEDED).then_some(Self(()))
    }
}

pub(in crate::simd) fn run_avx2<K: Kernel>(isa: Avx2, kernel: K) -> K::Out {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn compiled<K: Kernel>(isa: Avx2, kernel: K) -> K::Out {
        kernel.run(isa)
    }
    // SAFETY: the token proves that the CPU has the instructions.
    unsafe { compiled(isa, kernel) }
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
                halves!(|h| _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32::<4>(wide[h]), eight))),
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
    fn ternary_pairs(self, v: &[u8; 4], d: [__m256; 2]) -> [__m256; 2] {
        by_token!({
            let word = _mm256_set1_epi32(i32::from_le_bytes(*v));
            let shifts = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
            let table = multiples(d[0]);
            // Chooses by the lowest two bits.
            [
                _mm256_permutevar_ps(table, _mm256_srlv_epi32(word, shifts)),
                _mm256_permutevar_ps(table, _mm256_srlv_epi32(_mm256_srli_epi32::<16>(word), shifts)),
            ]
        })
    }
    #[inline(always)]
    fn ternary_quarters(self, v: &[u8; 16], d: [__m256; 2]) -> [[__m256; 2]; 4] {
        by_token!({
            let wide = halves!(|h| _mm256_cvtepu8_epi32(_mm_loadl_epi64(v.as_ptr().add(8 * h).cast())));
            let table = multiples(d[0]);
            [
                halves!(|h| _mm256_permutevar_ps(table, wide[h])),
                halves!(|h| _mm256_permutevar_ps(table, _mm256_srli_epi32::<2>(wide[h]))),
                halves!(|h| _mm256_permutevar_ps(table, _mm256_srli_epi32::<4>(wide[h]))),
                halves!(|h| _mm256_permutevar_ps(table, _mm256_srli_epi32::<6>(wide[h]))),
            ]
        })
    }
    #[inline(always)]
    fn ternary_digits(self, v: &[u8; 16], powers: &[u16; 16], d: [__m256; 2]) -> [__m256; 2] {
        by_token!({
            let digits = digits(v, powers);
            let table = multiples(d[0]);
            [
                _mm256_permutevar_ps(table, _mm256_cvtepu16_epi32(_mm256_castsi256_si128(digits))),
                _mm256_permutevar_ps(table, _mm256_cvtepu16_epi32(_mm256_extracti128_si256::<1>(digits))),
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
            let lane =
                _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(8 * h as i32));
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

/// -d, 0, d and 2d in each four lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn multiples(d: __m256) -> __m256 {
    _mm256_mul_ps(_mm256_setr_ps(-1.0, 0.0, 1.0, 2.0, -1.0, 0.0, 1.0, 2.0), d)
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
