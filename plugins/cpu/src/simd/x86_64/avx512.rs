//! AVX-512: sixteen lanes are one register.

use std::arch::x86_64::*;

use bitnet_burn_plugin::features::{self, Features};
use half::f16;

use super::{Avx2, by_token, digits, prefetch, sum8};
use crate::simd::{Isa, Kernel};

/// Proof that the CPU has AVX-512 F, BW, VL, DQ.
#[derive(Clone, Copy, Debug)]
pub struct Avx512(());

impl Avx512 {
    pub(in crate::simd) fn new() -> Option<Self> {
        const NEEDED: Features = Features::of("avx512f,avx512bw,avx512vl,avx512dq");
        (features::has(NEEDED) && Avx2::new().is_some()).then_some(Self(()))
    }
}

pub(in crate::simd) fn run_avx512<K: Kernel>(isa: Avx512, kernel: K) -> K::Out {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
    fn compiled<K: Kernel>(isa: Avx512, kernel: K) -> K::Out {
        kernel.run(isa)
    }
    // SAFETY: the token proves that the CPU has the instructions.
    unsafe { compiled(isa, kernel) }
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
    fn ternary_pairs(self, v: &[u8; 4], d: __m512) -> __m512 {
        by_token!({
            let shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let codes = _mm512_srlv_epi32(_mm512_set1_epi32(i32::from_le_bytes(*v)), shifts);
            // Chooses by the lowest two bits.
            _mm512_permutevar_ps(multiples(d), codes)
        })
    }
    #[inline(always)]
    fn ternary_quarters(self, v: &[u8; 16], d: __m512) -> [__m512; 4] {
        by_token!({
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(v.as_ptr().cast()));
            let table = multiples(d);
            [
                _mm512_permutevar_ps(table, bytes),
                _mm512_permutevar_ps(table, _mm512_srli_epi32::<2>(bytes)),
                _mm512_permutevar_ps(table, _mm512_srli_epi32::<4>(bytes)),
                _mm512_permutevar_ps(table, _mm512_srli_epi32::<6>(bytes)),
            ]
        })
    }
    #[inline(always)]
    fn ternary_digits(self, v: &[u8; 16], powers: &[u16; 16], d: __m512) -> __m512 {
        by_token!(_mm512_permutevar_ps(multiples(d), _mm512_cvtepu16_epi32(digits(v, powers))))
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
                r[i] = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
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

/// -d, 0, d and 2d in each four lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn multiples(d: __m512) -> __m512 {
    _mm512_mul_ps(_mm512_broadcast_f32x4(_mm_setr_ps(-1.0, 0.0, 1.0, 2.0)), d)
}
