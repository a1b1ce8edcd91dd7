//! AVX-512 VBMI: the layout `t5x32` decoded by byte permutations (`vpermb`), multiplied by `vpdpbusd`.
//!
//! A fifth fewer bytes than 2 bits a weight, for a few instructions more: the kernel for weights that come
//! from memory.

use std::arch::x86_64::*;
use std::ops::Range;

use bitnet_burn_plugin::abi::Signature;
use bitnet_burn_plugin::features::{self, Features};
use bitnet_burn_plugin::sdk::{
    ActivationsRef, KernelError, KernelResult, OutputTile, TernaryKernel, WeightsRef,
};

use super::avx512vnni::{pair_masks, shifted, unscaled};
use crate::ternary::generic::{self, TileJob, TileMicro};
use crate::ternary::tile::{BLOCK_ROWS, STEP_BYTES};
use crate::ternary::trits::{self, STEP};

/// 32-row blocks of the layout `t5x32`.
pub(crate) struct Trits;

impl TernaryKernel for Trits {
    const NAME: &'static std::ffi::CStr = c"t5-avx512vbmi";
    const LAYOUT: Option<&'static std::ffi::CStr> = Some(trits::LAYOUT);
    const FEATURES: &'static std::ffi::CStr = c"avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi";
    const ROW_GRANULE: usize = BLOCK_ROWS;

    fn supports(signature: &Signature) -> bool {
        // `gemv` keeps sums that are 64 times too large, of every fourth and every fifth weight: they reach
        // 64 * 2 * 128 * 2K/5 in magnitude, below 2^31 up to K = 327680.
        generic::supports(signature, 1 << 18)
    }

    fn granule_bytes(k: usize) -> usize {
        trits::block_bytes(k)
    }

    fn pack(canonical: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
        trits::pack(canonical, rows, out)
    }

    fn unpack(packed: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
        trits::unpack(packed, rows, out)
    }

    fn run(w: &WeightsRef, x: &ActivationsRef, _workspace: &[u8], y: &mut OutputTile) -> KernelResult {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
        fn run(job: TileJob) {
            // SAFETY: this function's features are the micro-kernel's.
            unsafe { job.run::<Micro>() }
        }
        const NEEDED: Features = Features::of("avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi");
        if !features::has(NEEDED) {
            return Err(KernelError::unsupported("this CPU lacks AVX-512 VNNI or VBMI"));
        }
        let job = TileJob::new(w, x, y, STEP)?;
        // SAFETY: the features were detected.
        unsafe { run(job) };
        Ok(())
    }
}

/// The products with `vpermb` and `vpdpbusd`.
struct Micro;

/// Bytes ahead to prefetch: what it takes to keep up with memory on one sequential stream.
const PREFETCH: usize = 4096;

impl TileMicro for Micro {
    const MR: usize = 8;

    #[inline(always)]
    unsafe fn gemv(w: *const u8, steps: usize, x: *const i8) -> [i32; BLOCK_ROWS] {
        // SAFETY: the caller promises the features, `steps` steps of 128 bytes at w and 20 activations for
        // each at x; a prefetch may have any address.
        unsafe {
            let tables = Tables::load();
            let masks = pair_masks();
            let mut acc = [[_mm512_setzero_si512(); 4]; 2];
            for j in 0..steps {
                let w = w.add(j * STEP_BYTES);
                let x = x.add(j * STEP).cast::<i32>();
                for tile in 0..2 {
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(64 * tile + PREFETCH).cast());
                    let (four, last) = tables.decode(_mm512_loadu_si512(w.add(64 * tile).cast()));
                    for t in 0..4 {
                        let x = _mm512_set1_epi32(x.add(t).read_unaligned());
                        acc[tile][t] = _mm512_dpbusd_epi32(acc[tile][t], _mm512_and_si512(four, masks[t]), x);
                    }
                    let x = _mm512_set1_epi32(x.add(4).read_unaligned());
                    acc[tile][3] = _mm512_dpbusd_epi32(acc[tile][3], last, x);
                }
            }
            unscaled(acc)
        }
    }

    #[inline(always)]
    unsafe fn gemm<const M: usize>(w: *const u8, steps: usize, x: [*const i8; M]) -> [[i32; BLOCK_ROWS]; M] {
        // SAFETY: as in `gemv`, for each of the rows.
        unsafe {
            let tables = Tables::load();
            let mask = _mm512_set1_epi8(3);
            let mut acc = [[_mm512_setzero_si512(); 2]; M];
            for j in 0..steps {
                let w = w.add(j * STEP_BYTES);
                _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(PREFETCH).cast());
                _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(PREFETCH + 64).cast());
                let (four0, last0) = tables.decode(_mm512_loadu_si512(w.cast()));
                let (four1, last1) = tables.decode(_mm512_loadu_si512(w.add(64).cast()));
                let codes = [
                    [_mm512_and_si512(four0, mask), _mm512_and_si512(four1, mask)],
                    [shifted::<2>(four0, mask), shifted::<2>(four1, mask)],
                    [shifted::<4>(four0, mask), shifted::<4>(four1, mask)],
                    [shifted::<6>(four0, mask), shifted::<6>(four1, mask)],
                    [shifted::<6>(last0, mask), shifted::<6>(last1, mask)],
                ];
                for t in 0..5 {
                    for m in 0..M {
                        let x = x[m].add(j * STEP + 4 * t).cast::<i32>().read_unaligned();
                        let x = _mm512_set1_epi32(x);
                        acc[m][0] = _mm512_dpbusd_epi32(acc[m][0], codes[t][0], x);
                        acc[m][1] = _mm512_dpbusd_epi32(acc[m][1], codes[t][1], x);
                    }
                }
            }
            let mut sums = [[0; BLOCK_ROWS]; M];
            for m in 0..M {
                for tile in 0..2 {
                    _mm512_storeu_si512(sums[m][16 * tile..].as_mut_ptr().cast(), acc[m][tile]);
                }
            }
            sums
        }
    }
}

/// The layout's tables in registers.
struct Tables {
    low: __m512i,
    high: __m512i,
    high_last: __m512i,
    high_bits: __m512i,
}

impl Tables {
    /// # Safety
    /// The CPU has AVX-512F.
    #[inline(always)]
    unsafe fn load() -> Self {
        // SAFETY: the caller's promise; the tables have 64 bytes each.
        unsafe {
            Self {
                low: _mm512_loadu_si512(trits::TABLES.0[0].as_ptr().cast()),
                high: _mm512_loadu_si512(trits::TABLES.0[1].as_ptr().cast()),
                high_last: _mm512_loadu_si512(trits::TABLES.0[2].as_ptr().cast()),
                high_bits: _mm512_set1_epi8(0xc0u8 as i8),
            }
        }
    }

    /// c0 .. c3 of every byte in bit pairs, and c4 in the highest.
    ///
    /// # Safety
    /// The CPU has AVX-512BW and VBMI.
    #[inline(always)]
    unsafe fn decode(&self, v: __m512i) -> (__m512i, __m512i) {
        // SAFETY: the caller's promise.
        unsafe {
            let escaped = _mm512_cmpge_epu8_mask(v, self.high_bits);
            let four = _mm512_permutexvar_epi8(v, self.low);
            let four = _mm512_mask_permutexvar_epi8(four, escaped, v, self.high);
            let last = _mm512_and_si512(v, self.high_bits);
            let last = _mm512_mask_permutexvar_epi8(last, escaped, v, self.high_last);
            (four, last)
        }
    }
}
