//! AVX2: the look-up tables of [`lut`], read by `vpshufb` for 32 rows at once.

use std::arch::x86_64::*;
use std::ffi::CStr;
use std::ops::Range;

use bitnet_burn_plugin::abi::Signature;
use bitnet_burn_plugin::sdk::{
    ActivationsRef, KernelError, KernelResult, OutputTile, TernaryKernel, WeightsRef,
};

use super::ymm::TILE_PREFETCH;
use crate::generic::{self, TableJob, TableMicro};
use crate::lut::{self, GROUPS, INDEX_BYTES, RADIX, STEPS_PER_FLUSH, TABLE_BYTES};
use crate::tile::BLOCK_ROWS;

/// 32-row blocks of the look-up layout with groups of `G` weights: 2 for TL1, 3 for TL2.
pub(crate) struct Tables<const G: usize>;

fn check_features() -> KernelResult {
    match std::is_x86_feature_detected!("avx2") {
        true => Ok(()),
        false => Err(KernelError::unsupported("this CPU lacks avx2")),
    }
}

impl<const G: usize> TernaryKernel for Tables<G> {
    const NAME: &'static CStr = if G == 2 { c"tl1-avx2" } else { c"tl2-avx2" };
    const LAYOUT: Option<&'static CStr> = Some(lut::layout::<G>());
    const FEATURES: &'static CStr = c"avx2";
    const ROW_GRANULE: usize = BLOCK_ROWS;

    fn supports(signature: &Signature) -> bool {
        generic::supports(signature, lut::MAX_K)
    }

    fn granule_bytes(k: usize) -> usize {
        lut::block_bytes::<G>(k)
    }

    fn pack(canonical: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
        lut::pack::<G>(canonical, rows, out)
    }

    fn unpack(packed: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
        lut::unpack::<G>(packed, rows, out)
    }

    fn workspace_size(m: usize, k: usize) -> usize {
        m.saturating_mul(lut::tables_bytes::<G>(k))
    }

    fn prepare(x: &ActivationsRef, workspace: &mut [u8]) -> KernelResult {
        #[target_feature(enable = "avx2")]
        fn prepare<const G: usize>(x: &ActivationsRef, workspace: &mut [u8]) -> KernelResult {
            lut::prepare::<G>(x, workspace)
        }
        check_features()?;
        // SAFETY: the features were detected.
        unsafe { prepare::<G>(x, workspace) }
    }

    fn run(w: &WeightsRef, x: &ActivationsRef, workspace: &[u8], y: &mut OutputTile) -> KernelResult {
        #[target_feature(enable = "avx2")]
        fn run<const G: usize>(job: TableJob<G>) {
            // SAFETY: this function's features are the micro-kernel's.
            unsafe { job.run::<Micro>() }
        }
        check_features()?;
        let job = TableJob::<G>::new(w, x, workspace, y)?;
        // SAFETY: the features were detected.
        unsafe { run(job) };
        Ok(())
    }
}

/// The sums with `vpshufb ymm`.
struct Micro;

impl TableMicro for Micro {
    #[inline(always)]
    unsafe fn gemv<const G: usize>(w: *const u8, steps: usize, tables: *const u8) -> [i32; BLOCK_ROWS] {
        // SAFETY: the caller promises the features, the steps at w and their tables; a prefetch may have any
        // address.
        unsafe {
            let one = _mm256_set1_epi8(1);
            // Of each pair of bytes, the low digit counts once and the high one 27 times.
            let weights = _mm256_set1_epi16(1 | RADIX << 8);
            // Eight rows each: 0 .. 7, 8 .. 15, 16 .. 23, 24 .. 31.
            let mut wide = [_mm256_setzero_si256(); 4];
            let mut start = 0;
            while start < steps {
                let end = steps.min(start + STEPS_PER_FLUSH);
                // Sixteen rows each: eight from both halves of a register.
                let mut acc = [_mm256_setzero_si256(); 2];
                for j in start..end {
                    let w = w.add(j * lut::step_bytes::<G>());
                    let tables = tables.add(j * GROUPS * TABLE_BYTES);
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(TILE_PREFETCH).cast());
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(TILE_PREFETCH + 64).cast());
                    let last = if G == 2 { one } else { _mm256_loadu_si256(w.add(INDEX_BYTES).cast()) };
                    // The sign of a group is in bit 7 when its turn comes. The lowest bit, set, keeps the
                    // other ones from being zero, which would mean a factor of zero.
                    let mut signs = _mm256_or_si256(last, one);
                    let last = _mm256_or_si256(_mm256_slli_epi16::<7>(last), one);
                    let (mut low, mut high) = (_mm256_setzero_si256(), _mm256_setzero_si256());
                    for i in 0..GROUPS {
                        let index = _mm256_loadu_si256(w.add(BLOCK_ROWS * (i / 2)).cast());
                        let index = if i % 2 == 0 { index } else { _mm256_srli_epi16::<4>(index) };
                        let index = _mm256_and_si256(index, _mm256_set1_epi8(15));
                        let table = tables.add(i * TABLE_BYTES).cast::<__m128i>();
                        let mut digits = [0, 1].map(|half| {
                            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.add(half)));
                            _mm256_shuffle_epi8(table, index)
                        });
                        if G == 3 {
                            let sign = if i == GROUPS - 1 { last } else { signs };
                            digits = digits.map(|digit| _mm256_sign_epi8(digit, sign));
                            signs = _mm256_add_epi8(signs, signs);
                        }
                        low = _mm256_add_epi8(low, digits[0]);
                        high = _mm256_add_epi8(high, digits[1]);
                    }
                    let pairs = [_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)];
                    for i in 0..2 {
                        acc[i] = _mm256_add_epi16(acc[i], _mm256_maddubs_epi16(weights, pairs[i]));
                    }
                }
                for i in 0..2 {
                    let (first, second) =
                        (_mm256_castsi256_si128(acc[i]), _mm256_extracti128_si256::<1>(acc[i]));
                    wide[i] = _mm256_add_epi32(wide[i], _mm256_cvtepi16_epi32(first));
                    wide[2 + i] = _mm256_add_epi32(wide[2 + i], _mm256_cvtepi16_epi32(second));
                }
                start = end;
            }
            let mut sums = [0; BLOCK_ROWS];
            for (i, wide) in wide.into_iter().enumerate() {
                _mm256_storeu_si256(sums[8 * i..].as_mut_ptr().cast(), wide);
            }
            sums
        }
    }
}
