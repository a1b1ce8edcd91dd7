//! NEON: the look-up tables of [`lut`], read by `tbl` for 16 rows at once.

use std::arch::aarch64::*;
use std::ffi::CStr;
use std::ops::Range;

use bitnet_burn_plugin::abi::Signature;
use bitnet_burn_plugin::sdk::{
    ActivationsRef, KernelError, KernelResult, OutputTile, TernaryKernel, WeightsRef,
};

use super::quad::{load, store};
use super::unroll;
use crate::generic::{self, TableJob, TableMicro};
use crate::lut::{self, GROUPS, INDEX_BYTES, RADIX, STEPS_PER_FLUSH, TABLE_BYTES};
use crate::tile::BLOCK_ROWS;

/// 32-row blocks of the look-up layout with groups of `G` weights: 2 for TL1, 3 for TL2.
pub(crate) struct Tables<const G: usize>;

fn check_features() -> KernelResult {
    match std::arch::is_aarch64_feature_detected!("neon") {
        true => Ok(()),
        false => Err(KernelError::unsupported("this CPU lacks neon")),
    }
}

impl<const G: usize> TernaryKernel for Tables<G> {
    const NAME: &'static CStr = if G == 2 { c"tl1-neon" } else { c"tl2-neon" };
    const LAYOUT: Option<&'static CStr> = Some(lut::layout::<G>());
    const FEATURES: &'static CStr = c"neon";
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
        #[target_feature(enable = "neon")]
        fn prepare<const G: usize>(x: &ActivationsRef, workspace: &mut [u8]) -> KernelResult {
            lut::prepare::<G>(x, workspace)
        }
        check_features()?;
        // SAFETY: the features were detected.
        unsafe { prepare::<G>(x, workspace) }
    }

    fn run(w: &WeightsRef, x: &ActivationsRef, workspace: &[u8], y: &mut OutputTile) -> KernelResult {
        #[target_feature(enable = "neon")]
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

/// The sums with `tbl`.
struct Micro;

impl TableMicro for Micro {
    #[inline(always)]
    unsafe fn gemv<const G: usize>(w: *const u8, steps: usize, tables: *const u8) -> [i32; BLOCK_ROWS] {
        // SAFETY: the caller promises the features, the steps at w and their tables.
        unsafe {
            // Four rows each, in their order.
            let mut wide = [vdupq_n_s32(0); 8];
            let mut start = 0;
            while start < steps {
                let end = steps.min(start + STEPS_PER_FLUSH);
                let mut acc = [vdupq_n_s16(0); 4];
                for j in start..end {
                    let w = w.add(j * lut::step_bytes::<G>());
                    let tables = tables.add(j * GROUPS * TABLE_BYTES);
                    let mut signs = [vdupq_n_s8(0); 2];
                    if G == 3 {
                        signs = load::<2>(w.add(INDEX_BYTES)).map(|signs| vreinterpretq_s8_u8(signs));
                    }
                    // The sums of low and of high digits, 16 rows each.
                    let mut sums = [[vdupq_n_s8(0); 2]; 2];
                    let mut bytes = [vdupq_n_u8(0); 2];
                    unroll!(i < GROUPS => {
                        if i % 2 == 0 {
                            bytes = load::<2>(w.add(16 * i));
                        }
                        let table = load::<2>(tables.add(i * TABLE_BYTES));
                        for half in 0..2 {
                            let index = match i % 2 {
                                0 => vandq_u8(bytes[half], vdupq_n_u8(15)),
                                _ => vshrq_n_u8::<4>(bytes[half]),
                            };
                            for (sum, table) in sums[half].iter_mut().zip(table) {
                                let digit = vreinterpretq_s8_u8(vqtbl1q_u8(table, index));
                                *sum = match G {
                                    2 => vaddq_s8(*sum, digit),
                                    // -1 or 1, from the sign that is in bit 7 when its turn comes.
                                    _ => vmlaq_s8(
                                        *sum,
                                        digit,
                                        vorrq_s8(vshrq_n_s8::<7>(signs[half]), vdupq_n_s8(1)),
                                    ),
                                };
                            }
                            signs[half] = vshlq_n_s8::<1>(signs[half]);
                        }
                    });
                    let radix = vdup_n_s8(RADIX as i8);
                    for (half, [low, high]) in sums.into_iter().enumerate() {
                        let first = vaddw_s8(acc[2 * half], vget_low_s8(low));
                        acc[2 * half] = vmlal_s8(first, vget_low_s8(high), radix);
                        let second = vaddw_high_s8(acc[2 * half + 1], low);
                        acc[2 * half + 1] = vmlal_high_s8(second, high, vcombine_s8(radix, radix));
                    }
                }
                for (i, acc) in acc.into_iter().enumerate() {
                    wide[2 * i] = vaddw_s16(wide[2 * i], vget_low_s16(acc));
                    wide[2 * i + 1] = vaddw_high_s16(wide[2 * i + 1], acc);
                }
                start = end;
            }
            let mut sums = [0; BLOCK_ROWS];
            store(wide, &mut sums);
            sums
        }
    }
}
